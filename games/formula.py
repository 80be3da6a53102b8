"""Exact arithmetic on formulas: what a list of tokens is worth, and every way to reach a target.

    evaluate(["8", "/", "(", "3", "-", "8", "/", "3", ")"])     # Fraction(24, 1)
    solutions((3, 3, 8, 8), 24)                                 # all, the simplest formula first

A formula is a sequence of tokens, each a number or one of + - * / ( ), exactly as a player lays
them. Values are fractions, so 8/(3-8/3) is 24 and not 24.000000000000004.

Does not handle: cards, rewards (env.py); unary minus and numbers written digit by digit, which no
game has.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from operator import add, mul, sub, truediv

DEEPEST = 100           # brackets; a game has 20 symbols, a model's plan may have thousands
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
APPLY = {"+": add, "-": sub, "*": mul, "/": truediv}


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """Return the value of a formula; None if it is no formula, or divides by zero.

    Grammar: sum = product {(+|-) product};  product = atom {(*|/) atom};
    atom = number | "(" sum ")". Two numbers next to each other never form a third one.

    >>> evaluate(["8", "/", "(", "3", "-", "8", "/", "3", ")"])
    Fraction(24, 1)
    >>> evaluate(["2", "4"]) is None and evaluate(["(", "2"]) is None
    True
    >>> evaluate(["1", "/", "0"]) is None
    True
    """
    if tokens.count("(") > DEEPEST:
        return None
    rest = ["", *reversed(tokens)]      # the next token is the last of these; "" is the end

    def atom():
        token = rest.pop()
        if token == "(":
            value = total()
            if rest.pop() != ")":
                raise ValueError("unbalanced bracket")
            return value
        if not token.isdecimal():
            raise ValueError("a number or a bracket belongs here")
        return Fraction(int(token))

    # operands joined by operators of one precedence, worked off from the left
    def chain(operand, level):
        value = operand()
        while PRECEDENCE.get(rest[-1]) == level:
            operator = rest.pop()
            value = APPLY[operator](value, operand())
        return value

    def product():
        return chain(atom, 2)

    def total():
        return chain(product, 1)

    try:
        value = total()
    except (ValueError, ZeroDivisionError):
        return None
    # what is left over, such as a second number, makes it no formula
    return value if rest == [""] else None


def is_right(tokens: Sequence[str], numbers: Sequence[int], target: int) -> bool:
    """Whether the formula uses every number once and reaches the target.

    >>> is_right(["2", "+", "10"], [10, 2], 12), is_right(["12"], [10, 2], 12)
    (True, False)
    """
    used = [token for token in tokens if token.isdecimal()]
    return sorted(used) == sorted(map(str, numbers)) and evaluate(tokens) == target


@cache
def solutions(
    numbers: tuple[int, ...], target: int, operators="+-*/") -> tuple[tuple[str, ...], ...]:
    """Return all formulas that use every number once and reach the target, the simplest first.

    numbers: a sorted tuple. Each formula is a tuple of tokens with no needless brackets; both a+b
    and b+a are listed. "Simplest" is shortest, then first in the order of its text.

    >>> ["".join(f) for f in solutions((2, 10), 12, "+*")]
    ['10+2', '2+10']
    >>> "".join(solutions((3, 3, 8, 8), 24)[0])
    '8/(3-8/3)'
    """
    if list(numbers) != sorted(numbers):
        raise ValueError(f"numbers must be sorted, got {numbers}")

    @cache
    def expressions(part):
        """All (value, tokens, precedence of the outermost operator) of the numbers in part."""
        if len(part) == 1:
            # 3 is above all operators: a number never needs brackets
            return ((Fraction(part[0]), (str(part[0]),), 3),)
        found = {}
        for left_part, right_part in _splits(part):
            for lv, lt, lp in expressions(left_part):
                for rv, rt, rp in expressions(right_part):
                    for operator in operators:
                        if operator == "/" and rv == 0:
                            continue
                        value = APPLY[operator](lv, rv)
                        # most formulas of all numbers miss the target: not worth writing down
                        if part == numbers and value != target:
                            continue
                        level = PRECEDENCE[operator]
                        left = ("(", *lt, ")") if lp < level else lt
                        # subtle: a-(b+c) and a/(b*c) need their brackets;
                        # a+(b-c) and a*(b/c) do not.
                        wrap = rp < level or (rp == level and operator in "-/")
                        right = ("(", *rt, ")") if wrap else rt
                        found[left + (operator,) + right] = (value, level)
        return tuple((value, tokens, level) for tokens, (value, level) in found.items())

    # a lone number was not compared with the target yet
    good = [tokens for value, tokens, _ in expressions(numbers) if value == target]
    return tuple(sorted(good, key=lambda tokens: (len(tokens), tokens)))


def _splits(part):
    """Every way to hand out the numbers to a left and a right side, neither empty.

    Both orders, no repeats.
    """
    pairs = set()
    # bit i of the mask says whether number i goes to the left
    for mask in range(1, 2 ** len(part) - 1):
        left = tuple(n for i, n in enumerate(part) if mask >> i & 1)
        right = tuple(n for i, n in enumerate(part) if not mask >> i & 1)
        pairs.add((left, right))
    return pairs
