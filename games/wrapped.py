"""Any environment of Gymnasium's with a few actions, as a game: the picture is its render.

    game = make_game("gymnasium:FrozenLake-v1", actions="left,down,right,up", success_return=1)
    class FrozenLake(Wrapped): ...      # with a reading and an expert: examples/frozenlake.py

The render is scaled into a square picture, black around it. An episode is won with a return of
success_return; without it there is no success, and the return alone is told. An episode's state is
its seed and the actions played: it goes on by playing them again, which is exact. The drawing
package is optional: extras/requirements-gymnasium.txt.
Does not handle: continuous or several actions at once, whether steps are repeatable (outside.py).
"""

import os

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled
from PIL import Image, ImageOps

from games.draw import SIZE
from games.game import Game, GameError

# pygame draws in memory, without a screen and without a word
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


class Wrapped(Game):
    """A game around gymnasium.make(env_id, **options); self.observation is its last one.

    actions: their names in the environment's order, a tuple or "left,right". GameError where it
    cannot be played so.
    """

    env_id = ""
    success_return = None           # the least return that is a success; None: nobody can tell
    fields = ("seed", "played")

    def __init__(
            self, actions=(), success_return=None, description="", render_mode=None, **options):
        if isinstance(actions, str):
            actions = [name.strip() for name in actions.split(",")]
        self.actions = tuple(actions) or self.actions
        if success_return is not None:
            self.success_return = float(success_return)
        self.description = description or self.description or f"You play {self.env_id}."
        self.options = options
        self.env = self._make()
        space = self.env.action_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise GameError(
                f"{self.env_id} has actions of the kind {space}: an answer names one of a few "
                "(Discrete) actions")
        if len(self.actions) != space.n:
            raise GameError(
                f"{self.env_id} has {space.n} actions, and {len(self.actions)} are named: name "
                "each, in its order, as in --actions left,right")
        # Gymnasium's own limit, or the environment's, as MiniGrid's have one
        own_limit = getattr(self.env.unwrapped, "max_steps", None)
        self.max_steps = self.env.spec.max_episode_steps or own_limit
        if not self.max_steps:
            raise GameError(
                f"{self.env_id} may never end: give a limit, --game max_episode_steps=200")
        super().__init__(render_mode)

    def _make(self):
        # every kind of error: other people's code
        try:
            env = gymnasium.make(
                self.env_id, render_mode="rgb_array", disable_env_checker=True, **self.options)
        except Exception as error:
            raise GameError(f"gymnasium cannot make {self.env_id!r}: {error}") from error
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            raise GameError(f"{self.env_id} draws no picture (no render_mode 'rgb_array')")
        return env

    def deal(self):
        self._begin(int(self.np_random.integers(2**31)))

    def _begin(self, seed):
        self.seed, self.played, self.truncated = seed, [], False
        self.observation, _ = self.env.reset(seed=seed)

    def play(self, action):
        number = self.actions.index(action)
        self.played.append(number)
        self.observation, reward, terminated, self.truncated, _ = self.env.step(
            number + self.env.action_space.start)
        return float(reward), bool(terminated)

    def is_out_of_time(self):
        return bool(self.truncated)

    def is_success(self):
        return None if self.success_return is None else self.episode_return >= self.success_return

    def info(self):
        return {"observation": str(self.observation)}       # of whatever kind it is

    def draw(self):
        try:
            picture = self.env.render()
        except DependencyNotInstalled as error:
            raise GameError(
                f"{self.env_id} is drawn by an optional package: pip install -r "
                f"extras/requirements-gymnasium.txt ({error})") from error
        return np.asarray(ImageOps.pad(
            Image.fromarray(picture), (SIZE, SIZE), Image.Resampling.BILINEAR))

    def set_state(self, state):
        """Go on from get_state's state: its episode is played again from its seed.

        GameError where it is none of this environment's: nothing changes then.
        """
        before = dict(vars(self))
        try:
            super().set_state(state)
            # another environment, so that this one is as it was if that fails
            self.env, played, total = self._make(), self.played, 0.0
            self._begin(self.seed)
            for number in played:
                # subtle: what is drawn may hang on what was drawn before, as Taxi's car turns then
                self.env.render()
                total += self.play(self.actions[number])[0]
            if total != self.episode_return:
                raise GameError("played again it has another return: options, or a version?")
        except Exception as error:      # of every kind: the environment is other people's code
            vars(self).clear()
            vars(self).update(before)
            raise GameError(f"not a state of this {self.env_id}: {error}") from error
