"""A model behind an OpenAI-compatible endpoint plays; every answer is kept on disk, so none is paid for twice.

    pip install -r extras/requirements-endpoint.txt
    OPENAI_API_KEY=… python eval.py --task points24 --endpoint https://api.openai.com/v1 --model NAME --episodes 200
    python eval.py --task blackjack --endpoint http://localhost:8000/v1 --model NAME --temperature 0.2      # no key

Prompt, reading of the answer and statistics are everybody's (parse.py, eval.py). Sent are the picture as PNG, the
prompt, the longest answer's length and, where one is given, the temperature. No seed: some endpoints refuse it, and one
that heeds it would answer the same state alike in every game. Without a key in $OPENAI_API_KEY a placeholder is sent,
which local servers ignore.

A call that fails after the client's retries plays a uniformly random action; it is counted, left out of the parse rate
and not kept, so the same command asks it again. An answer without text is an answer, and is kept.
Does not handle: streaming, Azure's URLs, prices; where an answer's action part begins (Choice.action_start is None).
"""

import base64
import concurrent.futures as futures
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from parse import choose, make_prompt
from plumbing.checkpoint import append_line, locked, write_whole
from plumbing.errors import ModelError, foreign
from rollout import Choice

UNUSABLE = ("401", "402", "403", "404")     # no key, no money, no access, no such model: no other call fares better
GIVE_UP = 20                                # so many failed calls in a row, and nobody answers there any more


class Answer(NamedTuple):
    """What one response says."""
    text: str                           # "" where there is none
    odd: str | None                     # "content list", "refusal", "no text": not the text that was asked for
    cut: bool                           # it reached the longest answer's length
    usage: tuple[int, int] | None       # prompt and completion tokens, where the endpoint tells
    model: str | None                   # the model that says it has answered


def read_answer(body) -> Answer:
    """Read a response's JSON, whatever it is; ValueError where it holds no answer.

    >>> read_answer({"choices": [{"message": {"content": "I choose hit."}, "finish_reason": "length"}]})
    Answer(text='I choose hit.', odd=None, cut=True, usage=None, model=None)
    """
    part = lambda thing, key, kind: found if isinstance(found := thing.get(key), kind) else kind()
    choices = part(body, "choices", list) if isinstance(body, dict) else []
    if not choices or not isinstance(choices[0], dict) or not isinstance(choices[0].get("message"), dict):
        raise ValueError("no choices")
    message, usage, odd = choices[0]["message"], part(body, "usage", dict), None
    text, pieces = part(message, "content", str), part(message, "content", list)
    if pieces:
        text, odd = "".join(part(piece, "text", str) for piece in pieces if isinstance(piece, dict)), "content list"
    if not text:
        odd = "refusal" if message.get("refusal") else "no text"
    tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Answer(text, odd, choices[0].get("finish_reason") == "length",
                  tokens if all(type(count) is int for count in tokens) else None, part(body, "model", str) or None)


def seal(row: dict) -> str:
    """A hash of a kept call, by which a damaged line is told from a whole one."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


class EndpointPlayer:
    """A function (games, pictures, infos) → a Choice for each game, to be used in a `with`; see the file's header.

    url: up to where /chat/completions is added; folder: of calls.jsonl, None for runs/endpoint-MODEL; concurrency:
    calls at once; seed: with another one other answers are drawn; temperature: None for the endpoint's default; greedy:
    0; max_retries, timeout (s, of each try): the client's. ModelError where the endpoint cannot be used.

    subtle: answers are draws, so the k-th time that a state is met takes the k-th answer kept for it. An evaluation
    hangs on its answers alone, so a resumed one meets the same states and asks only what is missing.
    """

    def __init__(self, url, model, folder=None, concurrency=8, seed=0, cot=True, max_new_tokens=256, temperature=None,
                 greedy=False, max_retries=4, timeout=120.0):
        try:
            import openai
        except ImportError as error:
            raise ModelError("--endpoint needs the openai package: pip install -r extras/requirements-endpoint.txt"
                             ) from error
        with foreign("--endpoint", ValueError):
            parts = urlsplit(url)
            parts.port                                  # noqa: B018 (it is looked at, and refused, only when asked for)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ModelError("--endpoint must be like https://api.openai.com/v1, without a name or a password in it")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise ModelError("$OPENAI_API_KEY holds characters that no key has: set it anew")
        self.openai, self.url, self.model, self.cot = openai, url.rstrip("/"), model, cot
        self.folder = Path(folder or "runs/endpoint-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model)[:100])
        self.concurrency, self.seed, self.max_new_tokens = concurrency, seed, max_new_tokens
        self.temperature, self.limit_name = 0.0 if greedy else temperature, "max_tokens"
        with foreign("the HTTP client (a proxy in the environment?)", (ImportError, ValueError)):
            http = openai.DefaultHttpxClient(event_hooks={"request": [self._request]})
        self.client = openai.OpenAI(api_key=key, base_url=self.url, max_retries=max_retries, timeout=timeout,
                                    http_client=http)
        self.lock = threading.Lock()
        self.kept, self.met = {}, Counter()             # (request's hash, k) → body; how often each request was met
        self.count, self.failed, self.failed_in_a_row, self.missing = Counter(), Counter(), 0, 0
        self.used, self.over = [], False                # the Answers that played; whether to make no call any more

    # -- on disk
    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder, "--transcripts"))
            self.file = self.folder / "calls.jsonl"
            with foreign(self.file):
                lines = self.file.read_bytes().split(b"\n") if self.file.exists() else [b""]
                whole = [self._take_up(line) for line in lines]
                damaged = [number for number, line in enumerate(lines, 1) if line and not whole[number - 1]]
                if damaged:
                    print(f"note: {self.file} had damaged lines ({', '.join(map(str, damaged))}), which are dropped: "
                          "these calls are made again")
                if damaged or lines[-1]:                # subtle: a line without an end would swallow the next one
                    write_whole(self.file, "".join(line.decode() + "\n" for line in itertools.compress(lines, whole)))
            self.pool = stack.enter_context(futures.ThreadPoolExecutor(self.concurrency))
            self.bar = stack.enter_context(tqdm(desc=self.model, unit=" calls", disable=None))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, *_):
        if kind:
            print(f"waiting for the calls under way; all answers are kept in {self.folder}, the same command goes on",
                  flush=True)
        self.over = True                                # no retries any more
        self.pool.shutdown(cancel_futures=True)         # what is under way is paid for, and is kept
        self.stack.close()
        self.client.close()
        if self.failed and not kind:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(self.failed.items()))
            print(f"note: failed calls: {self.failed.total()} ({kinds}); a random action was played instead, and the "
                  "same command asks them again")

    def _take_up(self, line):
        """Take a line of the file as a kept answer; False where it is damaged."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            row = json.loads(line)
            if row.pop("seal") == seal(row):
                self.kept[row["request"], row["k"]] = row["body"]
                return True
        return False

    # -- one call, in one of the pool's threads
    def _count(self, what):
        with self.lock:
            self.count[what] += 1

    def _request(self, request):
        """The client is about to send: a call, or a retry."""
        if self.over:
            raise ModelError("stopped")
        self._count("requests")

    def _post(self, prompt, picture):
        """Return the text of a response."""
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        said = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        options = {"model": self.model, "messages": [{"role": "user", "content": said}]}
        options |= {} if self.temperature is None else {"temperature": self.temperature}
        create, name = self.client.chat.completions.with_raw_response.create, self.limit_name
        try:
            return create(**options, **{name: self.max_new_tokens}).text
        except self.openai.BadRequestError as error:
            if name != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self.limit_name = "max_completion_tokens"   # the newer name: some want it, others do not know it
            return create(**options, max_completion_tokens=self.max_new_tokens).text

    def _ask(self, request, k, prompt, picture):
        """Make a call and keep its answer at once, or count how it failed."""
        if self.over:                                   # a call before this one raised what ends the evaluation
            return
        self._count("calls")
        try:
            body = json.loads(self._post(prompt, picture))
            read_answer(body)
        except self.openai.APITimeoutError as error:
            kind, said = "time-out", error
        except self.openai.APIConnectionError as error:
            said = error.__cause__
            kind = "no connection" if type(said).__name__ == "ConnectError" else "broken off"
        except self.openai.APIStatusError as error:
            kind, said = str(error.status_code), error
        except (json.JSONDecodeError, RecursionError) as error:
            kind, said = "not JSON", error
        except ValueError as error:
            kind, said = "no choices", error
        else:
            row = {"request": request, "k": k, "prompt": prompt, "body": body}
            with self.lock:
                append_line(self.file, row | {"seal": seal(row)})
                self.kept[request, k], self.failed_in_a_row = body, 0
                self.bar.update()
            return
        with self.lock:
            self.failed[kind] += 1
            self.failed_in_a_row += 1
            self.bar.set_postfix(failed=self.failed.total())
            patience = max(GIVE_UP, 2 * self.concurrency) if self.kept else min(self.concurrency, self.missing)
            if kind in UNUSABLE or self.failed_in_a_row >= patience:
                self.over = True
                raise ModelError(f"{self.model!r} at {self.url} does not answer ({kind}: {str(said)[:300]}): check "
                                 "--endpoint (most end in /v1), --model and $OPENAI_API_KEY")

    # -- a step of the games
    def __call__(self, games, pictures, infos):
        calls = []
        for game, picture, info in zip(games, pictures, infos):
            prompt = make_prompt(game, info, self.cot)
            asked = [self.url, self.model, prompt, self.temperature, self.max_new_tokens, self.seed, picture.shape]
            request = hashlib.sha256(json.dumps(asked).encode() + picture.tobytes()).hexdigest()
            calls.append((request, self.met[request], prompt, picture))
            self.met[request] += 1
        missing = [call for call in calls if call[:2] not in self.kept]
        self.missing = len(missing)
        self.count["calls_from_disk"] += len(calls) - len(missing)
        running = [self.pool.submit(self._ask, *call) for call in missing]
        for ended in futures.wait(running, return_when=futures.FIRST_EXCEPTION).done:
            ended.result()                              # raises what ended it
        return [self._choice(game, *call[:2]) for game, call in zip(games, calls)]

    def _choice(self, game, request, k):
        # subtle: a generator for each call, so that what one game draws changes no other game
        legal, fallback = game.legal_actions(), np.random.default_rng([int(request, 16), k])
        if (request, k) not in self.kept:
            return Choice(legal[index := int(fallback.integers(len(legal)))], index, named=False)
        answer = read_answer(self.kept[request, k])
        self.used.append(answer)
        index, named, _ = choose(answer.text, legal, fallback)
        return Choice(legal[index], index, named, answer.text)

    def counts(self) -> dict:
        """What came of the calls, for the result. calls: made now, failed ones among them; retries: requests beyond a
        call's first; tokens and what follows: of all answers that played, those from disk too.
        """
        told = [answer.usage for answer in self.used if answer.usage]
        return {"endpoint": self.url, "answered_by": ", ".join(sorted({one.model for one in self.used if one.model})),
                "temperature": "the endpoint's default" if self.temperature is None else self.temperature,
                "calls": self.count["calls"], "calls_from_disk": self.count["calls_from_disk"],
                "failed_calls": self.failed.total(), "failed_by_kind": dict(sorted(self.failed.items())),
                "retries": self.count["requests"] - self.count["calls"],
                "prompt_tokens": sum(prompt for prompt, _ in told), "completion_tokens": sum(made for _, made in told),
                "answers_without_usage": len(self.used) - len(told),
                "answers_cut": sum(answer.cut for answer in self.used),
                "odd_answers": dict(sorted(Counter(one.odd for one in self.used if one.odd).items()))}
