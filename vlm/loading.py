"""Finding and loading a model: a hub name, a folder, the pocket model, or a folder of adapters and its base.

    loaded = open_model("auto")                             # what a command line's --model and --bits stand for
    model, processor = load_model("llava-hf/llava-v1.6-mistral-7b-hf", bits=4, device="cuda")

All errors are ModelErrors that say what to do. Does not handle: what is done with the model (policy.py); adapters'
weights (lora.py): only which base they belong to; what fits (memory.py).
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import cached_file

from plumbing.errors import FOREIGN, ModelError, foreign
from plumbing.manifest import check, weights_hash
from plumbing.settings import Settings
from vlm.families import FAMILIES, load_processor
from vlm.lora import adapter_settings, base_name
from vlm.memory import check_weights, choose, free_bytes, prompt_size, said_of_memory

LLAVA_7B = "llava-hf/llava-v1.6-mistral-7b-hf"
POCKET = Path(__file__).parent.parent / "checkpoints" / "pocket"
SHIPPED = {"pocket": POCKET, "pocket-alfworld": POCKET.with_name("pocket-alfworld")}


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
    check_weights(name, bits, device, stored_as=_config(name).dtype or torch.float16)
    processor = _processor(name)
    try:
        with foreign(f"{name!r} does not load whole (a file missing, cut off, or neither here nor to be had?), so it",
                     Exception):                            # all kinds: other people's code on other people's files
            model, report = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, quantization_config=quantisation, device_map={"": device}, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True)
            if missing := sorted(report["missing_keys"]):           # transformers would fill them with random numbers
                raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"{name!r} does not fit into memory in {bits} bits: try --bits 4, close other programs, "
                         "or use --model pocket.") from error
    return model, processor


def _processor(name):
    """The processor of a hub name or a folder; ModelError unless it can write a chat."""
    with foreign(f"the processor of {name!r}"):                 # an ImportError: SmolVLM's wants a package of its own
        processor = load_processor(name)
    if not getattr(processor, "chat_template", None):
        raise ModelError(f"{name!r} has no chat template: use a chat model with its whole processor")
    return processor


def _config(name):
    """The configuration of a hub name or a folder; ModelError unless it is of a known family."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except FOREIGN as error:
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
    checkpointing: int | None       # gradient_checkpointing by memory.choose; None on a CPU and for a small model
    why: str                # what to tell the user of it


@dataclass
class Loaded(Found):
    """The same with the model and its processor."""
    model: nn.Module
    processor: object
    weights_hash: str = None        # of the base (manifest.weights_hash)


def find_model(model="auto", bits="auto", settings=None) -> Found:
    """Return Found for a command line's words.

    model: "auto" (LLaVA-1.6-7B where a CUDA GPU has 20 GB or more, else the pocket model), "pocket" (the task's own), a
    model folder, or a folder of adapters that sft.py or train.py wrote: then their base.
    bits: "auto" is 32 on a CPU and for the pocket model; else 16 where training so fits the GPU's free memory, or 4.
    settings: of the training to come, which memory.choose asks; without any, train.py's defaults.
    """
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    own = "pocket-alfworld" if settings and settings.task == "alfworld" else "pocket"       # another vocabulary
    name = why = own if model == "pocket" else str(model)
    if model == "auto":
        large = device != "cpu" and torch.cuda.get_device_properties(device).total_memory >= 20e9
        name, other = (LLAVA_7B, own) if large else (own, LLAVA_7B)
        why = f"{name} ({'a' if large else 'no'} GPU with 20 GB is here; or --model {other})"
    base, adapters = name, None
    if (Path(name) / "adapter_config.json").exists():
        base, adapters = base_name(name), name
        if Path(base).is_absolute() and not Path(base).is_dir():        # moved since
            if not settings or not Path(settings.model or "").is_dir():
                raise ModelError(f"{adapters} was made for the model in {base}, which is not there: to go on with a "
                                 "run, pass the model's present folder as --model with --resume")
            base = settings.model
        why = f"{base} with the adapters in {adapters}"
    if base not in SHIPPED and Path(base).is_dir():
        base = str(Path(base).resolve())                        # adapters name it wherever they are read from
    folder = str(SHIPPED.get(base, base))
    other = next(name for name in SHIPPED if name != own)
    if settings and Path(folder).resolve() == SHIPPED[other].resolve():
        raise ModelError(f"{other} knows the words of other games than {settings.task}: --model pocket is its own")
    config, checkpointing, memory = _config(folder), None, ""
    if device == "cpu" or is_small(config):
        bits = "32" if bits == "auto" else bits
    else:
        settings = copy.copy(settings) if settings else Settings(task="blackjack")
        settings.bits = bits
        if adapters:
            vars(settings).update({key: adapter_settings(adapters)[key] for key in ("rank", "target_modules")})
        size = prompt_size(config, _processor(folder), settings.task, settings.cot, settings.world)
        free = free_bytes(device)
        bits, checkpointing, plan = choose(config, settings, size, free)
        memory = said_of_memory(folder, plan, free)
    return Found(name, str(bits), base, adapters, folder, config, device, checkpointing,
                 f"{why}, in {bits} bits{memory}")


def open_model(model="auto", bits="auto", settings=None) -> Loaded:
    """find_model, and its weights: on a GPU where there is one."""
    found = find_model(model, bits, settings)
    model, processor = load_model(found.folder, int(found.bits), found.device)
    folder = Path(found.folder)
    if (folder / "manifest.json").exists():                                 # sft.py --full wrote it
        check(folder)
    found_hash = weights_hash(folder if folder.is_dir() else Path(cached_file(found.folder, "config.json")).parent)
    if found.adapters and (Path(found.adapters) / "manifest.json").exists():        # PEFT's own folders have none
        check(found.adapters, found_hash)
    return Loaded(**vars(found), model=model, processor=processor, weights_hash=found_hash)


def is_small(config):
    """Whether a model is of pocket size, on which the defaults hang; one of half a billion weights is not."""
    return config.get_text_config().hidden_size < 512
