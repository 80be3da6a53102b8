"""What each choice for speed is worth: one whole update of the pocket model with each of them undone, or tried, alone.

    python choices.py --repeats 8 --rollout 128 --out results/bench/choices.json       # the README's table

Every round measures all of them, one after another, so that a busy neighbour slows all alike; the fastest round
counts. The policy is the same for all: learning rate 0, no early end. Prints a table; the last line is one JSON object
with {name: [seconds playing, seconds learning]} in `seconds`. Does not handle: what needs a GPU (CUDA graphs, 8-bit
Adam).
"""

import argparse
import contextlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import eval as evaluation
import policy
import ppo
import train
from bench import machine, one_update
from lora import LoRALinear
from policy import Policy
from settings import Settings
from train import Run, make_policy


# ---- the ways it is not done -----------------------------------------------------------------------------------------
def as_they_come(prompts, responses, size, indices=None):
    """ppo.by_length without the sorting."""
    order = list(range(len(prompts)) if indices is None else indices)
    return [order[k:k + size] for k in range(0, len(order), size)]


def head_everywhere(self, prompts, responses):
    """Policy.logprobs with the head and the softmax on every position, the prompt's too."""
    ids, mask, positions, P, T = self._collate(prompts, responses)
    hidden = self._body(ids, mask, positions, self.image_features(prompts)).last_hidden_state
    logp = self._log_softmax(hidden)[:, P - 1:P + T - 1].gather(-1, ids[:, P:, None]).squeeze(-1)
    mask = mask[:, P:].float()
    return torch.where(mask > 0, logp, 0.0), mask, self.value_head(hidden[:, P - 1])


def value_apart(logprobs, self, prompts, responses):
    """Policy.logprobs with the value from a pass of its own, over the prompt alone."""
    logp, mask, _ = logprobs(self, prompts, responses)
    return logp, mask, self.value_head(self.states(prompts))


def scored_alone(score, self, rollout, settings):
    """ppo.score_rollout, one answer at a time."""
    return score(self, rollout, replace(settings, micro_batch=1))


def scaled_wide(layer, x):
    """LoRALinear.forward with α/r on its wide side."""
    return layer.base(x) + layer.scale * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


def merged_while_writing(generate, self, *arguments):
    """Policy.generate on weights that hold their adapters."""
    with torch.no_grad(), mock.patch.object(LoRALinear, "forward", lambda layer, x: layer.base(x)):
        for layer in self.lora.values():
            layer.base.weight += layer.scale * layer.lora_B @ layer.lora_A
        responses = generate(self, *arguments)
        for layer in self.lora.values():
            layer.base.weight -= layer.scale * layer.lora_B @ layer.lora_A
    return responses


def around(where, name, wrapper):
    """Replace where.name by a call of wrapper(what it was, *its arguments), while the context lasts."""
    before = getattr(where, name)
    return mock.patch.object(where, name, lambda *arguments: wrapper(before, *arguments))


def choices():
    """{name: (changed settings, a context to play and learn in)}; the first is the way it is done."""
    put = mock.patch.object
    found = {name: ({}, context) for name, context in {
        "as shipped": contextlib.nullcontext,
        "answers not sorted by length": lambda: put(ppo, "by_length", as_they_come),
        "head on every position": lambda: put(Policy, "logprobs", head_everywhere),
        "value from a pass of its own": lambda: around(Policy, "logprobs", value_apart),
        "old log-probabilities one by one": lambda: around(train, "score_rollout", scored_alone),
        "no end at the closing brace": lambda: put(evaluation, "json_closed", lambda text: False),
        "pictures prepared by one thread": lambda: put(policy, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(1)),
        "α/r on LoRA's wide side": lambda: put(LoRALinear, "forward", scaled_wide),
        "adapters merged while playing": lambda: around(Policy, "generate", merged_while_writing),
        "bf16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "vision frozen, looked at anew": lambda: put(Policy, "image_features", Policy._see),
    }.items()}
    found["vision frozen, looked at anew"][0]["lora_on"] = ("language",)
    for name, changed in {"vision frozen, looked at once": {"lora_on": ("language",)},
                          "gradient checkpointing": {"gradient_checkpointing": True},
                          "8 games written at once": {"play_batch": 8}, "LoRA rank 16": {"rank": 16},
                          **{f"micro-batches of {size}": {"micro_batch": size} for size in (16, 32, 128)}}.items():
        found[name] = (changed, contextlib.nullcontext)
    return found


def measure(repeats, rollout, task="blackjack"):
    """{name: [seconds playing, seconds learning]} of one update, each the fastest of `repeats`."""
    runs = {}
    for name, (changed, context) in choices().items():
        settings = Settings(task=task, model="pocket", rollout=rollout, lr=0.0, value_lr=0.0, target_kl=0.0,
                            **changed)
        runs[name] = context, Run(settings, *make_policy(settings))
    fastest = {name: [float("inf")] * 2 for name in runs}
    for _, (name, (context, run)) in itertools.product(range(repeats), runs.items()):
        with context():
            fastest[name] = [min(pair) for pair in zip(fastest[name], one_update(run)[1:])]
        print(f"{name:35} {fastest[name][0]:6.2f} {fastest[name][1]:6.2f}", flush=True)
    return fastest


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollout", type=int, default=512, help="environment steps an update, a multiple of 64")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    found = machine(torch.device("cpu")) | {"repeats": options.repeats, "rollout": options.rollout,
                                              "seconds": measure(options.repeats, options.rollout)}
    if options.out:
        Path(options.out).write_text(json.dumps(found, ensure_ascii=False) + "\n")
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
