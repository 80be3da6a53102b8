"""What a model takes: its weights on disk, what is free for them, and on paper what training takes at its highest.

    stored_bytes("llava-hf/llava-v1.6-mistral-7b-hf")       # of a folder or, by its small index, of a hub repository
    size = prompt_size(config, processor, "blackjack")      # tokens of a prompt, patches of its picture
    plan = memory_plan(config, settings, size)              # {use: bytes}, built on no device
    peak(plan)                                              # bytes
    bits, checkpointing, plan = choose(config, settings, size, free)

The plan counts what is known before a GPU is touched: what stays exactly, what comes and goes by running the
language model on torch's meta device and adding up what autograd keeps. Not counted: CUDA's own context (about half a
GiB), fragments, small temporaries. On one H200 two plans were 0.4 and 1.6 GiB above torch's peak (extras/README.md).
"""

import copy
import json
import os
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils import cached_file

from env import make_game
from parse import make_prompt
from plumbing.errors import ModelError, foreign
from plumbing.settings import fill_in
from policy import PREFILL_TOKENS
from vlm.families import PARTS, Family
from vlm.lora import add_lora

ANSWER_TOKENS = 100                 # what an answer is taken to be long; the experts' are 34 to 63 of Mistral's tokens
COUNTED = {}                        # what count has found, a second each: plans for several bits need the same
MARGIN = 1.15                       # what is free should be so many times the plan, for all that is not counted


def stored_bytes(name) -> int:
    """Bytes of a model's weights: of a folder's files, or by a hub repository's small index; 0 if unknown."""
    index = Path(name) / "model.safetensors.index.json"
    if Path(name).is_dir() and not index.exists():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    try:
        index = index if index.exists() else cached_file(name, index.name)
    except OSError:                                         # one file without an index, or no network
        return 0
    with foreign(index):
        return json.loads(Path(index).read_text()).get("metadata", {}).get("total_size", 0)


def free_bytes(device) -> int:
    """What is free on a GPU; on a CPU what the machine has, since other programs' share can be swapped out."""
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(device)[0]


def check_weights(name, bits, device, stored_as):
    """Refuse weights that cannot fit, before a download begins and before the machine swaps or kills the run."""
    needed, free = stored_bytes(name) * bits / (8 * stored_as.itemsize), free_bytes(device)
    if needed > free:
        raise ModelError(f"{name!r} needs about {needed / 2**30:.1f} GiB in {bits} bits and this "
                         f"{'machine has' if device == 'cpu' else 'GPU has free'} {free / 2**30:.1f}: try --bits 4, "
                         "or use --model pocket")


def choose(config, settings, size, free):
    """(bits, gradient_checkpointing, plan): the first that fits of (16, 0), (16, 1) and (4, 1), else the last.

    What the settings name is kept. free: bytes.
    """
    for bits, checkpointing in ((16, 0), (16, 1), (4, 1)):
        tried = copy.copy(settings)
        tried.bits = bits if settings.bits == "auto" else int(settings.bits)
        if settings.gradient_checkpointing is None:
            tried.gradient_checkpointing = checkpointing
        plan = memory_plan(config, tried, size)
        if MARGIN * peak(plan) <= free:
            break
    return tried.bits, tried.gradient_checkpointing, plan


def memory_plan(config, settings, size) -> dict[str, int]:
    """{use: bytes} of training a model of a transformers configuration on one GPU in bf16; see the file's header.

    settings: plumbing.settings.Settings with bits and gradient_checkpointing; what else is open gets a large model's
    default. size: prompt_size's (P, patches).
    """
    settings, (prompt_tokens, patches) = copy.copy(settings), size
    fill_in(settings, small=False)
    length = prompt_tokens + ANSWER_TOKENS
    linear, others, adapters, kept_by_language = count(
        config, settings.rank, settings.target_modules or tuple(PARTS), settings.micro_batch_size, length)
    text, vision = config.get_text_config(), config.vision_config
    bits, batch = int(settings.bits), settings.micro_batch_size
    value_head = (text.hidden_size + 1) * 1024 + 1025 * 512 + 513
    learning = 4 * (adapters + value_head)
    # a vision layer keeps as much of a token and channel as one of the language model's: an estimate
    seen = (1 + patches * _first(vision, "num_hidden_layers", "depth") * _first(vision, "embed_dim", "hidden_size")
            / (length * text.num_hidden_layers * text.hidden_size))
    whole, again = seen * kept_by_language, 0
    kept = whole
    if every := settings.gradient_checkpointing:
        # of every n-th layer the input alone is kept and the rest computed again; the other layers keep all
        kept = (seen * 2 * batch * length * text.hidden_size * text.num_hidden_layers + whole * (every - 1)) / every
        again = whole / text.num_hidden_layers
    keys = _first(text, "num_key_value_heads", "num_attention_heads") * (
        _first(text, "head_dim") or text.hidden_size // text.num_attention_heads)
    prefill = min(settings.play_batch_size, max(1, PREFILL_TOKENS // prompt_tokens))
    return {
        "weights": sum(map(nf4_bytes, linear)) if bits == 4 else sum(linear) * bits // 8,
        "weights that are never quantised": others * max(bits, 16) // 8,
        "adapters and value head, fp32": learning,
        "their gradients": learning,
        "Adam's moments": 2 * learning,
        "update: kept for the backward pass": int(kept),
        "update: computed again": int(again),
        "update: head in fp32 and 4 × the answers' logits": 4 * text.vocab_size * (
            text.hidden_size + 4 * batch * ANSWER_TOKENS),
        "step: Adam's temporary": learning,
        "play: keys and values": 2 * 2 * settings.play_batch_size * length * text.num_hidden_layers * keys,
        "play: head in fp32": 4 * text.vocab_size * text.hidden_size,
        "play: a layer's prefill (4 MLP-wide tensors)": 4 * 2 * prefill * prompt_tokens * text.intermediate_size,
    }


def said_of_memory(folder, plan, free) -> str:
    """What to tell the user before a large model is loaded: its download, and whether training it will fit."""
    stored = 0 if Path(folder).is_dir() else stored_bytes(folder)               # 0 too where the hub has no index
    size = f"; {stored / 2**30:.1f} GiB of weights, downloaded where they are not yet" if stored else ""
    needed = f"; training takes {peak(plan) / 2**30:.1f} GiB or more, {free / 2**30:.1f} are free"
    if MARGIN * peak(plan) > free:
        needed += (f" ({'it will hardly fit' if peak(plan) > free else 'tight'}: lower --micro-batch-size, "
                   "--play-batch-size or --rank if memory runs out)")
    return size + needed


def count(config, rank, target_modules, samples, length):
    """(weights of each linear layer but the head, all other weights, adapters' weights, kept_for_backward's bytes)."""
    key = config.to_json_string(), rank, target_modules, samples, length
    if key not in COUNTED:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
            head = model.get_output_embeddings()
            linear = [module.weight.numel() for module in model.modules()
                      if isinstance(module, nn.Linear) and module is not head]
            others = sum(parameter.numel() for parameter in model.parameters()) - sum(linear)
            layers = add_lora(model, rank, 2 * rank, target_modules, None)
        adapters = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values())
        COUNTED[key] = linear, others, adapters, kept_for_backward(model, samples, length)
    return COUNTED[key]


def prompt_size(config, processor, task, cot=True, world=None):
    """(P, patches): tokens of a game's longest prompt in 50 random steps, and its picture's to the vision tower."""
    with torch.device("meta"):
        family = Family(AutoModelForImageTextToText.from_config(config), processor)
    game = make_game(task, **(world or {}))
    (picture, info), texts = game.reset(seed=0), []
    for draw in game.np_random.random(50).tolist():
        texts.append(make_prompt(game, info, cot))
        *_, terminated, truncated, info = game.step(int(draw * len(game.legal_actions())))
        if terminated or truncated:
            info = game.reset()[1]
    (images, ids), = family.encode([picture], [max(texts, key=len)])
    pixels = images["pixel_values"]                         # Qwen: (patches, values), else (…, height, width)
    patch = _first(config.vision_config, "patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    return len(ids), len(pixels) if pixels.dim() == 2 else pixels.shape[-1] * pixels.shape[-2] // patch ** 2


def _first(config, *names):
    """The first of several names that a configuration knows."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def peak(plan) -> int:
    """A plan's highest sum: what stays, and the largest of update, step and play."""
    return sum(size for use, size in plan.items() if ":" not in use) + max(
        sum(size for use, size in plan.items() if use.startswith(phase)) for phase in ("update:", "step:", "play:"))


def kept_for_backward(model, samples, length) -> int:
    """Bytes that autograd keeps of one forward pass of a meta model's language part, weights apart."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.shape[-2:] == (length, length):           # only the meta device keeps attention's whole table
            return tensor
        kept[storage._cdata] = (storage.nbytes(), tensor)   # the tensor too, lest its storage's name be used again
        return tensor

    hidden = torch.empty(samples, length, model.config.get_text_config().hidden_size, device="meta",
                         dtype=torch.bfloat16, requires_grad=True)
    positions = torch.zeros(samples, length, dtype=torch.long, device="meta")
    mask = torch.ones(samples, 1, length, length, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False)
    return sum(size for name, (size, _) in kept.items() if name not in weights)


def nf4_bytes(weights):
    """Bytes of a weight matrix in NF4 with double quantisation, blocks of 64 and of 256 (arXiv 2305.14314)."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256)
