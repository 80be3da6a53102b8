"""What all games share: seeding, counting steps, success, saved states.

    picture, info = game.reset(seed=1)
    # the number is an index into legal_actions()
    picture, reward, terminated, truncated, info = game.step(0)
    state = game.get_state()            # plain JSON; set_state(state) goes on from it exactly

How a game of your own is written: YOUR_OWN_GAME.md. Does not handle: the games (env.py,
games/alfworld/game.py, games/wrapped.py), drawing (games/draw.py).
"""

import copy
import math
import operator

import gymnasium
import numpy as np

from games.draw import SIZE


class GameError(ValueError):
    """A game that cannot be had or played as it was asked for; the message says what to do."""


class Game(gymnasium.Env):
    """The class of every game: it seeds, counts steps, tells success, saves and restores states.

    A game says five things: `description`, `actions`, deal, play, draw. All else has a default.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    description = ""            # opens the prompt
    actions = ()                # what an answer may name, and what step() counts through
    max_steps = 100             # the episode is truncated after this many steps
    separator = " "             # between the actions in a prompt
    unnamed_reward = 0.0        # for an answer that names no action (rollout.py)
    # the state, which get_state and set_state carry: names of attributes whose values are plain
    # JSON. None: those that `deal` sets first, but for names that begin with "_"
    fields = None

    held_out_episodes = math.inf        # how many there are
    pocket = None               # its own pocket model, one of loading.SHIPPED
    # the constructor's options for demonstrations, and for held-out games
    lesson_options, held_out_options = {}, {}
    # players without a model beside random, expert and always:ACTION: {name, with a ":" where it
    # takes an argument: function of the argument → function of info → action}
    scripts = {}
    compare_with = ()           # players without a model whom eval.py lets play the same deals

    # Settings of a run in which the paper has another value on this game, such as
    # {"cot_lambda": 0.2}.
    paper_settings = {}
    # Settings in which this game differs for reasons of ours, such as {"reward_scale": 0.1}.
    # plumbing/settings.py takes up both as defaults.
    preferred_settings = {}

    def __init__(self, render_mode=None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}")
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(max(1, len(self.actions)))

    # -- what a game is
    def deal(self):
        """Begin an episode: set the state. All chance comes from self.np_random."""
        raise GameError(f"{type(self).__name__} does not say how an episode begins: def deal(self)")

    def play(self, action):
        """Play the text of a legal action; return (reward, whether the episode has ended)."""
        raise GameError(
            f"{type(self).__name__} does not say what an action does: def play(self, action)")

    def draw(self):
        """Return the picture of the state, (SIZE, SIZE, 3) uint8."""
        raise GameError(f"{type(self).__name__} does not say how it is drawn: def draw(self)")

    # -- what it may be beside
    def info(self):
        """What is known of the state, as plain JSON: the `info` of the methods below."""
        return {name: getattr(self, name) for name in self.fields}

    def is_possible(self):
        """Whether the state's values can be: set_state asks, for a file may hold anything."""
        return True

    def is_success(self):
        """Whether the episode is won, None where the game cannot tell.

        This is the paper's measure; a drawn Blackjack is no success.
        """
        return self.episode_return > 0

    def is_out_of_time(self):
        """Whether the episode is to be truncated after this step, if it has not ended."""
        return self.steps >= self.max_steps

    def legal_actions(self):
        """The actions that may be played now, as a tuple of texts.

        Ask at every step: in ALFWorld they change.
        """
        return self.actions

    def state_text(self, info):
        """What of the state goes into the prompt: "" where the picture says all."""
        return ""

    # -- what it may know of good play: without it there are no demonstrations, and the metrics
    #    that ask for it are None
    def best_actions(self, info) -> list[str] | None:
        """The texts of all best actions in the state that `info` tells, the simplest first.

        Of an earlier state too: go by info alone, not by self's state.
        """
        return None

    def reading(self, info) -> str | None:
        """The sentence that says what the picture shows, as demonstrations word it."""
        return None

    def reads(self, info, text) -> bool | None:
        """Whether a text says what the picture shows; None where the game has no words for it."""
        said = self.reading(info)
        return None if said is None else said in text

    def thoughts(self, info, action) -> str | None:
        """The chain of thought that ends in choosing `action`, right or not."""
        return None

    def statistics(self, decisions, thinking) -> dict:
        """More of an evaluation, as plain values: of all Decisions, and of those with thoughts."""
        return {}

    def all_deals(self) -> list[tuple[float, dict]] | None:
        """Every deal with its probability, [(p, {field: value})]; None where they have no end."""
        return None

    def reset(self, *, seed=None, options=None):
        """Deal a game; return (picture (SIZE, SIZE, 3) uint8, info).

        Without a seed the deal comes from the generator as it goes on. options={"deal": {…}}: this
        one, of all_deals.
        """
        super().reset(seed=seed)
        self.steps = 0
        self.episode_return = 0.0
        self.over = False
        before = {*vars(self)}
        self.deal()
        if self.fields is None:
            self.fields = tuple(sorted(name for name in {*vars(self)} - before if name[0] != "_"))
        if deal := (options or {}).get("deal"):
            for name, value in deal.items():
                setattr(self, name, copy.deepcopy(value))
            if {*deal} - {*self.fields} or not self.is_possible():
                raise GameError(f"{deal} is no deal of {type(self).__name__}")
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

        paid = self.play(legal[index])
        if not (isinstance(paid, tuple) and len(paid) == 2):
            raise GameError(f"play must return (reward, whether it has ended), not {paid!r}")
        reward, terminated = float(paid[0]), bool(paid[1])
        self.steps += 1
        self.episode_return += reward
        truncated = not terminated and self.is_out_of_time()
        self.over = terminated or truncated
        picture, info = self.observe()
        return picture, reward, terminated, truncated, info

    def observe(self):
        """Return (picture, info) of the present state, as reset and step do.

        After set_state this is how to see where the game is.
        """
        # a list of the game's own goes on changing; whoever keeps info keeps a copy
        info = copy.deepcopy(self.info())
        # at every step, for wrappers may end an episode early
        info["is_success"] = self.is_success()
        return self.draw(), info

    def render(self):
        if not hasattr(self, "over"):
            raise RuntimeError("there is nothing to draw yet: call reset() first")
        return self.draw()

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
        # everything is tried on a copy, which replaces this game only at the very end
        tried = copy.copy(self)
        if self.fields is None:
            tried.reset(seed=0)     # to learn what the state is
        names = {*tried.fields, "steps", "episode_return", "over", "generator", "game"}
        is_ours = isinstance(state, dict) and set(state) == names
        if not is_ours or state["game"] != type(self).__name__:
            raise ValueError(
                f"not a state that {type(self).__name__} takes: expected a dict with the keys "
                f"{sorted(names)}, got {str(state)[:300]}")

        for name in names - {"generator", "game"}:
            setattr(tried, name, copy.deepcopy(state[name]))
        # a game with a clock of its own may last longer
        limit = self.max_steps if type(self).is_out_of_time is Game.is_out_of_time else math.inf
        possible = (
            type(tried.steps) is int
            and type(tried.over) is bool
            and 0 <= tried.steps < limit + tried.over
            and type(tried.episode_return) in (int, float)
            and -1e12 < tried.episode_return < 1e12
            and tried.is_possible())
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
