"""ALFWorld, the paper's second world: household tasks by text command, on its real engine, in houses of our own.

    game = env.make_game("alfworld", receptacles=5, objects=4)
    game = gymnasium.make("alfworld_env:alfworld/Household-v0").unwrapped             # the same
    picture, info = game.reset(seed=1)                      # info["task"]: "put a clean cup in desk."
    picture, reward, terminated, truncated, info = game.step(0)         # an index into legal_actions()

Needs `pip install -r extras/requirements-alfworld.txt`; nothing else here imports it. The engine, its rules, its words
and its commands are ALFWorld's (textworld 1.7.0, alfworld 0.4.2); the houses are games/houses.py's, or with
houses="data" the downloaded ones of $ALFWORLD_DATA. Differs from the published code: the task is worded once an
episode; an answer that names no command plays a random one (there it goes to the engine as it is).
Does not handle: drawing (games/scene.py), who knows what to do (games/household.py).
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import weakref
import zlib
from pathlib import Path

import gymnasium

from games import household, houses
from games.game import Game
from games.houses import SPLITS, HouseError
from games.scene import draw_scene
from plumbing.errors import ModelError

try:
    import fast_downward
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    from textworld import logic
    from textworld.envs.pddl import PddlEnv, textgen
    from textworld.envs.pddl import logic as pddl_logic
except ImportError as error:
    raise ModelError("--task alfworld needs ALFWorld's engine: pip install -r extras/requirements-alfworld.txt "
                     f"({error})") from error

WON = 50.0                      # the paper's reward for a task that is done
NOT_NAMED = -1.0                # and for an answer that names no command
EMPTY = ("help", "look", "inventory", "examine ")           # commands that change nothing: left out of legal_actions

# What the engine computes again and again is remembered, what it copies whole is copied shallowly (it only reads the
# entities): six times the steps a second, word for word the same games. (Loading a house translates it twice.)
logic.Rule.parse_conjunctive_query = functools.lru_cache(maxsize=None)(logic.Rule.parse_conjunctive_query)
textgen._parse_and_convert = functools.lru_cache(maxsize=None)(textgen._parse_and_convert)
pddl_logic._parse_and_convert = functools.lru_cache(maxsize=None)(pddl_logic._parse_and_convert)
fast_downward.pddl2sas = functools.lru_cache(maxsize=2)(fast_downward.pddl2sas)         # for moves, and for the planner
textgen.copy_context = lambda context: context | {key: dict(context[key]) for key in ("variables", "mapping")}
_PARSERS = (textgen._PARSER, pddl_logic._PARSER, logic._PARSER)
_spare = []       # engines whose game is gone: each holds a copy of a 34 MB library until the program ends


def _forget():
    """The engine's parsers keep the last exception that they met, and with it all that was on the stack: a rollout."""
    for parser in _PARSERS:
        parser._furthest_exception = None


class Engine:
    """One of ALFWorld's engines: load a house, then one command after another. Not to be used by two threads."""

    def __init__(self):
        self.commands = ()
        with _own_temporary_folder():
            self.game = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True, facts=True)))

    def load(self, house):
        """Begin in a house; HouseError where the engine cannot read it."""
        arguments = sys.argv                            # subtle: the engine's translator writes its own over them
        with open(ALFRED_PDDL_PATH) as domain, open(ALFRED_TWL2_PATH) as grammar:
            data = {"pddl_domain": domain.read(), "grammar": grammar.read(), "pddl_problem": house.problem}
        try:
            self.game.load(data)
            self._take(self.game.reset())
        except (Exception, SystemExit) as error:        # the translator raises what it stumbles over, SystemExit too
            raise HouseError(f"ALFWorld's engine cannot read this house: {type(error).__name__} {error}") from error
        finally:
            sys.argv = arguments
            _forget()

    def step(self, command):
        self._take(self.game.step(command)[0])
        _forget()

    def _take(self, state):
        self.said, self.won, self.commands = state.feedback, state["won"], tuple(state["admissible_commands"])
        self.facts = {}                                 # {predicate: [tuples of names]}
        for fact in state["facts"]:
            self.facts.setdefault(fact.name, []).append(tuple(argument.name.strip() for argument in fact.arguments))

    def plan(self):
        """The planner's commands from here to the goal; it knows what is hidden. [] where there is no way."""
        return self.game.unwrapped._pddl_state.replan(self.game.unwrapped._entity_infos)


@contextlib.contextmanager
def _own_temporary_folder():
    """Let the engine's copy of its library lie where the next program finds it, if a kill leaves it behind."""
    here = Path(tempfile.gettempdir()) / f"alfworld-engines-{os.getuid()}"
    own, before = here / str(os.getpid()), tempfile.tempdir
    here.mkdir(mode=0o700, exist_ok=True)
    if here.stat().st_uid != os.getuid():
        raise ModelError(f"{here} is another user's: set TMPDIR to a folder of your own")
    own.mkdir(exist_ok=True)
    for left in here.iterdir() if Path("/proc/self").exists() else ():
        if left.name.isdecimal() and not Path(f"/proc/{left.name}").exists():
            shutil.rmtree(left, ignore_errors=True)
    tempfile.tempdir = str(own)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(own, ignore_errors=True)


class ALFWorld(Game):
    """A household task in text commands, at most 50 of them.

    split: "train" or "held out" (games/houses.py). scene_text: whether the prompt has the engine's words beside the
    picture. all_commands: whether commands that change nothing are legal too. Reward: 50 when the task is done, plus
    at every step the share of its goal conditions that hold (alfworld.env.tasks has them); −1 where an answer names
    no command (rollout.py adds that to what PPO sees, returns leave it out). Success: the engine says `won`.
    action_space is as large as the longest list of commands may be, so a sampled action may be refused: draw from
    legal_actions().
    """

    description = "You are in a house."
    separator, unnamed_reward, max_steps = "\n", NOT_NAMED, 50
    fields = ("number", "checksum", "commands")      # of the house; the checksum tells whether it is dealt the same
    actions = range(256)        # so large is action_space; which texts they stand for legal_actions() says

    def __init__(self, split="train", houses="small", receptacles=5, objects=4, scene_text=True, all_commands=False,
                 render_mode=None):
        self.split, self.houses, self.receptacles, self.objects = split, houses, receptacles, objects
        self.scene_text, self.all_commands = scene_text, all_commands
        if houses not in ("small", "data") or split not in SPLITS:
            raise ValueError(f"houses is small or data, split one of {SPLITS}, not {houses!r} and {split!r}")
        self.engine = _spare.pop() if _spare else Engine()
        self.engine.commands = ()
        weakref.finalize(self, _spare.append, self.engine)
        super().__init__(render_mode)

    def legal_actions(self):
        return tuple(command for command in self.engine.commands
                     if self.all_commands or not command.startswith(EMPTY))

    def state_text(self, info):
        return f"Your task is to: {info['task']}" + (f"\n{info['scene']}" if self.scene_text else "")

    def reset(self, *, seed=None, options=None):
        self.asked = seed if self.houses == "data" else None            # an evaluation plays one file after the other
        return super().reset(seed=seed, options=options)

    def _deal(self):
        drawn = int(self.np_random.integers(2**31))
        self.number, self.commands = drawn if self.asked is None else self.asked, []
        self._enter()
        self.checksum = zlib.crc32(self.house.problem.encode())

    def _enter(self, house=None):
        """Begin in the house of self.number, or in one that is there already, and play self.commands."""
        try:
            if house is None and self.houses == "data":
                house = houses.from_data(self.number, self.split)
            elif house is None:
                house = houses.deal(self.number, self.split, self.receptacles, self.objects)
            self.house = house
            self.engine.load(house)
        except HouseError as error:
            raise ModelError(str(error)) from error
        self.at, self.seen = next(iter(self._near()), None), self._contents()
        for command in self.commands:
            if command not in self.legal_actions():
                raise ValueError(f"not a state that ALFWorld can be in: {command!r} is no command there")
            self._send(command)

    def _send(self, command):
        """One command to the engine, and what the agent learns by it: where it is, what lies open there."""
        self.engine.step(command)
        if command.startswith("go to "):
            self.at = command.removeprefix("go to ")
        self.seen |= self._contents()

    def set_state(self, state):
        """Go on from get_state's state: its house is dealt again, its commands are played again (exact)."""
        before = dict(vars(self))
        try:
            super().set_state(state)
            self._enter()
            if zlib.crc32(self.house.problem.encode()) != self.checksum or (self.engine.won and not self.over):
                raise ValueError("not a state of this ALFWorld: it was in another house (other settings or files?)")
        except (ValueError, ModelError):
            vars(self).clear()
            vars(self).update(before)
            if "house" in before:
                self._enter(self.house)
            raise

    def _is_possible(self):
        return (type(self.number) is int and self.number >= 0 and isinstance(self.commands, list)
                and all(isinstance(command, str) for command in self.commands) and len(self.commands) == self.steps
                and type(self.checksum) is int)

    def _is_success(self):
        return bool(self.engine.won)

    def _play(self, action):
        self.commands.append(action)
        self._send(action)
        return WON * self.engine.won + self.goal_share(), bool(self.engine.won)

    def goal_share(self):
        """The share of the task's goal conditions that hold, as alfworld.env.tasks counts them."""
        house, facts = self.house, self.engine.facts
        act, _, count = houses.TASKS[house.kind]
        placed = [name for name, where in facts.get("inreceptacle", ())
                  if household.kind_of(name) == house.target and household.kind_of(where) == house.place]
        if act == "light":
            held = [name for _, name in facts.get("holds", ()) if household.kind_of(name) == house.target]
            lit = [name for name, in facts.get("istoggled", ())
                   if household.kind_of(name) == house.lamp and name in sum(self._contents().values(), [])]
            return (bool(held) + bool(lit)) / 2
        if count == 2:
            where = [place for name, place in facts["inreceptacle"] if name in placed]
            return min(2, max(map(where.count, where), default=0)) / 2
        if act is None:
            return float(bool(placed))
        done = [name for name, in facts.get(f"is{household.BADGES[act]}", ())
                if household.kind_of(name) == house.target]
        return (bool(placed) + bool(done) + bool({*placed} & {*done})) / 3

    # ---- what the agent sees
    def _near(self):
        """The names of the receptacles at the agent's place: one in dealt houses, in the data set's sometimes more."""
        facts = self.engine.facts
        [(_, place)] = facts["atlocation"]
        return sorted(name for name, where in facts["receptacleatlocation"] if where == place)

    def _contents(self):
        """{receptacle: names of what lies there} for those at the agent's place that one can see into."""
        facts = self.engine.facts
        seen_into = [name for name in self._near()
                     if (name,) not in facts.get("openable", ()) or (name,) in facts.get("opened", ())]
        return {name: sorted(thing for thing, where in facts.get("inreceptacle", ()) if where == name)
                for name in seen_into}

    def _info(self):
        facts, house, contents, near = self.engine.facts, self.house, self._contents(), self._near()
        held = next((name for _, name in facts.get("holds", ())), None)
        badges = [badge for badge in household.BADGES.values() if (held,) in facts.get(f"is{badge}", ())]
        scene = self.engine.said.split("=-\n\n")[-1].split("\n\nYour task")[0]          # without welcome and task
        return {"task": house.sentence, "kind": house.kind, "scene": scene, "at": self.at, "near": near,
                "shut": self.at in near and self.at not in contents, "contents": contents,
                "inside": sorted(sum(contents.values(), [])) if contents else None, "holding": held, "badges": badges,
                "receptacles": sorted(name for name, _ in facts["receptacleatlocation"]),
                "goal": {"act": houses.TASKS[house.kind][0], "target": house.target, "place": house.place,
                         "lamp": house.lamp},
                "seen": {name: list(things) for name, things in self.seen.items()},
                "commands": list(self.legal_actions())}

    def _draw(self):
        return draw_scene(self._info())


if "alfworld/Household-v0" not in gymnasium.registry:
    gymnasium.register("alfworld/Household-v0", entry_point="alfworld_env:ALFWorld")
