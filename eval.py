"""Held-out evaluation: how often a policy wins, what it does in which state, whether it read the picture.

    python eval.py --task blackjack --run runs/blackjack-seed1 --episodes 5000
    python eval.py --task blackjack --model pocket                # where RL starts
    python eval.py --task blackjack --policy always:stand         # random, expert, always:ACTION: what to compare with

Episode k is dealt by seed + k, the same for every policy; training deals come from other seeds (train.py).
The last line printed is one JSON object. An average misleads: always standing wins 38 % at Blackjack, so look at
`reading_rate`, `expert_agreement`, `plan_rate` and `hit_rate_by_total` first.
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cnn import FeaturePolicy
from env import GAMES
from expert import continuation, expert_action, plan_right, planned, reads_right
from loading import ModelError, open_model
from lora import adapter_settings
from parse import choose, json_closed, make_prompt
from policy import Policy
from settings import defaults_for


def act(policy, games, pictures, infos, generator, fallback, cot=True, max_new_tokens=256, greedy=False,
        batch=64):
    """Let the policy answer for several games, `batch` at a time.

    generator: torch.Generator for the tokens; fallback: numpy Generator for answers that name no legal action.
    Returns (prompts, responses, choices); a choice is (index of the action, text, whether it named it, token start).
    """
    texts = [make_prompt(game, info, cot) for game, info in zip(games, infos)]
    prompts = policy.encode(pictures, texts)
    responses = []
    for k in range(0, len(prompts), batch):
        responses += policy.generate(prompts[k:k + batch], generator, max_new_tokens, json_closed, greedy)
    choices = []
    for game, response in zip(games, responses):
        text = policy.decode(response)
        index, named, start = choose(text, game.legal_actions(), fallback)
        choices.append((index, text, named, policy.action_start(response, start)))
    return prompts, responses, choices


def model_player(policy, seed, cot=True, max_new_tokens=256, greedy=False, batch=64):
    """A player (games, pictures, infos) → [(action index, text, named)] that asks the policy."""
    generator, fallback = torch.Generator(policy.device).manual_seed(seed), np.random.default_rng(seed)

    def play(games, pictures, infos):
        _, _, choices = act(policy, games, pictures, infos, generator, fallback, cot, max_new_tokens, greedy,
                            batch)
        return [choice[:3] for choice in choices]

    return play


def scripted_player(name, task, seed):
    """A player without a model: "random", "expert" or "always:ACTION". It says nothing: its texts are None."""
    generator = np.random.default_rng(seed)
    kind, _, fixed = name.partition(":")
    if not (kind == "always" and fixed or name in ("random", "expert")):
        raise ValueError(f"no policy {name!r}: use random, expert or always:ACTION")

    def play(games, pictures, infos):
        moves = []
        for game, info in zip(games, infos):
            legal = game.legal_actions()
            if kind == "random":
                index = int(generator.integers(len(legal)))
            elif kind == "expert":
                index = legal.index(expert_action(task, info))
            elif fixed in legal:
                index = legal.index(fixed)
            else:
                raise ValueError(f"{fixed!r} is no legal action of {task}: {', '.join(legal)}")
            moves.append((index, None, True))
        return moves

    return play


def wilson(successes, trials, z=1.96):
    """The 95 % Wilson score interval of a share.

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def evaluate(player, task, episodes, seed, envs=64, cot=True, watch=None):
    """Play episodes seed, seed + 1, … and return the summary as a dict of plain values (see README, "Evaluation").

    envs games run side by side; cot=False: there are no thoughts to check (reading_rate is None);
    watch(picture, text, action, episode) is called at every step, and at an episode's last picture with text and
    action None.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, not {episodes}")
    games = [GAMES[task]() for _ in range(min(envs, episodes))]
    episode_of = list(range(len(games)))                           # which episode each game plays
    states = [game.reset(seed=seed + number) for game, number in zip(games, episode_of)]
    returns, goals, success = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    named, agreed, read, plans, followed, hits = [], [], [], [], [], {}
    next_episode = len(games)
    while games:
        moves = player(games, [picture for picture, _ in states], [info for _, info in states])
        playing_on = []
        for i, (game, number, (picture, info), (index, text, by_name)) in enumerate(
                zip(games, episode_of, states, moves)):
            action = game.legal_actions()[index]
            agreed.append(action == expert_action(task, info))
            if text is not None:
                named.append(by_name)
                if cot:
                    read.append(reads_right(task, text, info))
                if cot and "formula" in info:
                    followed.append(planned(text)[:1] == [action])
                    if continuation(task, info):
                        plans.append(plan_right(planned(text), info))
            if task == "blackjack":
                hits.setdefault(info["total"], []).append(action == "hit")
            if watch:
                watch(picture, text, action, number)
            picture, reward, terminated, truncated, info = game.step(index)
            returns[number] += reward
            if terminated or truncated:
                success[number], goals[number] = info["is_success"], reward > 0
                if watch:
                    watch(picture, None, None, number)
                if next_episode == episodes:
                    continue
                episode_of[i], next_episode = next_episode, next_episode + 1
                picture, info = game.reset(seed=seed + episode_of[i])
            states[i] = picture, info
            playing_on.append(i)
        games, episode_of, states = ([part[i] for i in playing_on] for part in (games, episode_of, states))
    low, high = wilson(success.sum(), episodes)
    result = {"task": task, "episodes": episodes, "seed": seed, "steps": len(agreed),
              "success": success.mean().item(), "success_low": float(low), "success_high": float(high),
              "return_mean": returns.mean().item(), "goal_rate": goals.mean().item(),
              "parse_rate": float(np.mean(named)) if named else None,
              "expert_agreement": float(np.mean(agreed)),
              "reading_rate": float(np.mean(read)) if read else None}
    if followed:
        result["plan_rate"] = float(np.mean(plans)) if plans else None      # of the answers that could still be right
        result["plan_followed"] = float(np.mean(followed))
    if task == "blackjack":
        def rate(totals):
            taken = [hit for total in totals for hit in hits.get(total, [])]
            return float(np.mean(taken)) if taken else None

        result["hit_rate_by_total"] = {str(total): rate([total]) for total in sorted(hits)}
        result["decisions_by_total"] = {str(total): len(hits[total]) for total in sorted(hits)}
        result["hit_rate_to_11"], result["hit_rate_12_to_16"], result["hit_rate_from_17"] = (
            rate(range(4, 12)), rate(range(12, 17)), rate(range(17, 22)))
    return result


# ---- an episode as a moving picture ------------------------------------------------------------------------------
class Film:
    """Collects one episode's pictures with the thoughts and the action beside them; save() writes a GIF or a PNG."""

    def __init__(self):
        self.frames = []

    def __call__(self, picture, text, action, episode):
        if episode != 0:
            return
        frame = Image.new("RGB", (760, 300), (250, 250, 246))
        frame.paste(Image.fromarray(picture), (0, 0))
        pen, font = ImageDraw.Draw(frame), ImageFont.load_default(17)
        lines = textwrap.wrap(text or ("" if action else "The end."), 50) + ([f"plays: {action}"] if action else [])
        pen.multiline_text((318, 20), "\n".join(lines), fill=(30, 30, 36), font=font, spacing=7)
        self.frames.append(frame)

    def save(self, path):
        """A .gif shows one frame after another, a .png one below another."""
        if path.endswith(".gif"):
            self.frames[0].save(path, save_all=True, append_images=self.frames[1:], duration=2500, loop=0)
            return
        width, height = self.frames[0].size
        strip = Image.new("RGB", (width, height * len(self.frames)))
        for row, frame in enumerate(self.frames):
            strip.paste(frame, (0, row * height))
        strip.save(path)


def checkpoints(run):
    """The complete checkpoint folders of a run, oldest first. They appear by renaming: the newest is whole."""
    return sorted(Path(run).glob("checkpoint-" + 6 * "[0-9]"))


def open_run(run):
    """Return (policy of a run's last checkpoint, the run's settings as a dict)."""
    if not checkpoints(run):
        raise ModelError(f"{run} holds no checkpoint: is it the folder that train.py wrote (--out)?")
    last = checkpoints(run)[-1]
    settings = json.loads((Path(run) / "config.json").read_text())
    if settings["model"] == "cnn":
        policy = FeaturePolicy(GAMES[settings["task"]]().legal_actions())
        policy.load(last)
        return policy, settings
    loaded = open_model(settings["model"], settings["bits"])
    policy = Policy(loaded.model, loaded.processor, **adapter_settings(last), temperature=settings["temperature"])
    policy.load(last, value=False)                          # nothing here asks for V
    return policy, settings


def open_start(model, bits="auto", temperature=None):
    """Return (policy before RL, the model's name): a model as it is, with sft.py's adapters where it has some."""
    loaded = open_model(model, bits)
    lora = adapter_settings(loaded.adapters) if loaded.adapters else {"parts": ()}
    if temperature is None:
        temperature = defaults_for(loaded.model.config)["temperature"]
    policy = Policy(loaded.model, loaded.processor, **lora, temperature=temperature)
    if loaded.adapters:
        policy.load(loaded.adapters, value=False)
    return policy, loaded.name


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=GAMES)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--run", help="a run folder of train.py: its last checkpoint, its settings")
    who.add_argument("--model", help="auto, pocket, a hub name or a folder, as it is before RL")
    who.add_argument("--policy", help="random, expert or always:ACTION")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=10_000, help="episode k is dealt by seed + k")
    parser.add_argument("--envs", type=int, default=64, help="games side by side")
    parser.add_argument("--play-batch", type=int, help="answers generated at once [the run's; 64 pocket, 16 else]")
    parser.add_argument("--bits", default="auto", choices=["auto", "4", "16", "32"])
    parser.add_argument("--no-cot", action="store_true", help="ask for the action alone (a run brings its own setting)")
    parser.add_argument("--temperature", type=float, help="of --model [0.5 pocket, 0.2 else; a run brings its own]")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token instead of a draw")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer [the run's own, or 256]")
    parser.add_argument("--render", metavar="FILE.gif", help="also draw the first episode, as a GIF or a PNG")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    try:
        cot = not options.no_cot
        for name in ("episodes", "envs", "max_new_tokens", "play_batch"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
        if options.seed < 0:
            raise ValueError("--seed must not be negative")
        if not options.model and (options.temperature is not None or options.no_cot or options.bits != "auto"):
            raise ValueError("--temperature, --no-cot and --bits are for --model: a run has its own, a policy none")
        if options.render and not options.render.endswith((".gif", ".png")):
            raise ValueError(f"--render writes a GIF or a PNG: call it {Path(options.render).stem}.gif")
        for file in filter(None, (options.out, options.render)):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        if options.policy:
            player, name = scripted_player(options.policy, options.task, options.seed), options.policy
        else:
            if options.run:
                policy, settings = open_run(options.run)
                cot, name, longest, batch = (settings[key] for key in ("cot", "out", "max_new_tokens", "play_batch"))
                if settings["task"] != options.task:
                    print(f"note: {name} was trained on {settings['task']}")
            else:
                policy, name = open_start(options.model, options.bits, options.temperature)
                longest, batch = 256, defaults_for(policy.model.config)["play_batch"]
            player = model_player(policy, options.seed, cot, options.max_new_tokens or longest, options.greedy,
                                  options.play_batch or batch)
        film = Film() if options.render else None
        result = evaluate(player, options.task, options.episodes, options.seed, options.envs, cot, film)
    except (ModelError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("eval.py: out of GPU memory: lower --play-batch (answers generated at once), or use --bits 4")
    result = {"policy": name, **result}
    for key, value in result.items():
        if not isinstance(value, dict):
            print(f"{key:18} {value:.4f}" if isinstance(value, float) else f"{key:18} {value}")
    if film:
        film.save(options.render)
    if options.out:
        Path(options.out).write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
