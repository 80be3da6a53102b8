"""Finding a model: a hub name, a folder, the pocket model, or a folder of adapters and its base.

    found = find_model("auto")                          # what a command line's --model stands for
    policy, files = load_policy(found, bits="4", rank=128, temperature=0.2)

Errors are ModelErrors that say what to do. Does not handle: reading weights (policy.load_model),
what fits into memory (memory.py), what the settings are (settings.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from env import find_game
from families import FAMILIES, PARTS, part_of_path
from plumbing.adapters import PolicyFiles, adapter_settings, base_name, load_adapters
from plumbing.errors import ModelError, as_model_error
from plumbing.manifest import check, hashes
from plumbing.memory import check_weights
from policy import Policy, load_model

LLAVA_7B = "llava-hf/llava-v1.6-mistral-7b-hf"
POCKET = Path(__file__).parent.parent / "checkpoints" / "pocket"
SHIPPED = {"pocket": POCKET, "pocket-alfworld": POCKET.with_name("pocket-alfworld")}


@dataclass
class FoundModel:
    """What a command line's --model stands for, before any weights are read."""

    name: str               # "auto" resolved
    base: str               # the model without adapters: what adapters of it are made for
    adapters: str | None    # the folder of adapters to go on with, where name is one
    folder: str             # what transformers loads the base from: a folder or a hub name
    config: object          # transformers' configuration of it
    device: str
    why: str                # what to tell the user of it

    @property
    def size(self):
        """Which defaults fit: "pocket", "small" or "large" (plumbing/settings.py).

        A pocket model knows a game's phrases and no language, which takes more tokens. A small one
        has a width below 1024 and so some hundred million weights, as SmolVLM's 256M and 500M.
        """
        text = self.config.get_text_config()
        if text.vocab_size < 2000:
            return "pocket"
        return "small" if text.hidden_size < 1024 else "large"

    @property
    def is_taught(self):
        """Whether sft.py or train.py made it: RL needs no first stage then."""
        return bool(self.adapters) or (Path(self.folder) / "sft.json").exists()

    @property
    def is_quantised(self):
        """Whether its weights are stored in few bits already."""
        return bool(getattr(self.config, "quantization_config", None))

    @property
    def adapter_flags(self):
        """rank and target_modules, by part, of the adapters to go on with; {} without any."""
        if not self.adapters:
            return {}
        own = adapter_settings(self.adapters)
        found = {part_of_path(path) for path in own["target_modules"]}
        parts = tuple(part for part in PARTS if part in found)
        return {"rank": own["rank"], "target_modules": parts}


def find_model(model="auto", task="blackjack", base=None, device="auto") -> FoundModel:
    """Return the FoundModel for a command line's word.

    model: "auto" (LLaVA-1.6-7B where a CUDA GPU has 20 GB or more, else the pocket model), "pocket"
    (the task's own), a hub name, a model folder, or a folder of adapters that sft.py or train.py
    wrote: then their base too. base: where that is, if it has moved since. device: "cpu" leaves a
    GPU alone.
    """
    if not model:
        raise ModelError("--model is empty: an unset variable?")
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ModelError("a GPU was asked for (--device, or by the run itself), and none is here")
    if device == "cpu" or not gpu:
        device = "cpu"
    else:
        device = f"cuda:{torch.cuda.current_device()}"
        try_gpu(device)
    own = find_game(task).pocket
    large = device != "cpu" and torch.cuda.get_device_properties(device).total_memory >= 20e9
    if own is None and (model == "pocket" or model == "auto" and not large):
        raise ModelError(
            f"no pocket model reads {task}: make one (python -m lab.pocket --task {task} --out "
            "FOLDER) and pass its folder as --model, or a large model's name")
    name = why = own if model == "pocket" else str(model)
    if model == "auto":
        name, alternative = (LLAVA_7B, own or "FOLDER") if large else (own, LLAVA_7B)
        why = f"{name} ({'a' if large else 'no'} GPU with 20 GB is here; or --model {alternative})"

    base_model, adapters = name, None
    if (Path(name) / "adapter_config.json").exists():
        base_model, adapters = base_name(name), name
        if Path(base_model).is_absolute() and not Path(base_model).is_dir():
            if not (base and Path(base).is_dir()):
                raise ModelError(
                    f"{adapters} was made for the model in {base_model}, which is not there: put "
                    "a link to its present folder there; or, to go on with a run, pass that folder "
                    "as --model with --resume")
            base_model = base
        why = f"{base_model} with the adapters in {adapters}"
    if base_model not in SHIPPED and Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())    # adapters name it wherever they are read
    folder = str(SHIPPED.get(base_model, base_model))
    for other in SHIPPED.keys() - {own} if own else ():
        if Path(folder).resolve() == SHIPPED[other].resolve():
            raise ModelError(
                f"{other} knows the words of other games than {task}: --model pocket is its own")
    taught = [game for place in (folder, adapters) if place for game in _taught(place)]
    if taught and task not in taught:
        why += f" (taught {', '.join(taught)} but not {task}, which sft.py can teach)"
    return FoundModel(name, base_model, adapters, folder, _config(folder), device, why)


def _taught(folder) -> list[str]:
    """The games of a folder's lessons, by sft.py or lab/smol.py; [] where no file names them."""
    recipe = Path(folder) / "sft.json"
    if not recipe.exists():
        return []
    with as_model_error(recipe):
        stored = json.loads(recipe.read_text(encoding="utf-8"))
        return list(stored["noise"]) if "noise" in stored else [stored["task"]]


def try_gpu(device):
    """ModelError where this PyTorch cannot compute on the GPU; it may have no kernels for it."""
    with as_model_error("this GPU (too old for this PyTorch? --device cpu leaves it alone)",
                        RuntimeError):
        (torch.zeros(1, device=device) + 1).item()


def _config(name):
    """The configuration of a hub name or a folder; ModelError unless it is of a known family."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:      # every kind: other people's code on other people's files
        why = ("it is neither a folder with a model here nor a name that the hub gave an answer "
               "for. Check the spelling; without a network, download it elsewhere "
               f"(`hf download {name}`) and pass the folder")
        if (Path(name) / "config.json").exists():
            why = "its config.json is damaged, or for another version of transformers"
        raise ModelError(
            f"cannot find a model {name!r}: {why}. The loader said: {error}") from error
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{name!r} is a {config.model_type}: no model that this program can give pictures to. "
            f"It knows {', '.join(FAMILIES)}; such as {LLAVA_7B}. How another family is added: "
            "extras/README.md")
    vision = config.vision_config
    layer = getattr(config, "vision_feature_layer", -1)
    one_layer = isinstance(layer, int) and abs(layer) <= getattr(vision, "num_hidden_layers", 0)
    if FAMILIES[config.model_type].square and not (
            one_layer and vision.model_type in ("clip_vision_model", "siglip_vision_model")):
        raise ModelError(
            f"{name!r} calls itself a {config.model_type}, but its {vision.model_type} does not "
            "make a LLaVA's picture tokens (Pixtral and Granite Vision are such): not supported")
    if getattr(config.get_text_config(), "final_logit_softcapping", None):
        raise ModelError(
            f"{name!r} bends its logits (final_logit_softcapping), which policy.py's head does not")
    return config


def load_policy(found, bits, rank=32, target_modules=tuple(PARTS), temperature=1.0, seed=0,
                gradient_checkpointing=0):
    """Return (Policy, its PolicyFiles) of a FoundModel, with its adapters where it has some.

    bits and what follows: as settings.resolve filled them in; adapters bring rank and parts of
    their own. ModelError where the model cannot be had, or its files do not belong together.
    """
    model, processor = open_model(found, int(bits))
    folder = Path(found.folder)
    if (folder / "manifest.json").exists():             # sft.py --full wrote it
        check(folder)
    if not folder.is_dir():
        folder = Path(cached_file(found.folder, "config.json")).parent
    depends, alpha = {"base model": hashes(folder)}, None
    if found.adapters:
        if (Path(found.adapters) / "manifest.json").exists():       # PEFT's own folders have none
            check(found.adapters, depends)
        depends["start adapters"] = hashes(found.adapters)
        own = adapter_settings(found.adapters)
        rank, alpha, target_modules = own["rank"], own["alpha"], own["target_modules"]
    # every kind of error: other people's numbers in other people's files
    with as_model_error(f"{found.folder!r} with its tokenizer and chat template", Exception):
        policy = Policy(model, processor, rank, alpha, target_modules, temperature, seed,
                        gradient_checkpointing)
        policy.encode([np.zeros((300, 300, 3), np.uint8)], ["Hello"])       # now, not after an hour
    if found.adapters:
        load_adapters(policy.lora, found.adapters)
    elif target_modules and not policy.lora:
        raise ModelError(
            f"{found.folder!r} has no linear layer in {', '.join(target_modules)} "
            "(--target-modules): nothing would learn")
    return policy, PolicyFiles(found.base, depends)


def open_model(found, bits):
    """policy.load_model of a FoundModel, with errors that say what to do."""
    name = found.folder
    stored_bits = 8 * (found.config.dtype or torch.float16).itemsize
    if found.is_quantised:
        stored, stored_bits = found.config.quantization_config, 4
        if not (bits == 4 and stored.get("load_in_4bit")):
            raise ModelError(
                f"{name!r} is stored quantised ({stored.get('quant_method')}), not in {bits} bits: "
                "bitsandbytes' 4 bits are read with --bits 4, of others pass the whole model")
    check_weights(name, bits, found.device, stored_bits)
    try:
        # every kind of error: other people's code on other people's files
        with as_model_error(
                f"{name!r} does not load whole (a file missing, cut off, or neither here nor to be "
                "had?), so it", Exception):
            model, processor = load_model(name, bits, found.device)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise ModelError(
            f"{name!r} does not fit into memory in {bits} bits: try --bits 4, close other "
            "programs, or use --model pocket.") from error
    if not getattr(processor, "chat_template", None):
        raise ModelError(
            f"{name!r} has no chat template: use a chat model with its whole processor")
    return model, processor
