"""A game of one's own in one file: an agent, walls, a goal.

    python eval.py --task examples/gridworld.py:GridWorld --policy expert
    python eval.py --task examples/gridworld.py:GridWorld --game size=6 walls=9 --policy random

A step costs 0.1, the one to the goal pays 1: a way of at most eleven steps is a success. What can
be done with it: YOUR_OWN_GAME.md.
"""

import numpy as np
from PIL import Image, ImageDraw

from games.game import SIZE, Game, GameError

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class GridWorld(Game):
    # -- the five things that a game has to say
    description = "Move the blue agent to the green goal, around the black walls."
    actions = tuple(MOVES)

    def deal(self):             # what is set here is the state: plain JSON, so lists, not tuples
        while True:
            order = self.np_random.permutation(self.size**2)[:self.wall_count + 2].tolist()
            self.agent, self.goal, *self.walls = ([n // self.size, n % self.size] for n in order)
            if tuple(self.agent) in self.distances(self.goal, self.walls):
                return

    def play(self, action):
        cell = after(self.agent, action)
        if cell in self.distances(self.goal, self.walls):       # else there is a wall or an edge
            self.agent = list(cell)
        at_goal = self.agent == self.goal
        return (1 if at_goal else -0.1), at_goal

    def draw(self):
        image, side = Image.new("RGB", (SIZE, SIZE), "white"), SIZE // self.size
        things = [(self.goal, "lime"), (self.agent, "blue")]    # colours far from black and white
        for (row, column), color in things + [(wall, "black") for wall in self.walls]:
            box = column * side + 3, row * side + 3, (column + 1) * side - 4, (row + 1) * side - 4
            ImageDraw.Draw(image).rectangle(box, fill=color)
        return np.asarray(image)

    # -- what it may say beside: a limit of steps, what a success is, options (--game size=6)
    max_steps = 20

    def is_success(self):       # after eleven steps the return is 0, above it by rounding alone
        return self.agent == self.goal and self.steps <= 11

    def __init__(self, size=5, walls=4, render_mode=None):
        if not (2 <= size <= 20 and 0 <= walls <= size**2 // 3):
            raise GameError(f"size is 2 to 20, walls take a third at most, not {size} and {walls}")
        self.size, self.wall_count = size, walls
        super().__init__(render_mode)

    # -- and what is known of good play, by the info of any state: demonstrations and metrics use it
    def best_actions(self, info):
        steps, cell = self.distances(info["goal"], info["walls"]), tuple(info["agent"])
        return [move for move in MOVES if steps.get(after(cell, move), 999) < steps[cell]]

    def reading(self, info):
        agent, goal = (" ".join(map(str, info[name])) for name in ("agent", "goal"))
        walls = ", ".join(f"{row} {column}" for row, column in sorted(info["walls"]))
        return f"The agent is at {agent}, the goal at {goal}, walls at {walls}."

    def thoughts(self, info, action):
        way, here = [], dict(info)
        while here["agent"] != here["goal"]:
            way += self.best_actions(here)[:1]
            here["agent"] = list(after(here["agent"], way[-1]))
        return f"{self.reading(info)} The way: {', '.join(way)}. I choose {action}."

    def distances(self, goal, walls):
        """{(row, column): steps to the goal} of all cells from which there is a way."""
        found, edge = {tuple(goal): 0}, [tuple(goal)]
        for near in edge:               # which grows meanwhile
            for cell in (after(near, move) for move in MOVES):
                inside = min(cell) >= 0 and max(cell) < self.size
                if inside and list(cell) not in walls and cell not in found:
                    found[cell] = found[near] + 1
                    edge.append(cell)
        return found


def after(cell, move):
    """The cell (row, column) beside a cell."""
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
