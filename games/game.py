"""What all games share: seeding, counting steps, success, saved states.

    picture, info = game.reset(seed=1)
    # the number is an index into legal_actions()
    picture, reward, terminated, truncated, info = game.step(0)
    state = game.get_state()            # plain JSON; set_state(state) goes on from it exactly

Does not handle: the games (env.py, games/alfworld/game.py), drawing (games/draw.py).
"""

import copy
import math
import operator

import gymnasium
import numpy as np

from games.draw import SIZE


class Game(gymnasium.Env):
    """The class of every game: it seeds, counts steps, tells success, saves and restores states.

    A game sets `description`, `actions` and `fields` (its state, plain JSON values). It writes
    `_deal`, `_play`, `_info`, `_draw` and `_is_possible` (whether its fields' values can be).
    `state_text(info)` is what of its state goes into the prompt ("" where the picture says all).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    description = ""
    actions = ()
    fields = ()
    max_steps = math.inf        # the episode is truncated after this many steps
    separator = " "             # between the actions in a prompt
    unnamed_reward = 0.0        # for an answer that names no action (rollout.py)

    # Settings of a run in which the paper has another value on this game, such as
    # {"cot_lambda": 0.2}.
    paper_settings = {}
    # Settings in which this game differs for reasons of ours. plumbing/settings.py takes up both
    # as defaults.
    preferred_settings = {}

    def __init__(self, render_mode=None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))

    def legal_actions(self):
        """The actions that may be played now, as a tuple of texts.

        Ask at every step: in ALFWorld they change.
        """
        return self.actions

    def state_text(self, info):
        return ""

    def reset(self, *, seed=None, options=None):
        """Deal a game; return (picture (SIZE, SIZE, 3) uint8, info).

        Without a seed the deal comes from the generator as it goes on.
        """
        super().reset(seed=seed)
        self.steps = 0
        self.episode_return = 0.0
        self.over = False
        self._deal()
        return self.observe()

    def step(self, action):
        """Play legal_actions()[action]; return (picture, reward, terminated, truncated, info).

        Raises ValueError for an index that is none, RuntimeError before reset and after the end:
        nothing changes then.
        """
        if getattr(self, "over", True):
            raise RuntimeError("there is no episode to step in: call reset() first")
        legal = self.legal_actions()
        try:
            index = operator.index(action)      # of an int, numpy's too, and what action_space has
        except TypeError:
            index = -1
        # subtle: True is an int too
        if isinstance(action, bool) or not 0 <= index < len(legal):
            raise ValueError(f"action {action!r} is not an index into the legal actions {legal}")

        reward, terminated = self._play(legal[index])
        self.steps += 1
        self.episode_return += reward
        truncated = not terminated and self.steps >= self.max_steps
        self.over = terminated or truncated
        picture, info = self.observe()
        return picture, float(reward), terminated, truncated, info

    def observe(self):
        """Return (picture, info) of the present state, as reset and step do.

        After set_state this is how to see where the game is.
        """
        # a list of the game's own goes on changing; whoever keeps info keeps a copy
        info = copy.deepcopy(self._info())
        # at every step, for wrappers may end an episode early
        info["is_success"] = self._is_success()
        return self._draw(), info

    def _is_success(self):
        # the paper's measure; a drawn Blackjack is no success
        return self.episode_return > 0

    def render(self):
        if not hasattr(self, "over"):
            raise RuntimeError("there is nothing to draw yet: call reset() first")
        return self._draw()

    def get_state(self):
        """Return all there is to know, the random generator included, as plain JSON.

        set_state continues from it exactly.
        """
        if not hasattr(self, "over"):
            raise RuntimeError("there is no state yet: call reset() first")
        names = (*self.fields, "steps", "episode_return", "over")
        state = {name: copy.deepcopy(getattr(self, name)) for name in names}
        generator = self.np_random.bit_generator.state
        return {"game": type(self).__name__, **state, "generator": generator}

    def set_state(self, state):
        """Go on from what get_state returned.

        Raises ValueError where it is no state of this game: nothing changes then.
        """
        names = {*self.fields, "steps", "episode_return", "over", "generator", "game"}
        is_ours = isinstance(state, dict) and set(state) == names
        if not is_ours or state["game"] != type(self).__name__:
            raise ValueError(
                f"not a state that {type(self).__name__} takes: expected a dict with the keys "
                f"{sorted(names)}, got {str(state)[:300]}")

        # everything is tried on a copy, which replaces this game only at the very end
        tried = copy.copy(self)
        for name in names - {"generator", "game"}:
            setattr(tried, name, copy.deepcopy(state[name]))
        possible = (
            type(tried.steps) is int
            and type(tried.over) is bool
            and 0 <= tried.steps < self.max_steps + tried.over
            and type(tried.episode_return) in (int, float)
            and -1e6 < tried.episode_return < 1e6
            and tried._is_possible())
        if not possible:
            raise ValueError(f"not a state that {type(self).__name__} can be in: {state}")

        tried.np_random = np.random.default_rng()
        try:
            tried.np_random.bit_generator.state = state["generator"]
            if state["generator"]["state"]["inc"] % 2 == 0:
                raise ValueError("its inc is even, and its numbers would soon end")
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"the state's generator is not numpy's PCG64: {error}") from error
        vars(self).update(vars(tried))
