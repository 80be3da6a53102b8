"""Endpoints, pages, TensorBoard, model cards, leaving with a model."""

import base64
import contextlib
import gzip
import hashlib
import html
import http.server
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor

import eval as evaluation
import parse
import players
import rollout as playing
import sft
import train
from env import GAMES
from extras import viewer
from extras.endpoint import EndpointPlayer
from games import draw
from plumbing import card, flags, loading, manifest
from plumbing.adapters import PolicyFiles
from plumbing.errors import ModelError
from plumbing.loading import find_model
from plumbing.report import Report
from plumbing.settings import Settings, resolve
from tests.common import pocket_settings, run_metrics, shake, states_of

HERE = Path(__file__).parent.parent


GOOD = {"model": "stub-1", "choices": [{"message": {"content": parse.make_answer("stand", "I choose stand.")}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3}}


class Stub:
    """A server on the loopback: reply(n-th call, its JSON) → a response's JSON, or what goes wrong with it."""

    def __init__(self, reply):
        self.reply, self.bodies, self.keys, self.over = reply, [], [], threading.Event()
        lock, stub = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            wbufsize = -1               # head and body leave at once: else the client's system waits 40 ms between them

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(stub.bodies)
                    stub.bodies.append(asked)
                    stub.keys.append(self.headers["authorization"])
                    found = stub.reply(number, asked)
                self.send(found)

            def send(self, found):
                status, text = found if isinstance(found, tuple) else (200, json.dumps(found))
                if found == "slow":
                    stub.over.wait(30)
                if found in ("nothing", "slow"):
                    return
                if found in ("drips", "endless", "packed"):
                    return self.send_without_end(found)
                text = "{'garbage" if found == "garbage" else text
                self.send_response(status)
                self.send_header("retry-after-ms", "1")
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text) + (50 if found == "half" else 0)))
                self.end_headers()
                self.wfile.write(text.encode())

            def send_without_end(self, found):
                self.send_response(200)
                if found == "packed":
                    self.send_header("content-encoding", "gzip")
                self.end_headers()
                part = gzip.compress(bytes(10**6)) if found == "packed" else b" " * (1 if found == "drips" else 10**6)
                with contextlib.suppress(OSError):          # until the client hangs up
                    while not stub.over.wait(0.1 if found == "drips" else 0):
                        self.wfile.write(part)
                        self.wfile.flush()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def endpoint_player(tmp_path, monkeypatch):
    """EndpointPlayer on one folder of answers, without a key in the environment, quick to give up a call."""
    pytest.importorskip("openai", reason="pip install -r extras/requirements-endpoint.txt")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    known = {}                                              # each picture is made a PNG once: that takes longest

    def data_url(picture):
        key = picture.tobytes()
        known[key] = known.get(key) or viewer.data_url(picture)
        return known[key]

    monkeypatch.setattr("extras.endpoint.data_url", data_url)
    return lambda stub, **options: EndpointPlayer(stub.url, "stub", **(
        {"folder": tmp_path / "kept", "concurrency": 1, "max_retries": 0, "timeout": 30} | options))


def changed(message=None, **choice):
    """The good response with another message or choice."""
    return GOOD | {"choices": [GOOD["choices"][0] | choice | ({"message": message} if message else {})]}


def test_each_fault_is_counted_and_only_what_failed_is_asked_again(endpoint_player, capsys, tmp_path):
    text = GOOD["choices"][0]["message"]["content"]
    faults = [GOOD, (429, "{}"), (500, "oh"), "slow", "half", "nothing", "garbage", (200, "[" * 100_000),
              GOOD | {"choices": []}, (200, "[]"), (400, "{}"),
              changed({"content": None}), changed({"content": None, "refusal": "I cannot play."}),
              changed({"content": [{"type": "thinking"}, {"type": "text", "text": text}]}),
              changed(finish_reason="length"), {key: GOOD[key] for key in ("model", "choices")}]
    states = list(zip(*states_of("blackjack", len(faults))))
    with Stub(lambda number, _: faults[number]) as stub, endpoint_player(stub, timeout=1.5) as player:
        choices = player(*states)
        counts = player.counts()
    assert counts["failed_by_kind"] == {"400": 1, "429": 1, "500": 1, "broken off": 2, "no choices": 2, "not JSON": 2,
                                        "time-out": 1}
    assert (counts["calls"], counts["failed_calls"], counts["calls_from_disk"], counts["retries"]) == (16, 10, 0, 0)
    assert counts["odd_answers"] == {"content list": 1, "no text": 1, "refusal": 1} and counts["answers_cut"] == 1
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["answers_without_usage"]) == (50, 15, 1)
    assert counts["answered_by"] == "stub-1" and counts["temperature"] == "the endpoint's default"
    assert [choice.text for choice in choices] == [text, *10 * [None], "", "", text, text, text]
    assert [choice.named for choice in choices] == [True, *12 * [False], True, True, True]
    assert "failed calls: 10 (" in (said := capsys.readouterr().out) and "asks them again" in said
    sent = stub.bodies[0]
    assert sent["model"] == "stub" and sent["max_tokens"] == 256 and not {"temperature", "seed"} & set(sent)
    assert set(stub.keys) == {"Bearer none"}

    with Stub(lambda *_: GOOD) as stub, endpoint_player(stub) as player:    # another port is another endpoint
        player.url = counts["endpoint"]
        again = player(*states)
        assert len(stub.bodies) == player.counts()["calls"] == 10 and player.counts()["calls_from_disk"] == 6
    assert again[11:] == choices[11:] and all(choice.text == text for choice in again[:11])

    file = tmp_path / "kept" / "calls.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = lines[0].replace("I choose stand", "I choose Stand")         # still JSON, not what was answered
    file.write_text("\n".join([lines[0], "", "7", *lines[1:-1], lines[-1][:-30]]))
    for asked in (2, 0):
        with Stub(lambda *_: GOOD) as stub, endpoint_player(stub) as player:
            player.url = counts["endpoint"]
            player(*states)
            assert len(stub.bodies) == asked
            assert ("damaged lines (1, 3, 18)" in capsys.readouterr().out) == bool(asked)      # said once, then mended
            with pytest.raises(ModelError, match="in use by process .* --transcripts"), endpoint_player(stub):
                pass

    drawn = []                                              # what an unreadable answer plays hangs on no other game
    with Stub(lambda *_: changed({"content": "Well."})) as stub:
        for step in (1, -1):
            with endpoint_player(stub) as player:
                drawn.append([choice.index for choice in player(*(part[::step] for part in states))][::step])
        for changed_one in ({"seed": 1}, {"temperature": 0.3}, {"max_new_tokens": 9}):      # other draws
            with endpoint_player(stub, **changed_one) as player:
                player(*states)
                assert player.counts()["calls"] == len(faults)
    assert drawn[0] == drawn[1] and set(drawn[0]) == {0, 1}


def test_a_response_without_end_is_a_failed_call(endpoint_player, monkeypatch):
    """Bytes that drip past each single time-out, megabytes without end, a little that would unpack to a lot."""
    states, replies = list(zip(*states_of("blackjack", 4))), [GOOD, "drips", "endless", "packed"]
    monkeypatch.setattr("extras.endpoint.LARGEST", 2 * 10**6)
    with Stub(lambda number, _: replies[number]) as stub, endpoint_player(stub, timeout=0.5) as player:
        assert [choice.text is None for choice in player(*states)] == [False, True, True, True]
        assert player.counts()["failed_by_kind"] == {"time-out": 1, "too large": 2}


def test_an_error_inside_an_http_200_is_treated_as_its_status(endpoint_player):
    states, inside = list(zip(*states_of("blackjack", 3))), {"error": {"code": 429, "message": "slow down"}}
    with Stub(lambda number, _: GOOD if number in (2, 3, 5) else inside) as stub:
        with endpoint_player(stub, max_retries=2) as player:
            assert all(choice.named for choice in player(*states)) and player.counts()["retries"] == 3
    forbidden = {"error": {"code": 403, "message": "no pictures of cards"}}
    with Stub(lambda number, _: forbidden if number == 1 else GOOD) as stub, endpoint_player(stub) as player:
        player.seed = 1                                     # other draws: nothing is taken from disk
        player(*states)
        assert player.counts()["failed_by_kind"] == {"403": 1}


def test_of_many_calls_that_fail_at_once_the_first_says_why(endpoint_player, tmp_path):
    """The others, stopped by it, have nothing to add: each race ends with the server's own words."""
    states = list(zip(*states_of("blackjack", 30)))
    with Stub(lambda *_: (401, '{"error": {"message": "no such key"}}')) as stub:
        for race in range(5):
            with pytest.raises(ModelError) as error:
                with endpoint_player(stub, concurrency=8, max_retries=1, folder=tmp_path / str(race)) as player:
                    player(*states)
            assert str(error.value).count("does not answer (401: ") == 1 and "no such key" in str(error.value)


def test_the_clients_retries_are_counted_and_calls_run_at_once(endpoint_player):
    states = list(zip(*states_of("blackjack", 12)))
    with Stub(lambda number, _: [(429, "{}"), (503, ""), GOOD][min(number, 2)]) as stub:
        with endpoint_player(stub, max_retries=2, greedy=True) as player:
            player(*states)
            assert player.counts()["retries"] == 2 and player.counts()["failed_calls"] == 0
    assert len(stub.bodies) == 14 and {asked["temperature"] for asked in stub.bodies} == {0.0}

    barrier = threading.Barrier(4)                                          # answers come only if four calls wait
    with Stub(lambda *_: GOOD) as stub, endpoint_player(stub, concurrency=4) as player:
        post, player._post = player._post, lambda *given: (barrier.wait(30), post(*given))[1]
        player(*states)
    assert len(stub.bodies) == 12

    def newer(_, asked):                                                    # as OpenAI's own newer models say it
        return (400, '{"error": {"message": "Use max_completion_tokens"}}') if "max_tokens" in asked else GOOD
    with Stub(newer) as stub, endpoint_player(stub, max_new_tokens=77) as player:
        assert all(choice.named for choice in player(*states))
    assert len(stub.bodies) == 13 and stub.bodies[-1]["max_completion_tokens"] == 77


def test_an_endpoint_that_cannot_be_used_ends_with_a_sentence(endpoint_player, tmp_path, monkeypatch):
    states = list(zip(*states_of("blackjack", 30)))
    for status, asked, advice in ((401, 1, "OPENAI_API_KEY"), (404, 1, "OPENAI_API_KEY"), (503, 8, "try later"),
                                  (400, 8, "leave --temperature out")):     # none, or none of the first eight, plays
        with Stub(lambda *_, status=status: (status, '{"error": {"message": "no such thing"}}')) as stub:
            with pytest.raises(ModelError, match=f"does not answer.*{status}.*{advice}"):
                with endpoint_player(stub, concurrency=8 if asked > 1 else 1) as player:
                    player(*states)
        assert asked <= len(stub.bodies) < asked + (8 if asked > 1 else 1)
    with pytest.raises(ModelError, match="no connection: .*refused"):
        with endpoint_player(stub) as player:
            player(*states)
    inside = {"error": {"code": 429, "message": "slow\x1b[2J down"}}           # as some servers say it under HTTP 200
    with Stub(lambda *_: inside) as stub, pytest.raises(ModelError, match=r"429: .*slow\\x1b\[2J down.*try later"):
        with endpoint_player(stub) as player:
            player(*states)
    # one state's 403 (moderation) among answers: it is asked again, the rest goes on
    with Stub(lambda number, _: (403, "{}") if number == 5 else GOOD) as stub:
        with endpoint_player(stub, concurrency=1) as player:
            assert len(player(*states)) == 30 and player.counts()["failed_calls"] == 1
    for url in ("localhost:8000", "http://me:secret@localhost/v1", "http://:secret@localhost/v1",
                "http://localhost:abc/v1", "http://localhost:99999/v1", "http://[1"):
        with pytest.raises(ModelError, match="endpoint") as error:
            EndpointPlayer(url, "stub")
        assert "secret" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")     # as a file's last line ends
    with Stub(lambda *_: GOOD) as stub, endpoint_player(stub) as player:
        player(*states)
        assert stub.keys[0] == "Bearer sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    with pytest.raises(ModelError, match="OPENAI_API_KEY holds characters") as error:
        endpoint_player(stub)
    assert "cret" not in str(error.value)
    with pytest.raises(SystemExit, match="requirements-endpoint.txt"):
        monkeypatch.setitem(sys.modules, "openai", None)
        evaluation.main(["--task", "blackjack", "--endpoint", "http://127.0.0.1:9/v1", "--model", "stub"])


@pytest.mark.parametrize("how", ["the server refuses", "Ctrl-C"])
def test_an_interrupted_evaluation_goes_on_and_pays_for_no_answer_twice(how, endpoint_player, tmp_path, capsys):
    """The same result, and in all as many answers given, as if nothing had happened."""
    def drawing():
        met, given = Counter(), []

        def reply(_, asked):                            # the k-th answer to a state is a draw of its own; some say none
            key = json.dumps(asked)
            if len(given) == stops_at[0]:
                return (500, "{}")
            met[key] += 1
            given.append(key)
            digit = int(hashlib.sha256(f"{key}{met[key]}".encode()).hexdigest(), 16)
            return changed({"content": parse.make_answer("+-?"[digit % 3], "I choose it.")})
        return reply, given

    def command(stub, folder):
        return ["--task", "numberline", "--endpoint", stub.url, "--model", "stub", "--episodes", "24", "--num-envs",
                "5", "--concurrency", "1", "--transcripts", str(tmp_path / folder)]

    stops_at = [None]
    reply, whole = drawing()
    with Stub(reply) as stub:
        evaluation.main(command(stub, "whole"))
        expected = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(whole) == expected["calls"] == expected["steps"] > 40 and 0.3 < expected["parse_rate"] < 0.9
        stub.reply, given = drawing()
        cut = endpoint_player(stub, folder=tmp_path / "cut", seed=Settings.eval_seed)
        if how == "Ctrl-C":
            seen = []

            def watch(_, choice, __):
                if choice:              # None is a game's end; how many end by then is chance's, which goes by the port
                    seen.append(choice)
                if len(seen) == 30:
                    raise KeyboardInterrupt
            with pytest.raises(KeyboardInterrupt), cut as player:
                evaluation.evaluate(player, "numberline", 24, Settings.eval_seed, 5, watch=watch)
        else:
            stops_at[0] = 30
            # 20 failed calls in a row end it; the games went on at random meanwhile
            with pytest.raises(ModelError, match="500"), cut as player:
                evaluation.evaluate(player, "numberline", 24, Settings.eval_seed, 5)
            stops_at[0] = None
        assert 0 < len(given) < len(whole) and "the same command goes on" in capsys.readouterr().out
        evaluation.main(command(stub, "cut"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(given) == sorted(whole)
    assert result["calls"] + result["calls_from_disk"] == expected["calls"] and result["calls_from_disk"] == 30
    assert all(result[key] == expected[key] for key in set(result) - {"calls", "calls_from_disk"})


def test_a_server_with_the_experts_answers_plays_as_the_expert(endpoint_player):
    """Prompt and picture arrive whole: an answer is looked up by both, the picture as decoded from its PNG."""
    answers, script = {}, players.scripted_player("expert", "points24", 0)

    def noting(games, pictures, infos):
        choices = script(games, pictures, infos)
        for game, picture, info, choice in zip(games, pictures, infos, choices):
            thoughts = game.thoughts(info, choice.action)
            answers[parse.make_prompt(game, info), picture.tobytes()] = parse.make_answer(choice.action, thoughts)
        return choices

    def reply(_, asked):
        image, text = asked["messages"][0]["content"]
        png = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        picture = np.asarray(draw.Image.open(io.BytesIO(png)))
        return changed({"content": answers[text["text"], picture.tobytes()]})

    expected = evaluation.evaluate(noting, "points24", 6, 0)
    with Stub(reply) as stub, endpoint_player(stub, concurrency=4) as player:
        found = evaluation.evaluate(player, "points24", 6, 0)
    spoken = {"parse_rate", "reading_rate", "plan_rate", "plan_followed", "lost_by"}   # the script says nothing
    assert {key: found[key] for key in set(found) - spoken} == {key: expected[key] for key in set(found) - spoken}
    assert found["parse_rate"] == found["reading_rate"] == found["plan_rate"] == 1.0


class Scripts(HTMLParser):
    """What a browser takes the page for: the text of each <script>, every address, every tag that was opened."""

    def __init__(self, file):
        super().__init__()
        self.scripts, self.addresses, self.tags, self.inside = [], [], [], False
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag == "script"
        self.scripts += [""] * self.inside
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def page_data(file):
    """The figures in a page, which holds nothing from elsewhere and no script that is not ours."""
    page = Scripts(file)
    assert len(page.scripts) == 2 and "use strict" in page.scripts[1] and "{{" not in page.text
    assert not page.addresses and not re.search(r"https?://|url\(|@import|fetch\(|innerHTML", page.text)
    return json.loads(page.scripts[0])


def check_side(task, seed, side):
    """The game again from the actions alone, the sums again from the tokens."""
    game, total = GAMES[task](), 0
    picture, info = game.reset(seed=seed)
    for k, step in enumerate(side["steps"]):
        shown = draw.Image.open(io.BytesIO(base64.b64decode(step["picture"].partition("base64,")[2])))
        assert np.array_equal(np.asarray(shown), picture) and step["info"] == json.loads(json.dumps(info))
        assert step["expert"] == game.best_actions(info)
        if step["text"] is not None:
            assert step["prompt"] == parse.make_prompt(game, info, side["cot"])
            named, start = parse.parse(step["text"], game.legal_actions())
            assert (step["named"], step["action_character"]) == (named is not None, start)
            assert named in (None, step["action"])
        if "tokens" in step:
            parts = sum(step["logp"][:step["action_token"]]), sum(step["logp"][step["action_token"]:])
            assert "".join(step["tokens"]) == step["text"] and len(step["tokens"]) == len(step["logp"])
            assert len("".join(step["tokens"][:step["action_token"]])) <= step["action_character"]
            assert (step["thought_logp"], step["action_logp"]) == pytest.approx(parts, abs=1e-4)
            assert step["weighted_logp"] == pytest.approx(side["lambda"] * parts[0] + parts[1], abs=1e-4)
        picture, reward, terminated, truncated, info = game.step(game.legal_actions().index(step["action"]))
        total += reward
        assert (step["reward"], step["return"]) == (reward, total)
        assert step["unnamed_reward"] == (0 if step["named"] else game.unnamed_reward)
        assert (terminated or truncated) == (k == len(side["steps"]) - 1)
    end = side["end"]
    assert (end["return"], end["truncated"], end["success"]) == (total, truncated, info["is_success"])
    if side["learned"]:
        # A_t = Σ_k (γ λ_gae)^k δ_{t+k}, written out
        values = [*(step["value"] for step in side["steps"]), end.get("value", 0)]
        assert ("value" in end) == truncated
        deltas = [side["reward_scale"] * (step["reward"] + step["unnamed_reward"]) + side["gamma"] * after - now
                  for step, now, after in zip(side["steps"], values, values[1:])]
        for t, step in enumerate(side["steps"]):
            discounted = [(side["gamma"] * side["gae_lambda"]) ** k * delta for k, delta in enumerate(deltas[t:])]
            assert step["advantage"] == pytest.approx(sum(discounted), abs=1e-5)


@pytest.mark.parametrize("task", GAMES)
def test_a_pages_figures_are_the_games_and_the_tokens(task, tmp_path, capsys):
    """Before RL (no V yet), beside a script; the answers are the evaluation's own."""
    evaluation.main(["--task", task, "--model", "pocket", "--beside", "random", "--episodes", "1", "--seed", "10003",
                     "--max-new-tokens", "60", "--render", str(tmp_path / "game.html")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    data = page_data(tmp_path / "game.html")
    model, script = data["sides"]
    for side in (model, script):
        check_side(task, data["seed"], side)
    assert (model["name"], script["name"], model["lambda"], model["learned"]) == ("pocket", "random", 0.5, False)
    assert (result["steps"], result["return_mean"]) == (len(model["steps"]), model["end"]["return"])
    assert all(step["tokens"] and step["value"] is None and "advantage" not in step for step in model["steps"])
    assert all(step["text"] is None and "tokens" not in step for step in script["steps"])


def test_a_runs_page_has_its_advantages(stopped_run, tmp_path, capsys):
    """A random model of four tokens an answer: all drawn at random, with this seed until the time is out."""
    folder, command = stopped_run
    model = command[command.index("--model") + 1]
    evaluation.main(["--task", "numberline", "--run", str(folder), "--beside", model, "--episodes", "1",
                     "--seed", "10000", "--max-new-tokens", "4", "--render", str(tmp_path / "game.html")])
    data = page_data(tmp_path / "game.html")
    run, plain = data["sides"]
    config = json.loads((folder / "config.json").read_text())
    assert run["learned"] and not plain["learned"] and run["end"]["truncated"]
    assert {key: run[key] for key in ("gamma", "gae_lambda", "reward_scale")} == {
        key: config[key] for key in ("gamma", "gae_lambda", "reward_scale")}
    assert run["lambda"] == config["cot_lambda"]
    for side in (run, plain):
        check_side("numberline", data["seed"], side)
    assert "/" not in plain["name"]                                     # not where the folder lies on this machine
    policy, _ = players.open_run(folder)
    picture, info = GAMES["numberline"]().reset(seed=data["seed"])
    [prompt] = policy.encode([picture], [run["steps"][0]["prompt"]])
    assert policy.value([prompt]).item() == pytest.approx(run["steps"][0]["value"], abs=1e-5)


@pytest.mark.parametrize("cot, tokens", [(True, 60), (False, 60), (True, 3)])
def test_advantages_are_of_scaled_rewards_and_what_an_unnamed_action_costs(agent, monkeypatch, cot, tokens):
    """Rewards of 10 scaled, a head that is not trained but counts; three tokens name no action, which costs one. Each
    side shows its own λ."""
    monkeypatch.setattr(GAMES["ezpoints"], "unnamed_reward", -1.0)
    agent.value_head.fitted.fill_(True)
    settings = pocket_settings("ezpoints", cot=cot, max_new_tokens=tokens, cot_lambda=0.3, gamma=0.8, gae_lambda=0.7)
    sides = [(agent, "untrained", settings), (None, "random", replace(settings, cot_lambda=0.9))]
    side, other = viewer.Page("ezpoints", 10_004, False, sides).data()["sides"]
    check_side("ezpoints", 10_004, side)
    assert side["learned"] and len({step["value"] for step in side["steps"]}) > 1
    assert (side["reward_scale"], side["lambda"], other["lambda"]) == (0.1, 0.3, 0.9)
    assert tokens > 3 or not any(step["named"] for step in side["steps"])


def test_both_sides_of_a_page_play_the_same_house():
    options = evaluation.make_parser().parse_args(["--task", "alfworld", "--run", "a", "--render", "game.html",
                                                   "--beside", "random"])
    settings = pocket_settings("alfworld", game=("receptacles=8",))
    _, given = viewer.asked_beside(options, {}, settings)
    assert given == {"game": ("receptacles=8",)} and settings.game_options == {"receptacles": 8}


HOSTILE = ['</script><script>alert(1)</script><img src=x onerror=alert(1)>', '<!--<script>', '{"action"}</SCRIPT >',
           ']]>&lt;{{data}}{{script}}', '\u2028\u2029\x00\ud800"\\']


@pytest.mark.parametrize("text", HOSTILE)
def test_an_answer_cannot_break_out_of_a_page(text, tmp_path):
    for legal in (False, True):
        answer = text + '{"action": "stand"}' if legal else text
        page = viewer.Page("blackjack", 0, False, [(None, text, pocket_settings("blackjack"))])
        page(None, playing.Choice("stand", 0, legal, answer), 0)
        page(None, playing.Choice("hit", 1, True, "of another game"), 1)
        page.save(tmp_path / "game.html")
        plain, found = Scripts(HERE / "extras" / "viewer.html"), Scripts(tmp_path / "game.html")
        script = (HERE / "extras" / "viewer.js").read_text()
        assert found.tags == plain.tags and found.scripts[1].strip() == script.strip()
        [side] = json.loads(found.scripts[0])["sides"]
        assert side["steps"][0]["text"] == answer.replace("\ud800", "\ufffd") and len(side["steps"]) == 1
        assert not set("<>&\u2028\u2029") & set(found.scripts[0])


def test_a_token_that_ends_within_a_character_is_shown_with_the_next():
    policy = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
    assert viewer.pieces(policy, list("aé→b".encode())) == ["a", "", "é", "", "", "→", "b"]
    assert viewer.pieces(policy, list("é".encode())[:1]) == ["\ufffd"] and viewer.pieces(policy, []) == []


@pytest.mark.parametrize("arguments, message", [
    (["--policy", "random", "--beside", "no/such/folder"], "cannot find a model 'no/such/folder'"),
    (["--model", "pocket", "--beside", "runs?"], "cannot find a model 'runs?'"),
    (["--policy", "random", "--beside", "always:fly"], "no legal action")])
def test_nonsense_beside_is_refused_in_words(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(message)):
        evaluation.main(["--task", "blackjack", "--episodes", "1", *arguments, "--render", str(tmp_path / "x.html")])


def test_a_browser_shows_the_step_that_the_address_names(tmp_path, capsys):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium here to open the page with")
    page = tmp_path / "game.html"
    evaluation.main(["--task", "ezpoints", "--model", "pocket", "--beside", "expert", "--episodes", "1",
                     "--seed", "10002", "--render", str(page)])
    steps = page_data(page)["sides"][0]["steps"]
    # a script of the test's own behind the page's: it presses "next", as a reader would
    pressed = page.with_name("pressed.html")
    pressed.write_text(page.read_text().replace("</body>", '<script>$("next").click()</script></body>'))
    for address in (f"{page}#2", pressed):
        shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                                f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000", "--dump-dom",
                                f"file://{address}"], capture_output=True, text=True, timeout=120)
        text = html.unescape(re.sub(r"<[^>]*>", "", shown.stdout.split("<main")[1].split("</main>")[0]))
        assert steps[1]["text"] in text.replace("action v_act", "") and "plays" + steps[1]["action"] in text
        assert "step 2 of" in shown.stdout and "CONSOLE" not in shown.stderr and "Uncaught" not in shown.stderr
    assert steps[0]["text"] != steps[1]["text"]


def test_a_model_leaves_as_it_played(agent, tmp_path, monkeypatch):
    """The README's block, as it stands, on a checkpoint: what it leaves answers with the policy's own probabilities."""
    page = (HERE / "extras" / "README.md").read_text()
    block = re.search(r"## Leaving with your model.*?```python\n(.*?)```", page, re.S)[1]
    assert set(re.findall(r"(?:from|import) (\w+)(?: import)", block)) == {"peft", "transformers", "env", "parse"}
    assert len(block.splitlines()) <= 30
    shake(agent)
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(HERE / "checkpoints")
    Path("leave.py").write_text(block)
    PolicyFiles("pocket").save(agent, "runs/blackjack-seed1/checkpoint-000029")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        done = runpy.run_path("leave.py")
        model = AutoModelForImageTextToText.from_pretrained(done["merged"])
        inputs = AutoProcessor.from_pretrained(done["merged"], backend="pil").apply_chat_template(
            [{"role": "user", "content": done["parts"]}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt")
        drawn = model.generate(**inputs, temperature=1.0, max_new_tokens=24, num_return_sequences=4, output_scores=True,
                               return_dict_in_generate=True)
    theirs = model.compute_transition_scores(drawn.sequences, drawn.scores, normalize_logits=True)
    [prompt] = agent.encode([done["picture"]], [parse.make_prompt(done["game"], done["info"])])
    assert model.config.model_type == "llava" and inputs["input_ids"][0].tolist() == prompt.ids
    torch.testing.assert_close(inputs["pixel_values"], prompt.images["pixel_values"], atol=1e-6, rtol=0)
    answers = [[token for token in row[len(prompt.ids):].tolist() if token] for row in drawn.sequences]     # 0: padding
    ours, _ = agent.logprobs(4 * [prompt], answers)
    mask = torch.tensor([[place < len(answer) for place in range(ours.shape[1])] for answer in answers])
    torch.testing.assert_close(torch.where(mask, theirs[:, :ours.shape[1]], 0.0), ours, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for layer in agent.lora.values():
            layer.lora_B.zero_()
        assert (agent.logprobs(4 * [prompt], answers)[0] - ours).abs().max() > 0.1      # the adapters do something


def settings_of_command(written):
    """What the command in a model card comes to when it is given to train.py."""
    command = re.search("Trained by `python train.py (.*?)`", written)[1]
    options = vars(flags.make_parser(Settings).parse_args(shlex.split(command)))
    return resolve(Settings, options, find_model(options["model"], options["task"]))


def test_a_checkpoint_has_its_model_card(stopped_run):
    """What the hub reads of it, and its command. (That a resumed run writes the same bytes lab/torture.py sees.)"""
    written = (stopped_run[0] / "checkpoint-000002" / "README.md").read_text()
    data = ModelCard(written).data.to_dict()
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("peft", "unknown", "image-text-to-text")
    assert "base_model" not in data and "16 steps of PPO, 32 planned" in written      # a folder: the hub would refuse it
    config = json.loads((stopped_run[0] / "config.json").read_text())
    assert manifest.plain(settings_of_command(written)) == {
        name: value for name, value in config.items() if name not in Settings.changeable}


@pytest.mark.parametrize("task, given", [
    ("blackjack", {}), ("ezpoints", {"cot": False, "seed": 3, "target_modules": ("language",)}), ("alfworld", {}),
    ("points24", {"imitation": 8, "temperature": 0.3}),
    ("numberline", {"lr": 1e-5, "target_kl": 0.0, "temperature": 0.2}),
    ("alfworld", {"cot_lambda": 0.5, "num_envs": 64, "game": ("receptacles=8", "scene_text=false")})])
def test_a_cards_command_gives_the_runs_settings(tmp_path, task, given):
    """Also where the run's setting is another model's or game's default."""
    settings = pocket_settings(task, **given)
    card.write_card(tmp_path, "train.py", settings, settings.model, "0 of 29 updates by PPO")
    assert manifest.plain(settings_of_command((tmp_path / "README.md").read_text())) == manifest.plain(settings)


@pytest.mark.parametrize("base, licence, on_the_hub", [
    (loading.LLAVA_7B, "apache-2.0", True), ("some/model", "unknown", True), ("/some/model", "unknown", False),
    ("pocket", "mit", False)])
def test_a_card_claims_no_licence_that_it_does_not_know(tmp_path, base, licence, on_the_hub):
    settings = sft.SFTSettings(task="blackjack", model=base, target_modules=("language",), cot=False)
    card.write_card(tmp_path, "sft.py", settings, base, "Taught by an expert's play")
    written = (tmp_path / "README.md").read_text()
    data = ModelCard(written).data.to_dict()
    assert (data["license"], data.get("base_model")) == (licence, base if on_the_hub else None)
    parsers = {"sft.py": flags.make_parser(sft.SFTSettings), "eval.py": evaluation.make_parser()}
    taught, played = (parser.parse_args(shlex.split(re.search(f"`python {script} (.*?)`", written)[1]))
                      for script, parser in parsers.items())
    assert (taught.task, taught.model, taught.target_modules, taught.cot) == ("blackjack", base, ("language",), False)
    assert (played.task, played.model, played.cot) == ("blackjack", "FOLDER", False)


@pytest.mark.parametrize("script, cls", [("train.py", Settings), ("sft.py", sft.SFTSettings)])
def test_a_cards_command_names_each_flag_once(tmp_path, script, cls):
    settings = resolve(cls, {"task": "blackjack", "model": "pocket"}, find_model("pocket"))
    card.write_card(tmp_path, script, settings, "pocket", "Nothing yet")
    command = re.search(f"`python {script} (.*?)`", (tmp_path / "README.md").read_text())[1]
    given = [word for word in shlex.split(command) if word.startswith("--")]
    assert len(given) == len(set(given))


def event_reader():
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard: pip "
                               "install -r extras/requirements-tensorboard.txt").EventAccumulator


def test_tensorboard_shows_what_the_metrics_say(stopped_run, tmp_path, monkeypatch):
    """By TensorBoard's own reader. After a kill with points past the checkpoint each step is there once, for a reader
    that was open all the while as for a new one."""
    reader = event_reader()
    run, command = tmp_path / "run", [*stopped_run[1][:-2], "--eval-episodes", "2", "--save-every", "2"]

    def killed(report, update, *rest):
        if update == 4:
            raise KeyboardInterrupt
        return write(report, update, *rest)

    with monkeypatch.context() as stopped:
        write = Report.write
        stopped.setattr(Report, "write", killed)
        with pytest.raises(SystemExit):
            train.main([*command, "--tensorboard", "--out", str(run)])
    steps = lambda board: [event.step for event in board.Scalars("train/lr")]
    opened = reader(str(run / "tensorboard"))
    assert steps(opened.Reload()) == [8, 16, 24] and [path.name for path in run.glob("check*")] == ["checkpoint-000002"]
    train.main([*command[:2], "--out", str(run), "--resume"])
    rows = run_metrics(run)
    board = reader(str(run / "tensorboard")).Reload()
    assert steps(board) == steps(opened.Reload()) == [8, 16, 24, 32]
    for name in rows[0].keys() - {"update", "env_steps"}:
        points = [(row["env_steps"], row[name]) for row in rows if row[name] is not None]
        found = [(event.step, event.value) for event in board.Scalars(f"train/{name}")] if points else []
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name
    said = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("answer/text_summary")]
    lines = (run / "transcripts.jsonl").read_text().splitlines()
    assert len(said) == 4 and all(f"plays {json.loads(line)['action']}," in text for line, text in zip(lines, said))
    ends = [json.loads((run / f"{name}.json").read_text())["return_mean"] for name in ("eval_start", "eval")]
    assert [event.value for event in board.Scalars("held_out/return_mean")] == pytest.approx(ends, rel=1e-6)
    without = (stopped_run[0] / "metrics.jsonl").read_bytes()
    assert without.count(b"\n") == 2 and (run / "metrics.jsonl").read_bytes().startswith(without)


def test_tensorboard_may_be_missing_and_may_come_later(stopped_run, tmp_path, monkeypatch):
    """Without its package no run begins; a run that began without it goes on with it, and its board is whole."""
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(SystemExit, match="pip install -r extras/requirements-tensorboard.txt"):
            train.main([*stopped_run[1], "--tensorboard", "--out", str(tmp_path / "new")])
        assert not (tmp_path / "new" / "config.json").exists()
    reader = event_reader()
    shutil.copytree(stopped_run[0], tmp_path / "run")
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume", "--tensorboard"])
    board = reader(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/lr")] == [8, 16, 24, 32]
