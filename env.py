"""The four games of RL4VLM's gym_cards as Gymnasium environments, and ALFWorld's name among them.

    env = gymnasium.make("cards/Blackjack-v0")      # after `import env`; or GAMES["blackjack"]()
    picture, info = env.reset(seed=1)               # (300, 300, 3) uint8, and what it shows
    picture, reward, terminated, truncated, info = env.step(1)      # an index into legal_actions()
    envs = gymnasium.make_vec("env:cards/Blackjack-v0", num_envs=3, vectorization_mode="async")

A game is a class: its description and actions, how it is dealt, played, told and drawn. What all
games share (seeding, counting steps, success, saved states) is games/game.py's class Game.

Differs from the published gym_cards: all chance comes from the environment's own generator,
formulas are exact fractions, two adjacent digits never form a number, NumberLine draws its 30 deals
uniformly, the dealer's hidden card is nowhere in `info`. Rules: section 5 and appendix B of the
paper (arXiv 2405.10292). Does not handle: sprites (games/draw.py), the arithmetic of formulas
(games/formula.py), who plays well (games/expert.py), prompts and answers (parse.py), games from
outside (games/outside.py).
"""

import itertools
import math

import gymnasium

from games import draw, outside
from games.alfworld.game import ALFWorld
from games.draw import RANKS, SUITS
from games.expert import BlackjackExpert, FormulaExpert, NumberLineExpert
from games.formula import is_right, solutions
from games.game import Game, GameError


def _are_cards(cards):
    """Whether a value is a list of cards 0..51."""
    return isinstance(cards, list) and all(type(card) is int and 0 <= card < 52 for card in cards)


class NumberLine(NumberLineExpert, Game):
    """Move the current number to the target, one step at a time, in 0..max_position.

    Reward: +1 on reaching the target (ends), −1 for a step that brings it no closer (a bump at the
    edge too), else 0. Time is up after 2 · max_position steps.
    """

    description = "Move the current number to the target number."     # opens the prompt
    actions = ("-", "+")                # what an answer may name, and what step() counts through
    fields = ("target", "current")      # the state, which get_state and set_state carry
    pocket = "pocket"                   # checkpoints/pocket reads its pictures
    compare_with = ("random", "always:+", "expert")

    def __init__(self, max_position=5, render_mode=None):
        if not 1 <= max_position <= 99:
            raise ValueError(
                f"max_position must be 1 to 99, as the picture can show it, not {max_position}")
        # as published; the farthest deal needs half of them
        self.max_position, self.max_steps = max_position, 2 * max_position
        super().__init__(render_mode)

    def is_possible(self):
        # asked by set_state: a file may hold anything
        for number in (self.target, self.current):
            if type(number) is not int or not 0 <= number <= self.max_position:
                return False
        return self.over or self.current != self.target     # on the target the game is over

    def deal(self):
        # Uniform over the n (n + 1) ordered pairs of different numbers: one draw, no re-rolling.
        pair = int(self.np_random.integers(self.max_position * (self.max_position + 1)))
        self.target, self.current = divmod(pair, self.max_position)
        # the current number is drawn among all but the target: those from it on move up
        if self.current >= self.target:
            self.current += 1

    def all_deals(self):
        pairs = list(itertools.permutations(range(self.max_position + 1), 2))
        return [(1 / len(pairs), {"target": target, "current": now}) for target, now in pairs]

    def play(self, action):
        before = abs(self.target - self.current)
        step = 1 if action == "+" else -1
        # an edge holds the number: no step closer, so a bump costs 1 as well
        self.current = min(max(self.current + step, 0), self.max_position)
        after = abs(self.target - self.current)
        reward = 1 if after == 0 else -1 if after >= before else 0
        return reward, after == 0

    def info(self):
        return {"target": self.target, "current": self.current}

    def draw(self):
        # two lines of text, the numbers to be read
        canvas = draw.table()
        draw.put(canvas, draw.word(f"Target: {self.target}", 44), 34, 30)
        draw.put(canvas, draw.word(f"Current: {self.current}", 44), 34, 102)
        # The line and its ticks. A marker stands over the current number; the target is to be read.
        left, right, y = 34, 266, 230
        canvas[y:y + 3, left:right + 1] = draw.PAPER
        for n in range(self.max_position + 1):
            x = left + (right - left) * n // self.max_position
            canvas[y - 6:y + 9, x - 1:x + 2] = draw.PAPER
            if self.max_position <= 10:     # more labels would run into each other
                draw.put(canvas, draw.word(str(n), 20), x - 6, y + 14)
        x = left + (right - left) * self.current // self.max_position
        canvas[y - 26:y - 10, x - 6:x + 7] = draw.GOLD
        return canvas


class _FormulaGame(FormulaExpert, Game):
    """EZPoints and Points24: lay numbers and operators one by one until "=" is played.

    Reward: +10 for "=" on a formula that is right and uses every card once; −1 for "=" on any other
    (both end); −1 for a number that is on no unused card (the formula stays as it is); else 0.
    """

    brackets = ()
    fields = ("cards", "formula")
    pocket = "pocket"
    compare_with = ("random", "expert")
    count = 0                   # cards dealt, with replacement: two may be the same
    # a win of 10 counts as 1 in GAE, as in the other games (rollout.add_advantages)
    preferred_settings = {"reward_scale": 0.1}

    def __init__(self, target, face_cards_as_10=True, solvable_only=True, render_mode=None):
        self.target, self.solvable_only = target, solvable_only
        self.face_cards_as_10 = face_cards_as_10
        highest = 10 if face_cards_as_10 else 13
        numbers = [str(n) for n in range(1, highest + 1)]
        # subtle: all numbers are legal at all times. The model has to see which cards it has: a
        # number that is on none of them costs 1.
        self.actions = (*numbers, *self.operators, *self.brackets, "=")
        # told in the prompt, for the picture cannot say it
        faces = "J, Q and K count as 11, 12 and 13."
        if face_cards_as_10:
            faces = "J, Q and K count as 10."
        self.description = (
            f"Build a formula equal to {target} from all the cards, one symbol at a time. {faces}")
        super().__init__(render_mode)

    def state_text(self, info):
        # in the prompt, so that it changes at every step
        return f'The formula so far: "{"".join(info["formula"])}".'

    def is_possible(self):
        if not _are_cards(self.cards) or len(self.cards) != self.count:
            return False
        if not isinstance(self.formula, list) or len(self.formula) > self.steps:
            return False
        if not all(isinstance(token, str) for token in self.formula):
            return False
        # only symbols that can be laid, and no number more often than the cards have it
        numbers, used = self._numbers(), self._used()
        known = {*self.formula} <= {*self.actions} - {"="}
        return known and all(used.count(token) <= numbers.count(token) for token in used)

    def _number(self, card):
        rank = card // 4 + 1        # cards are 0..51, a rank's four suits together
        return min(rank, 10) if self.face_cards_as_10 else rank

    def _numbers(self):
        return [str(self._number(card)) for card in self.cards]

    def _used(self):
        return [token for token in self.formula if token.isdecimal()]

    def deal(self):
        self.formula = []
        # two cards make 12 in one deal of nine: EZPoints deals until one does
        for _ in range(10_000):
            self.cards = [int(c) for c in self.np_random.integers(52, size=self.count)]
            if self._may_be_dealt(map(self._number, self.cards)):
                return
        raise ValueError(f"no deal in 10,000 reaches {self.target}: choose another target")

    def _may_be_dealt(self, numbers):
        # sorted: the solver keeps what it has found, and order makes no difference
        numbers = tuple(sorted(numbers))
        return not self.solvable_only or bool(solutions(numbers, self.target, self.operators))

    def play(self, action):
        numbers = self._numbers()       # as texts, like the actions
        if action == "=":               # the only end but time, right or wrong
            return (10 if is_right(self.formula, numbers, self.target) else -1), True
        if action.isdecimal() and self._used().count(action) >= numbers.count(action):
            return -1, False            # on no unused card: refused, and the game goes on
        self.formula.append(action)
        return 0, False

    def info(self):
        return {
            "cards": [RANKS[c // 4] for c in self.cards],
            "numbers": [self._number(c) for c in self.cards],
            "formula": self.formula,
            "target": self.target,
        }

    def draw(self):
        canvas = draw.table()
        for i, c in enumerate(self.cards):
            # a row of two is centred in height, four make a square
            y = 70 if self.count == 2 else 6 + 122 * (i // 2)
            draw.put_card(canvas, RANKS[c // 4], SUITS[c % 4], 44 + 128 * (i % 2), y)
        draw.put_formula(canvas, "".join(self.formula), 220 if self.count == 2 else 247)
        return canvas


class EZPoints(_FormulaGame):
    """Two cards, always solvable; a formula of +, * that equals 12 within 5 steps."""

    operators, count, max_steps = "+*", 2, 5        # 3 symbols and "=", one step to spare

    def __init__(self, target=12, face_cards_as_10=True, render_mode=None):
        super().__init__(target, face_cards_as_10, True, render_mode)

    def all_deals(self):
        hands = [
            [first, second] for first, second in itertools.product(range(52), repeat=2)
            if self._may_be_dealt([self._number(first), self._number(second)])]
        return [(1 / len(hands), {"cards": hand}) for hand in hands]


class Points24(_FormulaGame):
    """Four cards, 73.09 % of the deals solvable; + - * / ( ) are to make 24 within 20 steps."""

    lesson_options = {"solvable_only": True}        # as in the paper's data
    # the longest solution without needless brackets has 11 symbols and "="
    operators, brackets, count, max_steps = "+-*/", ("(", ")"), 4, 20

    def __init__(self, target=24, face_cards_as_10=True, solvable_only=False, render_mode=None):
        super().__init__(target, face_cards_as_10, solvable_only, render_mode)

    def all_deals(self):
        """Every set of four numbers; its cards, so suits and order, are drawn anew each time."""
        cards = {}              # {number: the cards that count so}
        for card in range(52):
            cards.setdefault(self._number(card), []).append(card)
        found = []
        for numbers in itertools.combinations_with_replacement(cards, self.count):
            if self._may_be_dealt(numbers):
                orders = len({*itertools.permutations(numbers)})
                share = orders * math.prod(len(cards[number]) for number in numbers)
                mixed = self.np_random.permutation(numbers).tolist()
                hand = [int(self.np_random.choice(cards[number])) for number in mixed]
                found.append((share, {"cards": hand}))
        total = sum(share for share, _ in found)
        return [(share / total, deal) for share, deal in found]


class Blackjack(BlackjackExpert, Game):
    """Gymnasium's Blackjack-v1 (Sutton and Barto, example 5.1), without its extra for naturals.

    Infinite deck, the dealer stands on 17. Reward +1 win, 0 draw, −1 loss, at the end.
    """

    description = (
        "You play blackjack against the dealer. The dealer's cards are above, yours below.")
    actions = ("stand", "hit")
    fields = ("player", "dealer")       # two hands of cards 0..51
    pocket = "pocket"
    compare_with = ("always:stand", "below:12", "below:14", "expert")

    def is_possible(self):
        if not all(_are_cards(hand) and len(hand) >= 2 for hand in (self.player, self.dealer)):
            return False
        if not self.over and (self.total(self.player)[0] > 21 or len(self.dealer) > 2):
            return False
        # nobody draws after the end of a turn: the player's a bust, the dealer's from 17 on
        turns = ((self.player, 22), (self.dealer, 17))
        return all(
            self.total(hand[:k])[0] < end for hand, end in turns for k in range(2, len(hand)))

    def _card(self):
        return int(self.np_random.integers(52))         # an infinite deck: no card is missing

    def deal(self):
        self.dealer = [self._card(), self._card()]      # the second lies face down
        self.player = [self._card(), self._card()]

    @staticmethod
    def total(hand):
        """(total, usable ace) of cards 0..51: an ace counts 11 where that does not bust.

        >>> Blackjack.total([0, 36])      # an ace and a 10
        (21, True)
        """
        ranks = [c // 4 + 1 for c in hand]              # 1 an ace, 11 to 13 the court
        hard = sum(min(rank, 10) for rank in ranks)     # every ace as 1
        usable = 1 in ranks and hard + 10 <= 21
        return hard + 10 * usable, usable

    def play(self, action):
        if action == "hit":
            self.player.append(self._card())
            bust = self.total(self.player)[0] > 21      # the end, whatever the dealer holds
            return (-1 if bust else 0), bust
        # "stand": the dealer's turn, whose rule leaves no choice
        while self.total(self.dealer)[0] < 17:
            self.dealer.append(self._card())
        mine, theirs = self.total(self.player)[0], self.total(self.dealer)[0]
        return (1 if theirs > 21 or mine > theirs else -1 if mine < theirs else 0), True

    def info(self):
        # subtle: of the dealer's cards the first alone, or the thoughts could be told the second
        total, usable = self.total(self.player)
        return {
            "dealer": RANKS[self.dealer[0] // 4],
            "hand": [RANKS[c // 4] for c in self.player],
            "total": total,
            "usable_ace": usable,
        }

    def draw(self):
        # the dealer above, the player below, each hand fanned so that every corner shows
        canvas = draw.table()
        dealer = [(RANKS[c // 4], SUITS[c % 4]) for c in self.dealer]
        if not self.over:
            dealer[1] = (None, dealer[1][1])    # turned up only when the episode is over
        draw.put(canvas, draw.word("Dealer", 14), 14, 5)
        draw.put_hand(canvas, dealer, 24)
        draw.put(canvas, draw.word("You", 14), 14, 144)
        draw.put_hand(canvas, [(RANKS[c // 4], SUITS[c % 4]) for c in self.player], 164)
        return canvas


# ---- by name -----------------------------------------------------------------------------------
GAMES = {
    "numberline": NumberLine,
    "ezpoints": EZPoints,
    "points24": Points24,
    "blackjack": Blackjack,
}
# the paper's second world; its engine is an optional package, needed when such a game is made
TASKS = {**GAMES, "alfworld": ALFWorld}


def find_game(task: str) -> type[Game]:
    """The class of a task: a name in TASKS, my_game.py:CLASS or gymnasium:ID.

    GameError where there is none.
    """
    if task in TASKS or ":" in task:
        return TASKS.get(task) or outside.find(task)
    raise GameError(
        f"there is no task {task!r}: choose {', '.join(TASKS)}, my_game.py:CLASS or gymnasium:ID")


def make_game(task: str, **options) -> Game:
    """A game of a task, with its constructor's options."""
    return find_game(task)(**options)


def held_out_game(task: str, options: dict | None = None) -> Game:
    """A game for held-out play: on ALFWorld one of other houses. Its seeds are the caller's."""
    return make_game(task, **find_game(task).held_out_options | (options or {}))


def check_game(task: str, texts=(), needs=()) -> dict:
    """Try a game before anything is loaded or played; return its constructor's options.

    texts: these as "name=value"; needs: what a game from outside must have of best_actions,
    reading, thoughts. GameError says what is wrong.
    """
    options = outside.read_options(find_game(task), texts)
    if task not in TASKS:
        outside.check(find_game(task), options, needs)
        return options
    try:
        make_game(task, **options).reset(seed=0)
    except ValueError as error:
        raise GameError(str(error)) from error
    return options


# gymnasium.make knows them by these names; an import twice must not register twice
for _name, _game in TASKS.items():
    _id = f"{'cards' if _name in GAMES else 'alfworld'}/{_game.__name__}-v0"
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_game)
