"""Every claim of this repository against something independent, in the order that the data flows. A CPU, no network.

    pytest test_all.py
"""

import ast
import base64
import copy
import dataclasses
import doctest
import functools
import gc
import hashlib
import html
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"                     # one process a core: more threads would wait for each other

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from huggingface_hub import ModelCard
from hypothesis import given, strategies
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

import env
import eval as evaluation
import imitation
import parse
import players
import ppo
import rollout as playing
import sft
import train
from env import GAMES
from extras import (
    bench,
    features,
    plans,
    plot,
    pocket,
    pocket_alfworld,
    recorded,
    serve,
    shapes,
    speed_ablation,
    tables,
    tutorial,
    viewer,
)
from extras import tiny as tiny_models
from extras.endpoint import EndpointPlayer
from extras.film import Film
from games import draw, expert, household, houses
from games.formula import evaluate, solutions
from games.statistics import Decision, count_endings, decision_statistics, plan_statistics, refused
from plumbing import card, checkpoint, manifest, parallel
from plumbing import settings as run_settings
from plumbing.settings import Settings
from policy import Policy, ValueHead
from vlm import families, loading, lora, memory
from vlm.loading import POCKET, ModelError, load_model

HERE = Path(__file__).parent
MODULES = [".".join(file.relative_to(HERE).with_suffix("").parts)
           for folder in ("", "games", "vlm", "plumbing", "extras") for file in sorted((HERE / folder).glob("*.py"))
           if file.stem not in ("__init__", "test_all")]


# ---- what all of it rests on ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    if name == "alfworld_env":
        pytest.importorskip("alfworld")
    assert doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch}).failed == 0


def test_the_data_flows_one_way():
    """The four bricks import none of each other; nobody imports what comes after it; the games know no model."""
    order = ("env", "parse", "policy", "ppo", "rollout", "sft", "players", "eval", "train")
    for name in order:
        imported = set(re.findall(r"^(?:from|import) (\w+)", (HERE / f"{name}.py").read_text(), re.M))
        assert not imported & set(order[order.index(name) + 1:]), name
        assert name not in order[:4] or not imported & set(order), name
    for file in HERE.glob("games/*.py"):
        imported = set(re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.M))
        assert not imported & {*order, "vlm", "plumbing", "extras", "torch"}


@pytest.fixture(scope="session")
def shipped():
    """(model, processor) of the repository's own checkpoint, fp32."""
    return load_model(str(POCKET), bits=32)


@pytest.fixture
def agent(shipped):
    """A fresh Policy on a copy of the shipped model, with LoRA of rank 8."""
    return Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, seed=3)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, shipped):
    """A checkpoint folder of a small random model, with the shipped processor: loading code runs on it for real."""
    folder = tmp_path_factory.mktemp("tiny")
    pocket.make_model(shipped[1], seed=7, hidden=64, heads=2, vision_layers=1, text_layers=1).save_pretrained(folder)
    shipped[1].save_pretrained(folder)
    return folder


def states_of(task, count, seed=0):
    """count (game, picture, info) met by random play."""
    generator, game, found = np.random.default_rng(seed), GAMES[task](), []
    picture, info = game.reset(seed=seed)
    while len(found) < count:
        snapshot = GAMES[task]()
        snapshot.set_state(game.get_state())
        found.append((snapshot, picture, info))
        picture, _, terminated, truncated, info = game.step(int(generator.integers(len(game.legal_actions()))))
        if terminated or truncated:
            picture, info = game.reset()
    return found


def samples_of(agent, count=2, tasks=tuple(GAMES), tokens=60):
    """(prompts, responses) of all tasks: real prompts, really sampled answers."""
    found = [state for task in tasks for state in states_of(task, count)]
    prompts = agent.encode([p for _, p, _ in found], [parse.make_prompt(g, i) for g, _, i in found])
    return prompts, agent.generate(prompts, torch.Generator().manual_seed(0), tokens, parse.json_closed)


def shake(agent, seed=0, size=0.05):
    """Move the adapters away from zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in agent.lora.values():
            layer.lora_B.normal_(std=size, generator=generator)


# ---- env.py --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("game", GAMES.values())
def test_gymnasium_finds_nothing_to_warn_of(game):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(f"cards/{game.__name__}-v0", render_mode="rgb_array").unwrapped)


def test_a_seed_deals_the_same_everywhere():
    dealt = {task: [GAMES[task]().reset(seed=seed)[1] for seed in (0, 1)] for task in GAMES}
    assert [(i["target"], i["current"]) for i in dealt["numberline"]] == GOLDEN["numberline"]
    assert [" ".join(i["cards"]) for i in dealt["ezpoints"]] == GOLDEN["ezpoints"]
    assert [" ".join(i["cards"]) for i in dealt["points24"]] == GOLDEN["points24"]
    assert [" ".join([i["dealer"], *i["hand"]]) for i in dealt["blackjack"]] == GOLDEN["blackjack"]


GOLDEN = {"numberline": [(5, 0), (2, 5)], "ezpoints": ["2 Q", "2 6"],
          "points24": ["Q 9 7 4", "7 7 10 K"], "blackjack": ["Q 7 4", "7 10 K"]}


@pytest.mark.parametrize("task", GAMES)
def test_a_seed_fixes_the_game_and_only_the_game(task):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def play(seed):
        trace = [(p.tobytes(), json.dumps(i)) for _, p, i in states_of(task, 30, seed)]
        return trace

    assert play(5) == play(5)
    assert play(5) != play(6)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("task", GAMES)
def test_a_saved_state_continues_exactly(task):
    game, twin = GAMES[task](), GAMES[task]()
    game.reset(seed=11)
    generator = np.random.default_rng(0)
    for _ in range(60):
        twin.set_state(json.loads(json.dumps(game.get_state())))
        action = int(generator.integers(len(game.legal_actions())))
        (p1, *rest1), (p2, *rest2) = game.step(action), twin.step(action)
        assert np.array_equal(p1, p2) and rest1 == rest2
        if game.over:
            (p1, i1), (p2, i2) = game.reset(), twin.reset()
            assert np.array_equal(p1, p2) and i1 == i2


def test_games_refuse_what_makes_no_sense():
    game = GAMES["blackjack"]()
    with pytest.raises(RuntimeError, match="reset"):
        game.step(0)
    with pytest.raises(RuntimeError, match="reset"):
        game.get_state()
    game.reset(seed=0)
    with pytest.raises(ValueError, match="stand.*hit"):
        game.step(2)
    with pytest.raises(ValueError, match="not a state"):
        game.set_state({"game": "Points24"})
    with pytest.raises(ValueError, match="rgb_array"):
        GAMES["blackjack"](render_mode="human")
    with pytest.raises(ValueError, match="choose another target"):
        GAMES["ezpoints"](target=1000).reset(seed=0)
    with pytest.raises(RuntimeError, match="call reset"):
        GAMES["blackjack"]().render()
    with pytest.raises(ValueError, match="1 to 99"):
        GAMES["numberline"](max_position=9999)
    for action in (True, "hit", 0.0, None, -1):
        with pytest.raises(ValueError, match="not an index"):
            game.step(action)
    game.step(np.int64(1))


@pytest.mark.parametrize("task, changes", [
    ("blackjack", {"player": [1]}), ("blackjack", {"dealer": [1, 52]}), ("blackjack", {"player": "ab"}),
    ("blackjack", {"over": 0}), ("blackjack", {"episode_return": float("nan")}), ("blackjack", {"steps": -1}),
    ("blackjack", {"generator": {"bit_generator": "MT19937"}}), ("blackjack", {"generator": 7}),
    ("numberline", {"target": 6}), ("numberline", {"current": "3"}), ("numberline", {"steps": 11}),
    ("numberline", {"target": 2, "current": 2}), ("points24", {"cards": [1, 2, 3]}),
    ("points24", {"steps": 1, "formula": ["99"]}), ("points24", {"steps": 1, "formula": ["="]}),
    ("points24", {"steps": 1, "formula": [1]}), ("points24", {"steps": 0, "formula": ["("]}),
    ("points24", {"steps": 3, "cards": [0, 1, 2, 3], "formula": ["1", "+", "7"]}),
    ("ezpoints", {"cards": [1, True]}), ("ezpoints", {"cards": [1, None]})])
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(task, changes):
    game = GAMES[task]()
    game.reset(seed=3)
    before = game.get_state()
    with pytest.raises(ValueError, match="not a state that|not numpy's PCG64"):
        game.set_state(before | changes)
    assert game.get_state() == before
    game.set_state(before)


def test_numberlines_far_deals_can_be_won():
    """The step limit grows with the line, as published: 2 · max_position."""
    game = GAMES["numberline"](max_position=20)
    game.reset(seed=0)
    game.set_state(game.get_state() | {"target": 20, "current": 0})
    for _ in range(20):
        _, _, terminated, truncated, info = game.step(1)
    assert terminated and not truncated and info["is_success"] and GAMES["numberline"]().max_steps == 10
    assert GAMES["numberline"](max_position=99).reset(seed=0)[0].shape == (300, 300, 3)


def test_success_is_told_where_a_wrapper_ends_the_episode():
    game = gymnasium.wrappers.TimeLimit(GAMES["numberline"](), 1)
    _, info = game.reset(seed=0)
    assert info["is_success"] is False
    _, _, terminated, truncated, info = game.step(1)
    assert (terminated or truncated) and info["is_success"] is (game.unwrapped.episode_return > 0)


def test_info_is_a_copy():
    game = GAMES["points24"]()
    _, info = game.reset(seed=0)
    info["formula"].append("+")
    info["cards"].clear()
    assert game.formula == [] and len(game.observe()[1]["cards"]) == 4


def play(task, actions, **state):
    """Step a game through actions' texts from a given state; return the game, [(reward, ended)] and the last info."""
    game = GAMES[task]()
    game.reset(seed=0)
    for name, value in state.items():
        setattr(game, name, value)
    steps = []
    for action in actions:
        _, reward, terminated, truncated, info = game.step(game.actions.index(action))
        steps.append((reward, "t" if terminated else "x" if truncated else ""))
    return game, steps, info


def test_numberline_by_hand():
    _, steps, info = play("numberline", "-++", target=2, current=0)
    assert steps == [(-1, ""), (0, ""), (1, "t")] and info["is_success"] is False        # −1 + 1 is no success
    _, steps, info = play("numberline", "--", target=3, current=5)
    assert steps == [(0, ""), (1, "t")] and info["is_success"] is True
    _, steps, _ = play("numberline", "-" * 10, target=3, current=1)
    assert steps == [(-1, "")] * 9 + [(-1, "x")]                                          # truncated, not terminated


def test_numberline_draws_its_thirty_deals_uniformly_and_random_play_wins_27_percent():
    game, counts = GAMES["numberline"](), Counter()
    game.reset(seed=0)
    for _ in range(6000):
        game.reset()
        counts[game.target, game.current] += 1
    assert len(counts) == 30 and sum((n - 200) ** 2 / 200 for n in counts.values()) < 58      # χ², 29 df, p = 0.001

    def success(target, current, total=0.0, depth=0):
        """Exact chance that uniform play ends with a return above 0: only an unbroken walk to the target does."""
        chance = 0.0
        for action in "-+":
            _, [(reward, end)], info = play("numberline", action, target=target, current=current)
            if reward >= 0:
                chance += 0.5 * (1.0 if end else success(target, info["current"]))
        return chance

    assert np.mean([success(*pair) for pair in counts]) == pytest.approx(0.269, abs=5e-4)


def cards(*ranks):
    return [4 * draw.RANKS.index(rank) for rank in ranks]


def test_every_symbol_of_a_long_formula_is_drawn():
    game = GAMES["points24"]()
    game.reset(seed=0)
    game.set_state(game.get_state() | {"cards": cards("10", "J", "Q", "K")})
    legal, picture = list(game.legal_actions()), game.observe()[0]
    for symbol in ["10", "+"] * 4 + ["("] * 11:                         # 19 symbols: the second line, which is cut low
        before, (picture, *_) = picture, game.step(legal.index(symbol))
        assert (before != picture).any(), game.formula


def test_numberlines_marker_stands_over_the_current_number():
    game = GAMES["numberline"]()
    game.reset(seed=0)

    def marked(current, target):
        game.current, game.target = current, target
        return np.flatnonzero((game.observe()[0][204:220] == draw.GOLD).all(-1).any(0)).mean()

    assert marked(1, 4) == marked(1, 5) < marked(2, 4)


def test_formula_games_by_hand():
    _, steps, info = play("ezpoints", ["2", "+", "10", "="], cards=cards("2", "K"))
    assert steps == [(0, ""), (0, ""), (0, ""), (10, "t")] and info["is_success"]
    game, steps, info = play("ezpoints", ["3", "2", "+", "+", "="], cards=cards("2", "K"))
    assert [r for r, _ in steps] == [-1, 0, 0, 0, -1] and game.formula == ["2", "+", "+"] and not info["is_success"]
    _, steps, _ = play("ezpoints", ["2", "+", "+", "+", "+"], cards=cards("2", "K"))
    assert steps[-1] == (0, "x")                                                            # five steps: truncated
    _, steps, _ = play("points24", list("8/(3-8/3)="), cards=cards("3", "3", "8", "8"))
    assert steps[-1] == (10, "t")                                                           # exact, no float ==
    _, steps, _ = play("points24", list("24*1*1="), cards=cards("2", "4", "A", "A"))
    assert steps[-1] == (-1, "t")                                                           # 2, 4 is not 24
    _, steps, _ = play("points24", list("8*3="), cards=cards("3", "3", "8", "8"))
    assert steps[-1] == (-1, "t")                                                           # not every card used
    _, steps, _ = play("points24", list("8/(3-3)="), cards=cards("3", "3", "8", "8"))
    assert steps[-1] == (-1, "t")                                                           # division by zero
    _, steps, _ = play("points24", ["("] * 20, cards=cards("3", "3", "8", "8"))
    assert steps[-1] == (0, "x") and steps[-2] == (0, "")
    wide = GAMES["points24"](face_cards_as_10=False)
    assert "13" in wide.actions and wide.reset(seed=0)[1]["numbers"]
    wide.cards = cards("K", "Q", "J", "2")
    assert sorted(wide.observe()[1]["numbers"]) == [2, 11, 12, 13]


@given(strategies.lists(strategies.sampled_from(["1", "2", "3", "10", "+", "-", "*", "/", "(", ")"]), max_size=9))
def test_formulas_agree_with_pythons_own_arithmetic(tokens):
    """Where Python's parser takes the text as arithmetic on whole tokens, the value is Python's; else None."""
    try:
        expected = _python_value(ast.parse("".join(f" {token} " for token in tokens).strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        expected = None
    assert evaluate(tokens) == expected


def _python_value(node):
    """The Fraction that a syntax tree of Python's own parser is worth; ValueError for all but + - * / on numbers."""
    operations = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in operations:
        return operations[type(node.op)](_python_value(node.left), _python_value(node.right))
    raise ValueError(node)


def reachable(numbers):
    """All values of any formula on the numbers, by merging two at a time: another road than formula.solutions."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for merged in {a + b, a - b, a * b} | ({a / b} if b else set()):
            values |= reachable([*rest, merged])
    return values


def test_solver_and_the_share_of_solvable_deals():
    picked = random.Random(0).sample(list(itertools.combinations_with_replacement(range(1, 11), 4)), 25)
    for numbers in picked:
        found = solutions(numbers, 24)
        assert bool(found) == (24 in reachable([Fraction(n) for n in numbers])), numbers
        assert all(evaluate(tokens) == 24 for tokens in found)
    # ranks with replacement, J Q K count 10: a multiset's weight is its number of orders times 4 for each ten
    solvable = 0
    for numbers in itertools.combinations_with_replacement(range(1, 11), 4):
        orders = math.factorial(4)
        for count in Counter(numbers).values():
            orders //= math.factorial(count)
        solvable += orders * 4 ** numbers.count(10) * bool(solutions(numbers, 24))
    assert solvable / 13**4 == pytest.approx(0.7309, abs=5e-5)


@pytest.mark.parametrize("natural, sab", [(False, False), (True, False), (False, True)])
def test_blackjack_is_gymnasiums(natural, sab):
    """The same cards and the same actions give the same observations and rewards as Gymnasium's Blackjack-v1."""
    theirs = gymnasium.make("Blackjack-v1", natural=natural, sab=sab).unwrapped
    generator = np.random.default_rng(1)
    rewards = Counter()
    for _ in range(1500):
        deck = [int(c) for c in generator.integers(52, size=30)]
        if generator.random() < 0.3:
            deck[2:4] = cards("A", "K")                                 # naturals are rare: deal some
        mine = GAMES["blackjack"](natural=natural, sab=sab)
        supply, theirs_supply = iter(deck), iter(min(c // 4 + 1, 10) for c in deck)
        mine._card = lambda supply=supply: next(supply)
        mine.reset(seed=0)
        theirs.reset(seed=0)
        theirs.dealer = [next(theirs_supply), next(theirs_supply)]
        theirs.player = [next(theirs_supply), next(theirs_supply)]
        theirs._np_random = SimpleNamespace(choice=lambda _, supply=theirs_supply: next(supply))
        while not mine.over:
            info, seen = mine.observe()[1], tuple(map(int, theirs._get_obs()))
            assert (info["total"], expert.card_value(info["dealer"]), info["usable_ace"]) == seen
            action = int(generator.integers(2))
            _, reward, ended, _, _ = mine.step(action)
            _, their_reward, their_end, _, _ = theirs.step(action)
            assert (reward, ended) == (their_reward, their_end)
        rewards[reward] += 1
    assert set(rewards) == ({-1, 0, 1, 1.5} if natural else {-1, 0, 1})


def test_blackjack_hides_the_hole_card():
    game, twin = GAMES["blackjack"](), GAMES["blackjack"]()
    game.reset(seed=4)
    twin.set_state(game.get_state())
    twin.dealer[1] = (game.dealer[1] + 17) % 52
    assert np.array_equal(game.render(), twin.render())
    assert game.observe()[1] == twin.observe()[1]
    assert parse.make_prompt(game, game.observe()[1]) == parse.make_prompt(twin, twin.observe()[1])
    game.step(0)
    assert not np.array_equal(game.render(), twin.render())             # turned up once the game is over


def test_every_rank_looks_different_even_where_a_fan_covers_it():
    """The strip that a fanned card shows differs by rank, also at the pocket model's 120 pixels."""
    shrink = 120 / draw.SIZE
    for suit in draw.SUITS:
        strips = [draw.Image.fromarray(draw.card(rank, suit)[:36, :32]).resize((round(32 * shrink), round(36 * shrink)))
                  for rank in draw.RANKS]
        for a, b in itertools.combinations(strips, 2):
            assert np.abs(np.asarray(a, float) - np.asarray(b, float)).max() > 60


def test_the_longest_hand_stays_readable():
    """Twenty-one aces: every card's corner index is on the table, whole, where put_hand laid it."""
    canvas = draw.table()
    draw.put_hand(canvas, [("A", "spades")] * 21, 164)
    index = draw.card("A", "spades")[4:36, 3:32].astype(int)
    found = [(x, y) for y in range(0, draw.SIZE - 36) for x in range(0, draw.SIZE - 32)
             if np.abs(canvas[y:y + 32:8, x:x + 29:7].astype(int) - index[::8, ::7]).max() < 4
             and np.abs(canvas[y:y + 32, x:x + 29].astype(int) - index).max() < 4]
    assert len(found) == 21


# ---- parse.py ------------------------------------------------------------------------------------------------------
ANSWERS = [
    ('{"thoughts": "x", "action": "hit"}', ("stand", "hit"), "hit"),
    ('{"ACTION" :  " Hit "}', ("stand", "hit"), "hit"),
    ('{"action": "10"}', ("1", "10"), "10"),
    ('{"action": "10"}', ("1", "2"), None),                                     # 10 is not 1
    ('{"action": "cabinet 12"}', ("cabinet 1", "cabinet 12"), "cabinet 12"),
    ('{"action": "cabinet 12"}', ("cabinet 1",), None),
    ('{"action": "hit"} {"action": "stand"}', ("stand", "hit"), "stand"),       # the last match counts
    ('{"action": "hit", "action": "fly"}', ("stand", "hit"), "hit"),            # ... among the legal ones
    ('{"thoughts": "I write "action": "hit" here", "action": "stand"}', ("stand", "hit"), "stand"),
    ('{"action": "ſtand"}', ("stand", "hit"), None), ('{"action": "ﬆand"}', ("stand", "hit"), None),
    ('{"actıon": "stand"}', ("stand", "hit"), None), ('{"action": "des\u212a"}', ("desk",), None),
    ('{"action": hit}', ("stand", "hit"), None),
    ('{"action": "hit', ("stand", "hit"), None),
    ('{\\"action\\": \\"hit\\"}', ("stand", "hit"), None),                      # quoted inside a string
    ("hit", ("stand", "hit"), None), ("", ("stand", "hit"), None), ('{"action": "+"}', ("+", "-"), "+"),
]


@pytest.mark.parametrize("text, actions, expected", ANSWERS)
def test_parse_table(text, actions, expected):
    action, start = parse.parse(text, actions)
    assert action == expected
    assert 0 <= start <= len(text) and (expected is None or text[start] == '"')


def test_the_action_part_begins_at_the_match_that_counts():
    text = '{"thoughts": "I write "action": "hit" here", "action": "stand"}'
    assert parse.parse(text, ("stand", "hit")) == ("stand", text.rindex('"action"'))
    assert parse.parse('"action": 1, "action": 2', ("hit",)) == (None, 13)     # none is legal: the last key


@given(strategies.text(alphabet='{}"\\: actionhit10,\n', max_size=60) | strategies.text(max_size=40))
def test_parse_takes_any_text(text):
    action, start = parse.parse(text, ("1", "10", "hit"))
    assert action in ("1", "10", "hit", None) and 0 <= start <= len(text)
    if action:
        assert f'"{action}"' in re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text.lower())
    assert parse.json_closed(text) in (True, False)


@given(strategies.dictionaries(strategies.text(max_size=8), strategies.text(max_size=8), min_size=1, max_size=3))
def test_json_closes_where_pythons_json_does(value):
    text = json.dumps(value)
    assert parse.json_closed(text) and not any(parse.json_closed(text[:k]) for k in range(len(text)))


@pytest.mark.parametrize("task", GAMES)
def test_prompt_and_demonstration_keep_the_contract(task):
    for game, _, info in states_of(task, 25):
        prompt, short = parse.make_prompt(game, info), parse.make_prompt(game, info, cot=False)
        assert game.description in prompt and game.state_text(info) in prompt and '"thoughts"' not in short
        assert all(action in prompt.split("Actions:")[1].split("\n")[0].split() for action in game.legal_actions())
        for action in game.legal_actions():
            text = parse.make_answer(action, expert.thoughts(task, info, action))
            assert json.loads(text)["action"] == action and expert.reads_right(task, text, info)
            named, start = parse.parse(text, game.legal_actions())
            assert named == action and text[start:].startswith('"action"') and parse.json_closed(text)
    prompts = {parse.make_prompt(game, info) for game, _, info in states_of(task, 25)}
    assert len(prompts) > 1 if task in ("ezpoints", "points24") else len(prompts) == 1     # the formula is in it


def test_fallback_is_uniform_over_the_legal_actions_and_counted():
    generator = np.random.default_rng(0)
    picks = [parse.choose("no idea", ("a", "b", "c"), generator) for _ in range(3000)]
    assert not any(named for _, named, _ in picks)
    assert sum((n - 1000) ** 2 / 1000 for n in Counter(i for i, _, _ in picks).values()) < 13.8   # χ², 2 df, 0.001
    state = generator.bit_generator.state
    assert parse.choose('{"action": "b"}', ("a", "b"), generator)[:2] == (1, True)
    assert generator.bit_generator.state == state                      # a named action costs no randomness


# ---- expert.py, sft.py ---------------------------------------------------------------------------------------------
def test_blackjack_values_are_the_exact_ones():
    value = expert.blackjack_value_of_game
    assert value("win", lambda *_: 0.5) == pytest.approx(0.2806, abs=5e-5)
    assert value("win", lambda *_: 0.0) == pytest.approx(0.3807, abs=5e-5)
    assert value("win", lambda total, *_: float(total < 12)) == pytest.approx(0.4129, abs=5e-5)
    assert value("win") == pytest.approx(0.4316, abs=5e-5)
    assert value("return") == pytest.approx(-0.0466, abs=5e-5)


@pytest.mark.parametrize("task, expected, games", [
    ("numberline", 1.0, 60), ("ezpoints", 1.0, 200), ("points24", 0.7309, 300), ("blackjack", 0.4316, 12_000)])
def test_experts_reach_their_exact_values_in_play(task, expected, games):
    result = evaluation.evaluate(players.scripted_player("expert", task, 0), task, games, seed=0)
    tolerance = 3.3 * math.sqrt(expected * (1 - expected) / games)
    assert result["success"] == pytest.approx(expected, abs=tolerance + 1e-12)
    assert result["expert_agreement"] == 1.0


def test_every_symbol_that_some_solution_continues_is_the_experts():
    """Against brute force: a symbol is best where some text of the target's value begins with the formula and it."""
    info = {"numbers": [2, 10], "formula": [], "target": 12}
    assert set(expert.best_actions("ezpoints", info)) == {"2", "10"}
    assert expert.best_actions("ezpoints", info | {"formula": ["2"]}) == ["+"]
    assert expert.best_actions("ezpoints", info | {"formula": ["2", "*"]}) == ["="]        # lost: given up
    for numbers in ((1, 2, 3, 4), (2, 2, 10, 10)):                      # some need brackets, the other never one first
        info = {"numbers": numbers, "formula": [], "target": 24}
        texts = {shape.format(*order, *signs) for order in itertools.permutations(numbers)
                 for signs in itertools.product("+-*/", repeat=3) for shape in (
                     "(({0}{4}{1}){5}{2}){6}{3}", "({0}{4}({1}{5}{2})){6}{3}", "({0}{4}{1}){5}({2}{6}{3})",
                     "{0}{4}(({1}{5}{2}){6}{3})", "{0}{4}({1}{5}({2}{6}{3}))")}
        split = lambda text: re.findall(r"\d+|[^ ]", text)
        right = [text for text in texts if evaluate(split(text)) == 24]
        plain = [split(ast.unparse(ast.parse(text))) for text in right]         # Python drops a needless first "("
        assert set(expert.best_actions("points24", info)) == {tokens[0] for tokens in plain}
        for tokens in (tokens for tokens in plain if "(" not in tokens):
            for k in range(1, len(tokens)):
                assert tokens[k] in expert.best_actions("points24", info | {"formula": tokens[:k]})


@pytest.mark.parametrize("task", ["ezpoints", "points24"])
def test_plans_are_read_back_from_the_thoughts(task):
    """What the expert writes is a right plan that it follows, played to +10; a wrong plan is called wrong."""
    game = GAMES[task](**({"solvable_only": True} if task == "points24" else {}))
    for seed in range(30):
        _, info = game.reset(seed=seed)
        ended = False
        while not ended:
            action = expert.expert_action(task, info)
            plan = expert.planned(expert.thoughts(task, info, action))
            assert expert.plan_right(plan, info) and plan[0] == action
            assert not expert.plan_right(plan[:-1], info) and not expert.plan_right(["1", *plan], info)
            _, reward, ended, _, info = game.step(game.legal_actions().index(action))
        assert reward == 10
    assert expert.planned("so the numbers are 1 1 1 1. Now '' then 'nothing'.") == []


@pytest.mark.parametrize("task", GAMES)
def test_demonstrations_are_seeded_and_as_noisy_as_asked(task):
    take = lambda seed, noise: list(itertools.islice(sft.demonstrations(task, seed, noise), 300))
    a, b, c = take(1, 0.5), take(1, 0.5), take(2, 0.5)
    assert [(d.prompt, d.answer) for d in a] == [(d.prompt, d.answer) for d in b] != [(d.prompt, d.answer) for d in c]
    assert all(np.array_equal(x.picture, y.picture) for x, y in zip(a, b))
    actions = GAMES[task]().actions
    labels = Counter(parse.parse(d.answer, actions)[0] for d in take(3, 1.0))
    assert sum((labels[x] - 300 / len(actions)) ** 2 / (300 / len(actions)) for x in actions) < 3 * len(actions) + 10
    assert all(f"I choose {parse.parse(d.answer, actions)[0]}." in d.answer for d in a)         # wrong labels too
    plain = next(sft.demonstrations(task, 1, cot=False))
    assert '"thoughts"' not in plain.prompt and '"thoughts"' not in plain.answer


@pytest.mark.parametrize("task", ("numberline", "points24"))
def test_demonstrations_see_what_comes_after_a_mistake_and_only_what_can_be_won(monkeypatch, task):
    """Half of the games go on with the label, all labels here random; of Points24 every deal has a solution."""
    game, steps = GAMES[task](**({"solvable_only": True} if task == "points24" else {})), []
    make = lambda name, **world: (steps.append(world), game)[1]
    step = game.step
    monkeypatch.setattr(sft, "make_game", make)
    monkeypatch.setattr(game, "step", lambda index: (
        steps.append(game.actions[index] in expert.best_actions(task, game.observe()[1])), step(index))[1])
    for _ in itertools.islice(sft.demonstrations(task, 0, label_noise=1.0), 60):
        if task == "points24":
            assert solutions(tuple(sorted(map(int, game._numbers()))), 24)
    assert 0.15 < 1 - sum(steps[1:]) / len(steps[1:]) < 0.7
    assert steps[0] == ({"solvable_only": True} if task == "points24" else {})


def test_the_pocket_recipe_is_seeded(shipped, tiny):
    """The tokenizer is rebuilt token for token; fine-tuning from one seed ends at the same weights, bit for bit."""
    assert pocket.make_tokenizer(pocket.game_texts(seed=0)).get_vocab() == shipped[1].tokenizer.get_vocab()
    ends = []
    for _ in range(2):
        agent = Policy(*load_model(str(tiny)), target_modules=())
        batches = sft.mixed(pocket.answers(pocket.LABEL_NOISE, 0, streams=1), 8, np.random.default_rng(0))
        losses = sft.finetune(agent, batches, 4, 1e-3)
        ends.append([losses, *(p.detach().clone() for p in agent.model.parameters())])
    assert ends[0][0] == ends[1][0] and all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:]))


# ---- policy.py, vlm/lora.py, vlm/loading.py, vlm/memory.py ---------------------------------------------------------
def test_lora_is_the_dense_product_and_starts_as_identity():
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(24, 40)
    layer = lora.LoRALinear(base, rank=4, alpha=12, generator=generator)
    x = torch.randn(5, 24, generator=generator)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.lora_B.normal_(generator=generator)
    dense = base.weight + 12 / 4 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ dense.T + base.bias)


def test_only_adapters_and_value_head_learn(shipped):
    for parts in itertools.chain.from_iterable(itertools.combinations(families.PARTS, n) for n in (1, 2, 3)):
        agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2, target_modules=parts)
        shake(agent)
        logp, _, value = agent.logprobs(*samples_of(agent, 1, ("blackjack",), tokens=5))
        (logp.sum() + value.sum()).backward()
        with_gradient = {name for name, p in agent.named_parameters() if p.grad is not None}
        wanted = {f"model.{path}.lora_{m}" for path in agent.lora for m in "AB"}
        wanted |= {name for name, _ in agent.named_parameters() if name.startswith("value_head")}
        assert with_gradient == wanted == {name for name, _ in agent.trainable()}
        adapted = {part for part in map(families.part_of_path, agent.lora)}
        assert adapted == set(parts)


def test_a_frozen_vision_tower_looks_once_at_a_picture(shipped):
    looks = []
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2, target_modules=("language",))
    agent.model.model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    prompts, responses = samples_of(agent, 1, ("blackjack",), tokens=5)
    first = agent.logprobs(prompts, responses)[0]
    once = len(looks)
    again = agent.logprobs(prompts[::-1], responses[::-1])[0].flip(0)
    assert once == len(looks) == 1 and (first.exp() < 1).any()
    learns = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2)      # where it learns, nothing is kept
    torch.testing.assert_close(learns.logprobs(prompts, responses)[0], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)
    agent.logprobs(prompts, responses)[0].sum().backward()
    assert all(layer.lora_A.grad is not None for layer in agent.lora.values())
    prompts, responses = samples_of(learns, 1, ("blackjack",), tokens=5)
    learns.logprobs(prompts, responses)
    assert all(prompt.features is None for prompt in prompts)


def test_the_value_head_only_reads(agent):
    _, _, value = agent.logprobs(*samples_of(agent, 1, ("blackjack",), tokens=5))
    value.sum().backward()
    assert all(parameter.grad is None for name, parameter in agent.trainable() if not name.startswith("value_head"))
    assert all(parameter.grad is not None for parameter in agent.value_head.parameters())
    agent.zero_grad()


def test_last_hidden_states_are_nearly_alike_and_yet_tell_the_state(shipped):
    """What V reads on NumberLine: a spread of less than a tenth, from which a least-squares fit reads both numbers."""
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=1)
    states = states_of("numberline", 200)
    prompts = agent.encode([picture for _, picture, _ in states],
                           [parse.make_prompt(game, info) for game, _, info in states])
    hidden = agent.prompt_hidden(prompts)
    assert 0.05 < hidden.std(0).mean() / hidden.abs().mean() < 0.08                # README: a fifteenth
    agent.value_head.fit(hidden[:150])
    inputs = torch.cat([agent.value_head.standardised(hidden), torch.ones(200, 1)], 1)
    for name in ("target", "current"):
        numbers = torch.tensor([[float(info[name])] for *_, info in states])
        found = inputs @ torch.linalg.lstsq(inputs[:150], numbers[:150]).solution
        assert ppo.explained_variance(found[150:], numbers[150:]) > 0.95


def test_values_of_states_that_are_nearly_the_same_vector():
    """States vary by 5 % around a large common part: on standardised inputs V tells them apart, on raw ones not."""
    generator = torch.Generator().manual_seed(0)
    states = 10 + 0.05 * torch.randn(256, 32, generator=generator)
    returns, explained = 5 * (states[:, 0] - 10), {}
    for fitted in (False, True):
        head = ValueHead(32, torch.Generator().manual_seed(1))
        if fitted:
            head.fit(states)
            inputs = (states - head.mean) / head.std
            torch.testing.assert_close(inputs.std(0), torch.ones(32))
            torch.testing.assert_close(inputs.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            (0.5 * (head(states) - returns) ** 2).mean().backward()
            optimizer.step()
        explained[fitted] = ppo.explained_variance(head(states).detach(), returns)
    assert explained[True] > 0.9 and explained[False] < 0.3
    assert head(states.bfloat16()).dtype == torch.float32


def test_pixels_are_the_processors_base_view(agent):
    pictures = [picture for _, picture, _ in states_of("blackjack", 3)]
    theirs = agent.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"][:, 0]
    torch.testing.assert_close(families.base_view(pictures, agent.processor, 120), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("task", GAMES)
def test_logprobs_are_hugging_faces_cross_entropy(agent, task):
    """λ = 1 equals the loss that transformers computes itself, on features that transformers made of the picture."""
    shake(agent)
    prompts, responses = samples_of(agent, 3, (task,))
    logp, mask, _ = agent.logprobs(prompts, responses)
    agent.suppress_tokens[:] = False                                    # transformers' softmax knows no forbidden ids
    free, _, _ = agent.logprobs(prompts, responses)
    assert (logp >= free - 1e-5).all()                                  # what is forbidden was shared out
    pictures = [picture for _, picture, _ in states_of(task, 3)]
    for row, (prompt, response, picture) in enumerate(zip(prompts, responses, pictures)):
        inputs = agent.processor.image_processor(images=[picture], return_tensors="pt")
        features = agent.model.get_image_features(**inputs).pooler_output[0][:25]
        ids = torch.tensor([prompt.ids + response])
        labels = ids.clone()
        labels[:, :len(prompt.ids)] = -100
        output = SimpleNamespace(pooler_output=[features])
        loss = agent.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels,
                           mm_encoder_outputs={"image": output}).loss
        assert mask[row].sum() == len(response)                         # every sampled token once
        torch.testing.assert_close(-free[row].sum() / len(response), loss, atol=2e-5, rtol=1e-5)


def test_batched_is_one_by_one(agent):
    """Prompts and answers of all games, of many lengths, in one batch or alone: the same numbers."""
    shake(agent)
    prompts, responses = samples_of(agent, 2)
    responses[0], responses[3] = responses[0][:1], responses[3][:7]
    logp, mask, value = agent.logprobs(prompts, responses)
    torch.testing.assert_close(agent.value(prompts), value, atol=2e-5, rtol=1e-5)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        one, one_mask, one_value = agent.logprobs([prompt], [response])
        assert one.shape == (1, len(response)) and mask[row].sum() == one_mask.sum() == len(response)
        torch.testing.assert_close(logp[row, :len(response)], one[0], atol=2e-5, rtol=1e-5)
        assert (logp[row, len(response):] == 0).all()
        torch.testing.assert_close(value[row], one_value[0], atol=2e-5, rtol=1e-5)


def test_value_cannot_see_the_answer(agent):
    shake(agent)
    prompts, responses = samples_of(agent, 1, ("blackjack",))
    other = [[token for token in reversed(response)] for response in responses]
    torch.testing.assert_close(agent.logprobs(prompts, responses)[2], agent.logprobs(prompts, other)[2])


def test_sampling_is_from_the_scored_distribution(tiny):
    """4,000 draws from a random 500-token model: frequencies follow exp(logp), far more than 50 tokens turn up, the
    forbidden ones never."""
    model, processor = load_model(str(tiny))
    agent = Policy(model, processor, target_modules=(), temperature=1.7)
    _, picture, info = states_of("numberline", 1)[0]
    [prompt] = agent.encode([picture], ["Hello"])
    draws = Counter(r[0] for _ in range(4) for r in agent.generate(
        [prompt] * 1000, torch.Generator().manual_seed(_), max_new_tokens=1))
    size, image = len(processor.tokenizer), model.config.image_token_id
    tokens = [token for token in range(size) if token != image]         # an answer with an image token has no score
    logp = torch.full((size,), -torch.inf)
    with torch.no_grad():
        for part in (tokens[k:k + 100] for k in range(0, size, 100)):
            logp[list(part)] = agent.logprobs([prompt] * len(part), [[token] for token in part])[0][:, 0]
    chances = logp.double().exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    likely = [t for t in range(size) if chances[t] * 4000 >= 5]
    chi2 = sum((draws[t] - 4000 * chances[t].item()) ** 2 / (4000 * chances[t].item()) for t in likely)
    assert chi2 < len(likely) + 4 * math.sqrt(2 * len(likely)) and len(draws) > 100
    tokenizer = processor.tokenizer
    banned = {tokenizer.pad_token_id, tokenizer.bos_token_id, image}
    assert len(banned) == 3 and not banned & set(draws) and all(chances[t] == 0 for t in banned)
    assert chances[tokenizer.eos_token_id] > 0


def test_generation_stops_and_keeps_what_was_sampled(agent):
    found = states_of("blackjack", 8)
    prompts = agent.encode([p for _, p, _ in found], [parse.make_prompt(g, i) for g, _, i in found])
    greedy = agent.generate(prompts, None, 60, parse.json_closed, greedy=True)
    for prompt, response in zip(prompts, greedy):
        text = agent.decode(response)
        assert parse.json_closed(text) and not parse.json_closed(agent.decode(response[:-1]))
        # the cached decoding took the very arg max of the scoring pass
        alternatives = agent.generate([prompt], None, 60, parse.json_closed, greedy=True)[0]
        assert alternatives == response
        logp = agent.logprobs([prompt], [response])[0][0]
        other = agent.logprobs([prompt], [response[:2] + [response[3]] + response[3:]])[0][0]
        assert logp[2] >= other[2]
    same = [agent.generate(prompts, torch.Generator().manual_seed(s), 60, parse.json_closed) for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    assert all(len(r) == 3 for r in agent.generate(prompts, torch.Generator().manual_seed(0), 3, parse.json_closed))
    eos = agent.tokenizer.eos_token_id
    without_stop = agent.generate(prompts, torch.Generator().manual_seed(0), 60)
    assert all(r[-1] == eos and r.count(eos) == 1 for r in without_stop if len(r) < 60)
    assert any(len(r) < 60 for r in without_stop)                       # EOS was drawn, ended the answer, was kept


def three_tokenizers():
    """Byte-level BPE, SentencePiece-like BPE with byte fallback, and one character a token."""
    corpus = [parse.make_answer(a, expert.thoughts("blackjack", i, a))
              for _, _, i in states_of("blackjack", 60) for a in ("hit", "stand")]
    bytelevel = Tokenizer(models.BPE())
    bytelevel.pre_tokenizer, bytelevel.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytelevel.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])
    pieces.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *(f"<0x{b:02X}>" for b in range(256))], show_progress=False))
    letters = Tokenizer(models.WordLevel(unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    letters.train_from_iterator(corpus, trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False))
    return {"bytes": bytelevel, "pieces": pieces, "letters": letters}


def test_the_action_part_is_found_with_any_tokenizer(agent):
    texts = ['{"thoughts": "total 14. I choose hit.", "action": "hit"}', '{"action":"stand"}',
             '{"thoughts":"I choose hit","action" : "hit"}', '{ "action": "stand"}',
             '{"thoughts": "é 🂡", "action": "hit"}']
    tokenizers = {**three_tokenizers(), "pocket": None}
    for (name, tokenizer), text in itertools.product(tokenizers.items(), texts):
        if tokenizer is None:
            decode, ids = agent.decode, agent.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            decode, ids = tokenizer.decode, tokenizer.encode(text).ids
        whole = decode(ids)
        if name in ("bytes", "pocket"):
            assert whole == text
        action, start = parse.parse(whole, ("stand", "hit"))
        first = Policy.action_start(SimpleNamespace(decode=decode), ids, start)
        assert action and 0 <= first < len(ids)
        assert len(decode(ids[:first])) <= start < len(decode(ids[:first + 1]))
    assert agent.action_start([], 0) == 0
    ids = agent.tokenizer('nothing here', add_special_tokens=False)["input_ids"]
    assert agent.action_start(ids, len("nothing here")) == len(ids)     # no action part: all are thoughts


def mistral_model(processor, layers=2, side=336):
    """LLaVA-1.6-Mistral's configuration in miniature, its vocabulary whole, (side / 14)² image tokens."""
    config = shapes.llava_7b_config(processor)
    vars(config.text_config).update(hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
                                    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.08)
    vars(config.vision_config).update(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                      initializer_range=0.08, image_size=side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pocket.LlavaNextForConditionalGeneration(config)


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    """That model with the real tokenizer and 336-pixel pictures, from its folder."""
    processor, folder = shapes.mistral_processor(), tmp_path_factory.mktemp("mistral")
    mistral_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Policy(*load_model(str(folder)), rank=2, temperature=0.2)


def test_mistrals_pieces_are_sentencepieces_own(mistral):
    import mistral_common
    import sentencepiece
    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for task, cot in itertools.product(GAMES, (True, False)):
        for one in itertools.islice(sft.demonstrations(task, 3, 0.5, cot), 40):
            for text in (one.prompt, one.answer):
                assert mistral.tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text), text
    words = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    assert mistral.tokenizer.convert_tokens_to_ids(words) == [0, 1, 2, 32000, 32001] and len(mistral.tokenizer) == 32002
    assert mistral.model.config.text_config.vocab_size == 32064


def test_the_contract_holds_with_mistrals_real_pieces(mistral):
    """One BOS, 576 image tokens, the user's turn whole; answers end in EOS and begin with the piece that play begins
    with; every closing piece is known; special tokens and rows without a token are never sampled."""
    states = [state for task in GAMES for state in states_of(task, 2)]
    texts = [parse.make_prompt(game, info) for game, _, info in states]
    prompts = mistral.encode([picture for _, picture, _ in states], texts)
    for prompt, text in zip(prompts, texts):
        assert prompt.ids[0] == 1 and prompt.ids.count(1) == 1 and prompt.ids.count(32000) == 576
        first = prompt.ids.index(32000)
        assert set(prompt.ids[first:first + 576]) == {32000} and 620 < len(prompt.ids) < 690
        rest = mistral.tokenizer.decode(prompt.ids[first + 576:])
        assert rest.strip() == f"{text} [/INST]", rest
    answers = [one.answer for task in GAMES for one in itertools.islice(sft.demonstrations(task, 0), 20)]
    for text, ids in zip(answers, mistral.encode_answers(answers)):
        assert ids[-1] == 2 and 2 not in ids[:-1] and mistral.decode(ids) == text
        assert mistral.tokenizer.convert_ids_to_tokens(ids[0]) == '▁{"' and 30 < len(ids) < 70
    assert len(mistral.may_close) == 129
    responses = mistral.generate(prompts[:4], torch.Generator().manual_seed(0), 40)
    logp, mask, _ = mistral.logprobs(prompts[:4], responses)
    assert logp.isfinite().all() and not {0, 1, 32000, 32001} & set(itertools.chain(*responses))
    assert mistral.suppress_tokens[32002:].all() and mistral.suppress_tokens.sum() == 62 + 4


def test_the_action_part_is_found_in_odd_splits_of_mistrals_pieces(mistral):
    """Random cuts into pieces, single bytes of emoji and suits among them: parse's character is in the named token."""
    generator, vocabulary = np.random.default_rng(0), mistral.tokenizer.get_vocab()
    for _ in range(400):
        junk = "".join(generator.choice(list("é♠😀 {}:,action日\n"), size=8))
        text = f'{{"thoughts": "{junk}", "action": "hit"}}'
        left, ids = "▁" + text.replace(" ", "▁"), []
        while left:
            fits = [k for k in range(1, 9) if left[:k] in vocabulary]
            if fits and generator.random() < 0.8:
                k = int(generator.choice(fits))
                ids.append(vocabulary[left[:k]])
            else:                                                       # the character's bytes, a piece each
                k = 1
                ids += [vocabulary[f"<0x{byte:02X}>"] for byte in left[:1].replace("▁", " ").encode()]
            left = left[k:]
        assert mistral.decode(ids) == text
        action, start = parse.parse(text, ("stand", "hit"))
        first = mistral.action_start(ids, start)
        assert action == "hit"
        assert len(mistral.decode(ids[:first])) <= start < len(mistral.decode(ids[:first + 1]))


def test_the_real_four_bit_path_on_a_cpu(tiny):
    """NF4 through transformers and bitsandbytes: loads, scores close to fp32, generates, learns."""
    import bitsandbytes
    model, processor = load_model(str(tiny), bits=4)
    quantised = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert quantised and quantised[0].weight.quant_type == "nf4" and quantised[0].weight.quant_state.nested
    agent, full = Policy(model, processor, rank=4), Policy(*load_model(str(tiny)), rank=4)
    assert len(agent.lora) == len(full.lora) and all(
        isinstance(layer.base, bitsandbytes.nn.Linear4bit) for layer in agent.lora.values())
    prompts, responses = samples_of(full, 1, tokens=12)
    with torch.no_grad():
        a, b = agent.logprobs(prompts, responses)[0], full.logprobs(prompts, responses)[0]
    assert 0 < (a - b).abs().mean() < 0.25                              # quantised, and not far off
    assert agent.generate(prompts, torch.Generator().manual_seed(0), 4) != []
    for one in (agent, full):
        shake(one)
        one.logprobs(prompts, responses)[0].mean().backward()
    for (name, a), (_, b) in zip(agent.trainable(), full.trainable()):  # gradients pass through the NF4 layers
        if "lora" in name:
            assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.5, name
    optimizer = torch.optim.Adam([p for _, p in agent.trainable()], lr=1e-2)
    for part in families.PARTS:                                             # also where most NF4 layers have no adapter
        alone = Policy(*load_model(str(tiny), bits=4), rank=4, target_modules=(part,))
        alone.logprobs(prompts, responses)[0].mean().backward()
        assert all(layer.lora_B.grad.abs().sum() > 0 for layer in alone.lora.values())
    losses = []
    for _ in range(6):
        loss = -agent.logprobs(prompts, responses)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_peft_reads_our_adapters(agent, shipped, tmp_path):
    import peft
    shake(agent)
    prompts, responses = samples_of(agent, 1)
    ours, _, _ = agent.logprobs(prompts, responses)
    agent.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(shipped[0]), tmp_path)
    other = Policy(theirs.get_base_model(), shipped[1], target_modules=())
    torch.testing.assert_close(other.logprobs(prompts, responses)[0], ours, atol=1e-5, rtol=1e-5)
    plain = Policy(copy.deepcopy(shipped[0]), shipped[1], target_modules=())
    assert (plain.logprobs(prompts, responses)[0] - ours).abs().max() > 0.01       # the adapters do something
    again = Policy(copy.deepcopy(shipped[0]), shipped[1], **lora.adapter_settings(tmp_path), seed=99)
    again.load_adapters(tmp_path)
    assert not torch.equal(again.value_head.mlp[0].weight, agent.value_head.mlp[0].weight)  # a start: its own V
    again.load(tmp_path)
    for mine, saved in zip(again.logprobs(prompts, responses), agent.logprobs(prompts, responses)):
        assert torch.equal(mine, saved)
    with pytest.raises(ModelError, match="rank"):
        Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2).load(tmp_path)
    with pytest.raises(ModelError, match="other layers"):
        Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, target_modules=("vision",)).load(tmp_path)


def test_adapters_that_peft_wrote_are_read(agent, shipped, tmp_path):
    """PEFT shortens a list of more than 20 modules to their last names: the parts are read off the weights' keys."""
    import peft
    shake(agent)
    prompts, responses = samples_of(agent, 1, ("blackjack",))
    agent.save(tmp_path / "ours")
    peft.PeftModel.from_pretrained(copy.deepcopy(shipped[0]), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    names = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) < len(agent.lora) / 2
    assert lora.adapter_settings(tmp_path / "theirs") == {"rank": 8, "alpha": 16, "target_modules": agent_parts(agent)}
    back = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, seed=9)
    back.load_adapters(tmp_path / "theirs")
    assert torch.equal(back.logprobs(prompts, responses)[0], agent.logprobs(prompts, responses)[0])
    file = tmp_path / "theirs" / "adapter_model.safetensors"            # numbers that would be cut to 0, ranks, nothing
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor.to(torch.int8) for name, tensor in stored.items()}, file)
    with pytest.raises(ModelError, match="holds torch.int8"):
        back.load_adapters(tmp_path / "theirs")
    for tensors, said in ((stored, "ranks .8., adapter_config.json says 1000000000"), ({}, "ranks ..")):
        save_file(tensors, file)
        edit(tmp_path / "theirs" / "adapter_config.json", r=10**9)
        with pytest.raises(ModelError, match=said):
            lora.adapter_settings(tmp_path / "theirs")


def agent_parts(agent):
    return tuple(part for part in families.PARTS if part in set(map(families.part_of_path, agent.lora)))


def test_loading_says_what_to_do(tiny, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="Check the spelling"):
        load_model("nobody/no-such-model")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="is a gpt2: no model that this program"):
        load_model(str(tmp_path))
    config = loading.AutoConfig.from_pretrained(tiny)
    config.text_config.final_logit_softcapping = 30.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bends its logits"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")         # a download that was cut off
    with pytest.raises(ModelError, match="index.json cannot be used"):
        memory.stored_bytes(tmp_path)
    model, processor = load_model(str(tiny))
    model.config.image_token_id = 10**6
    with pytest.raises(ModelError, match="tokenizer, which does not fit the model, cannot be used"):
        Policy(model, processor, rank=2)
    with pytest.raises(ModelError, match="4, 16 or 32"):
        load_model(str(tiny), bits=8)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 1)
    with pytest.raises(ModelError, match="--bits 4"):
        load_model(str(tiny))
    stored = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    monkeypatch.setattr(memory.os, "sysconf", lambda name: math.ceil(stored ** 0.5) + 1)      # a little more than it
    memory.check_weights(str(tiny), 32, "cpu", torch.float32)
    with pytest.raises(ModelError, match="needs about"):
        memory.check_weights(str(tiny), 32, "cpu", torch.float16)


def test_bits_and_checkpointing_follow_the_gpus_free_memory(tmp_path, monkeypatch):
    """A hub name's size is read from its index before any download; nothing here needs a GPU or a network."""
    processor = shapes.byte_processor()
    config = shapes.llava_7b_config(processor)
    config.dtype = torch.bfloat16
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 15_000_000_000}}))
    free = [0]
    for name, replacement in {"is_available": lambda: True, "current_device": lambda: 0,
                              "get_device_properties": lambda _: SimpleNamespace(total_memory=free[0]),
                              "mem_get_info": lambda _: (free[0], free[0])}.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    plain = loading._config
    monkeypatch.setattr(loading, "_config", lambda name: config if name == loading.LLAVA_7B else plain(name))
    monkeypatch.setattr(loading, "load_processor", lambda name: processor)
    monkeypatch.setattr(memory, "cached_file", lambda name, file: index)
    for free[0], expected in ((24e9, ("4", 1)), (40e9, ("16", 1)), (80e9, ("16", 0)), (16e9, ("32", None))):
        found = loading.find_model("auto")
        assert (found.bits, found.checkpointing) == expected
        assert found.name == ("pocket" if free[0] < 20e9 else loading.LLAVA_7B)
        if free[0] > 20e9:
            assert re.search(r"14.0 GiB of weights, downloaded .* yet; training takes [\d.]+ GiB or more", found.why)
    free[0] = 16e9
    found = loading.find_model(loading.LLAVA_7B)
    assert found.bits == "4" and "tight" in found.why                   # it was asked for, so it is tried
    fixed = loading.find_model(loading.LLAVA_7B, "16", Settings(task="points24", gradient_checkpointing=2))
    assert (fixed.bits, fixed.checkpointing) == ("16", 2)
    sizes = {size: loading.is_small(pocket.MistralConfig(hidden_size=size)) for size in (128, 896, 4096)}
    assert sizes == {128: True, 896: False, 4096: False}                # half a billion weights are taught the format
    with pytest.raises(ModelError, match="14.0 GiB in 16 bits and this GPU has free 9.3"):
        free[0] = 10e9
        loading.load_model(loading.LLAVA_7B, 16, "cuda:0")

    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(memory, "cached_file", offline)
    assert memory.stored_bytes(loading.LLAVA_7B) == 0


def test_the_memory_plan_is_what_autograd_keeps(shipped):
    """Counted on the meta device as on a CPU that really runs; what stays is the policy's own tensors."""
    model = pocket.make_model(shipped[1], seed=7, text_layers=6).to(torch.bfloat16)
    agent = Policy(model, shipped[1], rank=8)
    game, picture, info = states_of("points24", 1)[0]
    longest = memory.prompt_size(model.config, shipped[1], "points24")
    prompts = agent.encode([picture] * 4, [parse.make_prompt(game, info)] * 4)
    size = len(prompts[0].ids), 25
    assert longest[0] > size[0] and longest[1] == 25                    # the first prompt is short: no formula yet

    weights, kept = {parameter.untyped_storage()._cdata for parameter in agent.parameters()}, {}

    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        agent.logprobs(prompts, [[5] * memory.ANSWER_TOKENS] * 4)
    real = sum(nbytes for name, (nbytes, _) in kept.items() if name not in weights)
    options = Settings(task="points24", bits="16", rank=8, micro_batch_size=4, gradient_checkpointing=0)
    plan = memory.memory_plan(model.config, options, size)
    assert real <= sum(nbytes for use, nbytes in plan.items() if use.startswith("update:")) <= 1.4 * real
    learning = sum(parameter.nbytes for _, parameter in agent.trainable())
    assert plan["adapters and value head, fp32"] == learning and plan["Adam's moments"] == 2 * learning
    model_bytes = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    assert plan["weights"] + plan["weights that are never quantised"] == model_bytes
    kept = [plan["update: kept for the backward pass"]]
    for options.gradient_checkpointing in (1, 2, 3):                    # every second or third layer saves less
        kept.append(memory.memory_plan(model.config, options, size)["update: kept for the backward pass"])
    assert kept[1] < 0.2 * kept[0] < 0.5 * kept[0] < kept[2] < kept[3] < kept[0]


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing(agent, shipped, every):
    """Although it needs train mode: whatever dropout a model's configuration brought is off."""
    model = copy.deepcopy(shipped[0])
    dropping = [module for module in model.modules() if isinstance(getattr(module, "dropout", None), float)]
    for module in dropping:
        module.dropout = 0.1
    saving = Policy(model, shipped[1], rank=8, seed=3, gradient_checkpointing=every)
    assert dropping
    shake(agent), shake(saving)
    prompts, responses = samples_of(agent, 1)
    for one in (agent, saving):
        logp, _, value = one.logprobs(prompts, responses)
        (logp.sum() + value.sum()).backward()
    for (name, a), (_, b) in zip(agent.trainable(), saving.trainable()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_scoring_is_repeatable_and_leaves_the_global_generator_alone(agent):
    prompts, responses = samples_of(agent, 1)
    before = torch.get_rng_state()
    first, second = agent.logprobs(prompts, responses)[0], agent.logprobs(prompts, responses)[0]
    agent.generate(prompts, torch.Generator().manual_seed(0), 3)
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


# ---- vlm/families.py -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory):
    """{family: a checkpoint folder of random weights}, each in its family's own layout."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in tiny_models.KINDS}
    for kind, folder in folders.items():
        tiny_models.make(kind, folder)
    return folders


def family_agent(folder, **changes):
    return Policy(*load_model(str(folder)), **({"rank": 2, "temperature": 0.7, "base_name": str(folder)} | changes))


def mixed_prompts(agent):
    """Prompts of three lengths, each with its picture and text."""
    states = [states_of(task, 3)[-1] for task in ("blackjack", "points24", "numberline")]
    texts = [parse.make_prompt(game, info) for game, _, info in states]
    pictures = [picture for _, picture, _ in states]
    return agent.encode(pictures, texts), pictures, texts


@pytest.mark.parametrize("kind", [kind for kind in tiny_models.KINDS if kind != "llava_onevision"])     # it adds tiles
def test_a_family_is_transformers_own_forward_pass(tiny_families, kind):
    """One unpadded sample through the whole model on the processor's own tensors: the same log-probabilities. (Wrong
    positions or token types would pass every test that compares our own passes with each other.)"""
    agent = family_agent(tiny_families[kind])
    shake(agent, size=0.1)
    prompts, pictures, texts = mixed_prompts(agent)
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 12)
    logp, mask, _ = agent.logprobs(prompts, responses)
    family, model = agent.family, agent.model
    for row, (prompt, response, picture, text) in enumerate(zip(prompts, responses, pictures, texts)):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        rendered = agent.tokenizer.apply_chat_template(chat, chat_template=agent.processor.chat_template,
                                                       add_generation_prompt=True, tokenize=False)
        tensors = agent.processor(images=[[draw.Image.fromarray(picture)]], text=[rendered], return_tensors="pt",
                                  **family.facts.options)
        assert tensors["input_ids"][0].tolist() == prompt.ids
        answer = torch.tensor([response])
        for name in set(tensors) & set(families.TEXT_TENSORS):
            more = answer if name == "input_ids" else torch.full_like(answer, int(name == "attention_mask"))
            tensors[name] = torch.cat([tensors[name], more], 1)
        takes = inspect.signature(model.forward).parameters
        logits = model(**{name: tensor for name, tensor in tensors.items() if name in takes}).logits[0]
        theirs = (logits / 0.7).masked_fill(agent.suppress_tokens, -torch.inf).log_softmax(-1)
        theirs = theirs[len(prompt.ids) - 1:-1].gather(1, answer.T)[:, 0]
        torch.testing.assert_close(logp[row, :len(response)], theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_familys_passes_agree(tiny_families, kind, tmp_path, monkeypatch):
    """Decoding = scoring, batch = one by one, ratio 1 in other company, every part learns, the picture counts, peft."""
    import peft
    agent = family_agent(tiny_families[kind])
    shake(agent, size=0.1)
    prompts, pictures, texts = mixed_prompts(agent)
    assert len({len(prompt.ids) for prompt in prompts}) == 3
    steps, plain = [], agent._log_softmax
    agent._log_softmax = lambda hidden: steps.append(plain(hidden)) or steps[-1]
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 12)
    del agent._log_softmax
    logp, mask, value = agent.logprobs(prompts, responses)
    special = {token for token, added in agent.tokenizer.added_tokens_decoder.items() if added.special}
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        decoded = torch.stack([steps[t][row, token] for t, token in enumerate(response)])
        torch.testing.assert_close(logp[row, :len(response)], decoded, atol=2e-5, rtol=1e-5)
        one, _, one_value = agent.logprobs([prompt], [response])
        torch.testing.assert_close(one[0], logp[row, :len(response)], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(one_value[0], value[row], atol=2e-5, rtol=1e-5)
        assert not (special - agent.end_tokens) & set(response)         # such are never sampled, and an end comes last
        assert not agent.end_tokens & set(response[:-1])
    monkeypatch.setattr("policy.PREFILL_TOKENS", 1)                     # a prompt at a time, one cache
    assert agent.generate(prompts, torch.Generator().manual_seed(0), 12) == responses
    shape = playing.Shape(4, 1 + max(len(prompt.ids) for prompt in prompts), 12)
    together = agent.logprobs(prompts, responses, shape)[0]
    for row in range(3):
        assert torch.equal(agent.logprobs(prompts[row:row + 1], responses[row:row + 1], shape)[0][0], together[row])
    other = agent.encode(pictures[::-1], texts)                         # the same texts, other pictures
    assert (agent.logprobs(other, responses)[0] - logp).abs()[[0, 2]].max() > 1e-3
    (logp.sum() + value.sum()).backward()
    moved = {families.part_of_path(path) for path, layer in agent.lora.items()     # LLaVA's last vision layer is unused
             if layer.lora_B.grad is not None and layer.lora_B.grad.abs().sum() > 0}
    assert moved == {families.part_of_path(path) for path in agent.lora} >= {"vision", "language"}
    frozen = family_agent(tiny_families[kind], target_modules=("language",))
    frozen_prompts = frozen.encode(pictures, texts)
    first, again = (frozen.logprobs(frozen_prompts, responses)[0] for _ in range(2))
    assert torch.equal(first, again) and frozen_prompts[0].features.dim() == 3
    agent.save(tmp_path)
    back = family_agent(tiny_families[kind], seed=5)
    back.load(tmp_path)
    assert torch.equal(back.logprobs(prompts, responses)[0], logp)
    theirs = peft.PeftModel.from_pretrained(load_model(str(tiny_families[kind]))[0], tmp_path).get_base_model()
    peft_agent = Policy(theirs, agent.processor, target_modules=(), temperature=0.7)
    torch.testing.assert_close(peft_agent.logprobs(prompts, responses)[0], logp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_family_in_four_bits(tiny_families, kind):
    """Near its 16-bit scores, decoding = scoring, and gradients through NF4 into every part that has adapters."""
    agent = Policy(*load_model(str(tiny_families[kind]), bits=4), rank=2)
    assert any(type(layer.base).__name__ == "Linear4bit" for layer in agent.lora.values())
    prompts, _, _ = mixed_prompts(agent)
    steps, plain = [], agent._log_softmax
    agent._log_softmax = lambda hidden: steps.append(plain(hidden)) or steps[-1]
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 6)
    del agent._log_softmax
    logp, mask, _ = agent.logprobs(prompts, responses)
    for row, response in enumerate(responses):
        decoded = torch.stack([steps[t][row, token] for t, token in enumerate(response)])
        torch.testing.assert_close(logp[row, :len(response)], decoded, atol=2e-5, rtol=1e-5)
    whole = family_agent(tiny_families[kind], temperature=1.0).logprobs(prompts, responses)[0]
    assert 0 < ((logp - whole) * mask).abs().sum() / mask.sum() < 1.0
    logp.sum().backward()
    moved = {families.part_of_path(path) for path, layer in agent.lora.items()
             if layer.lora_B.grad is not None and layer.lora_B.grad.abs().sum() > 0}
    assert moved == {families.part_of_path(path) for path in agent.lora}


def test_the_end_is_a_set(tiny_families):
    agent = family_agent(tiny_families["gemma3"])
    assert {agent.tokenizer.convert_tokens_to_ids(word) for word in ("<end>", "<turn>")} == agent.end_tokens


def test_another_family_goes_through_the_whole_program(tiny_families, tmp_path, capsys):
    """Supervised fine-tuning, RL and evaluation of a Qwen3-VL."""
    command = ["--task", "numberline", "--model", str(tiny_families["qwen3_vl"]), "--sft-steps", "1", "--rank", "2",
               "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "16", "--eval-episodes", "4",
               "--max-new-tokens", "8", "--out", str(tmp_path / "run")]
    train.main(command)
    evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = recorded.metrics(tmp_path / "run")
    assert result["episodes"] == 4 and len(metrics) == 2 and all(row["ratio_error"] == 0 for row in metrics)


@pytest.mark.parametrize("task", GAMES)
def test_the_shipped_model_reads_held_out_pictures(shipped, task):
    """Tokenizer and weights belong together: a pocket model that cannot read would still parse at 100 %."""
    agent = Policy(shipped[0], shipped[1], target_modules=())
    player = players.model_player(agent, seed=0, max_new_tokens=90)
    result = evaluation.evaluate(player, task, 60, seed=777_000)
    assert result["reading_rate"] >= 0.9 and result["parse_rate"] >= 0.95
    assert result["success"] <= 0.55                                    # it has not been taught to play


# ---- ppo.py --------------------------------------------------------------------------------------------------------
def test_gae_by_hand():
    """Three steps, γ = 0.5, gae_lambda = 0.5, all worked out on paper; the last step ends, goes on, or is cut off."""
    r, v = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.5], [1.0], [1.5]])
    after = torch.tensor([[1.0], [1.5], [4.0]])
    no = torch.zeros(3, 1)
    end = torch.tensor([[0.0], [0.0], [1.0]])
    # terminated: δ = 1 + .5·1 − .5 = 1;  0 + .5·1.5 − 1 = −.25;  2 − 1.5 = .5
    advantages, returns = ppo.gae(r, v, after, end, no, 0.5, 0.5)
    assert advantages.flatten().tolist() == [1 + 0.25 * (-0.25 + 0.25 * 0.5), -0.25 + 0.25 * 0.5, 0.5]
    assert torch.equal(returns, advantages + v)
    # truncated: the last δ is 2 + .5·4 − 1.5 = 2.5, whatever comes after
    assert ppo.gae(r, v, after, no, end, 0.5, 0.5)[0].flatten().tolist() == [1 + 0.25 * 0.375, 0.375, 2.5]
    # cut in the middle: nothing of step 2 leaks into step 1, but step 1 keeps its own next value
    cut = torch.tensor([[0.0], [1.0], [0.0]])
    assert ppo.gae(r, v, after, no, cut, 0.5, 0.5)[0].flatten().tolist() == [1 + 0.25 * -0.25, -0.25, 2.5]


def test_gae_is_the_discounted_sum_of_deltas():
    generator = torch.Generator().manual_seed(0)
    L, N, gamma, lam = 9, 5, 0.9, 0.95
    r, v, after = torch.randn(3, L, N, generator=generator)
    kind = torch.randint(0, 6, (L, N), generator=generator)
    terminated, truncated = (kind == 0).float(), (kind == 1).float()
    advantages, _ = ppo.gae(r, v, after, terminated, truncated, gamma, lam)
    for n in range(N):
        for t in range(L):
            total = 0.0
            for k in range(t, L):
                delta = r[k, n] + gamma * after[k, n] * (1 - terminated[k, n]) - v[k, n]
                total += (gamma * lam) ** (k - t) * delta
                if terminated[k, n] or truncated[k, n]:
                    break
            assert advantages[t, n].item() == pytest.approx(float(total), abs=1e-5)


def test_answer_logprob_weighs_thoughts_and_action():
    logp = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]])
    starts = torch.tensor([2, 3])                                       # one start a row; row 1 names no action
    assert ppo.answer_logprob(logp, mask, starts, 0.5).tolist() == [-8.5, -3.0]
    assert ppo.answer_logprob(logp, mask, starts, 1.0).tolist() == (logp * mask).sum(1).tolist()
    assert ppo.answer_logprob(logp, mask, starts, 0.0).tolist() == [-7.0, 0.0]


def test_gradient_vanishes_exactly_where_clipping_says_so():
    for advantage, ratio in itertools.product((1.0, -1.0), (0.7, 0.895, 0.905, 1.0, 1.095, 1.105, 1.4)):
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, _, clipped = ppo.policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.1)
        loss.backward()
        outside = ratio > 1.1 if advantage > 0 else ratio < 0.9
        assert logp.grad.item() == pytest.approx(0.0 if outside else -advantage * ratio)
        assert (logp.grad.item() == 0) == outside and clipped.item() == float(abs(ratio - 1) > 0.1)


def test_diagnostics_by_hand():
    new = torch.tensor([0.1, -0.2])
    loss, kl, clipped = ppo.policy_loss(new, torch.zeros(2), torch.ones(2), 0.15)
    assert loss.item() == pytest.approx(-(math.exp(0.1) + math.exp(-0.2)) / 2) and clipped.item() == 0.5
    assert kl.item() == pytest.approx(((math.exp(0.1) - 1.1) + (math.exp(-0.2) - 0.8)) / 2, abs=1e-6)
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns, returns) == 1.0
    assert ppo.explained_variance(torch.full((3,), 2.0), returns) == 0.0
    assert ppo.explained_variance(returns, torch.ones(3)) is None
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert ppo.explained_variance(noise, (-1 - noise) + noise) is None              # as gae adds them up


class Bandit(torch.nn.Module):
    """A fake policy: two possible one-token answers, one number as its value."""

    def __init__(self):
        super().__init__()
        self.logits, self.worth = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))

    def logprobs(self, prompts, responses, shape=None):
        logp = self.logits.log_softmax(0)[torch.tensor(responses)]      # (B, 1)
        return logp, torch.ones_like(logp), self.value_head(self.prompt_hidden(prompts))

    def prompt_hidden(self, prompts):
        return torch.ones(len(prompts))

    def value_head(self, hidden):
        return self.worth * hidden

    value_head.fitted = True                                            # it has nothing to standardise

    def groups(self, **rates):
        return [{"params": [getattr(self, name)], "lr": rate} for name, rate in rates.items()]


def bandit_settings(**changes):
    return Settings(**({"micro_batch_size": 16, "advantage_floor": 0.0, "target_kl": 0.0, "reward_scale": 1.0,
                        "negative_weight": 1.0} | changes))


def bandit_rollout(policy, options, generator, n=64):
    """n games of one step, the second answer pays 1."""
    responses = torch.multinomial(policy.logits.detach().softmax(0), n, True, generator=generator)
    prompts = [SimpleNamespace(ids=[0])] * n
    rollout = playing.Rollout(responses.float()[None], torch.ones(1, n), torch.zeros(1, n), prompts,
                              [[int(r)] for r in responses], action_starts=torch.zeros(n, dtype=torch.long))
    rollout.last_prompts, rollout.shapes = prompts, playing.padded_shapes(prompts, rollout.responses, options)
    policy.value = lambda prompts: policy.value_head(policy.prompt_hidden(prompts)).detach()
    playing.score_rollout(policy, rollout, options)
    playing.add_advantages(policy, rollout, options)
    return rollout


def test_ppo_teaches_a_bandit():
    policy, options = Bandit(), bandit_settings(minibatch_size=32)
    optimizer = torch.optim.Adam(policy.groups(logits=0.05, worth=0.05))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        diagnostics = ppo.ppo_update(policy, optimizer, bandit_rollout(policy, options, generator), options, generator)
    assert policy.logits.softmax(0)[1] > 0.95 and policy.worth.item() > 0.5
    assert set(diagnostics) == {"policy_loss", "value_loss", "approx_kl", "clip_fraction", "grad_norm", "minibatches",
                                "ratio_error"}


def test_beyond_its_target_kl_the_value_head_alone_learns_on():
    """Adam on two groups: the policy takes fewer steps with a target, stays where it stopped, V takes all of them."""
    moves = {}
    for target in (0.0, 0.02):
        policy, steps = Bandit(), []
        options = bandit_settings(micro_batch_size=32, minibatch_size=32, cot_lambda=1.0, target_kl=target)
        rollout = bandit_rollout(policy, options, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(policy.groups(logits=0.3, worth=0.01))
        optimizer.register_step_post_hook(
            lambda *_, policy=policy, steps=steps: steps.append([policy.logits.tolist(), policy.worth.item()]))
        taken = ppo.ppo_update(policy, optimizer, rollout, options, torch.Generator().manual_seed(0))["minibatches"]
        logits, worths = zip(*steps)
        moves[target] = taken, len({str(x) for x in logits}), len(set(worths)), logits
        # V's steps are those of plain regression, whether the policy goes along or not
        alone, reference = torch.zeros(1, requires_grad=True), []
        adam = torch.optim.Adam([alone], lr=0.01)
        for batch in ppo.minibatches(64, 32, 4, torch.Generator().manual_seed(0)):
            adam.zero_grad()
            (0.5 * (alone - rollout.returns[batch]) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_([alone], 1.0)
            adam.step()
            reference.append(alone.item())
        assert worths == pytest.approx(reference, abs=1e-6)
    assert moves[0.0][:3] == (8, 8, 8)
    taken, places, worths, logits = moves[0.02]
    assert 1 < taken < 8 and worths == 8
    assert places == taken - 1 and logits[taken - 2] == logits[-1]      # no step after the one that went too far
    assert logits[0] == moves[0.0][3][0]                                # the first step is the same


def test_diagnostics_are_means_over_the_minibatches_of_every_epochs_own_order():
    """Rates of 0, so that each minibatch can be recomputed by itself; many clipped answers are no large KL."""
    batches = ppo.minibatches(64, 16, 2, torch.Generator().manual_seed(3))
    first, second = sum(batches[:4], []), sum(batches[4:], [])
    assert sorted(first) == sorted(second) == list(range(64)) and first != second
    policy, options = Bandit(), bandit_settings(minibatch_size=16, update_epochs=2, target_kl=0.5, clip_coef=1e-6)
    rollout = bandit_rollout(policy, options, torch.Generator().manual_seed(0))
    rollout.returns, rollout.old_logp = torch.arange(64) / 64, rollout.old_logp - 0.01
    losses, norms = [], []
    for batch in batches:
        policy.zero_grad()
        logp, _, values = policy.logprobs([rollout.prompts[i] for i in batch], [rollout.responses[i] for i in batch])
        loss, kl, _ = ppo.policy_loss(logp.sum(1), rollout.old_logp[batch], rollout.advantages[batch], 1e-6)
        loss.backward()
        norms.append(policy.logits.grad.norm().item())
        losses.append([loss.item(), ppo.value_loss(values, rollout.returns[batch]).item(), kl.item()])
    found = ppo.ppo_update(policy, torch.optim.SGD(policy.groups(logits=0.0, worth=0.0)), rollout, options,
                           torch.Generator().manual_seed(3))
    means = [sum(column) / len(column) for column in zip(*losses)]
    assert [found[name] for name in ("policy_loss", "value_loss", "approx_kl")] == pytest.approx(means, abs=1e-6)
    assert found["grad_norm"] == pytest.approx(sum(norms) / len(norms), abs=1e-6) and len(set(norms)) > 1
    assert found["minibatches"] == 8 and found["clip_fraction"] == 1 and found["approx_kl"] < 0.001
    assert found["ratio_error"] == pytest.approx(math.exp(0.01) - 1, abs=1e-5)


def test_each_groups_gradients_are_scaled_down_alone():
    norms = []
    for worth in (0.0, 1e4):                                            # a wild V must not shrink the policy's step
        policy = Bandit()
        options = bandit_settings(micro_batch_size=64, minibatch_size=64, update_epochs=1, max_grad_norm=0.1)
        rollout = bandit_rollout(policy, options, torch.Generator().manual_seed(0))
        rollout.returns = rollout.returns + worth
        optimizer = torch.optim.SGD(policy.groups(logits=1.0, worth=1.0))
        ppo.ppo_update(policy, optimizer, rollout, options, torch.Generator())
        assert policy.worth.abs().item() <= 0.1 + 1e-6
        norms.append(policy.logits.norm().item())
    assert norms[0] == pytest.approx(norms[1]) and norms[0] == pytest.approx(0.1, abs=1e-5)


def test_advantages_are_normalised_and_small_ones_not_blown_up():
    """Below the floor advantages keep their size, but for the mean; above it the floor changes nothing."""
    found = {}
    for floor in (0.0, 0.1, 2.0):
        options = bandit_settings(advantage_floor=floor)
        found[floor] = bandit_rollout(Bandit(), options, torch.Generator().manual_seed(0))
    rewards = found[0.0].rewards[0]                                     # one step, V = 0: the advantage is the reward
    torch.testing.assert_close(found[0.0].advantages, (rewards - rewards.mean()) / rewards.std())
    assert torch.equal(found[0.0].advantages, found[0.1].advantages)
    torch.testing.assert_close(found[2.0].advantages, (rewards - rewards.mean()) / 2.0)
    assert torch.equal(found[0.0].returns, found[2.0].returns)


def test_micro_batches_add_up_to_the_minibatch(agent, shipped):
    """One optimiser step on 10 answers: whole, or in micro-batches of 3."""
    steps = []
    for size in (10, 3):
        one = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=4, seed=0)
        shake(one)
        prompts, responses = samples_of(one, 3)
        prompts, responses = prompts[:10], responses[:10]
        rollout = playing.Rollout(*torch.zeros(3, 1, 10), prompts, responses,
                                  action_starts=torch.tensor([len(r) // 2 for r in responses]))
        options = Settings(minibatch_size=10, micro_batch_size=size, update_epochs=1)
        rollout.shapes = playing.padded_shapes(prompts, responses, options)
        playing.score_rollout(one, rollout, options)
        rollout.advantages, rollout.returns = torch.arange(10.0), torch.arange(10.0) / 5
        ppo.ppo_update(one, torch.optim.SGD([p for _, p in one.trainable()], lr=0.1), rollout, options,
                       torch.Generator().manual_seed(0))
        steps.append([p.detach().clone() for _, p in one.trainable()])
    for a, b in zip(*steps):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("column, value, message", [
    ("old_logp", torch.nan, r"losses \[nan.*smaller --lr"),
    ("returns", torch.nan, r"losses \[.*, nan\].*smaller --lr"),
    ("old_logp", -torch.inf, r"norms of the gradients \[nan.*smaller --lr")])
def test_what_is_not_finite_stops_the_run_before_a_step(column, value, message):
    policy, options = Bandit(), bandit_settings(minibatch_size=64)
    rollout = bandit_rollout(policy, options, torch.Generator().manual_seed(0))
    rollout.advantages[5] = 2.0
    getattr(rollout, column)[5] = value                                 # ratio nan, or infinite and clipped; or V
    with pytest.raises(FloatingPointError, match=message):
        ppo.ppo_update(policy, torch.optim.Adam(policy.groups(logits=0.1, worth=0.1)), rollout, options,
                       torch.Generator())
    assert policy.logits.tolist() == [0.0, 0.0]


def test_gradients_that_are_not_finite_stop_the_run_where_the_losses_are():
    policy, options = Bandit(), bandit_settings(minibatch_size=64)
    rollout = bandit_rollout(policy, options, torch.Generator().manual_seed(0))
    policy.logits.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    with pytest.raises(FloatingPointError, match=r"losses \[-?[0-9]"):
        ppo.ppo_update(policy, torch.optim.Adam(policy.groups(logits=0.1, worth=0.1)), rollout, options,
                       torch.Generator())
    assert policy.logits.tolist() == [0.0, 0.0]


def test_a_model_that_has_diverged_draws_no_answer(agent):
    """Not the first token, as argmax of nan is, nor torch's own error: a sentence. Nor does sft.py take a bad step."""
    game = GAMES["numberline"]()
    picture, info = game.reset(seed=0)
    prompts = agent.encode([picture], [parse.make_prompt(game, info)])
    learns = next(parameter for name, parameter in agent.trainable() if "lora_B" in name)
    optimizer = torch.optim.Adam([learns], lr=1e-3)
    hook = learns.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    one = sft.Demonstration(picture, parse.make_prompt(game, info), parse.make_answer("I choose +.", "+"))
    with pytest.raises(FloatingPointError, match="norm inf|norm nan"):
        sft.step(agent, [learns], optimizer, [one], 1)
    hook.remove()
    assert learns.isfinite().all() and not optimizer.state
    shake(agent, size=1e30)
    for greedy in (False, True):
        with pytest.raises(FloatingPointError, match="has diverged.*smaller --lr"):
            agent.generate(prompts, torch.Generator().manual_seed(0), 8, greedy=greedy)


# ---- train.py, eval.py ---------------------------------------------------------------------------------------------
def make_run(shipped, task, **changes):
    options = Settings(task=task, model="pocket", **({"num_envs": 16, "num_steps": 2, "total_timesteps": 64, "rank": 8,
                       "lr": 1e-3, "value_lr": 1e-3, "reward_scale": 0.1, "advantage_floor": 0.0, "target_kl": 0.0,
                       "micro_batch_size": 16, "max_new_tokens": 80} | changes))
    run_settings.fill_in(options, small=True)
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=options.rank, seed=options.seed,
                   temperature=options.temperature)
    return train.Run(options, agent)


def play_out(run):
    """A rollout, scored and with advantages."""
    rollout = playing.collect(run.policy, run.games, run.settings, run.sampling, run.fallback)
    playing.score_rollout(run.policy, rollout, run.settings)
    playing.add_advantages(run.policy, rollout, run.settings)
    return rollout


@pytest.mark.parametrize("task", GAMES)
def test_ratio_is_one_before_the_first_step(shipped, task):
    """What is scored is what was sampled, prompts that change every step included; also in other minibatches."""
    run = make_run(shipped, task, num_steps=3)
    shake(run.policy)
    rollout = play_out(run)
    assert len({tuple(p.ids) for p in rollout.prompts}) > (1 if task in ("ezpoints", "points24") else 0)
    metrics = playing.play_metrics(rollout, run.settings)
    assert metrics["thought_logp"] < 0 and metrics["action_logp"] <= 0
    assert largest_ratio_error(run.policy, rollout, [3, 40, 17], list(range(48))[::-5], [0]) == 0
    found = ppo.ppo_update(run.policy, run.optimizer, rollout, run.settings, run.shuffling)
    assert found["ratio_error"] == 0
    assert largest_ratio_error(run.policy, rollout, range(48)) > 1e-3   # after the steps it is another policy


def largest_ratio_error(policy, rollout, *batches, padded=True):
    """max |ρ − 1| over samples that are scored again in other company."""
    worst = 0.0
    for group, shape in itertools.chain.from_iterable(map(rollout.micro_batches, batches)):
        with torch.no_grad():
            logp, mask, _ = policy.logprobs([rollout.prompts[i] for i in group], [rollout.responses[i] for i in group],
                                            shape if padded else None)
        new = ppo.answer_logprob(logp, mask, rollout.action_starts[group], 0.5)
        worst = max(worst, ((new - rollout.old_logp[group]).exp() - 1).abs().max().item())
    return worst


def test_ratio_is_one_in_bf16_at_depth(mistral):
    """16 layers, temperature 0.2, Mistral's pieces, sampled answers of many lengths: exactly 1 in whatever minibatch,
    and far from 1 in batches that are padded to their own longest."""
    model = mistral_model(mistral.processor, layers=16, side=56).to(torch.bfloat16)
    agent = Policy(model, mistral.processor, rank=4, temperature=0.2, gradient_checkpointing=1)
    shake(agent, size=0.02)
    states = states_of("points24", 12)
    prompts = agent.encode([p for _, p, _ in states], [parse.make_prompt(g, i) for g, _, i in states])
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 40)
    responses = [response[:5 + 7 * k % 36] for k, response in enumerate(responses)]
    options = Settings(micro_batch_size=2, minibatch_size=6, update_epochs=1)
    rollout = playing.Rollout(*torch.zeros(3, 1, 12), prompts, responses,
                              action_starts=torch.tensor([len(response) * 2 // 3 for response in responses]))
    rollout.shapes = playing.padded_shapes(prompts, responses, options)
    playing.score_rollout(agent, rollout, options)
    others = [[k] for k in range(12)], [list(range(start, 12, 3)) for start in range(3)]
    assert largest_ratio_error(agent, rollout, *itertools.chain(*others)) == 0
    assert largest_ratio_error(agent, rollout, *others[0], padded=False) > 0.05
    rollout.advantages, rollout.returns = torch.ones(12), torch.zeros(12)
    optimizer = train.Run(Settings(task="points24", num_envs=4, lr=1e-4, value_lr=1e-4), agent).optimizer
    found = ppo.ppo_update(agent, optimizer, rollout, options, torch.Generator().manual_seed(1))
    assert found["ratio_error"] == 0                                    # with gradients and checkpointing, too


@pytest.mark.parametrize("task", ["numberline", "ezpoints"])
def test_each_value_belongs_to_its_own_state(shipped, task):
    """Returns of a real rollout, truncated episodes among it, recomputed one by one from a replay of the games."""
    run = make_run(shipped, task, num_envs=2, num_steps=20, max_new_tokens=60)
    shake(run.policy, size=0.2)                                         # worse play: episodes that are cut off
    twins = [GAMES[task]() for _ in run.games]
    for twin, game in zip(twins, run.games):
        twin.set_state(game.get_state())
    rollout = play_out(run)
    L, N = 20, 2
    r, v, after, ended = torch.zeros(4, L, N)
    terminated = torch.zeros(L, N)
    own = np.random.SeedSequence(run.settings.seed, spawn_key=(0,)).generate_state(2).tolist()
    fallback = np.random.default_rng(own[1])
    truncations, earned, episodes = 0, [twin.episode_return for twin in twins], []
    for t in range(L):
        for n, twin in enumerate(twins):
            picture, info = twin.observe()
            v[t, n] = run.policy.value(run.policy.encode([picture], [parse.make_prompt(twin, info)]))[0]
            text = run.policy.decode(rollout.responses[t * N + n])
            picture, r[t, n], done, cut, info = twin.step(parse.choose(text, twin.legal_actions(), fallback)[0])
            after[t, n] = run.policy.value(run.policy.encode([picture], [parse.make_prompt(twin, info)]))[0]
            terminated[t, n], ended[t, n] = done, done or cut
            truncations += cut
            earned[n] += r[t, n].item()
            if done or cut:
                episodes.append((earned[n], info["is_success"]))
                earned[n] = 0.0
                twin.reset()
    advantages, returns = ppo.gae(0.1 * r, v, after, terminated, ended, 0.9, 0.95)
    torch.testing.assert_close(rollout.old_values.view(L, N), v, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.returns.view(L, N), returns, atol=1e-3, rtol=1e-3)
    normalised = (advantages - advantages.mean()) / advantages.std()
    torch.testing.assert_close(rollout.advantages.view(L, N), normalised, atol=1e-2, rtol=1e-2)
    assert truncations > 0 and rollout.episodes == episodes
    variance = 1 - ((returns - v).var() / returns.var()).item()
    assert playing.value_metrics(rollout)["explained_variance"] == pytest.approx(variance, abs=0.02)


def test_metrics_and_the_sample_are_the_rollouts(shipped, tmp_path):
    """Recounted from what was played; the sample answer is the first game's, with its own reward."""
    run = make_run(shipped, "ezpoints", num_envs=8, num_steps=6, cot_lambda=0.25)
    rollout = play_out(run)
    logp, mask, _ = run.policy.logprobs(rollout.prompts, rollout.responses)
    weighed = ppo.answer_logprob(logp, mask, rollout.action_starts, 0.25)
    torch.testing.assert_close(rollout.old_logp, weighed.detach(), atol=1e-3, rtol=1e-3)
    found, (choice, reward) = train.record(run, tmp_path, rollout, {}, (0, 0))
    won, unfollowed, wrong = count_endings("ezpoints", rollout)
    assert unfollowed != wrong and found["lost_plan_not_followed"] == unfollowed / (won + unfollowed + wrong)
    assert found["lost_wrong_plan"] == wrong / (won + unfollowed + wrong)
    assert found["parse_rate"] == sum(c.named for c in rollout.choices) / 48
    assert found["reading_rate"] > 0.95                                 # of the state that it was asked in
    assert found["response_tokens"] == sum(map(len, rollout.responses)) / 48
    assert found["success"] == sum(success for _, success in rollout.episodes) / found["episodes"]
    assert choice is rollout.choices[5 * 8] and reward == rollout.rewards[5, 0]
    line = json.loads((tmp_path / "transcripts.jsonl").read_text())
    assert (line["text"], line["action"], line["reward"]) == (choice.text, choice.action, reward)


def test_without_chain_of_thought_no_prompt_asks_for_thoughts(shipped):
    """Neither the stored ones, nor those of cut-off and following states, nor those that imitation draws again."""
    run = make_run(shipped, "numberline", cot=False, num_envs=4, num_steps=12, imitation=1, max_new_tokens=3)
    shake(run.policy, size=0.2)
    rollout = play_out(run)
    prompts = [*rollout.prompts, *rollout.last_prompts, *(prompt for _, _, prompt in rollout.cut_off)]
    assert rollout.cut_off and not any('"thoughts"' in run.policy.tokenizer.decode(prompt.ids) for prompt in prompts)
    assert '"thoughts"' not in imitation._shown(run.games[0], rollout.states[0], run.settings)[1]
    named = [choice.named for choice in rollout.choices]                # cut off after three tokens
    assert max(map(len, rollout.responses)) == 3
    assert playing.play_metrics(rollout, run.settings)["parse_rate"] == sum(named) / len(named) < 1


def test_learning_rate_falls_and_stays_down(shipped):
    run, rates = make_run(shipped, "numberline", value_lr=0.1, total_timesteps=320), []
    for run.update in range(15):
        train.anneal(run)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    rates, of_value = zip(*rates)
    answers, head = (group["params"] for group in run.optimizer.param_groups)
    own = {*map(id, run.policy.value_head.parameters())}
    assert {*map(id, head)} == own and not own & {*map(id, answers)}
    assert of_value[0] == pytest.approx(0.1) and of_value[5] == pytest.approx(0.05) and of_value[-1] < 1e-8
    assert rates[0] == pytest.approx(1e-3) and rates[5] == pytest.approx(5e-4, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates)) and rates[10:] == (pytest.approx(1e-9),) * 5


def test_the_temperature_falls_in_even_steps_and_is_played_with(shipped, tmp_path, monkeypatch, capsys):
    """In rollouts, scores and held-out games alike; eval.py knows a run's, also of a folder without the setting."""
    run, seen = make_run(shipped, "numberline", temperature_end=0.1, total_timesteps=80, num_envs=4), []
    log_softmax = Policy._log_softmax
    monkeypatch.setattr(Policy, "_log_softmax", lambda self, hidden: (
        seen.append(self.temperature), log_softmax(self, hidden))[1])
    for run.update in (3, 11):                              # on its way, and at its end
        train.anneal(run)
        rollout = play_out(run)
        assert ppo.ppo_update(run.policy, run.optimizer, rollout, run.settings, run.shuffling)["ratio_error"] == 0
        assert {round(temperature, 9) for temperature in seen} == {round(max(0.1, 0.5 - 0.4 * run.update / 9), 9)}
        seen.clear()
    settings = Settings(task="numberline", total_timesteps=512, temperature=0.5, temperature_end=0.1)
    assert settings.temperature_at(0) == 0.5 and settings.temperature_at(1) == pytest.approx(0.1)     # one update
    command = ["--task", "numberline", "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "16", "--rank", "2",
               "--max-new-tokens", "5", "--eval-episodes", "4", "--temperature-end", "0.25"]
    train.main([*command, "--out", str(tmp_path / "run")])
    card_says = (checkpoint.newest_checkpoint(tmp_path / "run") / "README.md").read_text()
    assert "--temperature-end 0.25" in card_says and "--temperature 0.25" in card_says
    policy, found = players.open_run(tmp_path / "run")
    assert policy.temperature == found["temperature"] == pytest.approx(0.25) == seen[-1]
    asked = ["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "2"]
    for more, temperature in (([], 0.25), (["--temperature", "0.125"], 0.125)):
        evaluation.main([*asked, *more])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["temperature"] == temperature == seen[-1]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    del stored["temperature_end"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert players.open_run(tmp_path / "run")[0].temperature == 0.5


def test_a_temperature_that_was_chosen_stays():
    """The pocket model's Points24 has a falling one by default; what is given alone is constant."""
    for small, chosen, expected in ((True, {}, (0.3, 0.1)), (True, {"temperature": 0.5}, (0.5, 0.5)),
                                    (True, {"temperature": 0.5, "temperature_end": 0.2}, (0.5, 0.2)),
                                    (True, {"temperature_end": 0.2}, (0.3, 0.2)), (False, {}, (0.2, 0.2))):
        settings = Settings(task="points24", **chosen)
        run_settings.fill_in(settings, small)
        assert (settings.temperature, settings.temperature_end) == expected
    assert [players.open_policy("pocket", task=task)[0].temperature for task in ("points24", "ezpoints")] == [0.3, 0.5]
    for task, chosen, said in (("points24", {}, []), ("points24", {"temperature": 0.5}, ["--temperature", "0.5"]),
                               ("points24", {"temperature": 0.5, "temperature_end": 0.1},
                                ["--temperature", "0.5", "--temperature-end", "0.1"]),
                               ("blackjack", {"temperature": 0.3, "temperature_end": 0.5},
                                ["--temperature", "0.3", "--temperature-end", "0.5"])):
        settings = Settings(task=task, **chosen)                            # a model card's command makes the same run
        run_settings.fill_in(settings, small=True)
        assert card._flags(settings, ("temperature", "temperature_end"), small=True) == said


def test_advantages_below_0_may_weigh_less(shipped):
    """Computed beside: the same rollout, once with the weight 1 and once with 0.25."""
    runs = [make_run(shipped, "blackjack", negative_weight=weight) for weight in (1.0, 0.25)]
    plain, weighed = (play_out(run).advantages for run in runs)
    assert (plain < 0).any() and (plain > 0).any() and plain.mean().abs() < 1e-6
    assert weighed.tolist() == [a if a >= 0 else 0.25 * a for a in plain.tolist()]


def test_what_is_kept_of_won_games():
    """Two games over two rollouts, by hand: one is won across both, without its punished step; one lost, then won,
    without its answer that named no action."""
    won = imitation.WonGames(2)
    rewards = [torch.tensor([[0.0, 0.0], [-1.0, -1.0]]), torch.tensor([[10.0, 0.0], [0.0, 10.0]])]
    ended = [torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    for r in range(2):
        names = [f"rollout {r} step {t} game {n}" for t in range(2) for n in range(2)]
        choices = [SimpleNamespace(named=name != "rollout 1 step 0 game 1") for name in names]
        won.add(SimpleNamespace(rewards=rewards[r], terminated=ended[r], truncated=torch.zeros(2, 2),
                                states=names, responses=names, choices=choices))
        if r == 0:
            assert not won.kept and [len(waiting) for waiting in won.waiting] == [1, 0]
            again = imitation.WonGames(2)
            again.set_state(json.loads(json.dumps(won.get_state())))            # as through a checkpoint
            assert again.get_state() == won.get_state() and again.kept.maxlen == imitation.KEPT
    assert [state for state, _ in won.kept] == ["rollout 0 step 0 game 0", "rollout 1 step 0 game 0",
                                                "rollout 1 step 1 game 1"]
    assert won.waiting == [[["rollout 1 step 1 game 0"] * 2], []]
    won.add(SimpleNamespace(rewards=torch.ones(1, 2), terminated=torch.zeros(1, 2), truncated=torch.ones(1, 2),
                            states=["a", "b"], responses=["a", "b"], choices=choices))
    assert len(won.kept) == 3 and won.waiting == [[], []]                       # time was up: not won


def test_imitation_makes_won_answers_likelier(shipped, monkeypatch):
    """By transformers' own loss as well; V, its optimiser and the games stay as they are."""
    run = make_run(shipped, "ezpoints", imitation=2, minibatch_size=8, num_steps=6)
    none = imitation.imitate(run.policy, run.optimizer, run.won, run.games[0], run.settings, run.shuffling)
    assert none == {"won_answers": 0, "imitation_loss": None}
    rollout = play_out(run)
    run.won.add(rollout)
    kept = [rollout.states.index(state) for state, _ in run.won.kept]
    assert 16 <= len(kept) < len(rollout.states) and all(rollout.rewards.view(-1)[i] >= 0 for i in kept)
    score = lambda: run.policy.logprobs([rollout.prompts[i] for i in kept],
                                        [rollout.responses[i] for i in kept])[0].sum().item()
    before, states = score(), [game.get_state() for game in run.games]
    head = copy.deepcopy(run.policy.value_head.state_dict())
    some = [kept[i] for i in torch.randperm(len(kept), generator=torch.Generator().set_state(run.shuffling.get_state()))
            .tolist()[:16]]                                             # two minibatches of 8, drawn
    first = run.policy.logprobs([rollout.prompts[i] for i in some[:8]], [rollout.responses[i] for i in some[:8]])
    losses, prepare = [], imitation.prepare_step
    monkeypatch.setattr(imitation, "prepare_step", lambda optimizer, loss, settings: (
        losses.append(loss.item()), prepare(optimizer, loss, settings)))
    found = imitation.imitate(run.policy, run.optimizer, run.won, run.games[0], run.settings, run.shuffling)
    assert losses[0] == pytest.approx(-first[0].sum().item() / first[1].sum().item(), rel=1e-4)         # a token
    assert found["imitation_loss"] == pytest.approx(sum(losses) / 2) and len(losses) == 2
    assert found["won_answers"] == len(kept) and found["imitation_loss"] > 0 and score() > before
    assert [game.get_state() for game in run.games] == states
    assert all(torch.equal(head[name], now) for name, now in run.policy.value_head.state_dict().items())
    assert not any(run.optimizer.state[p] for p in run.optimizer.param_groups[1]["params"])


def test_processes_imitate_equally_often(shipped, monkeypatch):
    """Each takes as many steps as the one that has kept the fewest; a minibatch is shared out among them."""
    run, asked, scored = make_run(shipped, "numberline", imitation=3, minibatch_size=8), [], []
    logprobs = run.policy.logprobs
    monkeypatch.setattr(run.policy, "logprobs", lambda prompts, answers, *shape: (
        scored.append(len(answers)), logprobs(prompts, answers, *shape))[1])
    rollout = play_out(run)
    scored.clear()
    run.won.kept.extend(zip(rollout.states, rollout.responses))
    monkeypatch.setattr(run.policy, "encode_answers", None)             # sampled ids are learned, not the text's
    monkeypatch.setattr(run.optimizer, "step", lambda: asked.append(0))
    for other, steps in ((None, 3), (0, 0), (2, 2)):
        if other is not None:
            monkeypatch.setattr(parallel, "size", lambda: 2)
            monkeypatch.setattr(parallel, "concat", lambda mine, other=other: torch.cat([mine, torch.tensor([other])]))
            monkeypatch.setattr(parallel, "average", lambda parameters, losses: None)
        imitation.imitate(run.policy, run.optimizer, run.won, run.games[0], run.settings, run.shuffling)
        assert len(asked) == steps and sum(scored) == steps * (8 if other is None else 4)
        asked.clear()
        scored.clear()


def test_a_run_that_imitates_itself_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    command = ["--task", "numberline", "--num-envs", "8", "--num-steps", "4", "--total-timesteps", "64", "--rank", "2",
               "--minibatch-size", "4", "--update-epochs", "1", "--eval-episodes", "0", "--imitation", "1",
               "--negative-weight", "0.5", "--temperature", "0.3", "--temperature-end", "0.2"]
    train.main([*command, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit, match="--resume"):
            train.main([*command, "--out", str(tmp_path / "stopped")])
    train.main([*command, "--out", str(tmp_path / "stopped"), "--resume"])
    one, other = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    assert one == other
    rows = recorded.metrics(tmp_path / "whole")
    assert rows[-1]["won_answers"] > rows[0]["won_answers"] >= 4 and rows[-1]["imitation_loss"] > 0
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "process0.json"):
        one, other = ((checkpoint.newest_checkpoint(tmp_path / name) / file).read_bytes()
                      for name in ("whole", "stopped"))
        assert one == other


def test_what_written_plans_are_worth(tmp_path, capsys):
    """Followed to the letter, a right plan wins and a wrong one loses; tries are counted per set of numbers; a player
    that plays well on one set alone is told apart there."""
    game = GAMES["ezpoints"]()
    say = {"right": lambda info: "".join(expert.continuations("ezpoints", info)[0]), "wrong": lambda info: "="}
    for plan, wins in (("right", 1.0), ("wrong", 0.0)):
        def player(games, pictures, infos, plan=plan):
            return [playing.Choice("1", 0, True, f"Now '' then '{say[plan](info)}'. I choose 1.") for info in infos]
        assert evaluation.evaluate(plans.following(player), "ezpoints", 20, 0)["success"] == wins
    plans.main(["--task", "ezpoints", "--model", "pocket", "--temperature", "0.2", "--episodes", "8", "--tries", "3"])
    found = json.loads(capsys.readouterr().out)
    dealt = {tuple(sorted(game.reset(seed=seed)[1]["numbers"])) for seed in range(10_000, 10_008)}
    assert found["first_plan"]["sets"] == len(dealt) and found["first_plan"]["tries"] == 3
    assert found["temperature"] == 0.2 and 0.9 <= found["first_plan"]["right"] <= found["first_plan"]["right_once"]
    assert found["followed"]["success"] > 0.9                               # its plans are right, at 0.5 it wins 26 %
    assert found["sets_won"] == 0 and found["by_experience"] is None
    game.reset(seed=10_000)
    one = tuple(sorted(game.observe()[1]["numbers"]))
    (tmp_path / "checkpoint-000001").mkdir()
    kept = {"won": {"kept": [[game.get_state(), []]]}}
    (tmp_path / "checkpoint-000001" / "process0.json").write_text(json.dumps(kept))
    assert plans.won_in_training(tmp_path, "ezpoints") == {one}

    def plays_one(games, pictures, infos):
        """Plans right and follows its plan on that set, plans right and ends at once on all others."""
        texts = [f"then '{say['right'](info)}'." for info in infos]
        return [playing.Choice(expert.planned(text)[0], game.legal_actions().index(expert.planned(text)[0]), text=text)
                if tuple(sorted(info["numbers"])) == one else
                playing.Choice("=", game.legal_actions().index("="), text=text) for text, info in zip(texts, infos)]

    known, others = plans.by_experience(plays_one, {one}, "ezpoints", 8, 10_000).values()
    assert (known["won"], known["first_plan_right"], known["right_plan_followed"]) == (1, 1, 1)
    assert (others["won"], others["first_plan_right"], others["right_plan_followed"]) == (0, 1, 0)
    dealt = [tuple(sorted(game.reset(seed=seed)[1]["numbers"])) for seed in range(10_000, 10_008)]
    assert known["share_of_solvable_deals"] == dealt.count(one) / 8 < 1
    game = GAMES["points24"]()                                              # of whose deals a quarter has no solution
    solvable = [seed for seed in range(8) if expert.continuations("points24", game.reset(seed=seed)[1])]
    one = tuple(sorted(game.reset(seed=solvable[0])[1]["numbers"]))

    def ends(games, pictures, infos):
        return [playing.Choice("=", game.legal_actions().index("="), text="then '='.") for _ in infos]

    shares = plans.by_experience(ends, {one}, "points24", 8, 0)["won_in_training"]
    assert len(solvable) < 8 and shares["share_of_solvable_deals"] == 1 / len(solvable) and shares["won"] == 0


def test_the_baseline_without_a_language_model(tmp_path, capsys, monkeypatch):
    """Features and an MLP under the same loop: uniform at the start, always a legal action, goes on from its folder."""
    out, command = str(tmp_path / "run"), ["--task", "numberline", "--num-steps", "4", "--lr", "5e-3"]
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(2, checkpoint.save))
        with pytest.raises(SystemExit, match="--resume"):
            features.main([*command, "--total-timesteps", "768", "--eval-episodes", "25", "--out", out])
    features.main(["--out", out, "--resume"])
    metrics = recorded.metrics(tmp_path / "run")
    assert metrics[0]["action_logp"] == pytest.approx(-math.log(2), abs=1e-6) and metrics[-1]["success"] > 0.5
    assert all(row["parse_rate"] == 1 and row["thought_logp"] == 0 for row in metrics)
    start, end = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("eval_start", "eval"))
    assert end["success"] > start["success"]
    options, _ = run_settings.read_settings(features.FeatureSettings, "", ["--out", out, "--resume"])
    agent = features.make_features(options)
    untaught = agent.narrow.weight.abs().sum()
    agent.load(checkpoint.newest_checkpoint(out))
    assert untaught == 0 and agent.value_head.fitted and agent.narrow.weight.abs().sum() > 0
    prompts = agent.encode([picture for _, picture, _ in states_of("numberline", 8)], [""] * 8)
    alone = torch.cat([agent.logprobs([prompt], [[0]])[0] for prompt in prompts])
    torch.testing.assert_close(agent.logprobs(prompts, [[0]] * 8)[0], alone)
    with pytest.raises(SystemExit, match="holds no adapters"):
        evaluation.main(["--task", "numberline", "--run", out])
    with pytest.raises(SystemExit):
        features.main([*command, "--rank", "8"])                        # a flag that only a language model has
    assert "unrecognized arguments: --rank" in capsys.readouterr().err
    taught = features.FeaturePolicy(*features.pocket_eyes(), GAMES["numberline"]().legal_actions())
    features.teach(taught, "numberline", 15, label_noise=0.0)
    result = evaluation.evaluate(players.model_player(taught, 0, cot=False), "numberline", 25, 0, cot=False)
    assert result["success"] > 0.8


def test_held_out_games_are_asked_as_the_run_was(shipped, tmp_path, monkeypatch, capsys):
    """Without chain of thought no prompt wants thoughts, and none are looked for in the answers."""
    run, texts = make_run(shipped, "numberline", cot=False, eval_episodes=2, max_new_tokens=20), []
    encode = run.policy.encode
    monkeypatch.setattr(run.policy, "encode", lambda pictures, said: (texts.extend(said), encode(pictures, said))[1])
    result = train.held_out(run, "end", tmp_path / "eval.json")
    assert texts and not any('"thoughts"' in text for text in texts) and result["reading_rate"] is None
    evaluation.main(["--task", "numberline", "--model", "pocket", "--no-cot", "--episodes", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reading_rate"] is None


def test_a_checkpoint_brings_back_all_that_a_run_hangs_on(shipped, tmp_path):
    """Each generator, each moment of the optimiser and each game by itself, not only what comes of them together."""
    run, again = make_run(shipped, "blackjack", minibatch_size=16), make_run(shipped, "blackjack", minibatch_size=16)
    ppo.ppo_update(run.policy, run.optimizer, play_out(run), run.settings, run.shuffling)
    run.update = 1
    run.fallback.random(3)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(run.settings)))
    checkpoint.save(run, tmp_path)
    checkpoint.load(again, tmp_path / "checkpoint-000001")
    for one, other in ((run.sampling.get_state(), again.sampling.get_state()),
                       (run.shuffling.get_state(), again.shuffling.get_state()),
                       *zip(*(r.policy.state_dict().values() for r in (run, again)))):
        assert torch.equal(one, other)
    assert run.fallback.bit_generator.state == again.fallback.bit_generator.state and again.update == 1
    assert [game.get_state() for game in run.games] == [game.get_state() for game in again.games]
    moments, taken_up = (r.optimizer.state_dict()["state"] for r in (run, again))
    assert moments and all(torch.equal(value, taken_up[index][key])
                           for index, state in moments.items() for key, value in state.items())


def test_training_deals_lie_above_every_held_out_seed(shipped):
    run = make_run(shipped, "points24")
    deals = np.random.SeedSequence(run.settings.seed).generate_state(1 + len(run.games)).tolist()[1:]
    for game, deal in zip(run.games, deals):
        twin = GAMES["points24"]()
        twin.reset(seed=deal + 2**31)
        assert game.get_state() == twin.get_state()


def test_seeds_differ_everywhere(shipped):
    a, b, c = (make_run(shipped, "blackjack", seed=seed) for seed in (1, 1, 2))
    rollouts = [play_out(run).responses for run in (a, b, c)]
    assert rollouts[0] == rollouts[1] != rollouts[2]
    hands = lambda run: [game.player for game in run.games]
    assert hands(a) == hands(b) != hands(c)
    assert not torch.equal(*(next(iter(run.policy.lora.values())).lora_A for run in (a, c)))
    assert len({str(game.get_state()["generator"]) for game in a.games}) == len(a.games)


def test_what_is_killed_or_damaged_is_as_the_run_left_alone_or_refused():
    """A share of extras/torture.py, in a process of its own because it forks: each row's tries all held. (Flipped bits
    are DAMAGES' below.)"""
    found = subprocess.run([sys.executable, "-m", "extras.torture", "--every", "100", "--kills", "1", "--flips", "0",
                            "--answers", "2000"], cwd=HERE, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout.splitlines()[-1])["tried_held"]
    assert len(rows) == 6 and all(tried == held for tried, held in rows.values())
    assert sum(tried > 0 for tried, _ in rows.values()) >= 3            # a random moment may come too late


def test_a_half_written_checkpoint_is_never_taken(shipped, tmp_path, monkeypatch):
    run = make_run(shipped, "numberline")
    checkpoint.save(run, tmp_path)
    run.update = 1
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(run, tmp_path)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-000000"]


@pytest.mark.parametrize("arguments, message", [
    (["--total-timesteps", "10"], "--task is needed"),
    (["--task", "blackjack", "--num-envs", "0"], "--num-envs must be 1 or more"),
    (["--task", "blackjack", "--total-timesteps", "100"], "less than one rollout of 512"),
    (["--task", "blackjack", "--cot-lambda", "2"], "--cot-lambda must lie"),
    (["--task", "blackjack", "--temperature", "0"], "--temperature must be above"),
    (["--task", "blackjack", "--target-modules", "vision,tail"], "no part tail"),
    (["--task", "blackjack", "--rank", "100000000"], "--rank must be 16384 or less"),
    (["--task", "blackjack", "--lr", "1e-3", "--lr-end", "1e-2"], "--lr-end must not be above"),
    (["--task", "blackjack", "--eval-seed", "2147483647", "--eval-episodes", "2"], "training deals begin there"),
    (["--task", "poker"], "invalid choice")])
def test_bad_settings_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run_settings.read_settings(Settings, "", arguments)
    assert message in capsys.readouterr().err


def test_parts_in_any_order_are_one_setting(tmp_path, capsys):
    parse_parts = lambda text: run_settings.read_settings(Settings, "", ["--task", "numberline", "--out", str(tmp_path),
                                                                         "--target-modules", text])[0].target_modules
    assert parse_parts("language,vision") == parse_parts("vision,language,language") == ("vision", "language")
    found, resume = run_settings.read_settings(Settings, "", ["--task", "numberline", "--resume", "--out",
                                                              str(tmp_path / "none")])
    assert not resume and found.task == "numberline" and "this starts one" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [Settings, sft.SFTSettings, features.FeatureSettings])
def test_every_setting_has_a_flag_with_its_meaning_and_its_default(cls):
    text = " ".join(run_settings.make_parser(cls).format_help().split())
    for entry in dataclasses.fields(cls):
        flag = "--" + entry.name.replace("_", "-")
        assert (f" {flag}" in text) == entry.metadata["flag"], flag
        if entry.metadata["flag"]:
            assert len(entry.metadata["help"]) > 5
            assert entry.metadata["by_size"] is None or f"[{entry.metadata['by_size']['small']} pocket" in text


def test_a_run_is_not_overwritten_and_resumes_with_its_own_settings(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(
        Settings(task="ezpoints", seed=4))))
    with pytest.raises(SystemExit):
        run_settings.read_settings(Settings, "", ["--task", "ezpoints", "--out", str(tmp_path)])
    assert "holds a run already" in capsys.readouterr().err
    found, resume = run_settings.read_settings(Settings, "", ["--out", str(tmp_path), "--resume"])
    assert resume and found.task == "ezpoints" and found.seed == 4
    with pytest.raises(SystemExit):
        run_settings.read_settings(Settings, "", ["--out", str(tmp_path), "--resume", "--seed", "5"])
    assert "seed 4, not 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_settings.read_settings(Settings, "", ["--out", str(tmp_path), "--resume", "--micro-batch-size", "0"])
    assert "--micro-batch-size must be above 0" in capsys.readouterr().err


def test_evaluation_agrees_with_exact_values(tmp_path, capsys):
    evaluation.main(["--task", "blackjack", "--policy", "always:stand", "--episodes", "4000"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"task", "policy", "episodes", "seed", "success", "success_low", "success_high", "return_mean", "goal_rate",
            "parse_rate", "expert_agreement", "reading_rate", "hit_rate_by_total"} <= set(result)
    assert result["success"] == pytest.approx(0.3807, abs=0.025) and set(result["hit_rate_by_total"].values()) == {0.0}
    assert result["success_low"] < 0.3807 < result["success_high"]
    random_play = evaluation.evaluate(players.scripted_player("random", "blackjack", 0), "blackjack", 4000, 10_000)
    assert random_play["success"] == pytest.approx(0.2806, abs=0.025)
    assert random_play["return_mean"] == pytest.approx(-0.396, abs=0.05)
    plus = evaluation.evaluate(players.scripted_player("always:+", "numberline", 0), "numberline", 1000, 0)
    assert plus["success"] == pytest.approx(0.5, abs=0.06) and plus["goal_rate"] == plus["success"]
    # the same episodes, however many are played side by side
    few, many = (evaluation.evaluate(players.scripted_player("expert", "points24", 0), "points24", 40, 5, envs)
                 for envs in (3, 64))
    assert few == many


def test_what_lost_a_formula_game_is_hand_worked():
    """The first decision that leaves every solution is blamed on the plan, or on not following it."""
    def episode(number, numbers, target, *steps):               # step: (plan, action)
        formula, decisions = [], []
        for plan, action in steps:
            info = {"numbers": numbers, "target": target, "formula": list(formula)}
            text = f"Now '{''.join(formula)}' then '{plan}'. I choose {action}."
            decisions.append(Decision(number, info, playing.Choice(action, 0, True, text)))
            formula += [] if refused(info, action) or action == "=" else [action]
        return decisions

    easy, hard = ([2, 10], 12), ([2, 4, 8, 10], 24)
    won = episode(0, *easy, ("2+10=", "10"), ("+2=", "+"), ("2=", "2"), ("=", "="))     # another solution than planned
    brackets = [(f"{'(10+8)+4+2='[k:]}", symbol) for k, symbol in
                zip((0, 1, 3, 4, 5, 6, 7, 8, 9, 10), ("(", "10", "+", "8", ")", "+", "4", "+", "2", "="))]
    needless = episode(1, *hard, *brackets)
    unfollowed = episode(2, *easy, ("2+10=", "2"), ("+10=", "*"), ("nothing", "="))
    wrong = episode(3, *easy, ("2*10=", "2"), ("*10=", "*"), ("10=", "10"), ("=", "="))
    slow = episode(4, *easy, *[("2+10=", "7")] * 5)
    early = episode(5, *easy, ("2+10=", "="))
    unsolvable = episode(6, [1, 1, 1, 1], 24, ("nothing", "="))
    for steps, end in ((won, "won"), (needless, "won"), (unfollowed, "right plan not followed"), (wrong, "wrong plan"),
                       (slow, "out of time"), (early, "right plan not followed"), (unsolvable, None)):
        task = "points24" if len(steps[0].info["numbers"]) == 4 else "ezpoints"
        shares = plan_statistics(task, steps)["lost_by"]
        assert shares == ({name: float(name == end) for name in shares} if end else dict.fromkeys(shares))
    assert plan_statistics("ezpoints", won)["plan_followed"] == 0.75    # "2+10=" begins with 2
    assert decision_statistics("ezpoints", won, cot=False)["expert_agreement"] == 1     # to begin with 10 is good too
    assert plan_statistics("points24", unsolvable)["plan_rate"] is None
    together = plan_statistics("ezpoints", [*won, *unfollowed, *wrong, *slow, *early])["lost_by"]
    assert together == {"won": 0.2, "right plan not followed": 0.4, "wrong plan": 0.2, "out of time": 0.2}
    steps = [*won, *unfollowed, *wrong, *slow, *early]
    some = SimpleNamespace(infos=[step.info for step in steps], choices=[step.choice for step in steps],
                                 rewards=torch.tensor([[0, 0, 0, 10.0, -1]]))
    assert count_endings("ezpoints", some) == [1, 2, 1]
    # what is called won is what the game pays for: the model in this repository, its own decisions
    policy, _ = players.open_policy("pocket")
    result = evaluation.evaluate(players.model_player(policy, 0, max_new_tokens=80), "ezpoints", 24, 0)
    assert result["lost_by"]["won"] == result["goal_rate"] and sum(result["lost_by"].values()) == pytest.approx(1)


def test_blackjacks_decisions_are_counted_by_total():
    """Hand-worked: hits on 11, 12, 16, 17; who says nothing has no parse rate."""
    played = ((5, "stand"), (11, "hit"), (12, "hit"), (16, "hit"), (16, "stand"), (17, "hit"), (20, "stand"))
    found = decision_statistics("blackjack", [
        Decision(0, {"total": total, "dealer": "7", "hand": ["5"], "usable_ace": False},
                 playing.Choice(action, 0, True, None)) for total, action in played], cot=True)
    assert found["hit_rate_by_total"] == {"5": 0, "11": 1, "12": 1, "16": 0.5, "17": 1, "20": 0}
    assert found["decisions_by_total"] == {"5": 1, "11": 1, "12": 1, "16": 2, "17": 1, "20": 1}
    assert (found["hit_rate_to_11"], found["hit_rate_12_to_16"], found["hit_rate_from_17"]) == (1/2, 2/3, 1/2)
    assert found["parse_rate"] is None and found["reading_rate"] is None


def test_the_likeliest_answer_hangs_on_no_seed(shipped):
    policy = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2, temperature=1.0)
    games = [GAMES["points24"]() for _ in range(6)]
    states = [game.reset(seed=k) for k, game in enumerate(games)]
    options = SimpleNamespace(policy=None, endpoint=None)
    settings = {"cot": True, "max_new_tokens": 60, "play_batch_size": 64}
    for greedy in (True, False):
        options.greedy, answers = greedy, []
        for options.seed in (0, 1):
            player = evaluation.make_player(options, policy, settings, "points24")
            answers.append([choice.text for choice in player(games, *zip(*states))])
        assert (answers[0] == answers[1]) == greedy


@pytest.mark.parametrize("arguments, message", [
    (["--policy", "always:fly"], "no legal action"), (["--policy", "clever"], "use random, expert or always"),
    (["--run", "nowhere"], "no checkpoint"), (["--policy", "random", "--episodes", "0"], "1 or more"),
    (["--policy", "random", "--greedy"], "draws no tokens"),
    (["--policy", "random", "--temperature", "0.1"], "draw no tokens"),
    (["--policy", "random", "--max-new-tokens", "5"], "draw no tokens"),
    (["--model", "pocket", "--greedy", "--temperature", "0.1"], "no --temperature"),
    (["--model", "pocket", "--endpoint", ""], "--endpoint is empty"), (["--model", "pocket", "--out", ""], "empty"),
    (["--policy", "random", "--out", "x.html", "--render", "x.html"], "two files"),
    (["--policy", "random", "--episodes", "1" + 14 * "0"], "below 2³¹"),
    (["--policy", "random", "--seed", "2147483647", "--episodes", "2"], "training deals begin there"),
    (["--model", str(POCKET.with_name("pocket-alfworld"))], "words of other games"),
    (["--policy", "random", "--endpoint", "http://localhost:1/v1"], "needs --model NAME")])
def test_evaluation_says_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit, match=message):
        evaluation.main(["--task", "blackjack", *arguments])


def test_all_games_are_one_table_and_one_json(tmp_path, capsys):
    """Each game's result is what it is alone; the average is of the four card games; what has no sense is refused."""
    arguments = ["--policy", "random", "--episodes", "8", "--num-envs", "8"]
    evaluation.main(["--task", "all", *arguments, "--out", str(tmp_path / "all.json")])
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found["tasks"]) - {"alfworld"} == set(GAMES)
    assert found["average"] == pytest.approx(sum(found["tasks"][task]["success"] for task in GAMES) / 4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    for task in ("numberline", "blackjack"):
        evaluation.main(["--task", task, *arguments])
        printed = capsys.readouterr().out
        assert json.loads(printed.splitlines()[-1]) == {"policy": "random", **found["tasks"][task]}
        assert f"random {recorded.baseline(task, 'random'):.1f} %" in printed
    for bad in (["--policy", "always:="], ["--policy", "heuristic"], ["--model", "pocket", "--render", "game.html"]):
        with pytest.raises(SystemExit, match="--task all takes"):
            evaluation.main(["--task", "all", *bad])


@pytest.mark.parametrize("chosen", [None, 0.25])
def test_all_games_are_played_at_the_temperature_that_each_starts_with(monkeypatch, chosen):
    played, result = {}, {"success": 0, "success_low": 0, "success_high": 0, "parse_rate": None, "reading_rate": None}
    monkeypatch.setattr(evaluation, "play_task", lambda options, policy, name, settings, task: (
        played.update({task: policy.temperature}), result | {"policy": name})[1])
    evaluation.main(["--task", "all", "--model", "pocket", *(["--temperature", str(chosen)] if chosen else [])])
    assert played == {task: chosen or {"points24": 0.3}.get(task, 0.5) for task in played} and set(GAMES) <= set(played)


def test_an_episode_can_be_drawn(tmp_path, capsys):
    evaluation.main(["--task", "points24", "--model", "pocket", "--episodes", "1", "--max-new-tokens", "80",
                     "--render", str(tmp_path / "game.gif"), "--out", str(tmp_path / "game.json")])
    with draw.Image.open(tmp_path / "game.gif") as film:
        assert film.n_frames >= 2 and film.size == (760, 300)
    evaluation.main(["--task", "numberline", "--policy", "expert", "--episodes", "1",
                     "--render", str(tmp_path / "game.png")])
    with draw.Image.open(tmp_path / "game.png") as strip:
        assert strip.width == 760 and strip.height >= 600 and strip.height % 300 == 0
    assert json.loads((tmp_path / "game.json").read_text())["episodes"] == 1
    picture, frames = GAMES["blackjack"]().reset(seed=0)[0], []
    for named in (True, False):                                         # an action drawn at random is marked
        film = Film()
        film(picture, playing.Choice("hit", 1, named, "no idea"), 0)
        frames.append(np.asarray(film.frames[0]))
    assert not np.array_equal(*frames)


def test_supervised_fine_tuning_teaches_and_its_adapters_go_on(tmp_path, capsys):
    sft.main(["--task", "numberline", "--model", "pocket", "--steps", "40", "--batch-size", "32", "--lr", "2e-3",
              "--rank", "8", "--out", str(tmp_path / "a")])
    policy, _ = players.open_policy(str(tmp_path / "a"))
    result = evaluation.evaluate(players.model_player(policy, 0), "numberline", 32, 0)
    assert result["success"] > 0.6                                      # from 27 %: the labels had no noise this time
    with pytest.raises(SystemExit):
        sft.main(["--task", "numberline", "--model", "pocket", "--out", str(tmp_path / "a")])
    assert "holds a run already" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match="not empty"):
        sft.main(["--task", "numberline", "--model", "pocket", "--out", str(tmp_path / "b")])
    assert (tmp_path / "b" / "letter.txt").read_text() == "dear"
    for more, message in ((["--model", str(tmp_path / "a")], "have rank 8"),
                          (["--model", "pocket", "--full"], "has no adapters")):
        with pytest.raises(SystemExit) as stop:
            sft.main(["--task", "numberline", "--rank", "4", "--out", str(tmp_path / "c"), *more])
        assert message in f"{stop.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("full", [False, True])
def test_fine_tuning_goes_on_after_ctrl_c_bit_for_bit(tiny, tmp_path, monkeypatch, full):
    """A real SIGINT in mid-step: that step is finished and kept; the end is that of the course left alone."""
    command = ["--task", "numberline", "--model", str(tiny), "--steps", "5", "--batch-size", "4", "--lr", "1e-2"]
    command += ["--full", "--bits", "32"] if full else ["--rank", "2"]
    sft.main([*command, "--out", str(tmp_path / "alone")])
    taken, plain = [], sft.step

    def interrupted(*arguments):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(sft, "step", interrupted)
    with pytest.raises(SystemExit, match="--resume"):
        sft.main([*command, "--out", str(tmp_path / "stopped")])
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "stopped")] == ["checkpoint-000003"]
    with pytest.raises(ModelError):                                     # not whole: no model, no adapters
        loading.find_model(str(tmp_path / "stopped"))
    sft.main([*command, "--out", str(tmp_path / "stopped"), "--resume"])
    assert len(taken) == 5
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "stopped").iterdir()) and "sft.json" in names
    for name in names:
        if name != "sft.json":
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    (tmp_path / "stopped" / "checkpoint-000005").mkdir()                # as a kill in the clean-up leaves it
    sft.main([*command, "--out", str(tmp_path / "stopped"), "--resume"])                # finished: left as it is
    assert not checkpoint.checkpoints(tmp_path / "stopped")
    assert len(taken) == 5


def test_rl_on_plain_weights_is_taught_the_format_first(tiny, tmp_path, monkeypatch, capsys):
    """--sft-steps: both stages in one run folder, gone on with after a stop in the first, by the same command."""
    command = ["--task", "numberline", "--model", str(tiny), "--sft-steps", "3", "--rank", "2", "--num-envs", "8",
               "--num-steps", "2", "--total-timesteps", "32", "--eval-episodes", "4", "--max-new-tokens", "8",
               "--out", str(tmp_path / "run")]
    plain = sft.save_sft

    def stopping(policy, optimizer, done, settings):
        plain(policy, optimizer, 1, settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(sft, "save_sft", stopping)
        with pytest.raises(SystemExit, match="go on with the same command and --resume"):
            train.main(command)
    train.main([*command, "--resume"])
    assert "two stages: 3 batches" in capsys.readouterr().out
    assert lora.base_name(tmp_path / "run" / "sft") == str(tiny)
    assert len(recorded.metrics(tmp_path / "run")) == 2
    start = load_file(tmp_path / "run" / "sft" / "adapter_model.safetensors")
    assert max(tensor.abs().max() for name, tensor in start.items() if "lora_B" in name) > 0
    shutil.rmtree(tmp_path / "run" / "sft")
    train.main([*command, "--resume"])                                  # finished; what it started from may be gone
    assert [run_settings.default_of(Settings, "sft_steps", small) for small in (True, False)] == [0, 100]


# ---- plumbing/: a run's folder -------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory, tiny):
    """(folder, command): a run of the tiny model that was stopped after two of four updates."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(tiny, folder / "model")
    command = ["--task", "numberline", "--model", str(folder / "model"), "--sft-steps", "0", "--rank", "2",
               "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "32", "--max-new-tokens", "4",
               "--minibatch-size", "8", "--eval-episodes", "0"]
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(2, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main([*command, "--out", str(folder / "run")])
    return folder / "run", command


def flip(file):
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {             # what is done to a run's folder and its newest checkpoint: what --resume says of it
    "metrics but no checkpoint": lambda run, last: shutil.rmtree(last),
    "adapter_model.safetensors is not as it was": lambda run, last: flip(last / "adapter_model.safetensors"),
    "optimizer.safetensors is not as it was": lambda run, last: flip(last / "optimizer.safetensors"),
    "generators0.safetensors is not as it was": lambda run, last: flip(last / "generators0.safetensors"),
    "value_head.safetensors is missing": lambda run, last: (last / "value_head.safetensors").unlink(),
    "process0.json is not as it was": lambda run, last: edit(last / "process0.json", update=1),
    "no manifest": lambda run, last: (last / "manifest.json").unlink(),
    "it is not as it was written": lambda run, last: edit(last / "manifest.json", base="0"),
    "another run's: it has seed 1, not 2": lambda run, last: edit(run / "config.json", seed=2),
    "another run's: it has num_envs 4, not 8": lambda run, last: edit(run / "config.json", num_envs=8),
    "has 1 lines and the checkpoint 2": lambda run, last: checkpoint.keep_lines([run / "metrics.jsonl"], 1),
    "config.json cannot be used": lambda run, last: (run / "config.json").write_text('{"seed": '),
    "save_every is 1.5": lambda run, last: edit(run / "config.json", save_every=1.5),
    "task is 'chess'": lambda run, last: edit(run / "config.json", task="chess"),
    "metrics.jsonl cannot be used": lambda run, last: (run / "metrics.jsonl").write_text("{\n{}\n"),
    "adapter_config.json cannot be used": lambda run, last: (last / "adapter_config.json").write_text("{}")}


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "run.lock"}


@pytest.mark.parametrize("message", DAMAGES)
def test_resume_refuses_what_is_not_as_it_was_and_changes_nothing(stopped_run, tmp_path, message, capsys):
    shutil.copytree(stopped_run[0], tmp_path / "run")
    DAMAGES[message](tmp_path / "run", tmp_path / "run" / "checkpoint-000002")
    before = tree(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    assert message in f"{stop.value.code} {capsys.readouterr().err}"
    assert tree(tmp_path / "run") == before


def test_a_base_model_that_changed_is_noticed(stopped_run, tmp_path):
    shutil.copytree(stopped_run[0].parent, tmp_path / "all")
    run, model = tmp_path / "all" / "run", tmp_path / "all" / "model"
    edit(run / "config.json", model=str(model))
    config = json.loads((run / "checkpoint-000002" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    weights = stopped_run[0].parent / "model" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        flip(weights)                                                   # same names, same shapes, other numbers
        for command in (lambda: train.main([*stopped_run[1][:2], "--out", str(run), "--resume"]),
                        lambda: evaluation.main(["--task", "numberline", "--run", str(run), "--episodes", "1"])):
            with pytest.raises(SystemExit, match="other weights than its base model's"):
                command()
    finally:
        weights.write_bytes(kept)
    big = tmp_path / "model.safetensors"
    big.write_bytes(bytes(3000))
    whole, manifest.WHOLE = manifest.weights_hash(tmp_path), 1000
    try:
        before = manifest.weights_hash(tmp_path)
        big.write_bytes(bytes(1500) + b"1" + bytes(1499))
        assert before != whole and manifest.weights_hash(tmp_path) != before
    finally:
        manifest.WHOLE = 64 * 2**20


def test_a_run_and_its_model_may_move(stopped_run, tmp_path):
    """Adapters name their base's absolute place; where it has moved, --model says where to; the hash, that it is it."""
    shutil.copytree(stopped_run[0].parent, tmp_path / "all")
    model = Path(stopped_run[0].parent / "model")
    try:
        model.rename(model.with_name("elsewhere"))
        command = [*stopped_run[1][:2], "--out", str(tmp_path / "all" / "run"), "--resume"]
        with pytest.raises(SystemExit, match="which is not there: .*--model with --resume"):
            train.main(command)
        with pytest.raises(SystemExit, match="other weights than its base model's"):
            train.main([*command, "--model", str(POCKET)])
        train.main([*command, "--model", str(tmp_path / "all" / "model")])
        assert len(recorded.metrics(tmp_path / "all" / "run")) == 4
        (tmp_path / "all" / "model").rename(tmp_path / "all" / "again")                 # of a finished run, too
        asked = ["--task", "numberline", "--run", str(tmp_path / "all" / "run"), "--episodes", "1"]
        with pytest.raises(SystemExit, match="which is not there: .*--model with --resume"):
            evaluation.main(asked)
        train.main([*command, "--model", str(tmp_path / "all" / "again")])
        evaluation.main(asked)
    finally:
        model.with_name("elsewhere").rename(model)


def test_a_run_goes_on_from_its_own_model_and_says_no_other(stopped_run, tmp_path):
    """--model of a resumed run is for a base that has moved; where it is in place, another is refused and not noted."""
    shutil.copytree(stopped_run[0], tmp_path / "run")
    before = tree(tmp_path / "run")
    for other in ("nonsense/none", str(POCKET)):
        with pytest.raises(SystemExit, match="is not what this run goes on from"):
            train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume", "--model", other])
        assert tree(tmp_path / "run") == before
    lines = [tmp_path / "run" / name for name in ("metrics.jsonl", "timing.jsonl", "transcripts.jsonl")]
    for file in lines:                                                  # of an update after the checkpoint: it goes
        file.write_text(file.read_text() + '{"update": 3, "left": 1}\n' * 2)
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume", "--model", "auto",
                "--save-every", "3"])
    for file in lines:
        assert [json.loads(line)["update"] for line in file.read_text().splitlines()] == [1, 2, 3, 4], file
        assert "left" not in file.read_text()
    assert (tmp_path / "run" / "checkpoint-000004").exists()            # the last one, whatever save_every says
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == stopped_run[1][3]
    moved = (tmp_path / "run").rename(tmp_path / "moved")               # and is called by where it is
    asked = evaluation.make_parser().parse_args(["--task", "numberline", "--run", str(moved), "--num-envs", "3"])
    assert evaluation.find_policy(asked, {"num_envs": 3}, "numberline")[2]["num_envs"] == 3      # not the run's own 4
    evaluation.main(["--task", "numberline", "--run", str(moved), "--episodes", "1", "--out", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text())["policy"] == str(moved)


def test_fine_tuning_and_rl_do_not_share_a_folder(tiny, tmp_path):
    """Each takes checkpoints of its own alone; what sft.py left is no place for a run, and a run's are not swept up."""
    sft.main(["--task", "blackjack", "--model", str(tiny), "--steps", "1", "--batch-size", "2", "--out", str(tmp_path)])
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match="holds a result of sft.py"):
        train.main(["--task", "blackjack", "--model", str(tmp_path), "--out", str(tmp_path)])
    assert tree(tmp_path) == before
    (tmp_path / "checkpoint-000004").mkdir()
    (tmp_path / "checkpoint-000004" / "process0.json").touch()
    sft.main(["--task", "blackjack", "--out", str(tmp_path), "--resume"])
    assert (tmp_path / "checkpoint-000004").exists()


def test_held_out_games_of_another_policy_are_not_taken_for_this_ones(stopped_run, tmp_path, capsys):
    """eval.json is trusted only where this policy wrote it: not one that eval.py left there in mid-run."""
    command = [*stopped_run[1][:-1], "4", "--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(2, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main(command)
    result = tmp_path / "run" / "eval.json"
    evaluation.main(["--task", "numberline", "--policy", "expert", "--episodes", "4", "--out", str(result)])
    theirs = result.read_text()
    train.main([*command, "--resume"])
    found = json.loads(result.read_text())
    assert found["update"] == 4 and "policy" not in found and result.with_name("eval-1.json").read_text() == theirs
    edit(result, success=2.0)                               # to be recognised: what this policy wrote is played once
    train.main([*command, "--resume"])
    assert json.loads(result.read_text())["success"] == 2.0 and "end: success 200.0 %" in capsys.readouterr().out
    for damage in ("[1]", json.dumps({name: found[name] for name in ("update", "episodes", "seed")})):
        result.write_text(damage)
        with pytest.raises(SystemExit, match="eval.json .delete it, and its games are played again. cannot be used"):
            train.main([*command, "--resume"])


@pytest.mark.parametrize("changes", [{"task": ...}, {"temperature": None}, {"num_steps": None},
                                     {"num_envs": 8.0}, {"task": "chess"}, {"seed": True}])
def test_settings_that_are_damaged_are_told_by_eval_in_a_sentence(stopped_run, tmp_path, changes):
    shutil.copytree(stopped_run[0], tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text()) | changes
    (tmp_path / "run" / "config.json").write_text(json.dumps(
        {name: value for name, value in settings.items() if value is not ...}))
    with pytest.raises(SystemExit, match="config.json cannot be used|in its config.json"):
        evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "1"])


def test_other_versions_and_threads_are_told_and_left_overs_go(stopped_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(stopped_run[0], tmp_path / "run")
    count, now = torch.get_num_threads(), manifest.versions()
    for left in ("checkpoint-000001.gone", "checkpoint-000003.part"):
        (tmp_path / "run" / left).mkdir()
    monkeypatch.setattr(manifest, "versions", lambda: now | {"threads": count + 1, "torch": "9.0"})
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    said = capsys.readouterr().err
    assert f"threads {count} → {count + 1}" in said and "→ 9.0" in said and "code" not in said
    assert len(recorded.metrics(tmp_path / "run")) == 4
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-000004"]


def test_a_folder_that_is_not_this_programs_is_left_alone(stopped_run, tmp_path):
    for names in (["checkpoint-000001/weights.bin"], ["checkpoint-best/x"], ["metrics.jsonl"], ["eval.json"],
                  ["eval_start.json"], ["sft/adapter_config.json"]):
        folder = tmp_path / names[0].split("/")[0].split(".")[0]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine")
        before = tree(folder)
        with pytest.raises(SystemExit, match="nothing tells whose they are"):
            train.main([*stopped_run[1], "--out", str(folder)])
        assert tree(folder) == before
    run = tmp_path / "run"                                              # in a run of ours a stranger's folder stays
    shutil.copytree(stopped_run[0], run)
    (run / "checkpoint-000000").mkdir()
    (run / "checkpoint-000000" / "mine").touch()
    (run / "checkpoint-000000" / "manifest.json").write_text("{")
    (run / "checkpoint-000001").mkdir()
    (run / "checkpoint-000001" / "manifest.json").write_text('{"settings": {"seed": 9}}')
    train.main([*stopped_run[1][:2], "--out", str(run), "--resume"])
    assert (run / "checkpoint-000001").exists()
    assert (run / "checkpoint-000000" / "mine").exists() and not (run / "checkpoint-000002").exists()


def test_a_run_folder_has_one_owner(stopped_run, tmp_path):
    shutil.copytree(stopped_run[0], tmp_path / "run")
    with checkpoint.locked(tmp_path / "run"):
        for command in (lambda: train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"]),
                        lambda: sft.main(["--task", "numberline", "--out", str(tmp_path / "run" / "x")])):
            with pytest.raises(SystemExit, match=f"in use by process {os.getpid()} on"), \
                    checkpoint.locked(tmp_path / "run" / "x"):
                command()
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])


@pytest.mark.parametrize("out, message", [("a file", "cannot be used"), ("a file/x", "cannot be used"),
                                          ("", "must not be empty")])
def test_a_place_that_cannot_be_written_is_refused_first(stopped_run, tmp_path, out, message, capsys):
    (tmp_path / "a file").write_text("mine")
    bad = tmp_path / "a file" / "x" if out else tmp_path
    scripted = ["--task", "numberline", "--policy", "random", "--out", str(bad)]
    out = out and str(tmp_path / out)
    for command in (lambda: train.main([*stopped_run[1], "--out", out]),
                    lambda: sft.main(["--task", "numberline", "--model", "pocket", "--steps", "1", "--out", out]),
                    lambda: evaluation.main(scripted)):
        with pytest.raises(SystemExit) as stop:
            command()
        found = f"{stop.value.code} {capsys.readouterr().err}"
        assert message in found or "is a directory" in found
    assert (tmp_path / "a file").read_text() == "mine"
    (tmp_path / "result.json").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "result.json")            # a link stays one (and /dev/null a device)
    evaluation.main(["--task", "numberline", "--policy", "random", "--episodes", "1", "--out", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "result.json").read_text()


@pytest.mark.parametrize("config, message", [
    ("{}", "it lacks 'r'"), ('{"r": 0}', "not a number above 0"), ('{"r": "32"}', "not a number above 0"),
    ("[]", "cannot be used"), ("{", "cannot be used"), ('{"r": 4, "lora_alpha": 0}', "lora_alpha is 0"),
    ('{"r": 4, "lora_alpha": 8, "target_modules": []}', "target_modules must name"),
    ('{"r": 4, "lora_alpha": 8, "target_modules": ["a"], "base_model_name_or_path": "pocket", "use_rslora": true}',
     "use_rslora: adapters of another kind")])
def test_damaged_adapters_are_told_in_a_sentence(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(SystemExit, match="adapter_config.json") as stop:
        evaluation.main(["--task", "blackjack", "--model", str(tmp_path), "--episodes", "1"])
    assert message in stop.value.code


def test_foreign_models_run_no_code_and_are_not_filled_up(tiny, tmp_path, monkeypatch):
    """A tensor that is missing, a pickle, a processor with code of its own, cut and empty files: refused in words."""
    def copied(name):
        return Path(shutil.copytree(tiny, tmp_path / name))

    less = copied("less")
    tensors = load_file(less / "model.safetensors")
    gone = next(name for name in tensors if "up_proj" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, less / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing, such as .*up_proj"):
        load_model(str(less))
    pickled = copied("pickled")
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not load whole"):
        load_model(str(pickled))
    code = copied("code")
    for file in ("processor_config.json", "config.json", "tokenizer_config.json"):
        if (code / file).exists():
            edit(code / file, auto_map={"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None],
                                        "AutoConfig": "evil.Evil"})
    (code / "evil.py").write_text("raise SystemExit('evil ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load_model(str(code))                                               # its own classes do; evil.py is not looked at
    for name, damage in (("empty", lambda file: file.write_bytes(b"")),
                         ("cut", lambda file: file.write_bytes(file.read_bytes()[:1000]))):
        folder = copied(name)
        damage(folder / "model.safetensors")
        with pytest.raises(ModelError, match="does not load whole"):
            load_model(str(folder))
    raising = copied("raising")
    (raising / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(SystemExit, match="chat template"):
        evaluation.main(["--task", "blackjack", "--model", str(raising), "--episodes", "1"])


def test_what_a_terminal_cannot_show_and_a_closed_pipe_cost_nothing(tmp_path):
    """In a subprocess without UTF-8, into a pipe that nobody reads: the run goes on to its end."""
    out = tmp_path / "cost$^$2"
    command = [sys.executable, str(HERE / "train.py"), "--task", "numberline", "--model", "pocket", "--num-envs", "4",
               "--num-steps", "2", "--total-timesteps", "8", "--eval-episodes", "0", "--rank", "2",
               "--max-new-tokens", "5", "--out", str(out)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in said, said
    assert (out / "checkpoint-000001").exists() and (out / "curve.png").exists()
    script = "from plumbing import errors\nwith errors.in_words():\n    print('a → b')"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, text=True, cwd=HERE)
    assert shown.stdout == "a \\u2192 b\n"


def test_half_of_torchruns_environment_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="LOCAL_RANK is set but RANK.*torchrun"):
        parallel.start()


@pytest.mark.parametrize("arguments, message", [
    (["--target-kl", "nan"], "--target-kl"), (["--advantage-floor", "inf"], "--advantage-floor"),
    (["--temperature", "inf"], "--temperature"), (["--seed", "1" * 23], "--seed"), (["--lr", "nan"], "--lr")])
def test_numbers_that_are_none_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(["--task", "blackjack", *arguments])
    assert message in capsys.readouterr().err


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(stopped_run, tmp_path, monkeypatch):
    shutil.copytree(stopped_run[0], tmp_path / "run")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "save_file", full)
        with pytest.raises(SystemExit, match="the disk is full; the last checkpoint is intact.*--resume"):
            train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    assert len(recorded.metrics(tmp_path / "run")) == 4


def stop_at(update, save):
    """A save that is interrupted as by Ctrl-C, after it has written the checkpoint of that update."""
    def stopping(run, folder):
        save(run, folder)
        if run.update == update:
            raise KeyboardInterrupt
    return stopping


def test_a_run_is_evaluated_without_the_adapters_that_it_started_from(tmp_path, capsys, monkeypatch):
    """The checkpoint holds all adapters and names their base: the SFT folder may be gone, and the run goes on too."""
    sft.main(["--task", "numberline", "--model", "pocket", "--steps", "1", "--batch-size", "4", "--rank", "4", "--out",
              str(tmp_path / "sft")])
    command = ["--task", "numberline", "--num-envs", "8", "--num-steps", "2", "--eval-episodes", "0",
               "--max-new-tokens", "20", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit, match="go on with the same command and --resume"):
            train.main([*command, "--model", str(tmp_path / "sft"), "--total-timesteps", "48"])
    assert len(recorded.metrics(tmp_path / "run")) == 1
    shutil.rmtree(tmp_path / "sft")
    evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "4"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 4
    train.main([*command, "--resume"])
    assert len(recorded.metrics(tmp_path / "run")) == 3


def test_full_fine_tuning_appears_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    arguments = ["--task", "numberline", "--model", str(tiny), "--full", "--bits", "32", "--steps", "2",
                 "--batch-size", "4", "--lr", "1e-2", "--out", str(tmp_path / "full")]
    processor = type(load_model(str(tiny))[1])

    def interrupted(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(processor, "save_pretrained", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            sft.main(arguments)
    with pytest.raises(ModelError, match="cannot find a model"):
        load_model(str(tmp_path / "full"))
    sft.main([*arguments, "--resume"])
    before, after = (load_model(str(folder))[0].state_dict() for folder in (tiny, tmp_path / "full"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("vision_tower", "projector", "language_model"):
        assert any(part in name for name in moved)
    assert not [path for path in (tmp_path / "full").iterdir() if path.is_dir()]


def test_ppo_on_the_real_model_beats_its_start(shipped):
    """A short run of the whole loop on NumberLine, which the model plays at random (27 %) before, on held-out games."""
    run = make_run(shipped, "numberline", num_envs=64, num_steps=2, total_timesteps=128 * 3, micro_batch_size=64,
                   minibatch_size=64, max_new_tokens=40, rank=16, reward_scale=1.0)
    for _ in range(3):
        ppo.ppo_update(run.policy, run.optimizer, play_out(run), run.settings, run.shuffling)
    player = players.model_player(run.policy, seed=0, max_new_tokens=40)
    assert evaluation.evaluate(player, "numberline", 60, seed=10_000)["success"] > 0.6


# ---- plumbing/parallel.py ------------------------------------------------------------------------------------------
def half_run(shipped, rank=0):
    """One process's run: its own games and draws, the same weights. 32 samples, 12 of them in each minibatch."""
    run = make_run(shipped, "ezpoints", seed=1 + rank, update_epochs=2, minibatch_size=24, target_kl=1e-3)
    run.policy.load_state_dict(make_run(shipped, "ezpoints").policy.state_dict())
    return run


def one_of_two(rank, port, folder):
    """What each process of the test below does: plays alone, joins, then normalises and learns with the other."""
    torch.set_num_threads(1)
    run = half_run(load_model(str(POCKET)), rank)
    rollout = playing.collect(run.policy, run.games, run.settings, run.sampling, run.fallback)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    parallel.start()
    assert (parallel.rank(), parallel.size()) == (rank, 2)
    assert parallel.concat(torch.arange(rank + 1)).tolist() == [0, 0, 1]
    playing.score_rollout(run.policy, rollout, run.settings)
    playing.add_advantages(run.policy, rollout, run.settings)
    run.settings.num_envs = 32                                          # the games of both
    played = playing.play_metrics(rollout, run.settings) | playing.value_metrics(rollout)
    metrics = ppo.ppo_update(run.policy, run.optimizer, rollout, run.settings, run.shuffling)
    save_file({name: p.detach() for name, p in run.policy.trainable()}, Path(folder) / f"{rank}.safetensors")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(played | metrics))
    if rank:                                                            # the other has ended: a sentence, no traceback
        with pytest.raises(SystemExit, match="lost the others"):
            parallel.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_learn_what_one_does_from_both_halves(shipped, tmp_path, monkeypatch):
    """The same samples, normalised together, and minibatches that are the two processes' own put together."""
    torch.multiprocessing.spawn(one_of_two, (free_port(), str(tmp_path)), nprocs=2)
    runs = [half_run(shipped, rank) for rank in (0, 1)]
    a, b = (playing.collect(run.policy, run.games, run.settings, run.sampling, run.fallback) for run in runs)
    both = playing.Rollout(*(torch.cat([getattr(x, name) for x in (a, b)], 1)
                             for name in ("rewards", "terminated", "truncated")),
                           cut_off=a.cut_off + [(t, 16 + n, prompt) for t, n, prompt in b.cut_off],
                           last_prompts=a.last_prompts + b.last_prompts, episodes=a.episodes + b.episodes)
    for name in ("prompts", "responses", "choices", "infos"):           # in the order of play: step by step, 32 games
        first, second = getattr(a, name), getattr(b, name)
        setattr(both, name, [x for t in range(2) for x in (*first[16 * t:][:16], *second[16 * t:][:16])])
    both.action_starts = torch.tensor([choice.action_start for choice in both.choices])
    both.shapes = playing.padded_shapes(both.prompts, both.responses, runs[0].settings)
    run = half_run(shipped)
    run.settings.num_envs = 32
    playing.score_rollout(run.policy, both, run.settings)
    playing.add_advantages(run.policy, both, run.settings)
    batches = [[[i + 16 * (i // 16) + 16 * rank for i in batch]         # a process's sample i is both's that
                for batch in ppo.minibatches(32, 12, 2, half.shuffling)] for rank, half in enumerate(runs)]
    monkeypatch.setattr(ppo, "minibatches", lambda *_: [x + y for x, y in zip(*batches)])
    metrics = ppo.ppo_update(run.policy, run.optimizer, both, run.settings, run.shuffling)
    metrics |= playing.play_metrics(both, run.settings) | playing.value_metrics(both)
    assert 1 < metrics["minibatches"] < 6                               # the value head learned on alone, too
    start = dict(half_run(shipped).policy.trainable())
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, weight in run.policy.trainable():
            torch.testing.assert_close(found[name], weight.detach(), atol=2e-5, rtol=1e-3, msg=name)
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    moved = max((weight - start[name]).abs().max() for name, weight in run.policy.trainable())
    assert moved > 1e-3                                                 # far beyond the tolerance


def test_each_process_has_its_share_of_the_games_and_its_own_draws(shipped, tmp_path, monkeypatch):
    """Together they play the very games that one process would; what one wrote, two cannot go on with."""
    alone = make_run(shipped, "numberline")
    checkpoint.save(alone, tmp_path)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        halves.append(make_run(shipped, "numberline"))
    states = [[game.get_state() for game in run.games] for run in (alone, *halves)]
    assert states[0] == states[1] + states[2] and len(states[1]) == 8
    for name in ("sampling", "shuffling"):
        assert not torch.equal(*(getattr(run, name).get_state() for run in halves))
    assert halves[0].fallback.random() != halves[1].fallback.random()
    with pytest.raises(ModelError, match="processes 1, this is 2"):
        checkpoint.load(make_run(shipped, "numberline"), checkpoint.checkpoints(tmp_path)[-1])


# ---- alfworld_env.py, games/houses.py, games/household.py, games/scene.py ------------------------------------------
@pytest.fixture(scope="session")
def alfworld():
    """The environment's module; where ALFWorld's engine is not installed these tests are skipped."""
    pytest.importorskip("alfworld", reason="ALFWorld's engine: pip install -r extras/requirements-alfworld.txt")
    import alfworld_env
    return alfworld_env


def household_episode(game, seed, choose):
    """Play one episode with choose(game, info) → a command; return [(info, command, reward)] and the last info."""
    (_, info), steps, over = game.reset(seed=seed), [], False
    while not over:
        command = choose(game, info)
        _, reward, terminated, truncated, after = game.step(game.legal_actions().index(command))
        steps.append((info, command, reward))
        info, over = after, terminated or truncated
    return steps, info


def test_houses_are_seeded_and_the_held_out_ones_are_others(alfworld):
    objects_of = lambda house: house.problem.split("(:init")[0].count(" - object\n")
    dealt = {split: [houses.deal(number, split) for number in range(300)] for split in houses.SPLITS}
    assert houses.deal(7) == dealt["train"][7] != houses.deal(8)
    for split, found in dealt.items():
        assert {house.kind for house in found} == set(houses.TASKS) and {len(house.layout) for house in found} == {5}
        assert {objects_of(house) for house in found} == {4}, split
    train, held_out = ([set(house.layout for house in found), set().union(*(house.pairs for house in found))]
                       for found in dealt.values())
    assert not train[0] & held_out[0] and not train[1] & held_out[1]
    large = houses.deal(3, "held out", receptacles=12, objects=9)
    assert len(large.layout) == 12 and objects_of(large) == 9
    with pytest.raises(houses.HouseError, match="4 to 40 receptacles"):
        houses.deal(0, receptacles=2)
    for kind in houses.TASKS:                                           # the held-out tasks are of many sorts
        assert len({(house.target, house.place) for house in (houses.deal(number, "held out") for number in range(1500))
                    if house.kind == kind}) >= 15, kind
    for split in houses.SPLITS:                                         # the smallest and the largest can be dealt
        for size in ((4, 3), (40, 40)):
            assert all(houses.deal(number, split, *size) for number in range(60))


@pytest.mark.parametrize("split", ["train", "held out"])
def test_the_planner_solves_every_house_and_the_demonstrator_too(alfworld, split):
    """The planner's plan, sent to the engine, ends in `won`, so does the play of those who see nothing hidden."""
    game, kinds, last = env.make_game("alfworld", split=split), Counter(), []
    for seed in range(8):
        game.reset(seed=seed)
        kinds[game.house.kind] += 1
        for command in game.engine.plan():
            _, _, terminated, _, info = game.step(game.legal_actions().index(command))
        assert terminated and info["is_success"], game.house.sentence
        for choose in (lambda _, info: household.next_step(info)[1],
                       lambda _, info: household.next_step(info, memory=False)[1]):
            steps, last = household_episode(game, seed, choose)
            assert last["is_success"] and steps[-1][2] == 51 and len(steps) < 30
    assert len(kinds) >= 4


def test_a_household_task_by_hand(alfworld):
    """The rewards of one game, and what its commands are called."""
    game = env.make_game("alfworld")
    seed = next(seed for seed in range(50) if game.reset(seed=seed) and "cool" in game.house.kind)
    steps, _ = household_episode(game, seed, lambda _, info: household.next_step(info)[1])
    words = [command.split()[0] for _, command, _ in steps]
    assert words[-2:] == ["go", "move"] or words[-2:] == ["open", "move"]
    cooled = words.index("cool")
    assert [round(reward, 3) for _, _, reward in steps] == [0] * cooled + [0.333] * (len(steps) - cooled - 1) + [51]
    assert steps[cooled + 1][0]["badges"] == ["cool"] and steps[cooled][0]["badges"] == []
    random_play = [household_episode(game, seed, lambda game, _: game.legal_actions()[0])[0] for seed in range(2)]
    assert all(len(steps) == 50 for steps in random_play)                # cut off


def test_goal_conditions_are_alfworlds_own(alfworld, monkeypatch):
    """In noisy play: the share is what alfworld.env.tasks counts on the state in the simulator's form."""
    for name in ("cv2", "networkx"):                                    # the simulator's, which is not needed here
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    from alfworld.env import tasks
    classes = {"pick_and_place_simple": tasks.PickAndPlaceSimpleTask,
               "look_at_obj_in_light": tasks.LookAtObjInLightTask,
               "pick_two_obj_and_place": tasks.PickTwoObjAndPlaceTask,
               **{f"pick_{act}_then_place_in_recep": getattr(tasks, f"Pick{act.title()}ThenPlaceInRecepTask")
                  for act in ("clean", "heat", "cool")}}
    game, generator, shares = env.make_game("alfworld"), np.random.default_rng(0), set()
    for seed in range(10):
        (_, info), over = game.reset(seed=seed), False
        while not over:
            command = (household.next_step(info)[1] if generator.random() < 0.7 else
                       game.legal_actions()[generator.integers(len(game.legal_actions()))])
            _, _, terminated, truncated, info = game.step(game.legal_actions().index(command))
            facts, house, over = game.engine.facts, game.house, terminated or truncated
            ids = lambda names: [name.replace(" ", "|") for name in names]          # the simulator's: "apple|1"
            objects = [{"objectId": thing.replace(" ", "|"), "pickupable": (thing,) in facts["pickupable"],
                        "toggleable": (thing,) in facts.get("toggleable", ()), "receptacle": False,
                        "isToggled": (thing,) in facts.get("istoggled", ()), "visible": thing in (info["inside"] or ())}
                       for thing, _ in facts["objecttype"]]
            objects += [{"objectId": place.replace(" ", "|"), "receptacle": True, "pickupable": False,
                         "toggleable": False, "receptacleObjectIds": ids(
                             thing for thing, where in facts.get("inreceptacle", ()) if where == place)}
                        for place, _ in facts["receptacletype"]]
            held = [{"objectId": thing.replace(" ", "|")} for _, thing in facts.get("holds", ())]
            task = object.__new__(classes[house.kind])
            task.env = SimpleNamespace(**{f"{word}_objects": ids(thing for thing, in facts.get(fact, ())) for word, fact
                                          in (("cleaned", "isclean"), ("heated", "ishot"), ("cooled", "iscool"))})
            targets = {"object": f"{house.target}|", "parent": f"{house.place}|", "toggle": f"{house.lamp}|"}
            task.get_targets = lambda targets=targets: targets
            met, of = task.goal_conditions_met(SimpleNamespace(metadata={"objects": objects, "inventoryObjects": held}))
            assert game.goal_share() == pytest.approx(met / of), (house.sentence, command)
            shares.add(round(met / of, 2))
    assert {0, 0.33, 0.5, 1} <= shares


def test_a_saved_household_goes_on_exactly(alfworld):
    game, twin, generator = env.make_game("alfworld"), env.make_game("alfworld"), np.random.default_rng(0)
    game.reset(seed=3)
    for _ in range(6):
        action = int(generator.integers(len(game.legal_actions())))
        game.step(action)
        twin.set_state(json.loads(json.dumps(game.get_state())))
        (a, mine), (b, theirs) = game.observe(), twin.observe()
        assert np.array_equal(a, b) and mine == theirs and game.legal_actions() == twin.legal_actions()
    a, b = game.reset(), twin.reset()                                   # the next deal too
    assert np.array_equal(a[0], b[0]) and a[1] == b[1]
    before = game.get_state()
    for changes in ({"number": -1}, {"commands": ["go to mars 1"], "steps": 1}, {"commands": [7], "steps": 1},
                    {"number": before["number"] + 1}, {"commands": ["look"], "steps": 1}):
        for one in (game, env.make_game("alfworld")):                   # in mid-play, and before any
            with pytest.raises(ValueError, match="not a state"):
                one.set_state(before | changes)
        assert game.get_state() == before and game.observe()[1] == a[1] and not hasattr(one, "over")
    with pytest.raises(ValueError, match="another house"):
        env.make_game("alfworld", split="held out").set_state(before)


def test_games_that_are_over_leave_nothing_behind(alfworld, tmp_path, monkeypatch):
    """Rollouts are freed, engines go on to the next game, what a killed program left of their library is removed."""
    class Kept:
        pass

    alive = []

    def play_some():
        mine = Kept()                                                   # such as a rollout, with its image features
        alive.append(weakref.ref(mine))
        games = [env.make_game("alfworld") for _ in range(3)]
        for seed, game in enumerate(games):
            household_episode(game, seed, lambda game, _: game.legal_actions()[-1])

    monkeypatch.setattr(alfworld, "_spare", spare := [])
    play_some()
    play_some()
    gc.collect()
    assert not any(one() for one in alive) and len(spare) == 3
    monkeypatch.setattr(alfworld.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"alfworld-engines-{os.getuid()}" / "999999999"
    left.mkdir(parents=True)
    spare.clear()
    env.make_game("alfworld")
    assert not left.exists() and not list(left.parent.iterdir()) and alfworld.tempfile.tempdir == str(tmp_path)


def test_receptacles_that_share_a_place(alfworld, monkeypatch):
    """As in the data set: one goes to the one that was named, sees what lies in all that are open, and still wins."""
    house, won = houses.deal(5), []
    problem = house.problem.replace("loc_bar_2 - location\n", "").replace("loc_bar_2", "loc_bar_1")
    shared = dataclasses.replace(house, problem=problem)
    monkeypatch.setattr(houses, "deal", lambda *_: shared)
    game = env.make_game("alfworld")
    for choose in (lambda _, info: household.next_step(info)[1],
                   lambda _, info: household.next_step(info, memory=False)[1]):
        steps, last = household_episode(game, 0, choose)
        won.append(last["is_success"])
        for (_, command, _), (after, *_) in itertools.pairwise(steps):
            if command.startswith("go to "):
                assert after["at"] == command.removeprefix("go to ") and after["at"] in after["near"]
    assert won == [True, True] and any(len(info["near"]) == 2 for info, *_ in steps)


def test_a_game_that_begins_beside_a_receptacle(alfworld, monkeypatch):
    """Not so in dealt houses: what is there is seen, shown and known from the start."""
    house = houses.deal(5)
    beside = dataclasses.replace(house, problem=house.problem.replace("agent1 loc_bar_0", "agent1 loc_bar_1"))
    monkeypatch.setattr(houses, "deal", lambda *_: beside)
    game = env.make_game("alfworld")
    _, info = game.reset(seed=0)
    assert info["at"] in info["scene"] and info["near"] == [info["at"]] and household.reading(info).startswith(
        f"At {info['at']}") and info["seen"] == info["contents"]
    assert household_episode(game, 0, lambda _, info: household.next_step(info)[1])[1]["is_success"]


def test_nothing_hidden_is_shown(alfworld):
    """Things that change places behind the agent's back change neither picture nor prompt nor info."""
    game = env.make_game("alfworld")
    for seed in range(6):
        picture, info = game.reset(seed=seed)
        for command in (None, info["commands"][-1]):
            if command:
                picture, _, _, _, info = game.step(game.legal_actions().index(command))
            facts, here = game.engine.facts["inreceptacle"], info["at"]
            elsewhere = [where for _, where in facts if where != here]
            game.engine.facts["inreceptacle"] = [(thing, where if where == here and not info["shut"] else
                                                  elsewhere[0]) for thing, where in facts]
            other, same = game.observe()
            assert np.array_equal(picture, other) and same == info
            assert parse.make_prompt(game, same) == parse.make_prompt(game, info)
            game.engine.facts["inreceptacle"] = facts


def test_commands_stay_whole_in_prompt_and_parse(alfworld):
    game = env.make_game("alfworld", receptacles=8)
    _, info = game.reset(seed=0)
    prompt = parse.make_prompt(game, info)
    assert "\n".join(["Actions:", *game.legal_actions(), "Answer in JSON"]) in prompt and info["scene"] in prompt
    assert f"Your task is to: {info['task']}\n" in prompt
    assert not {"look", "help", "inventory"} & {*info["commands"]}
    names = "go to cabinet 1", "go to cabinet 12"
    assert parse.parse('{"action": "go to cabinet 12"}', names)[0] == names[1]
    assert parse.parse('{"action": "go to cabinet 12"}', ("go to cabinet 1",))[0] is None
    silent = env.make_game("alfworld", scene_text=False, all_commands=True)
    _, info = silent.reset(seed=0)
    assert info["scene"] not in parse.make_prompt(silent, info) and {"look", "help", "inventory"} <= {*info["commands"]}


def test_an_answer_that_names_no_command_costs_one_and_plays_at_random(alfworld, shipped):
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2)        # knows nothing of households
    options = Settings(task="alfworld", num_steps=3, num_envs=2, max_new_tokens=3, play_batch_size=2,
                       micro_batch_size=2)
    games = [env.make_game("alfworld") for _ in range(2)]
    for seed, game in enumerate(games):
        game.reset(seed=seed)
    rollout = playing.collect(agent, games, options, torch.Generator().manual_seed(0), np.random.default_rng(0))
    assert not any(choice.named for choice in rollout.choices) and (rollout.rewards <= 0).all()
    assert rollout.rewards.min() == -1 and [game.episode_return for game in games] == pytest.approx(
        (rollout.rewards + 1).sum(0).tolist())
    for step, choice in enumerate(rollout.choices):
        assert choice.action in rollout.infos[step]["commands"]
    texts = {tuple(prompt.ids) for prompt in rollout.prompts}
    assert len(texts) > 2                                               # each step is stored with its own prompt


def test_what_the_engine_remembers_changes_no_word(alfworld, monkeypatch):
    """The engine as it is used, and as it is installed: the same transcript, facts and plans."""
    def transcript():
        engine, said = alfworld.Engine(), []
        for number in (1, 4, 1):
            engine.load(houses.deal(number))
            generator = np.random.default_rng(number)
            for _ in range(12):
                engine.step(engine.commands[generator.integers(len(engine.commands))])
                said.append((engine.said, engine.commands, engine.facts, engine.won))
            said.append(engine.plan())
        return said

    remembered = transcript()
    installed = runpy.run_path(alfworld.textgen.__file__)
    monkeypatch.setattr(alfworld.textgen, "copy_context", installed["copy_context"])
    for where, name in ((alfworld.textgen, "_parse_and_convert"), (alfworld.pddl_logic, "_parse_and_convert"),
                        (alfworld.logic.Rule, "parse_conjunctive_query"), (alfworld.fast_downward, "pddl2sas")):
        monkeypatch.setattr(where, name, getattr(where, name).__wrapped__)
    assert transcript() == remembered


def test_the_data_sets_files_are_played(alfworld, tmp_path, monkeypatch):
    """Games that alfworld-generate itself makes, of problems and annotations in the data set's layout."""
    for split, folder in houses.DATA_FOLDERS.items():
        for number in range(2):
            house = houses.deal(number, split)
            place = tmp_path / "json_2.1.1" / folder / f"{house.kind}-{number}" / "trial"
            place.mkdir(parents=True)
            (place / "initial_state.pddl").write_text(house.problem)
            (place / "traj_data.json").write_text(json.dumps({"task_type": house.kind, "pddl_params": {
                "object_target": house.target, "parent_target": house.place or "", "toggle_target": house.lamp or "",
                "mrecep_target": "", "object_sliced": False}}))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    subprocess.run([sys.executable, Path(sys.executable).with_name("alfworld-generate"), "--data_path",
                    tmp_path / "json_2.1.1", "--save_path", tmp_path / "json_2.1.1", "--expert_type", "planner",
                    "--domain", alfworld.ALFRED_PDDL_PATH, "--grammar", alfworld.ALFRED_TWL2_PATH, "--end", "9"],
                   input="y\n", text=True, check=True, capture_output=True,
                   env=os.environ | {"ALFWORLD_DATA": str(tmp_path)})
    for split in houses.SPLITS:
        game = env.make_game("alfworld", split=split, houses="data")
        steps, last = household_episode(game, 0, lambda _, info: household.next_step(info)[1])
        assert last["is_success"] and last["task"] in parse.make_prompt(game, last)
        files = houses._data_files(str(tmp_path), split)
        assert [houses._read(files[seed % 2]).problem for seed in (4, 5)] == [
            game.reset(seed=seed) and game.house.problem for seed in (4, 5)]
    game.reset(seed=2**31 + 3)                                          # as in training; a run goes on from there
    game.step(0)
    twin = env.make_game("alfworld", split=split, houses="data")
    twin.set_state(json.loads(json.dumps(game.get_state())))
    assert twin.observe()[1] == game.observe()[1]
    player = players.scripted_player("expert", "alfworld", 0)
    few = evaluation.evaluate(player, "alfworld", 50, 0, world={"houses": "data"})
    assert few["episodes"] == len(files) == 2 and few["success"] == 1   # not the same two again and again
    unsolvable = tmp_path / "other" / files[0].relative_to(tmp_path)
    shutil.copytree(files[0].parent, unsolvable.parent)
    unsolvable.write_text(files[0].read_text().replace('"solvable": true', '"solvable": false'))
    with pytest.raises(houses.HouseError, match="none of the 1 games"):
        houses._data_files(str(tmp_path / "other"), split)
    broken = next(tmp_path.rglob("game.tw-pddl"))
    for text, message in (("{", "is no game of ALFWorld's"), ('{"grammar": "", "pddl_problem": ""}', "is no game")):
        broken.write_text(text)
        with pytest.raises(houses.HouseError, match=message):
            houses._read(broken)
    with pytest.raises(SystemExit, match="run alfworld-download"):
        monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
        evaluation.main(["--task", "alfworld", "--policy", "random", "--houses", "data", "--episodes", "1"])


def test_what_the_engine_cannot_do_is_said(alfworld, monkeypatch):
    impossible = dataclasses.replace(houses.deal(0), problem="(define (problem x)")
    with pytest.raises(houses.HouseError, match="cannot read this house"):
        alfworld.Engine().load(impossible)
    before = list(sys.argv)
    alfworld.Engine().load(houses.deal(0))
    assert sys.argv == before
    lost = dataclasses.replace(houses.deal(0), problem=re.sub(r"\(canContain .*\)\n", "", houses.deal(0).problem))
    with pytest.raises(houses.HouseError, match="cannot read this house"):           # no way to the goal
        alfworld.Engine().load(lost)
    for flags, message in ((["--receptacles", "2"], "4 to 40"), (["--task", "blackjack", "--objects", "5"],
                                                                   "is for --task alfworld")):
        with pytest.raises(SystemExit, match=message):
            evaluation.main(["--task", "alfworld", "--policy", "random", "--episodes", "1", *flags])


def test_the_card_games_need_no_engine_and_without_it_a_sentence_says_what_to_install():
    script = ("import sys, train, eval, sft\n"
              "print([name for name in ('alfworld', 'textworld') if name in sys.modules])\n"
              "sys.modules['textworld'] = None\n"
              "eval.main(['--task', 'alfworld', '--policy', 'random', '--episodes', '1'])")
    found = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert found.stdout == "[]\n" and found.returncode == 1 and "Traceback" not in found.stderr
    assert "pip install -r extras/requirements-alfworld.txt" in found.stderr


def test_the_pocket_for_households_learns_from_the_demonstrators_play(alfworld):
    """What its lessons say, and that the shipped model answers held-out houses with legal commands mostly."""
    states = pocket_alfworld.play(0, 3)
    for prompt, short, info in states:
        assert info["task"] in prompt and info["task"] in short and "thoughts" not in short
    seen = {one.answer for one in next(pocket_alfworld.captions(states, 0))}
    assert any("nothing" in text for text in seen) and not any('. "' in text for text in seen)
    lesson = next(pocket_alfworld.answers(states, 0))
    told = [one for one in lesson if one.prompt != "Read the picture."]
    commands = {command for *_, info in states for command in info["commands"]}
    assert len(told) < len(lesson) and {parse.parse(one.answer, tuple(commands))[0] for one in told} <= commands
    assert 0 < sum("thoughts" not in one.answer for one in told) < 20
    policy, _ = players.open_policy("pocket", task="alfworld")
    player = players.model_player(policy, 0, max_new_tokens=60, batch_size=16)
    result = evaluation.evaluate(player, "alfworld", 2, 0, num_envs=2)
    assert result["parse_rate"] > 0.5 and result["success"] > 0.1       # uniform play: 1 game in 10


def test_a_household_run_goes_on_bit_for_bit(alfworld, tiny, tmp_path, monkeypatch):
    command = ["--task", "alfworld", "--model", str(tiny), "--sft-steps", "0", "--rank", "2", "--num-envs", "2",
               "--num-steps", "4", "--total-timesteps", "16", "--max-new-tokens", "4", "--minibatch-size", "8",
               "--eval-episodes", "1"]
    train.main([*command, "--out", str(tmp_path / "alone")])
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main([*command, "--out", str(tmp_path / "run")])
    train.main([*command[:2], "--out", str(tmp_path / "run"), "--resume"])
    for name in ("metrics.jsonl", "transcripts.jsonl", "eval.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cot_lambda"] == 0.2
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(result["success_by_kind"]) <= set(houses.TASKS) and result["success"] <= 1


# ---- extras/endpoint.py, extras/serve.py ---------------------------------------------------------------------------
GOOD = {"model": "stub-1", "choices": [{"message": {"content": parse.make_answer("stand", "I choose stand.")}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3}}


class Stub:
    """A server on the loopback: reply(n-th call, its JSON) → a response's JSON, or what goes wrong with it."""

    def __init__(self, reply):
        self.reply, self.bodies, self.keys, self.over = reply, [], [], threading.Event()
        lock, stub = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
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
                text = "{'garbage" if found == "garbage" else text
                self.send_response(status)
                self.send_header("retry-after-ms", "1")
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text) + (50 if found == "half" else 0)))
                self.end_headers()
                self.wfile.write(text.encode())

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
    with Stub(lambda number, _: faults[number]) as stub, endpoint_player(stub, timeout=3) as player:
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
    for status, asked in ((401, 1), (404, 1), (400, 8), (503, 8)):          # none, or none of the first eight, plays
        with Stub(lambda *_, status=status: (status, '{"error": {"message": "no such thing"}}')) as stub:
            with pytest.raises(ModelError, match=f"does not answer.*{status}.*OPENAI_API_KEY"):
                with endpoint_player(stub, concurrency=8 if asked > 1 else 1) as player:
                    player(*states)
        assert asked <= len(stub.bodies) < asked + (8 if asked > 1 else 1)
    with pytest.raises(ModelError, match="no connection: .*refused"):
        with endpoint_player(stub) as player:
            player(*states)
    for url in ("localhost:8000", "http://me:secret@localhost/v1", "http://:secret@localhost/v1", "http://localhost:abc/v1",
                "http://localhost:99999/v1", "http://[1"):
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
            thoughts = expert.thoughts("points24", info, choice.action)
            answers[parse.make_prompt(game, info), picture.tobytes()] = parse.make_answer(choice.action, thoughts)
        return choices

    def reply(_, asked):
        image, text = asked["messages"][0]["content"]
        png = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        picture = np.asarray(draw.Image.open(io.BytesIO(png)))
        return changed({"content": answers[text["text"], picture.tobytes()]})

    expected = evaluation.evaluate(noting, "points24", 10, 0)
    with Stub(reply) as stub, endpoint_player(stub, concurrency=4) as player:
        found = evaluation.evaluate(player, "points24", 10, 0)
    spoken = {"parse_rate", "reading_rate", "plan_rate", "plan_followed", "lost_by"}   # the script says nothing
    assert {key: found[key] for key in set(found) - spoken} == {key: expected[key] for key in set(found) - spoken}
    assert found["parse_rate"] == found["reading_rate"] == found["plan_rate"] == 1.0


def test_transformers_serve_answers_as_the_policy_does(endpoint_player, tmp_path):
    """A server of other people: greedy answers are the policy's to the letter, with temperature they are draws."""
    pytest.importorskip("fastapi", reason="pip install -r extras/requirements-endpoint.txt")
    pytest.importorskip("uvicorn", reason="pip install -r extras/requirements-endpoint.txt")
    policy, _ = players.open_policy("pocket")
    serve.one_view(policy, tmp_path / "one-view")
    with serve.serving(tmp_path / "one-view") as url:
        there = functools.partial(EndpointPlayer, url, str(tmp_path / "one-view"), tmp_path / "kept", 2)
        with there(greedy=True) as player:
            assert serve.same_answers(policy, player, 3) == 12
            tokens = player.counts()["prompt_tokens"]
        with there(temperature=policy.temperature) as player:
            game = GAMES["blackjack"]()
            states = list(zip(*[(game, *game.reset(seed=0))] * 12))
            assert len({choice.text for choice in player(*states)}) > 1
    prompts = [policy.encode([picture], [parse.make_prompt(game, info)])[0] for task in GAMES for k in range(3)
               for game in [GAMES[task]()] for picture, info in [game.reset(seed=10_000 + k)]]
    assert tokens == sum(len(prompt.ids) for prompt in prompts)             # one view, one start token


def test_what_was_served_and_what_was_played_here_agree():
    """results/bench/endpoint.json: the difference of two shares is within what chance allows."""
    found = json.loads((HERE / "results" / "bench" / "endpoint.json").read_text())
    assert found["greedy_same"]["one view"] == found["greedy_asked"] >= 80
    for task, pair in found["tasks"].items():
        there, here = pair["served"], pair["local"]
        assert there["episodes"] == here["episodes"] >= 100 and there["failed_calls"] == 0
        for key, count in (("success", "episodes"), ("expert_agreement", "steps"), ("parse_rate", "steps")):
            share = (there[key] + here[key]) / 2
            spread = math.sqrt(share * (1 - share) * (1 / there[count] + 1 / here[count]))
            assert abs(there[key] - here[key]) <= 2.6 * spread, (task, key)


# ---- extras/viewer.py ----------------------------------------------------------------------------------------------
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
        assert step["expert"] == expert.best_actions(task, info)
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
    """A random model of four tokens an answer: all drawn at random, out of time in the end. Its λ goes for both."""
    folder, command = stopped_run
    model = command[command.index("--model") + 1]
    for seed in map(str, range(10_000, 10_020)):
        evaluation.main(["--task", "numberline", "--run", str(folder), "--beside", model, "--episodes", "1",
                         "--seed", seed, "--max-new-tokens", "4", "--render", str(tmp_path / "game.html")])
        data = page_data(tmp_path / "game.html")
        if data["sides"][0]["end"]["truncated"]:
            break
    run, plain = data["sides"]
    config = json.loads((folder / "config.json").read_text())
    assert run["learned"] and not plain["learned"] and run["end"]["truncated"]
    assert {key: run[key] for key in ("gamma", "gae_lambda", "reward_scale")} == {
        key: config[key] for key in ("gamma", "gae_lambda", "reward_scale")}
    assert run["lambda"] == plain["lambda"] == config["cot_lambda"]
    for side in (run, plain):
        check_side("numberline", data["seed"], side)
    assert "/" not in plain["name"]                                     # not where the folder lies on this machine
    policy, _ = players.open_run(folder)
    picture, info = GAMES["numberline"]().reset(seed=data["seed"])
    [prompt] = policy.encode([picture], [run["steps"][0]["prompt"]])
    assert policy.value([prompt]).item() == pytest.approx(run["steps"][0]["value"], abs=1e-5)


@pytest.mark.parametrize("cot, tokens", [(True, 60), (False, 60), (True, 3)])
def test_advantages_are_of_scaled_rewards_and_what_an_unnamed_action_costs(agent, monkeypatch, cot, tokens):
    """Rewards of 10 scaled, a head that is not trained but counts; three tokens name no action, which costs one."""
    monkeypatch.setattr(GAMES["ezpoints"], "unnamed_reward", -1.0)
    agent.value_head.fitted.fill_(True)
    settings = {"cot": cot, "max_new_tokens": tokens, "cot_lambda": 0.3, "gamma": 0.8, "gae_lambda": 0.7,
                "reward_scale": 0.1}
    [side] = viewer.Page("ezpoints", 10_004, False, [(agent, "untrained", settings)]).data()["sides"]
    check_side("ezpoints", 10_004, side)
    assert side["learned"] and side["lambda"] == 0.3 and len({step["value"] for step in side["steps"]}) > 1
    assert tokens > 3 or not any(step["named"] for step in side["steps"])


def test_both_sides_of_a_page_play_the_same_house():
    options = evaluation.make_parser().parse_args(["--task", "alfworld", "--run", "a", "--render", "game.html",
                                                   "--beside", "random"])
    settings = {name: getattr(Settings, name) for name in run_settings.WORLD} | {"receptacles": 8}
    _, given = viewer.asked_beside(options, {}, settings)
    assert given == {name: settings[name] for name in run_settings.WORLD}


HOSTILE = ['</script><script>alert(1)</script><img src=x onerror=alert(1)>', '<!--<script>', '{"action"}</SCRIPT >',
           ']]>&lt;{{data}}{{script}}', '\u2028\u2029\x00\ud800"\\']


@pytest.mark.parametrize("text", HOSTILE)
def test_an_answer_cannot_break_out_of_a_page(text, tmp_path):
    for legal in (False, True):
        answer = text + '{"action": "stand"}' if legal else text
        page = viewer.Page("blackjack", 0, False, [(None, text, {"cot": True})])
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


# ---- tutorial.ipynb, extras/tutorial.py ---------------------------------------------------------------------------
def tutorial_cells():
    return [cell for cell in json.loads(tutorial.FILE.read_text())["cells"] if cell["cell_type"] == "code"]


def shown(cell):
    """All that a cell printed, and the text/plain of what it displayed, without the pictures."""
    printed = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
    return printed + "".join("".join(out["data"]["text/plain"]) for out in cell["outputs"] if "data" in out)


def test_the_tutorial_is_stored_with_its_outputs_and_nothing_of_its_machine():
    notebook = json.loads(tutorial.FILE.read_text())
    assert tutorial.FILE.stat().st_size < 400_000
    assert notebook["metadata"] == tutorial.METADATA
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])         # such as times of execution
    assert [cell["execution_count"] for cell in tutorial_cells()] == [*range(1, len(tutorial_cells()) + 1)]
    for cell in tutorial_cells():
        kinds = [output.get("name", output["output_type"]) for output in cell["outputs"]]
        pictures = sum("image/png" in output.get("data", ()) for output in cell["outputs"])
        source = "".join(cell["source"])
        assert set(kinds) <= {"stdout", "display_data", "execute_result"}, cell["id"]   # no warnings, no progress bars
        assert ("stdout" in kinds) == bool(re.search(r"print\(|make_policy\(", source)), cell["id"]
        assert pictures == len(re.findall(r"subplots\(|Image\.fromarray", source)), cell["id"]
        assert not re.search(r"/(work|root|home|opt|tmp|Users)\b|0x[0-9a-f]{6}", shown(cell)), cell["id"]


def test_without_its_packages_the_tutorial_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    with pytest.raises(ModelError, match="ipykernel is missing: pip install -r extras/requirements-notebook.txt"):
        tutorial.execute()


def test_the_tutorial_runs_and_shows_what_is_stored():
    """Word for word. Decimals may differ in the last place; after learning, which adds up rounding, by 0.1."""
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="pip install -r extras/requirements-notebook.txt")
    notebook = tutorial.execute()
    decimal = r"-?\d+\.\d+"
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for stored, now in zip(tutorial_cells(), fresh, strict=True):
        expected, found = shown(stored), shown(now)
        assert re.sub(rf" *{decimal}", " #", found) == re.sub(rf" *{decimal}", " #", expected), now.id
        figures = [[float(figure) for figure in re.findall(decimal, text)] for text in (found, expected)]
        slack = 0.1 if "learns" in now.metadata.get("tags", ()) else 0.011
        assert figures[0] == pytest.approx(figures[1], abs=slack, rel=0), now.id


# ---- plumbing/card.py, extras/board.py, PEFT without this code, Gymnasium's vectors --------------------------------
def test_a_model_leaves_as_it_played(agent, tmp_path, monkeypatch):
    """The README's block, as it stands, on a checkpoint: what it leaves answers with the policy's own probabilities."""
    page = (HERE / "extras" / "README.md").read_text()
    block = re.search(r"## Leaving with your model.*?```python\n(.*?)```", page, re.S)[1]
    assert set(re.findall(r"(?:from|import) (\w+)(?: import)", block)) == {"peft", "transformers", "env", "parse"}
    assert len(block.splitlines()) <= 20
    shake(agent)
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(HERE / "checkpoints")
    Path("leave.py").write_text(block)
    agent.save("runs/blackjack-seed1/checkpoint-000029")
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
    ours, mask, _ = agent.logprobs(4 * [prompt], answers)
    torch.testing.assert_close(torch.where(mask > 0, theirs[:, :ours.shape[1]], 0.0), ours, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for layer in agent.lora.values():
            layer.lora_B.zero_()
        assert (agent.logprobs(4 * [prompt], answers)[0] - ours).abs().max() > 0.1      # the adapters do something


def test_a_checkpoint_has_its_model_card(stopped_run):
    """What the hub reads of it, and its command. (That a resumed run writes the same bytes extras/torture.py sees.)"""
    written = (stopped_run[0] / "checkpoint-000002" / "README.md").read_text()
    data = ModelCard(written).data.to_dict()
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("peft", "unknown", "image-text-to-text")
    assert "base_model" not in data and "see the base model's card" in written      # a folder: the hub would refuse it
    for told in ("2 of 4 updates by PPO, 16 environment steps", "| success before RL | not measured |"):
        assert told in written
    command = re.search("Trained by `python train.py (.*?)`", written)[1]
    options = run_settings.make_parser(Settings).parse_args(shlex.split(command))
    again = Settings(**vars(options), target_modules=tuple(families.PARTS))
    run_settings.fill_in(again, small=True)
    config = json.loads((stopped_run[0] / "config.json").read_text())
    assert manifest.plain(again) == {name: value for name, value in config.items() if name not in Settings.free}


@pytest.mark.parametrize("base, licence, on_the_hub", [
    (loading.LLAVA_7B, "apache-2.0", True), ("some/model", "unknown", True), ("pocket", "mit", False)])
def test_a_card_claims_no_licence_that_it_does_not_know(tmp_path, base, licence, on_the_hub):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4096))
    settings = sft.SFTSettings(task="blackjack", model=base, rank=128, target_modules=("language",), cot=False)
    card.write_sft_card(settings, SimpleNamespace(base=base, config=config), tmp_path)
    written = (tmp_path / "README.md").read_text()
    data = ModelCard(written).data.to_dict()
    assert (data["license"], data.get("base_model")) == (licence, base if on_the_hub else None)
    assert "python eval.py --task blackjack --model FOLDER --no-cot`" in written
    assert f"python sft.py --task blackjack --model {base} --target-modules language --no-cot`" in written


def test_a_card_tells_what_was_measured(tmp_path):
    assert card._held_out(tmp_path / "eval_start.json") == "not measured"
    (tmp_path / "eval_start.json").write_text(json.dumps(
        {"success": 0.25, "success_low": 0.1, "success_high": 0.4, "episodes": 1200, "seed": 7}))
    assert "25.0 % (95 % interval 10.0 to 40.0) of 1,200 held-out" in card._held_out(tmp_path / "eval_start.json")
    (tmp_path / "metrics.jsonl").write_text('{"episodes": 0, "success": null}\n{"episodes": 100, "success": 0.5}\n')
    assert "50.0 % (95 % interval 40.4 to 59.6) of the 100" in card._last_rollout(tmp_path / "metrics.jsonl", 2)
    assert card._last_rollout(tmp_path / "metrics.jsonl", 1) == "no episode ended in it"


def test_tensorboard_shows_what_the_metrics_say(stopped_run, tmp_path, monkeypatch):
    """By TensorBoard's own reader. After a kill with points past the checkpoint each step is there once, for a reader
    that was open all the while as for a new one."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard: pip "
                                 "install -r extras/requirements-tensorboard.txt").EventAccumulator
    run, command = tmp_path / "run", [*stopped_run[1][:-2], "--eval-episodes", "2", "--save-every", "2"]

    def killed(run, *rest):
        if run.update == 4:
            raise KeyboardInterrupt
        return record(run, *rest)

    with monkeypatch.context() as stopped:
        record = train.record
        stopped.setattr(train, "record", killed)
        with pytest.raises(SystemExit):
            train.main([*command, "--tensorboard", "--out", str(run)])
    steps = lambda board: [event.step for event in board.Scalars("train/lr")]
    opened = reader(str(run / "tensorboard"))
    assert steps(opened.Reload()) == [8, 16, 24] and [path.name for path in run.glob("check*")] == ["checkpoint-000002"]
    train.main([*command[:2], "--out", str(run), "--resume"])
    rows = recorded.metrics(run)
    board = reader(str(run / "tensorboard")).Reload()
    assert steps(board) == steps(opened.Reload()) == [8, 16, 24, 32]
    for name in rows[0].keys() - {"update", "env_steps"}:
        points = [(row["env_steps"], row[name]) for row in rows if row[name] is not None]
        found = [(event.step, event.value) for event in board.Scalars(f"train/{name}")] if points else []
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name
    said = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("answer/text_summary")]
    lines = (run / "transcripts.jsonl").read_text().splitlines()
    assert len(said) == 4 and all(f"plays {json.loads(line)['action']}," in text for line, text in zip(lines, said))
    assert [(event.step, event.width) for event in board.Images("held_out/game")] == [(0, 760), (32, 760)]
    ends = [json.loads((run / f"{name}.json").read_text())["return_mean"] for name in ("eval_start", "eval")]
    assert [event.value for event in board.Scalars("held_out/return_mean")] == pytest.approx(ends, rel=1e-6)
    without = (stopped_run[0] / "metrics.jsonl").read_bytes()
    assert without.count(b"\n") == 2 and (run / "metrics.jsonl").read_bytes().startswith(without)


def test_tensorboard_may_be_missing_and_may_come_later(stopped_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install -r extras/requirements-tensorboard.txt"):
        train.main([*stopped_run[1], "--tensorboard", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new" / "config.json").exists()
    shutil.copytree(stopped_run[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config.pop("tensorboard") is False                           # a run of before there was the setting
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    assert len(recorded.metrics(tmp_path / "run")) == 4 and not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name, mode", [
    *itertools.product([f"env:cards/{game.__name__}-v0" for game in GAMES.values()], ["sync", "async"]),
    ("alfworld_env:alfworld/Household-v0", "sync")])
def test_gymnasiums_vectors_play_the_same_games(name, mode):
    """Three games side by side, here and in processes of their own: each plays as it does alone, info included."""
    if "alfworld" in name:
        pytest.importorskip("alfworld", reason="ALFWorld's engine: pip install -r extras/requirements-alfworld.txt")
    generator, compared = np.random.default_rng(0), 0
    alone = [gymnasium.make(name).unwrapped for _ in range(3)]
    vector = gymnasium.make_vec(name, num_envs=3, vectorization_mode=mode)
    try:
        pictures, infos = vector.reset(seed=4)
        expected = [(*game.reset(seed=4 + k), 0, False) for k, game in enumerate(alone)]
        for _ in range(12 if "cards" in name else 4):
            for k, (picture, info, *_) in enumerate(expected):
                assert np.array_equal(pictures[k], picture)
                for key, value in info.items():
                    there = infos[key] if not isinstance(value, dict) else None         # Gymnasium nests what is nested
                    assert there is None or there[k] == value, key
                    compared += there is not None
            actions = [int(generator.integers(len(game.legal_actions()))) for game in alone]
            over = [row[3] for row in expected]
            pictures, rewards, terminated, truncated, infos = vector.step(np.array(actions))
            expected = []
            for game, action, ended in zip(alone, actions, over):                       # the step after an end resets
                picture, reward, *ends, info = (*game.reset()[:1], 0, False, game.observe()[1]) if ended else \
                    game.step(action)
                expected.append((picture, info, reward, any(ends)))
            assert rewards.tolist() == [row[2] for row in expected]
            assert (terminated | truncated).tolist() == [row[3] for row in expected]
    finally:
        vector.close()
    assert compared > 20


def test_gymnasium_records_a_video(tmp_path):
    pytest.importorskip("moviepy", reason="moviepy, for RecordVideo: pip install moviepy (which wants an older pillow)")
    for game in GAMES.values():
        film = gymnasium.wrappers.RecordVideo(gymnasium.make(f"cards/{game.__name__}-v0", render_mode="rgb_array"),
                                              str(tmp_path), name_prefix=game.__name__)
        film.reset(seed=0)
        while not any(film.step(0)[2:4]):
            pass
        film.close()
        assert (tmp_path / f"{game.__name__}-episode-0.mp4").stat().st_size > 1000


# ---- extras: bench.py, shapes.py, speed_ablation.py ----------------------------------------------------------------
def test_flops_agree_with_torchs_counter(agent):
    prompts, responses = samples_of(agent, 1, ("blackjack",))
    plain = lambda: sdpa_kernel(SDPBackend.MATH)                # the counter does not know the CPU's fused attention
    with plain(), FlopCounterMode(display=False) as forward, torch.no_grad():
        agent.logprobs(prompts, responses)
    with plain(), FlopCounterMode(display=False) as both:
        logp, _, value = agent.logprobs(prompts, responses)
        (logp.sum() + value.sum()).backward()
    counted = bench.update_flops(agent, len(prompts[0].ids), len(responses[0]))
    assert counted[0] == pytest.approx(forward.get_total_flops(), rel=0.03)
    assert counted[1] == pytest.approx(both.get_total_flops(), rel=0.03)


def test_the_7b_shape_and_its_memory_plan():
    """The published checkpoint's numbers of weights, and bytes that bitsandbytes' own tensors take."""
    processor = shapes.byte_processor()
    config = shapes.llava_7b_config(processor)
    with torch.device("meta"):
        model = pocket.LlavaNextForConditionalGeneration(config)
    # LLaVA-1.6-Mistral-7B: 7.57e9 weights, Mistral's own 7.24e9 of them (64 more rows in embedding and head)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model) == pytest.approx(7.57e9, rel=0.005)
    assert count(model.model.language_model) + count(model.lm_head) == 7_241_732_096 + 2 * 64 * 4096
    for row, _, _, plan in shapes.plans():                              # the README's: each fits its GPU
        assert 0.5 * row[0] < memory.MARGIN * memory.peak(plan) / 2**30 < row[0] - 1

    from bitsandbytes.nn import Linear4bit
    _, processor = load_model(str(POCKET))
    config = pocket.make_model(processor, hidden=64, vision_layers=1, text_layers=1).config
    small = shapes.random_model(config, torch.device("cpu"))
    stored = 0
    for module in small.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            stored += module.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    options = Settings(task="blackjack", bits="4", rank=8, gradient_checkpointing=0)
    assert stored == memory.memory_plan(config, options, (40, 25))["weights"]
    policy = Policy(small, processor, rank=4)
    picture, info = GAMES["blackjack"]().reset(seed=0)
    prompts = policy.encode([picture], ["Hello"])
    logp, _, _ = policy.logprobs(prompts, policy.generate(prompts, torch.Generator().manual_seed(0), 5))
    assert logp.isfinite().all()


def test_bench_measures_both_procedures(capsys, monkeypatch, tiny_families):
    monkeypatch.setattr(bench, "game_rates", functools.partial(bench.game_rates, steps=300))
    bench.main(["--model", str(tiny_families["qwen3_vl"]), "--num-envs", "4", "--num-steps", "1", "--updates", "1",
                "--micro-batch-size", "4"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["tokens_per_s"] > 0 and "mfu" not in figures         # FLOPs are counted of LLaVAs alone
    bench.main(["--num-envs", "16", "--num-steps", "1", "--updates", "1", "--baseline", "--baseline-samples", "2",
                "--micro-batch-size", "16"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ratio"] == pytest.approx(figures["baseline"]["whole_update_s"] / figures["whole_update_s"])
    assert figures["whole_update_s"] == pytest.approx(figures["rollout_s"] + figures["update_s"])
    assert 0 < figures["mfu"] < 1 and set(figures["games_steps_per_s"]) == set(GAMES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--model", "llava-7b-random", "--memory-gb", "24"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["memory_plan_gib"]["cap"] == 24 and plan["measured"] is False


def test_what_is_measured_undone_computes_the_same(agent):
    """Each choice for speed changes the time and nothing else."""
    prompts, responses = samples_of(agent, 2, tokens=20)
    with torch.no_grad():
        expected = agent.logprobs(prompts, responses)
        for name, (_, context) in speed_ablation.choices().items():
            with context():
                found = agent.logprobs(prompts, responses)
            for mine, theirs in zip(expected, found):
                if "bf16" in name:                                      # coarser, and no more
                    assert (mine - theirs).abs().mean() < 0.2
                else:
                    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, msg=name)
        generator = torch.Generator().manual_seed(0)
        written = agent.generate(prompts, generator, 12, greedy=True)
        merged = speed_ablation.merged_while_writing(Policy.generate, agent, prompts, generator, 12, None, True)
    assert merged == written


# ---- the READMEs ---------------------------------------------------------------------------------------------------
PARSERS = {"train.py": lambda: run_settings.make_parser(Settings), "eval.py": evaluation.make_parser,
           "sft.py": lambda: run_settings.make_parser(sft.SFTSettings), "-m extras.pocket": pocket.make_parser,
           "-m extras.features": lambda: run_settings.make_parser(features.FeatureSettings),
           "-m extras.pocket_alfworld": pocket_alfworld.make_parser,
           "-m extras.bench": bench.make_parser, "-m extras.speed_ablation": speed_ablation.make_parser,
           "-m extras.serve": serve.make_parser, "-m extras.plot": plot.make_parser,
           "-m extras.plans": plans.make_parser}
PAGES = ("README.md", "results/README.md", "results/tried/README.md", "extras/README.md")


def test_the_readmes_worked_step_is_true(shipped):
    """The answer that the snippet samples, and the figures that the method section gives for it."""
    agent, game = Policy(shipped[0], shipped[1], target_modules=(), temperature=0.5), GAMES["blackjack"]()
    picture, info = game.reset(seed=0)
    [prompt], [response], [choice] = playing.act(agent, [game], [picture], [info], torch.Generator().manual_seed(0),
                                                 np.random.default_rng(0))
    assert (len(prompt.ids), prompt.ids.count(agent.family.image_token)) == (35, 25)
    assert (len(response), choice.action_start) == (13, 10)
    assert parse.parse(choice.text, game.legal_actions()) == (choice.action, 80)
    with torch.no_grad():
        logp, mask, _ = agent.logprobs([prompt], [response])
    weighted = ppo.answer_logprob(logp, mask, torch.tensor([10]), 0.5).item()
    readme = (HERE / "README.md").read_text()
    figures = (logp[0, :10].sum().item(), logp[0, 10:].sum().item(), weighted)
    assert choice.text in readme and "character 80, token 10" in readme
    assert all(f"{figure:.3f}".replace("-", "−") in readme for figure in figures), figures


def test_the_readmes_snippet_plays_and_scores_one_step():
    """The Python block runs as it stands, and its last line is worth what the comment beside it says."""
    block = re.search(r"```python\n(.*?)```", (HERE / "extras" / "README.md").read_text(), re.S)[1]
    found = subprocess.run([sys.executable, "-c", block], cwd=HERE, capture_output=True, text=True, check=True).stdout
    for line in found.splitlines():
        assert line.removeprefix("{") in block.split("# {")[1], line


def test_the_readmes_tables_are_made_of_the_result_files():
    lines = [line.strip() for page in PAGES for line in (HERE / page).read_text().splitlines()]
    assert len(tables.tables()) >= 5 and shapes.table() in (HERE / "extras" / "README.md").read_text()
    for table in map(str.splitlines, tables.tables()):
        first = lines.index(table[0])
        assert len(table) >= 3 and lines[first:first + len(table)] == table
        assert not lines[first + len(table)].startswith("|")            # no row of an earlier table is left
    speed = json.loads((HERE / "results" / "bench" / "pocket.json").read_text())
    row = " | ".join(f"{speed['baseline'][key]:.1f} s" for key in ("rollout_s", "update_s", "whole_update_s"))
    assert any(line.endswith(f"| {row} | {speed['ratio']:.1f} |") for line in lines)


def test_figures_draw_what_the_files_say(tmp_path, monkeypatch):
    """Shares in %, in the order of their names; means of the seeds; a rollout in which no episode ended is a gap."""
    rows = [{"env_steps": 8 * k, "success": success, "lost_plan_not_followed": 0.1, "lost_wrong_plan": 0.3}
            for k, success in enumerate((0.5, None, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps, success = recorded.curves([tmp_path])
    assert steps.tolist() == [0, 8, 16] and np.array_equal(success, [[50, np.nan, 100]], equal_nan=True)
    drawn = []
    monkeypatch.setattr(plot.pyplot, "close", drawn.append)
    plot.draw_losses(tmp_path, tmp_path / "losses.png")
    spans = {part.get_label(): part.get_paths()[0].get_extents() for part in drawn[0].axes[0].collections}
    assert {name: (round(box.y0), round(box.y1)) for name, box in spans.items()} == {
        "won": (0, 60), "lost: a right plan, not followed": (60, 70), "lost: a wrong plan": (70, 100)}
    plot.draw_curves(tmp_path / "curves.png")
    for axes, task in zip(drawn[1].axes, recorded.PAPER):
        line = next(line for line in axes.lines if len(line.get_xdata()) > 2)
        assert np.allclose(line.get_ydata(), np.nanmean(recorded.curves(recorded.runs(task))[1], 0))
    monkeypatch.undo()
    for figure in drawn:
        plot.pyplot.close(figure)


def test_figures_in_the_prose_are_in_the_result_files():
    """Games without a first success, and what the starts that were taught one came to."""
    prose = " ".join(" ".join((HERE / page).read_text().split()) for page in PAGES)

    def games(task, variant):
        rows = [row for folder in recorded.runs(task, variant) for row in recorded.metrics(folder)]
        return sum(round(row["episodes"] * row["success"]) for row in rows), sum(row["episodes"] for row in rows)

    for task, variant in (("points24", "no-cot"), ("ezpoints", "features"), ("points24", "features")):
        won, played = games(task, variant)
        assert re.search(rf"(?<![\d.,]){won} of {played:,}", prose), (task, variant)
    tried = HERE / "results" / "tried"
    ends = [100 * json.loads(file.read_text())["success"]
            for file in tried.glob("taught-points24-no-cot-seed*/eval.json")]
    assert len(ends) == 3 and f"to {recorded.shown(ends)} %" in prose
    for folder, files in (("taught-points24-no-cot-seed1", ("eval_sft", "eval_start")),
                          ("taught-features-ezpoints-seed1", ("eval_start", "eval"))):
        for file in files:
            success = 100 * json.loads((tried / folder / f"{file}.json").read_text())["success"]
            assert re.search(rf"(?<![\d.,]){success:.1f} %", prose), (folder, file)


def test_each_result_belongs_to_its_command():
    """A run's config.json, eval.json and folder are what its command.txt says: all steps, held-out deals."""
    folders = [file.parent for file in (HERE / "results" / "runs").glob("*-seed*/command.txt")]
    assert len(folders) >= 12 and tables.households()       # none is hidden from git
    for folder in folders:
        command = (folder / "command.txt").read_text()
        script, words = re.match(r"OMP_NUM_THREADS=1 python (\S+\.py|-m \S+) (.*)", command).groups()
        given = vars(PARSERS[script]().parse_args(shlex.split(words)))
        config, end = (json.loads((folder / name).read_text()) for name in ("config.json", "eval.json"))
        assert Path(given["out"]).name == Path(config["out"]).name == folder.name
        assert Path(end.get("policy", folder.name)).name == folder.name
        if config["task"] == "alfworld":                    # whose pocket model has a name of its own
            given["model"] = given["model"].replace("pocket", "pocket-alfworld")
        steps = given.get("total_timesteps", 5_000 if config["task"] == "alfworld" else 15_000)
        assert {key: config[key] for key in given} == given and config["total_timesteps"] == steps
        assert len(recorded.metrics(folder)) == steps // 512 and end["seed"] == 10_000
        assert end["episodes"] == {"blackjack": 10_000, "alfworld": 500}.get(config["task"], 1000)


@pytest.mark.parametrize("task", GAMES)
def test_the_main_tables_runs_have_todays_defaults(task):
    stored = json.loads((HERE / "results" / "runs" / f"{task}-seed4" / "config.json").read_text())
    today = Settings(task=task, bits="32", target_modules=tuple(families.PARTS))
    run_settings.fill_in(today, small=True)
    apart = {"out", "seed", "model", "eval_episodes"}
    own = {name: value for name, value in manifest.plain(today).items() if name in stored and name not in apart}
    # settings that came later, or have other names since: what they stand for is today's default
    assert len(own) > 20 and own == {name: stored[name] for name in own}


def test_every_link_and_picture_of_the_pages_is_there():
    """Files that the READMEs and the notebook link to, and the headings that they jump to."""
    pages = {page: (HERE / page).read_text() for page in PAGES}
    cells = json.loads((HERE / "tutorial.ipynb").read_text())["cells"]
    pages["tutorial.ipynb"] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    seen = 0
    for page, text in pages.items():
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            file, _, heading = "".join(target).partition("#")
            if file.startswith("http"):
                continue
            there = (HERE / page).parent / file if file else HERE / page
            assert there.exists(), (page, target)
            titles = re.findall(r"^#+ (.*)", there.read_text(), re.M) if heading else ()
            assert not heading or heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                                              for title in titles}, (page, target)
            seen += 1
    assert seen > 30


def test_every_command_in_the_readmes_parses():
    text = "\n".join((HERE / page).read_text() for page in PAGES)
    commands = re.findall(r"^(?:pip install -r requirements.txt && )?(?:python|torchrun \S+) (\w+\.py|-m extras\.\w+)"
                          r"([^#\n]*)", text.replace("\\\n", " "), re.M)
    assert {script for script, _ in commands} == set(PARSERS)
    for script, rest in commands:
        words = shlex.split(rest)
        PARSERS[script]().parse_args([word for word in words if word != "--resume"])
