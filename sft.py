"""Supervised fine-tuning on an expert's demonstrations: teaches a model the answer's format before RL.

    python sft.py --task blackjack --model pocket --label-noise 0.5 --out runs/blackjack-sft
    python sft.py --task numberline --model llava-hf/llava-v1.6-mistral-7b-hf --bits 4 --steps 780 --out runs/sft-7b

The loss is minus the mean log-probability of the answer's tokens, by the same `policy.logprobs` that PPO uses.
That is at temperature 1; playing and PPO then sharpen with their own. --label-noise is the share of action labels
replaced by uniformly random ones: 1.0 teaches reading and format but random play; pocket.LABEL_NOISE has the shares
that start near the paper's SFT row. LoRA adapters by default; --full trains all weights.
"""

import argparse
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from env import GAMES
from expert import expert_action, reading, thoughts
from loading import ModelError, is_small, open_model
from lora import PARTS, adapter_settings, save_adapters
from parse import make_answer, make_prompt
from policy import Policy
from ppo import by_length
from settings import defaults_for


@dataclass
class Demonstration:
    picture: np.ndarray     # (300, 300, 3) uint8
    prompt: str             # v_in
    answer: str             # v_out


def demonstrations(task, seed, label_noise=0.0, cot=True, shown=0.3):
    """Yield Demonstrations of a task for ever, from the expert's play.

    label_noise: share of labels that are uniform over the legal actions; the thoughts end in the label, right or not.
    shown: share of the states that are yielded, so that neighbours in a batch come from different deals.
    Half of the games go on with the expert's action and half with the label's, so that both the good path and what
    comes after a mistake are seen. Points24 deals are always solvable, as in the paper's data.
    """
    generator = np.random.default_rng([seed, len(task)])
    game = GAMES[task](solvable_only=True) if task == "points24" else GAMES[task]()
    picture, info = game.reset(seed=seed)
    follow_label = generator.random() < 0.5
    while True:
        legal = game.legal_actions()
        best = label = expert_action(task, info)
        if generator.random() < label_noise:
            label = legal[generator.integers(len(legal))]
        if generator.random() < shown:
            yield Demonstration(picture, make_prompt(game, info, cot),
                                make_answer(label, thoughts(task, info, label) if cot else None))
        picture, _, terminated, truncated, info = game.step(legal.index(label if follow_label else best))
        if terminated or truncated:
            picture, info = game.reset()
            follow_label = generator.random() < 0.5


def captions(task, seed):
    """Yield Demonstrations that only say what the picture shows: the pocket model's first lesson (pocket.py)."""
    game, generator = GAMES[task](), np.random.default_rng([seed, len(task)])
    picture, info = game.reset(seed=seed)
    while True:
        yield Demonstration(picture, "Read the picture.", make_answer(reading(task, info)))
        picture, _, terminated, truncated, info = game.step(generator.integers(len(game.legal_actions())))
        if terminated or truncated:
            picture, info = game.reset()


def mixed(sources, batch, generator):
    """Yield lists of `batch` Demonstrations, each from a source drawn at random."""
    while True:
        yield [next(sources[i]) for i in generator.integers(len(sources), size=batch)]


def finetune(policy, batches, steps, lr, warmup=30, micro_batch=16, title="sft"):
    """Minimise −log π(answer) a token over `steps` batches with AdamW, warm-up and a cosine to zero.

    batches: an iterator over lists of Demonstrations. Returns the losses, a float a step.
    """
    parameters = [parameter for name, parameter in policy.trainable() if not name.startswith("value_head")]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    bar = tqdm(range(steps), desc=title, disable=None)
    for step in bar:
        optimizer.param_groups[0]["lr"] = (
            lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch = next(batches)
        prompts = policy.encode([d.picture for d in batch], [d.prompt for d in batch])
        answers = policy.encode_answers([d.answer for d in batch])
        tokens, total = sum(map(len, answers)), 0.0
        optimizer.zero_grad()
        for group in by_length(prompts, answers, micro_batch):
            logp, _, _ = policy.logprobs([prompts[i] for i in group], [answers[i] for i in group])
            loss = -logp.sum() / tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} at step {step}: try a smaller --lr")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}")
    return losses


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=GAMES)
    parser.add_argument("--model", default="auto", help="auto, pocket, a hub name or a folder")
    parser.add_argument("--out", required=True, help="folder for the result: train.py --model takes it")
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of uniformly random action labels")
    parser.add_argument("--no-cot", action="store_true", help="demonstrate the action alone")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA adapters")
    parser.add_argument("--bits", default="auto", choices=["auto", "4", "16", "32"])
    parser.add_argument("--rank", type=int, default=None, help="of the LoRA adapters [32 pocket, 128 else]")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=None, help="answers a forward pass [16 pocket, 4 else]")
    parser.add_argument("--lr", type=float, default=None, help="[5e-4 pocket, 2e-5 else, the paper's]")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 0 <= options.label_noise <= 1:
        parser.error("--label-noise is a share, 0 to 1")
    for name in ("steps", "batch", "rank", "micro_batch", "lr"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if options.full and options.rank:
        parser.error("--full trains all weights and has no adapters: leave --rank out")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if Path(options.out).exists() and (Path(options.out).is_file() or any(Path(options.out).iterdir())):
        parser.error(f"{options.out} is not empty: choose another --out")
    try:
        loaded = open_model(options.model, options.bits)
        if options.full and (loaded.adapters or loaded.bits != "32"):
            parser.error("--full needs a whole model in --bits 32: 16 would round most steps away")
        small = is_small(loaded.model.config)
        rank = options.rank or defaults_for(loaded.model.config)["rank"]
        lora = {"rank": rank, "parts": () if options.full else tuple(PARTS)}
        if loaded.adapters:
            lora = adapter_settings(loaded.adapters)
            if options.rank not in (None, lora["rank"]):
                parser.error(f"the adapters in {loaded.adapters} have rank {lora['rank']}: leave --rank out")
        policy = Policy(loaded.model, loaded.processor, **lora, seed=options.seed, gradient_checkpointing=not small)
        if loaded.adapters:
            policy.load(loaded.adapters, value=False)
        source = demonstrations(options.task, options.seed, options.label_noise, not options.no_cot)
        batches = mixed([source], options.batch, np.random.default_rng(options.seed))
        finetune(policy, batches, options.steps, options.lr or (5e-4 if small else 2e-5),
                 micro_batch=options.micro_batch or (16 if small else 4), title=f"sft {options.task}")
    except (ModelError, FloatingPointError) as error:
        sys.exit(f"sft.py: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("sft.py: out of GPU memory: lower --micro-batch, or use --bits 4")
    part = Path(options.out).with_name(Path(options.out).name + ".part")        # the result appears whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    if options.full:
        loaded.model.save_pretrained(part)
        loaded.processor.save_pretrained(part)
    else:
        save_adapters(policy.lora, part, loaded.base, policy.rank, policy.alpha)            # without V: RL's own
    os.replace(part, options.out)


if __name__ == "__main__":
    main()
