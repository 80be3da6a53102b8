"""Games of which some deals never come in training: does what RL teaches carry over to them?

    python train.py --task examples/withheld.py:NumberLine --out runs/withheld --eval-episodes 0
    python eval.py --task examples/withheld.py:NumberLine --run runs/withheld --episodes all

Held-out games have all deals; success_by_kind tells the seen from the withheld. Withheld are one of
NumberLine's six targets with its five deals (a pair alone is passed on the way from a farther
start), 2 of EZPoints' 7 pairs of numbers, a fifth of Points24's 566 sets of numbers that have a
solution: drawn once, the same in every run. RL alone does without them: supervised fine-tuning, of
the pocket model too, has shown right thoughts about all of them.
"""

import numpy as np

import env
from games.formula import solutions


class Withheld:
    """To be mixed into a game that has all_deals."""

    lesson_options, held_out_options = {}, {"withhold": False}
    one_in = 5                  # of so many keys one is withheld

    def __init__(self, withhold=True, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.withhold = withhold
        keys = {self.key(deal) for _, deal in super().all_deals()}
        keys = sorted(key for key in keys if self.can_be_won(key))
        drawn = np.random.default_rng(0).permutation(len(keys))[:len(keys) // self.one_in]
        self.kinds = dict.fromkeys(keys, "seen") | {keys[k]: "withheld" for k in drawn}

    def key(self, deal):
        """What is withheld or not, of a deal as in all_deals."""
        return deal["target"]

    def can_be_won(self, key):
        return True

    def deal(self):
        while True:
            super().deal()
            self.kind = self._kind(vars(self))
            if not self.withhold or self.kind != "withheld":
                return

    def _kind(self, deal):
        return self.kinds.get(self.key(deal), "no solution")

    def all_deals(self):
        return [(share, deal | {"kind": self._kind(deal)}) for share, deal in super().all_deals()]

    def info(self):
        return super().info() | {"kind": self.kind}


class WithheldFormulas(Withheld):
    def key(self, deal):
        return tuple(sorted(self._number(card) for card in deal["cards"]))

    def can_be_won(self, key):
        return bool(solutions(key, self.target, self.operators))


class NumberLine(Withheld, env.NumberLine):
    fields, one_in = (*env.NumberLine.fields, "kind"), 6


class EZPoints(WithheldFormulas, env.EZPoints):
    fields, one_in = (*env.EZPoints.fields, "kind"), 3


class Points24(WithheldFormulas, env.Points24):
    fields = (*env.Points24.fields, "kind")
