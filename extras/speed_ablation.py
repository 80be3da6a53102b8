"""What each choice for speed is worth: one whole update of the pocket model with each of them undone, or tried, alone.

    python -m extras.speed_ablation --repeats 8 --num-steps 2 --out results/bench/speed_ablation.json

Every round measures all of them, one after another, so that a busy neighbour slows all alike; the fastest round
counts. The policy is the same for all: learning rate 0, no early end. Prints a table; the last line is one JSON object
with {name: [seconds playing, seconds learning]} in `seconds`. Does not handle: what needs a GPU (CUDA graphs, 8-bit
Adam).
"""

import argparse
import contextlib
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import rollout
from extras import bench
from extras.machine import machine
from plumbing.settings import Settings
from policy import Policy
from train import Run, make_policy
from vlm.loading import open_model
from vlm.lora import LoRALinear


# ---- the ways it is not done -----------------------------------------------------------------------------------------
def own_padding(logprobs, self, prompts, responses, shape=None):
    """Policy.logprobs, each micro-batch padded to its own longest: in bf16 the ratio is then not 1 before a step."""
    return logprobs(self, prompts, responses)


def head_everywhere(self, prompts, responses, shape=None):
    """Policy.logprobs with the head and the softmax on every position, the prompt's too."""
    B = len(prompts)
    if shape:
        prompts, responses = ([*part, *part[:1] * (shape[0] - B)] for part in (prompts, responses))
    ids, mask, positions, P, T = self._collate(prompts, responses, shape)
    self._set_mode(train=False)
    hidden = self._body(ids, mask, positions, self.image_features(prompts)).last_hidden_state[:B]
    ids, mask = ids[:B], mask[:B]
    logp = self._log_softmax(hidden)[:, P - 1:P + T - 1].gather(-1, ids[:, P:, None]).squeeze(-1)
    mask = mask[:, P:].float()
    return torch.where(mask > 0, logp, 0.0), mask, self.value_head(hidden[:, P - 1])


def value_apart(logprobs, self, prompts, responses, shape=None):
    """Policy.logprobs with the value from a pass of its own, over the prompt alone."""
    logp, mask, _ = logprobs(self, prompts, responses, shape)
    return logp, mask, self.value_head(self.prompt_hidden(prompts))


def scored_alone(score, self, rollout, settings):
    """rollout.score_rollout, one answer at a time."""
    shapes, rollout.shapes = rollout.shapes, [shape._replace(rows=1) for shape in rollout.shapes]
    score(self, rollout, settings)
    rollout.shapes = shapes


def scaled_wide(layer, x):
    """LoRALinear.forward with α/r on its wide side."""
    return layer.base(x) + layer.scale * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


def merged_while_writing(generate, self, *arguments):
    """Policy.generate on weights that hold their adapters."""
    with torch.no_grad(), swapped(LoRALinear, "forward", lambda layer, x: layer.base(x)):
        for layer in self.lora.values():
            layer.base.weight += layer.scale * layer.lora_B @ layer.lora_A
        responses = generate(self, *arguments)
        for layer in self.lora.values():
            layer.base.weight -= layer.scale * layer.lora_B @ layer.lora_A
    return responses


@contextlib.contextmanager
def swapped(where, name, replacement):
    """Let where.name be the replacement while the context lasts."""
    before = getattr(where, name)
    setattr(where, name, replacement)
    try:
        yield
    finally:
        setattr(where, name, before)


def around(where, name, wrapper):
    """Replace where.name by a call of wrapper(what it was, *its arguments), while the context lasts."""
    before = getattr(where, name)
    return swapped(where, name, lambda *arguments: wrapper(before, *arguments))


def look_anew(self, prompts):
    """Policy.image_features without keeping any."""
    return self.family.see([prompt.images for prompt in prompts])


def choices():
    """{name: (changed settings, a context to play and learn in)}; the first is the way it is done."""
    found = {name: ({}, context) for name, context in {
        "as shipped": contextlib.nullcontext,
        "micro-batches padded to their own longest": lambda: around(Policy, "logprobs", own_padding),
        "head on every position": lambda: swapped(Policy, "logprobs", head_everywhere),
        "value from a pass of its own": lambda: around(Policy, "logprobs", value_apart),
        "old log-probabilities one by one": lambda: around(bench, "score_rollout", scored_alone),
        "no end at the closing brace": lambda: swapped(rollout, "json_closed", lambda text: False),
        "α/r on LoRA's wide side": lambda: swapped(LoRALinear, "forward", scaled_wide),
        "adapters merged while playing": lambda: around(Policy, "generate", merged_while_writing),
        "bf16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.items()}
    frozen = {"target_modules": ("language",)}
    found["vision frozen, looked at anew"] = frozen, lambda: swapped(Policy, "image_features", look_anew)
    for name, changed in {"vision frozen, looked at once": frozen,
                          "gradient checkpointing": {"gradient_checkpointing": 1},
                          "8 games written at once": {"play_batch_size": 8}, "LoRA rank 16": {"rank": 16},
                          **{f"micro-batches of {size}": {"micro_batch_size": size} for size in (16, 32, 128)}}.items():
        found[name] = (changed, contextlib.nullcontext)
    return found


def measure(repeats, num_steps, task="blackjack"):
    """{name: [seconds playing, seconds learning]} of one update, each the fastest of `repeats`."""
    runs = {}
    for name, (changed, context) in choices().items():
        settings = Settings(task=task, model="pocket", num_steps=num_steps, lr=0.0, value_lr=0.0, target_kl=0.0,
                            **changed)
        runs[name] = context, Run(settings, make_policy(settings, loaded=open_model("pocket")))
    fastest = {name: [float("inf")] * 2 for name in runs}
    for _, (name, (context, run)) in itertools.product(range(repeats), runs.items()):
        with context():
            fastest[name] = [min(pair) for pair in zip(fastest[name], bench.one_update(run)[2:])]
        print(f"{name:35} {fastest[name][0]:6.2f} {fastest[name][1]:6.2f}", flush=True)
    return fastest


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=Settings.num_steps, help="of each of 64 games per update")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    found = machine(torch.device("cpu")) | {"repeats": options.repeats, "num_steps": options.num_steps,
                                            "seconds": measure(options.repeats, options.num_steps)}
    if options.out:
        Path(options.out).write_text(json.dumps(found, ensure_ascii=False) + "\n")
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
