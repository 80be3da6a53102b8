"""Games beyond their rules: pictures, saved states, experts, statistics, Gymnasium's wrappers."""

import ast
import functools
import itertools
import re

import gymnasium
import numpy as np
import pytest

import rollout as playing
from env import GAMES
from games import draw, expert
from games.formula import evaluate
from games.statistics import Decision, decision_statistics
from tests.common import cards


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
    for action in (np.array(1.0), np.array(True), np.array([1]), np.array(2)):
        with pytest.raises(ValueError, match="not an index"):
            game.step(action)
    game.step(np.int64(1))
    game.reset(seed=0)
    assert game.action_space.contains(np.array(0))
    game.step(np.array(0))                                              # as Gymnasium's own spaces and wrappers have it


@pytest.mark.parametrize("task, changes", [
    ("blackjack", {"player": [1]}), ("blackjack", {"dealer": [1, 52]}), ("blackjack", {"player": "ab"}),
    ("blackjack", {"dealer": [0] * 10**4}), ("blackjack", {"player": [36, 36, 36]}),
    ("blackjack", {"dealer": [4, 8, 12]}), ("blackjack", {"episode_return": 10**400}),
    ("numberline", {"steps": 10}),
    ("blackjack", {"generator": {"bit_generator": "PCG64", "state": {"state": 0, "inc": 0}, "has_uint32": 0,
                                 "uinteger": 0}}),
    ("blackjack", {"dealer": [0, 36, 4]}), ("blackjack", {"player": [40] * 4}),
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
    for state in (None, [], {}, {1: 2, "a": 3}, before | {"game": "Chess"}):
        with pytest.raises(ValueError, match="not a state that"):
            game.set_state(state)
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


def test_every_symbol_that_some_solution_continues_is_the_experts():
    """Against brute force: a symbol is best where some text of the target's value begins with the formula and it."""
    info = {"numbers": [2, 10], "formula": [], "target": 12}
    assert set(GAMES["ezpoints"]().best_actions(info)) == {"2", "10"}
    assert GAMES["ezpoints"]().best_actions(info | {"formula": ["2"]}) == ["+"]
    assert GAMES["ezpoints"]().best_actions(info | {"formula": ["2", "*"]}) == ["="]        # lost: given up
    for numbers in ((1, 2, 3, 4), (2, 2, 10, 10)):                      # some need brackets, the other never one first
        info = {"numbers": numbers, "formula": [], "target": 24}
        texts = {shape.format(*order, *signs) for order in itertools.permutations(numbers)
                 for signs in itertools.product("+-*/", repeat=3) for shape in (
                     "(({0}{4}{1}){5}{2}){6}{3}", "({0}{4}({1}{5}{2})){6}{3}", "({0}{4}{1}){5}({2}{6}{3})",
                     "{0}{4}(({1}{5}{2}){6}{3})", "{0}{4}({1}{5}({2}{6}{3}))")}
        split = lambda text: re.findall(r"\d+|[^ ]", text)
        right = [text for text in texts if evaluate(split(text)) == 24]
        plain = [split(ast.unparse(ast.parse(text))) for text in right]         # Python drops a needless first "("
        assert set(GAMES["points24"]().best_actions(info)) == {tokens[0] for tokens in plain}
        for tokens in (tokens for tokens in plain if "(" not in tokens):
            for k in range(1, len(tokens)):
                assert tokens[k] in GAMES["points24"]().best_actions(info | {"formula": tokens[:k]})


def value_of_blackjack(play, lost=0.0):
    """Exact, over all deals: 1 a win, `lost` a loss. play: values of standing and of hitting, and the state → its own."""
    odds, add = expert.CARD_ODDS, expert._add

    @functools.cache
    def value(total, usable, dealer):
        if total > 21:
            return lost
        ends = expert.dealer_odds(*add(0, False, dealer))
        stand = sum(p * (1 if end == 22 or end < total else lost * (end > total)) for end, p in ends.items())
        hit = sum(p * value(*add(total, usable, rank), dealer) for rank, p in odds.items())
        return play(stand, hit, total, usable, dealer)

    return sum(p * q * r * value(*add(*add(0, False, first), second), dealer)
               for (first, p), (second, q), (dealer, r) in itertools.product(odds.items(), repeat=3))


def test_blackjack_values_are_the_exact_ones():
    best = lambda stand, hit, *_: max(stand, hit)
    experts = lambda stand, hit, total, usable, dealer: (
        hit if expert.hit_value(total, usable, dealer) > expert.stand_value(total, dealer) else stand)
    for play, exact in ((lambda stand, hit, *_: (stand + hit) / 2, 0.2806), (lambda stand, *_: stand, 0.3807),
                        (lambda stand, hit, total, *_: hit if total < 12 else stand, 0.4129), (best, 0.4316)):
        assert value_of_blackjack(play) == pytest.approx(exact, abs=5e-5)
    assert value_of_blackjack(experts) == pytest.approx(value_of_blackjack(best), abs=1e-12)
    assert value_of_blackjack(best, lost=-1) == pytest.approx(-0.0466, abs=5e-5)


@pytest.mark.parametrize("task", ["ezpoints", "points24"])
def test_plans_are_read_back_from_the_thoughts(task):
    """What the expert writes is a right plan that it follows, played to +10; a wrong plan is called wrong."""
    game = GAMES[task](**({"solvable_only": True} if task == "points24" else {}))
    for seed in range(30):
        _, info = game.reset(seed=seed)
        ended = False
        while not ended:
            action = game.best_actions(info)[0]
            plan = expert.planned(game.thoughts(info, action))
            assert expert.plan_right(plan, info) and plan[0] == action
            assert not expert.plan_right(plan[:-1], info) and not expert.plan_right(["1", *plan], info)
            _, reward, ended, _, info = game.step(game.legal_actions().index(action))
        assert reward == 10
    assert expert.planned("so the numbers are 1 1 1 1. Now '' then 'nothing'.") == []


def test_plans_are_counted_by_hand():
    """Right while a solution is in reach, and followed where one is named, each as a share of its own decisions."""
    def episode(numbers, target, *steps):                       # step: (plan, action)
        formula, decisions = [], []
        for plan, action in steps:
            info = {"numbers": numbers, "target": target, "formula": list(formula)}
            text = f"Now '{''.join(formula)}' then '{plan}'. I choose {action}."
            decisions.append(Decision(0, info, playing.Choice(action, 0, True, text)))
            formula += [action] if action != "=" else []
        return decisions

    won = episode([2, 10], 12, ("2+10=", "10"), ("+2=", "+"), ("2=", "2"), ("=", "="))      # another one than planned
    assert GAMES["ezpoints"]().statistics(won, won) == {"plan_rate": 1, "plan_followed": 0.75}
    assert decision_statistics(GAMES["ezpoints"](), won, cot=False)["expert_agreement"] == 1     # to begin with 10 is good too
    lost = episode([2, 10], 12, ("2*10=", "2"), ("*10=", "*"), ("10=", "10"), ("=", "="))
    assert GAMES["ezpoints"]().statistics(lost, lost) == {"plan_rate": 0, "plan_followed": 1}    # after "2*" none is in reach
    given_up = episode([2, 10], 12, ("2+10=", "2"), ("+10=", "*"), ("nothing", "="))
    assert GAMES["ezpoints"]().statistics(given_up, given_up) == {"plan_rate": 1, "plan_followed": 0.5}
    brackets = episode([2, 4, 8, 10], 24, ("(10+8)+4+2=", "("), ("10+8)+4+2=", "10"), ("+8)+4+2=", "+"))    # needless
    assert GAMES["points24"]().statistics(brackets, brackets)["plan_followed"] == 1
    never = episode([1, 1, 1, 1], 24, ("nothing", "="))
    assert GAMES["points24"]().statistics(never, never)["plan_rate"] is None


def test_blackjacks_decisions_are_counted_by_total():
    """Hand-worked: hits on 11, 12, 16, 17; who says nothing has no parse rate."""
    played = ((5, "stand"), (11, "hit"), (12, "hit"), (16, "hit"), (16, "stand"), (17, "hit"), (20, "stand"))
    found = decision_statistics(GAMES["blackjack"](), [
        Decision(0, {"total": total, "dealer": "7", "hand": ["5"], "usable_ace": False},
                 playing.Choice(action, 0, True, None)) for total, action in played], cot=True)
    assert found["hit_rate_by_total"] == {"5": 0, "11": 1, "12": 1, "16": 0.5, "17": 1, "20": 0}
    assert found["decisions_by_total"] == {"5": 1, "11": 1, "12": 1, "16": 2, "17": 1, "20": 1}
    assert (found["hit_rate_to_11"], found["hit_rate_12_to_16"], found["hit_rate_from_17"]) == (1/2, 2/3, 1/2)
    assert found["parse_rate"] is None and found["reading_rate"] is None


@pytest.mark.parametrize("name, mode", [
    *itertools.product([f"env:cards/{game.__name__}-v0" for game in GAMES.values()], ["sync", "async"]),
    ("env:alfworld/ALFWorld-v0", "sync")])
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


def test_a_plan_of_any_depth_is_read():
    """A model may write thousands of brackets: no formula, and no RecursionError."""
    deep = ["("] * 3000 + ["1"] + [")"] * 3000
    assert evaluate(deep) is None and evaluate(["("] * 20 + ["7"] + [")"] * 20) == 7
    info = {"numbers": [2, 10], "formula": [], "target": 12}
    assert not expert.plan_right(expert.planned(f"then '{''.join(deep)}='"), info)
