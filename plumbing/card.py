"""The model card beside saved adapters: README.md as Hugging Face's hub reads it, front matter first.

    write_run_card(run, folder, part)                       # train.py's checkpoints
    write_sft_card(settings, loaded, part)                  # sft.py's result

A card says what is known when it is written: held-out games are played before the first update and after the last
checkpoint, so between them it has the last rollout's. No clock, and nothing of where the run is written: one that is
resumed writes the same bytes. Does not handle: whole models (sft.py --full), adapters of other programs.
"""

import dataclasses
import json
import shlex
from dataclasses import fields
from pathlib import Path

from plumbing.errors import foreign
from plumbing.interval import wilson
from plumbing.settings import WORLD, fill_in, with_task_defaults
from vlm.families import PARTS
from vlm.loading import LLAVA_7B, SHIPPED, is_small

# Only what is certain; of any other base the card says to look there.
LICENCES = {**dict.fromkeys(SHIPPED, "mit"), LLAVA_7B: "apache-2.0", "Qwen/Qwen3-VL-2B-Instruct": "apache-2.0",
            "Qwen/Qwen3-VL-4B-Instruct": "apache-2.0"}
PLAYING = ("bits", "temperature", "cot", "max_new_tokens", *WORLD)      # of the settings, what eval.py takes

CARD = """\
---
{front}
---
# {title}

The model sees a picture of a game and the legal actions, and answers in JSON: its thoughts, then an action.

| | |
| --- | --- |
{rows}

Trained by `{command}`. Sizes of batches that are for memory alone are left out of it.

Evaluate, from the root of the code that trained it: `{evaluate}`

Load with PEFT, where `FOLDER` is this one:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "FOLDER")
```

That code shows LLaVAs one view of the picture: extras/README.md, "Leaving with your model", has what else that takes.
The model is `adapter_config.json` and `adapter_model.safetensors`; what else is here, training goes on with.
`manifest.json` has a hash of this card too: edit a copy.
"""


def write_run_card(run, folder, part):
    """Write the card of a run's checkpoint into `part`, from the run's folder; none of what is no PEFT adapter."""
    if not (part / "adapter_config.json").exists():
        return
    settings = run.settings
    rows = {"learned": f"{run.update} of {settings.num_updates} updates by PPO, "
                       f"{run.update * settings.batch_size:,} environment steps",
            "success before RL": _held_out(folder / "eval_start.json"),
            "success in the last rollout": _last_rollout(folder / "metrics.jsonl", run.update),
            "success after RL": "in the run folder's eval.json, which is written after the last checkpoint"
                                if settings.eval_episodes else "not measured"}
    title = f"LoRA adapters that play {settings.task}, trained by PPO on the game's reward"
    now = dataclasses.replace(settings, temperature=settings.temperature_at(run.update))
    _write(part, title, "train.py", settings, run.policy.base_name, is_small(run.policy.model.config), rows, now)


def write_sft_card(settings, loaded, part):
    """Write the card of a finished run of supervised fine-tuning into `part`."""
    rows = {"learned": f"{settings.steps} batches of {settings.batch_size} demonstrations", "success": "not measured"}
    title = f"LoRA adapters for {settings.task}, by supervised fine-tuning on an expert's play"
    _write(part, title, "sft.py", settings, loaded.base, is_small(loaded.config), rows)


def _write(part, title, script, settings, base, small, rows, playing=None):
    """playing: settings with the temperature that the adapters are for, where these are not those of learning."""
    licence = LICENCES.get(base)
    on_the_hub = base not in SHIPPED and not Path(base).is_absolute()           # the hub refuses any other base_model
    place = str(Path("checkpoints", base)) if base in SHIPPED else base
    front = [f"base_model: {base}"] * on_the_hub + [
        "library_name: peft", f"license: {licence or 'unknown'}", "pipeline_tag: image-text-to-text", "tags:",
        "- lora", "- vision-language-model", *["- reinforcement-learning", "- ppo"] * (script == "train.py")]
    rows = {"task": settings.task, "seed": settings.seed,
            "base model": f"[{base}](https://huggingface.co/{base})" if on_the_hub else
                          f"`{place}`" + " of the code's repository" * (base in SHIPPED),
            "licence": f"{licence}, the base model's" if licence else "see the base model's card",
            "adapters": f"rank {settings.rank} on {', '.join(settings.target_modules or PARTS)}", **rows}
    task = ["--task", settings.task]
    command = ["python", script, *task, "--model", settings.model,
               *_flags(settings, [entry.name for entry in fields(settings)], small)]
    evaluate = ["python", "eval.py", *task, "--model", "FOLDER", *_flags(playing or settings, PLAYING, small)]
    (part / "README.md").write_text(CARD.format(
        front="\n".join(front), title=title, rows="\n".join(f"| {name} | {said} |" for name, said in rows.items()),
        command=shlex.join(command), evaluate=shlex.join(evaluate), base=place), encoding="utf-8")


def _flags(settings, names, small):
    """The flags that give those of the named settings that are not as by default, such as ["--seed", "2"]."""
    default = with_task_defaults(type(settings), {"task": settings.task, "target_modules": tuple(PARTS)})
    fill_in(default, small)
    if getattr(settings, "temperature", None) != getattr(default, "temperature", None):
        default.temperature_end = settings.temperature      # a temperature that is given alone stays
    words = []
    for name in names:
        value, flag = getattr(settings, name, None), name.replace("_", "-")
        if value is None or name in ("task", "model", *settings.free) or value == getattr(default, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return words


def _held_out(path):
    if not path.exists():
        return "not measured"
    with foreign(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        return (_share(result["success"], result["success_low"], result["success_high"])
                + f" of {result['episodes']:,} held-out games, dealt by seed {result['seed']} and the following ones")


def _last_rollout(path, update):
    """The success of the rollout before the last update, by the policy that this update then changed."""
    if update == 0 or not path.exists():
        return "not measured"
    with foreign(path):
        row = json.loads(path.read_text(encoding="utf-8").splitlines()[update - 1])
        episodes, success = row["episodes"], row["success"]
    if not episodes:
        return "no episode ended in it"
    return (_share(success, *wilson(round(success * episodes), episodes))
            + f" of the {episodes} episodes that ended in it, sampled while learning, before the last update")


def _share(success, low, high):
    return f"{100 * success:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})"
