"""Held-out evaluation: how often a policy wins, what it does in which state, what it read.

    python eval.py --task blackjack --run runs/blackjack-seed1 --episodes 5000
    python eval.py --task blackjack --model pocket              # where RL starts
    python eval.py --task blackjack --policy below:14           # what to compare with
    python eval.py --task ezpoints --model pocket --episodes all --draws 4     # each deal 4 times
    python eval.py --task numberline --model pocket --pictures black           # does it look?
    python eval.py --task all --model pocket                    # every game, and their average
    python eval.py --task points24 --endpoint https://api.openai.com/v1 --model NAME

Episode k is dealt by seed + k, the same for every policy; training deals come from other seeds.
`--episodes all` plays every deal there is, with its own weight. The last line printed is one JSON
object. An average misleads: always standing wins 38 % at Blackjack, so look first at
`reading_rate`, `expert_agreement` (games/statistics.py), `plan_rate` and `hit_rate_by_total`
(games/expert.py). Does not handle: who plays (players.py), letting a policy answer (rollout.py).
"""

import argparse
import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from env import GAMES, TASKS, check_game, find_game, held_out_game, make_game
from games.deals import choose_deals
from games.statistics import Decision, decision_statistics, draws_interval, wilson
from players import (
    PICTURES,
    PLAY_SETTINGS,
    model_player,
    open_policy,
    open_run,
    scripted_player,
    shown_otherwise,
)
from plumbing.errors import ModelError, as_model_error, in_words, printable, say
from plumbing.flags import SIZES_HELP, add_flags, count_or_all
from plumbing.settings import Settings, flag, resolve

HANDFUL = 8         # answers, none of them usable: rather a broken set-up than a weak model


# ---- playing -----------------------------------------------------------------------------------
@dataclass
class Slot:
    """One of the games side by side: which episode it plays, and what it shows now."""

    game: Any
    episode: int = None         # None: no more
    picture: np.ndarray = None
    info: dict = None


def evaluate(player, task: str, episodes: int | str, seed: int, num_envs=64, cot=True, watch=None,
             game_options=None, draws=4) -> dict:
    """Play the episodes of choose_deals and return the summary as a dict of plain values.

    num_envs games run side by side; cot=False: there are no thoughts to check (reading_rate is
    None); watch(picture, choice, episode) is called at every step, and at an episode's last picture
    with the choice None; game_options: of the game's constructor. With "all" the deals have their
    weights. Meanings: results/README.md.
    """
    game = held_out_game(task, game_options)        # whichever: it knows what is good play
    deals = choose_deals(game, episodes, seed, draws)
    returns, goals, success = np.zeros((3, len(deals)))
    kinds = [None] * len(deals)
    decisions, waiting = [], iter(range(len(deals)))

    def begin_next(slot):
        slot.episode = next(waiting, None)
        if slot.episode is not None:
            _, deal_seed, options = deals[slot.episode]
            slot.picture, slot.info = slot.game.reset(seed=deal_seed, options=options)

    slots = [Slot(held_out_game(task, game_options)) for _ in range(min(num_envs, len(deals)))]
    for slot in slots:
        begin_next(slot)
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
            begin_next(slot)
        slots = [slot for slot in slots if slot.episode is not None]
        now_enough = len(decisions) - len(choices) < HANDFUL <= len(decisions)
        if now_enough and chance_plays(decisions):
            say_chance_plays(decisions)
    weights = np.array([deal.weight for deal in deals])
    share = low = high = None
    if not np.isnan(success).any():
        share = mean(success, weights)
        if episodes == "all":           # what is uncertain is what was drawn
            shares = weights.reshape(draws, -1)[0]
            low, high = draws_interval(success.reshape(draws, -1), shares / shares.sum())
        else:                           # or which deals came, too
            low, high = map(float, wilson(success.sum(), len(deals)))
        low, high = min(low, share), max(high, share)       # of 500 in 500 it is 1 but for rounding
    result = {
        "task": task, "episodes": len(deals), "seed": seed, "steps": len(decisions),
        "draws_of_every_deal": draws if episodes == "all" else None,
        "success": share, "success_low": low, "success_high": high,
        "return_mean": mean(returns, weights), "goal_rate": mean(goals, weights),
    }
    if any(kinds) and share is not None:
        kinds = np.array(kinds)
        result["success_by_kind"] = {
            str(kind): mean(success[kinds == kind], weights[kinds == kind])
            for kind in np.unique(kinds) if kind}
    if chance_plays(decisions):     # its games look like a weak model's
        result["played_by"] = "chance: no answer was usable"
    if episodes == "all":
        decisions = by_weight(decisions, weights)
    return result | decision_statistics(game, decisions, cot)


def mean(values, weights):
    return float(np.average(values, weights=weights))


def by_weight(decisions, weights):
    """The decisions of as many episodes, each as often as its weight has it (systematic sampling).

    So that rates of decisions are of the same deals as the means of games.
    """
    episodes = [[] for _ in weights]
    for decision in decisions:
        episodes[decision.episode].append(decision)
    places = (np.arange(len(weights)) + 0.5) / len(weights)
    drawn = np.searchsorted(np.cumsum(weights / weights.sum()), places)
    return [decision for episode in drawn for decision in episodes[episode]]


def chance_plays(decisions):
    """Whether no answer so far named a legal action."""
    return not any(decision.choice.named for decision in decisions)


def say_chance_plays(decisions):
    """Say what may be wrong where the fallback alone has played; asked for once."""
    say(f"note: none of the first {len(decisions)} answers names a legal action, so chance plays. "
        "Try a larger --max-new-tokens (reasoning models want thousands), or sft.py first. "
        f"The last answer ends: '{printable(decisions[-1].choice.text or '')[-300:]}'")


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
    add("--episodes", type=count_or_all, default=1000,
        help="a number [1000]; or all: every deal there is, with its own weight (not Blackjack)")
    add("--draws", type=int, default=4, help="with --episodes all: games of each deal [4]")
    add("--seed", type=int, default=Settings.eval_seed, help="episode k is dealt by seed + k")
    add("--pictures", choices=PICTURES, default=PICTURES[0],
        help="black: a model sees nothing; another: it sees another deal; does it look? [own]")
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
        default = resolve(Settings, {"task": task})     # ALFWorld's games are larger
        settings = replace(settings, task=task, game=(), num_envs=default.num_envs)
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
    player = model_player(policy, options.seed, settings.cot, settings.max_new_tokens,
                          options.greedy, settings.play_batch_size)
    return shown_otherwise(player, options.pictures, settings, options.seed)


def check_options(options, given):
    """ModelError, in words, for what makes no sense."""
    render, policy = options.render or "", options.policy or ""
    numbers = ("num_envs", "max_new_tokens", "play_batch_size")
    every = options.episodes == "all"
    counts = {"draws": options.draws, "concurrency": options.concurrency}
    counts |= {} if every else {"episodes": options.episodes}
    counts |= {name: given[name] for name in numbers if name in given}
    idle = {"temperature", "max_new_tokens", "play_batch_size"} & set(given)
    wrong = [(value == "", f"--{name} is empty: an unset variable?")
             for name, value in vars(options).items()]
    wrong += [
        (not 1 <= value < 2**31, f"{flag(name)} must be 1 or more, and below 2³¹")
        for name, value in counts.items()]
    wrong += [
        (not 0 <= options.seed <= 2**31 - (2**20 if every else options.episodes),
         "--seed must be 0 or more, --seed + --episodes at most 2³¹: training deals begin there"),
        (render and (every or options.pictures != PICTURES[0]),
         "--render plays the deal of --seed with its own picture: no --episodes all or --pictures"),
        (options.pictures != PICTURES[0] and (policy or options.endpoint),
         "--pictures is for a model of this machine"),
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
        (options.task == "all" and every, "--task all takes no --episodes all: Blackjack has none"),
        (render and not render.endswith(".html"),
         f"--render writes a page: call it {Path(render).stem}.html"),
        (options.beside and not render, "--beside is for --render FILE.html"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise ModelError(message)
    # these raise errors of their own
    task = next(iter(TASKS)) if options.task == "all" else options.task
    chosen = {name: given[name] for name in ("game", "temperature") if name in given}
    settings = resolve(Settings, {"task": task, **chosen})
    if not options.run:     # a run has options of its own, and was tried when it began
        check_game(task, settings.game, ("best_actions",) if policy == "expert" else ())
        if every:
            game = held_out_game(task, settings.game_options)
            choose_deals(game, "all", options.seed, options.draws)
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
        if options.out:     # not by renaming: it may be a link or a device
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
    result = play_task(options, policy, name, settings, given, recorder)
    for key, value in result.items():
        if value is not None:
            print(f"{key:20} {shown(value)}")
    return result, recorder


def shown(value):
    """A result's value for a line: "0.5000", and of a dict "won 0.50, wrong plan 0.25"."""
    if isinstance(value, dict):
        parts = {key: f"{part:.2f}" if isinstance(part, float) else part
                 for key, part in value.items()}
        return ", ".join(f"{key} {part}" for key, part in parts.items())
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def play_task(options, policy, name, settings, given, watch=None):
    """evaluate's summary of one task, with the player's name and temperature, an endpoint's calls,
    and what players without a model win of the same deals."""
    def games_of(player, cot=True, watch=None):
        return evaluate(player, settings.task, options.episodes, options.seed, settings.num_envs,
                        cot, watch, settings.game_options, options.draws)

    # these first: if one of them fails, no model's games are lost
    names = () if options.policy else find_game(settings.task).compare_with
    others = {
        name: games_of(scripted_player(name, settings.task, options.seed))["success"]
        for name in names}
    player = make_player(options, policy, settings, given)
    # an endpoint's folder has a lock, and its calls threads
    with player if options.endpoint else contextlib.nullcontext():
        result = games_of(player, settings.cot, watch)
    if others:
        result["same_deals"] = others
    if options.pictures != PICTURES[0]:
        result["pictures"] = options.pictures
    temperature = {"temperature": policy.temperature} if policy and not options.greedy else {}
    calls = player.counts() if options.endpoint else {}
    return {"policy": name, **temperature, **result, **calls}


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
