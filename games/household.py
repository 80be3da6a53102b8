"""Who knows what to do in ALFWorld: a demonstrator with memory, a heuristic without, and the words that they would say.

They know what the agent was told and has seen, no more: the task, the receptacles' names, what lies where it has looked
(`info` of alfworld_env.py; `info["seen"]` is the memory). While it searches, the demonstrator goes through the
receptacles in the order of their names, so that one who remembers nothing can do likewise.
Does not handle: the houses (houses.py), the answer's format (parse.py).
"""

BADGES = {"clean": "clean", "heat": "hot", "cool": "cool"}                 # what an object is after it
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
    goal, here, held, commands = info["goal"], info["at"], info["holding"], info["commands"]
    seen = info["seen"] if memory else ({here: info["inside"]} if info["inside"] is not None else {})
    act, target, place, lamp = goal["act"], goal["target"], goal["place"], goal["lamp"]
    # where it belongs; of several such places the one that holds most of its kind already
    homes = sorted((r for r in info["receptacles"] if kind_of(r) == place),
                   key=lambda r: -sum(kind_of(name) == target for name in seen.get(r) or ()))
    home = homes[0] if homes else None
    if held and kind_of(held) != target:
        return _leave(info, held)
    if held:
        if act in TOOLS and BADGES[act] not in info["badges"]:
            do = f"{act} {held} with {here}"
            return f"{act} it", do if do in commands else _to(info, [r for r in info["receptacles"]
                                                                    if kind_of(r) == TOOLS[act]])
        if act == "light":
            lamps = [name for name in info["inside"] or () if kind_of(name) == lamp]
            if lamps and f"use {lamps[0]}" in commands:
                return f"use the {lamp}", f"use {lamps[0]}"
            return f"find the {lamp}", _search(info, seen, lamp)
        return "put it", _to(info, [home], f"move {held} to {home}")
    wanted = [name for name in info["inside"] or () if kind_of(name) == target]
    if wanted and (here != home or act in TOOLS):
        return "take it", f"take {wanted[0]} from {here}"
    left = {r: things for r, things in seen.items() if r != home or act in TOOLS}
    return f"find {target}", _search(info, left | ({home: []} if home in seen else {}), target)


def _to(info, places, do=None):
    """The command that goes on towards one of these places; there, opened where it is shut, `do`."""
    if info["at"] in places:
        return f"open {info['at']}" if info["shut"] else do
    return f"go to {places[0]}"


def _search(info, seen, kind):
    """The command that looks for a kind of thing: where it was seen, else at the next place not seen yet."""
    here, names = info["at"], info["receptacles"]
    known = [r for r, things in seen.items() if r != here and any(kind_of(name) == kind for name in things or ())]
    if known:
        return f"go to {known[0]}"
    if here and info["shut"]:
        return f"open {here}"
    start = names.index(here) + 1 if here else 0
    others = [r for r in (*names[start:], *names[:start]) if r != here]
    return f"go to {next((r for r in others if r not in seen), others[0])}"


def _leave(info, held):
    """Put down what is not wanted: here where that is possible, else at the next place."""
    if info["shut"]:
        return "leave it", f"open {info['at']}"
    if info["at"] and f"move {held} to {info['at']}" in info["commands"]:
        return "leave it", f"move {held} to {info['at']}"
    return "leave it", _search(info, {}, "")


def reading(info: dict) -> str:
    """The sentence that says what the picture shows: where one is, what one holds."""
    at = "nowhere" if info["at"] is None else info["at"] + (", shut" if info["shut"] else "")
    held = "nothing" if info["holding"] is None else " ".join([*info["badges"], kind_of(info["holding"])])
    return f"At {at}. Holding {held}."


def thoughts(info: dict, action: str) -> str:
    """Return the chain of thought that ends in choosing `action`, right or not."""
    return f"{reading(info)} To do: {next_step(info)[0]}. I choose {action}."
