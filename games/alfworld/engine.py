"""ALFWorld's own engine: it reads a house, takes commands, says what comes of them, plans.

    engine = Engine()
    engine.load(houses.deal(7))
    engine.step("go to fridge 1")
    engine.said, engine.commands        # its words, and the commands that it takes now
    engine.facts["atlocation"]          # what holds, hidden or not: [("agent1", …)]
    engine.plan()                       # the planner's commands from here to the goal

Needs `pip install -r extras/requirements-alfworld.txt` (textworld 1.7.0, alfworld 0.4.2), and is
imported only where a game is made. To import it changes textworld in this process: what it computes
again and again is remembered.

Does not handle: rewards, what the agent sees (games/alfworld/game.py), which houses there are
(games/alfworld/houses.py).
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

from games.alfworld.houses import HouseError

try:
    import fast_downward
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    from textworld import logic
    from textworld.envs.pddl import PddlEnv, textgen
    from textworld.envs.pddl import logic as pddl_logic
except ImportError as error:
    raise ImportError(
        "--task alfworld needs ALFWorld's engine: pip install -r "
        f"extras/requirements-alfworld.txt ({error})") from error

# What the engine computes again and again is remembered, what it copies whole is copied shallowly:
# six times the steps a second, word for word the same games.
_remember = functools.lru_cache(maxsize=None)
logic.Rule.parse_conjunctive_query = _remember(logic.Rule.parse_conjunctive_query)
textgen._parse_and_convert = _remember(textgen._parse_and_convert)
pddl_logic._parse_and_convert = _remember(pddl_logic._parse_and_convert)
# loading a house translates it twice: for moves, and for the planner
fast_downward.pddl2sas = functools.lru_cache(maxsize=2)(fast_downward.pddl2sas)
# it only reads the entities, so they need no copies of their own
textgen.copy_context = lambda context: (
    context | {key: dict(context[key]) for key in ("variables", "mapping")})

_derive = textgen.EvalSymbol.derive


def _derive_with_names(symbol, context=None):
    """Names of the grammar are made textgen's own: since Python 3.13 locals() keeps none for it."""
    vars(textgen).update((context or symbol.context)["variables"])
    return _derive(symbol, context)


textgen.EvalSymbol.derive = _derive_with_names

MARK = ".alfworld-engine"           # in the folders that are ours to delete
_PARSERS = (textgen._PARSER, pddl_logic._PARSER, logic._PARSER)


def _forget():
    """Make the engine's parsers forget the last exception that they met.

    With it they keep all that was on the stack, such as a whole rollout.
    """
    for parser in _PARSERS:
        parser._furthest_exception = None


class Engine:
    """One of ALFWorld's engines: load a house, then one command after another.

    Not to be used by two threads.
    """

    def __init__(self):
        self.commands = ()
        wanted = textworld.EnvInfos(won=True, admissible_commands=True, facts=True)
        with _own_temporary_folder():
            self.game = AlfredDemangler(PddlEnv(wanted))

    def load(self, house):
        """Begin in a house; HouseError where the engine cannot read it."""
        # subtle: the engine's translator writes its own over them
        arguments = sys.argv
        with open(ALFRED_PDDL_PATH) as domain, open(ALFRED_TWL2_PATH) as grammar:
            data = {
                "pddl_domain": domain.read(),
                "grammar": grammar.read(),
                "pddl_problem": house.problem,
            }
        try:
            self.game.load(data)
            self._take(self.game.reset())
        # the translator raises what it stumbles over, SystemExit too
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__} {error}"
            raise HouseError(f"ALFWorld's engine cannot read this house: {said}") from error
        finally:
            sys.argv = arguments
            _forget()

    def step(self, command):
        self._take(self.game.step(command)[0])
        _forget()

    def _take(self, state):
        """Keep what the engine says after a command."""
        self.said = state.feedback
        self.won = state["won"]
        self.commands = tuple(state["admissible_commands"])
        self.facts = {}         # {predicate: [tuples of names]}
        for fact in state["facts"]:
            names = tuple(argument.name.strip() for argument in fact.arguments)
            self.facts.setdefault(fact.name, []).append(names)

    def plan(self):
        """The planner's commands from here to the goal; it knows what is hidden.

        [] where there is no way.
        """
        inner = self.game.unwrapped
        return inner._pddl_state.replan(inner._entity_infos)


@contextlib.contextmanager
def _own_temporary_folder():
    """Let the engine's copy of its library lie where the next program finds it.

    A kill leaves it behind; whoever comes here next removes it.
    """
    here = Path(tempfile.gettempdir()) / f"alfworld-engines-{os.getuid()}"
    own = here / str(os.getpid())
    before = tempfile.tempdir
    here.mkdir(mode=0o700, exist_ok=True)
    # a link made beforehand would lead what is deleted below astray
    if here.is_symlink() or here.stat().st_uid != os.getuid():
        raise PermissionError(f"{here} is another user's: set TMPDIR to a folder of your own")
    own.mkdir(exist_ok=True)
    (own / MARK).touch()
    # the folders of processes that are no more; only Linux tells which
    for left in here.iterdir() if Path("/proc/self").exists() else ():
        if (left / MARK).exists() and not Path(f"/proc/{left.name}").exists():
            shutil.rmtree(left, ignore_errors=True)
    tempfile.tempdir = str(own)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(own, ignore_errors=True)
