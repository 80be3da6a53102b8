"""A model behind an OpenAI-compatible endpoint plays; every answer is kept on disk.

    pip install -r extras/requirements-endpoint.txt
    python eval.py --task points24 --endpoint https://api.openai.com/v1 --model NAME
    python eval.py --task blackjack --endpoint http://localhost:8000/v1 --model NAME

Prompt, reading of the answer and statistics are everybody's (parse.py, eval.py). No seed is sent:
an endpoint that heeds it would answer the same state alike in every game. The key is
$OPENAI_API_KEY; without one a placeholder is sent, which local servers ignore. A call that fails
after the client's retries plays a random action. It is counted, left out of the parse rate and not
kept, so the same command asks it again. An answer without text is kept.
Does not handle: streaming, Azure's URLs, prices, where an answer's action part begins.
"""

import concurrent.futures as futures
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from extras.viewer import data_url
from parse import choose, make_prompt
from plumbing.checkpoint import append_line, locked, write_whole
from plumbing.errors import UNREADABLE, ModelError, as_model_error, printable
from rollout import Choice

UNUSABLE = ("401", "402", "403", "404")     # no key, no money, no access, no such model
GIVE_UP = 20        # so many failed calls in a row, and nobody answers there any more
LARGEST = 2**24     # bytes of a response; a long answer of a reasoning model has some 2**17
# what went wrong, by the class of the error or of its cause
KINDS = {
    "APITimeoutError": "time-out", "TimeoutError": "time-out",
    "ConnectError": "no connection", "ValueError": "no choices",
    "JSONDecodeError": "not JSON", "RecursionError": "not JSON", "OverflowError": "too large"}


# ---- one response ------------------------------------------------------------------------------
class Answer(NamedTuple):
    """What one response says."""

    text: str                           # "" where there is none
    odd: str | None                     # why it is not the text that was asked for
    cut: bool                           # it reached the longest answer's length
    usage: tuple[int, int] | None       # prompt and completion tokens, where the endpoint tells
    model: str | None                   # the model that says it has answered


def read_answer(body) -> Answer:
    """Read a response's JSON, whatever it is; ValueError where it holds no answer.

    >>> message = {"content": "I choose hit."}
    >>> read_answer({"choices": [{"message": message, "finish_reason": "length"}]})
    Answer(text='I choose hit.', odd=None, cut=True, usage=None, model=None)
    """
    choices = _part(body, "choices", list) or [None]
    message = _part(choices[0], "message", dict)
    if message is None:         # servers put errors here as well: their words tell which
        raise ValueError(f"it said {str(body)[:300]}")
    text, odd = _part(message, "content", str), None
    if pieces := _part(message, "content", list):
        text, odd = "".join(_part(piece, "text", str) or "" for piece in pieces), "content list"
    if not text:
        odd = "refusal" if message.get("refusal") else "no text"
    told = _part(body, "usage", dict)
    usage = _part(told, "prompt_tokens", int), _part(told, "completion_tokens", int)
    cut = choices[0].get("finish_reason") == "length"
    return Answer(
        text or "", odd, cut, None if None in usage else usage, _part(body, "model", str))


def _part(thing, key, kind):
    """thing[key] where there is one of that kind, else None."""
    found = thing.get(key) if isinstance(thing, dict) else None
    return found if isinstance(found, kind) else None


def advice(kind):
    """What to do where calls fail with this kind of error."""
    if kind in ("400", "422"):      # it understood, and does not do what is asked
        return "leave --temperature out, try another --max-new-tokens or a model that sees pictures"
    if kind in UNUSABLE or not kind.isdecimal():
        return "check --endpoint (most end in /v1), --model and $OPENAI_API_KEY"
    return "try later, or with a smaller --concurrency: the same command goes on"


def seal(row: dict) -> str:
    """A hash of a kept call, by which a damaged line is told from a whole one."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


# ---- the player --------------------------------------------------------------------------------
@dataclass
class EndpointPlayer:
    """A player, (games, pictures, infos) → a Choice for each game, to be used in a `with`.

    subtle: answers are draws, so the k-th time that a state is met takes the k-th answer kept for
    it. An evaluation depends on its answers alone, so a resumed one meets the same states and asks
    only what is missing.
    """

    url: str                    # up to where /chat/completions is added
    model: str
    folder: str = None          # of calls.jsonl; None for runs/endpoint-MODEL
    concurrency: int = 8        # calls at once
    seed: int = 0               # with another one other answers are drawn
    cot: bool = True
    max_new_tokens: int = 256
    temperature: float = None   # None for the endpoint's default
    greedy: bool = False        # temperature 0
    max_retries: int = 4        # the client's
    timeout: float = 120.0      # in seconds, of each try

    def __post_init__(self):
        self.url = self.url.rstrip("/")
        own = "runs/endpoint-" + re.sub(r"[^A-Za-z0-9._-]+", "-", self.model)[:100]
        self.folder = Path(self.folder or own)
        self.temperature = 0.0 if self.greedy else self.temperature
        self.limit = {"max_tokens": self.max_new_tokens}
        self.client = self._make_client()
        self.lock = threading.Lock()
        self.kept = {}              # (request's hash, k): the body of its k-th response
        self.met = Counter()        # how often each request was met
        self.used, self.count, self.failed = [], Counter(), Counter()       # used: Answers
        self.failed_in_a_row = self.missing = 0
        self.over = None            # the ModelError after which no call is made any more

    def _make_client(self):
        try:
            import openai
        except ImportError as error:
            raise ModelError("--endpoint needs a package: pip install -r "
                             "extras/requirements-endpoint.txt") from error
        self.openai = openai
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise ModelError("$OPENAI_API_KEY holds characters that no key has: set it anew")
        with as_model_error("--endpoint", (ImportError, ValueError)):
            parts = urlsplit(self.url)          # its port is looked at when it is asked for
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            if not usable or "@" in parts.netloc:
                raise ModelError("--endpoint is like https://api.openai.com/v1, without a password")
            # a proxy in the environment may be none, or need a package
            hooks = {"request": [self._before_request], "response": [self._after_response]}
            http = openai.DefaultHttpxClient(event_hooks=hooks)
        return openai.OpenAI(api_key=key, base_url=self.url, max_retries=self.max_retries,
                             timeout=self.timeout, http_client=http,
                             default_headers={"Accept-Encoding": "identity"})

    # -- on disk
    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder, "--transcripts"))
            self._take_up_file()
            self.pool = stack.enter_context(futures.ThreadPoolExecutor(self.concurrency))
            self.bar = stack.enter_context(tqdm(desc=self.model, unit=" calls", disable=None))
            self.stack = stack.pop_all()            # to be left in __exit__
        return self

    def __exit__(self, kind, *_):
        if kind:
            print(f"waiting for the calls under way; all answers are kept in {self.folder}, the "
                  "same command goes on", flush=True)
        self.over = self.over or ModelError("stopped")  # no retries any more
        self.pool.shutdown(cancel_futures=True)         # what is under way is paid for, and kept
        self.stack.close()
        self.client.close()
        if self.failed and not kind:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(self.failed.items()))
            print(f"note: failed calls: {self.failed.total()} ({kinds}); a random action was "
                  "played instead, and the same command asks them again")

    def _take_up_file(self):
        """Read the answers that are kept; damaged lines are dropped."""
        self.file = self.folder / "calls.jsonl"
        whole, damaged = [], []
        with as_model_error(self.file):
            lines = self.file.read_bytes().split(b"\n") if self.file.exists() else [b""]
            for number, line in enumerate(lines, 1):
                if self._take_up(line):
                    whole.append(line.decode() + "\n")
                elif line:
                    damaged.append(str(number))
            # subtle: a last line without an end would swallow the next one
            if damaged or lines[-1]:
                write_whole(self.file, "".join(whole))
        if damaged:
            print(f"note: {self.file} had damaged lines ({', '.join(damaged)}), which are dropped: "
                  "these calls are made again")

    def _take_up(self, line):
        """Take a line of the file as a kept answer; False where it is damaged."""
        with contextlib.suppress(*UNREADABLE, RecursionError):
            row = json.loads(line)
            if row.pop("seal") == seal(row):
                self.kept[row["request"], row["k"]] = row["body"]
                return True
        return False

    # -- one call, in one of the pool's threads
    def _before_request(self, request):
        """The client is about to send: a call, or a retry."""
        if self.over:
            raise self.over
        with self.lock:
            self.count["requests"] += 1

    def _after_response(self, response):
        """A response's head is there: read the rest; OverflowError, TimeoutError beyond limits.

        An error in an HTTP 200 becomes the status that it names, so the client treats it as one.
        """
        begun, content = time.monotonic(), bytearray()
        for part in response.iter_raw():            # raw: a little may unpack to a lot
            content += part
            if len(content) > LARGEST or "content-encoding" in response.headers:
                raise OverflowError(f"more than {LARGEST} bytes, or compressed without being asked")
            if time.monotonic() - begun > self.timeout:
                raise TimeoutError(f"not whole after {self.timeout} seconds")
        # as if nobody had read it yet
        response.stream = type(response)(200, content=bytes(content)).stream
        response.is_stream_consumed = response.is_closed = False
        with contextlib.suppress(ValueError, RecursionError):       # no JSON: _ask will say so
            code = _part(_part(json.loads(content), "error", dict), "code", int) or 0
            if response.is_success and 400 <= code < 600:
                response.status_code = code

    def _post(self, prompt, picture):
        """Return the text of a response."""
        image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
        content = [image, {"type": "text", "text": prompt}]
        options = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        create, limit = self.client.chat.completions.with_raw_response.create, self.limit
        try:
            return create(**options, **limit).text
        except self.openai.BadRequestError as error:
            if "max_tokens" not in limit or "max_completion_tokens" not in str(error):
                raise
            # the newer name: some want it, others do not know it
            self.limit = {"max_completion_tokens": self.max_new_tokens}
            return create(**options, **self.limit).text

    def _ask(self, call):
        """Make a call and keep its answer at once, or count how it failed."""
        key, prompt, picture = call
        try:
            body = json.loads(self._post(prompt, picture))
            read_answer(body)
        except (self.openai.APIError, ValueError, RecursionError, OverflowError,
                TimeoutError) as error:
            return self._count_failure(error)
        row = {"request": key[0], "k": key[1], "prompt": prompt, "body": body}
        with self.lock:
            append_line(self.file, row | {"seal": seal(row)})
            self.kept[key] = body
            self.failed_in_a_row = 0
            self.bar.update()

    def _count_failure(self, error):
        """ModelError where no other call is worth a try."""
        said = error.__cause__ or error
        kind = KINDS.get(type(error).__name__) or KINDS.get(type(said).__name__, "broken off")
        kind = str(getattr(error, "status_code", kind))
        said = str(said).replace(os.environ.get("OPENAI_API_KEY", "").strip() or "\0", "(the key)")
        with self.lock:
            if self.over:           # another call has ended it, and knows why
                raise self.over
            self.failed[kind] += 1
            self.failed_in_a_row += 1
            self.bar.set_postfix(failed=self.failed.total())
            first = min(self.concurrency, self.missing)
            patience = max(GIVE_UP, 2 * self.concurrency) if self.kept else first
            # once answers were given, a 403 is of one state (moderation), not of the whole endpoint
            if kind in UNUSABLE and not self.kept or self.failed_in_a_row >= patience:
                self.over = ModelError(
                    f"{self.model!r} at {self.url} does not answer ({kind}: "
                    f"{printable(said[:300])}): {advice(kind)}")
                raise self.over

    # -- a step of the games
    def __call__(self, games, pictures, infos):
        calls = []                  # ((request's hash, k), prompt, picture) of each game
        for game, picture, info in zip(games, pictures, infos):
            prompt = make_prompt(game, info, self.cot)
            asked = json.dumps([self.url, self.model, prompt, self.temperature,
                                self.max_new_tokens, self.seed, picture.shape])
            request = hashlib.sha256(asked.encode() + picture.tobytes()).hexdigest()
            calls.append(((request, self.met[request]), prompt, picture))
            self.met[request] += 1
        missing = [call for call in calls if call[0] not in self.kept]
        self.missing = len(missing)
        self.count["calls"] += len(missing)
        self.count["calls_from_disk"] += len(calls) - len(missing)
        list(self.pool.map(self._ask, missing))         # raises what ends the evaluation
        return [self._choice(game, key) for game, (key, _, _) in zip(games, calls)]

    def _choice(self, game, key):
        """What an answer plays; a failed call plays as one that names no action."""
        text = None
        if key in self.kept:
            self.used.append(read_answer(self.kept[key]))
            text = self.used[-1].text
        # subtle: a generator for each call, so that what one game draws changes no other game
        fallback = np.random.default_rng([int(key[0], 16), key[1]])
        legal = game.legal_actions()
        index, named, _ = choose(text or "", legal, fallback)
        return Choice(legal[index], index, named, text)

    def counts(self) -> dict:
        """What came of the calls made now, then of all answers that played, from disk too."""
        usage = [answer.usage for answer in self.used if answer.usage]
        models = {answer.model for answer in self.used if answer.model}
        odd = Counter(answer.odd for answer in self.used if answer.odd)
        return {
            "endpoint": self.url, "answered_by": printable(", ".join(sorted(models))),
            "temperature": ("the endpoint's default" if self.temperature is None
                            else self.temperature),
            "calls": self.count["calls"], "calls_from_disk": self.count["calls_from_disk"],
            "failed_calls": self.failed.total(),
            "failed_by_kind": dict(sorted(self.failed.items())),
            "retries": self.count["requests"] - self.count["calls"],    # beyond a call's first
            "prompt_tokens": sum(prompt for prompt, _ in usage),
            "completion_tokens": sum(answer for _, answer in usage),
            "answers_without_usage": len(self.used) - len(usage),
            "answers_cut": sum(answer.cut for answer in self.used),
            "odd_answers": dict(sorted(odd.items())),
        }
