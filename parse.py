"""Both halves of one contract: the prompt that asks for a JSON answer, and reading that answer.

    {"thoughts": "The dealer shows 7. My cards are 10 4, total 14. I choose hit.", "action": "hit"}

Section 4.1-4.2 of the paper: an answer that names a legal action as `"action": "a"` plays a; any
other plays a uniformly random legal action, so that an untrained model still explores. If several
are named, the last counts: the format puts the action there, and thoughts may speak of others. The
paper does not say.
Does not handle: tokens (policy.py finds the token where the action part begins), games (env.py).
"""

import re
from collections.abc import Sequence

import numpy as np

# The key of an action, and the key with its value, which may be a bare number too. Models put
# spaces everywhere, so these may as well; ASCII, or a dotless "ı" would count as an "i".
KEY = r'"\s*action\s*"\s*:'
ACTION_KEY = re.compile(KEY, re.IGNORECASE | re.ASCII)
# (?=…): matches may overlap, as in "action": "action": "hit"
ACTION = re.compile(
    rf'(?={KEY}\s*(?:"([^"]*)"|(\d+)(?![\w.])))', re.IGNORECASE | re.ASCII)


def make_prompt(game, info: dict, cot=True) -> str:
    """Return v_in for the present state: the task, the legal actions, the answer's format.

    cot=False asks for the action alone (the paper's ablation). The legal actions are asked of the
    game now: ALFWorld changes them at every step.
    """
    game = game.unwrapped           # Gymnasium's wrappers hide what is not theirs
    task = f"{game.description} {game.state_text(info)}".strip()
    # thoughts first, action last: what is thought can then decide what is done
    thoughts = '"thoughts": "what you see and why", ' if cot else ""
    return (
        f"{task}\nActions:{game.separator}{game.separator.join(game.legal_actions())}\n"
        f'Answer in JSON: {{{thoughts}"action": "one of the actions"}}')


def make_answer(action: str, thoughts: str | None = None) -> str:
    """Return v_out as a demonstration writes it; without thoughts, the action alone.

    >>> make_answer("hit", "I choose hit.")
    '{"thoughts": "I choose hit.", "action": "hit"}'
    """
    # in one line and in this order, so that every demonstration looks alike
    head = "" if thoughts is None else f'"thoughts": "{thoughts}", '
    return f'{{{head}"action": "{action}"}}'


def parse(text: str, actions: Sequence[str]) -> tuple[str | None, int]:
    """Return (action, start): the legal action that the text names or None, and where its part
    begins.

    text: any string whatever; actions: the legal actions' texts. The last `"action": a` with a
    legal a counts: in quotes and compared whole ("10" is not "1"), or a bare number; in ASCII,
    whatever its case and the white space around it. start is the index in text of that match; where
    no legal action is named, of the last `"action":` key, or len(text) if there is none.

    >>> parse('{"thoughts": "low", "action": "Hit"}', ("stand", "hit"))
    ('hit', 20)
    >>> parse('I would rather stand', ("stand", "hit"))
    (None, 20)
    """
    # models write "Hit" and " hit " as well
    legal = {action.strip().lower(): action for action in actions}
    # from the last match backwards, and the first of these that is legal
    for match in reversed(list(ACTION.finditer(text))):
        value = match[1] if match[2] is None else match[2]
        named = value.strip().lower()
        # subtle: Python lowers some letters of other scripts to ASCII ones, as the Kelvin sign to k
        if value.isascii() and named in legal:
            return legal[named], match.start()
    # none: the action part is where the answer tried to name one, for λ's sake
    return None, max((match.start() for match in ACTION_KEY.finditer(text)), default=len(text))


def choose(
        text: str, actions: Sequence[str], generator: np.random.Generator) -> tuple[int, bool, int]:
    """Return (index of the action to play, whether the text named it, start): the paper's f(v_out).

    generator: a numpy Generator, drawn from only for the uniform fallback.

    subtle: an answer that names no action is still what the policy did, so PPO scores its tokens
    like any other's (all as thoughts, where there is no `"action":` key). The uniform draw adds
    log 1/|A| to old and new log-probability alike, and so nothing to their ratio.
    """
    action, start = parse(text, actions)
    if action is None:              # so that an untrained model explores
        return int(generator.integers(len(actions))), False, start
    return list(actions).index(action), True, start


def json_closed(text: str) -> bool:
    """Whether the first JSON object in the text is complete: generation may stop.

    >>> json_closed('{"thoughts": "a } in a string"'), json_closed('{"action": "hit"}')
    (False, True)
    """
    # json.loads would raise at every token but the last; this counts brackets outside of strings
    depth, quoted, escaped = 0, False, False
    for character in text:
        if quoted:
            # a quote ends the string, unless it is escaped; an escaped backslash escapes nothing
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"' and depth:        # before the object quotes mean nothing
            quoted = True
        elif character == "{":
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:                      # the outermost bracket is shut
                return True
    return False
