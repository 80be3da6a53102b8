"""Measure this machine: rollout, PPO update, memory, and how fast they are beside plain arithmetic.

    python -m lab.bench                         # the pocket model on Blackjack
    python -m lab.bench --profile               # where the time goes
    python -m lab.bench --updates 200 --num-steps 2             # a leak would raise its peak
    python -m lab.bench --model llava-7b-random --memory-gb 24  # 7B's shape; without a GPU its plan

Prints a table; the last line is one JSON object with every figure (also to --out). Speed and memory
do not depend on the weights' values, so `llava-7b-random` needs no download (shapes.py). Some
figures' meanings: mfu is the share of a plain matrix product's rate that learning reaches;
decode_tokens_per_s is of the steps that follow a prompt alone, play_tokens_per_s of all that comes
before learning; plain_… is decoding without a captured step, whose kernels can be counted. Does not
handle: whether anything is learned (eval.py).
"""

import argparse
import functools
import json
import math
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lab.shapes import byte_processor, llava_7b_config, random_model
from plumbing.adapters import PolicyFiles
from plumbing.errors import in_words
from plumbing.flags import SIZES_HELP, add_flags
from plumbing.loading import find_model
from plumbing.memory import ANSWER_TOKENS, memory_plan, peak, prompt_size
from plumbing.settings import Settings, resolve
from policy import Policy
from ppo import ppo_update
from rollout import add_advantages, collect, score_rollout
from train import Run, make_policy

GIB = 2**30
RANDOM_7B = "llava-7b-random"
FLAGS = ("num_envs", "num_steps", "update_epochs", "bits", "gradient_checkpointing",
         "micro_batch_size", "play_batch_size", "compile")


# ---- the machine (Linux: memory and processor are read from /proc) ---------------------------
def timed(device, function, *arguments):
    """(What a call returns, its seconds), the device's queue emptied before and after."""
    wait = torch.get_device_module(device).synchronize
    wait()
    begun = time.perf_counter()
    result = function(*arguments)
    wait()
    return result, time.perf_counter() - begun


def matmul_rate(device, dtype):
    """Highest FLOP/s seen of a square matrix product: what "100 %" means on this machine."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    a @ b       # the first one takes longer
    return 2 * size**3 / min(timed(device, torch.matmul, a, b)[1] for _ in range(5))


def peak_memory(device):
    """GiB at the highest: of what torch holds of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        _, _, found = Path("/proc/cpuinfo").read_text().partition("model name\t: ")
        name = f"{found.partition(chr(10))[0]}, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__}


def best_device():
    """Where models run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- counting ----------------------------------------------------------------------------------
def flops_a_sample(policy, prompts, responses):
    """FLOPs that learning from a sample needs, forward and backward, by torch's own counter.

    A mean over the samples, each without padding. What gradient checkpointing computes again is not
    counted, for no result needs it.
    """
    checkpointing, policy.gradient_checkpointing = policy.gradient_checkpointing, False
    # subtle: the counter does not know the CPU's fused attention; on a GPU this one saves memory
    kinds = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kinds), FlopCounterMode(display=False) as counter:
        for prompt, response in zip(prompts, responses):
            logp, value = policy.logprobs([prompt], [response])
            (logp.sum() + value.sum()).backward()
    policy.zero_grad()
    policy.gradient_checkpointing = checkpointing
    return counter.get_total_flops() / len(prompts)


class Kernels(TorchDispatchMode):
    """Counts the operations that a GPU would launch, all but views."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        self.number += not function.is_view
        return function(*arguments, **(more or {}))


# ---- measuring ---------------------------------------------------------------------------------
def decoding(policy, prompts, tokens=ANSWER_TOKENS):
    """(tokens a second, kernels a step) of decoding alone, without the reading of the prompts.

    It is the difference between long answers and answers of one token.
    """
    own, found = policy.end_tokens, []
    write = functools.partial(
        policy.generate, prompts, torch.Generator(policy.device).manual_seed(0), tokens)
    write()                                 # a step is captured here, where it can be
    for ends in ({*range(len(policy.suppress_tokens))}, set()):
        policy.end_tokens = ends
        with Kernels() as counted:
            write()
        found.append((timed(policy.device, write)[1], counted.number))
    policy.end_tokens = own
    seconds, launched = (long - short for short, long in zip(*found))
    return len(prompts) * (tokens - 1) / seconds, launched / (tokens - 1)


def play(run):
    """A rollout that is ready to learn from."""
    rollout = collect(run.policy, run.games, run.settings, run.sampling, run.fallback)
    score_rollout(run.policy, rollout, run.settings)
    add_advantages(run.policy, rollout, run.settings)
    return rollout


def one_update(run):
    """Play and learn once: (rollout, what ppo_update says, seconds of playing, of learning)."""
    device = run.policy.device
    rollout, playing = timed(device, play, run)
    learned, learning = timed(
        device, ppo_update, run.policy, run.optimizer, rollout, run.settings, run.shuffling)
    return rollout, learned, playing, learning


def measure(run, updates):
    """A dict of figures, means over `updates` whole updates after a short one to warm up."""
    policy, settings, device = run.policy, run.settings, run.policy.device
    run.settings = replace(settings, num_steps=math.ceil(2 / settings.num_envs))
    one_update(run)
    run.settings = settings
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ratio_errors, rows = [], []
    for _ in range(updates):
        rollout, learned, playing, learning = one_update(run)
        prompt_tokens = sum(len(prompt.ids) for prompt in rollout.prompts)
        answer_tokens = sum(map(len, rollout.responses))
        rows.append((playing, learning, prompt_tokens, answer_tokens))
        ratio_errors.append(learned["ratio_error"])
    highest = peak_memory(device)

    playing, learning, prompt_tokens, answer_tokens = (
        sum(column) / updates for column in zip(*rows))
    some, decoded, own = rollout.prompts[:settings.play_batch_size], {}, policy.decoding
    for name, kind in (("plain_", own.replace("captured", "fixed")), ("", own)):
        policy.decoding, policy.cache = kind, None
        rate, launched = decoding(policy, some)
        decoded |= {f"{name}decode_tokens_per_s": rate, f"{name}kernels_a_step": launched}
    samples, learned = settings.batch_size, settings.batch_size * settings.update_epochs
    flops = flops_a_sample(policy, rollout.prompts[:8], rollout.responses[:8])
    rate = matmul_rate(device, policy.model.dtype)
    return {
        "env_steps_per_s": samples / playing, "play_tokens_per_s": answer_tokens / playing,
        **decoded, "samples_per_s": learned / learning, "ratio_error": max(ratio_errors),
        "rollout_s": playing, "update_s": learning, "whole_update_s": playing + learning,
        "answer_tokens": answer_tokens / samples, "prompt_tokens": prompt_tokens / samples,
        "peak_memory_gib": highest, "matmul_tflops": rate / 1e12,
        "mfu": learned * flops / learning / rate}


def profile(run):
    """Print the ten operations that take longest in playing a step and learning from it once."""
    run.settings = replace(run.settings, num_steps=1, update_epochs=1)
    with torch.profiler.profile() as trace:
        one_update(run)
    by = f"self_{run.policy.device.type}_time_total"
    print(trace.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=50))


# ---- LLaVA-1.6-7B's shape ----------------------------------------------------------------------
def plan_7b(settings):
    """memory_plan in GiB, and its peak."""
    processor = byte_processor()
    config = llava_7b_config(processor)
    plan = memory_plan(config, settings, prompt_size(config, processor, settings.task))
    return {use: size / GIB for use, size in (plan | {"peak": peak(plan)}).items()}


def random_7b(settings, device):
    """(A policy of that shape whose answers all have max_new_tokens tokens, its files)."""
    processor = byte_processor()
    model = random_model(llava_7b_config(processor), device, settings.bits)
    policy = Policy(
        model, processor, settings.rank, temperature=settings.temperature, seed=settings.seed,
        gradient_checkpointing=settings.gradient_checkpointing)
    policy.may_close = set()
    policy.suppress_tokens[policy.tokenizer.eos_token_id] = True
    return policy, PolicyFiles(RANDOM_7B)


# ---- the command line --------------------------------------------------------------------------
def bare_parser(description):
    """A parser that has --out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def finish(figures, out):
    """Print the figures as one line of JSON, and write them to a file where one was named."""
    line = json.dumps(figures)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(line + "\n")
    print(line)


def make_parser():
    parser = bare_parser(__doc__)
    parser.epilog = SIZES_HELP
    parser.add_argument(
        "--model", default="pocket", help=f"pocket, {RANDOM_7B}, a hub name or a folder")
    parser.add_argument("--task", default="blackjack")
    add_flags(parser, Settings, FLAGS)
    parser.add_argument(
        "--updates", type=int, default=2, help="updates to measure, after one to warm up [2]")
    parser.add_argument("--memory-gb", type=float, help="cap of torch's memory on the GPU, in GiB")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    cap, device = options.memory_gb, best_device()
    if options.updates < 1 or cap is not None and not cap > 0:
        parser.error("--updates and --memory-gb must be above 0")
    if cap and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    # no early end: every update does the same work
    given = {"task": options.task, "model": options.model, "target_kl": 0.0, "sft_steps": 0}
    given |= {
        name: value for name, value in vars(options).items() if name in FLAGS and value != "auto"}
    found = None
    with in_words():
        if options.model == RANDOM_7B:
            given = {"bits": "4", "max_new_tokens": ANSWER_TOKENS} | given
        else:
            found = find_model(options.model, options.task)
        # and a rate of 0, so on the same policy
        settings = replace(resolve(Settings, given, found), lr=0.0, value_lr=0.0)
        figures = {name: getattr(settings, name) for name in ("model", "task", *FLAGS)}
        figures |= machine(device)
        if not found:
            figures["memory_plan_gib"] = plan_7b(settings)
        if found or device.type == "cuda":
            policy, files = make_policy(settings) if found else random_7b(settings, device)
            run = Run(settings, policy, files)
            figures |= measure(run, options.updates)
            if options.profile:
                profile(run)
        for name, value in figures.items():
            print(f"{name:24} {value}")
        finish(figures, options.out)


if __name__ == "__main__":
    main()
