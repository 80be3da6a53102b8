"""Games whose thoughts do not say what is chosen: there λ has something to weigh.

    python sft.py --task examples/undecided.py:NumberLine --model pocket --full --bits 32 \
        --label-noise 1 --steps 300 --lr 5e-4 --out runs/undecided
    python train.py --task examples/undecided.py:NumberLine --model runs/undecided --cot-lambda 0.2

With the pocket model's own lessons the thoughts end in "I choose +.", the action's tokens are a
copy of probability 1, and λ scales all that is learned. Here the thoughts read the picture and
compare, or plan, and the action's tokens carry the decision; taught with random labels, they have
an entropy. `--game long=true` has the thoughts say more, all of it true.
"""

import env


class Undecided:
    """To be mixed into a game with thoughts that end in "I choose …"."""

    def __init__(self, long=False, render_mode=None):
        super().__init__(render_mode=render_mode)
        self.long = long

    def thoughts(self, info, action):
        said = super().thoughts(info, action).removesuffix(f" I choose {action}.")
        return f"{said} {self.more(info)}" if self.long else said


class NumberLine(Undecided, env.NumberLine):
    def more(self, info):
        """
        >>> NumberLine().more({"target": 1, "current": 3})
        'The way is 3 2 1. It has 2 steps. I have to go down.'
        """
        target, current = info["target"], info["current"]
        step = 1 if target > current else -1
        way = " ".join(map(str, range(current, target + step, step)))
        return (f"The way is {way}. It has {abs(target - current)} steps. "
                f"I have to go {'up' if step == 1 else 'down'}.")


class EZPoints(Undecided, env.EZPoints):
    def more(self, info):
        """
        >>> EZPoints().more({"numbers": [10, 2], "formula": ["2"]})
        'The sum is 12 and the product is 20. So far there are 1 symbols.'
        """
        a, b = info["numbers"]
        return (f"The sum is {a + b} and the product is {a * b}. "
                f"So far there are {len(info['formula'])} symbols.")
