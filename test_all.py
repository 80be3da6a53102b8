"""The method, claim by claim, in the order of the data: games, parse, policy, λ, GAE, PPO, rollout, loop.

    pytest test_all.py              # this file, then all of tests/ (conftest.py adds it); a CPU, no network
"""

import ast
import copy
import doctest
import importlib
import itertools
import json
import math
import operator
import random
import re
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, strategies
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import eval as evaluation
import families
import parse
import players
import ppo
import rollout as playing
import sft
import train
from env import GAMES
from games import expert
from games.formula import evaluate, solutions
from lora import LoRALinear
from plumbing.settings import Settings
from policy import Policy, load_model
from tests.common import (
    cards,
    largest_ratio_error,
    make_run,
    play,
    play_out,
    run_metrics,
    samples_of,
    shake,
    states_of,
)

HERE = Path(__file__).parent


# ---- what all of it rests on ---------------------------------------------------------------------------------------
PROGRAM = {".".join(file.relative_to(HERE).with_suffix("").parts): file
           for pattern in ("*.py", "games/**/*.py", "plumbing/*.py", "extras/*.py", "lab/*.py")
           for file in sorted(HERE.glob(pattern)) if file.name not in ("test_all.py", "conftest.py")}


@pytest.mark.parametrize("name", [name for name, file in PROGRAM.items()
                                  if ">>> " in file.read_text() and not name.startswith("lab.")])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert found.attempted > 0 and found.failed == 0


def imports_of(name):
    """The project's modules that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(PROGRAM[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(PROGRAM)


def test_nothing_in_the_core_looks_up_or_sideways():
    """The bricks import none of each other, the method no plumbing, the games only games, plumbing no script, none lab."""
    bricks, above = {"env", "parse", "policy", "ppo"}, {"train", "eval", "sft", "players", "imitation"}
    for name in PROGRAM:
        folder, wanted = name.split(".")[0], imports_of(name)
        folders = {other.split(".")[0] for other in wanted}
        if name in (*bricks, "rollout", "decode", "lora", "families", "parallel", "imitation"):
            assert not folders & {"plumbing", "extras", "lab"}, name
        if name in bricks:
            assert not wanted & (bricks - {name} | {"rollout"} | above), name
        if folder == "games":
            assert folders <= {"games"}, name
        if folder == "plumbing":
            assert not folders & {*above, "extras", "lab"}, name
        assert folder == "lab" or "lab" not in folders, name
        assert folder in ("lab", "extras", "train", "eval") or "extras" not in folders, name


def test_no_file_imports_itself_by_way_of_others():
    done, waiting = set(), {name: imports_of(name) - {name} for name in PROGRAM}
    while free := [name for name, wanted in waiting.items() if wanted <= done]:
        done |= set(free)
        waiting = {name: wanted for name, wanted in waiting.items() if name not in done}
    assert not waiting


# ---- games: env.py -------------------------------------------------------------------------------------------------
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


def test_info_is_a_copy():
    game = GAMES["points24"]()
    _, info = game.reset(seed=0)
    info["formula"].append("+")
    info["cards"].clear()
    assert game.formula == [] and len(game.observe()[1]["cards"]) == 4


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


def test_blackjack_is_gymnasiums():
    """The same cards and the same actions give the same observations and rewards as Gymnasium's Blackjack-v1."""
    theirs = gymnasium.make("Blackjack-v1", natural=False, sab=False).unwrapped
    generator = np.random.default_rng(1)
    rewards = Counter()
    for _ in range(2500):
        deck = [int(c) for c in generator.integers(52, size=30)]
        if generator.random() < 0.3:
            deck[2:4] = cards("A", "K")                                 # naturals are rare: deal some
        mine = GAMES["blackjack"]()
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
    assert set(rewards) == {-1, 0, 1}


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


# ---- parse.py -------------------------------------------------------------------------------------------------------
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
    ('{"action": 10}', ("1", "10"), "10"), ('{"action": 10.5}', ("10", "5"), None), ('{"action": 1e3}', ("1",), None),
    ('{"action": "action": "hit"}', ("stand", "hit"), "hit"),                   # matches overlap
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
            text = parse.make_answer(action, GAMES[task]().thoughts(info, action))
            assert json.loads(text)["action"] == action and GAMES[task]().reading(info) in text
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


# ---- the expert and its demonstrations: games/expert.py, sft.py -----------------------------------------------------
@pytest.mark.parametrize("task, expected, games", [
    ("numberline", 1.0, 60), ("ezpoints", 1.0, 200), ("points24", 0.7309, 300), ("blackjack", 0.4316, 12_000)])
def test_experts_reach_their_exact_values_in_play(task, expected, games):
    result = evaluation.evaluate(players.scripted_player("expert", task, 0), task, games, seed=0)
    tolerance = 3.3 * math.sqrt(expected * (1 - expected) / games)
    assert result["success"] == pytest.approx(expected, abs=tolerance + 1e-12)
    assert result["expert_agreement"] == 1.0


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
        steps.append(game.actions[index] in game.best_actions(game.observe()[1])), step(index))[1])
    for _ in itertools.islice(sft.demonstrations(task, 0, label_noise=1.0), 60):
        if task == "points24":
            assert solutions(tuple(sorted(map(int, game._numbers()))), 24)
    assert 0.15 < 1 - sum(steps[1:]) / len(steps[1:]) < 0.7
    assert steps[0] == ({"solvable_only": True} if task == "points24" else {})


# ---- policy.py ------------------------------------------------------------------------------------------------------
def test_lora_is_the_dense_product_and_starts_as_identity():
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(24, 40)
    layer = LoRALinear(base, rank=4, alpha=12, generator=generator)
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
        logp, value = agent.logprobs(*samples_of(agent, 1, ("blackjack",), tokens=5))
        (logp.sum() + value.sum()).backward()
        with_gradient = {name for name, p in agent.named_parameters() if p.grad is not None}
        wanted = {f"model.{path}.lora_{m}" for path in agent.lora for m in "AB"}
        wanted |= {name for name, _ in agent.named_parameters() if name.startswith("value_head")}
        assert with_gradient == wanted == {name for name, _ in agent.trainable()}
        adapted = {part for part in map(families.part_of_path, agent.lora)}
        assert adapted == set(parts)


def test_the_value_head_only_reads(agent):
    _, value = agent.logprobs(*samples_of(agent, 1, ("blackjack",), tokens=5))
    value.sum().backward()
    assert all(parameter.grad is None for name, parameter in agent.trainable() if not name.startswith("value_head"))
    assert all(parameter.grad is not None for parameter in agent.value_head.parameters())
    agent.zero_grad()


@pytest.mark.parametrize("task", GAMES)
def test_logprobs_are_hugging_faces_cross_entropy(agent, task):
    """λ = 1 equals the loss that transformers computes itself, on features that transformers made of the picture."""
    shake(agent)
    prompts, responses = samples_of(agent, 3, (task,))
    logp, _ = agent.logprobs(prompts, responses)
    agent.suppress_tokens[:] = False                                    # transformers' softmax knows no forbidden ids
    free, _ = agent.logprobs(prompts, responses)
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
        assert (free[row, len(response):] == 0).all()                   # padding counts nothing
        torch.testing.assert_close(-free[row].sum() / len(response), loss, atol=2e-5, rtol=1e-5)


def test_batched_is_one_by_one(agent):
    """Prompts and answers of all games, of many lengths, in one batch or alone: the same numbers."""
    shake(agent)
    prompts, responses = samples_of(agent, 2)
    responses[0], responses[3] = responses[0][:1], responses[3][:7]
    logp, value = agent.logprobs(prompts, responses)
    torch.testing.assert_close(agent.value(prompts), value, atol=2e-5, rtol=1e-5)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        one, one_value = agent.logprobs([prompt], [response])
        assert one.shape == (1, len(response))
        torch.testing.assert_close(logp[row, :len(response)], one[0], atol=2e-5, rtol=1e-5)
        assert (logp[row, len(response):] == 0).all()
        torch.testing.assert_close(value[row], one_value[0], atol=2e-5, rtol=1e-5)


def test_value_cannot_see_the_answer(agent):
    shake(agent)
    prompts, responses = samples_of(agent, 1, ("blackjack",))
    other = [[token for token in reversed(response)] for response in responses]
    torch.testing.assert_close(agent.logprobs(prompts, responses)[1], agent.logprobs(prompts, other)[1])


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
    corpus = [parse.make_answer(a, GAMES["blackjack"]().thoughts(i, a))
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


# ---- ppo.py: GAE ----------------------------------------------------------------------------------------------------
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


# ---- ppo.py: λ ------------------------------------------------------------------------------------------------------
def test_answer_logprob_weighs_thoughts_and_action():
    logp = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, 0.0]])
    starts = torch.tensor([2, 3])                                       # one start a row; row 1 names no action
    assert ppo.answer_logprob(logp, starts, 0.5).tolist() == [-8.5, -3.0]
    assert ppo.answer_logprob(logp, starts, 1.0).tolist() == logp.sum(1).tolist()
    assert ppo.answer_logprob(logp, starts, 0.0).tolist() == [-7.0, 0.0]


# ---- ppo.py: the update ---------------------------------------------------------------------------------------------
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
        return logp, self.value_head(self.prompt_hidden(prompts))

    def prompt_hidden(self, prompts):
        return torch.ones(len(prompts))

    def value_head(self, hidden):
        return self.worth * hidden

    value_head.fitted = True                                            # it has nothing to standardise

    def groups(self, **rates):
        return [{"params": [getattr(self, name)], "lr": rate} for name, rate in rates.items()]


def bandit_settings(**changes):
    return Settings(**({"micro_batch_size": 16} | changes))


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
    names = "policy_loss value_loss approx_kl clip_fraction answer_kl grad_norm minibatches ratio_error"
    assert list(diagnostics) == names.split()


def test_two_kls_are_told_that_of_the_weighted_answers_and_their_own():
    """By hand, of answers that are all thought: d = log π − log π_old, weighted 0.3 · d; in the first minibatch 0."""
    policy, places = Bandit(), []
    options = bandit_settings(minibatch_size=64, micro_batch_size=32, update_epochs=2, cot_lambda=0.3)
    rollout = bandit_rollout(policy, options, torch.Generator().manual_seed(0))
    rollout.action_starts += 1
    playing.score_rollout(policy, rollout, options)
    optimizer = torch.optim.SGD(policy.groups(logits=1.0, worth=0.0))
    optimizer.register_step_post_hook(lambda *_: places.append(policy.logits.detach().clone()))
    found = ppo.ppo_update(policy, optimizer, rollout, options, torch.Generator().manual_seed(0))
    d = (places[0].log_softmax(0) - math.log(0.5))[torch.tensor(rollout.responses).flatten()]
    for name, x in (("approx_kl", 0.3 * d), ("answer_kl", d)):
        assert found[name] == pytest.approx((x.exp() - 1 - x).mean().item() / 2, rel=1e-3) and found[name] > 0, name


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
        logp, values = policy.logprobs([rollout.prompts[i] for i in batch], [rollout.responses[i] for i in batch])
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


# ---- rollout.py -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", GAMES)
def test_ratio_is_one_before_the_first_step(shipped, task):
    """What is scored is what was sampled, prompts that change every step included; also in other minibatches."""
    run = make_run(shipped, task, num_steps=3)
    shake(run.policy)
    rollout = play_out(run)
    assert len({tuple(p.ids) for p in rollout.prompts}) > (1 if task in ("ezpoints", "points24") else 0)
    metrics = playing.rollout_metrics(rollout, run.settings, run.games[0])
    assert metrics["thought_logp"] < 0 and metrics["action_logp"] <= 0
    assert largest_ratio_error(run.policy, rollout, [3, 40, 17], list(range(48))[::-5], [0]) == 0
    found = ppo.ppo_update(run.policy, run.optimizer, rollout, run.settings, run.shuffling)
    assert found["ratio_error"] == 0
    assert largest_ratio_error(run.policy, rollout, range(48)) > 1e-3   # after the steps it is another policy


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
    found = playing.rollout_metrics(rollout, run.settings, run.games[0])
    assert found["explained_variance"] == pytest.approx(variance, abs=0.02)


def test_what_the_loop_writes_is_what_was_played(shipped, tmp_path, monkeypatch):
    """One update of the whole loop. Its metrics, recounted; the sample answer is the first game's, with its reward."""
    run, played = make_run(shipped, "ezpoints", num_envs=8, num_steps=6, total_timesteps=48, cot_lambda=0.25, lr=1e-9,
                           eval_episodes=0), []
    plain = train.collect
    monkeypatch.setattr(train, "collect", lambda *arguments: played.append(plain(*arguments)) or played[0])
    train.run_whole(run, tmp_path)
    [rollout], [found] = played, run_metrics(tmp_path)
    logp, _ = run.policy.logprobs(rollout.prompts, rollout.responses)
    weighed = ppo.answer_logprob(logp, rollout.action_starts, 0.25)
    torch.testing.assert_close(rollout.old_logp, weighed.detach(), atol=1e-3, rtol=1e-3)
    assert found["parse_rate"] == sum(c.named for c in rollout.choices) / 48
    assert found["reading_rate"] > 0.95                                 # of the state that it was asked in
    assert found["response_tokens"] == sum(map(len, rollout.responses)) / 48
    assert found["success"] == sum(success for _, success in rollout.episodes) / found["episodes"]
    choice, line = rollout.choices[5 * 8], json.loads((tmp_path / "transcripts.jsonl").read_text())
    assert (line["text"], line["action"], line["reward"]) == (choice.text, choice.action, rollout.rewards[5, 0])
    assert run.update == 1 and (tmp_path / "checkpoint-000001").exists()


def test_without_chain_of_thought_no_prompt_asks_for_thoughts(shipped):
    """Neither the stored ones, nor those of cut-off and following states."""
    run = make_run(shipped, "numberline", cot=False, num_envs=4, num_steps=12, max_new_tokens=3)
    shake(run.policy, size=0.2)
    rollout = play_out(run)
    prompts = [*rollout.prompts, *rollout.last_prompts, *(prompt for _, _, prompt in rollout.cut_off)]
    assert rollout.cut_off and not any('"thoughts"' in run.policy.tokenizer.decode(prompt.ids) for prompt in prompts)
    named = [choice.named for choice in rollout.choices]                # cut off after three tokens
    assert max(map(len, rollout.responses)) == 3
    assert playing.rollout_metrics(rollout, run.settings, run.games[0])["parse_rate"] == sum(named) / len(named) < 1


# ---- the loop: train.py ---------------------------------------------------------------------------------------------
def test_learning_rate_falls_and_stays_down(shipped):
    run, rates = make_run(shipped, "numberline", value_lr=0.1, total_timesteps=320), []
    for update in range(10):
        run.env_steps = update * run.settings.batch_size
        train.anneal(run)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    rates, of_value = zip(*rates)
    answers, head = (group["params"] for group in run.optimizer.param_groups)
    own = {*map(id, run.policy.value_head.parameters())}
    assert {*map(id, head)} == own and not own & {*map(id, answers)}
    assert of_value[0] == pytest.approx(0.1) and of_value[5] == pytest.approx(0.05) and of_value[-1] < 0.003
    assert rates[0] == pytest.approx(1e-3) and rates[5] == pytest.approx(5e-4, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates)) and rates[9] == pytest.approx(2.4e-5, rel=0.05)


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


def test_ppo_on_the_real_model_beats_its_start(shipped):
    """A short run of the whole loop on NumberLine, which the model plays at random (27 %) before, on held-out games."""
    run = make_run(shipped, "numberline", num_envs=64, num_steps=2, total_timesteps=128 * 3, micro_batch_size=64,
                   minibatch_size=64, max_new_tokens=40, rank=16, reward_scale=1.0)
    for _ in range(3):
        ppo.ppo_update(run.policy, run.optimizer, play_out(run), run.settings, run.shuffling)
    player = players.model_player(run.policy, seed=0, max_new_tokens=40)
    assert evaluation.evaluate(player, "numberline", 60, seed=10_000)["success"] > 0.6
