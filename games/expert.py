"""Exact players of the card games and the words that they would say: the source of demonstrations.

    game.best_actions(info)             # ["hit"]
    game.thoughts(info, "hit")          # "The dealer shows 7. … I choose hit."

Each class here is what a game of env.py knows of good play, and a parent of that game: the best
actions, by arithmetic on NumberLine, by exhaustive search (formula.py) on EZPoints and Points24, by
exact dynamic programming on Blackjack; the sentence that reads the picture; the thoughts that lead
to an action (any action, so that noisy demonstrations stay fluent); statistics of its own.

Does not handle: learning (sft.py), the answer's format (parse.py), ALFWorld
(games/alfworld/expert.py).
"""

import re
from functools import cache

from games.formula import is_right, solutions
from games.statistics import rate

# an infinite deck; J, Q, K are tens
CARD_ODDS = {rank: (4 if rank == 10 else 1) / 13 for rank in range(1, 11)}


# ---- Blackjack: exact values of every state ----------------------------------------------------
def _add(total, usable, rank):
    """(total, usable ace) after one more card."""
    total += rank
    # an ace counts 11 as long as that does not bust
    if rank == 1 and total + 10 <= 21:
        total += 10
        usable = True
    if total > 21 and usable:
        total -= 10
        usable = False
    return total, usable


@cache
def dealer_odds(total, usable):
    """{final total, 22 for a bust: probability} of a dealer who stands on 17."""
    if total >= 17:
        return {min(total, 22): 1.0}
    odds = {}
    for rank, p in CARD_ODDS.items():
        for final, q in dealer_odds(*_add(total, usable, rank)).items():
            odds[final] = odds.get(final, 0.0) + p * q
    return odds


@cache
def stand_value(total, dealer):
    """The probability to win by standing on `total`, against the dealer's card 1..10."""
    # with an infinite deck the card that lies face down is as good as not drawn yet
    odds = dealer_odds(*_add(0, False, dealer))
    return sum(p for final, p in odds.items() if final == 22 or final < total)


@cache
def hit_value(total, usable, dealer):
    """The probability to win by hitting, and by the best play for wins from then on."""
    value = 0.0
    # Q(s, hit) = Σ_rank p(rank) V(s with that card), V of a bust is 0
    for rank, p in CARD_ODDS.items():
        after, soft = _add(total, usable, rank)
        if after <= 21:
            value += p * max(stand_value(after, dealer), hit_value(after, soft, dealer))
    return value


# ---- NumberLine --------------------------------------------------------------------------------
class NumberLineExpert:
    def best_actions(self, info):
        return ["+" if info["target"] > info["current"] else "-"]

    def reading(self, info):
        return f"The target is {info['target']} and the current number is {info['current']}."

    def thoughts(self, info, action):
        compared = "greater" if info["target"] > info["current"] else "smaller"
        return f"{self.reading(info)} The target is {compared}. I choose {action}."


# ---- Blackjack ---------------------------------------------------------------------------------
def card_value(rank):
    """The number that a card's rank counts in Blackjack, an ace as 1."""
    if rank == "A":
        return 1
    return 10 if rank in ("J", "Q", "K") else int(rank)


def hit_below(total):
    """The player that hits below a total, whatever the dealer shows."""
    if not total.isdecimal():
        raise ValueError(f"no policy 'below:{total}': a total is a number, as in below:14")
    return lambda info: "hit" if info["total"] < int(total) else "stand"


class BlackjackExpert:
    scripts = {"below:": hit_below}

    def best_actions(self, info):
        """Best for wins, not for the return."""
        total, dealer = info["total"], card_value(info["dealer"])
        hit = hit_value(total, info["usable_ace"], dealer)
        return ["hit" if hit > stand_value(total, dealer) else "stand"]

    def reading(self, info):
        return f"The dealer shows {info['dealer']}. My cards are {' '.join(info['hand'])},"

    def thoughts(self, info, action):
        """
        >>> info = {"dealer": "7", "hand": ["A", "4"], "total": 15, "usable_ace": True}
        >>> BlackjackExpert().thoughts(info, "hit")
        'The dealer shows 7. My cards are A 4, total soft 15. I choose hit.'
        """
        total = f"{'soft ' if info['usable_ace'] else ''}{info['total']}"
        return f"{self.reading(info)} total {total}. I choose {action}."

    def statistics(self, decisions, thinking):
        """How often it hits: on each total, and in three bands of totals.

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


# ---- EZPoints and Points24 ---------------------------------------------------------------------
class FormulaExpert:
    operators = ""              # what the solver may use

    def continuations(self, info) -> list[tuple[str, ...]]:
        """All that completes the formula so far to a solution: tuples of symbols, "=" last.

        The rest of the simplest solution comes first.
        """
        so_far = tuple(info["formula"])
        length = len(so_far)
        found = solutions(tuple(sorted(info["numbers"])), info["target"], self.operators)
        return [(*tokens[length:], "=") for tokens in found if tokens[:length] == so_far]

    def best_actions(self, info):
        """Every next symbol of some solution, one without needless brackets.

        A formula that no solution continues is given up with "=".
        """
        # a dict keeps the order and drops what comes twice
        following = dict.fromkeys(tokens[0] for tokens in self.continuations(info))
        return list(following) or ["="]

    def reading(self, info):
        return f"The cards are {' '.join(info['cards'])},"

    def thoughts(self, info, action):
        numbers = " ".join(str(n) for n in sorted(info["numbers"]))
        so_far = "".join(info["formula"])
        found = self.continuations(info)
        # the simplest way on from here, whether or not the action goes it
        plan = "".join(found[0]) if found else "nothing"
        return (f"{self.reading(info)} so the numbers are {numbers}. Now '{so_far}' then '{plan}'. "
                f"I choose {action}.")

    def statistics(self, decisions, thinking):
        """How formulas are planned, and whether the plans are followed; {} without thoughts.

        plan_rate: how often the plan in the thoughts is right while one could be; plan_followed:
        how often a plan's first symbol is played.
        """
        if not thinking:
            return {}
        plans = [(planned(choice.text), info, choice.action) for _, info, choice in thinking]
        return {
            "plan_rate": rate(
                plan_right(plan, info) for plan, info, _ in plans if self.continuations(info)),
            "plan_followed": rate(plan[0] == action for plan, _, action in plans if plan),
        }


def planned(text: str) -> list[str]:
    """The symbols that an answer on a formula game plans to write next, "=" with them.

    [] where it names none.

    >>> planned("Now '(' then '3+9)*2='. I choose 3.")
    ['3', '+', '9', ')', '*', '2', '=']
    """
    match = re.search(r"then '([^']*)'", text)
    return re.findall(r"\d+|[-+*/()=]", match[1]) if match else []


def plan_right(plan: list[str], info: dict) -> bool:
    """Whether a plan makes the formula so far a right one."""
    formula = [*info["formula"], *plan[:-1]]
    return plan[-1:] == ["="] and is_right(formula, info["numbers"], info["target"])
