"""Supervised fine-tuning on an expert's demonstrations: teaches a model the answer's format before RL.

    python sft.py --task blackjack --model pocket --label-noise 0.5 --out runs/blackjack-sft
    python sft.py --task numberline --model llava-hf/llava-v1.6-mistral-7b-hf --bits 4 --steps 780 --out runs/sft-7b

The loss is minus the mean log-probability of the answer's tokens, by the same `policy.logprobs` that PPO uses.
That is at temperature 1; RL has its own. --label-noise is the share of action labels
replaced by uniformly random ones: 1.0 teaches reading and format but random play; extras/pocket.py has the shares
that start near the paper's SFT row. LoRA adapters by default; --full trains all weights.
"""

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import part_of, put_in_place
from env import GAMES
from games.expert import expert_action, thoughts
from loading import ModelError, is_small, open_model
from lora import PARTS, adapter_settings, save_adapters
from parse import make_answer, make_prompt
from policy import Policy
from settings import ModelSettings, fill_in, make_parser, setting


@dataclass
class SFTSettings(ModelSettings):
    task: str = setting(None, "the game (needed)", choices=tuple(GAMES))
    out: str = setting(None, "folder for the result: train.py --model takes it (needed)")
    label_noise: float = setting(0.0, "share of uniformly random action labels")
    full: bool = setting(False, "train all weights instead of LoRA adapters")
    steps: int = setting(300, "optimiser steps")
    batch_size: int = setting(64, "demonstrations per optimiser step")
    micro_batch_size: int = setting(None, "demonstrations per forward pass, for memory", small=16, large=4)
    lr: float = setting(None, "at its height, after a warm-up (large: the paper's)", small=5e-4, large=2e-5)
    seed: int = setting(0, "fixes demonstrations and adapters")


@dataclass
class Demonstration:
    picture: np.ndarray     # (300, 300, 3) uint8
    prompt: str             # v_in
    answer: str             # v_out


def demonstrations(task: str, seed: int, label_noise=0.0, cot=True) -> Iterator[Demonstration]:
    """Yield Demonstrations of a task for ever, from the expert's play.

    label_noise: share of labels that are uniform over the legal actions; the thoughts end in the label, right or not.
    Three states in ten are yielded, so that neighbours in a batch come from different deals.
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
        if generator.random() < 0.3:
            yield Demonstration(picture, make_prompt(game, info, cot),
                                make_answer(label, thoughts(task, info, label) if cot else None))
        picture, _, terminated, truncated, info = game.step(legal.index(label if follow_label else best))
        if terminated or truncated:
            picture, info = game.reset()
            follow_label = generator.random() < 0.5


def by_length(prompts, responses, size) -> list[list[int]]:
    """Split sample indices into groups of `size` of similar length, longest first: less padding, same sums."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids) - len(responses[i]), i))
    return [order[k:k + size] for k in range(0, len(order), size)]


def mixed(sources: list[Iterator], batch: int, generator: np.random.Generator) -> Iterator[list]:
    """Yield lists of `batch` Demonstrations, each from a source drawn at random."""
    while True:
        yield [next(sources[i]) for i in generator.integers(len(sources), size=batch)]


def finetune(policy, batches: Iterator, steps: int, lr: float, warmup=30, micro_batch_size=16, title="sft"):
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
        for group in by_length(prompts, answers, micro_batch_size):
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


def teach(settings):
    """Open the model, fine-tune it, and write the result to settings.out; ModelError where they do not fit."""
    loaded = open_model(settings.model, settings.bits)
    print(f"model: {loaded.why}")
    if settings.full and (loaded.adapters or loaded.bits != "32"):
        raise ModelError("--full needs a whole model in --bits 32: 16 would round most steps away")
    lora, small = {"target_modules": () if settings.full else tuple(PARTS)}, is_small(loaded.model.config)
    if loaded.adapters:
        lora = adapter_settings(loaded.adapters)
        if settings.rank not in (None, lora["rank"]):
            raise ModelError(f"the adapters in {loaded.adapters} have rank {lora['rank']}: leave --rank out")
        settings.rank = lora["rank"]
    fill_in(settings, small)
    policy = Policy(loaded.model, loaded.processor, **{"rank": settings.rank, **lora}, seed=settings.seed,
                    gradient_checkpointing=not small, base_name=loaded.base)
    if loaded.adapters:
        policy.load_adapters(loaded.adapters)
    source = demonstrations(settings.task, settings.seed, settings.label_noise, settings.cot)
    batches = mixed([source], settings.batch_size, np.random.default_rng(settings.seed))
    finetune(policy, batches, settings.steps, settings.lr, micro_batch_size=settings.micro_batch_size,
             title=f"sft {settings.task}")
    part = part_of(settings.out)                            # the result appears whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    if settings.full:
        loaded.model.save_pretrained(part)
        loaded.processor.save_pretrained(part)
    else:
        save_adapters(policy.lora, part, loaded.base, policy.rank, policy.alpha)    # without the value head: RL's own
    put_in_place(settings.out)


def find_problem(s):
    """What is wrong with the settings, in words, or None."""
    for name in ("task", "out"):
        if getattr(s, name) is None:
            return f"--{name} is needed"
    if not 0 <= s.label_noise <= 1:
        return "--label-noise is a share, 0 to 1"
    for name in ("steps", "batch_size", "rank", "micro_batch_size", "lr"):
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            return f"--{name.replace('_', '-')} must be above 0"
    if s.full and s.rank:
        return "--full trains all weights and has no adapters: leave --rank out"
    if s.seed < 0:
        return "--seed must not be negative"
    if Path(s.out).exists() and (Path(s.out).is_file() or any(Path(s.out).iterdir())):
        return f"{s.out} is not empty: choose another --out"
    return None


def main(arguments=None):
    parser = make_parser(SFTSettings, __doc__)
    settings = SFTSettings(**vars(parser.parse_args(arguments)))
    if problem := find_problem(settings):
        parser.error(problem)
    try:
        teach(settings)
    except (ModelError, FloatingPointError) as error:
        sys.exit(f"sft.py: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("sft.py: out of GPU memory: lower --micro-batch-size, or use --bits 4")


if __name__ == "__main__":
    main()
