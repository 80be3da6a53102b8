"""ALFWorld, the paper's second world: household tasks by text command, in houses of our own.

    game = env.make_game("alfworld", receptacles=5, objects=4)
    game = gymnasium.make("env:alfworld/ALFWorld-v0").unwrapped         # the same
    picture, info = game.reset(seed=1)
    info["task"]                        # "put a clean cup in desk."
    # the number is an index into legal_actions()
    picture, reward, terminated, truncated, info = game.step(0)

The rules, the words and the commands are those of ALFWorld's own engine
(games/alfworld/engine.py), which is imported when the first game is made. The houses are
games/alfworld/houses.py's, or with houses="data" the downloaded ones of $ALFWORLD_DATA.

Differs from the published code: the task is worded once an episode; an answer that names no command
plays a random one (there it goes to the engine as it is).

Does not handle: drawing (games/alfworld/scene.py), who knows what to do
(games/alfworld/expert.py).
"""

import math
import weakref
import zlib

from games.alfworld import expert, houses
from games.alfworld.expert import BADGES, kind_of
from games.alfworld.houses import SPLITS, HouseError
from games.alfworld.scene import draw_scene
from games.game import Game

WON = 50.0                      # the paper's reward for a task that is done
NOT_NAMED = -1.0                # and for an answer that names no command
# commands that change nothing: left out of legal_actions
EMPTY = ("help", "look", "inventory", "examine ")

# engines whose game is gone: each holds a copy of a 34 MB library until the program ends
_spare = []


def _untold(command, held):
    """A command without the name of what is held.

    >>> _untold("move mug 1 to shelf 2", held="mug 1")
    'move it to shelf 2'
    """
    return command.replace(f" {held} ", " it ", 1) if held else command


class ALFWorld(Game):
    """A household task in text commands, at most 50 of them.

    split: "train" or "held out" (games/alfworld/houses.py). houses: "small", dealt, of so many
    receptacles (above 8 hard to read) and objects, or "data", $ALFWORLD_DATA's.
    scene_text: whether the prompt has the engine's words beside the picture. list_tells: whether
    the list of commands, which is in the prompt too, gives away what is held and what lies here; if
    not, the thing in the hand is "it", and all that the house has may be taken anywhere, in vain
    where it does not lie. all_commands: whether commands that change nothing are legal too.

    Reward: 50 when the task is done, plus at every step the share of its goal conditions that hold
    (alfworld.env.tasks has them); −1 where an answer names no command (rollout.py adds that to what
    PPO sees, returns leave it out). Success: the engine says `won`.

    action_space is as large as the longest list of commands may be, so a sampled action may be
    refused: draw from legal_actions().
    """

    description = "You are in a house."
    separator = "\n"
    unnamed_reward = NOT_NAMED
    max_steps = 50
    # of the house; the checksum tells whether it is dealt the same
    fields = ("number", "checksum", "commands")
    # so large is action_space; which texts they stand for legal_actions() says
    actions = range(256)

    pocket = "pocket-alfworld"      # has another vocabulary
    held_out_options = {"split": "held out"}
    reading, thoughts = map(staticmethod, (expert.reading, expert.thoughts))
    # the demonstrator's way, remembering nothing
    scripts = {"heuristic": lambda _: lambda info: expert.next_step(info, memory=False)[1]}
    paper_settings = {"cot_lambda": 0.2, "total_timesteps": 5_000}
    # Returns of 50 become about 1, which value_lr and advantage_floor are for. Games are slower
    # than those of cards, and longer: fewer of them side by side, more steps of each.
    preferred_settings = {
        "reward_scale": 0.02,
        "num_envs": 32,
        "num_steps": 16,
        "eval_episodes": 100,
    }

    def __init__(
        self, split="train", houses="small", receptacles=5, objects=4, scene_text=True,
        list_tells=True, all_commands=False, render_mode=None):
        self.split = split
        self.houses = houses
        self.receptacles = receptacles
        self.objects = objects
        self.scene_text = scene_text
        self.list_tells = list_tells
        self.all_commands = all_commands
        if houses not in ("small", "data") or split not in SPLITS:
            raise HouseError(
                f"houses is small or data, split one of {SPLITS}, not {houses!r} and {split!r}")
        if houses == "data" and (receptacles, objects) != (5, 4):
            raise HouseError("receptacles and objects are of dealt houses: houses=data has its own")

        # here, and not above: whoever makes no such game needs no engine
        from games.alfworld.engine import Engine
        self.engine = _spare.pop() if _spare else Engine()
        self.engine.commands = ()
        weakref.finalize(self, _spare.append, self.engine)
        super().__init__(render_mode)

    def legal_actions(self):
        return tuple(self._listed())

    def _commands(self):
        return [
            command for command in self.engine.commands
            if self.all_commands or not command.startswith(EMPTY)]

    def _listed(self):
        """{command as it is listed: as the engine takes it, None where it would be in vain}."""
        commands = self._commands()
        if self.list_tells:
            return {command: command for command in commands}
        listed = {
            _untold(command, self._held()): command for command in commands
            if not command.startswith("take ")}
        if not self._held():
            things = sorted(thing for thing, _ in self.engine.facts["inreceptacle"])
            takes = (f"take {thing} from {place}"
                     for place in self._contents() for thing in things)
            listed |= {take: take if take in commands else None for take in takes}
        return listed

    def best_actions(self, info):
        """The demonstrator's next command alone, which goes by its memory; others may be as
        good."""
        command = expert.next_step(info)[1]
        return [command if self.list_tells else _untold(command, info["holding"])]

    def state_text(self, info):
        text = f"Your task is to: {info['task']}"
        return f"{text}\n{info['scene']}" if self.scene_text else text

    @property
    def held_out_episodes(self):
        # the data set holds out some 140 houses
        return len(houses.data_files("held out")) if self.houses == "data" else math.inf

    # -- begin, play, go on
    def reset(self, *, seed=None, options=None):
        # an evaluation plays one file after the other
        self.asked = seed if self.houses == "data" else None
        return super().reset(seed=seed, options=options)

    def deal(self):
        drawn = int(self.np_random.integers(2**31))
        self.number = drawn if self.asked is None else self.asked
        self.commands = []
        self._enter()
        self.checksum = self._house_checksum()

    def _house_checksum(self):
        return zlib.crc32(self.house.problem.encode())

    def _enter(self, house=None):
        """Begin in the house of self.number, or in a given one, and play self.commands.

        Raises houses.HouseError where there is no such house.
        """
        if house is None and self.houses == "data":
            house = houses.from_data(self.number, self.split)
        elif house is None:
            house = houses.deal(self.number, self.split, self.receptacles, self.objects)
        self.house = house
        self.engine.load(house)
        self.at = next(iter(self._near()), None)
        self.seen = self._contents()
        for command in self.commands:
            if command not in self.legal_actions():
                raise ValueError(
                    f"not a state that ALFWorld can be in: {command!r} is no command there")
            self._send(command)

    def _send(self, command):
        """Send the engine a command; keep what the agent learns by it.

        It learns where it is, and what lies open there.
        """
        command = self._listed()[command]
        if command is None:
            return
        self.engine.step(command)
        if command.startswith("go to "):
            self.at = command.removeprefix("go to ")
        self.seen |= self._contents()

    def set_state(self, state):
        """Go on from get_state's state: its house is dealt again, its commands are played again.

        That is exact. Raises ValueError where it is no state of this game: nothing changes then.
        """
        before = dict(vars(self))
        try:
            super().set_state(state)
            self._enter()
            won_and_goes_on = self.engine.won and not self.over
            if self._house_checksum() != self.checksum or won_and_goes_on:
                raise ValueError(
                    "not a state of this ALFWorld: it was in another house "
                    "(other settings or files?)")
        except ValueError:      # HouseError is one
            vars(self).clear()
            vars(self).update(before)
            # subtle: these values are the game's; its engine went on and has to go back too
            if "house" in before:
                self._enter(self.house)
            raise

    def is_possible(self):
        return (
            type(self.number) is int
            and self.number >= 0
            and isinstance(self.commands, list)
            and all(isinstance(command, str) for command in self.commands)
            and len(self.commands) == self.steps
            and type(self.checksum) is int)

    def is_success(self):
        return bool(self.engine.won)

    # -- rewards
    def play(self, action):
        self.commands.append(action)
        self._send(action)
        return WON * self.engine.won + self.goal_share(), bool(self.engine.won)

    def goal_share(self):
        """The share of the task's goal conditions that hold, as alfworld.env.tasks counts them."""
        house, facts = self.house, self.engine.facts
        act, _, count = houses.TASKS[house.kind]

        # to look at it under a lamp: it is in the hand; a lamp that one sees is on
        if act == "light":
            held = [name for _, name in facts.get("holds", ()) if kind_of(name) == house.target]
            visible = sum(self._contents().values(), [])
            lamps = [name for name, in facts.get("istoggled", ()) if kind_of(name) == house.lamp]
            lit = [name for name in lamps if name in visible]
            return (bool(held) + bool(lit)) / 2

        # to put it somewhere, or two of them into the same receptacle
        placed = [
            name for name, where in facts.get("inreceptacle", ())
            if kind_of(name) == house.target and kind_of(where) == house.place]
        if count == 2:
            where = [place for name, place in facts["inreceptacle"] if name in placed]
            return min(2, max(map(where.count, where), default=0)) / 2
        if act is None:
            return float(bool(placed))

        # to treat it before: one is there, one is treated, and it is the same one
        treated = facts.get(f"is{BADGES[act]}", ())
        done = [name for name, in treated if kind_of(name) == house.target]
        return (bool(placed) + bool(done) + bool({*placed} & {*done})) / 3

    # -- what the agent sees
    def _near(self):
        """The names of the receptacles at the agent's place.

        One in dealt houses, in the data set's sometimes more.
        """
        facts = self.engine.facts
        [(_, place)] = facts["atlocation"]
        return sorted(name for name, where in facts["receptacleatlocation"] if where == place)

    def _held(self):
        return next((name for _, name in self.engine.facts.get("holds", ())), None)

    def _contents(self):
        """{receptacle: names of what lies there} for those near that one can see into."""
        facts = self.engine.facts
        openable, opened = facts.get("openable", ()), facts.get("opened", ())
        lying = facts.get("inreceptacle", ())
        contents = {}
        for name in self._near():
            if (name,) not in openable or (name,) in opened:
                contents[name] = sorted(thing for thing, where in lying if where == name)
        return contents

    def info(self):
        facts, house = self.engine.facts, self.house
        contents, near = self._contents(), self._near()
        held = self._held()
        badges = [badge for badge in BADGES.values() if (held,) in facts.get(f"is{badge}", ())]
        # without welcome and task
        scene = self.engine.said.split("=-\n\n")[-1].split("\n\nYour task")[0]
        goal = {
            "act": houses.TASKS[house.kind][0],
            "target": house.target,
            "place": house.place,
            "lamp": house.lamp,
        }
        return {
            "task": house.sentence,
            "kind": house.kind,
            "scene": scene,
            "at": self.at,
            "near": near,
            "shut": self.at in near and self.at not in contents,
            "contents": contents,
            "inside": sorted(sum(contents.values(), [])) if contents else None,
            "holding": held,
            "badges": badges,
            "receptacles": sorted(name for name, _ in facts["receptacleatlocation"]),
            "goal": goal,
            "seen": self.seen,
            # the engine's, which its experts go by
            "commands": self._commands(),
        }

    def draw(self):
        return draw_scene(self.info())
