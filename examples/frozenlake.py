"""Gymnasium's FrozenLake with a reading, thoughts and the exact policy: what one may add to it.

    python eval.py --task examples/frozenlake.py:FrozenLake --policy expert
    python eval.py --task examples/frozenlake.py:FrozenLake --game is_slippery=false --policy random

Needs extras/requirements-gymnasium.txt. On slippery ice, the default, a move goes where it should
one time in three, and to either side as often: not even the best policy always arrives.
"""

import numpy as np

from games.wrapped import Wrapped

GROUND = {"H": "a hole", "F": "ice", "S": "ice", "G": "the present", "": "the edge"}


class FrozenLake(Wrapped):
    env_id = "FrozenLake-v1"
    description = "Walk over the ice to the present, around the holes."
    actions = ("left", "down", "right", "up")
    success_return = 1
    # The one reward comes after some forty steps, of which γ 0.9 would leave a hundredth; and it is
    # rare, so advantages spread little: they are divided by that, as in the paper.
    preferred_settings = {"gamma": 0.99, "advantage_floor": 0.0}

    def __init__(self, **options):
        super().__init__(**options)
        lake = self.env.unwrapped
        self.map = [row.tobytes().decode() for row in lake.desc]
        self.Q = action_values(lake.P)
        self.pictures = {}

    def draw(self):
        # kept, for drawing takes longer than all else: it hangs on place and last move alone
        seen = self.env.unwrapped.s, self.env.unwrapped.lastaction
        if seen not in self.pictures:
            self.pictures[seen] = super().draw()
        return self.pictures[seen].copy()

    def info(self):
        return {"place": int(self.observation)}

    def best_actions(self, info):
        values = self.Q[info["place"]]
        return [name for name, value in zip(self.actions, values) if value > values.max() - 1e-9]

    def reading(self, info):
        row, column = divmod(info["place"], len(self.map[0]))
        around = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
        seen = {name: GROUND[self.at(row + a, column + b)] for name, (a, b) in around.items()}
        told = ", ".join(f"{name} {what}" for name, what in seen.items())
        return f"I am in row {row}, column {column}; {told}."

    def at(self, row, column):
        inside = 0 <= row < len(self.map) and 0 <= column < len(self.map[0])
        return self.map[row][column] if inside else ""

    def thoughts(self, info, action):
        return f"{self.reading(info)} I choose {action}."


def action_values(P, gamma=0.999):
    """Q (states, actions) by value iteration on P: nearly the probability to arrive.

    gamma below 1, or all moves that lose nothing would be equally good for ever.
    """
    Q = np.zeros((len(P), len(P[0])))
    for _ in range(2000):
        V = Q.max(axis=1)
        for state, moves in P.items():
            for move, outcomes in moves.items():
                Q[state, move] = sum(
                    p * (reward + gamma * V[after] * (not ends))
                    for p, after, reward, ends in outcomes)
    return Q
