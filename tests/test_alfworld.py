"""ALFWorld: houses, engine, expert, pictures; skipped where its engine is not installed."""

import copy
import dataclasses
import gc
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import env
import eval as evaluation
import parse
import players
import rollout as playing
import train
from games.alfworld import expert as household
from games.alfworld import houses
from plumbing import checkpoint
from plumbing.settings import Settings
from policy import Policy
from tests.common import run_metrics

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def alfworld():
    """The engine's module; where ALFWorld's engine is not installed these tests are skipped."""
    pytest.importorskip("alfworld", reason="ALFWorld's engine: pip install -r extras/requirements-alfworld.txt")
    from games.alfworld import engine
    return engine


def household_episode(game, seed, choose):
    """Play one episode with choose(game, info) → a command; return [(info, command, reward)] and the last info."""
    (_, info), steps, over = game.reset(seed=seed), [], False
    while not over:
        command = choose(game, info)
        _, reward, terminated, truncated, after = game.step(game.legal_actions().index(command))
        steps.append((info, command, reward))
        info, over = after, terminated or truncated
    return steps, info


def test_the_engine_speaks_without_the_old_locals(alfworld, monkeypatch):
    """Since Python 3.13 what is written into locals() is lost; the words are the same."""
    def said():
        engine = alfworld.Engine()
        engine.load(houses.deal(7))
        texts = [engine.said]
        for _ in range(12):
            engine.step(engine.commands[len(texts) % len(engine.commands)])
            texts.append(engine.said)
        return texts

    before = said()
    monkeypatch.setattr(alfworld.textgen, "locals", dict, raising=False)
    assert said() == before and len(set(before)) > 5


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
    many = [houses.deal(number, "held out") for number in range(1000)]  # the held-out tasks are of many sorts
    for kind in houses.TASKS:
        assert len({(house.target, house.place) for house in many if house.kind == kind}) >= 15, kind
    for split, (places, things) in itertools.product(houses.SPLITS, ((4, 3), (40, 40))):
        for number in range(60):                                        # the smallest and the largest can be dealt
            house = houses.deal(number, split, places, things)
            assert (len(house.layout), objects_of(house)) == (places, things)


@pytest.mark.parametrize("split", ["train", "held out"])
def test_the_planner_solves_every_house_and_the_demonstrator_too(alfworld, split):
    """The planner's plan, sent to the engine, ends in `won`, so does the play of those who see nothing hidden."""
    game, kinds, last = env.make_game("alfworld", split=split), Counter(), []
    for seed in range(6):
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

    monkeypatch.setattr("games.alfworld.game._spare", spare := [])
    monkeypatch.setattr(env.TASKS["alfworld"], "max_steps", 10)
    play_some()
    play_some()
    gc.collect()
    assert not any(one() for one in alive) and len(spare) == 3
    monkeypatch.setattr(alfworld.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"alfworld-engines-{os.getuid()}" / "999999999"
    theirs = left.with_name("999999998")
    for folder in (left, theirs):
        folder.mkdir(parents=True)
    (left / alfworld.MARK).touch()
    spare.clear()
    env.make_game("alfworld")
    assert list(left.parent.iterdir()) == [theirs] and alfworld.tempfile.tempdir == str(tmp_path)
    shutil.move(left.parent, tmp_path / "elsewhere")
    left.parent.symlink_to(tmp_path / "elsewhere")          # who made the link could have us delete what is not ours
    with pytest.raises(PermissionError, match="set TMPDIR"), alfworld._own_temporary_folder():
        pass


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


def test_a_list_that_does_not_tell(alfworld):
    """It is the same whatever lies here, the hand is "it", and the demonstrator wins as before, by the same commands."""
    for seed in range(8):
        told, untold = (env.make_game("alfworld", list_tells=tells, scene_text=False) for tells in (True, False))
        infos = [game.reset(seed=seed)[1] for game in (told, untold)]
        while not told.over:
            assert infos[0] == infos[1]
            listed = untold.legal_actions()
            held = infos[1]["holding"]
            if held:
                assert not any(held in command for command in listed)
                assert [c.replace(held, "it") for c in told.legal_actions() if "take" not in c] == [*listed]
            else:
                kept = [c for c in listed if not c.startswith("take ")]
                assert kept == [c for c in told.legal_actions() if not c.startswith("take ")]
                assert len(listed) - len(kept) == 4 * len(infos[1]["contents"])         # of each of the four things
            for thing in [c for c in listed if c.startswith("take ") and c not in told.legal_actions()][:1]:
                twin = env.make_game("alfworld", list_tells=False, scene_text=False)
                twin.set_state(json.loads(json.dumps(untold.get_state())))
                _, _, _, _, after = twin.step(listed.index(thing))                      # in vain
                assert {**after, "is_success": 0} == {**infos[1], "is_success": 0}
                twin.set_state(json.loads(json.dumps(twin.get_state())))
            [best], [worded] = told.best_actions(infos[0]), untold.best_actions(infos[1])
            steps = [game.step(game.legal_actions().index(action))
                     for game, action in ((told, best), (untold, worded))]
            assert steps[0][1:4] == steps[1][1:4]
            infos = [step[4] for step in steps]
        assert told.is_success() and untold.is_success()


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
            for _ in range(8):
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


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="alfworld-generate itself does not run there")
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
    few = evaluation.evaluate(player, "alfworld", 50, 0, game_options={"houses": "data"})
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
        evaluation.main(["--task", "alfworld", "--policy", "random", "--game", "houses=data", "--episodes", "1"])


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
    for flags, message in (
            (["receptacles=2"], "4 to 40"), (["houses=data", "objects=6"], "of dealt houses"), (["houses=1"], "small or"),
            (["rooms=5"], "its options are split, houses, receptacles"), (["objects=x"], "'x' is not of the kind")):
        with pytest.raises(SystemExit, match=message):
            evaluation.main(["--task", "alfworld", "--policy", "random", "--episodes", "1", "--game", *flags])


def test_the_card_games_need_no_engine_and_without_it_a_sentence_says_what_to_install():
    script = ("import sys, train, eval, sft\n"
              "print([name for name in ('alfworld', 'textworld') if name in sys.modules])\n"
              "sys.modules['textworld'] = None\n"
              "eval.main(['--task', 'alfworld', '--policy', 'random', '--episodes', '1'])")
    found = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert found.stdout == "[]\n" and found.returncode == 1 and "Traceback" not in found.stderr
    assert "pip install -r extras/requirements-alfworld.txt" in found.stderr


def test_a_household_run_goes_on_bit_for_bit(alfworld, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(env.TASKS["alfworld"], "max_steps", 6)          # cut off in the second update, and soon

    def save(run, folder):
        checkpoint.save(run, folder)
        if run.update == 1:                                             # what a kill would leave now
            shutil.copytree(folder, tmp_path / "run")

    command = ["--task", "alfworld", "--model", str(tiny), "--sft-steps", "0", "--rank", "2", "--num-envs", "2",
               "--num-steps", "4", "--total-timesteps", "16", "--max-new-tokens", "4", "--minibatch-size", "8",
               "--eval-episodes", "1"]
    with monkeypatch.context() as watched:
        watched.setattr(train, "save", save)
        train.main([*command, "--out", str(tmp_path / "alone")])
    assert len(run_metrics(tmp_path / "run")) == 1
    train.main([*command[:2], "--out", str(tmp_path / "run"), "--resume"])
    for name in ("metrics.jsonl", "transcripts.jsonl", "eval.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert json.loads((tmp_path / "run" / "config.json").read_text())["cot_lambda"] == 0.2
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(result["success_by_kind"]) <= set(houses.TASKS) and result["success"] <= 1
