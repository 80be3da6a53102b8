"""Houses for ALFWorld's engine, dealt from a seed: a PDDL problem with one of the six kinds of household tasks.

    house = deal(7)                     # the same on every machine; deal(7, "held out") is one of the other split
    house.sentence                      # what is to be done: "put a clean apple in dresser."
    house.problem                       # PDDL, for ALFWorld's own domain

What there is, what fits into what, goals and their wording are ALFWorld's, read from its installed package (0.4.2:
alfworld.gen.constants, alfworld.gen.goal_library). The houses are ours, and far smaller than ALFRED's rooms.
Held-out houses have other layouts (sets of receptacles), and no object lies in, or belongs into, a kind of receptacle
that it lay in or belonged into in training (lamps apart): a checksum shares out layouts and each object's places.
Does not handle: playing (alfworld_env.py), drawing (games/scene.py), who knows what to do (games/household.py).
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

# kind of task: (what is done to the object before it is put away, where; how many objects)
TASKS = {"pick_and_place_simple": (None, None, 1), "look_at_obj_in_light": ("light", None, 1),
         "pick_clean_then_place_in_recep": ("clean", "SinkBasin", 1),
         "pick_heat_then_place_in_recep": ("heat", "Microwave", 1),
         "pick_cool_then_place_in_recep": ("cool", "Fridge", 1), "pick_two_obj_and_place": (None, None, 2)}
SPLITS = ("train", "held out")
DATA_FOLDERS = {"train": "train", "held out": "valid_unseen"}             # ALFWorld's own splits
LAMPS, STANDS = ("DeskLamp", "FloorLamp"), ("Desk", "Dresser", "SideTable")     # what lamps stand on is ours


@dataclass
class House:
    problem: str            # PDDL
    kind: str               # of task, a key of TASKS
    sentence: str           # the task in ALFWorld's words
    target: str             # the kind of object that it is about, as the engine names it: "apple"
    place: str | None       # the kind of receptacle that it belongs into, "fridge"; None: it is looked at
    lamp: str | None        # what it is looked at under
    layout: tuple           # the kinds of receptacles, sorted
    pairs: frozenset        # (kind of object, kind of receptacle) that it lies in or belongs into


class HouseError(ValueError):
    """A house that cannot be dealt; the message says why."""


@cache
def vocabulary():
    """({kind of receptacle: kinds of objects that fit}, {action: kinds of objects}, kinds that open)."""
    from alfworld.gen import constants
    fits = {receptacle: tuple(sorted(kind for kind in kinds if "Sliced" not in kind))
            for receptacle, kinds in sorted(constants.VAL_RECEPTACLE_OBJECTS.items())
            if receptacle not in constants.MOVABLE_RECEPTACLES}
    acts = {"clean": "Cleanable", "heat": "Heatable", "cool": "Coolable"}
    return ({receptacle: kinds for receptacle, kinds in fits.items() if len(kinds) > 1},
            {act: constants.VAL_ACTION_OBJECTS[name] for act, name in acts.items()},
            frozenset(constants.OPENABLE_CLASS_LIST))


def _checksum(*words):
    return zlib.crc32(" ".join(words).encode())


@cache
def homes(thing: str, split: str) -> tuple[str, ...]:
    """The kinds of receptacles that a kind of object may be in, by split.

    Held out are 3 of its places (4 of cloth's 17), 2 where there are 5 or 6, none of fewer: such things stay in
    training houses.
    """
    places = sorted((place for place, kinds in vocabulary()[0].items() if thing in kinds),
                    key=lambda place: _checksum(thing, place))
    count = max(3, len(places) // 4) if len(places) >= 7 else 2 if len(places) >= 5 else 0
    return tuple(sorted(places[:count] if split == "held out" else places[count:]))


def layout_split(layout) -> str:
    """Which split a set of receptacles belongs to: one in four is held out."""
    return SPLITS[_checksum(*sorted(layout)) % 4 == 0]


def deal(number: int, split="train", receptacles=5, objects=4) -> House:
    """Return the house of this number: `receptacles` and `objects` in it, the task's own among them.

    HouseError where so few cannot hold a task, or no layout was found.
    """
    if not (4 <= receptacles <= 40 and 3 <= objects <= 40):
        raise HouseError(f"a house has 4 to 40 receptacles and 3 to 40 objects, not {receptacles} and {objects}")
    rng = np.random.default_rng([number, SPLITS.index(split)])
    kind = _one(rng, list(TASKS))
    for _ in range(1000):
        if house := _try(rng, split, kind, receptacles, objects):
            return house
    raise HouseError(f"no {split} house of {receptacles} receptacles and {objects} objects in 1,000 tries")


def _try(rng, split, kind, receptacles, objects):
    """One try at a House; None where the draw does not fit, or is the other split's."""
    fits, able, _ = vocabulary()
    act, tool, count = TASKS[kind]
    target = _one(rng, sorted(able[act]) if tool else sorted(set().union(*fits.values())))
    places = [place for place in homes(target, split) if place != tool]
    if len(places) < 2:
        return None
    one_home, place = (places[i] for i in rng.choice(len(places), 2, replace=False))
    lamp = _one(rng, LAMPS) if act == "light" else None
    layout = [one_home, *([] if lamp else [place]), *([tool] if tool else []), *([_one(rng, STANDS)] if lamp else [])]
    layout += [_one(rng, list(fits)) for _ in range(receptacles - len(layout))]
    if layout_split(layout) != split:
        return None
    # the lamp stands on the last receptacle of the first kind that is one for lamps
    stand = max(i for i, r in enumerate(layout) if r == next(r for r in layout if r in STANDS)) if lamp else None
    where = [i for i, r in enumerate(layout) if r != place and r in homes(target, split)]
    contents = [(target, _one(rng, where)) for _ in range(count)] + ([(lamp, stand)] if lamp else [])
    free = [(thing, i) for i, r in enumerate(layout) for thing in fits[r]
            if thing != target and r in homes(thing, split)]
    if not free:
        return None
    contents += [free[i] for i in rng.integers(len(free), size=objects - len(contents))]
    goal, sentence = _goal(rng, kind, target, place, lamp)
    pairs = {(thing, layout[i]) for thing, i in contents if thing != lamp} | (set() if lamp else {(target, place)})
    return House(_problem(layout, contents, goal), kind, sentence, target.lower(), None if lamp else place.lower(),
                 lamp and lamp.lower(), tuple(sorted(layout)), frozenset(pairs))


def _one(rng, things):
    return things[int(rng.integers(len(things)))]


def _goal(rng, kind, target, place, lamp):
    """(the goal in PDDL, the task in words), as ALFWorld writes them."""
    from alfworld.gen.goal_library import gdict
    names = {"obj": target, "recep": place, "toggle": lamp or "", "mrecep": ""}
    words = _one(rng, gdict[kind]["templates"])
    return (gdict[kind]["pddl"].format(**names).replace("#", "-"),
            words.format(**{key: name.lower() for key, name in names.items()}) + ".")


def from_data(number: int, split="train") -> House:
    """Return a house of the downloaded data set: the number-th game file of ALFWorld's own split, going round.

    Games that ALFWorld itself leaves out (slices, movable receptacles, without a solution) are not among them.
    HouseError where there are none, or one is broken.
    """
    files = data_files(split)
    return _read(files[number % len(files)])


def data_files(split="train") -> list[Path]:
    """The data set's games that ALFWorld plays. All are looked into, once: the thousands of training take seconds."""
    return _data_files(os.environ.get("ALFWORLD_DATA", ""), split)


@cache
def _data_files(root, split):
    folder = Path(root).expanduser() / "json_2.1.1" / DATA_FOLDERS[split]
    found = sorted(file for file in folder.rglob("game.tw-pddl") if not re.search("movable|Sliced", str(file)))
    if not found:
        raise HouseError(f"{folder} holds no game.tw-pddl: run alfworld-download, and set $ALFWORLD_DATA to its folder")
    if not (solvable := [file for file in found if _read(file)]):
        raise HouseError(f"none of the {len(found)} games in {folder} has a solution")
    return solvable


def _read(file):
    """The House in a game file and the traj_data.json beside it; None where it is said to have no solution."""
    try:
        game, about = (json.loads(path.read_text()) for path in (file, file.with_name("traj_data.json")))
        names, kind = about["pddl_params"], about["task_type"]
        sentence = re.search(r"Your task is to: ([^\n\"\\]+)", game["grammar"])[1]
        target, place, lamp = (names[key].lower() for key in ("object_target", "parent_target", "toggle_target"))
        if not game["solvable"]:
            return None
        light = TASKS[kind][0] == "light"
        return House(game["pddl_problem"], kind, sentence, target, None if light else place, lamp if light else None,
                     (), frozenset())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HouseError(f"{file} is no game of ALFWorld's: {type(error).__name__} {error}") from error


def _problem(layout, contents, goal):
    """The PDDL problem: receptacle i stands at a place of its own, contents are (kind, i)."""
    fits, able, openable = vocabulary()
    ids, counts = [], Counter()
    for kind in [*layout, *(thing for thing, _ in contents)]:
        counts[kind] += 1                               # a basin's id is its fixture's: "sinkbasin 1" is what is shown
        base, tail = (kind[:-5], f"_bar_{kind}") if kind.endswith("Basin") else (kind, "")
        ids.append(f"{base}_bar_{counts[kind]}{tail}")
    names, things = ids[:len(layout)], ids[len(layout):]
    kinds = sorted({thing for thing, _ in contents})
    facts = ["(atLocation agent1 loc_bar_0)"]
    for i, (kind, name) in enumerate(zip(layout, names)):
        facts += [f"(receptacleType {name} {kind}Type)", f"(receptacleAtLocation {name} loc_bar_{i + 1})"]
        facts += [f"(openable {name})"] if kind in openable else []
    facts += [f"(canContain {place}Type {kind}Type)" for place in sorted(set(layout)) for kind in kinds
              if kind in fits[place]]
    for (kind, i), name in zip(contents, things):
        facts += [f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {names[i]})",
                  f"(objectAtLocation {name} loc_bar_{i + 1})",
                  f"({'toggleable' if kind in LAMPS else 'pickupable'} {name})"]
        facts += [f"({act}able {name})" for act in able if kind in able[act]]
    # every kind that an action's rule names must be declared, whether or not there is one
    receptacle_types = sorted({*layout, "SinkBasin", "Microwave", "Fridge"})
    object_types = sorted({*kinds, "Knife", "ButterKnife"})
    declared = ["agent1 - agent", *(f"loc_bar_{i} - location" for i in range(len(layout) + 1)),
                *(f"{name} - receptacle" for name in names), *(f"{name} - object" for name in things),
                *(f"{kind}Type - rtype" for kind in receptacle_types),
                *(f"{kind}Type - otype" for kind in object_types)]
    return "\n".join(["(define (problem house)", "(:domain alfred)", "(:objects", *declared, ")", "(:init", *facts, ")",
                      goal])                            # whose text closes `define`
