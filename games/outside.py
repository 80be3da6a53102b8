"""Games from outside this program: found by their --task, and tried before anything is loaded.

    find("my_game.py:GridWorld")            # the class in that file
    find("gymnasium:FrozenLake-v1")         # an environment of Gymnasium's, games/wrapped.py
    read_options(game, ("max_size=7",))     # {"max_size": 7}, for its constructor
    check(game, {"max_size": 7})            # plays a few steps: GameError says what is wrong

The file is run as any Python program of yours is. Does not handle: how a game is written
(games/game.py, YOUR_OWN_GAME.md).
"""

import contextlib
import importlib.util
import inspect
import json
import sys
import traceback
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from gymnasium.utils.env_checker import check_env

from games.draw import SIZE
from games.game import Game, GameError
from games.wrapped import Wrapped


# ---- found -------------------------------------------------------------------------------------
@cache
def find(task: str) -> type[Game]:
    """The class of my_game.py:CLASS or gymnasium:ID; GameError where there is none."""
    before, _, name = task.rpartition(":")
    if task.startswith("gymnasium:"):
        env_id = task.removeprefix("gymnasium:")
        return type(name.replace("/", "-"), (Wrapped,), {"env_id": env_id})
    file = Path(before).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise GameError(f"there is no task {task!r}: a game in a file is PATH/my_game.py:CLASS, "
                        "with its path from this folder or from /")
    found = getattr(_module(file), name, None)
    if not (isinstance(found, type) and issubclass(found, Game)):
        raise GameError(
            f"{file.name} has no game {name!r}: a class with the parent games.game.Game (not "
            "gymnasium.Env: that is --task gymnasium:ID)")
    return found


@cache
def _module(file):
    """The module in a file, the same one by whatever path it was named."""
    spec = importlib.util.spec_from_file_location(str(file), file)
    module = sys.modules[str(file)] = importlib.util.module_from_spec(spec)
    sys.path.append(str(file.parent))           # where it looks for its neighbours
    with _in_words(f"{file.name} does not import", file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _in_words(what, file=None):
    """Any error in here is somebody else's code's: a sentence with the line of it.

    file: where that code is, if it is known.
    """
    try:
        yield
    except GameError:
        raise
    except (Exception, SystemExit) as error:
        lines = [
            f"line {frame.lineno}: " for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(file)]
        raise GameError(f"{what}: {''.join(lines[-1:])}{type(error).__name__}: {error}") from error


# ---- its options -------------------------------------------------------------------------------
PYTHONS = {"True": "true", "False": "false"}        # as JSON has them


def read_options(game, texts) -> dict:
    """The constructor's options in "name=value" texts, each of the kind that its default is of.

    >>> class Maze(Game):
    ...     def __init__(self, size=5, walls=True, render_mode=None):
    ...         ...
    >>> read_options(Maze, ("size=7", "walls=false"))
    {'size': 7, 'walls': False}
    """
    known = inspect.signature(game).parameters
    is_open = any(entry.kind is entry.VAR_KEYWORD for entry in known.values())
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not (name in known or is_open):
            raise GameError(
                f"{text!r} sets no option of {game.__name__}: --game NAME=VALUE, and its options "
                f"are {', '.join(known) or 'none'}")
        default = getattr(known.get(name), "default", None)
        try:
            given = json.loads(PYTHONS.get(value, value))
        except ValueError:
            given = value
        if isinstance(default, str):
            given = value
        # an int goes for a float; 0 and 1, no other number, for false and true
        kinds = (type(default), int)
        fits = given in (0, 1) if isinstance(default, bool) else type(given) in kinds
        if isinstance(default, int | float) and not fits:
            raise GameError(
                f"{text!r}: {value!r} is not of the kind of {name}'s default, "
                f"{json.dumps(default)}")
        found[name] = given
    return found


# ---- tried -------------------------------------------------------------------------------------
def check(game_class, options, needs=()):
    """Play a few steps, twice, and go on from a saved state: GameError says what is wrong.

    needs: those of best_actions, reading, thoughts that cannot be done without.
    """
    name = game_class.__name__
    with _in_words(f"{name} cannot be played", inspect.getfile(game_class)):
        game, twin = game_class(**options), game_class(**options)
        draws = np.random.default_rng(0).random(10)         # so many steps are tried
        draws[5] = -1                                       # in two episodes
        game.reset(seed=0)
        seen = _play(game, draws)
        for moment in seen:
            if said := _wrong(game, needs, *moment):
                raise GameError(f"{name} cannot be played: {said}")
        twin.reset(seed=0)
        if not _same(seen, _play(twin, draws)):
            raise GameError(
                f"{name} is not repeatable: the same seed and actions led elsewhere. All chance "
                "must come from self.np_random")
        for (*now, _), then, draw in zip(seen, seen[1:], draws):
            twin.reset(seed=1)
            twin.set_state(now[-1])             # plain JSON, which _wrong has seen to
            if not _same([(*now, ()), then], _play(twin, [draw])):
                raise GameError(
                    f"{name} does not come back by set_state: it goes on in another way. All that "
                    "an episode depends on must be set by `deal` for the first time (not in "
                    f"__init__, not by `play`), or be named in `fields`, which is "
                    f"{game.fields}; all chance must come from self.np_random, and none in draw")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # it draws an action of all, but where legal_actions is the class's own some are refused
            if game_class.legal_actions is Game.legal_actions:
                check_env(game, skip_render_check=True)


def _play(game, draws):
    """What a game is like from here on, and what each step pays.

    draws: each in [0, 1) chooses an action, below 0 it begins an episode.
    Returns [(picture, info, legal actions, state, (reward, terminated, truncated) or ())].
    """
    moments = [(*game.observe(), game.legal_actions(), game.get_state(), ())]
    for draw in draws:
        if game.over or draw < 0:
            (picture, info), paid = game.reset(), ()
        else:
            picture, *paid, info = game.step(int(draw * len(game.legal_actions())))
        moments.append((picture, info, game.legal_actions(), game.get_state(), tuple(paid)))
    return moments


def _same(moments, others):
    return all(
        np.array_equal(one[0], other[0]) and one[1:] == other[1:]
        for one, other in zip(moments, others))


def _wrong(game, needs, picture, info, legal, state, paid):
    """What is wrong with a moment of a game, in words, or None."""
    if not isinstance(game.description, str) or not game.description.strip():
        return "its description is no text: it opens the prompt"
    if not isinstance(game.state_text(info), str):
        return "state_text must return a text: it goes into the prompt"
    if not isinstance(game.max_steps, int) or game.max_steps < 1:
        return f"max_steps is {game.max_steps}: an episode needs a limit, such as 100"
    if not isinstance(legal, tuple | list) or not all(isinstance(text, str) for text in legal):
        return f"its actions are {legal!r}: a tuple of texts, such as (\"left\", \"right\")"
    for text in legal:
        # as parse.py reads them
        plain = text.isascii() and text.isprintable() and text and text == text.strip()
        if not plain or '"' in text or game.separator in text:
            return (f"no answer can name the action {text!r}: plain ASCII, without quotes and "
                    f"without {game.separator!r}, by which actions are separated in the prompt "
                    "(separator = \"\\n\" lets them have spaces)")
    if len({text.lower() for text in legal}) < len(legal):
        return f"an action is named twice (case makes no difference): {', '.join(legal)}"
    kind = getattr(picture, "dtype", type(picture)), getattr(picture, "shape", "")
    if kind != (np.uint8, (SIZE, SIZE, 3)):
        return (f"draw must return an array of uint8 ({SIZE}, {SIZE}, 3), not of {kind}: "
                "np.asarray(image) of a PIL image, array.astype(np.uint8) of 0 to 255")
    if not np.isfinite(paid).all():
        return f"a reward is {paid[0]}"
    for what, values in (("info", info), ("state", state)):
        if odd := [key for key, value in values.items() if not _is_plain(value)]:
            return (f"its {what} is not plain JSON in {', '.join(map(str, odd))} "
                    f"({values[odd[0]]!r}): numbers, texts, true, false, None, lists (no tuples, "
                    "no arrays), dicts with texts as keys")
    if any(paid[1:]):
        return None             # at an episode's end nobody asks what to do
    best, reading = game.best_actions(info), game.reading(info)
    thoughts = [game.thoughts(info, action) for action in legal]
    told = {"best_actions": best, "reading": reading, "thoughts": thoughts[0]}
    if lacking := [name for name in needs if told[name] is None]:
        return (f"it has no {' and no '.join(lacking)}, which demonstrations, --policy expert and "
                "pocket models are made of: write it into the class")
    if best is not None and not (isinstance(best, list) and best and {*best} <= {*legal}):
        return f"best_actions says {best!r}: a list of some of {', '.join(legal)}"
    for text in (reading, *thoughts):
        if text is not None and (not isinstance(text, str) or {*text} & {*'"\\\n'}):
            return f"it reads or thinks {text!r}: one line of text, without quotes or backslashes"
    return None


def _is_plain(value):
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False
