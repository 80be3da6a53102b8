"""Who plays: a model, with or without adapters; the run of train.py that it came from; players without a model.

    policy, _ = open_policy("pocket")                       # all that an interactive prompt needs
    player = model_player(policy, seed=0)
    [choice] = player([game], [picture], [info])            # rollout.Choice

Does not handle: letting a policy answer (rollout.act), playing episodes (eval.py), models behind an endpoint
(extras/endpoint.py).
"""

import json
from pathlib import Path

import numpy as np
import torch

from games.expert import expert_action
from games.household import next_step
from plumbing.checkpoint import newest_checkpoint
from plumbing.errors import ModelError, foreign
from plumbing.manifest import check
from plumbing.settings import WORLD, Settings, as_settings, fill_in
from policy import Policy
from rollout import Choice, act
from vlm.loading import is_small, open_model
from vlm.lora import adapter_settings

# What of a run's settings its evaluation goes by.
PLAY_SETTINGS = ("num_envs", "play_batch_size", "max_new_tokens", "bits", "cot", "temperature", *WORLD)


def model_player(policy, seed, cot=True, max_new_tokens=256, greedy=False, batch_size=64):
    """A player that asks the policy: a function (games, pictures, infos) → a Choice for each game."""
    generator, fallback = torch.Generator(policy.device).manual_seed(seed), np.random.default_rng(seed)

    def play(games, pictures, infos):
        return act(policy, games, pictures, infos, generator, fallback, cot, max_new_tokens, greedy, batch_size)[2]

    return play


def scripted_player(name, task, seed):
    """A player without a model, whose texts are None: "random", "expert", "always:ACTION".

    On ALFWorld also "heuristic", which remembers nothing. seed: of random play. ValueError for another name; the player
    itself raises ModelError where ACTION is not legal.
    """
    generator = np.random.default_rng(seed)
    kind, _, fixed = name.partition(":")
    names = ("random", "expert", *(("heuristic",) if task == "alfworld" else ()))
    if not (kind == "always" and fixed or name in names):
        raise ValueError(f"no policy {name!r}: use {', '.join(names)} or always:ACTION")

    def play(games, pictures, infos):
        choices = []
        for game, info in zip(games, infos):
            legal = game.legal_actions()
            if kind == "random":
                index = int(generator.integers(len(legal)))
            elif kind == "expert":
                index = legal.index(expert_action(task, info))
            elif kind == "heuristic":
                index = legal.index(next_step(info, memory=False)[1])
            elif fixed in legal:
                index = legal.index(fixed)
            else:
                raise ModelError(f"{fixed!r} is no legal action of {task}: {', '.join(legal)}")
            choices.append(Choice(legal[index], index))
        return choices

    return play


def open_run(run):
    """Return (policy of a run's last checkpoint, the run's settings as a dict).

    ModelError where the folder has no whole checkpoint, one of another program, or settings of another version.
    """
    last = newest_checkpoint(run)
    check(last)
    config = Path(run) / "config.json"
    with foreign(config):
        settings = as_settings(Settings, json.loads(config.read_text(encoding="utf-8")))
    if not (last / "adapter_config.json").exists():
        raise ModelError(f"{last} holds no adapters of a vision-language model: it is for the program that made it")
    if missing := {"task", "model", *PLAY_SETTINGS} - {*WORLD, *settings}:
        raise ModelError(f"{run} was written by another version of this program (no {', '.join(sorted(missing))} in "
                         "its config.json): evaluate it with that version")
    # a folder of before there was a temperature_end has a constant one
    own = {"temperature_end": settings["temperature"]} | {
        name: settings[name] for name in ("total_timesteps", "num_envs", "num_steps", "temperature", "temperature_end")
        if name in settings}
    with foreign(config):
        settings["temperature"] = Settings(**own).temperature_at(int(last.name.removeprefix("checkpoint-")))
    policy, _ = open_policy(str(last), settings["bits"], settings["temperature"], settings["task"], settings["model"])
    policy.load_value_head(last)
    return policy, settings


def start_temperature(task, model) -> float:
    """The temperature that RL of a model on a task starts with by default."""
    settings = Settings(task=task)
    fill_in(settings, is_small(model.config))
    return settings.temperature


def open_policy(model="auto", bits="auto", temperature=None, task="blackjack", base="auto"):
    """Return (policy, the model's name): a model as it is, or with its adapters where it is a folder of some.

    model, bits: as the flags of train.py; temperature: None for the one that RL on `task` starts with; task: what
    "pocket" and the plan of memory go by; base: where the adapters' base is, if it is no longer where they were made.
    ModelError where the model cannot be had, or its adapters are not for it.
    """
    loaded = open_model(model, bits, Settings(task=task, model=base))
    lora = adapter_settings(loaded.adapters) if loaded.adapters else {"target_modules": ()}
    if temperature is None:
        temperature = start_temperature(task, loaded.model)
    policy = Policy(loaded.model, loaded.processor, **lora, temperature=temperature)
    if loaded.adapters:
        policy.load_adapters(loaded.adapters)
    return policy, loaded.name
