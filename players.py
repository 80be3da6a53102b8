"""Who plays: a model, with or without adapters; the run that it came from; players without a model.

    policy, settings = open_policy("pocket")
    player = model_player(policy, seed=0)
    [choice] = player([game], [picture], [info])    # rollout.Choice

Does not handle: letting a policy answer (rollout.act), playing episodes (eval.py), models behind an
endpoint (extras/endpoint.py).
"""

from pathlib import Path

import numpy as np
import torch

from env import find_game, held_out_game
from plumbing.adapters import load_value_head
from plumbing.checkpoint import newest_checkpoint
from plumbing.errors import ModelError
from plumbing.flags import stored_settings
from plumbing.loading import find_model, load_policy
from plumbing.manifest import check
from plumbing.settings import Settings, resolve
from rollout import Choice, act

# The settings that an evaluation goes by.
PLAY_SETTINGS = (
    "num_envs", "play_batch_size", "max_new_tokens", "bits", "device", "cot", "temperature", "game")


PICTURES = "own", "black", "another"        # what shown_otherwise shows

# ---- with a model ------------------------------------------------------------------------------
def model_player(policy, seed, cot=True, max_new_tokens=256, greedy=False, batch_size=64):
    """A player that asks the policy: (games, pictures, infos) → a Choice for each game."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    fallback = np.random.default_rng(seed)

    def play(games, pictures, infos):
        _, _, choices = act(policy, games, pictures, infos, generator, fallback, cot,
                            max_new_tokens, greedy, batch_size)
        return choices

    return play


def shown_otherwise(player, pictures, settings, seed):
    """The player as it is ("own"), or one that sees other pictures.

    "black": all-black ones; "another": at every step the first one of a newly dealt game. A policy
    that wins no less so does not look.
    """
    if pictures == "own":
        return player
    other = held_out_game(settings.task, settings.game_options)
    other.reset(seed=seed)

    def play(games, shown, infos):
        if pictures == "black":
            return player(games, [np.zeros_like(picture) for picture in shown], infos)
        return player(games, [other.reset()[0] for _ in shown], infos)

    return play


def open_policy(model="auto", task="blackjack", base=None, **given):
    """Return (policy, settings): a model as it is, or with its adapters where it is a folder of
    some.

    model: as the flag of train.py; task: what "pocket" and the settings go by; base: where the
    adapters' base is, if it has moved; given: settings, such as bits, device or temperature (by
    default the one that RL on the task starts with). ModelError where the model cannot be had.
    """
    found = find_model(model, task, base, given.get("device"))
    settings = resolve(Settings, {"task": task, **given}, found)
    # no adapters of its own: those of the folder, if there are some
    policy, _ = load_policy(
        found, settings.bits, target_modules=(), temperature=settings.temperature)
    return policy, settings


def open_run(run, device="auto"):
    """Return (policy of a run's last checkpoint, the run's settings).

    ModelError where the folder has no whole checkpoint, one of another program, or settings of
    another version or run.
    """
    last = newest_checkpoint(run)
    settings = stored_settings(Settings, Path(run) / Settings.file)
    check(last, settings=settings)      # a config.json of other settings would play another game
    if not (last / "adapter_config.json").exists():
        raise ModelError(f"{last} holds no adapters of a vision-language model: it is for the "
                         "program that made it")
    policy, _ = open_policy(
        str(last), settings.task, base=settings.model, bits=settings.bits,
        temperature=settings.temperature, device=device, game=settings.game)
    load_value_head(policy.value_head, last)
    return policy, settings


# ---- without a model ---------------------------------------------------------------------------
def scripted_player(name, task, seed):
    """A player without a model, whose texts are None.

    "random", "expert", "always:ACTION", and the game's own (Game.scripts): at Blackjack "below:N",
    which hits below a total of N, on ALFWorld "heuristic", which remembers nothing. seed: of random
    play. ValueError for another name; the player itself raises ModelError where ACTION is not
    legal.
    """
    kind, colon, argument = name.partition(":")
    key = kind + colon
    generator, scripts = np.random.default_rng(seed), find_game(task).scripts
    players = {
        "random": lambda game, legal, info: legal[int(generator.integers(len(legal)))],
        "expert": lambda game, legal, info: game.best_actions(info)[0],
        "always:": lambda game, legal, info: argument,
    }
    if key in scripts:
        script = scripts[key](argument)
        players[key] = lambda game, legal, info: script(info)
    if key not in players or colon and not argument:
        raise ValueError(
            f"no policy {name!r}: use random, expert or always:ACTION, at Blackjack also below:14, "
            "on ALFWorld heuristic")

    def play(games, pictures, infos):
        choices = []
        for game, info in zip(games, infos):
            legal = game.legal_actions()
            action = players[key](game, legal, info)
            if action not in legal:
                raise ModelError(f"{action!r} is no legal action of {task}: {', '.join(legal)}")
            choices.append(Choice(action, legal.index(action)))
        return choices

    return play
