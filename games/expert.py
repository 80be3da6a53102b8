"""Exact players of the games and the words that they would say: the source of all demonstrations.

    action = expert_action("blackjack", info)           # "hit"
    thoughts("blackjack", info, action)                 # "The dealer shows 7. … I choose hit."

NumberLine is played by arithmetic, EZPoints and Points24 by exhaustive search (formula.py),
Blackjack by exact dynamic programming. `thoughts` writes the chain of thought that leads to an
action (any action, so that noisy demonstrations stay fluent); `reads_right` checks what an answer
says it saw. For ALFWorld all of them ask games/alfworld/expert.py.

Does not handle: learning (sft.py), the answer's format (parse.py).
"""

import re
from functools import cache

from games.alfworld import expert as household
from games.formula import is_right, solutions

OPERATORS = {"ezpoints": "+*", "points24": "+-*/"}
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
def stand_value(total, dealer, goal):
    """Value of standing on `total` (22 or more: bust) against the dealer's card 1..10.

    goal: "win" counts the probability to win, "return" wins minus losses.
    """
    if total > 21:
        return 0.0 if goal == "win" else -1.0
    # with an infinite deck the card that lies face down is as good as not drawn yet
    odds = dealer_odds(*_add(0, False, dealer))
    win = sum(p for final, p in odds.items() if final == 22 or final < total)
    lose = sum(p for final, p in odds.items() if total < final < 22)
    return win if goal == "win" else win - lose


def blackjack_values(goal="win", hit_probability=None):
    """Return a function (total, usable, dealer) → (value of standing, value of hitting).

    Hitting goes on with the best play for the goal, or with hit_probability(total, usable, dealer)
    where that is given.
    """
    @cache
    def values(total, usable, dealer):
        stand = stand_value(total, dealer, goal)
        # Q(s, hit) = Σ_rank p(rank) V(s with that card)
        hit = 0.0
        for rank, p in CARD_ODDS.items():
            after, soft = _add(total, usable, rank)
            if after > 21:
                hit += p * stand_value(after, dealer, goal)
            else:
                hit += p * state_value(after, soft, dealer)
        return stand, hit

    def state_value(total, usable, dealer):
        stand, hit = values(total, usable, dealer)
        if hit_probability is None:
            p = float(hit > stand)
        else:
            p = hit_probability(total, usable, dealer)
        return (1 - p) * stand + p * hit

    values.of_state = state_value
    return values


# made once, for it remembers all values that it was asked for
_best_for_wins = blackjack_values("win")


# ---- what the experts play ---------------------------------------------------------------------
def card_value(rank):
    """The number that a card's rank counts in Blackjack, an ace as 1."""
    if rank == "A":
        return 1
    return 10 if rank in ("J", "Q", "K") else int(rank)


def continuations(task: str, info: dict) -> list[tuple[str, ...]]:
    """All that completes the formula so far to a solution: tuples of symbols, "=" last.

    The rest of the simplest solution comes first.
    """
    so_far = tuple(info["formula"])
    length = len(so_far)
    found = solutions(tuple(sorted(info["numbers"])), info["target"], OPERATORS[task])
    return [(*tokens[length:], "=") for tokens in found if tokens[:length] == so_far]


def best_actions(task: str, info: dict) -> list[str]:
    """Return the texts of all best actions in the state that `info` tells, the simplest first.

    Blackjack: best for wins, not for the return. Formula games: every next symbol of some solution
    (one without needless brackets); a formula that no solution continues is given up with "=".
    ALFWorld: the demonstrator's next command alone, which goes by its memory; others may be as
    good.

    >>> best_actions("ezpoints", {"numbers": [2, 10], "formula": [], "target": 12})
    ['10', '2']
    """
    if task == "alfworld":
        return [household.next_step(info)[1]]
    if task == "numberline":
        return ["+" if info["target"] > info["current"] else "-"]
    if task == "blackjack":
        dealer = card_value(info["dealer"])
        stand, hit = _best_for_wins(info["total"], info["usable_ace"], dealer)
        return ["hit" if hit > stand else "stand"]
    # a dict keeps the order and drops what comes twice
    following = dict.fromkeys(tokens[0] for tokens in continuations(task, info))
    return list(following) or ["="]


def expert_action(task: str, info: dict) -> str:
    """Return the text of the action that the expert plays: the first of the best ones."""
    return best_actions(task, info)[0]


# ---- what they say -----------------------------------------------------------------------------
def reading(task, info):
    """The sentence that says what the picture shows."""
    if task == "alfworld":
        return household.reading(info)
    if task == "numberline":
        return f"The target is {info['target']} and the current number is {info['current']}."
    if task == "blackjack":
        return f"The dealer shows {info['dealer']}. My cards are {' '.join(info['hand'])},"
    return f"The cards are {' '.join(info['cards'])},"


def reads_right(task: str, text: str, info: dict) -> bool:
    """Whether an answer says what the picture shows, card for card, as demonstrations word it."""
    return reading(task, info) in text


def thoughts(task: str, info: dict, action: str) -> str:
    """Return the chain of thought that ends in choosing `action`, right or not.

    >>> info = {"dealer": "7", "hand": ["A", "4"], "total": 15, "usable_ace": True}
    >>> thoughts("blackjack", info, "hit")
    'The dealer shows 7. My cards are A 4, total soft 15. I choose hit.'
    """
    if task == "alfworld":
        return household.thoughts(info, action)
    seen = reading(task, info)
    if task == "numberline":
        seen += f" The target is {'greater' if info['target'] > info['current'] else 'smaller'}."
    elif task == "blackjack":
        seen += f" total {'soft ' if info['usable_ace'] else ''}{info['total']}."
    else:
        numbers = " ".join(str(n) for n in sorted(info["numbers"]))
        so_far = "".join(info["formula"])
        found = continuations(task, info)
        # the simplest way on from here, whether or not the action goes it
        plan = "".join(found[0]) if found else "nothing"
        seen += f" so the numbers are {numbers}. Now '{so_far}' then '{plan}'."
    return f"{seen} I choose {action}."


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
