"""What the plans in the thoughts of a formula game are worth, whatever is then played.

    python -m extras.plans --task points24 --model pocket --temperature 0.1
    python -m extras.plans --task points24 --run runs/points24-seed1 --out plans.json

Measures on held-out deals. `followed`: eval.py's result where what is played is always the first symbol of the plan
just written (each step has a new one): what the same thoughts would win. `first_plan`: the plan of each solvable set of
numbers before the first symbol, tried several times: its mean share of right ones, and the share of sets for which one
try at least is right: what exploration can find.
`by_experience`, where a run kept its won games (imitation.py): play on the sets of numbers that it won while it
learned, and on all others.
Prints them as one JSON object. Does not handle: how a game was lost (games/statistics.py).
"""

import argparse
import json

import torch
from tqdm import tqdm

from env import make_game
from eval import evaluate
from games.expert import continuations, plan_right, planned
from games.formula import is_right
from games.statistics import rate
from parse import json_closed, make_prompt
from players import model_player, open_policy, open_run
from plumbing.checkpoint import newest_checkpoint, write_whole
from plumbing.errors import ModelError, foreign, in_words


def following(player):
    """A player that plays the first symbol of the plan that its model wrote; without one, what the model chose."""
    def play(games, pictures, infos):
        choices = []
        for game, choice in zip(games, player(games, pictures, infos)):
            plan, legal = planned(choice.text), list(game.legal_actions())
            if plan and plan[0] in legal:
                choice = choice._replace(action=plan[0], index=legal.index(plan[0]))
            choices.append(choice)
        return choices

    return play


def first_plans(policy, task, deals, seed, tries):
    """{sorted numbers: [whether each try's plan is right]}, of the solvable ones among some deals, each set once."""
    game, shown = make_game(task), {}
    for deal in range(seed, seed + deals):
        picture, info = game.reset(seed=deal)
        if continuations(task, info):
            shown.setdefault(tuple(sorted(info["numbers"])), (picture, make_prompt(game, info), info))
    prompts = policy.encode([picture for picture, _, _ in shown.values()], [text for _, text, _ in shown.values()])
    generator, right = torch.Generator(policy.device).manual_seed(seed), {numbers: [] for numbers in shown}
    for _ in tqdm(range(tries), desc="first plans", disable=None):
        answers = [answer for k in range(0, len(prompts), 64)
                   for answer in policy.generate(prompts[k:k + 64], generator, 256, json_closed)]
        for numbers, answer in zip(shown, answers):
            right[numbers].append(plan_right(planned(policy.decode(answer)), shown[numbers][2]))
    return right


def won_in_training(run, task) -> set:
    """{sorted numbers} of all games that a run won and kept (imitation.py); empty without --imitation.

    ModelError where the folder has no checkpoint, or one of another task.
    """
    game, found = make_game(task), set()
    for file in newest_checkpoint(run).glob("process*.json"):
        with foreign(file):
            for state, _ in (json.loads(file.read_text(encoding="utf-8")).get("won") or {"kept": []})["kept"]:
                game.set_state(state)
                found.add(tuple(sorted(game.observe()[1]["numbers"])))
    return found


def by_experience(player, known, task, episodes, seed) -> dict:
    """How solvable deals go whose sorted numbers are in `known`, and how the others: four shares each."""
    decisions = {"won_in_training": [], "never_won": []}        # (info, choice, plan, whether right, whether the first)

    def watched(games, pictures, infos):
        choices = player(games, pictures, infos)
        for game, info, choice in zip(games, infos, choices):
            if continuations(task, info | {"formula": []}):
                group = "won_in_training" if tuple(sorted(info["numbers"])) in known else "never_won"
                plan = planned(choice.text)
                decisions[group].append((info, choice, plan, plan_right(plan, info), game.steps == 0))
        return choices

    evaluate(watched, task, episodes, seed)
    first = {group: [right for *_, right, at_first in own if at_first] for group, own in decisions.items()}
    return {group: {"share_of_solvable_deals": len(first[group]) / max(1, sum(map(len, first.values()))),
                    "won": sum(choice.action == "=" and is_right(info["formula"], info["numbers"], info["target"])
                               for info, choice, *_ in own) / max(1, len(first[group])),
                    "first_plan_right": rate(first[group]),
                    "right_plan_followed": rate(plan[0] == choice.action for _, choice, plan, right, _ in own if right)}
            for group, own in decisions.items()}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="points24", choices=("ezpoints", "points24"))
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--run", help="a run folder of train.py, at the temperature that it ended with")
    who.add_argument("--model", help="pocket, a hub name or a folder, as it is before RL")
    parser.add_argument("--temperature", type=float, help="of --model [where RL on this game starts]")
    parser.add_argument("--won-by", metavar="RUN", help="by_experience by what this run won [--run itself]")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--tries", type=int, default=12, help="at each first plan")
    parser.add_argument("--seed", type=int, default=10_000, help="deal k is this + k")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.run and options.temperature is not None:
        parser.error("--temperature is for --model: a run has its own")
    with in_words():
        policy, settings = open_run(options.run) if options.run else (
            open_policy(options.model, temperature=options.temperature, task=options.task)[0], {"cot": True})
        if not settings["cot"]:
            raise ModelError("a run with --no-cot writes no plans")
        teacher = options.won_by or options.run
        known = won_in_training(teacher, options.task) if teacher else set()
        if options.won_by and not known:
            raise ModelError(f"{options.won_by} kept no won games (--imitation of train.py)")
        followed = evaluate(following(model_player(policy, options.seed)), options.task, options.episodes, options.seed)
        tries = first_plans(policy, options.task, options.episodes, options.seed, options.tries).values()
        experience = by_experience(model_player(policy, options.seed), known, options.task, options.episodes,
                                   options.seed) if known else None
    shares = {"sets": len(tries), "tries": options.tries, "right": rate(right for own in tries for right in own),
              "right_once": rate(any(own) for own in tries)}
    result = json.dumps({"policy": options.run or options.model, "temperature": policy.temperature,
                         "followed": followed, "first_plan": shares, "sets_won": len(known),
                         "by_experience": experience})
    if options.out:
        write_whole(options.out, result + "\n")
    print(result)


if __name__ == "__main__":
    main()
