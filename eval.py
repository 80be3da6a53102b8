"""Held-out evaluation: how often a policy wins, what it does in which state, whether it read the picture.

    python eval.py --task blackjack --run runs/blackjack-seed1 --episodes 5000
    python eval.py --task blackjack --model pocket                # where RL starts
    python eval.py --task blackjack --policy always:stand         # random, expert, always:ACTION: what to compare with
    python eval.py --task all --model pocket                      # every game, and the paper's average
    python eval.py --task points24 --endpoint https://api.openai.com/v1 --model NAME --episodes 200

Episode k is dealt by seed + k, the same for every policy; training deals come from other seeds (train.py).
The last line printed is one JSON object. An average misleads: always standing wins 38 % at Blackjack, so look at
`reading_rate`, `expert_agreement`, `lost_by` and `hit_rate_by_total` first (games/statistics.py).
Does not handle: who plays (players.py), letting a policy answer (rollout.py).
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C in the seconds of importing: no traceback

import numpy as np

from env import GAMES, TASKS, make_game
from games.houses import HouseError, data_files
from games.statistics import Decision, decision_statistics, rate
from players import PLAY_SETTINGS, model_player, open_policy, open_run, scripted_player, start_temperature
from plumbing.errors import ModelError, foreign, in_words
from plumbing.interval import wilson
from plumbing.settings import WORLD, Settings, add_flags, default_of, with_task_defaults
from vlm.loading import is_small

BASELINES = Path(__file__).parent / "results" / "baselines"


# ---- playing --------------------------------------------------------------------------------------------------------
@dataclass
class Slot:
    """One of the games side by side: which episode it plays, and what it shows now."""
    game: Any
    episode: int
    picture: np.ndarray = None
    info: dict = None


def at_most(episodes, world) -> int:
    """As many episodes as asked for, or as there are: ALFWorld's data set holds out some 140 houses."""
    if (world or {}).get("houses") != "data":
        return episodes
    try:
        return min(episodes, len(data_files("held out")))
    except HouseError as error:
        raise ModelError(str(error)) from error


def evaluate(player, task: str, episodes: int, seed: int, num_envs=64, cot=True, watch=None, world=None) -> dict:
    """Play episodes seed, seed + 1, … and return the summary as a dict of plain values (results/README.md).

    num_envs games run side by side; cot=False: there are no thoughts to check (reading_rate is None);
    watch(picture, choice, episode) is called at every step, and at an episode's last picture with the choice None;
    world: env.make_game's further options. ALFWorld's houses are those held out, and success is told by kind of task.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, not {episodes}")
    episodes = at_most(episodes, world)
    returns, goals, success = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    kinds = [None] * episodes
    world = ({"split": "held out"} if task == "alfworld" else {}) | (world or {})
    decisions, waiting = [], iter(range(episodes))
    slots = [Slot(make_game(task, **world), episode) for episode in itertools.islice(waiting, num_envs)]
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
            if terminated or truncated:
                success[slot.episode], goals[slot.episode] = slot.info["is_success"], terminated and reward > 0
                kinds[slot.episode] = slot.info.get("kind")
                if watch:
                    watch(slot.picture, None, slot.episode)
                slot.episode = next(waiting, None)
                if slot.episode is not None:
                    slot.picture, slot.info = slot.game.reset(seed=seed + slot.episode)
        slots = [slot for slot in slots if slot.episode is not None]
    low, high = wilson(success.sum(), episodes)
    result = {"task": task, "episodes": episodes, "seed": seed, "steps": len(decisions),
              "success": success.mean().item(), "success_low": float(low), "success_high": float(high),
              "return_mean": returns.mean().item(), "goal_rate": goals.mean().item()}
    if any(kinds):
        result["success_by_kind"] = {kind: rate(won for won, own in zip(success, kinds) if own == kind)
                                     for kind in sorted(set(kinds))}
    return result | decision_statistics(task, decisions, cot)


# ---- the command line -----------------------------------------------------------------------------------------------
def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=(*TASKS, "all"),
                        help="all: one after the other, ALFWorld where its engine is installed")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--run", help="a run folder of train.py: its last checkpoint, its settings")
    who.add_argument("--model", help="auto, pocket, a hub name or a folder, as it is before RL")
    who.add_argument("--policy", help="random, expert, always:ACTION, or on alfworld heuristic")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=Settings.eval_seed, help="episode k is dealt by seed + k")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token instead of a draw")
    parser.add_argument("--render", metavar="FILE", help="also show the first episode: .html with each token's "
                        "probability, V and advantages, .gif or .png")
    parser.add_argument("--beside", metavar="RUN", help="a second run, model or policy, beside the first in the .html")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    remote = parser.add_argument_group("a model behind an OpenAI-compatible endpoint (extras/endpoint.py)")
    remote.add_argument("--endpoint", metavar="URL", help="such as https://api.openai.com/v1; --model names "
                        "the model there, $OPENAI_API_KEY is the key")
    remote.add_argument("--concurrency", type=int, default=8, help="calls at once [8]")
    remote.add_argument("--transcripts", metavar="FOLDER", help="where each call is kept, to go on from without paying "
                        "twice [runs/endpoint-MODEL]")
    settings = parser.add_argument_group("settings", "a run brings its own; bits, cot: for --model")
    add_flags(settings, Settings, PLAY_SETTINGS)
    return parser


def find_policy(options, given, task):
    """Return (policy, its name, the settings to play with) for a command line; given: those that were chosen.

    The policy is None where a script or an endpoint plays.
    """
    default = with_task_defaults(Settings, {"task": task})
    settings = {name: getattr(default, name) for name in ("cot", "num_envs", "max_new_tokens", *WORLD)}
    if options.policy or options.endpoint:
        return None, options.policy or options.model, settings | given
    if options.run:
        policy, own = open_run(options.run)
        policy.temperature = given.get("temperature", policy.temperature)
        name = options.run
        if own["task"] != task:
            print(f"note: {name} was trained on {own['task']}")
            del own["num_envs"]                                 # ALFWorld's games are larger than cards
        settings |= own | given
    else:
        policy, name = open_policy(options.model, given.get("bits", "auto"), given.get("temperature"), task)
        settings |= {"play_batch_size": default_of(Settings, "play_batch_size", is_small(policy.model.config))} | given
    return policy, name, settings


def make_player(options, policy, settings, task):
    """The player that a command line asks for: a script, an endpoint's model, or the policy."""
    if options.policy:
        return scripted_player(options.policy, task, options.seed)
    if options.endpoint:
        from extras.endpoint import EndpointPlayer
        return EndpointPlayer(options.endpoint, options.model, options.transcripts, options.concurrency, options.seed,
                              settings["cot"], settings["max_new_tokens"], settings.get("temperature"), options.greedy)
    return model_player(policy, options.seed, settings["cot"], settings["max_new_tokens"], options.greedy,
                        settings["play_batch_size"])


def check_options(options, given):
    """ValueError, in words, for what makes no sense; what is to be written is tried."""
    if empty := [name for name, value in vars(options).items() if value == ""]:
        raise ValueError(f"--{empty[0]} is empty: an unset variable?")
    for name, value in {"episodes": options.episodes, "concurrency": options.concurrency, **given}.items():
        if name in ("episodes", "concurrency", "num_envs", "max_new_tokens", "play_batch_size") \
                and not 1 <= value < 2**31:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, and below 2³¹")
    if not 0 <= options.seed <= 2**31 - options.episodes:
        raise ValueError("--seed must be 0 or more, and --seed + --episodes at most 2³¹: training deals begin there")
    task = "alfworld" if options.task == "all" else options.task
    own = {name: given[name] for name in (*WORLD, "temperature") if name in given}
    if problem := Settings(task=task, **own).problem():
        raise ValueError(problem)
    if not options.model and {"cot", "bits"} & set(given):
        raise ValueError("--cot and --bits are for --model: a run has its own, a policy none")
    if options.policy and (idle := {"temperature", "max_new_tokens", "play_batch_size"} & set(given)):
        raise ValueError(f"--{idle.pop().replace('_', '-')} is for a model or a run: random, expert and the like draw "
                         "no tokens")
    if options.greedy and "temperature" in given:
        raise ValueError("--greedy takes the likeliest token: there is no --temperature")
    if options.endpoint and (not options.model or "bits" in given):
        raise ValueError("--endpoint needs --model NAME, the model's name there, and takes no --bits")
    if options.greedy and options.policy:
        raise ValueError("--greedy is for a model: a policy draws no tokens")
    if options.out and options.out == options.render:
        raise ValueError("--out and --render must be two files")
    if options.transcripts and not options.endpoint:
        raise ValueError("--transcripts is for --endpoint")
    if options.task == "all" and (options.render or (options.policy or "").startswith(("always", "heuristic"))):
        raise ValueError("--task all takes no --render, and of --policy random and expert: the games' actions differ")
    if options.policy:
        scripted_player(options.policy, options.task, options.seed)         # which names it knows
    if options.render and not options.render.endswith((".html", ".gif", ".png")):
        raise ValueError(f"--render writes a page, a GIF or a PNG: call it {Path(options.render).stem}.html")
    if options.beside and not (options.render or "").endswith(".html"):
        raise ValueError("--beside is for --render FILE.html")
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
        try:
            check_options(options, given)
        except ValueError as error:
            raise ModelError(str(error)) from error
        result, recorder = (play_all if options.task == "all" else play)(options, given)
        print(json.dumps(result), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(result) + "\n")    # not by renaming: it may be a link or a device
        if recorder:
            recorder.save(options.render)


def play(options, given):
    """Play one task, print what came of it; return (the result, who took note of its first episode or None)."""
    policy, name, settings = find_policy(options, given, options.task)
    recorder = None
    if (options.render or "").endswith(".html"):
        from extras.viewer import Page, asked_beside
        sides = [(policy, name, settings)]
        if options.beside:
            sides.append(find_policy(*asked_beside(options, given, settings), options.task))
        recorder = Page(options.task, options.seed, options.greedy, sides)
    elif options.render:
        from extras.film import Film
        recorder = Film()
    result = play_task(options, policy, name, settings, options.task, recorder)
    for key, value in result.items():
        if value is not None:
            print(f"{key:18} {shown(value)}")
    if others := who_else(options.task, settings):
        print(f"{'others win':18} {others} (results/baselines)")
    return result, recorder


def shown(value):
    """A result's value for a line: "0.5000", and of a dict "won 0.50, wrong plan 0.25"."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {part:.2f}" if isinstance(part, float) else f"{key} {part}"
                         for key, part in value.items())
    return f"{value:.4f}" if isinstance(value, float) else value


def play_task(options, policy, name, settings, task, watch=None):
    """Return evaluate's summary of one task, with the player's name and temperature, and an endpoint's calls."""
    player = make_player(options, policy, settings, task)
    world = {name: settings[name] for name in WORLD} if task == "alfworld" else {}
    with player if options.endpoint else contextlib.nullcontext():      # its folder's lock, its threads
        result = evaluate(player, task, options.episodes, options.seed, settings["num_envs"], settings["cot"], watch,
                          world)
    temperature = {"temperature": policy.temperature} if policy and not options.greedy else {}
    return {"policy": name, **temperature, **result, **(player.counts() if options.endpoint else {})}


def who_else(task, settings):
    """What players without a model win of the default games: "random 28.1 %, constant 38.6 %, expert 43.6 %"."""
    if any(settings[name] != getattr(Settings, name) for name in WORLD):
        return ""                                               # other houses
    files = [(name, BASELINES / f"{task}-{name}.json") for name in ("random", "constant", "heuristic", "expert")]
    return ", ".join(f"{name} {100 * json.loads(file.read_text())['success']:.1f} %"
                     for name, file in files if file.exists())


def play_all(options, given):
    """Play every task, print a table; return ({"policy", "average" over the four games, "tasks"}, None)."""
    tasks, results = [*GAMES], {}
    try:
        importlib.import_module("alfworld_env")                 # now, not after hours of play
        tasks.append("alfworld")
    except ModelError as error:
        print(f"note: without ALFWorld: {error}")
    for task in tasks:
        if task in (tasks[0], "alfworld"):                      # whose pocket model is another, and its defaults too
            policy = None                                       # free the old model before the next is loaded
            policy, name, settings = find_policy(options, given, task)
        if policy and options.model and "temperature" not in given:
            policy.temperature = start_temperature(task, policy.model)
        results[task] = result = play_task(options, policy, name, settings, task)
        shares = [("success", result["success"]), ("from", result["success_low"]), ("to", result["success_high"]),
                  ("parsed", result["parse_rate"]), ("read right", result["reading_rate"])]
        print(f"{task:12}", *(f"{key} {100 * share:5.1f} % " for key, share in shares if share is not None), flush=True)
    average = float(np.mean([results[task]["success"] for task in GAMES]))
    print(f"{'average':12} success {100 * average:5.1f} %  of the four games, as in the paper's tables")
    return {"policy": results[tasks[0]]["policy"], "average": average, "tasks": results}, None


if __name__ == "__main__":
    main()
