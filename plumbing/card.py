"""The model card beside saved adapters: README.md as Hugging Face's hub reads it.

    write_card(part, "train.py", settings, base_name="pocket", learned="512 steps of PPO")

No clock, and nothing of where the run is written: one that is resumed writes the same bytes.
"""

import shlex
from dataclasses import fields
from pathlib import Path

from env import find_game
from plumbing.loading import LLAVA_7B, SHIPPED

# Only what is certain; of any other base the card says to look there.
LICENCES = {**dict.fromkeys(SHIPPED, "mit"), LLAVA_7B: "apache-2.0"}

PLAYED_WITH = ("bits", "temperature", "cot", "max_new_tokens", "game")

CARD = """\
---
{base_model}library_name: peft
license: {licence}
pipeline_tag: image-text-to-text
tags:
- lora
---
# LoRA adapters that play {task}

The model sees a picture of a game and the legal actions, and answers in JSON: its thoughts, then an
action. {learned}, seed {seed}, rank {rank} on {parts}. Base model: `{base}`, whose licence holds.

Trained by `{command}`. Sizes of batches that are for memory alone are left out of it.

Evaluate, with the code that trained it: `{evaluate}`. Load with PEFT:
`PeftModel.from_pretrained(base, FOLDER)`. The model is adapter_config.json and
adapter_model.safetensors; what else is here, training goes on with. manifest.json has a hash of
this card too: edit a copy.
"""


def write_card(part, script, settings, base_name, learned):
    """Write the card into the folder `part`."""
    on_the_hub = base_name not in SHIPPED and not Path(base_name).is_absolute()
    command = ["python", script, "--task", settings.task, "--model", settings.model]
    evaluate = ["python", "eval.py", "--task", settings.task, "--model", "FOLDER"]
    (Path(part) / "README.md").write_text(CARD.format(
        # the hub refuses any other base_model
        base_model=f"base_model: {base_name}\n" if on_the_hub else "",
        licence=LICENCES.get(base_name, "unknown"), base=base_name, task=settings.task,
        learned=learned, seed=settings.seed, rank=settings.rank,
        parts=", ".join(settings.target_modules), command=shlex.join(command + flags_of(settings)),
        evaluate=shlex.join(evaluate + flags_of(settings, PLAYED_WITH)),
    ), encoding="utf-8")


def flags_of(settings, names=None):
    """The flags that make the same run on whatever model, such as ["--seed", "2"].

    names: of some settings alone.
    """
    words, game = [], find_game(settings.task)
    for entry in fields(settings):
        value, flag = getattr(settings, entry.name), entry.name.replace("_", "-")
        # a default that depends on model or game is named, whatever it is
        depends = entry.name in game.paper_settings | game.preferred_settings
        by_size = {entry.metadata["small"], entry.metadata["pocket"]} != {None}
        if entry.name in ("task", "model", "device", *settings.changeable) or (
                names and entry.name not in names) or (
                value == entry.default and not by_size and not depends):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif entry.name == "game":
            words += ["--game", *value]
        else:
            words += [f"--{flag}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return words
