"""LoRA by hand: frozen linear layers with a small learned correction, kept in PEFT's own file format.

    layers = add_lora(model, rank=32, alpha=64, target_modules=("vision", "language"), generator=torch.Generator())
    save_adapters(layers, "adapters", base_name="pocket", rank=32, alpha=64)       # the peft library reads this folder

Works on nn.Linear and on bitsandbytes' Linear4bit (a subclass) alike: only the layer's output is corrected.
Does not handle: dropout (old and new log-probabilities need one network), merging, embeddings, several adapters.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing.errors import foreign
from vlm.families import PARTS, part_of_path


class LoRALinear(nn.Module):
    """y = W x + (α/r) B A x  with W frozen (nn.Linear or bitsandbytes' Linear4bit); arXiv 2106.09685, equation 3.

    A (r, in) starts random, B (out, r) at zero: the adapted layer starts as the layer it adapts.
    A and B are kept in fp32, whatever W is in, and used in x's type.
    """

    def __init__(self, base, rank, alpha, generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        down = self.scale * F.linear(x, self.lora_A.to(x.dtype))                  # (…, r), the narrow side: cheap
        return self.base(x) + F.linear(down, self.lora_B.to(x.dtype))


def add_lora(model, rank, alpha, target_modules, generator) -> dict[str, LoRALinear]:
    """Replace every linear layer of the parts in target_modules (keys of PARTS) by its LoRALinear; freeze all else.

    Returns {module path: LoRALinear}, in the model's order. The output head is in no part: it stays as it is.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {}
    for path, module in list(model.named_modules()):
        if part_of_path(path) in target_modules and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            layers[path] = LoRALinear(module, rank, alpha, generator)
            setattr(model.get_submodule(parent), name, layers[path])
    return layers


def _key(path, matrix):
    return f"base_model.model.{path}.lora_{matrix}.weight"            # PEFT's names


def save_adapters(layers, folder, base_name, rank, alpha):
    """Write {module path: LoRALinear} as adapter_config.json and adapter_model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, layer in layers.items():
        tensors[_key(path, "A")] = layer.lora_A.detach().cpu().contiguous()
        tensors[_key(path, "B")] = layer.lora_B.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name),
              "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
              "target_modules": list(layers), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_adapters(layers, folder):
    """Read a folder of adapters into {module path: LoRALinear}; ValueError if it adapts other layers or shapes."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    expected = {_key(path, matrix) for path in layers for matrix in "AB"}
    if set(tensors) != expected:
        raise ValueError(f"{folder} adapts other layers than this policy, such as {min(expected ^ set(tensors))}")
    with torch.no_grad():
        for path, layer in layers.items():
            for matrix, weight in (("A", layer.lora_A), ("B", layer.lora_B)):
                stored = tensors[_key(path, matrix)]
                if stored.shape != weight.shape:
                    raise ValueError(f"{folder}: {path} has shape {tuple(stored.shape)}, this policy "
                                     f"{tuple(weight.shape)}: another rank or another base model")
                if not stored.is_floating_point():
                    raise ValueError(f"{folder}: {path} holds {stored.dtype}, no adapter's numbers")
                weight.copy_(stored)


def base_name(folder):
    """The name of the model that a folder of adapters was made for."""
    return _config(folder)["base_model_name_or_path"]


def _config(folder):
    """adapter_config.json; ModelError where it is damaged, or asks for what LoRALinear does not do."""
    file = Path(folder) / "adapter_config.json"
    with foreign(file):
        config = json.loads(file.read_text(encoding="utf-8"))
        for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
            if type(config[name]) not in kinds or not config[name] > 0:
                raise ValueError(f"{name} is {config[name]!r}, not a number above 0")
        if not config["target_modules"]:
            raise ValueError("target_modules must name some modules")
        if not isinstance(config["base_model_name_or_path"], str):
            raise ValueError("base_model_name_or_path must be a name")
        if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise ValueError("init_lora_weights: adapters whose base was changed for them")
        if strange := [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
                                         "bias") if config.get(name) not in (None, False, "none", {}, [])]:
            raise ValueError(f"{', '.join(strange)}: adapters of another kind than plain LoRA")
    return config


def adapter_settings(folder) -> dict:
    """The Policy arguments (rank, alpha, target_modules) that fit a folder of adapters."""
    config, file = _config(folder), Path(folder) / "adapter_model.safetensors"
    with foreign(file), safe_open(file, "pt") as tensors:   # not target_modules: PEFT shortens long lists of names
        found = {part_of_path(key.removeprefix("base_model.model.")) for key in tensors.keys()}
        ranks = {tensors.get_slice(key).get_shape()[0] for key in tensors.keys() if key.endswith("lora_A.weight")}
        if ranks != {config["r"]}:                          # before so much memory is asked for
            raise ValueError(f"its matrices have ranks {sorted(ranks)}, adapter_config.json says {config['r']}")
    parts = tuple(part for part in PARTS if part in found)
    return {"rank": config["r"], "alpha": config["lora_alpha"], "target_modules": parts}
