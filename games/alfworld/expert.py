"""ALFWorld's experts, and the words that they would say.

    doing, command = next_step(info)        # ("find apple", "go to fridge 1")
    thoughts(info, command)                 # "At nowhere. … To do: find apple. I choose go to …"

There are two: the demonstrator, with memory, and the heuristic, without. They know what the agent
was told and has seen, no more: the task, the receptacles' names, what lies where it has looked
(`info` of games/alfworld/game.py; `info["seen"]` is the memory). While it searches, the
demonstrator goes through the receptacles in the order of their names, so that one who remembers
nothing can do likewise.

Does not handle: the houses (games/alfworld/houses.py), the answer's format (parse.py).
"""

# what an object is after it
BADGES = {"clean": "clean", "heat": "hot", "cool": "cool"}
TOOLS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}


def kind_of(name: str) -> str:
    """The kind that a name with a number is of.

    >>> kind_of("sinkbasin 1")
    'sinkbasin'
    """
    return name.rpartition(" ")[0]


def next_step(info: dict, memory=True) -> tuple[str, str]:
    """Return (what is to be done now, the command that does it) as the demonstrator sees it.

    memory=False: the heuristic, which knows of no place but the present one.
    """
    goal, held, commands = info["goal"], info["holding"], info["commands"]
    seen = info["seen"] if memory else info["contents"]
    act, target, place, lamp = goal["act"], goal["target"], goal["place"], goal["lamp"]

    def targets_in(receptacle):
        return sum(kind_of(name) == target for name in seen.get(receptacle, ()))

    # where it belongs; of several such places the one that holds most of its kind already
    homes = [r for r in info["receptacles"] if kind_of(r) == place]
    home = max(homes, key=targets_in, default=None)

    # with something in the hand
    if held and kind_of(held) != target:
        return f"leave {held}", _leave(info, held)
    if held:
        if act in TOOLS and BADGES[act] not in info["badges"]:
            tool = next(r for r in info["receptacles"] if kind_of(r) == TOOLS[act])
            do = f"{act} {held} with {tool}"
            return (do, do) if do in commands else (f"bring {held} to {tool}", f"go to {tool}")
        if act == "light":
            lit = next((c for c in commands if c.startswith(f"use {lamp} ")), None)
            return (f"use {lamp}", lit) if lit else (f"find {lamp}", _search(info, seen, lamp))
        if home not in info["near"]:
            return f"bring {held} to {home}", f"go to {home}"
        do = f"move {held} to {home}"
        return (f"put {held} in {home}", do) if do in commands else (f"open {home}", f"open {home}")

    # with empty hands: what lies where it belongs is done with, unless it is to be treated first
    placed = home if act not in TOOLS else None
    for r, names in info["contents"].items():
        for name in names:
            if r != placed and kind_of(name) == target:
                return f"take {name}", f"take {name} from {r}"
    left = {r: names if r != placed else [] for r, names in seen.items()}
    return f"find {target}", _search(info, left, target)


def _search(info, seen, kind):
    """The command that looks for a kind of thing.

    It goes where such a thing was seen, else to the next place not seen yet.
    """
    names, near = info["receptacles"], info["near"]
    for r, things in seen.items():
        if r not in near and any(kind_of(name) == kind for name in things):
            return f"go to {r}"
    if shut := [r for r in near if r not in info["contents"]]:
        return f"open {shut[0]}"
    # onwards from here, round to the first; where all were seen, to the very next
    start = names.index(info["at"]) + 1 if info["at"] else 0
    others = [r for r in (*names[start:], *names[:start]) if r not in near]
    return f"go to {next((r for r in others if r not in seen), others[0])}"


def _leave(info, held):
    """Put down what is not wanted: here where that is possible, else at the next place."""
    here = [c for c in info["commands"] if c.startswith(f"move {held} to ")]
    return here[0] if here else _search(info, {}, "")


def reading(info: dict) -> str:
    """The sentence that says what the picture shows: where one is, what one holds."""
    at = "nowhere" if info["at"] is None else info["at"] + (", shut" if info["shut"] else "")
    return f"At {at}. {hand(info)}"


def hand(info: dict) -> str:
    """The sentence that says what one holds, and what was done to it."""
    if info["holding"] is None:
        return "Holding nothing."
    return f"Holding {' '.join([*info['badges'], kind_of(info['holding'])])}."


def thoughts(info: dict, action: str) -> str:
    """Return the chain of thought that ends in choosing `action`, right or not."""
    return f"{reading(info)} To do: {next_step(info)[0]}. I choose {action}."
