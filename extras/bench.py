"""Measure this machine: rollout, PPO update, memory, and how much of the arithmetic's own speed is reached.

    python -m extras.bench                           # the pocket model on Blackjack
    python -m extras.bench --baseline                # beside the published procedure: same model, games and answers
    python -m extras.bench --profile                 # where the time goes
    python -m extras.bench --updates 200 --num-steps 2           # whether memory stays flat
    python -m extras.bench --model llava-7b-random --memory-gb 24        # the 7B shape; without a GPU, its memory plan

Prints a table; the last line is one JSON object with every figure (also to --out). Speed and memory do not hang on
the weights' values, so `llava-7b-random` needs no download (shapes.py).
How FLOPs are counted, of LLaVAs alone: see `update_flops`. Does not handle: whether anything is learned (eval.py).
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from env import GAMES, TASKS, make_game
from extras.machine import machine, matmul_rate, memory_now, peak_memory, seconds
from extras.published import compare
from extras.shapes import byte_processor, llava_7b_config, random_model
from plumbing.settings import Settings, add_flags, with_task_defaults
from ppo import ppo_update
from rollout import add_advantages, collect, score_rollout
from train import Run, make_policy
from vlm.families import part_of_path
from vlm.loading import Loaded, ModelError
from vlm.lora import LoRALinear
from vlm.memory import memory_plan, peak, prompt_size

RANDOM_7B = "llava-7b-random"
FLAGS = ("num_envs", "num_steps", "bits", "gradient_checkpointing", "micro_batch_size", "play_batch_size")


# ---- counting -------------------------------------------------------------------------------------------------------
def update_flops(policy, prompt_tokens, answer_tokens):
    """(forward, forward and backward) FLOPs that scoring one sample needs, in matrix products alone.

    A frozen weight costs 2 FLOPs a token forward and 2 backward (its input's gradient; it needs none itself), an
    adapter's 2 and 4, attention's two products twice as much backward as forward. Vision weights see the I + 1
    patches, the projector I, the language model P + T (causal attention: half the square), the head T. No backward
    where nothing before it learns: the patch embedding, and a frozen weight beside the first adapters. Not counted:
    what gradient checkpointing computes again, padding, and layers behind `vision_feature_layer`.
    """
    length = prompt_tokens + answer_tokens
    config = policy.model.config
    I = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    tokens = {"vision": I + 1, "projector": I, "language": length}
    vision, text = config.vision_config, config.text_config
    used = config.vision_feature_layer % (vision.num_hidden_layers + 1)           # layers before the features' own
    behind = tuple(f".layers.{k}." for k in range(used, vision.num_hidden_layers))
    forward = I * 3 * vision.patch_size ** 2 * vision.hidden_size                # multiply-adds; the patch embedding
    backward = 0
    for path, module in policy.model.named_modules():
        part = part_of_path(path)
        if part is None or part == "vision" and any(layer in path for layer in behind):
            continue
        # the first layer's queries, keys and values: nothing before them learns, so their input needs no gradient
        first = part == "vision" and ".layers.0.self_attn." in path and "out_proj" not in path
        if isinstance(module, LoRALinear):
            A, B = module.lora_A.numel(), module.lora_B.numel()
            forward += tokens[part] * (A + B)
            backward += tokens[part] * 2 * (A + B)
            if first:
                backward -= tokens[part] * A
        elif isinstance(module, nn.Linear):
            weights = tokens[part] * module.in_features * module.out_features
            forward += weights
            if not first:
                backward += weights
    value_head = sum(p.numel() for p in policy.value_head.parameters())
    head = answer_tokens * text.hidden_size * text.vocab_size
    attention = used * 2 * (I + 1) ** 2 * vision.hidden_size
    attention += text.num_hidden_layers * length ** 2 * text.num_attention_heads * text.head_dim
    forward += head + value_head + attention
    return 2 * forward, 2 * (forward + backward + head + 2 * value_head + 2 * attention)


# ---- measuring ------------------------------------------------------------------------------------------------------
def game_rates(tasks=tuple(GAMES), steps=3000):
    """{task: steps a second} of one game with its picture under random play, new deals among them, on one core."""
    def play(game):
        for draw in game.np_random.random(size=steps).tolist():
            _, _, terminated, truncated, _ = game.step(int(draw * len(game.legal_actions())))
            if terminated or truncated:
                game.reset()

    rates = {}
    for task in tasks:
        game = make_game(task)
        game.reset(seed=0)
        rates[task] = round(steps / seconds(functools.partial(play, game), torch.device("cpu")))
    return rates


def one_update(run):
    """Play and learn once: (rollout, what ppo_update says, seconds playing and scoring, seconds learning)."""
    policy, settings, device = run.policy, run.settings, run.policy.device

    def play():
        nonlocal rollout
        rollout = collect(policy, run.games, settings, run.sampling, run.fallback)
        score_rollout(policy, rollout, settings)
        add_advantages(policy, rollout, settings)

    def learn():
        learned.update(ppo_update(policy, run.optimizer, rollout, settings, run.shuffling))

    rollout, learned = None, {}
    playing, learning = seconds(play, device), seconds(learn, device)
    return rollout, learned, playing, learning


def measure(run, updates):
    """A dict of figures, means over `updates` whole updates after a short one to warm up; also the last rollout."""
    device, settings = run.policy.device, run.settings
    num_steps, settings.num_steps = settings.num_steps, -(-2 // settings.num_envs)
    one_update(run)
    settings.num_steps = num_steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    memory, sums, ratio_error = [memory_now(device)], torch.zeros(5, dtype=torch.float64), 0.0
    for _ in range(updates):
        rollout, learned, playing, learning = one_update(run)
        ratio_error = max(ratio_error, learned["ratio_error"])
        samples = list(zip(rollout.prompts, rollout.responses))
        flops = sum(update_flops(run.policy, len(prompt.ids), len(response))[1] for prompt, response in samples
                    if run.policy.family.facts.square)      # counted for LLaVAs alone
        sums += torch.tensor([playing, learning, sum(map(len, rollout.responses)),
                              sum(len(prompt.ids) for prompt in rollout.prompts), settings.update_epochs * flops])
        memory.append(memory_now(device))
    playing, learning, answer_tokens, prompt_tokens, flops = (sums / updates).tolist()
    figures = {
        "env_steps_per_s": settings.batch_size / playing, "tokens_per_s": answer_tokens / playing,
        "samples_per_s": settings.batch_size * settings.update_epochs / learning,
        "ratio_error": ratio_error, "rollout_s": playing, "update_s": learning, "whole_update_s": playing + learning,
        "answer_tokens": answer_tokens / settings.batch_size, "prompt_tokens": prompt_tokens / settings.batch_size,
        **peak_memory(device), "memory_gib": memory}
    if not flops:
        return figures, rollout
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
    parser.add_argument("--task", default="blackjack", choices=TASKS)
    add_flags(parser, Settings, FLAGS)
    parser.add_argument("--updates", type=int, default=2, help="updates to measure, after one to warm up")
    parser.add_argument("--answer-tokens", type=int, default=100, help=f"length of every answer of {RANDOM_7B}")
    parser.add_argument("--memory-gb", type=float, help="cap of torch's memory on the GPU, in GiB")
    parser.add_argument("--baseline", action="store_true", help="also the published procedure, in the same process")
    parser.add_argument("--baseline-samples", type=int, help="measure it on so many steps only, and scale [all]")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


def print_table(figures):
    for key, value in figures.items():
        if isinstance(value, list):
            value = f"{value[0]:.3f} → {value[-1]:.3f}" if value else ""
        for name, entry in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{f'{key} {name}'.strip():62} {f'{entry:,.4g}' if isinstance(entry, float) else entry}")


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in FLAGS if hasattr(options, name)}
    for name in ("updates", "answer_tokens", "baseline_samples", "memory_gb"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.memory_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gb / total))
    # lr 0 and no early end: every update does the same work on the same policy
    given |= {"task": options.task, "model": options.model, "target_kl": 0.0, "sft_steps": 0}
    settings = with_task_defaults(Settings, given)
    if problem := settings.problem():
        parser.error(problem)
    settings.lr = settings.value_lr = 0.0
    figures = {"model": options.model, "task": options.task, "num_envs": settings.num_envs,
               "num_steps": settings.num_steps, "measured": True, **machine(device)}
    try:
        loaded = None
        if options.model == RANDOM_7B:
            processor = byte_processor()
            config = llava_7b_config(processor)
            figures["memory_plan_gib"] = plan_7b(config, processor, settings, options.memory_gb)
            if device.type != "cuda":
                finish(figures | {"measured": False}, options.out)
                return
            bits = "4" if settings.bits == "auto" else settings.bits
            loaded = Loaded(name=RANDOM_7B, bits=bits, base=RANDOM_7B, adapters=None, folder="", config=config,
                            device=str(device), checkpointing=1, why="", model=random_model(config, device, bits),
                            processor=processor)
            settings.max_new_tokens = options.answer_tokens
        policy = make_policy(settings, loaded=loaded)
        if loaded:                                                                          # nothing ends early
            policy.may_close, policy.suppress_tokens[policy.tokenizer.eos_token_id] = set(), True
        run = Run(settings, policy)
        figures["games_steps_per_s"] = game_rates((options.task,)) if options.task not in GAMES else game_rates()
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


def plan_7b(config, processor, settings, cap):
    """memory_plan in GiB, its peak, and the cap; in 4 bits with gradient checkpointing where nothing else was given."""
    settings = dataclasses.replace(settings, bits="4" if settings.bits == "auto" else settings.bits)
    if settings.gradient_checkpointing is None:
        settings.gradient_checkpointing = 1
    plan = memory_plan(config, settings, prompt_size(config, processor, settings.task))
    return {use: size / 2**30 for use, size in (plan | {"peak": peak(plan)}).items()} | {"cap": cap}


def finish(figures, path):
    print_table(figures)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
