"""Runs: settings, folders, checkpoints, kills, resumption, supervised fine-tuning, several processes."""

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import parallel
import players
import ppo
import rollout as playing
import sft
import train
from env import TASKS
from games.game import GameError
from lab import features
from plumbing import adapters, card, checkpoint, errors, flags, manifest
from plumbing.errors import ModelError
from plumbing.loading import POCKET, find_model
from plumbing.settings import Settings, departures, resolve
from policy import load_model
from tests.common import (
    HERE,
    edit,
    flip,
    free_port,
    make_run,
    play_out,
    pocket_settings,
    run_metrics,
    stop_at,
    tree,
)


def refusal(command, capsys):
    """What is said by a command that refuses: argparse's error, a ModelError or GameError, or its sentence at the end."""
    with pytest.raises((SystemExit, ModelError, GameError)) as stop:
        command()
    return f"{stop.value} {capsys.readouterr().err}"


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


def test_a_half_written_checkpoint_is_never_taken(shipped, tmp_path, monkeypatch):
    run = make_run(shipped, "numberline")
    checkpoint.save(run, tmp_path)
    run.update = 1
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(run, tmp_path)
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-000000"]


def test_weights_that_are_not_finite_are_never_saved(shipped, tmp_path):
    """A gradient may be finite and the step it gives not: the last checkpoint stays as it was."""
    run = make_run(shipped, "numberline")
    checkpoint.save(run, tmp_path)
    before = tree(tmp_path)
    run.update = 1
    run.policy.trainable()[-1][1].data.view(-1)[0] = float("inf")
    with pytest.raises(FloatingPointError, match="nothing was saved, the last checkpoint"):
        checkpoint.save(run, tmp_path)
    assert tree(tmp_path) == before


def test_a_notebook_and_a_thread_may_call_the_programs(monkeypatch, capsys):
    """Their streams cannot be reconfigured, and Python lets only the main thread take a signal."""
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    done = []
    with errors.in_words():
        print("→")

    def stop():
        with checkpoint.held_back_interrupt() as interrupted:
            done.append(interrupted())

    (thread := threading.Thread(target=stop)).start()
    thread.join()
    assert stream.getvalue() == "→\n" and done == [False]


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
    (["--task", "blackjack", "--model", ""], "--model is empty"),
    (["--task", "blackjack", "--lr", "1e38"], "--lr 1e+38 is too large"),
    (["--task", "poker"], "there is no task 'poker': choose numberline")])
def test_bad_settings_are_refused_in_words(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # where there is no run of that name
    assert message in refusal(lambda: flags.read_settings(Settings, "", arguments), capsys)


def test_parts_in_any_order_are_one_setting(tmp_path, capsys):
    parse_parts = lambda text: flags.read_settings(Settings, "", ["--task", "numberline", "--out", str(tmp_path),
                                                                         "--target-modules", text])[0].target_modules
    assert parse_parts("language,vision") == parse_parts("vision,language,language") == ("vision", "language")
    found, resume = flags.read_settings(Settings, "", ["--task", "numberline", "--resume", "--out",
                                                              str(tmp_path / "none")])
    assert not resume and found.task == "numberline" and "this starts one" in capsys.readouterr().out


def test_a_machine_without_a_compiler_is_told_before_anything_is_made(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(SystemExit, match="--compile cannot be used: .*No working C"):
        train.main(["--task", "numberline", "--model", "pocket", "--compile", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


LARGE = SimpleNamespace(name="large", size="large", is_taught=False, is_quantised=False, adapter_flags={},
                        device="cpu")
SMALL = SimpleNamespace(**vars(LARGE) | {"size": "small"})


@pytest.mark.parametrize("cls", [Settings, sft.SFTSettings, features.FeatureSettings])
def test_every_setting_has_a_flag_with_its_meaning_and_its_default(cls):
    """All that `resolve` fills in for a large model, the pocket one and each game is in --help, and the paper's."""
    helps = {action.dest: action.help for action in reversed(flags.make_parser(cls)._actions)}
    assert set(helps) - {"help"} == {entry.name for entry in fields(cls) if entry.metadata["help"]}
    tasks = TASKS if cls is not features.FeatureSettings else ("numberline", "points24")
    found = {(task, kind): resolve(cls, {"task": task}, model) for task in tasks
             for kind, model in (("large", LARGE), ("small", SMALL), ("pocket", find_model("pocket", task)))}
    for entry in fields(cls):
        if not entry.metadata["help"]:
            continue
        meaning, _, told = helps[entry.name].partition(" [")
        assert meaning and meaning == entry.metadata["help"].replace("%", "%%")
        paper = entry.metadata["paper"]
        if paper is not None and {entry.default, entry.metadata["small"], entry.metadata["pocket"]} - {paper, None}:
            assert f"the paper {paper}: " in helps[entry.name], entry.name
        told = told.removesuffix("]").split("; ")           # such as 0.2; pocket 0.5; the paper 0.1: a reason
        if entry.name in ("task", "game", "out", "model", "bits", "device"):           # the meaning tells it
            continue
        for (task, kind), settings in found.items():
            value = getattr(settings, entry.name)
            own = [line for line in told if line.startswith(f"{task} ")]
            columns = {"pocket": ("pocket", "small"), "small": ("small",), "large": ()}[kind]
            own += [line for size in columns for line in told if line.startswith(f"{size} ")]
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            assert (own or told)[0].split()[-1] == text, (entry.name, task, kind)


def test_of_several_defaults_the_nearest_wins(tmp_path, monkeypatch):
    """A large model's, the pocket model's, the game's, what the model's files ask for, what was given."""
    lr = lambda task, model, **given: resolve(Settings, {"task": task, **given}, model)
    pocket, household = find_model("pocket"), find_model("pocket", "alfworld")
    assert [lr("blackjack", LARGE).lr, lr("blackjack", pocket).lr, lr("blackjack", pocket, lr=3e-4).lr] == [
        1e-5, 2e-4, 3e-4]
    episodes = [lr(task, model).eval_episodes for task, model in (
        ("blackjack", LARGE), ("blackjack", pocket), ("alfworld", household), ("alfworld", LARGE))]
    assert episodes == [200, 1000, 100, 100]
    assert [lr("alfworld", household).cot_lambda, lr("alfworld", household, cot_lambda=0.7).cot_lambda] == [0.2, 0.7]
    # files: what adapters were made with comes before a game's own wish, and nothing else may be given
    adapters_of = replace(pocket, adapters="a folder")
    monkeypatch.setattr(type(pocket), "adapter_flags", {"rank": 8, "target_modules": ("language",)})
    monkeypatch.setattr(TASKS["numberline"], "preferred_settings", {"rank": 16, "sft_steps": 7})
    found = lr("numberline", adapters_of)
    assert (found.rank, found.target_modules, found.sft_steps) == (8, ("language",), 0)
    assert lr("numberline", adapters_of, rank=8, sft_steps=5).sft_steps == 5
    with pytest.raises(ModelError, match="have rank 8"):
        lr("numberline", adapters_of, rank=16)
    monkeypatch.undo()
    assert [lr("blackjack", model).sft_steps for model in (LARGE, pocket)] == [100, 0]
    assert lr("blackjack", SimpleNamespace(**vars(LARGE) | {"is_taught": True})).sft_steps == 0
    assert lr("blackjack", SimpleNamespace(**vars(LARGE) | {"is_quantised": True})).bits == "4"


@pytest.mark.parametrize("cls", [Settings, sft.SFTSettings])
def test_resolved_settings_are_complete_and_frozen(cls, monkeypatch):
    monkeypatch.setattr("plumbing.settings.multiplies_bfloat16", lambda: False)
    for task in TASKS:
        for model in (LARGE, find_model("pocket", task)):
            for given in ({}, {"bits": "auto"}):
                found = resolve(cls, {"task": task, "out": "runs/x", **given}, model)
                open_ones = [name for name, value in vars(found).items() if value is None or value == "auto"]
                assert not open_ones and found.bits == "32"
                with pytest.raises(dataclasses.FrozenInstanceError):
                    found.seed = 2


def test_a_cpu_takes_16_bits_where_it_multiplies_them(monkeypatch):
    """Not of the pocket model, which is as fast in 32, and not where all weights learn."""
    has, bits = {}, lambda model, cls=Settings, **given: resolve(cls, {"task": "blackjack", **given}, model).bits
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert [bits(model) for model in (LARGE, SMALL, find_model("pocket"))] == ["32", "32", "32"]
    has["avx512_bf16"] = True
    assert [bits(model) for model in (LARGE, SMALL, find_model("pocket"))] == ["16", "16", "32"]
    assert bits(SMALL, sft.SFTSettings) == "16" and bits(SMALL, sft.SFTSettings, full=True) == "32"
    assert bits(SMALL, bits="32") == "32"


def test_what_is_not_the_papers_is_told():
    named = lambda settings: {line.split()[0] for line in departures(settings)}
    lines = {line.split()[0]: line for line in departures(pocket_settings("blackjack"))}
    assert {"lr", "temperature", "rank"} <= set(lines)
    for name, paper in (("lr", "1e-05"), ("temperature", "0.2"), ("rank", "128")):
        assert f"the paper's: {paper} " in lines[name]
    paper = {entry.name: entry.metadata["paper"] for entry in fields(Settings) if entry.metadata["paper"] is not None}
    some = {name: paper[name] for name in ("lr", "temperature", "rank")}
    assert named(pocket_settings("blackjack", **some)) == set(lines) - set(some)
    assert not named(pocket_settings("blackjack", **paper))
    # ALFWorld's λ is the paper's for it, and the other games' is not
    assert not {"cot_lambda", "total_timesteps"} & named(pocket_settings("alfworld"))
    [line] = [line for line in departures(pocket_settings("alfworld", cot_lambda=0.5)) if "cot_lambda" in line]
    assert "the paper's: 0.2 " in line


def test_a_cards_flags_make_the_same_run_of_the_pocket_model(tmp_path):
    settings = pocket_settings("blackjack", lr=1e-5, temperature=0.2, out=str(tmp_path))
    command = ["--task", "blackjack", "--model", "pocket", "--out", str(tmp_path), *card.flags_of(settings)]
    assert flags.read_settings(Settings, "", command)[0] == settings


def test_a_run_is_not_overwritten_and_resumes_with_its_own_settings(tmp_path, capsys):
    settings = pocket_settings("ezpoints", seed=4, out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    read = lambda *arguments: flags.read_settings(Settings, "", ["--out", str(tmp_path), *arguments])
    assert "holds a run:" in refusal(lambda: read("--task", "ezpoints"), capsys)
    assert read("--resume") == (settings, True)
    assert "seed 4, not 5" in refusal(lambda: read("--resume", "--seed", "5"), capsys)
    assert "--micro-batch-size must be above 0" in refusal(lambda: read("--resume", "--micro-batch-size", "0"), capsys)


def test_supervised_fine_tuning_teaches_and_its_adapters_go_on(tmp_path, capsys):
    sft.main(["--task", "numberline", "--model", "pocket", "--steps", "45", "--batch-size", "16", "--lr", "3e-3",
              "--rank", "8", "--out", str(tmp_path / "a")])
    policy, _ = players.open_policy(str(tmp_path / "a"))
    result = evaluation.evaluate(players.model_player(policy, 0), "numberline", 32, 0)
    assert result["success"] > 0.6                                      # from 27 %: the labels had no noise this time
    command = ["--task", "numberline", "--model", "pocket"]
    assert "holds a run:" in refusal(lambda: sft.main([*command, "--out", str(tmp_path / "a")]), capsys)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    assert "not empty" in refusal(lambda: sft.main([*command, "--out", str(tmp_path / "b")]), capsys)
    assert (tmp_path / "b" / "letter.txt").read_text() == "dear"
    for more, message in ((["--model", str(tmp_path / "a")], "have rank 8"),
                          (["--model", "pocket", "--full"], "has no adapters")):
        command = ["--task", "numberline", "--rank", "4", "--out", str(tmp_path / "c"), *more]
        assert message in refusal(lambda command=command: sft.main(command), capsys)


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
        find_model(str(tmp_path / "stopped"))
    sft.main([*command, "--out", str(tmp_path / "stopped"), "--resume"])
    assert len(taken) == 5
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "stopped").iterdir()) and "sft.json" in names
    for name in names:
        if name != "sft.json":
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    for left in ("checkpoint-000005", "checkpoint-000003.gone", "checkpoint-notes.part"):
        (tmp_path / "stopped" / left).mkdir()                           # as a kill leaves them; the last is somebody's
    sft.main([*command, "--out", str(tmp_path / "stopped"), "--resume"])                # finished: left as it is
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-notes.part"]
    assert len(taken) == 5


def test_rl_on_plain_weights_is_taught_the_format_first(tiny, tmp_path, monkeypatch, capsys):
    """--sft-steps: both stages in one run folder, gone on with after a stop in the first, by the same command."""
    command = ["--task", "numberline", "--model", str(tiny), "--sft-steps", "2", "--rank", "2", "--num-envs", "4",
               "--num-steps", "2", "--total-timesteps", "16", "--eval-episodes", "2", "--max-new-tokens", "8",
               "--out", str(tmp_path / "run")]
    plain = sft.Saver.save

    def stopping(saver, policy, optimizer, done):
        plain(saver, policy, optimizer, 1)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(sft.Saver, "save", stopping)
        with pytest.raises(SystemExit, match="go on with the same command and --resume"):
            train.main(command)
    train.main([*command, "--resume"])
    assert "two stages: 2 batches" in capsys.readouterr().out
    assert adapters.base_name(tmp_path / "run" / "sft") == str(tiny)
    assert len(run_metrics(tmp_path / "run")) == 2
    start = load_file(tmp_path / "run" / "sft" / "adapter_model.safetensors")
    assert max(tensor.abs().max() for name, tensor in start.items() if "lora_B" in name) > 0
    shutil.rmtree(tmp_path / "run" / "sft")
    train.main([*command, "--resume"])                                  # finished; what it started from may be gone


DAMAGES = {             # what is done to a run's folder and its newest checkpoint: what --resume says of it
    "metrics but no checkpoint": lambda run, last: shutil.rmtree(last),
    "adapter_model.safetensors is not as it was": lambda run, last: flip(last / "adapter_model.safetensors"),
    "optimizer.safetensors is not as it was": lambda run, last: flip(last / "optimizer.safetensors"),
    "generators0.safetensors is not as it was": lambda run, last: flip(last / "generators0.safetensors"),
    "value_head.safetensors is missing": lambda run, last: (last / "value_head.safetensors").unlink(),
    "process0.json is not as it was": lambda run, last: edit(last / "process0.json", update=1),
    "no manifest": lambda run, last: (last / "manifest.json").unlink(),
    "no manifest that can be read": lambda run, last: (last / "manifest.json").write_text("null"),
    "no manifest that can be read, so": lambda run, last: (last / "manifest.json").write_text("[" * 10**5),
    "it is not as it was written": lambda run, last: edit(last / "manifest.json", depends={}),
    "it is an earlier version's": lambda run, last: as_an_earlier_version(last / "manifest.json"),
    "was written as checkpoint-000002": lambda run, last: last.rename(run / "checkpoint-000003"),
    "checkpoint-000001 was written for other files": lambda run, last: last.rename(run / "checkpoint-000001"),
    "another run's: it has seed 1, not 2": lambda run, last: edit(run / "config.json", seed=2),
    "another run's: it has num_envs 4, not 8": lambda run, last: edit(run / "config.json", num_envs=8),
    "run folder than are there now (metrics.jsonl)": lambda run, last: (run / "metrics.jsonl").unlink(),
    "are there now (metrics.jsonl, transcripts.jsonl)": lambda run, last: swap_lines(run),
    "are there now (transcripts.jsonl);": lambda run, last: (run / "transcripts.jsonl").write_text("{}\n{}\n"),
    "are there now (eval_start.json)": lambda run, last: (run / "eval_start.json").write_text('{"success": 1}'),
    "config.json cannot be used": lambda run, last: (run / "config.json").write_text('{"seed": '),
    "save_every is 1.5": lambda run, last: edit(run / "config.json", save_every=1.5),
    "there is no task 'chess'": lambda run, last: edit(run / "config.json", task="chess"),
    "adapter_config.json cannot be used": lambda run, last: (last / "adapter_config.json").write_text("{}")}


def as_an_earlier_version(file):
    stored = json.loads(file.read_text())
    del stored["depends"], stored["self"]
    file.write_text(json.dumps(stored | {"self": manifest._digest_of(stored)}))


def swap_lines(run):
    """The first update's and the second's, in each file."""
    for name in checkpoint.LINES:
        (run / name).write_bytes(b"".join((run / name).read_bytes().splitlines(keepends=True)[::-1]))


@pytest.mark.parametrize("message", DAMAGES)
def test_resume_refuses_what_is_not_as_it_was_and_changes_nothing(stopped_run, tmp_path, message, capsys):
    shutil.copytree(stopped_run[0], tmp_path / "run")
    DAMAGES[message](tmp_path / "run", tmp_path / "run" / "checkpoint-000002")
    before = tree(tmp_path / "run")
    command = [*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"]
    assert message in refusal(lambda: train.main(command), capsys)
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
            with pytest.raises(SystemExit, match=r"other files of its base model .*\(model.safetensors\)"):
                command()
    finally:
        weights.write_bytes(kept)


def test_all_that_a_policy_reads_of_a_model_is_hashed(tiny, tmp_path, monkeypatch):
    """Not the weights alone: a chat template, an image's mean, a normaliser, eps, an end token give other bits too."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "notes_on_tokens.txt").write_text("anybody's")
    (tmp_path / "model" / "tokenizer").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_text("not read beside tokenizer.json")
    before = manifest.hashes(tmp_path / "model")
    assert set(before) == {file.name for file in tiny.iterdir()}
    for name, content in ((file.name, file.read_bytes()) for file in tiny.iterdir()):
        flip(tmp_path / "model" / name)
        now = manifest.hashes(tmp_path / "model")
        assert [file for file in now if now[file] != before[file]] == [name]
        (tmp_path / "model" / name).write_bytes(content)
    index = {"weight_map": {"a": "model-00001.safetensors"}}            # beside shards the one file is what is read
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "model-00001.safetensors")
    assert {"model.safetensors", "model-00001.safetensors"} <= set(manifest.hashes(tmp_path / "model"))
    (big := tmp_path / "model.safetensors").write_bytes(bytes(3000))
    whole = manifest.hashes(tmp_path)
    monkeypatch.setattr(manifest, "WHOLE", 1000)                        # larger: at 64 places
    some = manifest.hashes(tmp_path)
    big.write_bytes(bytes(1500) + b"1" + bytes(1499))
    assert some != whole and manifest.hashes(tmp_path) != some


def test_a_run_goes_on_from_the_adapters_that_it_began_with(tiny, tmp_path, monkeypatch):
    """Runs alike in all their settings, from adapters of one name: only the hash tells whose checkpoint it is."""
    start = ["--task", "numberline", "--model", str(tiny), "--steps", "1", "--batch-size", "4", "--rank", "2", "--out"]
    run = ["--task", "numberline", "--model", str(tmp_path / "sft"), "--num-envs", "4", "--num-steps", "2",
           "--total-timesteps", "16", "--max-new-tokens", "4", "--eval-episodes", "0", "--out", str(tmp_path / "run")]
    sft.main([*start, str(tmp_path / "sft")])
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main(run)
    (tmp_path / "sft").rename(tmp_path / "first")
    sft.main([*start, str(tmp_path / "sft"), "--seed", "5"])
    with pytest.raises(SystemExit, match=r"other files of its start adapters .*\(adapter_model.safetensors\)"):
        train.main([*run[:2], *run[-2:], "--resume"])
    shutil.rmtree(tmp_path / "sft")
    (tmp_path / "first").rename(tmp_path / "sft")
    train.main([*run[:2], *run[-2:], "--resume"])
    stored = json.loads((tmp_path / "run" / "checkpoint-000002" / "manifest.json").read_text())["depends"]
    assert stored["start adapters"] == manifest.hashes(tmp_path / "sft") and stored["base model"] == manifest.hashes(tiny)


def test_fine_tuning_trusts_no_names(tiny, tmp_path, monkeypatch):
    """A checkpoint is the step that it was written as; a result is finished where all of its files are whole."""
    command = ["--task", "numberline", "--model", str(tiny), "--steps", "3", "--batch-size", "4", "--rank", "2",
               "--save-every", "1", "--out", str(tmp_path)]
    plain = sft.step
    with monkeypatch.context() as stopped:
        steps = iter((plain, plain))
        stopped.setattr(sft, "step", lambda *arguments: next(steps, stop)(*arguments))
        with pytest.raises(SystemExit, match="--resume"):
            sft.main(command)
    (tmp_path / "checkpoint-000002").rename(tmp_path / "checkpoint-000001")
    with pytest.raises(SystemExit, match="checkpoint-000001 was written as checkpoint-000002"):
        sft.main([*command, "--resume"])
    (tmp_path / "checkpoint-000001").rename(tmp_path / "checkpoint-000002")
    sft.main([*command, "--resume"])
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="adapter_model.safetensors is missing"):
        sft.main([*command, "--resume"])


def stop(*_):
    raise KeyboardInterrupt


def test_a_run_and_its_model_may_move(stopped_run, tmp_path):
    """Adapters name their base's absolute place; where it has moved, --model says where to; the hash, that it is it."""
    shutil.copytree(stopped_run[0].parent, tmp_path / "all")
    model = Path(stopped_run[0].parent / "model")
    try:
        model.rename(model.with_name("elsewhere"))
        command = [*stopped_run[1][:2], "--out", str(tmp_path / "all" / "run"), "--resume"]
        with pytest.raises(SystemExit, match="which is not there: .*--model with --resume"):
            train.main(command)
        with pytest.raises(SystemExit, match="other files of its base model"):
            train.main([*command, "--model", str(POCKET)])
        train.main([*command, "--model", str(tmp_path / "all" / "model")])
        assert len(run_metrics(tmp_path / "all" / "run")) == 4
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
    with pytest.raises(SystemExit, match="--device, or by the run itself"):
        train.main([*stopped_run[1][:4], "--device", "cuda", "--out", str(tmp_path / "gpu")])
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume", "--model", "auto",
                "--save-every", "3"])
    for file in lines:
        assert [json.loads(line)["update"] for line in file.read_text().splitlines()] == [1, 2, 3, 4], file
        assert "left" not in file.read_text()
    assert (tmp_path / "run" / "checkpoint-000004").exists()            # the last one, whatever save_every says
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == stopped_run[1][3]
    moved = (tmp_path / "run").rename(tmp_path / "moved")               # and is called by where it is
    asked = evaluation.make_parser().parse_args(["--task", "numberline", "--run", str(moved), "--num-envs", "3"])
    assert evaluation.find_policy(asked, {"num_envs": 3}, "numberline")[2].num_envs == 3      # not the run's own 4
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
    with pytest.raises(SystemExit, match="config.json (cannot be used|was written by another program)"):
        evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "1"])


@pytest.mark.parametrize("name, value", [("temperature", 0.9), ("cot", False), ("seed", 7), ("num_steps", 5)])
def test_eval_takes_no_settings_but_the_checkpoints_own(stopped_run, tmp_path, name, value):
    """An edited config.json, or another run's: its games would not be this run's."""
    shutil.copytree(stopped_run[0], tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(SystemExit, match=f"is another run's: it has {name} .*, not {value}"):
        evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "1"])


def test_other_versions_and_threads_are_told_and_left_overs_go(stopped_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(stopped_run[0], tmp_path / "run")
    count, now = torch.get_num_threads(), manifest.versions(Settings(task="numberline"))
    for left in ("checkpoint-000001.gone", "checkpoint-000003.part", "checkpoint-notes.part"):
        (tmp_path / "run" / left).mkdir()
    monkeypatch.setattr(manifest, "versions", lambda _: now | {"threads": count + 1, "torch": "9.0"})
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    said = capsys.readouterr().err
    assert f"threads {count} → {count + 1}" in said and "→ 9.0" in said and "code" not in said
    assert len(run_metrics(tmp_path / "run")) == 4
    kept = {folder.name for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {"checkpoint-000004", "checkpoint-notes.part"}           # the notes are somebody's
    (tmp_path / "run" / "curve.png").unlink()                               # as a kill right after the last checkpoint
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run" / "curve.png").exists() and len(run_metrics(tmp_path / "run")) == 4


def test_runs_of_one_method_share_a_hash(tmp_path, monkeypatch):
    """Comments and docstrings move no bit; a number does."""
    for path in ("ppo.py", "env.py", "games/game.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(manifest.ROOT / path, tmp_path / path)
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    ppo, before = tmp_path / "ppo.py", manifest.method_hash.__wrapped__()
    code = ppo.read_text().replace('"""½ E[(V − R)²] of', '"""Half of the error of') + "\n# another comment\n"
    for text, same in ((code, True), (code.replace("0.5 * ((values", "0.6 * ((values"), False)):
        assert text != ppo.read_text()
        ppo.write_text(text)
        assert (manifest.method_hash.__wrapped__() == before) == same


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


def test_a_system_without_locks_is_told_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SystemExit, match="WSL"):
        runpy.run_path(checkpoint.__file__)


def test_what_strangers_write_moves_no_terminal(tmp_path, capsys):
    """A base's name, a lock's text, an error: what is said goes through one door."""
    escape = "\x1b[2J"
    (tmp_path / "run").mkdir()
    held = checkpoint.locked(tmp_path / "run")
    with held:
        (tmp_path / "run" / "run.lock").write_text(f"me{escape}")
        with pytest.raises(SystemExit, match=r"in use by me\\x1b\[2J"), errors.in_words():
            with checkpoint.locked(tmp_path / "run"):
                pass
    with pytest.raises(SystemExit, match=r"disk\\x1b\[2J\nfull"), errors.in_words():
        raise OSError(f"disk{escape}\nfull")
    errors.say(f"model: {escape}\nwell")
    assert capsys.readouterr().out == "model: \\x1b[2J\nwell\n"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EPERM])
def test_a_network_folder_without_locks_is_written_all_the_same(code, tmp_path, monkeypatch, capsys):
    fsync = os.fsync

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: (
        refuse if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync)(descriptor))
    with checkpoint.locked(tmp_path):
        checkpoint.write_whole(tmp_path / "x.json", "{}")
    assert (tmp_path / "x.json").read_text() == "{}" and "no file can be locked" in capsys.readouterr().out
    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    code = errno.EIO
    with pytest.raises(SystemExit, match="Input/output error"), errors.in_words(), checkpoint.locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["run.lock", "curve.png", "config.json.part", "checkpoint-000002"])
def test_a_run_folder_leads_nowhere_else(stopped_run, tmp_path, name):
    """A link in it, whole or broken, would have what it leads to written over."""
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    shutil.copytree(stopped_run[0], run)
    theirs.write_text("mine")
    if (run / name).is_dir():
        shutil.move(run / name, theirs := tmp_path / "moved")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(theirs)
    before = tree(run)
    with pytest.raises(SystemExit, match=f"{name} is a link, and what it leads to"):
        train.main([*stopped_run[1][:2], "--out", str(run), "--resume"])
    assert tree(run) == before and (tmp_path / "theirs").read_text() == "mine"


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
        found = refusal(command, capsys)
        assert message in found or "is a directory" in found
    assert (tmp_path / "a file").read_text() == "mine"
    (tmp_path / "result.json").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "result.json")            # a link stays one (and /dev/null a device)
    evaluation.main(["--task", "numberline", "--policy", "random", "--episodes", "1", "--out", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "result.json").read_text()


def test_what_a_terminal_cannot_show_and_a_closed_pipe_cost_nothing(tiny, tmp_path, monkeypatch):
    """In a subprocess without UTF-8, into a pipe that nobody reads: the run goes on to its end."""
    out = tmp_path / "cost$^$2"
    command = [sys.executable, str(HERE / "train.py"), "--task", "numberline", "--model", str(tiny), "--num-envs", "2",
               "--num-steps", "2", "--total-timesteps", "4", "--eval-episodes", "0", "--rank", "2",
               "--max-new-tokens", "5", "--out", str(out)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in said, said
    assert (out / "checkpoint-000001").exists() and (out / "curve.png").exists()
    shown = io.BytesIO()
    with monkeypatch.context() as narrow:
        terminal = io.TextIOWrapper(shown, encoding="ascii")
        narrow.setattr(sys, "stdout", terminal)
        with errors.in_words():
            print("a → b")
    assert shown.getvalue() == b"a \\u2192 b\n" and terminal


def test_half_of_torchruns_environment_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="LOCAL_RANK is set but RANK.*torchrun"):
        parallel.start()


@pytest.mark.parametrize("arguments, message", [
    (["--target-kl", "nan"], "--target-kl"), (["--advantage-floor", "inf"], "--advantage-floor"),
    (["--temperature", "inf"], "--temperature"), (["--seed", "1" * 23], "--seed"), (["--lr", "nan"], "--lr")])
def test_numbers_that_are_none_are_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # where there is no run of that name
    assert message in refusal(lambda: train.main(["--task", "blackjack", *arguments]), capsys)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(stopped_run, tmp_path, monkeypatch):
    shutil.copytree(stopped_run[0], tmp_path / "run")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "save_file", full)
        with pytest.raises(SystemExit, match="the disk is full; the last checkpoint is intact.*--resume"):
            train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    train.main([*stopped_run[1][:2], "--out", str(tmp_path / "run"), "--resume"])
    assert len(run_metrics(tmp_path / "run")) == 4


def test_a_run_is_evaluated_without_the_adapters_that_it_started_from(tiny, tmp_path, capsys, monkeypatch):
    """The checkpoint holds all adapters and names their base: the SFT folder may be gone, and the run goes on too."""
    sft.main(["--task", "numberline", "--model", str(tiny), "--steps", "1", "--batch-size", "4", "--rank", "4", "--out",
              str(tmp_path / "sft")])
    command = ["--task", "numberline", "--num-envs", "8", "--num-steps", "2", "--eval-episodes", "0",
               "--max-new-tokens", "8", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit, match="go on with the same command and --resume"):
            train.main([*command, "--model", str(tmp_path / "sft"), "--total-timesteps", "48"])
    assert len(run_metrics(tmp_path / "run")) == 1
    shutil.rmtree(tmp_path / "sft")
    evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "4"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 4
    train.main([*command, "--resume"])
    assert len(run_metrics(tmp_path / "run")) == 3


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
        find_model(str(tmp_path / "full"))
    sft.main([*arguments, "--resume"])
    before, after = (load_model(str(folder))[0].state_dict() for folder in (tiny, tmp_path / "full"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("vision_tower", "projector", "language_model"):
        assert any(part in name for name in moved)
    assert not [path for path in (tmp_path / "full").iterdir() if path.is_dir()]


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
    run.settings = replace(run.settings, num_envs=32)                   # the games of both
    played = playing.rollout_metrics(rollout, run.settings, run.games[0])
    metrics = ppo.ppo_update(run.policy, run.optimizer, rollout, run.settings, run.shuffling)
    save_file({name: p.detach() for name, p in run.policy.trainable()}, Path(folder) / f"{rank}.safetensors")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(played | metrics))
    if rank:                                                            # the other has ended: a sentence, no traceback
        with pytest.raises(SystemExit, match="lost the others"):
            parallel.wait()


def test_two_processes_learn_what_one_does_from_both_halves(shipped, tmp_path, monkeypatch):
    """The same samples, normalised together, and minibatches that are the two processes' own put together."""
    multiprocessing.set_forkserver_preload(["tests.common"])            # what is slow to import: once for both
    torch.multiprocessing.start_processes(one_of_two, (free_port(), str(tmp_path)), 2, start_method="forkserver")
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
    run.settings = replace(run.settings, num_envs=32)
    playing.score_rollout(run.policy, both, run.settings)
    playing.add_advantages(run.policy, both, run.settings)
    batches = [[[i + 16 * (i // 16) + 16 * rank for i in batch]         # a process's sample i is both's that
                for batch in ppo.minibatches(32, 12, 2, half.shuffling)] for rank, half in enumerate(runs)]
    monkeypatch.setattr(ppo, "minibatches", lambda *_: [x + y for x, y in zip(*batches)])
    metrics = ppo.ppo_update(run.policy, run.optimizer, both, run.settings, run.shuffling)
    metrics |= playing.rollout_metrics(both, run.settings, run.games[0])
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
    train.write_settings(alone.settings, tmp_path)
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
