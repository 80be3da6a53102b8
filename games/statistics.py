"""What single decisions say of a policy, which its average hides: read right, planned right.

    decision_statistics("points24", decisions, cot=True)    # plain values, for eval.py's JSON
    wilson(50, 100)                                         # how sure a share of 50 in 100 is

Does not handle: playing (eval.py), what would have been right (games/expert.py), what differs
between seeds (results/make.py).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from games.expert import best_actions, continuations, plan_right, planned, reads_right


class Decision(NamedTuple):
    """One step of one episode: what the game knew of its state, and what was chosen."""

    episode: int
    info: dict
    choice: Any         # a rollout.Choice


def rate(truths: Iterable[bool]) -> float | None:
    """The share of a list that is true, None of an empty one."""
    truths = list(truths)
    return float(np.mean(truths)) if truths else None


def wilson(successes, trials, z=1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    # (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def decision_statistics(task, decisions, cot):
    """Return shares of decisions: how many are right, each in its own way.

    parse_rate: those that named a legal action; expert_agreement: those that are the expert's too;
    reading_rate: those whose thoughts say what the picture shows. Formula games and Blackjack have
    more of their own.
    """
    # a player that says nothing can only be asked what it plays
    answered = [decision for decision in decisions if decision.choice.text is not None]
    thinking = answered if cot else []
    found = {
        "parse_rate": rate(choice.named for _, _, choice in answered),
        "expert_agreement": rate(
            choice.action in best_actions(task, info) for _, info, choice in decisions),
        "reading_rate": rate(
            reads_right(task, choice.text, info) for _, info, choice in thinking),
    }
    if thinking and "formula" in decisions[0].info:
        found |= plan_statistics(task, thinking)
    if task == "blackjack":
        found |= blackjack_statistics(decisions)
    return found


def plan_statistics(task, decisions):
    """Return how formula games are planned, and whether the plans are followed.

    plan_rate: how often the plan in the thoughts is right while one could be; plan_followed: how
    often a plan's first symbol is played.
    """
    plans = [(planned(choice.text), info, choice.action) for _, info, choice in decisions]
    return {
        "plan_rate": rate(
            plan_right(plan, info) for plan, info, _ in plans if continuations(task, info)),
        "plan_followed": rate(plan[0] == action for plan, _, action in plans if plan),
    }


def blackjack_statistics(decisions):
    """Return how often it hits: on each total, and in three bands of totals.

    Up to 11 no card busts, 12 to 16 are the close ones, from 17 on one should stand.
    """
    hits = {}
    for _, info, choice in decisions:
        hits.setdefault(info["total"], []).append(choice.action == "hit")
    bands = {
        "hit_rate_to_11": range(4, 12),
        "hit_rate_12_to_16": range(12, 17),
        "hit_rate_from_17": range(17, 22),
    }
    found = {
        "hit_rate_by_total": {str(total): rate(hits[total]) for total in sorted(hits)},
        "decisions_by_total": {str(total): len(hits[total]) for total in sorted(hits)},
    }
    for name, band in bands.items():
        found[name] = rate(hit for total in band for hit in hits.get(total, []))
    return found
