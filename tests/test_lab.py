"""The laboratory: pocket models' making, features, bench, shapes, torture."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import families
import parse
import players
import sft
import train
from env import GAMES
from lab import bench, features, pocket, pocket_alfworld, shapes
from plumbing import checkpoint, memory
from plumbing import settings as run_settings
from plumbing.loading import POCKET
from plumbing.settings import Settings
from policy import Policy, load_model
from tests.common import run_metrics, samples_of, states_of, stop_at

HERE = Path(__file__).parent.parent


def test_the_pocket_recipe_is_seeded(shipped, tiny):
    """The tokenizer is rebuilt token for token; fine-tuning from one seed ends at the same weights, bit for bit."""
    assert pocket.make_tokenizer(pocket.game_texts(seed=0)).get_vocab() == shipped[1].tokenizer.get_vocab()
    ends = []
    for _ in range(2):
        agent = Policy(*load_model(str(tiny)), target_modules=())
        late = {task: shares[1] for task, shares in pocket.NOISE.items()}
        sources = pocket.answers((*late, *pocket.MORE), late, 0, streams=1)
        batches = sft.mixed(sources, 8, np.random.default_rng(0))
        losses = sft.finetune(agent, batches, 4, 1e-3)
        ends.append([losses, *(p.detach().clone() for p in agent.model.parameters())])
    assert ends[0][0] == ends[1][0] and all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:]))


def test_the_baseline_without_a_language_model(tmp_path, capsys, monkeypatch):
    """Features and an MLP under the same loop: uniform at the start, always a legal action, goes on from its folder."""
    out, command = str(tmp_path / "run"), ["--task", "numberline", "--num-steps", "4", "--lr", "5e-3"]
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(2, checkpoint.save))
        with pytest.raises(SystemExit, match="--resume"):
            features.main([*command, "--total-timesteps", "768", "--eval-episodes", "20", "--out", out])
    features.main(["--out", out, "--resume"])
    metrics = run_metrics(tmp_path / "run")
    assert metrics[0]["action_logp"] == pytest.approx(-math.log(2), abs=1e-6) and metrics[-1]["success"] > 0.5
    assert all(row["parse_rate"] == 1 and row["thought_logp"] == 0 for row in metrics)
    start, end = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("eval_start", "eval"))
    assert end["success"] > start["success"]
    options, _ = run_settings.read_settings(features.FeatureSettings, "", ["--out", out, "--resume"])
    agent, files = features.make_features(options)
    untaught = agent.narrow.weight.abs().sum()
    files.load(agent, checkpoint.newest_checkpoint(out))
    assert untaught == 0 and agent.value_head.fitted and agent.narrow.weight.abs().sum() > 0
    prompts = agent.encode([picture for _, picture, _ in states_of("numberline", 8)], [""] * 8)
    alone = torch.cat([agent.logprobs([prompt], [[0]])[0] for prompt in prompts])
    torch.testing.assert_close(agent.logprobs(prompts, [[0]] * 8)[0], alone)
    with pytest.raises(SystemExit, match="holds no adapters"):
        evaluation.main(["--task", "numberline", "--run", out])
    with pytest.raises(SystemExit):
        features.main([*command, "--rank", "8"])                        # a flag that only a language model has
    assert "unrecognized arguments: --rank" in capsys.readouterr().err


def test_what_is_killed_or_damaged_is_as_the_run_left_alone_or_refused():
    """A share of lab/torture.py, in a process of its own because it forks: each row's tries all held. (Flipped bits
    are tests/test_runs.py's DAMAGES.)"""
    found = subprocess.run([sys.executable, "-m", "lab.torture", "--every", "100", "--kills", "1", "--flips", "0",
                            "--answers", "2000"], cwd=HERE, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout.splitlines()[-1])["tried_held"]
    assert len(rows) == 7 and all(tried == held for tried, held in rows.values())
    assert sum(tried > 0 for tried, _ in rows.values()) >= 3            # a random moment may come too late


def test_the_pocket_for_households_learns_from_the_demonstrators_play():
    """What its lessons say, and that the shipped model answers held-out houses with legal commands mostly."""
    pytest.importorskip("alfworld", reason="extras/requirements-alfworld.txt")
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


def test_a_samples_flops_are_those_of_its_matrix_products(agent):
    """Counted by hand: 2 forward and 2 backward a weight and token; torch's counter has attention and the rest, too."""
    [prompt], [response] = samples_of(agent, 1, ("blackjack",))
    tokens = {"vision": 26, "projector": 25, "language": len(prompt.ids) + len(response)}
    products = sum(tokens[families.part_of_path(path)] * layer.base.weight.numel()
                   for path, layer in agent.lora.items())
    assert 4 * products < bench.flops_a_sample(agent, [prompt], [response]) < 1.35 * 4 * products


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
    for row, _, plan in shapes.plans():                              # the README's: each fits its GPU
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


def test_bench_measures_an_update(capsys, monkeypatch, tiny_families):
    bench.main(["--model", str(tiny_families["qwen3_vl"]), "--num-envs", "4", "--num-steps", "1", "--updates", "1",
                "--micro-batch-size", "4"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["decode_tokens_per_s"] > 0 < figures["play_tokens_per_s"] and 0 < figures["mfu"] < 1
    assert 200 < figures["kernels_a_step"] < 600
    assert figures["whole_update_s"] == pytest.approx(figures["rollout_s"] + figures["update_s"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--model", "llava-7b-random", "--memory-gb", "24"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 10 < plan["memory_plan_gib"]["peak"] < 22 and "rollout_s" not in plan
