r"""NumberLine whose demonstrations think in many words, and do not say what they choose.

    python sft.py --task examples/own_words.py:OwnWords --model runs/smol --out runs/words \
        --label-noise 1 --steps 120 --batch-size 16 --seed 1
    python train.py --task examples/own_words.py:OwnWords --model runs/words --total-timesteps 2048

The game's own thoughts have one wording, which ends in "I choose +.", so the action's tokens only
copy it and λ scales all that is learned. Here they have 16, which do not name the action: taught
with random labels, it is a coin's throw before RL. reading_rate checks the two numbers,
compare_rate the rest, in any mixture of these phrases. Other words may be misjudged.
"""

import re

import numpy as np

from env import NumberLine
from games.statistics import rate

READINGS = (
    "The target is {target} and the current number is {current}.",
    "I am at {current} and I have to get to {target}.",
    "In the picture my number is {current}, but it should be {target}.",
    "The two numbers that I can see are {current}, where I stand now, and {target}, the goal.",
)
# of a target that is greater, and of one that is smaller
COMPARISONS = (
    ("The target is greater.", "The target is smaller."),
    ("So I am still {far} too low.", "So I am still {far} too high."),
    ("As {target} is more than {current}, I have to go up.",
     "As {target} is less than {current}, I have to go down."),
    ("That is {far} above me, which is where I should go next.",
     "That is {far} below me, which is where I should go next."),
)
# what these phrases claim: the two numbers, their distance, which is greater
TARGET = re.compile(r"(?:target(?: number)? is|get to|should be|and) (\d+)")
CURRENT = re.compile(r"(?:(?<!target )number is|I am at|see are) (\d+)")
FAR = re.compile(r"(\d+) (?:too|above|below)")
PAIR = re.compile(r"(\d+) is (?:more|less) than (\d+)")
UP = re.compile(r"target is greater|too low|more than|go up|above")
DOWN = re.compile(r"target is smaller|too high|less than|go down|below")


class OwnWords(NumberLine):
    pocket = None               # its pocket model knows one sentence

    def __init__(self, max_position=5, render_mode=None):
        super().__init__(max_position, render_mode)
        # Wordings of demonstrations, no part of the state. subtle: every object draws the same ones
        # in the same order, and results/SMOL.md's start was made so.
        self.draws = np.random.default_rng(0)

    def thoughts(self, info, action):
        reading = READINGS[self.draws.integers(len(READINGS))]
        comparison = COMPARISONS[self.draws.integers(len(COMPARISONS))]
        # False is 0, True is 1
        said = f"{reading} {comparison[info['target'] < info['current']]}"
        far = abs(info["target"] - info["current"])
        return said.format(target=info["target"], current=info["current"], far=far)

    def reads(self, info, text):
        return (set(TARGET.findall(text)) == {str(info["target"])}
                and set(CURRENT.findall(text)) == {str(info["current"])})

    def statistics(self, decisions, thinking):
        """compare_rate: how often thoughts say where the target lies, and all of it is true."""
        def compares(info, text):
            target, current = info["target"], info["current"]
            says = bool(UP.search(text)), bool(DOWN.search(text))
            return (says == (target > current, target < current)
                    and {*FAR.findall(text)} <= {str(abs(target - current))}
                    and {*PAIR.findall(text)} <= {(str(target), str(current))})
        return {"compare_rate": rate(compares(info, choice.text) for _, info, choice in thinking)}
