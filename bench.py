"""Measure this machine: rollout, PPO update, memory, and how much of the arithmetic's own speed is reached.

    python bench.py                                  # the pocket model on Blackjack
    python bench.py --baseline                       # beside the published procedure: same model, games and answers
    python bench.py --profile                        # where the time goes
    python bench.py --updates 200 --rollout 128      # whether memory stays flat
    python bench.py --model llava-7b-random --memory-gb 24       # the 7B shape; without a GPU, its memory plan

Prints a table; the last line is one JSON object with every figure (also to --out). Speed and memory do not hang on
the weights' values, so `llava-7b-random` needs no download (shape7b.py).
How FLOPs are counted: see `update_flops`. Does not handle: whether anything is learned (eval.py);
machines other than Linux (memory and processor are read from /proc).
"""

import argparse
import functools
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from env import GAMES
from loading import Loaded, ModelError
from lora import PARTS, LoRALinear
from parse import make_prompt
from ppo import ppo_update
from settings import BY_SIZE, Settings
from shape7b import byte_processor, llava_7b_config, memory_plan, random_nf4
from train import Run, collect, make_policy

RANDOM_7B = "llava-7b-random"


# ---- what is measured against ------------------------------------------------------------------------------------
def matmul_rate(device, dtype, size=None, repeats=5):
    """Highest FLOP/s of a square matrix product seen in `repeats`: what "100 %" means on this machine."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
            for seed in (0, 1))
    a @ b
    return 2 * size ** 3 / min(seconds(lambda: a @ b, device) for _ in range(repeats))


def seconds(function, device):
    """Wall seconds of one call, the device's queue emptied before and after."""
    _wait(device)
    begun = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def update_flops(policy, prompt_tokens, answer_tokens):
    """(forward, forward and backward) FLOPs that scoring one sample needs, in matrix products alone.

    A frozen weight costs 2 FLOPs a token forward and 2 backward (its input's gradient; it needs none itself), an
    adapter's 2 and 4, attention's two products twice as much backward as forward. Vision weights see the I + 1
    patches, the projector I, the language model P + T (causal attention: half the square), the head T. No backward
    where nothing before it learns: the patch embedding, and a frozen weight beside the first adapters. Not counted:
    what gradient checkpointing computes again, padding, and layers behind `vision_feature_layer`.
    """
    I, length = policy.image_tokens, prompt_tokens + answer_tokens
    tokens = {"vision": I + 1, "projector": I, "language": length}
    config = policy.model.config
    vision, text = config.vision_config, config.text_config
    used = config.vision_feature_layer % (vision.num_hidden_layers + 1)           # layers before the features' own
    forward = I * 3 * vision.patch_size ** 2 * vision.hidden_size                # multiply-adds; the patch embedding
    backward = 0
    for path, module in policy.model.named_modules():
        part = next((part for part, prefix in PARTS.items() if path.startswith(prefix)), None)
        if part is None or part == "vision" and any(f".layers.{k}." in path
                                                    for k in range(used, vision.num_hidden_layers)):
            continue
        first = part == "vision" and ".layers.0.self_attn." in path and "out_proj" not in path
        if isinstance(module, LoRALinear):
            A, B = module.lora_A.numel(), module.lora_B.numel()
            forward += tokens[part] * (A + B)
            backward += tokens[part] * (2 * (A + B) - first * A)
        elif isinstance(module, nn.Linear):
            weights = tokens[part] * module.in_features * module.out_features
            forward += weights
            backward += (not first) * weights
    value_head = sum(p.numel() for p in policy.value_head.parameters())
    head = answer_tokens * text.hidden_size * text.vocab_size
    attention = used * 2 * (I + 1) ** 2 * vision.hidden_size
    attention += text.num_hidden_layers * length ** 2 * text.num_attention_heads * text.head_dim
    forward += head + value_head + attention
    return 2 * forward, 2 * (forward + backward + head + 2 * value_head + 2 * attention)


# ---- the published procedure ---------------------------------------------------------------------------------------
def published_update(run, rollout, samples, longest):
    """(seconds playing, seconds learning) of the published code's way through a rollout's steps, on the same model.

    Playing, one game at a time: write the answer token by token (of the stored length, so that both procedures write
    equally much), then score it in a second pass over the answer padded to `longest` tokens (published: twice the
    maximum), with the logits and all hidden states of every position. Learning: the same pass with gradients, one
    answer at a time, an optimiser step every `minibatch` answers, `epochs` times. No gradient checkpointing, as
    there. Left out, in its favour: the games' time, preparing pictures, bootstrap values, clipping gradients.
    Measured on the first `samples` steps after one to warm up, scaled to the rollout; optimiser steps apart.
    """
    settings, policy, device = run.settings, run.policy, run.policy.device
    stored = list(zip(rollout.prompts, rollout.responses))

    def images(prompt):
        return {"image": BaseModelOutputWithPooling(pooler_output=list(policy.image_features([prompt])))}

    def score(prompt, response):
        padded = response + [0] * (longest - len(response))
        ids, mask, positions, P, _ = policy._collate([prompt], [padded])
        out = policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True,
                           mm_encoder_outputs=images(prompt))
        logp = (out.logits.float() / policy.temperature).log_softmax(-1)
        logp = logp[:, P - 1:-1].gather(-1, ids[:, P:, None]).squeeze(-1)[:, :len(response)]
        return logp.sum() + policy.value_head(out.hidden_states[-1][:, P - 1].float()).sum()

    @torch.no_grad()
    def play(count):
        for prompt, response in stored[:count]:
            ids, mask, positions, _, _ = policy._collate([prompt])
            cache, features = None, images(prompt)
            for token in response:
                out = policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                   mm_encoder_outputs=features, use_cache=True, logits_to_keep=1)
                torch.multinomial((out.logits[:, -1].float() / policy.temperature).softmax(-1), 1,
                                  generator=run.sampling)
                cache, features, ids = out.past_key_values, None, torch.tensor([[token]], device=device)
                mask, positions = nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
            score(prompt, response)

    def learn(count):
        for prompt, response in stored[:count]:
            score(prompt, response).backward()

    play(1), learn(1), run.optimizer.step()
    playing, learning = (seconds(functools.partial(part, samples), device) * len(stored) / samples
                         for part in (play, learn))
    steps = settings.epochs * math.ceil(len(stored) / settings.minibatch)
    learning = settings.epochs * learning + steps * seconds(run.optimizer.step, device)
    run.optimizer.zero_grad()
    return playing, learning


# ---- measuring ------------------------------------------------------------------------------------------------------
def game_rates(steps=3000):
    """{task: steps a second} of one game with its picture under random play, on one core."""
    def play(game):
        for action in game.np_random.integers(len(game.legal_actions()), size=steps).tolist():
            _, _, terminated, truncated, _ = game.step(action)
            if terminated or truncated:
                game.reset()

    rates = {}
    for task in GAMES:
        game = GAMES[task]()
        game.reset(seed=0)
        rates[task] = round(steps / seconds(functools.partial(play, game), torch.device("cpu")))
    return rates


def peak_memory(device):
    """GiB at the highest: of the GPU where there is one (reserved by, and in use in, torch), else of the process."""
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30,
                "peak_memory_in_use_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}      # Linux counts in KiB


def memory_now(device):
    """GiB at present."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def one_update(run):
    """Play and learn once: (rollout, seconds playing, seconds learning)."""
    kept = {}
    playing = seconds(lambda: kept.update(rollout=collect(run)[0]), run.policy.device)
    learning = seconds(lambda: ppo_update(run.policy, run.optimizer, kept["rollout"], run.settings, run.shuffling),
                       run.policy.device)
    return kept["rollout"], playing, learning


def measure(run, updates):
    """A dict of figures, means over `updates` whole updates after one to warm up; also the last rollout."""
    device, settings = run.policy.device, run.settings
    one_update(run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    memory, sums = [memory_now(device)], torch.zeros(5, dtype=torch.float64)
    for _ in range(updates):
        rollout, playing, learning = one_update(run)
        samples = list(zip(rollout.prompts, rollout.responses))
        flops = sum(update_flops(run.policy, len(prompt.ids), len(response))[1] for prompt, response in samples)
        sums += torch.tensor([playing, learning, sum(map(len, rollout.responses)),
                              sum(len(prompt.ids) for prompt in rollout.prompts), settings.epochs * flops])
        memory.append(memory_now(device))
    playing, learning, answer_tokens, prompt_tokens, flops = (sums / updates).tolist()
    figures = {
        "env_steps_per_s": settings.rollout / playing, "tokens_per_s": answer_tokens / playing,
        "samples_per_s": settings.rollout * settings.epochs / learning, "rollout_s": playing, "update_s": learning,
        "whole_update_s": playing + learning, "answer_tokens": answer_tokens / settings.rollout,
        "prompt_tokens": prompt_tokens / settings.rollout, **peak_memory(device), "memory_gib": memory}
    rate = matmul_rate(device, run.policy.model.dtype)
    return figures | {"matmul_tflops": rate / 1e12, "update_tflops": flops / learning / 1e12,
                      "mfu": flops / learning / rate}, rollout


def profile(run):
    """Print where one whole update's time goes, by operation."""
    from torch.profiler import ProfilerActivity
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.policy.device.type == "cuda")
    by = "self_cuda_time_total" if len(kinds) > 1 else "self_cpu_time_total"
    with torch.profiler.profile(activities=kinds) as trace:
        one_update(run)
    print(trace.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50))


# ---- the command line -----------------------------------------------------------------------------------------------
def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help=f"pocket, {RANDOM_7B}, a hub name or a folder")
    parser.add_argument("--task", default="blackjack", choices=GAMES)
    parser.add_argument("--rollout", type=int, default=512, help="environment steps an update")
    parser.add_argument("--envs", type=int, default=64, help="games side by side; divides --rollout")
    parser.add_argument("--updates", type=int, default=2, help="updates to measure, after one to warm up")
    parser.add_argument("--answer-tokens", type=int, default=100, help=f"length of every answer of {RANDOM_7B}")
    parser.add_argument("--memory-gb", type=float, help="cap of torch's memory on the GPU, in GiB")
    parser.add_argument("--baseline", action="store_true", help="also the published procedure, in the same process")
    parser.add_argument("--baseline-samples", type=int, help="measure it on so many steps only, and scale [all]")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__}


def print_table(figures):
    for key, value in figures.items():
        if isinstance(value, list):
            value = f"{value[0]:.3f} → {value[-1]:.3f}" if value else ""
        for name, entry in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{f'{key} {name}'.strip():62} {f'{entry:,.4g}' if isinstance(entry, float) else entry}")


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("rollout", "envs", "updates", "answer_tokens", "baseline_samples", "memory_gb"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if options.rollout % options.envs:
        parser.error(f"--rollout {options.rollout} must be a multiple of --envs {options.envs}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gb / total))
    # lr 0 and no early end: every update does the same work on the same policy
    settings = Settings(task=options.task, model=options.model, rollout=options.rollout, envs=options.envs, lr=0.0,
                        value_lr=0.0, target_kl=0.0)
    figures = {"model": options.model, "task": options.task, "rollout": options.rollout, "envs": options.envs,
               "measured": True, **machine(device)}
    try:
        loaded = None
        if options.model == RANDOM_7B:
            processor = byte_processor()
            config = llava_7b_config(processor)
            figures["memory_plan_gib"] = plan_7b(config, processor, options)
            if device.type != "cuda":
                finish(figures | {"measured": False}, options.out)
                return
            loaded = Loaded(random_nf4(config, device), processor, RANDOM_7B, "4", RANDOM_7B)
            settings.max_new_tokens = options.answer_tokens
        policy, base = make_policy(settings, loaded)
        if loaded:
            policy.may_close, policy.forbidden[policy.tokenizer.eos_token_id] = set(), True    # nothing ends early
        run = Run(settings, policy, base)
        figures["games_steps_per_s"] = game_rates()
        measured, rollout = measure(run, options.updates)
        figures |= {"bits": settings.bits} | measured
        if options.profile:
            profile(run)
        if options.baseline:
            figures |= compare(run, rollout, measured, options.baseline_samples)
    except ModelError as error:
        sys.exit(f"bench.py: {error}")
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"bench.py: out of GPU memory: {error}")
    finish(figures, options.out)


def plan_7b(config, processor, options):
    """memory_plan in GiB with the defaults of train.py, its sum, and the cap."""
    game = GAMES[options.task]()
    prompt_tokens = len(processor.tokenizer(make_prompt(game, game.reset(seed=0)[1])).input_ids) + 576
    row = BY_SIZE["large"]
    plan = memory_plan(config, row["rank"], row["micro_batch"], row["play_batch"], prompt_tokens, options.answer_tokens)
    stays = sum(size for use, size in plan.items() if ":" not in use)
    update = sum(size for use, size in plan.items() if use.startswith("update:"))
    play = sum(size for use, size in plan.items() if use.startswith("play:"))
    plan |= {"sum, the larger of update and play": stays + max(update, play)}
    return {use: size / 2**30 for use, size in plan.items()} | {"cap": options.memory_gb}


def compare(run, rollout, measured, samples=None):
    """The published procedure's figures, and how many times as long as ours it takes (`ratio`).

    `ratio_without_padding`: were each answer scored at its own length; the rest of the ratio is the padding's.
    """
    samples, found = min(samples or len(rollout.prompts), len(rollout.prompts)), {}
    for name, longest in (("", 2 * Settings.max_new_tokens), ("_without_padding", 0)):
        try:
            playing, learning = published_update(run, rollout, samples, longest)
        except torch.cuda.OutOfMemoryError:
            found[f"baseline{name}"] = "out of memory"
            continue
        found[f"baseline{name}"] = {"rollout_s": playing, "update_s": learning, "whole_update_s": playing + learning,
                                    "samples_measured": samples}
        found[f"ratio{name}"] = (playing + learning) / measured["whole_update_s"]
    return found


def finish(figures, path):
    print_table(figures)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
