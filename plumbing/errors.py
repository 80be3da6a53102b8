"""Errors in words: what went wrong and what to do, instead of a traceback.

    with as_model_error("runs/x/sft.json"):         # a damaged file becomes a ModelError
        settings = json.loads(…)
    with in_words(folder / "config.json"):          # a command line's whole run

Does not handle: errors of this program itself. Outside of what is read from elsewhere those keep
their traceback.
"""

import contextlib
import errno
import os
import sys
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

import parallel
from games.game import GameError


class ModelError(RuntimeError):
    """A model, file or folder that cannot be used; the message says why and what to do."""


# What reading something that is not what it should be raises.
UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError,
    SafetensorError, TemplateError, RecursionError,
)


@contextlib.contextmanager
def as_model_error(what, kinds=UNREADABLE):
    """Turn what reading `what` (a file, a folder, a model's name) raises into a ModelError.

    >>> with as_model_error("config.json"):
    ...     {}["r"]
    Traceback (most recent call last):
    plumbing.errors.ModelError: config.json cannot be used: it lacks 'r'
    """
    try:
        yield
    except (ModelError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except kinds as error:
        if isinstance(error, OSError) and error.strerror:
            said = error.strerror.lower()
        elif isinstance(error, KeyError):
            said = f"it lacks {error}"
        else:
            said = f"{type(error).__name__}: {error}"
        raise ModelError(f"{what} cannot be used: {said}") from error


# ---- the terminal ------------------------------------------------------------------------------
@contextlib.contextmanager
def ignore_closed_pipe():
    """Print in here for whoever reads: after `| head -1` the rest goes nowhere, and the run on."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        _print_nowhere()


def _print_nowhere():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text):
    """Print, on the first process alone."""
    if parallel.rank() == 0:
        with ignore_closed_pipe():
            print(lines_of(text), flush=True)


def printable(text: str) -> str:
    """The text without anything that a terminal obeys.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def lines_of(text) -> str:
    """What is to be said, printable line by line: a name or an error in it may be a stranger's."""
    return "\n".join(map(printable, str(text).split("\n")))


@contextlib.contextmanager
def in_words(config=None):
    """Run a command line: what a user can meet ends it with a sentence.

    config: the file that a run can go on from once it is there; None where there is no run.
    """
    for stream in (sys.stdout, sys.stderr):
        # a terminal without "→" gets \\u2192, not a traceback; a notebook's stream has them all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    program = Path(sys.argv[0]).name

    def and_then():
        if not config:
            return ""
        if config.exists():
            return f"; go on with the same command and --resume (its folder is {config.parent})"
        return "; nothing was saved yet: start it again with the same command"

    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped{and_then()}")
    except (ModelError, FloatingPointError, GameError, ImportError) as error:
        sys.exit(f"{program}: {lines_of(error)}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(
            f"{program}: out of GPU memory: lower --micro-batch-size or --play-batch-size, or "
            f"begin anew with --bits 4{and_then()}"
        )
    except BrokenPipeError:
        _print_nowhere()
        sys.exit(f"{program}: nobody reads the output any more{and_then()}")
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error):     # safetensors' own words for a full disk
            error = "the disk is full; the last checkpoint is intact. Make room"
        sys.exit(f"{program}: {lines_of(error)}{and_then()}")
