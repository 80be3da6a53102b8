"""The command line of train.py and sft.py, and a run's config.json: made of the settings' classes.

    settings, resume = read_settings(Settings, __doc__, ["--task", "blackjack", "--seed", "2"])
    settings = stored_settings(Settings, "runs/x/config.json")

Does not handle: what the settings are, and their defaults (settings.py).
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

from env import TASKS, check_game, find_game
from families import PARTS
from plumbing.errors import ModelError, as_model_error, say
from plumbing.loading import find_model
from plumbing.memory import memory_note
from plumbing.settings import departures, flag, resolve

# what the brackets of --help need
SIZES_HELP = ("[…] defaults; small: of a model whose hidden size is below 1,024, and of the pocket "
         "model where it has none of its own")


# ---- flags -------------------------------------------------------------------------------------
def add_flags(parser, cls, names=None):
    """Add a flag for each field of a settings class that has a help, or for those named.

    What is not given on the command line is not in the result.
    """
    for entry in map(cls.__dataclass_fields__.get, names or cls.__dataclass_fields__):
        if not entry.metadata["help"]:
            continue
        options = {"help": _help(entry), "default": argparse.SUPPRESS}
        if entry.name == "game":
            options |= {"action": GameOption, "nargs": "+", "metavar": "NAME=VALUE"}
        elif entry.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif entry.type is tuple:
            options |= {"type": _parts, "metavar": "PART,PART"}
        else:
            options |= {"type": entry.type, "choices": entry.metadata["choices"]}
        parser.add_argument(flag(entry.name), **options)
        if entry.name == "game":        # and three options of games/wrapped.py by their own names
            for name, value in (("actions", "A,B"), ("success_return", "R"), ("description", "T")):
                options |= {"dest": "game", "const": name, "metavar": value, "nargs": None}
                options["help"] = f"gymnasium: the same as --game {name}={value}"
                parser.add_argument(flag(name), **options)


class GameOption(argparse.Action):
    """Adds NAME=VALUE to the tuple `game`; const: the NAME, where the flag's value is a VALUE."""

    def __call__(self, parser, namespace, values, option_string=None):
        texts = [f"{self.const}={values}"] if self.const else values
        namespace.game = (*getattr(namespace, "game", ()), *texts)


def make_parser(cls, description=None):
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, epilog=SIZES_HELP, formatter_class=as_is)
    add_flags(parser, cls)
    return parser


def _parts(text):
    """Comma-separated parts in PARTS' own order; what is none comes last, for `problem` to name.

    >>> _parts("language,vision")
    ('vision', 'language')
    """
    return tuple(sorted(set(text.split(",")), key=lambda part: [*PARTS, part].index(part)))


def count_or_all(text):
    """A flag's value that is a number, or "all"."""
    return text if text == "all" else int(text)


def _help(entry):
    """A flag's help: its meaning, all its defaults, and the paper's value where ours is another."""
    told = []
    if entry.default not in (None, ()):
        told.append(",".join(entry.default) if entry.type is tuple else f"{entry.default}")
    for sizes in ("small", "pocket"):
        if entry.metadata[sizes] is not None:
            told.append(f"{sizes} {entry.metadata[sizes]}")
    for task, game in TASKS.items():
        own = game.paper_settings | game.preferred_settings
        if entry.name in own:
            told.append(f"{task} {own[entry.name]}")
    if entry.metadata["why"]:
        told.append(f"the paper {entry.metadata['paper']}: {entry.metadata['why']}")
    text = entry.metadata["help"] + (f" [{'; '.join(told)}]" if told else "")
    return text.replace("%", "%%")              # argparse formats it


# ---- read --------------------------------------------------------------------------------------
def read_settings(cls, description, arguments=None):
    """Return (settings, resume): from the command line, or from the config.json of the run.

    Prints what the settings of a new run are, where they are not the paper's.
    """
    parser = make_parser(cls, description)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    if "out" not in given and "task" in given:
        name = find_game(given["task"]).__name__.lower() + cls.folder_suffix
        given["out"] = f"runs/{name}-seed{given.get('seed', cls.seed)}"
    config = Path(given.get("out", "")) / cls.file
    exists = "out" in given and config.exists()
    if resume and exists:
        settings = _resumed(cls, config, given)
        check_game(settings.task, settings.game)
        return settings, True
    if "task" not in given:
        parser.error("--task is needed" + (f": there is no {config} to resume" if resume else ""))
    if exists:
        parser.error(f"{config.parent} holds a run: go on with --resume, or choose another --out")
    if resume:
        say(f"there is no run in {config.parent} yet: this starts one")
    check_game(given["task"], given.get("game", ()))
    model = find_model(given.get("model", cls.model), given["task"], device=given.get("device"))
    settings = resolve(cls, given, model)
    say(f"model: {model.why}, in {settings.bits} bits{memory_note(model, settings)}")
    if found := departures(settings, given):
        say("\n  ".join(["settings that are not the paper's:", *found]))
    return settings, False


def stored_settings(cls, config):
    """The settings in a run's config.json; ModelError where they are damaged, or not this
    version's."""
    with as_model_error(config):
        stored = json.loads(Path(config).read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a run's settings")
    if unknown := set(stored) ^ {entry.name for entry in fields(cls)}:
        raise ModelError(
            f"{config} was written by another program or version ({', '.join(sorted(unknown))} "
            "differ): finish or evaluate the run with that one, or start a new one with --out")
    with as_model_error(config):
        for entry in fields(cls):
            value, choices = stored[entry.name], entry.metadata["choices"]
            kinds = {float: (float, int), tuple: (tuple, list)}.get(entry.type, (entry.type,))
            if type(value) not in kinds or choices and value not in choices:
                raise ValueError(f"{entry.name} is {value!r}")
            if entry.type is tuple:
                stored[entry.name] = tuple(value)
        settings = cls(**stored)
        if problem := settings.problem():
            raise ValueError(problem)
    return settings


def _resumed(cls, config, given):
    """The settings in config.json, with those given that may change in mid-run."""
    stored = stored_settings(cls, config)
    given = {name: value for name, value in given.items() if value != "auto"}
    other = {
        name: value for name, value in given.items()
        if name not in cls.changeable and value != getattr(stored, name)}
    if other:
        said = ", ".join(f"{name} {getattr(stored, name)}, not {other[name]}" for name in other)
        may = ", ".join(flag(name) for name in cls.changeable[1:])
        raise ModelError(
            f"--resume goes on with the run's own settings: {config} has {said}. Leave these flags "
            f"out ({may} may change), or start a new run with --out")
    changed = {name: value for name, value in given.items() if name in cls.changeable}
    settings = replace(stored, **changed)
    if problem := settings.problem():
        raise ModelError(problem)
    return settings
