"""The four games of RL4VLM's gym_cards as Gymnasium environments: NumberLine, EZPoints, Points24, Blackjack.

    env = gymnasium.make("cards/Blackjack-v0")        # after `import env`; or env.GAMES["blackjack"]()
    picture, info = env.reset(seed=1)                  # (300, 300, 3) uint8, and what the picture shows
    picture, reward, terminated, truncated, info = env.step(1)        # an index into legal_actions()
    envs = gymnasium.make_vec("env:cards/Blackjack-v0", num_envs=3, vectorization_mode="async")         # or "sync"

Differs from the published gym_cards: all chance comes from the environment's own generator, formulas are exact
fractions, two adjacent digits never form a number, NumberLine draws its 30 deals uniformly, the dealer's hidden
card is nowhere in `info`. Rules: section 5 and appendix B of the paper (arXiv 2405.10292).
Does not handle: what all games share (games/game.py), drawing (games/draw.py), the arithmetic of formulas
(games/formula.py), prompts and answers (parse.py).
"""

import gymnasium

from games import draw
from games.draw import RANKS, SUITS
from games.formula import is_right, solutions
from games.game import Game


def _are_cards(cards):
    """Whether a value is a list of cards 0..51."""
    return isinstance(cards, list) and all(type(card) is int and 0 <= card < 52 for card in cards)


class NumberLine(Game):
    """Move the current number to the target, one step at a time, in 0..max_position, within 2 · max_position steps.

    Reward: +1 on reaching the target (ends), −1 for a step that brings it no closer (a bump at the edge too), else 0.
    """

    description = "Move the current number to the target number."
    actions = ("-", "+")
    fields = ("target", "current")

    def __init__(self, max_position=5, render_mode=None):
        if not 1 <= max_position <= 99:
            raise ValueError(f"max_position must be 1 to 99, so that the picture can show it, not {max_position}")
        self.max_position, self.max_steps = max_position, 2 * max_position
        super().__init__(render_mode)

    def _is_possible(self):
        return (all(type(n) is int and 0 <= n <= self.max_position for n in (self.target, self.current))
                and (self.over or self.current != self.target))

    def _deal(self):
        # Uniform over the n (n + 1) ordered pairs of different numbers: one draw, no re-rolling.
        pair = int(self.np_random.integers(self.max_position * (self.max_position + 1)))
        self.target, self.current = divmod(pair, self.max_position)
        if self.current >= self.target:                        # the positions but the target: those from it on move up
            self.current += 1

    def _play(self, action):
        before = abs(self.target - self.current)
        step = 1 if action == "+" else -1
        self.current = min(max(self.current + step, 0), self.max_position)
        after = abs(self.target - self.current)
        return (1 if after == 0 else -1 if after >= before else 0), after == 0

    def _info(self):
        return {"target": self.target, "current": self.current}

    def _draw(self):
        canvas = draw.table()
        draw.put(canvas, draw.word(f"Target: {self.target}", 44), 34, 30)
        draw.put(canvas, draw.word(f"Current: {self.current}", 44), 34, 102)
        # the line, its ticks, and a marker over the current number (the target is to be read, not seen)
        left, right, y = 34, 266, 230
        canvas[y:y + 3, left:right + 1] = draw.PAPER
        for n in range(self.max_position + 1):
            x = left + (right - left) * n // self.max_position
            canvas[y - 6:y + 9, x - 1:x + 2] = draw.PAPER
            if self.max_position <= 10:
                draw.put(canvas, draw.word(str(n), 20), x - 6, y + 14)
        x = left + (right - left) * self.current // self.max_position
        canvas[y - 26:y - 10, x - 6:x + 7] = draw.GOLD
        return canvas


class _FormulaGame(Game):
    """EZPoints and Points24: lay numbers and operators one by one until "=" is played.

    Reward: +10 for "=" on a formula that is right and uses every card once; −1 for "=" on any other (both end);
    −1 for a number that is on no unused card (the formula stays as it is); else 0.
    """

    operators = ""              # what the solver may use
    brackets = ()
    fields = ("cards", "formula")
    count = 0                   # cards dealt

    def __init__(self, target, face_cards_as_10=True, solvable_only=True, render_mode=None):
        self.target, self.face_cards_as_10, self.solvable_only = target, face_cards_as_10, solvable_only
        highest = 10 if face_cards_as_10 else 13
        self.actions = (*(str(n) for n in range(1, highest + 1)), *self.operators, *self.brackets, "=")
        faces = "J, Q and K count as 10." if face_cards_as_10 else "J, Q and K count as 11, 12 and 13."
        self.description = f"Build a formula equal to {target} from all the cards, one symbol at a time. {faces}"
        super().__init__(render_mode)

    def state_text(self, info):
        return f'The formula so far: "{"".join(info["formula"])}".'

    def _is_possible(self):
        if not (_are_cards(self.cards) and len(self.cards) == self.count and isinstance(self.formula, list)
                and all(isinstance(token, str) for token in self.formula) and len(self.formula) <= self.steps):
            return False
        numbers, used = self._numbers(), [token for token in self.formula if token.isdecimal()]
        return (set(self.formula) <= {*self.actions} - {"="}
                and all(used.count(token) <= numbers.count(token) for token in used))

    def _number(self, card):
        rank = card // 4 + 1                                   # cards are 0..51, a rank's four suits together
        return min(rank, 10) if self.face_cards_as_10 else rank

    def _numbers(self):
        return [str(self._number(card)) for card in self.cards]

    def _deal(self):
        self.formula = []
        for _ in range(10_000):
            self.cards = [int(c) for c in self.np_random.integers(52, size=self.count)]
            if not self.solvable_only or self.solution():
                return
        raise ValueError(f"no deal in 10,000 reaches {self.target}: choose another target or solvable_only=False")

    def solution(self):
        """The simplest formula for the dealt cards, as a tuple of tokens; () if there is none."""
        found = solutions(tuple(sorted(map(self._number, self.cards))), self.target, self.operators)
        return found[0] if found else ()

    def _play(self, action):
        numbers = self._numbers()
        used = [token for token in self.formula if token.isdecimal()]
        if action == "=":
            return (10 if is_right(self.formula, numbers, self.target) else -1), True
        if action.isdecimal() and used.count(action) >= numbers.count(action):
            return -1, False
        self.formula.append(action)
        return 0, False

    def _info(self):
        return {"cards": [RANKS[c // 4] for c in self.cards], "numbers": [self._number(c) for c in self.cards],
                "formula": self.formula, "target": self.target}

    def _draw(self):
        canvas = draw.table()
        for i, c in enumerate(self.cards):
            # a row of two is centred in height, four make a square
            y = 70 if self.count == 2 else 6 + 122 * (i // 2)
            draw.put_card(canvas, RANKS[c // 4], SUITS[c % 4], 44 + 128 * (i % 2), y)
        draw.put_formula(canvas, "".join(self.formula), 220 if self.count == 2 else 247)
        return canvas


class EZPoints(_FormulaGame):
    """Two cards, always solvable; a formula of +, * that equals 12 within 5 steps."""

    operators, count, max_steps = "+*", 2, 5

    def __init__(self, target=12, face_cards_as_10=True, render_mode=None):
        super().__init__(target, face_cards_as_10, True, render_mode)


class Points24(_FormulaGame):
    """Four cards, 73.09 % of the deals solvable; a formula of + - * / ( ) that equals 24 within 20 steps."""

    operators, brackets, count, max_steps = "+-*/", ("(", ")"), 4, 20

    def __init__(self, target=24, face_cards_as_10=True, solvable_only=False, render_mode=None):
        super().__init__(target, face_cards_as_10, solvable_only, render_mode)


class Blackjack(Game):
    """Gymnasium's Blackjack-v1 (Sutton and Barto, example 5.1): infinite deck, the dealer stands on 17.

    natural: a two-card 21 that wins pays 1.5; sab: it beats any other 21 and pays 1 ("Sutton and Barto", wins over
    `natural`). Reward +1 win, 0 draw, −1 loss, at the end.
    """

    description = "You play blackjack against the dealer. The dealer's cards are above, yours below."
    actions = ("stand", "hit")
    fields = ("player", "dealer")

    def __init__(self, natural=False, sab=False, render_mode=None):
        self.natural, self.sab = natural, sab
        super().__init__(render_mode)

    def _is_possible(self):
        return all(_are_cards(hand) and len(hand) >= 2 for hand in (self.player, self.dealer))

    def _card(self):
        return int(self.np_random.integers(52))

    def _deal(self):
        self.dealer = [self._card(), self._card()]              # the second lies face down
        self.player = [self._card(), self._card()]

    @staticmethod
    def total(hand):
        """(total, usable ace) of a hand of cards 0..51: an ace counts 11 where that does not bust.

        >>> Blackjack.total([0, 36])      # an ace and a 10
        (21, True)
        """
        ranks = [c // 4 + 1 for c in hand]
        hard = sum(min(rank, 10) for rank in ranks)
        usable = 1 in ranks and hard + 10 <= 21
        return hard + 10 * usable, usable

    def _play(self, action):
        if action == "hit":
            self.player.append(self._card())
            bust = self.total(self.player)[0] > 21
            return (-1 if bust else 0), bust
        while self.total(self.dealer)[0] < 17:
            self.dealer.append(self._card())
        mine, theirs = self.total(self.player)[0], self.total(self.dealer)[0]
        reward = 1 if theirs > 21 or mine > theirs else -1 if mine < theirs else 0
        is_natural = mine == 21 and len(self.player) == 2
        if self.sab and is_natural and not (theirs == 21 and len(self.dealer) == 2):
            reward = 1
        elif self.natural and not self.sab and is_natural and reward == 1:
            reward = 1.5
        return reward, True

    def _info(self):
        total, usable = self.total(self.player)
        return {"dealer": RANKS[self.dealer[0] // 4], "hand": [RANKS[c // 4] for c in self.player],
                "total": total, "usable_ace": usable}

    def _draw(self):
        canvas = draw.table()
        # The dealer's second card is turned up only when the episode is over.
        shown = [(RANKS[c // 4] if i != 1 or self.over else None, SUITS[c % 4]) for i, c in enumerate(self.dealer)]
        draw.put(canvas, draw.word("Dealer", 14), 14, 5)
        draw.put_hand(canvas, shown, 24)
        draw.put(canvas, draw.word("You", 14), 14, 144)
        draw.put_hand(canvas, [(RANKS[c // 4], SUITS[c % 4]) for c in self.player], 164)
        return canvas


GAMES = {"numberline": NumberLine, "ezpoints": EZPoints, "points24": Points24, "blackjack": Blackjack}

TASKS = (*GAMES, "alfworld")


def make_game(task: str, **options) -> Game:
    """A game of a task; ALFWorld is imported only where it is asked for."""
    if task == "alfworld":
        from alfworld_env import ALFWorld
        return ALFWorld(**options)
    return GAMES[task](**options)


for _game in GAMES.values():
    if f"cards/{_game.__name__}-v0" not in gymnasium.registry:
        gymnasium.register(f"cards/{_game.__name__}-v0", entry_point=f"env:{_game.__name__}")
