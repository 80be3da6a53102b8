"""Games whose thoughts do not say what is chosen: the action's tokens carry the decision.

    python sft.py --task examples/undecided.py:NumberLine --model pocket --full --bits 32 \
        --label-noise 1 --steps 300 --lr 5e-4 --out runs/undecided
    python train.py --task examples/undecided.py:NumberLine --model runs/undecided --cot-lambda 0.2

With the pocket model's own lessons the thoughts end in "I choose +.", the action's tokens are a
copy of probability 1, and λ scales all that is learned. Here the thoughts read the picture and
compare, or plan, and the action's tokens, taught with random labels, have an entropy. The thoughts
have none: each state has one wording. With `--game long=true` they say more, all of it true: up to
three further sentences, how many and in which order is drawn. So they have an entropy as well, of
which the reward knows nothing, and λ has something to weigh.
"""

import numpy as np

import env


class Undecided:
    """To be mixed into a game with thoughts that end in "I choose …"."""

    def __init__(self, long=False, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.long = long
        # wordings of demonstrations, no part of the state; every object draws the same ones
        self.draws = np.random.default_rng(0)

    def thoughts(self, info, action):
        said = super().thoughts(info, action).removesuffix(f" I choose {action}.")
        if not self.long:
            return said
        further = self.draws.permutation(self.more(info))[:self.draws.integers(4)]
        return " ".join([said, *further])


class NumberLine(Undecided, env.NumberLine):
    def more(self, info):
        """
        >>> NumberLine().more({"target": 1, "current": 3})
        ['The way is 3 2 1.', 'It has 2 steps.', 'I have to go down.']
        """
        target, current = info["target"], info["current"]
        step = 1 if target > current else -1
        way = " ".join(map(str, range(current, target + step, step)))
        return [f"The way is {way}.", f"It has {abs(target - current)} steps.",
                f"I have to go {'up' if step == 1 else 'down'}."]


class EZPoints(Undecided, env.EZPoints):
    def more(self, info):
        """
        >>> EZPoints().more({"numbers": [10, 2], "formula": ["2"]})
        ['The sum is 12.', 'The product is 20.', 'The formula is 1 symbols long.']
        """
        a, b = info["numbers"]
        return [f"The sum is {a + b}.", f"The product is {a * b}.",
                f"The formula is {len(info['formula'])} symbols long."]
