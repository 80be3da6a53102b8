"""Games from outside: a class in a file, an environment of Gymnasium's, and what is said of bad ones."""

import ast
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import env
import eval as evaluation
import parse
import players
import sft
import train
from env import GAMES, TASKS, check_game, find_game, make_game
from extras import viewer
from games import outside, statistics
from games.game import SIZE, Game, GameError
from games.statistics import Decision
from lab import pocket
from plumbing import card, loading, manifest
from plumbing.flags import read_settings
from plumbing.settings import Settings, resolve
from tests.common import HERE, run_metrics

GRID = "examples/gridworld.py:GridWorld"
WORDS = "examples/own_words.py:OwnWords"
LAKE = "examples/frozenlake.py:FrozenLake"
FROZEN = ["--task", "gymnasium:FrozenLake-v1", "--actions", "left,down,right,up"]
QUOTE = '"'
MINI = "minigrid:MiniGrid-Empty-5x5-v0"
# environment: (its actions, further options, the pictures' own form)
WRAPPED = {
    "FrozenLake-v1": ("left,down,right,up", {"is_slippery": True, "success_return": 1}, (256, 256)),
    "Taxi-v4": ("south,north,east,west,pickup,dropoff", {}, (456, 536)),
    "CliffWalking-v1": ("up,right,down,left", {"max_episode_steps": 30}, (256, 768)),
    "CartPole-v1": ("left,right", {}, (400, 600)),
    MINI: ("left,right,forward,pickup,drop,toggle,done", {"success_return": 0.01}, (160, 160)),
}


def needs_pygame():
    pytest.importorskip("pygame", reason="pip install -r extras/requirements-gymnasium.txt")


def wrapped_game(name):
    needs_pygame()
    if name == MINI:
        pytest.importorskip("minigrid", reason="pip install -r extras/requirements-gymnasium.txt")
    actions, options, _ = WRAPPED[name]
    return find_game(f"gymnasium:{name}"), {"actions": actions, **options}


# ---- a class in a file -------------------------------------------------------------------------------------------------
GOOD = """
import numpy as np
from games.game import Game

PICTURE = np.zeros((300, 300, 3), np.uint8)

class Coin(Game):
    description = "Call the coin, which lies as the brightness says."
    actions = ("heads", "tails")
    max_steps = 3
    def deal(self):
        self.side = int(self.np_random.integers(2))
    def play(self, action):
        won = action == self.actions[self.side]
        self.side = int(self.np_random.integers(2))
        return float(won), False
    def draw(self):
        return np.full((300, 300, 3), 255 * self.side, np.uint8)
"""


@pytest.fixture
def coin(tmp_path):
    """--task of the shortest game there can be, in a folder that is no package."""
    (tmp_path / "coin.py").write_text(GOOD)
    return f"{tmp_path / 'coin.py'}:Coin"


def test_five_things_are_a_game(coin):
    """All else is there: a limit, success, state, info; and no demonstrations, so their metrics are None."""
    check_game(coin)
    found = evaluation.evaluate(players.scripted_player("random", coin, 0), coin, 40, 0)
    assert found["steps"] == 120 and 0.7 < found["success"] <= 1 and found["expert_agreement"] is None
    game = make_game(coin)
    _, info = game.reset(seed=3)
    assert game.fields == ("side",) and info == {"side": game.side, "is_success": False}
    twin = make_game(coin)                                              # which has never been reset
    with pytest.raises(ValueError, match="expected a dict with the keys"):
        twin.set_state({})
    with pytest.raises(RuntimeError, match="call reset"):
        twin.step(0)
    twin.set_state(json.loads(json.dumps(game.get_state())))
    assert [game.step(0)[1:] for _ in range(3)] == [twin.step(0)[1:] for _ in range(3)]
    with pytest.raises(ValueError, match="expected a dict with the keys"):
        twin.set_state(game.get_state() | {"other": 1})
    answered = SimpleNamespace(text="x", named=True, action="heads")
    statistics = evaluation.decision_statistics(game, [evaluation.Decision(0, info, answered)], cot=True)
    assert statistics == {"parse_rate": 1.0, "expert_agreement": None, "reading_rate": None}


BAD = {
    "import nothing_of_that_name\n": "coin.py does not import: line 1: ModuleNotFoundError",
    "def f(:\n": "does not import.*SyntaxError",
    "raise SystemError('oh')\n": "line 1: SystemError: oh",
    "import sys; sys.exit('bye')\n": "line 1: SystemExit: bye",
    "class Coin: pass\n": "coin.py has no game 'Coin': a class with the parent games.game.Game",
    ("(Game):", "(Game):\n    def __init__(self, size, render_mode=None):\n        super().__init__()\n"):
        "cannot be played.*missing 1 required positional argument: 'size'",
    ("    actions = (", "    acts = ("): "action 0 is not an index into the legal actions ..",
    ('("heads", "tails")', '"heads"'): "its actions are 'heads': a tuple of texts",
    ('("heads", "tails")', '("heads", "Heads")'): "named twice .*: heads, Heads",
    ('("heads", "tails")', '("heads", "back side")'): "name the action 'back side'.*separator = ",
    ('("heads", "tails")', '("heads", "zäh")'): "no answer can name the action 'zäh'",
    ('("heads", "tails")', '("heads", "")'): "no answer can name the action ''",
    ("    description = ", "    title = "): "its description is no text",
    ("max_steps = 3", "max_steps = float('inf')"): "max_steps is inf: an episode needs a limit",
    ("float(won), False", "float('nan'), False"): "a reward is nan",
    ("float(won), False", "float(won)"): r"play must return .reward, whether it has ended., not [01].0",
    ("float(won), False", "float(won), False, {}"): r"play must return .reward.*, not \(",
    ("    def draw(self):", "    def draws(self):"): r"Coin does not say how it is drawn: def draw.self.",
    ("np.full((300, 300, 3), 255 * self.side, np.uint8)", "PICTURE"): "share an object",
    ("    def draw(self):\n", "    def draw(self):\n        self.seen = getattr(self, 'seen', 0) + 1\n"
     "        return np.full((300, 300, 3), self.seen, np.uint8)\n"): "does not come back by set_state",
    ("    max_steps = 3", "    def info(self): return {'odd': float('nan')}"): "its info is not plain JSON in odd",
    ("    max_steps = 3", "    max_steps = 0"): "max_steps is 0",
    ("    max_steps = 3", "    def thoughts(self, info, action): return 'a' + chr(10)"): "it reads or thinks 'a",
    ("    max_steps = 3", "    def reading(self, info): return chr(92)"): "it reads or thinks",
    ("    max_steps = 3", "    def state_text(self, info): return None"): "state_text must return a text",

    ("np.uint8", "float"): r"must return an array of uint8 \(300, 300, 3\), not of .dtype.'float64'",
    ("(300, 300, 3)", "(64, 64, 3)"): r"not of .dtype.'uint8'., \(64, 64, 3\)",
    ("np.full((300, 300, 3), 255 * self.side, np.uint8)", "None"): "not of .<class 'NoneType'>",
    ("self.side = int(self.np_random.integers(2))\n    def", "self.side = self.np_random.integers(2)\n    def"):
        "its info is not plain JSON in side",
    ("        self.side = int(self.np_random.integers(2))\n    def",
     "        self.side, self.seen = 0, (1, 2)\n    def"): r"its info is not plain JSON in seen \(\(1, 2\)\).*no tuples",
    ("float(won), False", "np.random.default_rng().random(), False"): "is not repeatable",
    ("    max_steps = 3", "    episodes, max_steps = 0, 30\n    def reset(self, **given):\n        self.episodes += 1\n"
     "        return super().reset(**given)\n    def state_text(self, info): return ''\n"
     "    def info(self): return {'odd': self.episodes}"): "does not come back by set_state",
    ("    max_steps = 3", "    def best_actions(self, info): return {'heads'}"): "best_actions says {'heads'}",
    ("    max_steps = 3", "    def thoughts(self, info, action): return {'heads': 'x', 'tails': '\"'}[action]"):
        "it reads or thinks '\"'",
    ("    max_steps = 3", "    fields = ()\n    max_steps = 300"): "does not come back by set_state",
    ("    max_steps = 3", "    def best_actions(self, info): return ['edge']"): "best_actions says .'edge'.",
    ("    max_steps = 3", "    def reading(self, info): return 'say \"a\"'"): "it reads or thinks .* without quotes",
    ("    max_steps = 3", "    def thoughts(self, info, action): return info['nothing']"): "played: line 10: KeyError: 'nothing'",
}


@pytest.mark.parametrize("change", BAD, ids=[message[:40] for message in BAD.values()])
def test_what_is_wrong_with_a_game_is_said_before_anything_is_loaded(change, tmp_path, monkeypatch):
    source = change if isinstance(change, str) else GOOD.replace(*change)
    assert source != GOOD
    (tmp_path / "coin.py").write_text(source)
    monkeypatch.setattr(loading, "open_model", lambda *_: pytest.fail("a model was loaded"))
    task = ["--task", f"{tmp_path / 'coin.py'}:Coin"]
    for command in (lambda: evaluation.main([*task, "--policy", "random"]),
                    lambda: train.main([*task, "--model", "pocket", "--out", str(tmp_path / "run")])):
        with pytest.raises(SystemExit, match=BAD[change]) as stop:
            command()
        assert "\n" not in str(stop.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command, message", [
    (lambda task: evaluation.main(["--task", task, "--policy", "expert"]), "it has no best_actions, which .*--policy expert"),
    (lambda task: sft.main(["--task", task, "--model", str(loading.POCKET), "--out", "new"]), "no best_actions and no th"),
    (lambda task: pocket.main(["--task", task, "--out", "new"]), "no best_actions and no reading and no thoughts"),
    (lambda task: train.main(["--task", task, "--sft-steps", "3", "--model", str(loading.POCKET)]), "no best_actions"),
    (lambda task: train.main(["--task", task, "--device", "cpu"]), "no pocket model reads .*python -m lab.pocket"),
    (lambda task: train.main(["--task", task, "--game", "size=7"]), "'size=7' sets no option of Coin: .* options are render_mode"),
    (lambda task: evaluation.main(["--task", "numberline", "--game", "max_position=x", "--policy", "random"]),
     "'x' is not of the kind of max_position's default, 5"),
    (lambda task: evaluation.main(["--task", "numberline", "--game", "max_position=100", "--policy", "random"]),
     "max_position must be 1 to 99"),
    (lambda task: evaluation.main(["--task", "points24", "--game", "solvable_only=yes", "--policy", "random"]),
     "'yes' is not of the kind of solvable_only's default, false"),
    (lambda task: evaluation.main(["--task", "points24", "--game", "face_cards_as_10=13", "--policy", "random"]),
     "'13' is not of the kind of face_cards_as_10's default, true"),
    (lambda task: train.main(["--task", "nowhere.py:Game"]), "there is no task 'nowhere.py:Game'"),
    (lambda task: train.main(["--task", "a:b"]), "there is no task 'a:b': a game in a file is PATH/my_game.py:CLASS")])
def test_what_is_missing_is_said_before_anything_is_loaded(command, message, coin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "open_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match=message):
        command(coin)
    assert not [file for file in tmp_path.glob("new/*") if file.name != "run.lock"]


# ---- its run -----------------------------------------------------------------------------------------------------------
def test_a_run_on_ones_own_game_goes_on_bit_for_bit_and_knows_its_file(coin, tiny, tmp_path, monkeypatch, capsys):
    save = train.save

    def kept(run, folder):
        save(run, folder)
        if run.update == 1:                                             # what a kill would leave now
            shutil.copytree(folder, tmp_path / "run")

    command = ["--task", coin, "--model", str(tiny), "--sft-steps", "0", "--rank", "2", "--num-envs", "2", "--num-steps",
               "4", "--total-timesteps", "16", "--max-new-tokens", "4", "--minibatch-size", "8", "--eval-episodes", "2"]
    with monkeypatch.context() as watched:
        watched.setattr(train, "save", kept)
        train.main([*command, "--out", str(tmp_path / "alone")])
    resumed = ["--out", str(tmp_path / "run"), "--resume"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    train.main(resumed)
    for name in ("metrics.jsonl", "transcripts.jsonl", "eval.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert run_metrics(tmp_path / "run")[-1]["reading_rate"] is None
    said = json.loads((tmp_path / "run" / "checkpoint-000002" / "manifest.json").read_text())["versions"]["game"]
    file = tmp_path / "coin.py"
    assert len(said) == 12 and (tmp_path / "run" / "curve.png").exists()
    capsys.readouterr()
    manifest._game_hash.cache_clear()                                   # as in another process
    file.write_text(file.read_text() + "\n# another file now\n")
    train.main(["--out", str(tmp_path / "again"), "--resume"])
    assert f"game {said} → " in capsys.readouterr().err
    written = (tmp_path / "run" / "checkpoint-000002" / "README.md").read_text()
    assert f"--task {coin}" in written


def test_a_game_without_success_tells_its_return(coin, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(find_game(coin), "is_success", lambda self: None)
    train.main(["--task", coin, "--model", str(tiny), "--sft-steps", "0", "--rank", "2", "--num-envs", "2", "--num-steps",
                "4", "--total-timesteps", "8", "--max-new-tokens", "4", "--minibatch-size", "8", "--eval-episodes", "2",
                "--out", str(tmp_path / "run")])
    assert "start: return " in capsys.readouterr().out and (tmp_path / "run" / "curve.png").exists()
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["success"] is result["success_low"] is None and result["return_mean"] >= 0
    assert run_metrics(tmp_path / "run")[0]["success"] is None
    page = viewer.Page(coin, 0, False, [(None, "random", Settings(task=coin))])
    evaluation.evaluate(players.scripted_player("random", coin, 0), coin, 1, 0, watch=page)
    [side] = page.data()["sides"]
    assert side["end"]["success"] is None and [step["expert"] for step in side["steps"]] == [None] * 3


def test_at_an_episodes_end_nobody_asks_for_the_best_action(tmp_path):
    advice = ("    max_steps = 3\n    def info(self): return {'step': self.steps}\n"
              "    def best_actions(self, info): return ['tails', 'heads'][info['step']:][:1]")
    (tmp_path / "coin.py").write_text(GOOD.replace("    max_steps = 3", advice))
    task = f"{tmp_path / 'coin.py'}:Coin"
    assert "best_actions" in (tmp_path / "coin.py").read_text()
    with pytest.raises(GameError, match="best_actions says ..: a list of some of heads, tails"):
        check_game(task)                                                # its second step has none
    (tmp_path / "coin2.py").write_text((tmp_path / "coin.py").read_text().replace("max_steps = 3", "max_steps = 2"))
    check_game(f"{tmp_path / 'coin2.py'}:Coin")


def test_a_games_file_imports_its_neighbours_and_keeps_what_is_no_state(tmp_path):
    (tmp_path / "neighbour_of_coin.py").write_text("SIDES = ('heads', 'tails')\n")
    source = GOOD.replace("import numpy", "import neighbour_of_coin\nimport numpy").replace(
        '("heads", "tails")', "neighbour_of_coin.SIDES").replace(
        "        self.side = int(self.np_random.integers(2))\n    def play", "        self._seen = np.zeros(2)\n"
        "        self.side = int(self.np_random.integers(2))\n    def play")
    assert "_seen" in source
    (tmp_path / "coin.py").write_text(source)
    check_game(f"{tmp_path / 'coin.py'}:Coin")


def test_a_game_whose_legal_actions_change_is_tried_with_legal_ones(tmp_path):
    """Four actions in all, of which few are legal at a time: Gymnasium's checker would draw one of all."""
    source = GOOD.replace('("heads", "tails")', '("heads", "tails", "edge", "none")').replace(
        "    max_steps = 3", "    def legal_actions(self): return self.actions[self.side:self.side + 1]")
    (tmp_path / "coin.py").write_text(source.replace("    def play", "    max_steps = 5\n    def play"))
    for _ in range(5):
        check_game(f"{tmp_path / 'coin.py'}:Coin")


def test_options_are_of_the_kind_of_their_defaults():
    class Maze(Game):
        def __init__(self, name="a", share=0.5, count=3, walls=True, render_mode=None):
            ...

    read = lambda *texts: outside.read_options(Maze, texts)
    assert read("name=7", "share=1", "count=0", "walls=False") == {"name": "7", "share": 1, "count": 0, "walls": False}
    for wrong in ("share=x", "count=0.5", "count=true", "walls=0.5", "walls=no", "count", "wall=1"):
        with pytest.raises(GameError, match=f"^{wrong!r}"):
            read(wrong)
    given = outside.read_options(find_game("gymnasium:FrozenLake-v1"), ("is_slippery=False", "desc=[\"SG\"]", "map_name=4x4"))
    assert given == {"is_slippery": False, "desc": ["SG"], "map_name": "4x4"}


def test_a_games_file_is_one_game_by_whatever_path(coin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_game("coin.py:Coin") is find_game("./coin.py:Coin") is find_game(coin)


def test_options_reach_the_game_and_the_runs_name_is_a_files(coin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, _ = read_settings(Settings, "", ["--task", coin, "--model", str(loading.POCKET)])
    assert settings.out == "runs/coin-seed1" and settings.game == () and settings.reward_scale == 1
    settings = resolve(Settings, {"task": "numberline", "game": ("max_position=9",)})
    assert settings.game_options == {"max_position": 9} and make_game("numberline", **settings.game_options).max_steps == 18
    card.write_card(tmp_path, "train.py", settings, "pocket", "x")
    assert "--game max_position=9" in (tmp_path / "README.md").read_text()
    with pytest.raises(GameError, match="options are max_position"):
        resolve(Settings, {"task": "numberline", "game": ("max_postion=9",)})


# ---- the two examples --------------------------------------------------------------------------------------------------
def test_the_grid_is_drawn_read_and_solved():
    """The reading against the picture's own pixels, the expert against every way there is."""
    game = make_game(GRID, size=4, walls=3)
    check_game(GRID, ("size=4", "walls=3"), ("best_actions", "reading", "thoughts"))
    colors = {(0, 255, 0): "goal", (0, 0, 255): "agent", (0, 0, 0): "walls"}
    for seed in range(40):
        picture, info = game.reset(seed=seed)
        seen = {"walls": []}
        for row, column in itertools.product(range(4), range(4)):
            what = colors.get(tuple(int(value) for value in picture[75 * row + 37, 75 * column + 37]))
            if what == "walls":
                seen["walls"].append([row, column])
            elif what:
                seen[what] = [row, column]
        assert seen == {name: sorted(info[name]) if name == "walls" else info[name] for name in seen}
        numbers = [int(text) for text in game.reading(info).replace(",", " ").replace(".", " ").split() if text.isdigit()]
        assert numbers == [*seen["agent"], *seen["goal"], *itertools.chain(*seen["walls"])]
        # the number of steps to the goal, by powers of the matrix of neighbours
        near = np.array([[abs(a - c) + abs(b - d) <= 1 and [c, d] not in seen["walls"] for c in range(4) for d in range(4)]
                         for a in range(4) for b in range(4)], float)
        start, goal = (4 * row + column for row, column in (seen["agent"], seen["goal"]))
        shortest = next(n for n in range(1, 16) if np.linalg.matrix_power(near, n)[start, goal] > 0)
        way = game.thoughts(info, "up").split("The way: ")[1].split(". I")[0].split(", ")
        assert len(way) == shortest
        for k, move in enumerate(way):
            assert move in game.best_actions(game.observe()[1])
            *_, ended, _, info = game.step(game.actions.index(move))
            assert ended == (k == len(way) - 1)
    with pytest.raises(GameError, match="not 30 and 4"):
        make_game(GRID, size=30)
    assert sum(len(file.read_text().splitlines()) for file in (HERE / "examples").glob("gridworld.py")) <= 100


def test_the_frozen_lakes_policy_is_the_exact_one():
    """Against a linear system: the probability that its best moves arrive at all is the known 14/17."""
    needs_pygame()
    game = make_game(LAKE)
    check_game(LAKE, (), ("best_actions", "reading", "thoughts"))
    P, moves = game.env.unwrapped.P, [int(game.Q[state].argmax()) for state in range(16)]
    A, b = np.eye(16), np.zeros(16)
    for state in range(16):
        for p, after, reward, ends in P[state][moves[state]]:
            A[state, after] -= p * (not ends)
            b[state] += p * reward
    assert np.linalg.solve(A, b)[0] == pytest.approx(14 / 17, abs=1e-9)
    dry = evaluation.evaluate(players.scripted_player("expert", LAKE, 0), LAKE, 2, 0, game_options={"is_slippery": False})
    assert dry["success"] == 1 and dry["steps"] == 12
    assert game.reading({"place": 6}) == "I am in row 1, column 2; left a hole, down ice, right a hole, up ice."


PAGE = (HERE / "YOUR_OWN_GAME.md").read_text()


def test_own_words_are_true_and_told_by_what_they_say():
    """Sixteen wordings of each state, none of which names the choice; another state's numbers are no reading of it."""
    game = make_game(WORDS)
    states = [{"target": target, "current": current} for target in range(6) for current in range(6) if target != current]
    told = lambda info, text: game.statistics([], [Decision(0, info, SimpleNamespace(text=text))])["compare_rate"]
    for info in states:
        said = {game.thoughts(info, "+") for _ in range(200)}
        assert len(said) == 16 and not any("choose" in text or "+" in text for text in said)
        for text in said:
            assert [other for other in states if game.reads(other, text)] == [info], text
            mirrored = {"target": info["current"], "current": info["target"]}
            rates = [told(info, text), told(mirrored, text), told(info, f"{text} The target is greater. The target is smaller.")]
            assert rates == [1, 0, 0], text
    info = {"target": 3, "current": 2}
    for false in ("As 2 is more than 3, I have to go up.", "As 3 is more than 2, I have to go down.",
                  "So I am still 4 too low.", "As 5 is more than 1, I have to go up.", "That is 2 above me.", "Well."):
        assert told(info, false) == 0, false
    assert game.reads(info, "My target number is 3 and my current number is 2.")
    assert make_game("numberline").reads(states[0], "Well. " + make_game("numberline").reading(states[0]))
    assert not game.reads(states[0], "") and statistics.reads_right(Game(), [("", {})]) == []
    one, other = (sft.demonstrations(WORDS, 0, 1.0) for _ in range(2))
    assert [next(one).answer for _ in range(9)] == [next(other).answer for _ in range(9)]


def test_the_pages_game_is_a_game(tmp_path):
    (tmp_path / "coin.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    task = f"{tmp_path / 'coin.py'}:Coin"
    check_game(task)
    game = make_game(task)
    picture, info = game.reset(seed=1)
    assert game.step(bool(picture.any()) + 0)[1] == 1 and len(PAGE.splitlines()) <= 80


def test_the_pages_commands_run(tmp_path, monkeypatch, capsys):
    """Each of them as it stands, but for shorter lessons, fewer steps, shorter answers."""
    needs_pygame()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(HERE / "examples")
    monkeypatch.setattr(pocket, "OWN_STEPS", (1, 1, 1))
    short = {"eval.py": ["--episodes", "1"], "-m lab.pocket": [], "train.py": [
        "--total-timesteps", "8", "--num-envs", "2", "--num-steps", "4", "--eval-episodes", "1", "--max-new-tokens", "5",
        "--minibatch-size", "8"]}
    scripts = {"eval.py": evaluation.main, "-m lab.pocket": pocket.main, "train.py": train.main}
    commands = re.findall(r"^python (\S+\.py|-m \S+) (.*)$", PAGE, re.M)
    assert {script for script, _ in commands} == {*scripts}
    for script, words in commands:
        more = [*short[script], *(["--max-new-tokens", "5"] if "--beside" in words else [])]
        scripts[script]([*shlex.split(words), *more])
    written = (tmp_path / "runs" / "before-after.html").read_text()
    assert "runs/gridworld-seed1" in written and (tmp_path / "runs" / "game.html").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["policy"] == "random"


# ---- Gymnasium's -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WRAPPED)
def test_environments_of_gymnasium_are_games(name):
    """Drawn whole in a square, repeatable, resumed by replay; success only where it is said what it is."""
    own, options = wrapped_game(name)
    check_game(f"gymnasium:{name}", [f"{key}={json.dumps(value).strip(QUOTE)}" for key, value in options.items()])
    game, twin = own(**options), own(**options)
    picture, info = game.reset(seed=5)
    height, width = WRAPPED[name][2]
    assert picture.shape == (SIZE, SIZE, 3) and game.env.render().shape == (height, width, 3)
    edge = (SIZE - round(SIZE * height / width)) // 2
    assert not picture[:edge].any() and picture[edge + 2:SIZE - edge - 2].any()         # black above and below
    rng, state = np.random.default_rng(1), None
    for step in range(40):
        if game.over:
            game.reset()
        if step == 20:
            state = json.loads(json.dumps(game.get_state()))
            twin.set_state(state)
            assert np.array_equal(twin.observe()[0], game.observe()[0]) and twin.get_state() == state
        action = int(rng.integers(len(game.actions)))
        found = game.step(action)
        if state:
            if twin.over:
                twin.reset()
            same = twin.step(action)
            assert np.array_equal(found[0], same[0]) and found[1:] == same[1:]
        assert found[4]["is_success"] in ((None,) if "success_return" not in options else (True, False))
    before, shown = game.get_state(), game.observe()[0]
    twin.set_state(before)
    for wrong in ({"played": [99] * before["steps"]}, {"seed": -1}, {"episode_return": 1e5}, {"played": None}):
        with pytest.raises(ValueError):
            game.set_state(before | wrong)
        assert game.get_state() == before and np.array_equal(game.observe()[0], shown)
    if not game.over:                                                   # and it goes on as if nothing had been tried
        assert game.step(0)[1:] == twin.step(0)[1:] and np.array_equal(game.render(), twin.render())


def test_truncation_is_gymnasiums_own():
    own, options = wrapped_game("CliffWalking-v1")
    game = own(**options)
    game.reset(seed=0)
    ended = [game.step(0)[2:4] for _ in range(30)]
    assert ended == [(False, False)] * 29 + [(False, True)] and game.max_steps == 30
    own, options = wrapped_game(MINI)                                   # whose environment has a limit of its own, 100
    game = own(**options, max_episode_steps=7)
    game.reset(seed=0)
    assert [game.step(0)[3] for _ in range(7)] == [False] * 6 + [True] and game.max_steps == 7
    assert own(**options).max_steps == 100


class Unrepeatable(env.gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    action_space, observation_space = env.gymnasium.spaces.Discrete(2), env.gymnasium.spaces.Discrete(10**6)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return int(np.random.default_rng().integers(10**6)), {}

    def step(self, action):
        return int(np.random.default_rng().integers(10**6)), 0.0, False, False, {}

    def render(self):
        return np.zeros((20, 30, 3), np.uint8)


class Counting(Unrepeatable):
    """Its actions are 5 and 6, its observation a picture."""

    action_space = env.gymnasium.spaces.Discrete(2, start=5)
    observation_space = env.gymnasium.spaces.Box(0, 255, (20, 20), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((20, 20), np.uint8), {}

    def step(self, action):
        return np.zeros((20, 20), np.uint8), float(action), False, False, {}


class Silent(Unrepeatable):
    metadata = {"render_modes": ["ansi"]}


class Several(Unrepeatable):
    action_space = env.gymnasium.spaces.MultiDiscrete([2, 2])


@pytest.fixture
def odd_environments(monkeypatch):
    monkeypatch.setattr(env.gymnasium.envs.registration, "registry", dict(env.gymnasium.registry))
    for kind in (Unrepeatable, Counting, Silent, Several):
        env.gymnasium.register(f"odd/{kind.__name__}-v0", entry_point=kind, max_episode_steps=9)


@pytest.mark.parametrize("name, flags, message", [
    ("odd/Unrepeatable-v0", ["--actions", "a,b"], "Unrepeatable-v0 is not repeatable"),
    ("odd/Silent-v0", ["--actions", "a,b"], "draws no picture"),
    ("odd/Several-v0", ["--actions", "a,b"], "has actions of the kind MultiDiscrete"),
    ("Pendulum-v1", [], "has actions of the kind Box"), ("CartPole-v9", [], "gymnasium cannot make 'CartPole-v9'"),
    ("Nothing-v0", [], "cannot make 'Nothing-v0'"), ("CartPole-v1", [], "2 actions, and 0 are named.*--actions left,right"),
    ("CartPole-v1", ["--actions", "a,b,c"], "and 3 are named"), ("CliffWalking-v1", ["--actions", "a,b,c,d"], "may never end"),
    ("CartPole-v1", ["--actions", "left,left"], "named twice"),
    ("CartPole-v1", ["--actions", "a,b", "--game", "speed=3"], "unexpected keyword argument 'speed'"),
    ("CartPole-v1", ["--actions", "a,b", "--success-return", "much"], "could not convert string to float: 'much'")])
def test_what_cannot_be_wrapped_is_refused_in_words(name, flags, message, odd_environments):
    needs_pygame()
    with pytest.raises(SystemExit, match=message):
        evaluation.main(["--task", f"gymnasium:{name}", "--policy", "random", *flags])


def test_actions_need_not_begin_at_0(odd_environments):
    check_game("gymnasium:odd/Counting-v0", ("actions=a, b",))
    game = make_game("gymnasium:odd/Counting-v0", actions="a, b")
    _, info = game.reset(seed=0)
    assert info == {"observation": str(np.zeros((20, 20), np.uint8)), "is_success": None} and [game.step(index)[1] for index in (0, 1)] == [5.0, 6.0]
    assert game.actions == ("a", "b") and type(game).__name__ == "odd-Counting-v0"


def test_without_the_drawing_package_a_sentence_says_what_to_install():
    script = ("import sys; sys.modules['pygame'] = None; import eval; eval.main(['--task', 'gymnasium:CartPole-v1', "
              "'--actions', 'a,b', '--policy', 'random', '--episodes', '1'])")
    found = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert found.returncode == 1 and "pip install -r extras/requirements-gymnasium.txt" in found.stderr
    assert "Traceback" not in found.stderr


def test_three_flags_are_options_by_another_name():
    given = vars(evaluation.make_parser().parse_args([*FROZEN, "--policy", "random", "--success-return", "1", "--game",
                                                      "is_slippery=false", "--description", "Go, left or right."]))
    assert given["game"] == ("actions=left,down,right,up", "success_return=1", "is_slippery=false",
                             "description=Go, left or right.")
    needs_pygame()
    settings = resolve(Settings, {"task": FROZEN[1], "game": given["game"]})
    game = make_game(settings.task, **settings.game_options)
    assert game.success_return == 1 and not game.env.spec.kwargs["is_slippery"]
    prompt = parse.make_prompt(game, game.reset(seed=0)[1])
    assert prompt.startswith("Go, left or right.\nActions: left down right up\n")


# ---- a registry --------------------------------------------------------------------------------------------------------
def test_the_average_of_all_is_the_papers_four_whatever_is_registered(coin, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "coin", find_game(coin))
    monkeypatch.delitem(TASKS, "alfworld")
    evaluation.main(["--task", "all", "--policy", "random", "--episodes", "4"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*found["tasks"]] == [*GAMES, "coin"]
    assert found["average"] == pytest.approx(np.mean([found["tasks"][task]["success"] for task in GAMES]))


def test_no_file_asks_which_task_it_is():
    """A game's own class tells what is its own; `if task == "blackjack"` is nowhere."""
    seen = 0
    for file in (*HERE.glob("*.py"), *HERE.glob("[gpel]*/**/*.py")):
        if file.name in ("test_all.py", "conftest.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            asked = []
            if isinstance(node, ast.Compare):
                asked = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.MatchValue):
                asked = [node.value]
            seen += bool(asked)
            assert not [part.value for part in asked if part.value in [*TASKS]], (file, node.lineno)
    assert seen > 100
