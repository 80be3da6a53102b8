"""Held-out evaluation, and who plays."""

import copy
import itertools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
import players
import rollout as playing
import train
from env import GAMES, make_game
from games.statistics import draws_interval, wilson
from plumbing.errors import ModelError
from plumbing.loading import POCKET
from policy import Policy
from tests.common import make_run, pocket_settings


@pytest.mark.parametrize("task", GAMES)
def test_the_shipped_model_reads_held_out_pictures(shipped, task):
    """Tokenizer and weights belong together: a pocket model that cannot read would still parse at 100 %."""
    agent = Policy(shipped[0], shipped[1], target_modules=())
    player = players.model_player(agent, seed=0, max_new_tokens=90)
    games = {"blackjack": 40, "points24": 12}.get(task, 20)              # some 60 to 200 pictures
    result = evaluation.evaluate(player, task, games, seed=777_000)
    assert result["reading_rate"] >= 0.9 and result["parse_rate"] >= 0.95
    assert result["success"] <= 0.55                                    # it has not been taught to play


def test_held_out_games_are_asked_as_the_run_was(shipped, tmp_path, monkeypatch, capsys):
    """Without chain of thought no prompt wants thoughts, and none are looked for in the answers."""
    run, texts = make_run(shipped, "numberline", cot=False, eval_episodes=2, max_new_tokens=20), []
    encode = run.policy.encode
    monkeypatch.setattr(run.policy, "encode", lambda pictures, said: (texts.extend(said), encode(pictures, said))[1])
    result = train.held_out(run.policy, run.settings, 1, tmp_path / "eval.json")
    assert texts and not any('"thoughts"' in text for text in texts) and result["reading_rate"] is None
    evaluation.main(["--task", "numberline", "--model", "pocket", "--no-cot", "--episodes", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reading_rate"] is None


@pytest.mark.parametrize("text, shown", [("", "''"), (None, "''"), ("<think>well\x1b[2J", "'<think>well\\x1b[2J'")])
def test_a_model_that_says_nothing_gets_no_score_of_its_own(text, shown, capsys):
    """The fallback plays, as a reasoning model's empty answers have it: it is said once, and in the result."""
    def silent(games, pictures, infos, named=()):
        return [playing.Choice(game.legal_actions()[0], 0, number in named, text) for number, game in enumerate(games)]

    result = evaluation.evaluate(silent, "blackjack", 100, 0, num_envs=5)
    said = capsys.readouterr().out
    assert not result["parse_rate"] and result["played_by"].startswith("chance")
    assert said.count("none of the first 10 answers") == 1 and "--max-new-tokens" in said and shown in said
    result = evaluation.evaluate(lambda *asked: silent(*asked, named=(0,)), "blackjack", 100, 0, num_envs=5)
    assert "played_by" not in result and not capsys.readouterr().out


def test_evaluation_agrees_with_exact_values(tmp_path, capsys):
    evaluation.main(["--task", "blackjack", "--policy", "always:stand", "--episodes", "4000"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"task", "policy", "episodes", "seed", "success", "success_low", "success_high", "return_mean", "goal_rate",
            "parse_rate", "expert_agreement", "reading_rate", "hit_rate_by_total"} <= set(result)
    assert result["success"] == pytest.approx(0.3807, abs=0.025) and set(result["hit_rate_by_total"].values()) == {0.0}
    assert result["success_low"] < 0.3807 < result["success_high"]
    assert "played_by" not in result                        # a script names its actions without a word
    random_play = evaluation.evaluate(players.scripted_player("random", "blackjack", 0), "blackjack", 4000, 10_000)
    assert random_play["success"] == pytest.approx(0.2806, abs=0.025)
    assert random_play["return_mean"] == pytest.approx(-0.396, abs=0.05)
    plus = evaluation.evaluate(players.scripted_player("always:+", "numberline", 0), "numberline", 500, 0)
    assert plus["success"] == pytest.approx(0.5, abs=0.07) and plus["goal_rate"] == plus["success"]
    perfect = evaluation.evaluate(players.scripted_player("expert", "numberline", 0), "numberline", 12, 0)
    assert perfect["success"] == perfect["success_high"] == 1       # the formula alone rounds to a little less
    # the same episodes, however many are played side by side
    few, many = (evaluation.evaluate(players.scripted_player("expert", "points24", 0), "points24", 40, 5, envs)
                 for envs in (3, 64))
    assert few == many


def test_a_player_that_hits_below_a_total_wins_what_it_should():
    """below:12 can never bust: it wins 41.29 % of all games, by dynamic programming over the infinite deck."""
    result = evaluation.evaluate(players.scripted_player("below:12", "blackjack", 0), "blackjack", 4000, 10_000)
    assert result["success"] == pytest.approx(0.4129, abs=0.025)
    assert result["success_low"] < 0.4129 < result["success_high"]
    hits = {int(total): share for total, share in result["hit_rate_by_total"].items()}
    assert {11, 12, 21} <= set(hits) and all(share == (total < 12) for total, share in hits.items())
    for name, task in (("below:12", "numberline"), ("below:", "blackjack"), ("below:x", "blackjack")):
        with pytest.raises(ValueError, match="no policy"):
            players.scripted_player(name, task, 0)


def test_the_likeliest_answer_hangs_on_no_seed(shipped):
    policy = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2, temperature=1.0)
    games = [GAMES["points24"]() for _ in range(6)]
    states = [game.reset(seed=k) for k, game in enumerate(games)]
    options = SimpleNamespace(policy=None, endpoint=None, pictures="own")
    settings = pocket_settings("points24", max_new_tokens=60)
    for greedy in (True, False):
        options.greedy, answers = greedy, []
        for options.seed in (0, 1):
            player = evaluation.make_player(options, policy, settings, {})
            answers.append([choice.text for choice in player(games, *zip(*states))])
        assert (answers[0] == answers[1]) == greedy


@pytest.mark.parametrize("arguments, message", [
    (["--policy", "always:fly"], "no legal action"), (["--policy", "clever"], "use random, expert or always"),
    (["--policy", "random:"], "use random, expert or always"),
    (["--run", "nowhere"], "no checkpoint"), (["--policy", "random", "--episodes", "0"], "1 or more"),
    (["--policy", "random", "--greedy"], "draw no tokens"),
    (["--policy", "random", "--temperature", "0.1"], "draw no tokens"),
    (["--policy", "random", "--max-new-tokens", "5"], "draw no tokens"),
    (["--model", "pocket", "--greedy", "--temperature", "0.1"], "no --temperature"),
    (["--model", "pocket", "--endpoint", ""], "--endpoint is empty"), (["--model", "pocket", "--out", ""], "empty"),
    (["--policy", "random", "--out", "x.html", "--render", "x.html"], "two files"),
    (["--policy", "random", "--episodes", "1" + 14 * "0"], "below 2³¹"),
    (["--policy", "random", "--episodes", "all"], "deals of Blackjack have no end"),
    (["--policy", "random", "--episodes", "all", "--draws", "1"], "--draws must be 2 to 1000"),
    (["--policy", "random", "--pictures", "black"], "--pictures is for a model"),
    (["--policy", "random", "--seed", "2147483647", "--episodes", "2"], "training deals begin there"),
    (["--model", str(POCKET.with_name("pocket-alfworld"))], "words of other games"),
    (["--policy", "random", "--endpoint", "http://localhost:1/v1"], "needs --model NAME")])
def test_evaluation_says_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit, match=message):
        evaluation.main(["--task", "blackjack", *arguments])


def test_all_games_are_one_table_and_one_json(tmp_path, capsys):
    """Each game's result is what it is alone; the average is of the four card games; what has no sense is refused."""
    arguments = ["--policy", "random", "--episodes", "4", "--num-envs", "4000"]         # more than a run's steps
    evaluation.main(["--task", "all", *arguments, "--out", str(tmp_path / "all.json")])
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found["tasks"]) - {"alfworld"} == set(GAMES)
    assert found["average"] == pytest.approx(sum(found["tasks"][task]["success"] for task in GAMES) / 4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    for task in ("numberline", "blackjack"):
        evaluation.main(["--task", task, *arguments])
        printed = capsys.readouterr().out
        assert json.loads(printed.splitlines()[-1]) == {"policy": "random", **found["tasks"][task]}
    for bad in (["--policy", "always:="], ["--policy", "heuristic"], ["--model", "pocket", "--render", "game.html"],
                ["--policy", "random", "--game", "max_position=5"], ["--policy", "random", "--episodes", "all"]):
        with pytest.raises(SystemExit, match="--task all takes"):
            evaluation.main(["--task", "all", *bad])


def test_of_all_games_those_that_were_played_stay(tmp_path, monkeypatch):
    """The third fails: the first two are in --out, as they are alone."""
    plain = evaluation.play_task

    def failing(options, policy, name, settings, given):
        if settings.task == "points24":
            raise ModelError("nobody answers")
        return plain(options, policy, name, settings, given)

    monkeypatch.setattr(evaluation, "play_task", failing)
    with pytest.raises(SystemExit, match="nobody answers"):
        evaluation.main(["--task", "all", "--policy", "random", "--episodes", "4", "--out", str(tmp_path / "all.json")])
    kept = json.loads((tmp_path / "all.json").read_text())
    assert list(kept["tasks"]) == ["numberline", "ezpoints"] and kept["tasks"]["ezpoints"]["episodes"] == 4


@pytest.mark.parametrize("chosen", [None, 0.25])
def test_all_games_are_played_at_the_temperature_that_each_starts_with(monkeypatch, chosen):
    played, result = {}, {"success": 0, "success_low": 0, "success_high": 0, "parse_rate": None, "reading_rate": None}
    monkeypatch.setattr(evaluation, "play_task", lambda options, policy, name, settings, given: (
        played.update({settings.task: policy.temperature}), result | {"policy": name})[1])
    evaluation.main(["--task", "all", "--model", "pocket", *(["--temperature", str(chosen)] if chosen else [])])
    assert played == {task: chosen or pocket_settings(task).temperature for task in played}
    assert set(played) - {"alfworld"} == set(GAMES)


def test_all_games_are_the_default_ones_whatever_the_run_learned_on(monkeypatch):
    """A run on a longer NumberLine: the default NumberLine is one of the four, and no other game has its option."""
    policy, played = SimpleNamespace(temperature=0.5), {}
    learned = replace(pocket_settings("numberline"), game=("max_position=9",))
    result = {"success": 0, "success_low": 0, "success_high": 0, "parse_rate": None, "reading_rate": None}
    monkeypatch.setattr(evaluation, "open_run", lambda run, device: (policy, learned))
    monkeypatch.setattr(evaluation, "play_task", lambda options, policy, name, settings, given: (
        played.update({settings.task: settings.game}), result)[1])
    evaluation.main(["--task", "all", "--run", "run"])
    assert set(GAMES) <= set(played) and {*played.values()} == {()}


@pytest.mark.parametrize("task, count", [("numberline", 30), ("ezpoints", 304), ("points24", 715)])
def test_all_deals_are_those_that_come(task, count):
    """By counting: each deal's share is what 52 cards a place, or the seeds, give it."""
    game = make_game(task)
    game.reset(seed=0)
    deals = game.all_deals()
    assert len(deals) == count and sum(share for share, _ in deals) == pytest.approx(1)
    numbers = lambda deal: tuple(sorted(min(card // 4 + 1, 10) for card in deal["cards"]))
    if task == "points24":
        shares = Counter()
        for values in itertools.product(range(1, 11), repeat=4):
            shares[tuple(sorted(values))] += np.prod([16 if value == 10 else 4 for value in values]) / 52**4
        assert {numbers(deal): share for share, deal in deals} == pytest.approx(shares)
        assert [deal for _, deal in game.all_deals()] != [deal for _, deal in deals]        # other cards each time
    else:
        assert {share for share, _ in deals} == {1 / count}
        known = {str(deal) for _, deal in deals}
        assert len(known) == count
        for seed in range(500):
            game.reset(seed=seed)
            assert str({name: getattr(game, name) for name in deals[0][1]}) in known
    picture, info = game.reset(seed=1, options={"deal": deals[7][1]})
    other, _ = make_game(task).reset(seed=2, options={"deal": deals[7][1]})
    assert np.array_equal(picture, other) and all(getattr(game, name) == value for name, value in deals[7][1].items())
    twin = make_game(task)
    twin.set_state(json.loads(json.dumps(game.get_state())))


def test_success_over_every_deal_is_exact_but_for_the_draws():
    expert = evaluation.evaluate(players.scripted_player("expert", "points24", 0), "points24", "all", 0, draws=2)
    assert expert["success"] == pytest.approx(0.73093, abs=5e-6)            # 52 cards a place: 73.09 % have a solution
    assert 0.725 < expert["success_low"] < expert["success"] < expert["success_high"] < 0.735
    assert expert["episodes"] == 2 * 715 and expert["draws_of_every_deal"] == 2
    random = evaluation.evaluate(players.scripted_player("random", "numberline", 0), "numberline", "all", 0, draws=40)
    assert random["success_low"] < 0.269 < random["success_high"]           # exactly 26.9 %
    constant = evaluation.evaluate(players.scripted_player("always:-", "numberline", 0), "numberline", "all", 0, draws=2)
    assert constant["success_low"] < constant["success"] == 0.5 < constant["success_high"]


@pytest.mark.parametrize("draws", [2, 4, 20])
def test_the_interval_of_draws_covers(draws):
    """Of deals with known chances it holds the true share in some 95 of 100 evaluations, nearly certain deals too."""
    generator = np.random.default_rng(0)
    spread = generator.random(40) ** 3, generator.dirichlet(np.ones(40))
    nearly = np.r_[[0.99] * 25, [0.02] * 5], np.full(30, 1 / 30)
    for (chances, shares), worst in ((spread, 0.89 if draws == 2 else 0.92), (nearly, 0.94)):
        bounds = [draws_interval((generator.random((draws, len(chances))) < chances).astype(float), shares)
                  for _ in range(600)]
        assert np.mean([low <= shares @ chances <= high for low, high in bounds]) >= worst
        assert all(0 <= low < high <= 1 for low, high in bounds)
    assert draws_interval(np.ones((4, 25)), np.full(25, 1 / 25)) == pytest.approx(wilson(100, 100))


def test_does_it_look(shipped, monkeypatch):
    """What a model is shown instead: nothing, or another deal; the games themselves go on as they are."""
    settings, seen = pocket_settings("numberline"), []
    player = lambda games, pictures, infos: seen.append((pictures, infos)) or "choices"
    game = GAMES["numberline"]()
    picture, info = game.reset(seed=0)
    for shown in players.PICTURES:
        assert players.shown_otherwise(player, shown, settings, 0)([game, game], [picture, picture], [info] * 2) == "choices"
    (own, _), (black, _), (another, infos) = seen
    assert own[0] is picture and not np.any(black) and black[0].shape == picture.shape
    assert not np.array_equal(another[0], another[1]) and infos == [info, info]


def test_blackjack_is_told_beside_players_on_the_same_deals(capsys):
    evaluation.main(["--task", "blackjack", "--model", "pocket", "--episodes", "64"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["same_deals"]) == ["always:stand", "below:12", "below:14", "expert"]
    for name, success in result["same_deals"].items():
        alone = evaluation.evaluate(players.scripted_player(name, "blackjack", 0), "blackjack", 64, 10_000)
        assert alone["success"] == success


def test_rates_of_decisions_have_the_deals_weights_too():
    """Of deals with shares ½, ¼, ¼, two draws each: as often as they come. Alike in weight, all are taken once."""
    decisions = [SimpleNamespace(episode=episode, step=step) for step in range(2) for episode in range(8)]
    weighted = evaluation.by_weight(decisions, np.array([0.5, 0.25, 0.25, 0] * 2))
    assert Counter(one.episode % 4 for one in weighted) == {0: 8, 1: 4, 2: 4}
    assert len({id(one) for one in weighted if one.episode % 4 == 1}) == 4          # both draws, both steps
    alike = evaluation.by_weight(decisions, np.full(8, 1 / 304))
    assert Counter(map(id, alike)) == Counter(map(id, decisions))
