"""Supervised fine-tuning on an expert's demonstrations: teaches a model the answer's format before RL.

    python sft.py --task blackjack --model pocket --label-noise 0.5 --out runs/blackjack-sft
    python sft.py --task numberline --model llava-hf/llava-v1.6-mistral-7b-hf --bits 4 --steps 780 --out runs/sft-7b
    python sft.py --out runs/sft-7b --resume           # after Ctrl-C, or after anything

The loss is minus the mean log-probability of the answer's tokens, by the same `policy.logprobs` that PPO uses, at
temperature 1. --label-noise is the share of action labels replaced by uniformly random ones: 1.0 teaches reading and
format but random play; extras/pocket.py has the shares that start at or above the paper's SFT row. LoRA adapters by
default; --full trains all weights. train.py does this by itself before RL where it is given plain large weights.
Does not handle: several processes.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C in the seconds of importing: no traceback

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from env import make_game
from games.expert import expert_action, thoughts
from parse import make_answer, make_prompt
from plumbing import parallel
from plumbing.card import write_sft_card
from plumbing.checkpoint import (
    checkpoints,
    held_back_interrupt,
    load_optimizer,
    locked,
    part_of,
    replace_checkpoint,
    save_optimizer,
    to_disk,
    write_whole,
)
from plumbing.errors import ModelError, foreign, in_words
from plumbing.manifest import check, plain, write_manifest
from plumbing.settings import ModelSettings, Settings, fill_in, read_settings, setting, take_up
from policy import Policy
from vlm.families import PARTS, save_processor
from vlm.loading import is_small, open_model
from vlm.lora import adapter_settings, save_adapters


@dataclass
class SFTSettings(ModelSettings):
    """One run of supervised fine-tuning, whole."""
    out: str = setting(None, "folder for the result, which train.py --model takes (runs/TASK-sft-seedN)")
    label_noise: float = setting(0.0, "share of uniformly random action labels")
    full: bool = setting(False, "train all weights instead of LoRA adapters")
    steps: int = setting(300, "optimiser steps")
    batch_size: int = setting(64, "demonstrations per optimiser step")
    micro_batch_size: int = setting(None, "demonstrations per forward pass, for memory", small=16, large=4)
    lr: float = setting(None, "at its height, after a warm-up (large: the paper's for all weights)",
                        small=5e-4, large=2e-5)
    seed: int = setting(0, "fixes demonstrations and adapters")
    save_every: int = setting(50, "a checkpoint every so many steps")

    file, variant = "sft.json", "-sft"          # config.json is the model's, where --full writes one
    free = ("out", "micro_batch_size", "save_every")

    def problem(self):
        if not 0 <= self.label_noise <= 1:
            return "--label-noise is a share, 0 to 1"
        for name in ("steps", "batch_size", "rank", "micro_batch_size", "lr", "save_every"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                return f"--{name.replace('_', '-')} must be above 0"
        if self.full and (self.rank or self.target_modules):
            return "--full trains all weights and has no adapters: leave --rank and --target-modules out"
        if self.full and self.bits not in ("auto", "32"):
            return "--full needs --bits 32: 16 would round most steps away"
        if self.seed < 0:
            return "--seed must not be negative"
        return super().problem()


@dataclass
class Demonstration:
    picture: np.ndarray     # (300, 300, 3) uint8
    prompt: str             # v_in
    answer: str             # v_out


def demonstrations(task: str, seed: int, label_noise=0.0, cot=True, world=None) -> Iterator[Demonstration]:
    """Yield Demonstrations of a task for ever, from the expert's play.

    label_noise: share of labels that are uniform over the legal actions; the thoughts end in the label, right or not.
    world: env.make_game's further options.
    Three states in ten are yielded, so that fewer neighbours in a batch come from the same deal.
    Half of the games go on with the expert's action and half with the label's, so that both the good path and what
    comes after a mistake are seen. Points24 deals are always solvable, as in the paper's data.
    """
    generator = np.random.default_rng([seed, len(task)])
    game = make_game(task, **({"solvable_only": True} if task == "points24" else world or {}))
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


def finetune(policy, batches: Iterator, steps: int, lr: float, warmup=30, micro_batch_size=16, title="sft",
             settings=None):
    """Minimise −log π(answer) a token over `steps` batches with AdamW, warm-up and a cosine to zero.

    batches: an iterator over lists of Demonstrations. settings: SFTSettings, of a run that is saved in settings.out
    and goes on from what was saved there: the same batches are dealt again up to it. Returns the losses, a float a step
    that was taken.
    """
    parameters = dict(learning(policy))
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    done = load_sft(policy, optimizer, settings) if settings else 0
    for _ in range(done):
        next(batches)
    losses = []
    with held_back_interrupt() as interrupted, tqdm(total=steps, initial=done, desc=title, disable=None) as bar:
        while done < steps:
            optimizer.param_groups[0]["lr"] = (
                lr * min(1, (done + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done / steps)))
            losses.append(step(policy, parameters.values(), optimizer, next(batches), micro_batch_size))
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if settings and (interrupted() or done % settings.save_every == 0 or done == steps):
                save_sft(policy, optimizer, done, settings)
            if interrupted():
                raise KeyboardInterrupt
    return losses


def learning(policy):
    """[(name, parameter)] of what writes the answers: all that learns but the value head."""
    return [(name, parameter) for name, parameter in policy.trainable() if not name.startswith("value_head")]


def step(policy, parameters, optimizer, batch, micro_batch_size) -> float:
    """One optimiser step on a batch of Demonstrations; return its loss. FloatingPointError where it is not finite."""
    prompts = policy.encode([d.picture for d in batch], [d.prompt for d in batch])
    answers = policy.encode_answers([d.answer for d in batch])
    tokens, total = sum(map(len, answers)), 0.0
    optimizer.zero_grad()
    for group in by_length(prompts, answers, micro_batch_size):
        logp, _, _ = policy.logprobs([prompts[i] for i in group], [answers[i] for i in group])
        loss = -logp.sum() / tokens
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if not (math.isfinite(total) and norm.isfinite()):
        raise FloatingPointError(f"the loss is {total}, the gradients' norm {norm.item()}: no step was taken; try a "
                                 "smaller --lr")
    optimizer.step()
    return total


def save_sft(policy, optimizer, done, settings):
    """A checkpoint folder of an SFT run in its midst, whole or not at all."""
    whole, before = Path(settings.out) / f"checkpoint-{done:06d}", checkpoints(settings.out)
    shutil.rmtree(part_of(whole), ignore_errors=True)
    part_of(whole).mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in learning(policy)},
              part_of(whole) / "weights.safetensors")
    save_optimizer(optimizer, part_of(whole))
    write_manifest(part_of(whole), policy.base_hash, settings)
    replace_checkpoint(whole, before[-1] if before else None)


def load_sft(policy, optimizer, settings) -> int:
    """Take up the newest checkpoint, if there is one; return how many steps it has behind it."""
    if not checkpoints(settings.out):
        return 0
    newest = checkpoints(settings.out)[-1]
    check(newest, policy.base_hash, settings)
    stored = load_file(newest / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in learning(policy):
            parameter.copy_(stored[name])
    load_optimizer(optimizer, newest)
    return int(newest.name.removeprefix("checkpoint-"))


def run_sft(settings):
    """Fine-tune what the settings name and leave the result in settings.out; ModelError where they do not fit.

    What is there of an earlier try goes on; what is there whole stays as it is.
    """
    with locked(settings.out):
        _run_sft(settings, Path(settings.out))


def _run_sft(settings, folder):
    begun = time.perf_counter()
    last = "config.json" if settings.full else "adapter_config.json"
    if (folder / last).exists():
        with foreign(folder / settings.file):
            there = json.loads((folder / settings.file).read_text(encoding="utf-8"))
            other = [f"{name} {there[name]}" for name, value in plain(settings).items()
                     if value not in (None, "auto", there[name])]
        if other:
            raise ModelError(f"{folder} holds another run's result ({', '.join(other)}): choose another --out")
        clean_up(folder)
        parallel.say(f"{folder} is finished")
        return
    loaded = open_model(settings.model, "32" if settings.full else settings.bits, as_rl(settings))
    parallel.say(f"model: {loaded.why}; {settings.steps} batches of {settings.batch_size} demonstrations")
    if settings.full and loaded.adapters:
        raise ModelError(f"--full needs a whole model, and {settings.model} holds adapters")
    if settings.full and loaded.device != "cpu":
        learns = sum(parameter.numel() for parameter in loaded.model.parameters())
        parallel.say(f"--full: {16 * learns / 2**30:.1f} GiB for weights, gradients and Adam's moments, answers apart")
    policy = policy_for(settings, loaded)
    write_whole(folder / settings.file, json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
    source = demonstrations(settings.task, settings.seed, settings.label_noise, settings.cot, settings.world)
    batches = mixed([source], settings.batch_size, np.random.default_rng(settings.seed))
    finetune(policy, batches, settings.steps, settings.lr, micro_batch_size=settings.micro_batch_size,
             title=f"sft {settings.task}", settings=settings)
    part = folder / "result.part"
    shutil.rmtree(part, ignore_errors=True)
    if settings.full:
        loaded.model.save_pretrained(part)
        save_processor(loaded.processor, part)
    else:
        save_adapters(policy.lora, part, loaded.base, policy.rank, policy.alpha)    # without the value head: RL's own
        write_sft_card(settings, loaded, part)
    write_manifest(part, loaded.weights_hash, settings)
    for file in sorted(part.iterdir(), key=lambda file: file.name == last):         # subtle: whole when `last` is there
        to_disk(file)
        os.replace(file, folder / file.name)
    to_disk(folder)                                         # before the checkpoints go
    clean_up(folder)
    parallel.say(f"{folder} in {(time.perf_counter() - begun) / 60:.1f} minutes")


def policy_for(settings, loaded):
    """Return the Policy of a loaded model and its adapters, for this file's settings or for RL's.

    What was left open in the settings is filled in; where they have no temperature it is 1.
    """
    full, adapters = getattr(settings, "full", False), {}
    settings.bits = loaded.bits                             # "auto" could be another number the next time
    if loaded.adapters:
        adapters = adapter_settings(loaded.adapters)
        take_up(settings, adapters)
    if settings.gradient_checkpointing is None:
        settings.gradient_checkpointing = loaded.checkpointing
    fill_in(settings, is_small(loaded.model.config))
    parts = () if full else settings.target_modules or tuple(PARTS)
    policy = Policy(loaded.model, loaded.processor, settings.rank, adapters.get("alpha"), parts,
                    getattr(settings, "temperature", 1.0), settings.seed, settings.gradient_checkpointing, loaded.base,
                    loaded.weights_hash)
    settings.rank, settings.target_modules = (None, None) if full else (settings.rank, parts)
    if loaded.adapters:
        policy.load_adapters(loaded.adapters)
    return policy


def as_rl(settings):
    """What vlm.memory.choose asks: this run as if it were RL of adapters, which takes more (--full: far less)."""
    return Settings(task=settings.task, rank=settings.rank, target_modules=settings.target_modules, cot=settings.cot,
                    micro_batch_size=settings.micro_batch_size,
                    gradient_checkpointing=settings.gradient_checkpointing, **settings.world)


def clean_up(folder):
    """Drop what a finished run needs no more; a kill may have left it."""
    own = [whole for whole in checkpoints(folder) if not (whole / "process0.json").exists()]       # train.py's have one
    for left in (folder / "result.part", *own, *folder.glob("checkpoint-*.gone"), *folder.glob("checkpoint-*.part")):
        shutil.rmtree(left, ignore_errors=True)


def main(arguments=None):
    with in_words():
        settings, resume = read_settings(SFTSettings, __doc__, arguments)
    folder = Path(settings.out)

    def how_to_go_on():
        return ("go on with the same command and --resume" if (folder / settings.file).exists() else
                "nothing was saved yet: start it again with the same command")

    with in_words(how_to_go_on):
        with foreign(folder):
            there = [file.name for file in folder.iterdir()] if folder.exists() else []
        if not resume and set(there) - {"run.lock", f"{settings.file}.part"}:
            raise ModelError(f"{folder} is not empty: choose another --out")
        run_sft(settings)


if __name__ == "__main__":
    main()
