"""What a policy's decisions say of it, and its average hides: read right, planned right, lost by what.

    decision_statistics("points24", decisions, cot=True)        # a dict of plain values, for eval.py's JSON

Does not handle: playing (eval.py), what would have been right (expert.py).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from games.expert import best_actions, continuations, plan_right, planned, reads_right
from games.formula import is_right

MISTAKES = ("right plan not followed", "wrong plan")       # what loses a formula game that can be won
ENDINGS = ("won", *MISTAKES, "out of time")


class Decision(NamedTuple):
    """One step of one episode: what the game knew of its state, and what was chosen (a rollout.Choice)."""
    episode: int
    info: dict
    choice: Any


def rate(truths: Iterable[bool]) -> float | None:
    """The share of a list that is true, None of an empty one."""
    truths = list(truths)
    return float(np.mean(truths)) if truths else None


def decision_statistics(task, decisions, cot):
    """Shares of the decisions that named a legal action, that are the expert's too, whose thoughts are right."""
    answered = [decision for decision in decisions if decision.choice.text is not None]
    thinking = answered if cot else []
    found = {
        "parse_rate": rate(choice.named for _, _, choice in answered),
        "expert_agreement": rate(choice.action in best_actions(task, info) for _, info, choice in decisions),
        "reading_rate": rate(reads_right(task, choice.text, info) for _, info, choice in thinking)}
    if thinking and "formula" in decisions[0].info:
        found |= plan_statistics(task, thinking)
    if task == "blackjack":
        found |= blackjack_statistics(decisions)
    return found


def plan_statistics(task, decisions):
    """Formula games: how often the plan in the thoughts is right while one could be, and how often one is followed.

    lost_by: the share of the solvable deals that end in each of ENDINGS.
    """
    episodes = {}
    for decision in decisions:
        episodes.setdefault(decision.episode, []).append(decision)
    ends = [ending(task, steps) for steps in episodes.values() if continuations(task, steps[0].info)]
    plans = [(planned(choice.text), info, choice.action) for _, info, choice in decisions]
    return {"plan_rate": rate(plan_right(plan, info) for plan, info, _ in plans if continuations(task, info)),
            "plan_followed": rate(plan[0] == action for plan, _, action in plans if plan),
            "lost_by": {end: rate(own == end for own in ends) for end in ENDINGS}}


def ending(task, steps) -> str:
    """How an episode of a solvable deal went, one of ENDINGS: won, or by what it first left every solution."""
    last = steps[-1]
    if last.choice.action == "=" and is_right(last.info["formula"], last.info["numbers"], last.info["target"]):
        return "won"
    lost = next(filter(None, (mistake(task, info, choice) for _, info, choice in steps)), None)
    return lost or ("wrong plan" if last.choice.action == "=" else "out of time")


def mistake(task, info, choice) -> str | None:
    """By what a decision left every solution, or None where it did not, or there was none to leave.

    It leaves them when no solution goes on with the symbol that is played, unless that follows a plan that is right
    (with needless brackets, which `continuations` leaves out), or the game refuses it.
    """
    plan, rests = planned(choice.text), continuations(task, info)
    right = plan_right(plan, info)
    on_the_way = choice.action in {rest[0] for rest in rests} or right and plan[0] == choice.action
    if on_the_way or not (rests or right) or refused(info, choice.action):
        return None
    return MISTAKES[0] if right else MISTAKES[1]


def count_endings(task, rollout) -> list[int]:
    """How many steps of a rollout.Rollout won a game, and how many left every solution by each of MISTAKES.

    Nearly always one a game; not where brackets are played that no solution of `continuations` has.
    """
    found = [mistake(task, info, choice) for info, choice in zip(rollout.infos, rollout.choices)]
    return [int((rollout.rewards > 0).sum()), *map(found.count, MISTAKES)]


def refused(info, action) -> bool:
    """Whether a symbol is a number that is on no unused card: the game leaves the formula as it is."""
    used = [symbol for symbol in info["formula"] if symbol.isdecimal()]
    return action.isdecimal() and used.count(action) >= list(map(str, info["numbers"])).count(action)


def blackjack_statistics(decisions):
    """How often it hits: on each total, and on the totals that cannot bust, that are close, that should stand."""
    hits = {}
    for _, info, choice in decisions:
        hits.setdefault(info["total"], []).append(choice.action == "hit")
    bands = {"hit_rate_to_11": range(4, 12), "hit_rate_12_to_16": range(12, 17), "hit_rate_from_17": range(17, 22)}
    return {"hit_rate_by_total": {str(total): rate(hits[total]) for total in sorted(hits)},
            "decisions_by_total": {str(total): len(hits[total]) for total in sorted(hits)},
            **{name: rate(hit for total in band for hit in hits.get(total, [])) for name, band in bands.items()}}
