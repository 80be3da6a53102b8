"""Models: real tokenizers, 4 bits, adapters, loading, memory, the families against transformers' own passes."""

import copy
import inspect
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextForConditionalGeneration, SmolVLMConfig

import eval as evaluation
import families
import parse
import ppo
import rollout as playing
import sft
import train
from env import GAMES
from games import draw
from plumbing import adapters, checkpoint, loading, memory
from plumbing.adapters import PolicyFiles
from plumbing.errors import ModelError
from plumbing.loading import find_model, load_policy, open_model
from plumbing.settings import Settings, resolve
from policy import Policy, load_model
from tests import tiny as tiny_models
from tests.common import (
    edit,
    family_agent,
    largest_ratio_error,
    mistral_model,
    mixed_prompts,
    run_metrics,
    samples_of,
    shake,
    states_of,
    stop_at,
)


@pytest.fixture(scope="session")
def shapes():
    """lab/shapes.py, which knows LLaVA-1.6-7B's configuration and its tokenizer."""
    from lab import shapes
    return shapes


@pytest.fixture(scope="session")
def mistral(tmp_path_factory, shapes):
    """That model with the real tokenizer and 336-pixel pictures, from its folder."""
    processor, folder = shapes.mistral_processor(), tmp_path_factory.mktemp("mistral")
    mistral_model(shapes.llava_7b_config(processor)).save_pretrained(folder)
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
        assert prompt.ids[first + 576:][:2] == [28705, 13]              # "▁" and the line's end, as the hub's legacy one
        rest = mistral.tokenizer.decode(prompt.ids[first + 576:])
        assert rest.strip() == f"{text} [/INST]", rest
    answers = [one.answer for task in GAMES for one in itertools.islice(sft.demonstrations(task, 0), 20)]
    for text, ids in zip(answers, mistral.encode_answers(answers)):
        assert ids[-1] == 2 and 2 not in ids[:-1] and mistral.decode(ids) == text
        assert mistral.tokenizer.convert_ids_to_tokens(ids[0]) == '▁{"' and 30 < len(ids) < 70
    assert len(mistral.may_close) == 129
    responses = mistral.generate(prompts[:4], torch.Generator().manual_seed(0), 40)
    logp, _ = mistral.logprobs(prompts[:4], responses)
    assert logp.isfinite().all() and not {0, 1, 32000, 32001} & set(itertools.chain(*responses))
    assert mistral.suppress_tokens[32002:].all() and mistral.suppress_tokens.sum() == 62 + 4


def test_the_action_part_is_found_in_odd_splits_of_mistrals_pieces(mistral):
    """Random cuts into pieces, single bytes of emoji and suits among them: parse's character is in the named token."""
    generator, vocabulary = np.random.default_rng(0), mistral.tokenizer.get_vocab()
    for end in ('", ', "😀", '😀"') * 150:                # a character of four pieces right before the key
        junk = "".join(generator.choice(list("é♠😀 {}:,action日\n"), size=8))
        text = f'{{"thoughts": "{junk}{end}"action": "hit"}}'
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
        before, after = (len(mistral.decode(ids[:count]).rstrip("\ufffd")) for count in (first, first + 1))
        assert before <= start < after


def test_the_real_four_bit_path_on_a_cpu(tiny):
    """NF4 through transformers and bitsandbytes: loads, scores close to fp32, learns."""
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
    ours, _ = agent.logprobs(prompts, responses)
    files = PolicyFiles("pocket")
    files.save(agent, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(shipped[0]), tmp_path)
    other = Policy(theirs.get_base_model(), shipped[1], target_modules=())
    torch.testing.assert_close(other.logprobs(prompts, responses)[0], ours, atol=1e-5, rtol=1e-5)
    plain = Policy(copy.deepcopy(shipped[0]), shipped[1], target_modules=())
    assert (plain.logprobs(prompts, responses)[0] - ours).abs().max() > 0.01       # the adapters do something
    again = Policy(copy.deepcopy(shipped[0]), shipped[1], **adapters.adapter_settings(tmp_path), seed=99)
    adapters.load_adapters(again.lora, tmp_path)
    assert not torch.equal(again.value_head.mlp[0].weight, agent.value_head.mlp[0].weight)  # a start: its own V
    files.load(again, tmp_path)
    for mine, saved in zip(again.logprobs(prompts, responses), agent.logprobs(prompts, responses)):
        assert torch.equal(mine, saved)
    stored = load_file(tmp_path / "adapter_model.safetensors")          # the head's would be read past
    more = {f"base_model.model.lm_head.lora_{matrix}.weight": torch.ones(8, 8) for matrix in "AB"}
    save_file(stored | more, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapts lm_head, which is in no part"):
        adapters.adapter_settings(tmp_path)
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="rank"):
        files.load(Policy(copy.deepcopy(shipped[0]), shipped[1], rank=2), tmp_path)
    with pytest.raises(ModelError, match="other layers"):
        files.load(Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, target_modules=("vision",)), tmp_path)


def test_adapters_that_peft_wrote_are_read(agent, shipped, tmp_path):
    """PEFT shortens a list of more than 20 modules to their last names: the parts are read off the weights' keys."""
    import peft
    shake(agent)
    prompts, responses = samples_of(agent, 1, ("blackjack",))
    PolicyFiles("pocket").save(agent, tmp_path / "ours")
    peft.PeftModel.from_pretrained(copy.deepcopy(shipped[0]), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    names = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) < len(agent.lora) / 2
    assert adapters.adapter_settings(tmp_path / "theirs") == {
        "rank": 8, "alpha": 16, "target_modules": tuple(sorted(agent.lora))}
    back = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, seed=9)
    adapters.load_adapters(back.lora, tmp_path / "theirs")
    assert torch.equal(back.logprobs(prompts, responses)[0], agent.logprobs(prompts, responses)[0])
    file = tmp_path / "theirs" / "adapter_model.safetensors"            # numbers that would be cut to 0, ranks, nothing
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor.to(torch.int8) for name, tensor in stored.items()}, file)
    with pytest.raises(ModelError, match="holds torch.int8"):
        adapters.load_adapters(back.lora, tmp_path / "theirs")
    for tensors, said in ((stored, "says 1000000000"), ({}, "ranks ..")):
        save_file(tensors, file)
        edit(tmp_path / "theirs" / "adapter_config.json", r=10**9)
        with pytest.raises(ModelError, match=said):
            adapters.adapter_settings(tmp_path / "theirs")


def test_adapters_of_some_layers_and_of_old_names_go_on(agent, shipped, tmp_path):
    """As PEFT's examples write them, q_proj and v_proj alone; and by the names that paths had before 4.52."""
    import peft
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(shipped[0]), config)
    model.peft_config["default"].base_model_name_or_path = "pocket"
    model.save_pretrained(tmp_path)
    prompts, responses = samples_of(agent, 1, ("blackjack",))
    theirs = Policy(model.get_base_model(), shipped[1], target_modules=())
    expected = theirs.logprobs(prompts, responses)[0]
    file = tmp_path / "adapter_model.safetensors"
    old = {name.replace("model.model.language_model.", "model.language_model.model.").replace(
        "model.model.vision_tower.", "model.vision_tower."): tensor.clone() for name, tensor in load_file(file).items()}
    assert not set(old) & set(load_file(file))
    for _ in range(2):
        found = find_model(str(tmp_path))
        assert found.adapter_flags == {"rank": 4, "target_modules": ("vision", "language")}
        back, files = load_policy(found, bits=32)
        assert all(path.endswith(("q_proj", "v_proj")) for path in back.lora) and len(back.lora) == len(old) / 2
        torch.testing.assert_close(back.logprobs(prompts, responses)[0], expected, atol=1e-5, rtol=1e-5)
        files.save(back, tmp_path / "again")                            # a checkpoint has those layers, no others
        assert adapters.adapter_settings(tmp_path / "again") == adapters.adapter_settings(tmp_path)
        save_file(old, file)


def test_loading_says_what_to_do(tiny, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="Check the spelling"):
        find_model("nobody/no-such-model")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="is a gpt2"):
        find_model(str(tmp_path))
    config = loading.AutoConfig.from_pretrained(tiny)
    config.text_config.final_logit_softcapping = 30.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        find_model(str(tmp_path))
    config.text_config.final_logit_softcapping = None
    for changes in ({"vision_config": {"model_type": "pixtral"}}, {"vision_feature_layer": [-2, -1]},
                    {"vision_feature_layer": 50}):
        config.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))     # as Pixtral's, as Granite Vision's
        with pytest.raises(ModelError, match="does not make a LLaVA's picture tokens"):
            find_model(str(tmp_path))
    for damaged in ('{"model_type": "llava", "text_config": {"hidden_size": "128"}}', 10**5 * "[", "{}"):
        file.write_text(damaged)
        with pytest.raises(ModelError, match="config.json is damaged, or for another version of transformers"):
            find_model(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")         # a download that was cut off
    with pytest.raises(ModelError, match="index.json"):
        memory.stored_bytes(tmp_path)
    other = shutil.copytree(tiny, tmp_path / "other")
    edit(other / "config.json", image_token_index=10**6, image_token_id=10**6)
    with pytest.raises(ModelError, match="tokenizer and chat template"):
        load_policy(find_model(str(other)), bits=32, rank=2)
    shutil.copy(tiny / "config.json", other)
    processor = json.loads((other / "processor_config.json").read_text())
    processor["image_processor"]["image_mean"] = [0.5, None]
    (other / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ModelError, match="tokenizer and chat template"):
        load_policy(find_model(str(other)), bits=32, rank=2)
    with pytest.raises(ValueError, match="4, 16 or 32"):
        load_model(str(tiny), bits=8)
    found = find_model(str(tiny))
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 1)
    with pytest.raises(ModelError, match="--bits 4"):
        open_model(found, bits=32)
    stored = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    monkeypatch.setattr(memory.os, "sysconf", lambda name: math.ceil(stored ** 0.5) + 1)      # a little more than it
    memory.check_weights(str(tiny), 32, "cpu", 32)
    with pytest.raises(ModelError, match="needs about"):
        memory.check_weights(str(tiny), 32, "cpu", 16)


def test_a_gpus_whole_memory_decides_bits_checkpointing_and_batches(tmp_path, monkeypatch, shapes):
    """A hub name's size is read from its index before any download; nothing here needs a GPU or a network."""
    processor = shapes.byte_processor()
    config = shapes.llava_7b_config(processor)
    config.dtype = torch.bfloat16
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 15_000_000_000}}))
    free, total, capability = [0], [0], (8, 6)
    for name, replacement in {"is_available": lambda: True, "current_device": lambda: 0,
                              "get_device_properties": lambda _: SimpleNamespace(total_memory=total[0]),
                              "get_device_capability": lambda *_: capability,
                              "mem_get_info": lambda _: (int(free[0]), int(total[0]))}.items():
        monkeypatch.setattr(torch.cuda, name, replacement)

    def no_kernels(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    with monkeypatch.context() as old:
        old.setattr(torch, "zeros", no_kernels)
        with pytest.raises(ModelError, match="this GPU .*--device cpu leaves it alone. cannot be used: .*no kernel"):
            find_model("pocket")
    assert find_model("pocket", device="cpu").device == "cpu"
    monkeypatch.setattr(loading, "try_gpu", lambda device: None)
    plain = loading._config
    monkeypatch.setattr(loading, "_config", lambda name: config if name == loading.LLAVA_7B else plain(name))
    monkeypatch.setattr(memory, "load_processor", lambda name: processor)
    monkeypatch.setattr(memory, "cached_file", lambda name, file: index)

    def chosen(model, **given):
        found = find_model(model)
        settings = resolve(Settings, {"task": "blackjack"} | given, found)
        return found, settings, memory.memory_note(found, settings)

    for free[0], expected in ((25e9, ("4", 1, 64)), (41e9, ("16", 1, 64)), (51e9, ("16", 2, 64)), (80e9, ("16", 0, 64)),
                              (16e9, ("32", 0, 64))):
        total[0] = free[0]
        found, settings, note = chosen("auto")
        assert (settings.bits, settings.gradient_checkpointing, settings.play_batch_size) == expected
        assert settings.micro_batch_size == (64 if free[0] < 20e9 else 4)
        assert found.name == settings.model == ("pocket" if free[0] < 20e9 else loading.LLAVA_7B)
        assert bool(re.search(r"14.0 GiB of weights, .* training takes [\d.]+ GiB", note)) == (free[0] > 20e9)
    free[0] = total[0] = 16e9
    _, settings, note = chosen(loading.LLAVA_7B)
    assert settings.bits == "4" and "are free" in note and "emulates" not in note       # asked for, so it is tried
    capability = (7, 5)                                                 # a T4
    assert "only emulates bfloat16" in chosen(loading.LLAVA_7B)[2] and "emulates" not in chosen("auto")[2]
    assert resolve(Settings, {"task": "blackjack"}, find_model("pocket")).device == "cuda"
    with monkeypatch.context() as alone:                                # nothing to choose: no process waits for others
        alone.setattr(memory.parallel, "concat", None)
        given = {"task": "points24", "bits": "16", "gradient_checkpointing": 2, "micro_batch_size": 2,
                 "play_batch_size": 8}
        settings = resolve(Settings, given, find_model(loading.LLAVA_7B))
        taught = resolve(sft.SFTSettings, {name: given[name] for name in given if name != "play_batch_size"},
                         find_model(loading.LLAVA_7B))
    assert {name: getattr(settings, name) for name in given} == given and taught.micro_batch_size == 2
    for free[0] in (79e9, 30e9):                                        # a neighbour on the GPU decides nothing
        total[0] = 80e9
        _, settings, note = chosen(loading.LLAVA_7B)
        assert (settings.bits, settings.gradient_checkpointing, settings.micro_batch_size,
                settings.play_batch_size) == ("16", 0, 4, 64)
        assert f"{free[0] / 2**30:.1f} are free" in note
    total[0] = 27e9                                                     # in 16 bits there is room for fewer
    settings = chosen(loading.LLAVA_7B, bits="16", micro_batch_size=2)[1]
    assert settings.micro_batch_size == 2 and settings.play_batch_size < 64
    total[0] = 29e9                                                     # no more answers at once than there are games
    assert chosen(loading.LLAVA_7B)[1].bits == "4"
    settings = chosen(loading.LLAVA_7B, num_envs=8, num_steps=64)[1]
    assert (settings.bits, settings.play_batch_size) == ("16", 8)
    free[0] = total[0] = 10e9
    with pytest.raises(ModelError, match="14.0 GiB in 16 bits and this GPU has free 9.3"):
        open_model(find_model(loading.LLAVA_7B), 16)

    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(memory, "cached_file", offline)
    assert memory.stored_bytes(loading.LLAVA_7B) == 0


def test_what_a_model_is_decides_its_defaults(shapes):
    """One that knows phrases in wide layers is a pocket model; one that knows a language in narrow ones is small."""
    wide = copy.deepcopy(find_model("pocket").config)
    wide.text_config.hidden_size = 1024
    smolvlm = SmolVLMConfig(
        text_config={"model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        vision_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                       "num_attention_heads": 12, "image_size": 512, "patch_size": 16}, scale_factor=4)
    narrow = copy.deepcopy(smolvlm)
    narrow.text_config.hidden_size = 504
    found = find_model("pocket")
    edges = [copy.deepcopy(smolvlm) for _ in range(2)]
    edges[0].text_config.hidden_size, edges[1].text_config.hidden_size = 1023, 1024
    kinds = [replace(found, config=config).size for config in (found.config, wide, smolvlm, narrow, *edges, shapes.QWEN_2B)]
    assert kinds == ["pocket", "pocket", "small", "small", "small", "large", "large"]
    settings = Settings(task="blackjack", rank=32)
    for config, size in ((smolvlm, (200, 1024)), (shapes.QWEN_2B, shapes.QWEN_PROMPT)):
        settings, plan = memory.first_that_fits(config, settings, size, 24e9)
        assert (settings.micro_batch_size, settings.play_batch_size) == (16, 64)
        assert memory.MARGIN * memory.peak(plan) < 24e9


def test_the_memory_plan_is_what_autograd_keeps(shipped):
    """Counted on the meta device as on a CPU that really runs; what stays is the policy's own tensors."""
    config = copy.deepcopy(shipped[0].config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 6, None
    model = LlavaNextForConditionalGeneration(config).to(torch.bfloat16)
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
    settings = Settings(task="points24", bits="16", rank=8, micro_batch_size=4, gradient_checkpointing=0)
    plan = memory.memory_plan(model.config, settings, size)
    assert real <= sum(nbytes for use, nbytes in plan.items() if use.startswith("update:")) <= 1.4 * real
    learning = sum(parameter.nbytes for _, parameter in agent.trainable())
    assert plan["adapters and value head, fp32"] == learning and plan["Adam's moments"] == 2 * learning
    model_bytes = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    assert plan["weights"] + plan["weights that are never quantised"] == model_bytes
    kept = [plan["update: kept for the backward pass"]]
    for every in (1, 2, 3):                                             # every second or third layer saves less
        plan = memory.memory_plan(model.config, replace(settings, gradient_checkpointing=every), size)
        kept.append(plan["update: kept for the backward pass"])
    assert kept[1] < 0.2 * kept[0] < 0.5 * kept[0] < kept[2] < kept[3] < kept[0]


def test_positions_that_stretch_with_the_text_are_planned_for(tiny_families):
    """InternVL's RoPE may be "dynamic": it looks at how long the text is, which the meta device cannot tell."""
    config = loading.AutoConfig.from_pretrained(tiny_families["internvl"])
    plain = memory.count(config, 2, ("language",), 2, 50)
    config.text_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert memory.count(config, 2, ("language",), 2, 50) == plain


@pytest.mark.parametrize("kind", [kind for kind in tiny_models.KINDS if kind != "llava_onevision"])     # it adds tiles
def test_a_family_is_transformers_own_forward_pass(tiny_families, kind):
    """One unpadded sample through the whole model on the processor's own tensors: the same log-probabilities. (Wrong
    positions or token types would pass every test that compares our own passes with each other.)"""
    agent = family_agent(tiny_families[kind])
    shake(agent, size=0.1)
    prompts, pictures, texts = mixed_prompts(agent)
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 12)
    logp, _ = agent.logprobs(prompts, responses)
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
def test_a_familys_passes_agree(tiny_families, kind, tmp_path):
    """Decoding = scoring, batch = one by one, ratio 1 in other company, every part learns, the picture counts, peft."""
    import peft
    agent = family_agent(tiny_families[kind])
    assert not [path for path, module in agent.model.named_modules()     # no part was forgotten: it would stay frozen
                if isinstance(module, torch.nn.Linear) and not families.part_of_path(path) and path != "lm_head"]
    shake(agent, size=0.1)
    prompts, pictures, texts = mixed_prompts(agent)
    assert len({len(prompt.ids) for prompt in prompts}) == 3
    steps, plain = [], agent.log_softmax
    agent.log_softmax = lambda hidden: steps.append(plain(hidden)) or steps[-1]
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 8)
    del agent.log_softmax
    logp, value = agent.logprobs(prompts, responses)
    special = {token for token, added in agent.tokenizer.added_tokens_decoder.items() if added.special}
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        decoded = torch.stack([steps[t][row, token] for t, token in enumerate(response)])
        torch.testing.assert_close(logp[row, :len(response)], decoded, atol=2e-5, rtol=1e-5)
        one, one_value = agent.logprobs([prompt], [response])
        torch.testing.assert_close(one[0], logp[row, :len(response)], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(one_value[0], value[row], atol=2e-5, rtol=1e-5)
        assert not (special - agent.end_tokens) & set(response)         # such are never sampled, and an end comes last
        assert not agent.end_tokens & set(response[:-1])
    shape = playing.Shape(4, 8 + max(len(prompt.ids) for prompt in prompts), 8)
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
    files = PolicyFiles(str(tiny_families[kind]))
    files.save(agent, tmp_path)
    back = family_agent(tiny_families[kind], seed=5)
    files.load(back, tmp_path)
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
    steps, plain = [], agent.log_softmax
    agent.log_softmax = lambda hidden: steps.append(plain(hidden)) or steps[-1]
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 6)
    del agent.log_softmax
    logp, _ = agent.logprobs(prompts, responses)
    for row, response in enumerate(responses):
        decoded = torch.stack([steps[t][row, token] for t, token in enumerate(response)])
        torch.testing.assert_close(logp[row, :len(response)], decoded, atol=2e-5, rtol=1e-5)
    whole = family_agent(tiny_families[kind], temperature=1.0).logprobs(prompts, responses)[0]
    assert 0 < (logp - whole).abs().sum() / sum(map(len, responses)) < 1.0
    logp.sum().backward()
    moved = {families.part_of_path(path) for path, layer in agent.lora.items()
             if layer.lora_B.grad is not None and layer.lora_B.grad.abs().sum() > 0}
    assert moved == {families.part_of_path(path) for path in agent.lora}


def test_a_tower_with_a_pooling_head(tiny_families):
    """SigLIP's reads the weight and the bias of its layer itself; the pictures' tokens do not hang on it."""
    plain = family_agent(tiny_families["llava_onevision"])
    prompts, _, _ = mixed_prompts(plain)
    model, processor = load_model(str(tiny_families["llava_onevision"]))
    config = copy.deepcopy(model.config)
    config.vision_config.vision_use_head = True
    with torch.random.fork_rng():
        headed = type(model)(config).eval()
    assert "head" in str(headed.load_state_dict(model.state_dict(), strict=False).missing_keys)
    headed = Policy(headed, processor, rank=2, temperature=0.7)
    assert any("head.attention.out_proj" in path for path in headed.lora)
    responses = [[1, 2, 3]] * len(prompts)
    torch.testing.assert_close(headed.logprobs(prompts, responses)[0], plain.logprobs(prompts, responses)[0])


def test_a_model_that_is_stored_in_four_bits(tiny, tmp_path):
    """As the hub's "-bnb-4bit" ones: taken in its own bits, refused in words in others."""
    model, processor = load_model(tiny, bits=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = open_model(find_model(str(tmp_path)), 4)
    for (name, weight), (_, other) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(weight, other), name
    for bits in (16, 32):
        with pytest.raises(ModelError, match=f"stored quantised .bitsandbytes., not in {bits} bits: .*--bits 4"):
            open_model(find_model(str(tmp_path)), bits)


def test_pictures_of_other_sizes_keep_their_own_tokens(tiny_families):
    """Where features are kept: each prompt's are its own picture's, whatever else is in the batch."""
    frozen = family_agent(tiny_families["qwen2_vl"], target_modules=("language",))
    pictures = [np.zeros((height, width, 3), np.uint8) for height, width in ((100, 100), (60, 300))]
    alone = [frozen.encode([picture], ["Hello"]) for picture in pictures]
    together = frozen.encode(pictures, ["Hello"] * 2)
    assert len({len(prompt.ids) for prompt in together}) == 2
    for [one], features in zip(alone, frozen.image_features(together)):
        assert len(features) == one.ids.count(frozen.family.image_token)
        torch.testing.assert_close(features, frozen.image_features([one])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, facts in families.FAMILIES.items() if facts.blocks])
def test_a_tower_attends_within_its_blocks_in_one_call_a_layer(tiny_families, kind, monkeypatch):
    """As transformers does with a call for each block: pictures of three sizes; gradients too."""
    agent = family_agent(tiny_families[kind])
    generator, calls, attention = np.random.default_rng(0), [], torch.nn.functional.scaled_dot_product_attention
    pictures = [generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
                for height, width in ((100, 100), (60, 300), (300, 300))]
    prompts = agent.encode(pictures, ["Hello"] * 3)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args, **more: (calls.append(1), attention(*args, **more))[1])
    shake(agent)
    found = {}
    for way in ("blocks_flash", "sdpa"):
        assert found or agent.model.config.vision_config._attn_implementation == way
        agent.model.config.vision_config._attn_implementation = way
        calls.clear()
        features = torch.cat(agent.image_features(prompts))
        agent.zero_grad()
        features.square().sum().backward()
        gradients = [layer.lora_A.grad for path, layer in agent.lora.items() if layer.lora_A.grad is not None]
        found[way] = len(calls), features, gradients
    assert found["blocks_flash"][0] == 2 < 6 <= found["sdpa"][0]                # two layers, three pictures or more
    torch.testing.assert_close(found["blocks_flash"][1], found["sdpa"][1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found["blocks_flash"][2], found["sdpa"][2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_picture_in_blocks_does_not_depend_on_its_place():
    """In bf16, bit for bit: first or second of a row, beside another picture."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 1, 4, 324, 32, generator=generator).bfloat16() for _ in range(2))
    ends = torch.tensor([0, 324, 648], dtype=torch.int32)
    first, second = (families.attend_in_blocks(None, *torch.cat(pair, 3), None, ends, 324, 32 ** -0.5)[0]
                     for pair in ((one, other), (other, one)))
    assert torch.equal(first[:, :324], second[:, 324:]) and not torch.equal(first[:, :324], first[:, 324:])


def test_the_end_is_a_set(tiny_families):
    agent = family_agent(tiny_families["gemma3"])
    assert {agent.tokenizer.convert_tokens_to_ids(word) for word in ("<end>", "<turn>")} == agent.end_tokens


def test_another_family_goes_through_the_whole_program(tiny_families, tmp_path, capsys):
    """Supervised fine-tuning, RL and evaluation of a Qwen3-VL."""
    command = ["--task", "numberline", "--model", str(tiny_families["qwen3_vl"]), "--sft-steps", "1", "--rank", "2",
               "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "16", "--eval-episodes", "2",
               "--max-new-tokens", "4", "--micro-batch-size", "8", "--minibatch-size", "8", "--update-epochs", "1",
               "--out", str(tmp_path / "run")]
    train.main(command)
    evaluation.main(["--task", "numberline", "--run", str(tmp_path / "run"), "--episodes", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = run_metrics(tmp_path / "run")
    assert result["episodes"] == 2 and len(metrics) == 2 and all(row["ratio_error"] == 0 for row in metrics)


def test_a_part_without_linear_layers_learns_nothing_and_says_so(tiny_families, tmp_path, monkeypatch):
    """Gemma 3's projector is a bare matrix: the other parts have adapters, and such a run goes on as it began."""
    command = ["--task", "numberline", "--model", str(tiny_families["gemma3"]), "--sft-steps", "0", "--rank", "2",
               "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "16", "--eval-episodes", "0",
               "--max-new-tokens", "4", "--minibatch-size", "8", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="no linear layer in projector .--target-modules.: nothing would learn"):
        train.main([*command[:-1], str(tmp_path / "other"), "--target-modules", "projector"])
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(1, checkpoint.save))
        with pytest.raises(SystemExit, match="--resume"):
            train.main(command)
    train.main([*command, "--resume"])
    assert len(run_metrics(tmp_path / "run")) == 2


def test_ratio_is_one_in_bf16_at_depth(mistral, shapes):
    """16 layers, temperature 0.2, Mistral's pieces, sampled answers of many lengths: exactly 1 in whatever minibatch."""
    model = mistral_model(shapes.llava_7b_config(mistral.processor), layers=16, side=56).to(torch.bfloat16)
    agent = Policy(model, mistral.processor, rank=4, temperature=0.2, gradient_checkpointing=1)
    shake(agent, size=0.02)
    states = states_of("points24", 6)
    prompts = agent.encode([p for _, p, _ in states], [parse.make_prompt(g, i) for g, _, i in states])
    responses = agent.generate(prompts, torch.Generator().manual_seed(0), 20)
    responses = [response[:5 + 7 * k % 16] for k, response in enumerate(responses)]
    options = Settings(task="points24", num_envs=4, lr=1e-4, value_lr=1e-4, micro_batch_size=2, minibatch_size=3,
                       update_epochs=1)
    rollout = playing.Rollout(*torch.zeros(3, 1, 6), prompts, responses,
                              action_starts=torch.tensor([len(response) * 2 // 3 for response in responses]))
    rollout.shapes = playing.padded_shapes(prompts, responses, options)
    playing.score_rollout(agent, rollout, options)
    others = [[k] for k in range(6)], [[0, 5, 3], [4, 1, 2]]
    assert largest_ratio_error(agent, rollout, *itertools.chain(*others)) == 0
    rollout.advantages, rollout.returns = torch.ones(6), torch.zeros(6)
    optimizer = train.Run(options, agent, files=None).optimizer
    found = ppo.ppo_update(agent, optimizer, rollout, options, torch.Generator().manual_seed(1))
    assert found["ratio_error"] == 0                                    # with gradients and checkpointing, too


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_ratio_is_one_in_bf16_at_depth_in_every_family(kind, tmp_path, monkeypatch):
    """16 layers; prompts and answers of many lengths, in other company: with the attention that a CPU takes and with a
    GPU's, where none of the language model's has a mask but Gemma's, whose pictures' tokens see each other."""
    tiny_models.make(kind, tmp_path, layers=16)
    agent = Policy(*load_model(str(tmp_path), bits=16), rank=2, temperature=0.2)
    shake(agent, size=0.02)
    prompts, _, _ = mixed_prompts(agent)
    prompts *= 2
    responses = [[7 + k] * (3 + 5 * k % 16) for k in range(6)]
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, attn_mask=None, **more: (
        masks.append(attn_mask), attention(*args, attn_mask=attn_mask, **more))[1])
    options = Settings(task="points24", micro_batch_size=2, minibatch_size=3)
    rollout = playing.Rollout(*torch.zeros(3, 1, 6), prompts, responses, action_starts=torch.arange(6) % 3)
    rollout.shapes = playing.padded_shapes(prompts, responses, options)
    text = agent.model.config.get_text_config()
    assert text._attn_implementation == "eager"
    for text._attn_implementation in ("eager", "sdpa"):
        masks.clear()
        playing.score_rollout(agent, rollout, options)
        assert largest_ratio_error(agent, rollout, [0], [5, 1, 3], [4, 2]) == 0
    assert len({len(prompt.ids) for prompt in prompts}) == 3 and masks
    assert all(mask is None for mask in masks) == (kind != "gemma3")


@pytest.mark.parametrize("config, message", [
    ("{}", "'r'"), ('{"r": 0}', "r is 0"), ('{"r": "32"}', "r is '32'"), ("[]", ""), ("{", ""),
    ('{"r": 4, "lora_alpha": 0}', "lora_alpha is 0"),
    ('{"r": 4, "lora_alpha": 8, "target_modules": []}', "target_modules"),
    ('{"r": 4, "lora_alpha": 8, "target_modules": ["a"], "base_model_name_or_path": "pocket", "use_rslora": true}',
     "use_rslora"),
    ('{"r": 4, "lora_alpha": 8, "target_modules": ["a"], "base_model_name_or_path": "pocket", "peft_type": "LOHA"}',
     "LOHA")])
def test_damaged_adapters_are_told_in_a_sentence(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(SystemExit, match="adapter_config.json") as stop:
        evaluation.main(["--task", "blackjack", "--model", str(tmp_path), "--episodes", "1"])
    assert message in stop.value.code


def test_foreign_models_run_no_code_and_are_not_filled_up(tiny, tmp_path, monkeypatch):
    """A tensor that is missing, a pickle, a processor with code of its own, cut and empty files: refused in words."""
    def copied(name):
        return Path(shutil.copytree(tiny, tmp_path / name))

    def opened(folder):
        return open_model(find_model(str(folder)), bits=32)

    less = copied("less")
    tensors = load_file(less / "model.safetensors")
    gone = next(name for name in tensors if "up_proj" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, less / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing, such as .*up_proj"):
        opened(less)
    pickled = copied("pickled")
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="does not load whole"):
        opened(pickled)
    code = copied("code")
    for file in ("processor_config.json", "config.json", "tokenizer_config.json"):
        if (code / file).exists():
            edit(code / file, auto_map={"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None],
                                        "AutoConfig": "evil.Evil"})
    (code / "evil.py").write_text("raise SystemExit('evil ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    opened(code)                                               # its own classes do; evil.py is not looked at
    for name, damage in (("empty", lambda file: file.write_bytes(b"")),
                         ("cut", lambda file: file.write_bytes(file.read_bytes()[:1000]))):
        folder = copied(name)
        damage(folder / "model.safetensors")
        with pytest.raises(ModelError, match="does not load whole"):
            opened(folder)
    raising = copied("raising")
    (raising / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(SystemExit, match="chat template"):
        evaluation.main(["--task", "blackjack", "--model", str(raising), "--episodes", "1"])
