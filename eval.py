"""Held-out evaluation: how often a policy wins, what it does in which state, what it read.

    python eval.py --task blackjack --run runs/blackjack-seed1 --episodes 5000
    python eval.py --task blackjack --model pocket              # where RL starts
    python eval.py --task blackjack --policy below:14           # what to compare with
    python eval.py --task all --model pocket                    # every game, and their average
    python eval.py --task points24 --endpoint https://api.openai.com/v1 --model NAME

Episode k is dealt by seed + k, the same for every policy; training deals come from other seeds. The
last line printed is one JSON object. An average misleads: always standing wins 38 % at Blackjack,
so look first at `reading_rate`, `expert_agreement` (games/statistics.py), `plan_rate` and
`hit_rate_by_total` (games/expert.py). Does not handle: who plays (players.py), letting a policy
answer (rollout.py).
"""

import argparse
import contextlib
import itertools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import parallel
from env import GAMES, TASKS, check_game, find_game, held_out_game, make_game
from games.statistics import Decision, decision_statistics, rate, wilson
from players import PLAY_SETTINGS, model_player, open_policy, open_run, scripted_player
from plumbing.checkpoint import write_whole
from plumbing.errors import ModelError, as_model_error, in_words, printable, say
from plumbing.flags import SIZES_HELP, add_flags
from plumbing.settings import Settings, flag, resolve

BASELINES = Path(__file__).parent / "results" / "baselines.json"
HANDFUL = 8         # answers, none of them usable: rather a broken set-up than a weak model


# ---- playing -----------------------------------------------------------------------------------
@dataclass
class Slot:
    """One of the games side by side: which episode it plays, and what it shows now."""

    game: Any
    episode: int
    picture: np.ndarray = None
    info: dict = None


def evaluate(player, task: str, episodes: int, seed: int, num_envs=64, cot=True, watch=None,
             game_options=None) -> dict:
    """Play episodes seed, seed + 1, … and return the summary as a dict of plain values.

    num_envs games run side by side; cot=False: there are no thoughts to check (reading_rate is
    None); watch(picture, choice, episode) is called at every step, and at an episode's last picture
    with the choice None; game_options: of the game's constructor. Meanings: results/README.md.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, not {episodes}")
    game = held_out_game(task, game_options)        # whichever: it knows what is good play
    episodes = min(episodes, game.held_out_episodes)
    returns, goals, success = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    kinds = [None] * episodes
    decisions, waiting = [], iter(range(episodes))
    slots = [
        Slot(held_out_game(task, game_options), episode)
        for episode in itertools.islice(waiting, num_envs)]
    for slot in slots:
        slot.picture, slot.info = slot.game.reset(seed=seed + slot.episode)
    while slots:
        choices = player(*zip(*((slot.game, slot.picture, slot.info) for slot in slots)))
        for slot, choice in zip(slots, choices):
            decisions.append(Decision(slot.episode, slot.info, choice))
            if watch:
                watch(slot.picture, choice, slot.episode)
            slot.picture, reward, terminated, truncated, slot.info = slot.game.step(choice.index)
            returns[slot.episode] += reward
            if not (terminated or truncated):
                continue
            success[slot.episode] = slot.info["is_success"]     # None, for nan, where none can tell
            goals[slot.episode] = terminated and reward > 0
            kinds[slot.episode] = str(slot.info.get("kind", ""))
            if watch:
                watch(slot.picture, None, slot.episode)
            slot.episode = next(waiting, None)      # the slot goes on with the next deal
            if slot.episode is not None:
                slot.picture, slot.info = slot.game.reset(seed=seed + slot.episode)
        slots = [slot for slot in slots if slot.episode is not None]
        now_enough = len(decisions) - len(choices) < HANDFUL <= len(decisions)
        if now_enough and chance_plays(decisions):
            say_chance_plays(decisions)
    share = low = high = None
    if not np.isnan(success).any():
        share, (low, high) = success.mean().item(), map(float, wilson(success.sum(), episodes))
    result = {
        "task": task, "episodes": episodes, "seed": seed, "steps": len(decisions),
        "success": share, "success_low": low, "success_high": high,
        "return_mean": returns.mean().item(), "goal_rate": goals.mean().item(),
    }
    if any(kinds) and share is not None:
        result["success_by_kind"] = {
            kind: rate(won for won, own in zip(success, kinds) if own == kind)
            for kind in sorted({*kinds} - {""})}
    if chance_plays(decisions):     # its games look like a weak model's
        result["played_by"] = "chance: no answer was usable"
    return result | decision_statistics(game, decisions, cot)


def chance_plays(decisions):
    """Whether no answer so far named a legal action."""
    return not any(decision.choice.named for decision in decisions)


def say_chance_plays(decisions):
    """Say what may be wrong where the fallback alone has played; asked for once."""
    say(f"note: none of the first {len(decisions)} answers names a legal action, so chance plays. "
        "Try a larger --max-new-tokens (reasoning models want thousands), or sft.py first. "
        f"The last answer ends: '{printable(decisions[-1].choice.text or '')[-300:]}'")


def held_out(policy, settings, update, path, board=None):
    """train.py's held-out games, before and after: play, write, print and return the result.

    A result that is there already is taken where this very policy played it, before the run was
    stopped. board: extras.board.Board with --tensorboard.
    """
    if parallel.rank() or not settings.eval_episodes:
        return None
    episodes = settings.eval_episodes
    there = f"{path} (delete it, and its games are played again)"
    with as_model_error(there):
        result = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    if result and "update" not in result:
        # eval.py wrote it, of whatever policy: it stays, by another name
        kept = next(
            name for number in itertools.count(1)
            if not (name := path.with_name(f"{path.stem}-{number}.json")).exists())
        path.rename(kept)
        say(f"{path} was not written by train.py: it is {kept} now")
    if (result.get("update"), result.get("seed")) != (update, settings.eval_seed):
        say(f"playing {episodes} held-out games (--eval-episodes) …")
        player = model_player(policy, settings.eval_seed, settings.cot, settings.max_new_tokens,
                              batch_size=settings.play_batch_size)
        with tqdm(total=episodes, unit="game", desc="held out", disable=None, leave=False) as bar:
            watch = lambda picture, choice, episode: bar.update(choice is None)
            result = evaluate(player, settings.task, episodes, settings.eval_seed,
                              settings.num_envs, settings.cot, watch, settings.game_options)
        result["update"] = update
        write_whole(path, json.dumps(result) + "\n")
    if board:
        board.catch_up()
    with as_model_error(there):
        told = [f"return {result['return_mean']:.3f}",
                f"answers parsed {100 * result['parse_rate']:.1f} %"]
        if result["success"] is not None:
            told.insert(0, f"success {100 * result['success']:.1f} % ("
                        f"{100 * result['success_low']:.1f} to {100 * result['success_high']:.1f})")
        if result["reading_rate"] is not None:
            told.append(f"pictures read {100 * result['reading_rate']:.1f} %")
        say(f"{'end' if update else 'start'}: {', '.join(told)}")
    return result


# ---- the command line --------------------------------------------------------------------------
def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=SIZES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", required=True,
        help=f"{', '.join(TASKS)}, my_game.py:CLASS, gymnasium:ID, or all: the first ones, one "
        "after the other, ALFWorld where its engine is installed")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--run", help="a run folder of train.py: its last checkpoint, its settings")
    who.add_argument("--model", help="auto, pocket, a hub name or a folder, as it is before RL")
    who.add_argument("--policy", help="random, expert, always:ACTION; at Blackjack below:TOTAL; on "
                     "ALFWorld heuristic")
    add("--episodes", type=int, default=1000)
    add("--seed", type=int, default=Settings.eval_seed, help="episode k is dealt by seed + k")
    add("--greedy", action="store_true", help="the likeliest token instead of a draw")
    add("--render", metavar="FILE.html", help="also show the first episode as a page, with each "
        "token's probability, V and advantages")
    add("--beside", metavar="RUN",
        help="a second run, model or policy, beside the first in the .html")
    add("--out", metavar="FILE.json", help="also write the JSON object to a file")
    remote = parser.add_argument_group(
        "a model behind an OpenAI-compatible endpoint (extras/endpoint.py)")
    remote.add_argument("--endpoint", metavar="URL", help="such as https://api.openai.com/v1; "
                        "--model names the model there, $OPENAI_API_KEY is the key")
    remote.add_argument("--concurrency", type=int, default=8, help="calls at once [8]")
    remote.add_argument("--transcripts", metavar="FOLDER", help="where each call is kept, to go on "
                        "from without paying twice [runs/endpoint-MODEL]")
    settings = parser.add_argument_group("settings", "a run brings its own; bits, cot: for --model")
    add_flags(settings, Settings, PLAY_SETTINGS)
    return parser


def find_policy(options, given, task):
    """Return (policy, its name, the Settings to play with) for a command line.

    given: the settings that were chosen. The policy is None where a script or an endpoint plays.
    """
    # num_envs comes last: `resolve` would hold it to a rollout's rules
    asked = {name: value for name, value in given.items() if name != "num_envs"}
    if options.policy or options.endpoint:
        settings = resolve(Settings, {"task": task, **asked})
        return None, options.policy or options.model, replace(settings, **given)
    if not options.run:
        policy, settings = open_policy(options.model, task, **asked)
        return policy, settings.model, replace(settings, **given)
    policy, settings = open_run(options.run, given.get("device"))
    policy.temperature = given.get("temperature", policy.temperature)
    if find_game(settings.task) is not find_game(task):
        say(f"note: {options.run} was trained on {settings.task}")
        own = resolve(Settings, {"task": task})     # ALFWorld's games are larger
        settings = replace(settings, task=task, game=(), num_envs=own.num_envs)
    return policy, options.run, replace(settings, **given)


def make_player(options, policy, settings, given):
    """The player that a command line asks for: a script, an endpoint's model, or the policy."""
    if options.policy:
        return scripted_player(options.policy, settings.task, options.seed)
    if options.endpoint:
        from extras.endpoint import EndpointPlayer
        return EndpointPlayer(
            options.endpoint, options.model, options.transcripts, options.concurrency, options.seed,
            settings.cot, settings.max_new_tokens, given.get("temperature"), options.greedy)
    return model_player(policy, options.seed, settings.cot, settings.max_new_tokens, options.greedy,
                        settings.play_batch_size)


def check_options(options, given):
    """ModelError, in words, for what makes no sense."""
    render, policy = options.render or "", options.policy or ""
    numbers = ("num_envs", "max_new_tokens", "play_batch_size")
    counts = {"episodes": options.episodes, "concurrency": options.concurrency}
    counts |= {name: given[name] for name in numbers if name in given}
    idle = {"temperature", "max_new_tokens", "play_batch_size"} & set(given)
    wrong = [(value == "", f"--{name} is empty: an unset variable?")
             for name, value in vars(options).items()]
    wrong += [
        (not 1 <= value < 2**31, f"{flag(name)} must be 1 or more, and below 2³¹")
        for name, value in counts.items()]
    wrong += [
        (not 0 <= options.seed <= 2**31 - options.episodes,
         "--seed must be 0 or more, --seed + --episodes at most 2³¹: training deals begin there"),
        (not options.model and {"cot", "bits"} & set(given),
         "--cot and --bits are for --model: a run has its own, a policy none"),
        (policy and (idle or options.greedy),
         "--temperature, --max-new-tokens, --play-batch-size and --greedy are for a model or a "
         "run: random, expert and the like draw no tokens"),
        (options.greedy and "temperature" in given,
         "--greedy takes the likeliest token: there is no --temperature"),
        (options.endpoint and (not options.model or "bits" in given),
         "--endpoint needs --model NAME, the model's name there, and takes no --bits"),
        (options.out and options.out == options.render, "--out and --render must be two files"),
        (options.transcripts and not options.endpoint, "--transcripts is for --endpoint"),
        (options.task == "all" and (
            render or "game" in given or policy not in ("", "random", "expert")),
         "--task all takes no --render or --game, and of --policy random and expert: the games "
         "differ"),
        (render and not render.endswith(".html"),
         f"--render writes a page: call it {Path(render).stem}.html"),
        (options.beside and not render, "--beside is for --render FILE.html"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise ModelError(message)
    # these raise errors of their own
    task = next(iter(TASKS)) if options.task == "all" else options.task
    own = {name: given[name] for name in ("game", "temperature") if name in given}
    settings = resolve(Settings, {"task": task, **own})
    if not options.run:     # a run has options of its own, and was tried when it began
        check_game(task, settings.game, ("best_actions",) if policy == "expert" else ())
    if policy:
        scripted_player(policy, task, options.seed)


def check_files(files):
    """Try what is to be written: before the games, not after them."""
    for file in filter(None, files):
        with as_model_error(file):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            new = not Path(file).exists()
            open(file, "ab").close()
            if new:
                os.remove(os.path.realpath(file))


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    given = {
        name: value for name, value in vars(options).items()
        if name in PLAY_SETTINGS and value != "auto"}
    with in_words():
        try:
            check_options(options, given)
        except ValueError as error:
            raise ModelError(str(error)) from error
        check_files((options.out, options.render))
        result, recorder = (play_all if options.task == "all" else play)(options, given)
        print(json.dumps(result), flush=True)
        if options.out:
            # not by renaming: it may be a link or a device
            Path(options.out).write_text(json.dumps(result) + "\n")
        if recorder:
            recorder.save(options.render)


def play(options, given):
    """Play one task, print what came of it; return (the result, what drew its first episode)."""
    policy, name, settings = find_policy(options, given, options.task)
    recorder = None
    if options.render:
        from extras.viewer import Page, asked_beside
        sides = [(policy, name, settings)]
        if options.beside:
            sides.append(find_policy(*asked_beside(options, given, settings), options.task))
        recorder = Page(options.task, options.seed, options.greedy, sides)
    others = baselines(settings)        # before the games: a broken file loses none
    result = play_task(options, policy, name, settings, given, recorder)
    for key, value in result.items():
        if value is not None:
            print(f"{key:18} {shown(value)}")
    if others:
        print(f"{'others win':18} {others} (results/baselines.json)")
    return result, recorder


def shown(value):
    """A result's value for a line: "0.5000", and of a dict "won 0.50, wrong plan 0.25"."""
    if isinstance(value, dict):
        parts = {key: f"{part:.2f}" if isinstance(part, float) else part
                 for key, part in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items())
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def play_task(options, policy, name, settings, given, watch=None):
    """evaluate's summary of one task, with the player's name and temperature, an endpoint's
    calls."""
    player = make_player(options, policy, settings, given)
    # an endpoint's folder has a lock, and its calls threads
    with player if options.endpoint else contextlib.nullcontext():
        result = evaluate(player, settings.task, options.episodes, options.seed, settings.num_envs,
                          settings.cot, watch, settings.game_options)
    temperature = {"temperature": policy.temperature} if policy and not options.greedy else {}
    calls = player.counts() if options.endpoint else {}
    return {"policy": name, **temperature, **result, **calls}


def baselines(settings):
    """What players without a model win of the default games: "random 28.1 %, expert 43.6 %"."""
    if settings.game:                   # other deals
        return ""
    with as_model_error(BASELINES):
        found = json.loads(BASELINES.read_text()) if BASELINES.exists() else {}
    names = ("random", "constant", "heuristic", "below-14", "expert")
    shares = {name: found.get(f"{settings.task}-{name}") for name in names}
    return ", ".join(
        f"{name} {100 * own['success']:.1f} %" for name, own in shares.items() if own)


def play_all(options, given):
    """Play every task, print a table; return ({"policy", "average" of the four, "tasks"}, None)."""
    tasks, results, who = [], {}, options.run or options.policy or options.model
    for task in TASKS:
        try:
            make_game(task)             # now, not after hours of play
            tasks.append(task)
        except ImportError as error:    # ALFWorld's engine is an optional package
            print(f"note: without {task}: {error}")
    for task in tasks:
        if task == tasks[0] or TASKS[task].pocket != TASKS[tasks[0]].pocket:
            policy = None               # free the old model before the next is loaded
            policy, name, settings = find_policy(options, given, task)
        settings = replace(settings, task=task, game=())        # a run's own may have options
        results[task] = result = play_task(options, policy, name, settings, given)
        if options.out:                 # what is played stays, whatever comes of the next
            Path(options.out).write_text(json.dumps({"policy": who, "tasks": results}) + "\n")
        shares = [
            ("success", result["success"]), ("from", result["success_low"]),
            ("to", result["success_high"]), ("parsed", result["parse_rate"]),
            ("read right", result["reading_rate"])]
        told = [f"{key} {100 * share:5.1f} % " for key, share in shares if share is not None]
        print(f"{task:12}", *told, flush=True)
    average = float(np.mean([results[task]["success"] for task in GAMES]))
    print(f"{'average':12} success {100 * average:5.1f} %  of the four games, as in the paper")
    return {"policy": who, "average": average, "tasks": results}, None


if __name__ == "__main__":
    main()
