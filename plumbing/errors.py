"""Errors in words: what went wrong and what to do, instead of a traceback.

    with foreign("runs/x/sft.json"):                    # something from outside: a damaged file becomes a ModelError
        settings = json.loads(…)
    with in_words(lambda: "go on with --resume"):       # a command line's whole run

Does not handle: errors of this program itself; outside of what is read from elsewhere those keep their traceback.
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError


class ModelError(RuntimeError):
    """A model, file or folder that cannot be used; the message says why and what to do."""


# What reading something that is not what it should be raises.
FOREIGN = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, SafetensorError,
           TemplateError)


@contextlib.contextmanager
def foreign(what, kinds=FOREIGN):
    """Turn what reading `what` (a file, a folder, a model's name) raises into a ModelError that names it.

    >>> with foreign("config.json"):
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
        else:
            said = f"it lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"{what} cannot be used: {said}") from error


@contextlib.contextmanager
def unheard():
    """Print in here for whoever listens: once nobody reads any more (| head -1) the rest goes nowhere, the run on."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def in_words(advice: Callable[[], str] = lambda: ""):
    """Run a command line: what a user can meet ends it with a sentence. advice: how to go on, asked when needed."""
    for stream in filter(None, (sys.stdout, sys.stderr)):   # a terminal without "→" gets \\u2192, not a traceback
        stream.reconfigure(errors="backslashreplace")
    program = Path(sys.argv[0]).name
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:   # as the scripts set it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped{_then(advice)}")
    except (ModelError, FloatingPointError) as error:
        sys.exit(f"{program}: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"{program}: out of GPU memory: lower --micro-batch-size or --play-batch-size, or begin anew with "
                 f"--bits 4{_then(advice)}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # nothing more can be said there
        sys.exit(f"{program}: nobody reads the output any more{_then(advice)}")
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        sys.exit(f"{program}: {'the disk is full; the last checkpoint is intact. Make room' if full else error}"
                 + _then(advice))


def _then(advice):
    return f"; {said}" if (said := advice()) else ""
