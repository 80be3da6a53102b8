"""Houses for ALFWorld's engine, dealt from a seed: one of the six kinds of household tasks in each.

    house = deal(7)             # the same on every machine
    deal(7, "held out")         # one of the other split
    house.sentence              # what is to be done: "put a clean apple in dresser."
    house.problem               # PDDL, for ALFWorld's own domain

What there is, what fits into what, goals and their wording are ALFWorld's, read from its installed
package (0.4.2: alfworld.gen.constants, alfworld.gen.goal_library). The houses are ours, and far
smaller than ALFRED's rooms. Held-out houses have other layouts (sets of receptacles), and no object
lies in, or belongs into, a kind of receptacle that it lay in or belonged into in training (lamps
apart): a checksum shares out layouts and each object's places.

Does not handle: playing (games/alfworld/game.py), drawing (games/alfworld/scene.py), who knows what
to do (games/alfworld/expert.py).
"""

import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from games.game import GameError

# kind of task: (what is done to the object before it is put away, where; how many objects)
TASKS = {
    "pick_and_place_simple": (None, None, 1),
    "look_at_obj_in_light": ("light", None, 1),
    "pick_clean_then_place_in_recep": ("clean", "SinkBasin", 1),
    "pick_heat_then_place_in_recep": ("heat", "Microwave", 1),
    "pick_cool_then_place_in_recep": ("cool", "Fridge", 1),
    "pick_two_obj_and_place": (None, None, 2),
}
SPLITS = ("train", "held out")
DATA_FOLDERS = {"train": "train", "held out": "valid_unseen"}       # ALFWorld's own splits
LAMPS = ("DeskLamp", "FloorLamp")
STANDS = ("Desk", "Dresser", "SideTable")       # what lamps stand on is ours


@dataclass
class House:
    """A house and its task, as the engine and the game need it."""

    problem: str            # PDDL
    kind: str               # of task, a key of TASKS
    sentence: str           # the task in ALFWorld's words
    target: str             # the kind of object that it is about, as the engine names it: "apple"
    place: str | None       # the kind of receptacle that it belongs into; None: it is looked at
    lamp: str | None        # what it is looked at under
    layout: tuple           # the kinds of receptacles, sorted
    pairs: frozenset        # (kind of object, kind of receptacle) that it lies in or belongs into


class HouseError(GameError):
    """A house that cannot be dealt or read; the message says why."""


# ---- what there is, and which split has what ---------------------------------------------------
@cache
def vocabulary():
    """What ALFWorld's rooms are made of: (fits, able, openable).

    fits: {kind of receptacle: kinds of objects that fit}; able: {action: kinds of objects that it
    is for}; openable: the kinds of receptacles that open.
    """
    from alfworld.gen import constants
    fits = {}
    for receptacle, kinds in sorted(constants.VAL_RECEPTACLE_OBJECTS.items()):
        whole = tuple(sorted(kind for kind in kinds if "Sliced" not in kind))
        if receptacle not in constants.MOVABLE_RECEPTACLES and len(whole) > 1:
            fits[receptacle] = whole
    acts = {"clean": "Cleanable", "heat": "Heatable", "cool": "Coolable"}
    able = {act: constants.VAL_ACTION_OBJECTS[name] for act, name in acts.items()}
    return fits, able, frozenset(constants.OPENABLE_CLASS_LIST)


def _checksum(*words):
    return zlib.crc32(" ".join(words).encode())


@cache
def homes(thing: str, split: str) -> tuple[str, ...]:
    """The kinds of receptacles that a kind of object may be in, by split.

    Held out are 3 of its places (4 of cloth's 17), 2 where there are 5 or 6, none of fewer: such
    things stay in training houses.
    """
    places = [place for place, kinds in vocabulary()[0].items() if thing in kinds]
    places.sort(key=lambda place: _checksum(thing, place))
    if len(places) >= 7:
        count = max(3, len(places) // 4)
    else:
        count = 2 if len(places) >= 5 else 0
    return tuple(sorted(places[:count] if split == "held out" else places[count:]))


def layout_split(layout) -> str:
    """Which split a set of receptacles belongs to: one in four is held out."""
    return SPLITS[_checksum(*sorted(layout)) % 4 == 0]


# ---- dealt houses ------------------------------------------------------------------------------
def deal(number: int, split="train", receptacles=5, objects=4) -> House:
    """Return the house of this number, the same on every machine.

    receptacles, objects: how many are in it, the task's own among them. Raises HouseError where so
    few cannot hold a task, or no layout was found.
    """
    if not (4 <= receptacles <= 40 and 3 <= objects <= 40):
        raise HouseError(
            "a house has 4 to 40 receptacles and 3 to 40 objects, "
            f"not {receptacles} and {objects}")
    rng = np.random.default_rng([number, SPLITS.index(split)])
    kind = _one(rng, list(TASKS))
    for _ in range(1000):
        if house := _try(rng, split, kind, receptacles, objects):
            return house
    raise HouseError(
        f"no {split} house of {receptacles} receptacles and {objects} objects in 1,000 tries")


def _try(rng, split, kind, receptacles, objects):
    """One try at a House; None where the draw does not fit, or is the other split's.

    subtle: the order of the draws is part of a house's number.
    """
    fits, able, _ = vocabulary()
    act, tool, count = TASKS[kind]

    # the task: an object, where it is and where it belongs
    target = _one(rng, sorted(able[act]) if tool else sorted(set().union(*fits.values())))
    places = [place for place in homes(target, split) if place != tool]
    if len(places) < 2:
        return None
    one_home, place = (places[i] for i in rng.choice(len(places), 2, replace=False))
    lamp = _one(rng, LAMPS) if act == "light" else None

    # the receptacles: those that the task needs, then any
    layout = [one_home]
    if lamp:
        layout.append(_one(rng, STANDS))
    else:
        layout += [place, tool] if tool else [place]
    layout += [_one(rng, list(fits)) for _ in range(receptacles - len(layout))]
    if layout_split(layout) != split:
        return None

    # the objects: those that the task needs, then any, in places of this split
    where = [i for i, r in enumerate(layout) if r != place and r in homes(target, split)]
    contents = [(target, _one(rng, where)) for _ in range(count)]
    if lamp:
        # the lamp stands on the last receptacle of the first kind that is one for lamps
        stand = next(r for r in layout if r in STANDS)
        contents.append((lamp, max(i for i, r in enumerate(layout) if r == stand)))
    free = []
    for i, r in enumerate(layout):
        free += [(thing, i) for thing in fits[r] if thing != target and r in homes(thing, split)]
    if not free:
        return None
    contents += [free[i] for i in rng.integers(len(free), size=objects - len(contents))]

    goal, sentence = _goal(rng, kind, target, place, lamp)
    pairs = {(thing, layout[i]) for thing, i in contents if thing != lamp}
    if lamp:
        place = None        # it is looked at, wherever that is
    else:
        pairs.add((target, place))
    return House(
        _problem(layout, contents, goal), kind, sentence, target.lower(), place and place.lower(),
        lamp and lamp.lower(), tuple(sorted(layout)), frozenset(pairs))


def _one(rng, things):
    return things[int(rng.integers(len(things)))]


def _goal(rng, kind, target, place, lamp):
    """(the goal in PDDL, the task in words), as ALFWorld writes them."""
    from alfworld.gen.goal_library import gdict
    names = {"obj": target, "recep": place, "toggle": lamp or "", "mrecep": ""}
    goal = gdict[kind]["pddl"].format(**names).replace("#", "-")
    words = _one(rng, gdict[kind]["templates"])
    sentence = words.format(**{key: name.lower() for key, name in names.items()})
    return goal, sentence + "."


def _problem(layout, contents, goal):
    """The PDDL problem: receptacle i stands at a place of its own, contents are (kind, i)."""
    fits, able, openable = vocabulary()

    # what all is called
    ids, counts = [], Counter()
    for kind in [*layout, *(thing for thing, _ in contents)]:
        counts[kind] += 1
        # a basin's id is its fixture's: "sinkbasin 1" is what is shown
        base, tail = (kind[:-5], f"_bar_{kind}") if kind.endswith("Basin") else (kind, "")
        ids.append(f"{base}_bar_{counts[kind]}{tail}")
    names, things = ids[:len(layout)], ids[len(layout):]
    kinds = sorted({thing for thing, _ in contents})

    # what is so in the beginning
    facts = ["(atLocation agent1 loc_bar_0)"]
    for i, (kind, name) in enumerate(zip(layout, names)):
        facts.append(f"(receptacleType {name} {kind}Type)")
        facts.append(f"(receptacleAtLocation {name} loc_bar_{i + 1})")
        if kind in openable:
            facts.append(f"(openable {name})")
    for place in sorted(set(layout)):
        fitting = [kind for kind in kinds if kind in fits[place]]
        facts += [f"(canContain {place}Type {kind}Type)" for kind in fitting]
    for (kind, i), name in zip(contents, things):
        facts.append(f"(objectType {name} {kind}Type)")
        facts.append(f"(inReceptacle {name} {names[i]})")
        facts.append(f"(objectAtLocation {name} loc_bar_{i + 1})")
        facts.append(f"({'toggleable' if kind in LAMPS else 'pickupable'} {name})")
        facts += [f"({act}able {name})" for act in able if kind in able[act]]

    # every kind that an action's rule names must be declared, whether or not there is one
    receptacle_types = sorted({*layout, "SinkBasin", "Microwave", "Fridge"})
    object_types = sorted({*kinds, "Knife", "ButterKnife"})
    declared = ["agent1 - agent"]
    declared += [f"loc_bar_{i} - location" for i in range(len(layout) + 1)]
    declared += [f"{name} - receptacle" for name in names]
    declared += [f"{name} - object" for name in things]
    declared += [f"{kind}Type - rtype" for kind in receptacle_types]
    declared += [f"{kind}Type - otype" for kind in object_types]

    # the goal's text closes `define`
    return "\n".join([
        "(define (problem house)", "(:domain alfred)",
        "(:objects", *declared, ")",
        "(:init", *facts, ")",
        goal])


# ---- the downloaded data set's -----------------------------------------------------------------
def from_data(number: int, split="train") -> House:
    """Return a house of the data set: the number-th game file of ALFWorld's own split, going round.

    Games that ALFWorld itself leaves out (slices, movable receptacles, without a solution) are not
    among them. Raises HouseError where there are none, or one is broken.
    """
    files = data_files(split)
    return _read(files[number % len(files)])


def data_files(split="train") -> list[Path]:
    """The data set's games that ALFWorld plays.

    All are looked into, once: the thousands of training take seconds.
    """
    return _data_files(os.environ.get("ALFWORLD_DATA", ""), split)


@cache
def _data_files(root, split):
    folder = Path(root).expanduser() / "json_2.1.1" / DATA_FOLDERS[split]
    files = sorted(folder.rglob("game.tw-pddl"))
    found = [file for file in files if not re.search("movable|Sliced", str(file))]
    if not found:
        raise HouseError(
            f"{folder} holds no game.tw-pddl: run alfworld-download, and set $ALFWORLD_DATA to its "
            "folder")
    if not (solvable := [file for file in found if _read(file)]):
        raise HouseError(f"none of the {len(found)} games in {folder} has a solution")
    return solvable


def _read(file):
    """The House in a game file and the traj_data.json beside it; None where it has no solution."""
    try:
        game = json.loads(file.read_text())
        about = json.loads(file.with_name("traj_data.json").read_text())
        names, kind = about["pddl_params"], about["task_type"]
        sentence = re.search(r"Your task is to: ([^\n\"\\]+)", game["grammar"])[1]
        keys = ("object_target", "parent_target", "toggle_target")
        target, place, lamp = (names[key].lower() for key in keys)
        if not game["solvable"]:
            return None
        if TASKS[kind][0] == "light":
            place = None
        else:
            lamp = None
        # layout and pairs only tell dealt houses' splits apart
        return House(game["pddl_problem"], kind, sentence, target, place, lamp, (), frozenset())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__} {error}"
        raise HouseError(f"{file} is no game of ALFWorld's: {said}") from error
