"""What single decisions say of a policy, which its average hides: read right, played as an expert.

    decision_statistics(game, decisions, cot=True)          # plain values, for eval.py's JSON
    wilson(50, 100)                                         # how sure a share of 50 in 100 is

Does not handle: playing (eval.py), what would have been right (the games: games/expert.py), what
differs between seeds (results/make.py).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


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
    """The 95 % Wilson score interval of a share; trials: as many as it is worth, a fraction too.

    >>> [round(bound, 3) for bound in wilson(50, 100)]
    [0.404, 0.596]
    """
    # (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def draws_interval(success, shares) -> tuple[float, float]:
    """The 95 % interval of the success in all deals, each of which was played several times.

    success (draws, deals): of each game; shares (deals,): how often a deal comes, 1 in all. The
    deals are no sample, so what is uncertain is what a policy draws. Deals mostly won and those
    mostly lost have an interval each, put together as Newcombe does (MOVER): a few games that end
    alike do not make a deal certain.
    """
    mostly = success.mean(0) >= 0.5
    below = above = 0.0
    for part in (mostly, ~mostly):
        if part.any():
            weight = shares[part].sum()
            share, low, high = _of_a_part(success[:, part], shares[part] / weight)
            below += (weight * (share - low)) ** 2
            above += (weight * (high - share)) ** 2
    share = float(shares @ success.mean(0))
    return share - math.sqrt(below), share + math.sqrt(above)


def _of_a_part(success, shares):
    """(share, low, high): Wilson's, of as many games as Σ p² σ² / draws is worth of a sample."""
    share = float(shares @ success.mean(0))
    if success.all() or not success.any():
        return share, *wilson(success.sum().item(), success.size)
    variance = float(shares**2 @ success.var(0, ddof=1)) / len(success)
    trials = share * (1 - share) / variance
    return share, *wilson(share * trials, trials)


def decision_statistics(game, decisions, cot):
    """Return shares of decisions: how many are right, each in its own way.

    parse_rate: those that named a legal action; expert_agreement: those that are the expert's too;
    reading_rate: those whose thoughts say what the picture shows. None where the game, a Game of
    the decisions' kind, does not know. Some games have more of their own.
    """
    # a player that says nothing can only be asked what it plays
    answered = [decision for decision in decisions if decision.choice.text is not None]
    thinking = answered if cot else []
    return {
        "parse_rate": rate(choice.named for _, _, choice in answered),
        "expert_agreement": rate(
            choice.action in best for _, info, choice in decisions
            if (best := game.best_actions(info)) is not None),
        "reading_rate": rate(
            reads_right(game, [(choice.text, info) for _, info, choice in thinking])),
        **game.statistics(decisions, thinking),
    }


def reads_right(game, answers) -> list[bool]:
    """Whether answers [(text, info)] say what the picture shows; [] where the game has no words."""
    found = [game.reads(info, text) for text, info in answers]
    return [right for right in found if right is not None]
