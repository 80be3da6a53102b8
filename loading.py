"""Finding and loading a model: a hub name, a folder, the pocket model, or a folder of adapters and its base.

    loaded = open_model("auto")                             # what a command line's --model and --bits stand for
    model, processor = load_model("llava-hf/llava-v1.6-mistral-7b-hf", bits=4, device="cuda")

All errors are ModelErrors that say what to do. Does not handle: what is done with the model (policy.py); adapters'
weights (lora.py): only which base they belong to.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import cached_file

from families import FAMILIES, ModelError, load_processor
from lora import base_name

LLAVA_7B = "llava-hf/llava-v1.6-mistral-7b-hf"
POCKET = Path(__file__).parent / "checkpoints" / "pocket"


def load_model(name: str, bits=32, device="cpu"):
    """Return (model, processor) of a hub name or a folder.

    bits: 4 (NF4 with double quantisation), 16 (bfloat16) or 32. Raises ModelError with advice.
    """
    if bits not in (4, 16, 32):
        raise ModelError(f"bits must be 4, 16 or 32, not {bits}")
    dtype = torch.float32 if bits == 32 or (bits == 4 and device == "cpu") else torch.bfloat16
    quantisation = None
    if bits == 4:
        # On a CPU bitsandbytes misses an optional kernel that would be fetched from the hub; its own code does as well.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    _check_memory(name, bits, device, stored_as=_config(name).dtype or torch.float16)
    try:
        processor = load_processor(name)
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, quantization_config=quantisation, device_map={"": device})
    except (OSError, ValueError, ImportError) as error:         # SmolVLM's processor wants a package of its own
        raise ModelError(f"{name!r} has a configuration but does not load whole: is a file missing or cut off? "
                         f"The loader said: {error}") from error
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{name!r} does not fit into memory in {bits} bits: try --bits 4, close other programs, "
                         "or use --model pocket.") from error
    if not getattr(processor, "chat_template", None):
        raise ModelError(f"{name!r} has no chat template: use a chat model with its whole processor")
    return model, processor


def _config(name):
    """The configuration of a hub name or a folder; ModelError unless it is of a known family."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot find a model {name!r}: it is neither a folder with a model here nor a name that the "
                         "hub gave an answer for. Check the spelling; without a network, download it elsewhere "
                         f"(`hf download {name}`) and pass the folder. The loader said: {error}") from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"{name!r} is a {config.model_type}: no model that this program can give pictures to. It "
                         f"knows {', '.join(FAMILIES)}; such as {LLAVA_7B}.")
    if getattr(config.get_text_config(), "final_logit_softcapping", None):
        raise ModelError(f"{name!r} bends its logits (final_logit_softcapping), which policy.py's head does not do")
    return config


@dataclass
class Found:
    """What a command line's --model and --bits stand for, before any weights are read."""
    name: str               # the model's, "auto" resolved
    bits: str               # "4", "16" or "32", "auto" resolved
    base: str               # the model's without adapters: what adapters of it are made for
    adapters: str | None    # the folder of adapters to go on with, where name is one
    folder: str             # what transformers loads the base from: a folder or a hub name
    config: object          # transformers' configuration of it
    device: str
    room: float             # how many times its 16-bit weights fit into the GPU's free memory; 0 on a CPU
    why: str                # what to tell the user of it


@dataclass
class Loaded(Found):
    """The same with the model and its processor."""
    model: nn.Module
    processor: object


def find_model(model="auto", bits="auto") -> Found:
    """Return Found for a command line's words.

    model: "auto" (LLaVA-1.6-7B where a CUDA GPU has 20 GB or more, else the pocket model), "pocket", a hub name, a
    model folder, or a folder of adapters that sft.py or train.py wrote: then their base.
    bits: "auto" is 32 on a CPU and for the pocket model, 16 on a GPU that has room for it (see room), else 4.
    """
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    name = why = str(model)
    if model == "auto":
        large = device != "cpu" and torch.cuda.get_device_properties(device).total_memory >= 20e9
        name, other = (LLAVA_7B, "pocket") if large else ("pocket", LLAVA_7B)
        why = f"{name} ({'a' if large else 'no'} GPU with 20 GB is here; or --model {other})"
    base, adapters = name, None
    if (Path(name) / "adapter_config.json").exists():
        base, adapters = base_name(name), name
        why = f"{base} with the adapters in {adapters}"
    folder = str(POCKET) if base == "pocket" else base
    config = _config(folder)
    free = room(folder, config, device)
    if bits == "auto":
        large = 16 if free >= 2.4 else 4
        bits = 32 if device == "cpu" or is_small(config) else large
    return Found(name, str(bits), base, adapters, folder, config, device, free, f"{why}, in {bits} bits")


def room(folder, config, device) -> float:
    """How many times the model's 16-bit weights fit into the GPU's free memory; 0 where their size is not known.

    Training takes adapters, their moments and activations beside the weights: on paper 2.4 times the weights are enough
    for 16 bits, and 4 times for doing without gradient checkpointing too. Not tried on a GPU.
    """
    stored = 0 if device == "cpu" else stored_bytes(folder)
    if not stored:
        return 0.0
    weights = stored * 2 / (config.dtype or torch.float16).itemsize
    return torch.cuda.mem_get_info(device)[0] / weights


def open_model(model="auto", bits="auto") -> Loaded:
    """find_model, and its weights: on a GPU where there is one."""
    found = find_model(model, bits)
    model, processor = load_model(found.folder, int(found.bits), found.device)
    return Loaded(**vars(found), model=model, processor=processor)


def is_small(config):
    """Whether a model is of pocket size, on which the defaults hang; one of half a billion weights is not."""
    return config.get_text_config().hidden_size < 512


def stored_bytes(name) -> int:
    """Bytes of a model's weights: of a folder's files, or by a hub repository's small index; 0 if unknown."""
    index = Path(name) / "model.safetensors.index.json"
    if Path(name).is_dir() and not index.exists():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    try:
        index = index if index.exists() else cached_file(name, index.name)
    except OSError:                                         # one file without an index, or no network
        return 0
    return json.loads(Path(index).read_text()).get("metadata", {}).get("total_size", 0)


def _check_memory(name, bits, device, stored_as):
    """Refuse weights that cannot fit, before a download begins and before the machine swaps or kills the run."""
    needed = stored_bytes(name) * bits / (8 * stored_as.itemsize)
    if device == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = torch.cuda.mem_get_info(device)[0]
    if needed > memory:
        raise ModelError(f"{name!r} needs about {needed / 2**30:.1f} GiB in {bits} bits and this "
                         f"{'machine has' if device == 'cpu' else 'GPU has free'} {memory / 2**30:.1f}: try --bits 4, "
                         "or use --model pocket")
