"""What a model takes: its weights on disk, what is free for them, and what training takes, on
paper.

    stored_bytes("llava-hf/llava-v1.6-mistral-7b-hf")   # of a folder or a hub name
    size = prompt_size(config, processor, "blackjack")  # tokens of a prompt, patches of its picture
    plan = memory_plan(config, settings, size)          # {use: bytes}, built on no device
    settings, plan = first_that_fits(config, settings, size, 24 * 2**30)    # on a GPU of 24 GiB
    peak(plan)                                          # bytes

The plan counts what is known before a GPU is touched: what stays exactly, what comes and goes by
running the language model on torch's meta device and adding up what autograd keeps. Not counted:
CUDA's own context (about half a GiB), fragments, small temporaries. On one H200 two plans of an
earlier version were 0.4 and 1.6 GiB above torch's peak (lab/README.md).
"""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import cached_file

import parallel
from decode import PASS_TOKENS
from env import make_game
from families import Family, load_processor, takes_fixed_cache
from lora import add_lora
from parse import make_prompt
from plumbing.errors import ModelError, as_model_error

ANSWER_TOKENS = 100     # what an answer is taken to be long; the experts' are 34 to 63 of Mistral's
MARGIN = 1.15           # so many times the plan must fit, for all that is not counted
# the settings that are chosen by a GPU's memory
CHOSEN = ("micro_batch_size", "play_batch_size", "bits", "gradient_checkpointing")
COUNTED = {}            # what count has found, a second each: plans for several bits need the same


# ---- before a model is loaded ------------------------------------------------------------------
def stored_bytes(name) -> int:
    """Bytes of a model's weights, of a folder or by a hub repository's index; 0 if unknown."""
    index = Path(name) / "model.safetensors.index.json"
    if Path(name).is_dir() and not index.exists():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    try:
        index = index if index.exists() else cached_file(name, index.name)
    except OSError:         # one file without an index, or no network
        return 0
    with as_model_error(index):
        return json.loads(Path(index).read_text()).get("metadata", {}).get("total_size", 0)


def free_bytes(device) -> int:
    """What is free on a GPU; on a CPU what the machine has, for other programs can be swapped
    out."""
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(device)[0]


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it: without them bfloat16 is slower than fp32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_weights(name, bits, device, stored_bits):
    """Refuse weights that cannot fit, before a download and before the machine swaps."""
    needed = stored_bytes(name) * bits / stored_bits
    free = free_bytes(device)
    if needed > free:
        has = "machine has" if device == "cpu" else "GPU has free"
        raise ModelError(
            f"{name!r} needs about {needed / 2**30:.1f} GiB in {bits} bits and this {has} "
            f"{free / 2**30:.1f}: try --bits 4, or use --model pocket")


def fit_to_gpu(model, settings, given):
    """The settings with what depends on a GPU's memory (CHOSEN), but for those given.

    model: loading.FoundModel. It goes by all the memory that the GPU has, not by what is free: a
    run must not depend on what else the GPU does, and another size of batches draws other tokens.
    """
    free = {name for name in CHOSEN if name in vars(settings)} - {*given}   # sft.py does not play
    if not free:                    # the first stage, of which one process alone comes here
        return settings
    # every process has a GPU of its own, and all must hold the same weights
    total = torch.tensor([torch.cuda.get_device_properties(model.device).total_memory])
    total, size = parallel.concat(total).min().item(), _prompt_size_of(model, settings)
    return first_that_fits(model.config, settings, size, total, free)[0]


def first_that_fits(config, settings, size, total, free=CHOSEN):
    """(settings, plan): the first choice that fits a GPU of `total` bytes, else the smallest.

    free: the names of the settings that are chosen. Large batches come before small ones: as many
    answers a forward pass as make about PASS_TOKENS, and all games', 64 at most, written at once.
    Then come 16 bits before 4, then as little checkpointing as can be.
    """
    filled = 2 ** max(0, round(math.log2(PASS_TOKENS / (size[0] + ANSWER_TOKENS))))
    games = min(64, getattr(settings, "num_envs", 64) // parallel.size())
    for halved, bits, checkpointing in itertools.product(range(7), ("16", "4"), (0, 2, 1)):
        tried = max(1, filled >> halved), max(1, games >> halved), bits, checkpointing
        settings = replace(
            settings, **{name: value for name, value in zip(CHOSEN, tried) if name in free})
        plan = memory_plan(config, settings, size)
        if MARGIN * peak(plan) <= total:
            break
    return settings, plan


def memory_note(model, settings) -> str:
    """What to tell of a large model before it is loaded: its download, whether training fits."""
    if model.device == "cpu" or model.size == "pocket" or not settings.rank:
        return ""
    note = ""
    stored = 0 if Path(model.folder).is_dir() else stored_bytes(model.folder)
    if stored:              # 0 too where the hub has no index
        note = f"; {stored / 2**30:.1f} GiB of weights, downloaded where they are not yet"
    # torch.cuda.is_bf16_supported() says True of these too
    if int(settings.bits) < 32 and torch.cuda.get_device_capability(model.device) < (8, 0):
        note += "; this GPU (older than Ampere) only emulates bfloat16, which is slow"
    free = free_bytes(model.device)
    plan = memory_plan(model.config, settings, _prompt_size_of(model, settings))
    return note + (
        f"; training takes {peak(plan) / 2**30:.1f} GiB or more, {free / 2**30:.1f} are free "
        "(lower --micro-batch-size, --play-batch-size or --rank if memory runs out)")


# ---- a plan ------------------------------------------------------------------------------------
def memory_plan(config, settings, size) -> dict[str, int]:
    """{use: bytes} of training a model of a transformers configuration on one GPU in bf16.

    settings: with rank, target_modules, bits, gradient_checkpointing and sizes of batches. size:
    prompt_size's (P, patches). See the file's header.
    """
    prompt_tokens, patches = size
    length = prompt_tokens + ANSWER_TOKENS
    linear, others, adapters, kept_by_language = count(
        config, settings.rank, settings.target_modules, settings.micro_batch_size, length)
    text, vision = config.get_text_config(), config.vision_config
    layers, hidden = text.num_hidden_layers, text.hidden_size
    bits, batch = int(settings.bits), settings.micro_batch_size
    playing = getattr(settings, "play_batch_size", 0)       # sft.py does not play
    value_head = (hidden + 1) * 1024 + 1025 * 512 + 513
    learning = 4 * (adapters + value_head)

    # what autograd keeps; a vision layer is taken to keep as much of a token and channel as one of
    # the language model's: an estimate
    vision_layers = _first(vision, "num_hidden_layers", "depth")
    vision_width = _first(vision, "embed_dim", "hidden_size")
    whole = kept_by_language * (
        1 + patches * vision_layers * vision_width / (length * layers * hidden))
    inputs = whole / kept_by_language * 2 * batch * length * hidden * layers
    kept, again = whole, 0
    if every := settings.gradient_checkpointing:
        # of every n-th layer the input alone is kept and the rest computed again
        kept = (inputs + whole * (every - 1)) / every
        again = whole / layers

    head_size = _first(text, "head_dim") or hidden // text.num_attention_heads
    keys = _first(text, "num_key_value_heads", "num_attention_heads") * head_size
    prefill = playing
    kept_tokens = playing * (prompt_tokens + getattr(settings, "max_new_tokens", 0))
    if takes_fixed_cache(config):
        prefill = min(playing, max(1, PASS_TOKENS // prompt_tokens))
        kept_tokens += prefill * prompt_tokens      # a group's own, before it is copied
    return {
        "weights": sum(map(nf4_bytes, linear)) if bits == 4 else sum(linear) * bits // 8,
        "weights that are never quantised": others * max(bits, 16) // 8,
        "adapters and value head, fp32": learning,
        "their gradients": learning,
        "Adam's moments": 2 * learning,
        "update: kept for the backward pass": int(kept),
        "update: computed again": int(again),
        "update: head in fp32 and 4 × the answers' logits":
            4 * text.vocab_size * (hidden + 4 * batch * ANSWER_TOKENS),
        "step: Adam's temporary": learning,
        "play: keys and values": 4 * kept_tokens * layers * keys,
        "play: adapters in 16 bits": 2 * adapters,
        "play: head in fp32": 4 * text.vocab_size * hidden,
        "play: a layer's prefill (4 MLP-wide tensors)":
            8 * prefill * prompt_tokens * text.intermediate_size,
    }


def peak(plan) -> int:
    """A plan's highest sum: what stays, and the largest of update, step and play."""
    stays = sum(size for use, size in plan.items() if ":" not in use)
    return stays + max(
        sum(size for use, size in plan.items() if use.startswith(phase))
        for phase in ("update:", "step:", "play:"))


# ---- counting ----------------------------------------------------------------------------------
def count(config, rank, target_modules, samples, length):
    """What a model of this configuration holds.

    (weights of each linear layer but the head, all other weights, adapters' weights,
    kept_for_backward's bytes)
    """
    key = config.to_json_string(), rank, target_modules, samples, length
    if key not in COUNTED:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
            head = model.get_output_embeddings()
            linear = [
                module.weight.numel() for module in model.modules()
                if isinstance(module, nn.Linear) and module is not head]
            others = sum(parameter.numel() for parameter in model.parameters()) - sum(linear)
            layers = add_lora(model, rank, 2 * rank, target_modules, None)
        adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values())
        COUNTED[key] = linear, others, adapters, kept_for_backward(model, samples, length)
    return COUNTED[key]


def kept_for_backward(model, samples, length) -> int:
    """Bytes that autograd keeps of one pass of a meta model's language part, weights apart."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        # only the meta device keeps attention's whole table
        if tensor.shape[-2:] != (length, length):
            # the tensor too, lest its storage's name be used again
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    width = model.config.get_text_config().hidden_size
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"    # it would look at positions, which are not there
    with torch.device("meta"):
        hidden = torch.empty(
            samples, length, width, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.zeros(samples, length, dtype=torch.long)
        mask = torch.ones(samples, 1, length, length, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_decoder()(
            inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False)
    return sum(size for name, (size, _) in kept.items() if name not in weights)


def _prompt_size_of(model, settings):
    """prompt_size for a FoundModel and a run's settings."""
    with as_model_error(f"the processor of {model.folder!r}"):
        processor = load_processor(model.folder)
        return prompt_size(model.config, processor, settings.task, settings.cot,
                           settings.game_options)


def prompt_size(config, processor, task, cot=True, game_options=None):
    """(P, patches): tokens of a game's longest prompt in 50 random steps, patches of its
    picture."""
    with torch.device("meta"):
        family = Family(AutoModelForImageTextToText.from_config(config), processor)
    game = make_game(task, **(game_options or {}))
    (picture, info), texts = game.reset(seed=0), []
    for draw in game.np_random.random(50).tolist():
        texts.append(make_prompt(game, info, cot))
        *_, terminated, truncated, info = game.step(int(draw * len(game.legal_actions())))
        if terminated or truncated:
            info = game.reset()[1]
    (images, ids), = family.encode([picture], [max(texts, key=len)])
    pixels = images["pixel_values"]         # Qwen: (patches, values), else (…, height, width)
    if pixels.dim() == 2:
        return len(ids), len(pixels)
    patch = _first(config.vision_config, "patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    return len(ids), pixels.shape[-1] * pixels.shape[-2] // patch ** 2


def _first(config, *names):
    """The first of several names that a configuration knows."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def nf4_bytes(weights):
    """Bytes of a weight matrix in NF4 with double quantisation, blocks of 64 and of 256.

    arXiv 2305.14314.
    """
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256)
