"""Supervised fine-tuning on an expert's demonstrations: teaches a model the format before RL.

    python sft.py --task blackjack --model pocket --label-noise 0.5 --out runs/blackjack-sft
    python sft.py --task blackjack --model llava-hf/llava-v1.6-mistral-7b-hf --steps 780
    python sft.py --task blackjack --resume         # after Ctrl-C, or after anything

The loss is minus the mean log-probability of the answer's tokens, by the same `policy.logprobs`
that PPO uses, at temperature 1. --label-noise is the share of action labels replaced by uniformly
random ones: 1.0 teaches reading and format but random play. LoRA adapters by default; --full trains
all weights. train.py does this by itself before RL where a model has not been taught. Does not
handle: several processes.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from env import check_game, find_game, make_game
from families import save_processor
from parse import make_answer, make_prompt
from plumbing.adapters import save_adapters
from plumbing.card import write_card
from plumbing.checkpoint import (
    checkpoints,
    drop_leftovers,
    held_back_interrupt,
    load_optimizer,
    locked,
    replace_checkpoint,
    save_optimizer,
    to_disk,
    unfinished,
    write_whole,
)
from plumbing.errors import ModelError, as_model_error, in_words, say
from plumbing.flags import read_settings, stored_settings
from plumbing.loading import find_model, load_policy
from plumbing.manifest import check, plain, write_manifest
from plumbing.settings import ModelSettings, flag, setting


@dataclass(frozen=True)
class SFTSettings(ModelSettings):
    """One run of supervised fine-tuning, whole."""

    out: str = setting(
        None, "folder for the result, which train.py --model takes (runs/TASK-sft-seedN)")
    label_noise: float = setting(0.0, "share of uniformly random action labels")
    full: bool = setting(False, "train all weights instead of LoRA adapters, in 32 bits")
    steps: int = setting(300, "optimiser steps")
    batch_size: int = setting(64, "demonstrations per optimiser step")
    micro_batch_size: int = setting(
        4, "demonstrations per forward pass, for memory", small=16)
    lr: float = setting(
        2e-5, "at its height, after a warm-up", small=5e-4, paper=2e-5,
        why="a small model learns faster")
    seed: int = setting(0, "fixes demonstrations and adapters")
    save_every: int = setting(50, "a checkpoint every so many steps")

    # config.json is the model's, where --full writes one
    file, folder_suffix = "sft.json", "-sft"
    changeable = ("out", "micro_batch_size", "save_every")

    def problem(self):
        if not 0 <= self.label_noise <= 1:
            return "--label-noise is a share, 0 to 1"
        for name in ("steps", "batch_size", "micro_batch_size", "lr", "save_every"):
            if not getattr(self, name) > 0:
                return f"{flag(name)} must be above 0"
        if not self.full and not self.rank > 0:
            return "--rank must be above 0"
        if self.full and self.bits not in ("auto", "32"):
            return "--full needs --bits 32: 16 would round most steps away"
        if self.seed < 0:
            return "--seed must not be negative"
        return super().problem()


# ---- demonstrations ----------------------------------------------------------------------------
@dataclass
class Demonstration:
    picture: np.ndarray     # (300, 300, 3) uint8
    prompt: str             # v_in
    answer: str             # v_out


def demonstrations(task: str, seed: int, label_noise=0.0, cot=True,
                   game_options=None) -> Iterator[Demonstration]:
    """Yield Demonstrations of a task for ever, from the expert's play.

    label_noise: share of labels that are uniform over the legal actions; the thoughts end in the
    label, right or not. game_options: of the game's constructor.
    """
    game = make_game(task, **find_game(task).lesson_options | (game_options or {}))
    # another stream than the deals'; the name's length stays, for the pocket model was made with it
    generator = np.random.default_rng([seed, len(type(game).__name__)])
    picture, info = game.reset(seed=seed)
    # Half of the games go on with the expert's action and half with the label's, so that both the
    # good path and what comes after a mistake are seen.
    follow_label = generator.random() < 0.5
    while True:
        legal = game.legal_actions()
        best = label = game.best_actions(info)[0]
        if generator.random() < label_noise:
            label = legal[generator.integers(len(legal))]
        # three states in ten, so that fewer neighbours in a batch come from the same deal
        if generator.random() < 0.3:
            said = game.thoughts(info, label) if cot else None
            yield Demonstration(picture, make_prompt(game, info, cot), make_answer(label, said))
        played = label if follow_label else best
        picture, _, terminated, truncated, info = game.step(legal.index(played))
        if terminated or truncated:
            picture, info = game.reset()
            follow_label = generator.random() < 0.5


def mixed(sources: list[Iterator], batch: int, generator: np.random.Generator) -> Iterator[list]:
    """Yield lists of `batch` Demonstrations, each from a source drawn at random."""
    while True:
        yield [next(sources[i]) for i in generator.integers(len(sources), size=batch)]


# ---- learning ----------------------------------------------------------------------------------
def finetune(policy, batches: Iterator, steps: int, lr: float, warmup=30, micro_batch_size=16,
             title="sft", saver=None):
    """Minimise −log π(answer) a token over `steps` batches; return the losses, a float a step.

    AdamW, warm-up and a cosine to zero. batches: an iterator over lists of Demonstrations. saver: a
    Saver, of a run that goes on from what was saved: the same batches are dealt again up to it.
    """
    parameters = dict(policy_parameters(policy))
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    done = saver.load(policy, optimizer) if saver else 0
    for _ in range(done):
        next(batches)
    losses = []
    bar = tqdm(total=steps, initial=done, desc=title, disable=None)
    with held_back_interrupt() as interrupted, bar:
        while done < steps:
            rise = min(1, (done + 1) / warmup)
            fall = 0.5 * (1 + math.cos(math.pi * done / steps))
            optimizer.param_groups[0]["lr"] = lr * rise * fall
            losses.append(
                step(policy, parameters.values(), optimizer, next(batches), micro_batch_size))
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if saver and (interrupted() or done % saver.settings.save_every == 0 or done == steps):
                saver.save(policy, optimizer, done)
            if interrupted():
                raise KeyboardInterrupt
    return losses


def policy_parameters(policy):
    """[(name, parameter)] of the policy proper: all that learns but the value head."""
    return [(name, p) for name, p in policy.trainable() if not name.startswith("value_head")]


def step(policy, parameters, optimizer, batch, micro_batch_size) -> float:
    """One optimiser step on a batch of Demonstrations; return its loss.

    FloatingPointError where it is not finite.
    """
    prompts = policy.encode([d.picture for d in batch], [d.prompt for d in batch])
    answers = policy.encode_answers([d.answer for d in batch])
    tokens, total = sum(map(len, answers)), 0.0
    optimizer.zero_grad()
    for group in by_length(prompts, answers, micro_batch_size):
        logp, _ = policy.logprobs([prompts[i] for i in group], [answers[i] for i in group])
        # the mean over the whole batch's tokens, whatever the groups
        loss = -logp.sum() / tokens
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if not (math.isfinite(total) and norm.isfinite()):
        raise FloatingPointError(f"the loss is {total}, the gradients' norm {norm.item()}: no step "
                                 "was taken; try a smaller --lr")
    optimizer.step()
    return total


def by_length(prompts, responses, size) -> list[list[int]]:
    """Sample indices in groups of `size` of similar length, longest first: less padding."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids) - len(responses[i]))
    return [order[k:k + size] for k in range(0, len(order), size)]


# ---- to disk and back --------------------------------------------------------------------------
@dataclass
class Saver:
    """Checkpoint folders of a run in its midst, each whole or not at all."""

    settings: SFTSettings
    depends: dict

    def save(self, policy, optimizer, done):
        out = self.settings.out
        whole, before = Path(out) / f"checkpoint-{done:06d}", checkpoints(out)
        part = unfinished(whole)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in policy_parameters(policy)}
        save_file(weights, part / "weights.safetensors")
        save_optimizer(optimizer, part / "optimizer.safetensors")
        write_manifest(part, self.depends, self.settings)
        replace_checkpoint(whole, before[-1] if before else None)

    def load(self, policy, optimizer) -> int:
        """Take up the newest checkpoint, if there is one; return how many steps it has behind."""
        if not checkpoints(self.settings.out):
            return 0
        newest = checkpoints(self.settings.out)[-1]
        check(newest, self.depends, self.settings)
        stored = load_file(newest / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in policy_parameters(policy):
                parameter.copy_(stored[name])
        load_optimizer(optimizer, newest / "optimizer.safetensors")
        return int(newest.name.removeprefix("checkpoint-"))


def run_sft(settings):
    """Fine-tune what the settings name and leave the result in settings.out.

    What is there of an earlier try goes on; what is there whole stays as it is. ModelError where
    settings and folder do not fit.
    """
    with locked(settings.out):
        _run_sft(settings, Path(settings.out))


def _run_sft(settings, folder):
    begun = time.perf_counter()
    last = "config.json" if settings.full else "adapter_config.json"
    if (folder / last).exists():
        there, own = plain(stored_settings(SFTSettings, folder / settings.file)), plain(settings)
        if other := [f"{name} {there[name]}" for name in own if own[name] != there[name]]:
            raise ModelError(
                f"{folder} holds another run's result ({', '.join(other)}): choose another --out")
        check(folder)
        clean_up(folder)
        say(f"{folder} is finished")
        return
    check_game(
        settings.task, settings.game, ("best_actions", *("thoughts",) * settings.cot))
    model = find_model(settings.model, settings.task, device=settings.device)
    say(f"{settings.steps} batches of {settings.batch_size} demonstrations")
    if settings.full and model.adapters:
        raise ModelError(f"--full needs a whole model, and {settings.model} holds adapters")
    policy, files = load_policy(
        model, settings.bits, settings.rank, settings.target_modules, temperature=1.0,
        seed=settings.seed, gradient_checkpointing=settings.gradient_checkpointing)
    write_whole(folder / settings.file, json.dumps(asdict(settings), indent=1) + "\n")
    source = demonstrations(
        settings.task, settings.seed, settings.label_noise, settings.cot, settings.game_options)
    batches = mixed([source], settings.batch_size, np.random.default_rng(settings.seed))
    finetune(policy, batches, settings.steps, settings.lr,
             micro_batch_size=settings.micro_batch_size, title=f"sft {settings.task}",
             saver=Saver(settings, files.depends))
    write_result(policy, files, settings, folder, last)
    clean_up(folder)
    say(f"{folder} in {(time.perf_counter() - begun) / 60:.1f} minutes")


def write_result(policy, files, settings, folder, last):
    """Write adapters or a whole model into the folder; it is whole once the file `last` is
    there."""
    part = folder / "result.part"
    shutil.rmtree(part, ignore_errors=True)
    if settings.full:
        policy.model.save_pretrained(part)
        save_processor(policy.processor, part)
    else:
        # without the value head, which is RL's own
        save_adapters(policy.lora, part, files.base_name, policy.rank, policy.alpha)
        write_card(part, "sft.py", settings, files.base_name, "Taught by an expert's play")
    write_manifest(part, files.depends, settings)
    for file in sorted(part.iterdir(), key=lambda file: file.name == last):
        to_disk(file)
        os.replace(file, folder / file.name)
    to_disk(folder)                             # before the checkpoints go


def clean_up(folder):
    """Drop what a finished run needs no more; a kill may have left it."""
    # train.py's checkpoints have a process0.json, and stay
    own = [whole for whole in checkpoints(folder) if not (whole / "process0.json").exists()]
    for path in (folder / "result.part", *own):
        shutil.rmtree(path, ignore_errors=True)
    drop_leftovers(folder)


def main(arguments=None):
    torch.set_flush_denormal(True)      # as train.py's launch
    with in_words():
        settings, resume = read_settings(SFTSettings, __doc__, arguments)
    folder = Path(settings.out)
    with in_words(folder / settings.file):
        with as_model_error(folder):
            there = [file.name for file in folder.iterdir()] if folder.exists() else []
        if not resume and set(there) - {"run.lock", f"{settings.file}.part"}:
            raise ModelError(f"{folder} is not empty: choose another --out")
        run_sft(settings)


if __name__ == "__main__":
    main()
