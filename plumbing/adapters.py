"""A policy's files: LoRA adapters in PEFT's own format, the value head beside them.

    files = PolicyFiles("pocket", {"base model": hashes("checkpoints/pocket")})
    files.save(policy, "adapters")              # the peft library reads this folder
    files.load(policy, "adapters")
    adapter_settings("adapters")                # the Policy arguments that fit it

Does not handle: the adapters themselves (lora.py), other kinds of adapters than plain LoRA.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families import part_of_path
from plumbing.errors import as_model_error


@dataclass
class PolicyFiles:
    """How a policy is written and read, and for which base model."""

    base_name: str              # the model that the adapters are made for
    depends: dict = field(default_factory=dict)     # what a manifest holds them to (manifest.py)

    def save(self, policy, folder):
        """Write the adapters and, in value_head.safetensors, the value head."""
        save_adapters(policy.lora, folder, self.base_name, policy.rank, policy.alpha)
        head = {
            name: tensor.cpu().contiguous()
            for name, tensor in policy.value_head.state_dict().items()
        }
        save_file(head, Path(folder) / "value_head.safetensors")

    def load(self, policy, folder):
        """Read all that save wrote; ModelError where it is damaged, or another model's."""
        load_adapters(policy.lora, folder)
        load_value_head(policy.value_head, folder)


def load_value_head(value_head, folder):
    """Read the value head that PolicyFiles.save wrote."""
    file = Path(folder) / "value_head.safetensors"
    with as_model_error(file):
        stored, own = load_file(file), value_head.state_dict()
        if {name: tensor.shape for name, tensor in stored.items()} != {
            name: own[name].shape for name in own
        }:
            raise ValueError("not a value head of this version and model")
        value_head.load_state_dict(stored)


# ---- adapters ----------------------------------------------------------------------------------
# prefixes of paths before transformers 4.52, of LLaVA's and Qwen's models, and what they became
OLD = {
    "language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.", "visual.": "model.visual.",
    "model.layers.": "model.language_model.layers."}


def _key(path, matrix):
    return f"base_model.model.{path}.lora_{matrix}.weight"      # PEFT's names


def _new_key(key):
    """A stored tensor's name as it is today.

    >>> _new_key("base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight")
    'base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight'
    """
    path = key.removeprefix("base_model.model.")
    old = next((prefix for prefix in OLD if path.startswith(prefix)), "")
    return "base_model.model." + OLD.get(old, "") + path.removeprefix(old)


def save_adapters(layers, folder, base_name, rank, alpha):
    """Write {module path: LoRALinear} as adapter_config.json and adapter_model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, layer in layers.items():
        tensors[_key(path, "A")] = layer.lora_A.detach().cpu().contiguous()
        tensors[_key(path, "B")] = layer.lora_B.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_name),
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(layers), "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_adapters(layers, folder):
    """Read a folder of adapters, ours or PEFT's, into {module path: LoRALinear}.

    ModelError where it adapts other layers, or has other shapes.
    """
    file = Path(folder) / "adapter_model.safetensors"
    with as_model_error(file), torch.no_grad():
        tensors = {_new_key(key): tensor for key, tensor in load_file(file).items()}
        expected = {_key(path, matrix) for path in layers for matrix in "AB"}
        if set(tensors) != expected:
            other = min(expected ^ set(tensors))
            raise ValueError(f"it adapts other layers than this policy, such as {other}")
        for path, layer in layers.items():
            for matrix, weight in (("A", layer.lora_A), ("B", layer.lora_B)):
                stored = tensors[_key(path, matrix)]
                if stored.shape != weight.shape:
                    raise ValueError(
                        f"{path} has shape {tuple(stored.shape)}, this policy "
                        f"{tuple(weight.shape)}: another rank or another base model"
                    )
                if not stored.is_floating_point():
                    raise ValueError(f"{path} holds {stored.dtype}, no adapter's numbers")
                weight.copy_(stored)


def base_name(folder):
    """The name of the model that a folder of adapters was made for."""
    return _config(folder)["base_model_name_or_path"]


def adapter_settings(folder) -> dict:
    """The Policy arguments (rank, alpha, target_modules by path) that fit a folder of adapters."""
    config, file = _config(folder), Path(folder) / "adapter_model.safetensors"
    # Read off the weights: PEFT shortens long lists of target_modules, and may adapt some layers.
    with as_model_error(file), safe_open(file, "pt") as tensors:
        keys = list(tensors.keys())
        layers = tuple(sorted({
            _new_key(key).removeprefix("base_model.model.").rpartition(".lora_")[0]
            for key in keys}))
        ranks = {
            tensors.get_slice(key).get_shape()[0] for key in keys if key.endswith("lora_A.weight")
        }
        if ranks != {config["r"]}:          # before so much memory is asked for
            raise ValueError(
                f"its matrices have ranks {sorted(ranks)}, adapter_config.json says {config['r']}"
            )
        if other := [path for path in layers if not part_of_path(path)]:
            raise ValueError(f"it adapts {other[0]}, which is in no part that learns here")
    return {"rank": config["r"], "alpha": config["lora_alpha"], "target_modules": layers}


# What PEFT can ask for and LoRALinear does not do.
OTHER_KINDS = (
    "use_rslora", "use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "bias", "alora_invocation_tokens", "fan_in_fan_out", "layer_replication", "target_parameters")


def _config(folder):
    """adapter_config.json; ModelError where it is damaged, or asks for what we do not do."""
    file = Path(folder) / "adapter_config.json"
    with as_model_error(file):
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
        nothing = (None, False, "none", {}, [])
        asked = [name for name in OTHER_KINDS if config.get(name) not in nothing]
        if asked or config.get("peft_type") != "LORA":
            raise ValueError(
                f"{config.get('peft_type')} {', '.join(asked)}: adapters of another kind than "
                "plain LoRA")
    return config
