"""Held-out evaluation: how often a policy wins, what it does in which state, whether it read the picture.

    python eval.py --task blackjack --run runs/blackjack-seed1 --episodes 5000
    python eval.py --task blackjack --model pocket                # where RL starts
    python eval.py --task blackjack --policy always:stand         # random, expert, always:ACTION: what to compare with

Episode k is dealt by seed + k, the same for every policy; training deals come from other seeds (train.py).
The last line printed is one JSON object. An average misleads: always standing wins 38 % at Blackjack, so look at
`reading_rate`, `expert_agreement`, `plan_rate` and `hit_rate_by_total` first.
Does not handle: letting a policy act (rollout.py).
"""

import argparse
import itertools
import json
import math
import os
import signal
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C in the seconds of importing: no traceback

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from env import TASKS, make_game
from games.expert import best_actions, continuations, expert_action, plan_right, planned, reads_right
from games.household import next_step
from plumbing.checkpoint import newest_checkpoint
from plumbing.errors import ModelError, foreign, in_words
from plumbing.manifest import check
from plumbing.settings import WORLD, Settings, add_flags, default_of, with_task_defaults
from policy import Policy
from rollout import Choice, act
from vlm.loading import is_small, open_model
from vlm.lora import adapter_settings


# ---- players --------------------------------------------------------------------------------------------------------
def model_player(policy, seed, cot=True, max_new_tokens=256, greedy=False, batch_size=64):
    """A player that asks the policy: a function (games, pictures, infos) → a Choice for each game."""
    generator, fallback = torch.Generator(policy.device).manual_seed(seed), np.random.default_rng(seed)

    def play(games, pictures, infos):
        return act(policy, games, pictures, infos, generator, fallback, cot, max_new_tokens, greedy, batch_size)[2]

    return play


def scripted_player(name, task, seed):
    """A player without a model, whose texts are None: "random", "expert", "always:ACTION", and on ALFWorld "heuristic"
    (remembers nothing)."""
    generator = np.random.default_rng(seed)
    kind, _, fixed = name.partition(":")
    names = ("random", "expert", *(("heuristic",) if task == "alfworld" else ()))
    if not (kind == "always" and fixed or name in names):
        raise ValueError(f"no policy {name!r}: use {', '.join(names)} or always:ACTION")

    def play(games, pictures, infos):
        choices = []
        for game, info in zip(games, infos):
            legal = game.legal_actions()
            if kind == "random":
                index = int(generator.integers(len(legal)))
            elif kind == "expert":
                index = legal.index(expert_action(task, info))
            elif kind == "heuristic":
                index = legal.index(next_step(info, memory=False)[1])
            elif fixed in legal:
                index = legal.index(fixed)
            else:
                raise ModelError(f"{fixed!r} is no legal action of {task}: {', '.join(legal)}")
            choices.append(Choice(legal[index], index))
        return choices

    return play


# ---- playing --------------------------------------------------------------------------------------------------------
@dataclass
class Table:
    """A game in play: which episode it is, and what it shows now."""
    game: Any
    episode: int
    picture: np.ndarray = None
    info: dict = None


class Decision(NamedTuple):
    """One step of one episode: what the game knew of its state, and what was chosen."""
    info: dict
    choice: Choice


def evaluate(player, task: str, episodes: int, seed: int, num_envs=64, cot=True, watch=None, world=None) -> dict:
    """Play episodes seed, seed + 1, … and return the summary as a dict of plain values (results/README.md).

    num_envs games run side by side; cot=False: there are no thoughts to check (reading_rate is None);
    watch(picture, choice, episode) is called at every step, and at an episode's last picture with the choice None;
    world: env.make_game's further options. ALFWorld's houses are those held out, and success is told by kind of task.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, not {episodes}")
    returns, goals, success = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    world, kinds = ({"split": "held out"} if task == "alfworld" else {}) | (world or {}), [None] * episodes
    decisions, waiting = [], iter(range(episodes))
    tables = [Table(make_game(task, **world), episode) for episode in itertools.islice(waiting, num_envs)]
    for table in tables:
        table.picture, table.info = table.game.reset(seed=seed + table.episode)
    while tables:
        choices = player(*zip(*((table.game, table.picture, table.info) for table in tables)))
        for table, choice in zip(tables, choices):
            decisions.append(Decision(table.info, choice))
            if watch:
                watch(table.picture, choice, table.episode)
            table.picture, reward, terminated, truncated, table.info = table.game.step(choice.index)
            returns[table.episode] += reward
            if terminated or truncated:
                success[table.episode], goals[table.episode] = table.info["is_success"], terminated and reward > 0
                kinds[table.episode] = table.info.get("kind")
                if watch:
                    watch(table.picture, None, table.episode)
                table.episode = next(waiting, None)
                if table.episode is not None:
                    table.picture, table.info = table.game.reset(seed=seed + table.episode)
        tables = [table for table in tables if table.episode is not None]
    low, high = wilson(success.sum(), episodes)
    result = {"task": task, "episodes": episodes, "seed": seed, "steps": len(decisions),
              "success": success.mean().item(), "success_low": float(low), "success_high": float(high),
              "return_mean": returns.mean().item(), "goal_rate": goals.mean().item()}
    if any(kinds):
        result["success_by_kind"] = {kind: rate(won for won, own in zip(success, kinds) if own == kind)
                                     for kind in sorted(set(kinds))}
    return result | decision_statistics(task, decisions, cot)


# ---- statistics -----------------------------------------------------------------------------------------------------
def wilson(successes, trials, z=1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def rate(truths: Iterable[bool]) -> float | None:
    """The share of a list that is true, None of an empty one."""
    truths = list(truths)
    return float(np.mean(truths)) if truths else None


def decision_statistics(task, decisions, cot):
    """Shares of the decisions that named a legal action, that are the expert's too, whose thoughts are right."""
    answered = [decision for decision in decisions if decision.choice.text is not None]
    thinking = answered if cot else []
    found = {
        "parse_rate": rate(choice.named for _, choice in answered),
        "expert_agreement": rate(choice.action in best_actions(task, info) for info, choice in decisions),
        "reading_rate": rate(reads_right(task, choice.text, info) for info, choice in thinking)}
    if thinking and "formula" in decisions[0].info:
        found |= plan_statistics(task, thinking)
    if task == "blackjack":
        found |= blackjack_statistics(decisions)
    return found


def plan_statistics(task, decisions):
    """Formula games: how often the plan in the thoughts is right while one could be, and how often it is followed."""
    return {"plan_rate": rate(plan_right(planned(choice.text), info)
                              for info, choice in decisions if continuations(task, info)),
            "plan_followed": rate(planned(choice.text)[:1] == [choice.action] for _, choice in decisions)}


def blackjack_statistics(decisions):
    """How often it hits: on each total, and on the totals that cannot bust, that are close, that should stand."""
    hits = {}
    for info, choice in decisions:
        hits.setdefault(info["total"], []).append(choice.action == "hit")
    bands = {"hit_rate_to_11": range(4, 12), "hit_rate_12_to_16": range(12, 17), "hit_rate_from_17": range(17, 22)}
    return {"hit_rate_by_total": {str(total): rate(hits[total]) for total in sorted(hits)},
            "decisions_by_total": {str(total): len(hits[total]) for total in sorted(hits)},
            **{name: rate(hit for total in band for hit in hits.get(total, [])) for name, band in bands.items()}}


# ---- an episode as a moving picture ---------------------------------------------------------------------------------
class Film:
    """Collects one episode's pictures with the thoughts and the action beside them; save() writes a GIF or a PNG."""

    def __init__(self):
        self.frames = []

    def __call__(self, picture, choice, episode):
        if episode != 0:
            return
        frame = Image.new("RGB", (760, 300), (250, 250, 246))
        frame.paste(Image.fromarray(picture), (0, 0))
        pen, font = ImageDraw.Draw(frame), ImageFont.load_default(17)
        lines = ["The end."]
        if choice:
            drawn = "" if choice.named else " (the answer names no legal action: drawn at random)"
            lines = textwrap.wrap(choice.text or "", 50) + textwrap.wrap(f"plays: {choice.action}{drawn}", 50)
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


# ---- the command line -----------------------------------------------------------------------------------------------
PLAY_SETTINGS = ("num_envs", "play_batch_size", "max_new_tokens", "bits", "cot", "temperature", *WORLD)


def open_run(run):
    """Return (policy of a run's last checkpoint, the run's settings as a dict)."""
    last = newest_checkpoint(run)
    check(last)
    with foreign(Path(run) / "config.json"):
        settings = dict(json.loads((Path(run) / "config.json").read_text(encoding="utf-8")))
    if not (last / "adapter_config.json").exists():
        raise ModelError(f"{last} holds no adapters of a vision-language model: it is for the program that made it")
    if missing := set(PLAY_SETTINGS) - set(WORLD) - set(settings):
        raise ModelError(f"{run} was written by another version of this program (no {', '.join(sorted(missing))} in "
                         "its config.json): evaluate it with that version")
    policy, _ = open_policy(str(last), settings["bits"], settings["temperature"], settings["task"])
    return policy, settings


def open_policy(model="auto", bits="auto", temperature=None, task="blackjack"):
    """Return (policy, the model's name): a model as it is, or with its adapters where it is a folder of some.

    policy, _ = open_policy("pocket") is all that an interactive prompt needs.
    """
    loaded = open_model(model, bits, Settings(task=task))
    lora = adapter_settings(loaded.adapters) if loaded.adapters else {"target_modules": ()}
    if temperature is None:
        temperature = default_of(Settings, "temperature", is_small(loaded.model.config))
    policy = Policy(loaded.model, loaded.processor, **lora, temperature=temperature)
    if loaded.adapters:
        policy.load_adapters(loaded.adapters)               # without the value head: nothing here asks for values
    return policy, loaded.name


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--run", help="a run folder of train.py: its last checkpoint, its settings")
    who.add_argument("--model", help="auto, pocket, a hub name or a folder, as it is before RL")
    who.add_argument("--policy", help="random, expert, always:ACTION, or on alfworld heuristic")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=Settings.eval_seed, help="episode k is dealt by seed + k")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token instead of a draw")
    parser.add_argument("--render", metavar="FILE.gif", help="also draw the first episode, as a GIF or a PNG")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    settings = parser.add_argument_group("settings", "a run brings its own; bits, cot, temperature: for --model")
    add_flags(settings, Settings, PLAY_SETTINGS)
    return parser


def make_player(options, given):
    """Return (player, its name, the settings to play with) for a command line; given: those that were chosen."""
    default = with_task_defaults(Settings, {"task": options.task})
    settings = {name: getattr(default, name) for name in ("cot", "num_envs", "max_new_tokens", *WORLD)}
    if options.policy:
        return scripted_player(options.policy, options.task, options.seed), options.policy, settings | given
    if options.run:
        policy, own = open_run(options.run)
        name, settings = own["out"], settings | own | given
        if settings["task"] != options.task:
            print(f"note: {name} was trained on {settings['task']}")
    else:
        policy, name = open_policy(options.model, given.get("bits", "auto"), given.get("temperature"), options.task)
        size = default_of(Settings, "play_batch_size", is_small(policy.model.config))
        settings |= {"play_batch_size": size} | given
    return model_player(policy, options.seed, settings["cot"], settings["max_new_tokens"], options.greedy,
                        settings["play_batch_size"]), name, settings


def check_options(options, given):
    """ValueError, in words, for what makes no sense; what is to be written is tried."""
    for name, value in {"episodes": options.episodes, **given}.items():
        if name in ("episodes", "num_envs", "max_new_tokens", "play_batch_size") and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if not 0 <= options.seed < 2**31:
        raise ValueError("--seed must be 0 or more, below 2³¹")
    if problem := Settings(task=options.task, **{name: given[name] for name in WORLD if name in given}).problem():
        raise ValueError(problem)
    if not options.model and {"temperature", "cot", "bits"} & set(given):
        raise ValueError("--temperature, --cot and --bits are for --model: a run has its own, a policy none")
    if options.render and not options.render.endswith((".gif", ".png")):
        raise ValueError(f"--render writes a GIF or a PNG: call it {Path(options.render).stem}.gif")
    for file in filter(None, (options.out, options.render)):
        with foreign(file):                                     # before the games, not after them
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            new = not Path(file).exists()
            open(file, "ab").close()
            if new:
                os.remove(os.path.realpath(file))


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    given = {name: value for name, value in vars(options).items() if name in PLAY_SETTINGS and value != "auto"}
    with in_words():
        play(options, given)


def play(options, given):
    """Play what the command line asks for, print the result, then write it."""
    film = Film() if options.render else None
    try:
        check_options(options, given)
        player, name, settings = make_player(options, given)
    except ValueError as error:
        raise ModelError(str(error)) from error
    world = {name: settings[name] for name in WORLD} if options.task == "alfworld" else {}
    result = evaluate(player, options.task, options.episodes, options.seed, settings["num_envs"], settings["cot"], film,
                      world)
    result = {"policy": name, **result}
    for key, value in result.items():
        if not isinstance(value, dict):
            print(f"{key:18} {value:.4f}" if isinstance(value, float) else f"{key:18} {value}")
    print(json.dumps(result), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(result) + "\n")        # not by renaming: it may be a link or a device
    if film:
        film.save(options.render)


if __name__ == "__main__":
    main()
