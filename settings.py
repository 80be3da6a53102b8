"""What a run is made of: the settings of train.py, their defaults, the paper's values, and the command line.

`Settings` is the very object that a run's config.json holds. Does not handle: what the settings do (train.py, ppo.py).
"""

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from env import GAMES
from loading import is_small
from lora import PARTS
from ppo import PPOSettings


@dataclass
class Settings(PPOSettings):
    """A run, whole: what config.json holds, the fields of ppo.PPOSettings first.

    A None is filled in by the model's size (BY_SIZE), by the task (REWARD_SCALE), `out` from task and seed.
    """
    task: str = "blackjack"
    model: str = "auto"
    bits: str = "auto"
    out: str = None                 # runs/TASK-seedN
    seed: int = 1
    steps: int = 15_000             # environment steps in all; the paper's
    rollout: int = 512              # environment steps per update; the paper's (1024 on the formula games)
    envs: int = 64                  # games side by side
    cot: bool = True                # False: the paper's ablation, the action alone
    max_new_tokens: int = 256       # the paper's
    lora_on: tuple = None           # the parts that learn; the paper's: all three
    reward_scale: float = None      # of what GAE sees: brings every game's returns to about 1 (REWARD_SCALE)
    lr: float = None                # falls on a cosine to lr_end over the run's updates, and stays there
    lr_end: float = 1e-9            # the paper's
    value_lr: float = None          # the value head's own, falling likewise
    rank: int = None                # LoRA's r; α = 2 r as in the paper
    temperature: float = None       # in sampling and in scoring
    gradient_checkpointing: bool = None     # less memory for more time
    play_batch: int = None          # answers generated at once: memory only
    save_every: int = 1             # a checkpoint every so many updates
    eval_episodes: int = 1000       # held-out games at the start and at the end; 0 for none
    eval_seed: int = 10_000         # dealt by this seed and the following ones

    def updates(self):
        return self.steps // self.rollout


# The formula games pay 10, the others 1: scaled, all returns are about 1, which value_lr and advantage_floor are for.
REWARD_SCALE = {"numberline": 1.0, "ezpoints": 0.1, "points24": 0.1, "blackjack": 1.0}

# The paper's settings are for 7 billion parameters; a million learn at other ones (README, "Differs from the paper").
BY_SIZE = {
    "large": {"lr": 1e-5, "value_lr": 1e-5, "rank": 128, "lora_on": tuple(PARTS), "temperature": 0.2, "target_kl": 0.0,
              "advantage_floor": 0.0, "micro_batch": 4, "play_batch": 16, "gradient_checkpointing": True},
    "small": {"lr": 2e-4, "value_lr": 1e-3, "rank": 32, "lora_on": tuple(PARTS), "temperature": 0.5, "target_kl": 0.1,
              "advantage_floor": 1.0, "micro_batch": 64, "play_batch": 64, "gradient_checkpointing": False},
}


def defaults_for(config):
    """The settings that hang on a model's size: BY_SIZE's row for its configuration."""
    return BY_SIZE["small" if is_small(config) else "large"]


def learning_rates(update, settings):
    """(lr, value_lr) on a cosine down to lr_end over the run's updates, one step an update, never rising again."""
    done = min(1.0, update / max(1, settings.updates()))
    return [settings.lr_end + (start - settings.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
            for start in (settings.lr, settings.value_lr)]


def make_parser(description=None):
    """The command line of train.py; what is not given is not in the result."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--task", choices=GAMES, help="the game (needed, but for --resume)")
    add("--model", help="auto, pocket, a hub name, a folder, or a folder of adapters from sft.py [auto]")
    add("--bits", choices=["auto", "4", "16", "32"], help="of the frozen weights [auto: 4 on a GPU, 32 on a CPU]")
    add("--out", help="run folder [runs/TASK-seedN]")
    add("--resume", action="store_true", help="go on from the run folder's last checkpoint, with its settings")
    add("--seed", type=int, help="fixes the whole run [1]")
    add("--steps", type=int, help="environment steps in all [15000]")
    add("--rollout", type=int, help="environment steps per update [512]")
    add("--envs", type=int, help="games side by side; divides --rollout [64]")
    add("--no-cot", dest="cot", action="store_false", help="ask for the action alone (the paper's ablation)")
    add("--cot-lambda", type=float, help="weight of the thoughts' log-probability, 0 to 1 [0.5]")
    add("--ratio", choices=("answer", "token"), help="what has a ratio of its own in PPO [answer: the paper's]")
    add("--temperature", type=float, help="of sampling and of scoring [0.5 pocket, 0.2 else]")
    add("--max-new-tokens", type=int, help="longest answer [256]")
    add("--lr", type=float, help="at the start, falling on a cosine [2e-4 pocket, 1e-5 else]")
    add("--value-lr", type=float, help="the value head's, falling likewise [1e-3 pocket, 1e-5 else]")
    add("--rank", type=int, help="of the LoRA adapters [32 pocket, 128 else]")
    add("--lora-on", type=lambda text: tuple(text.split(",")), help=f"which parts learn [{','.join(PARTS)}]")
    add("--reward-scale", type=float, help="of what GAE sees [0.1 on the formula games, 1 else]")
    add("--gamma", type=float, help="discount [0.9]")
    add("--gae-lambda", type=float, help="[0.95]")
    add("--clip", type=float, help="PPO's epsilon [0.1]")
    add("--target-kl", type=float,
        help="beyond this KL V alone learns on until the next rollout; 0: never [0.1 pocket, 0 else]")
    add("--advantage-floor", type=float,
        help="advantages are divided by their standard deviation, but by no less than this [1 pocket, 0 else]")
    add("--epochs", type=int, help="passes over a rollout [4]")
    add("--minibatch", type=int, help="answers per optimiser step [128]")
    add("--micro-batch", type=int, help="answers per forward pass: lower it when memory runs out [64 pocket, 4 else]")
    add("--play-batch", type=int, help="answers generated at once: lower it when memory runs out [64 pocket, 16 else]")
    add("--save-every", type=int, help="save a checkpoint every so many updates [1]")
    add("--eval-episodes", type=int, help="held-out games before and after; 0 for none [1000]")
    return parser


def read_settings(description, arguments=None):
    """Return (settings, resume): from the command line, or from the config.json of the run to resume."""
    parser = make_parser(description)
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume", False)
    if "out" not in given and "task" in given:
        given["out"] = f"runs/{given['task']}-seed{given.get('seed', Settings.seed)}"
    config = Path(given.get("out", "")) / "config.json"
    if resume and "out" in given and config.exists():
        stored = json.loads(config.read_text())
        stored["lora_on"] = stored["lora_on"] and tuple(stored["lora_on"])
        # These may change: where to and how often it is written, and for memory's sake the sizes of batches (sums round
        # otherwise, and another play_batch draws other tokens).
        free = {"out", "micro_batch", "play_batch", "save_every"}
        if unknown := set(stored) ^ {field.name for field in fields(Settings)}:
            parser.error(f"{config} was written by another version of this program ({', '.join(sorted(unknown))} "
                         "differ): finish the run with that version, or start a new one with --out")
        other = [key for key, value in given.items() if key not in free and value not in (stored[key], "auto")]
        if other:
            parser.error(f"--resume goes on with the run's own settings: {config} has "
                         f"{', '.join(f'{key} {stored[key]}, not {given[key]}' for key in other)}. Leave these flags "
                         "out (--micro-batch, --play-batch, --save-every may change), or start a new run with --out")
        settings = Settings(**(stored | {key: value for key, value in given.items() if key in free}))
        if problem := _problem(settings):
            parser.error(problem)
        return settings, True
    if "task" not in given:
        parser.error("--task is needed" + (f": there is no {config} to resume" if resume else ""))
    if resume:
        print(f"there is no run in {config.parent} yet: this starts one")
    settings = Settings(**given)
    if problem := _problem(settings):
        parser.error(problem)
    if config.exists():
        parser.error(f"{config.parent} holds a run already: go on with --resume, or choose another --out")
    return settings, False


def _problem(s):
    """What is wrong with the settings, in words, or None."""
    if unknown := set(s.lora_on or ()) - set(PARTS):
        return f"--lora-on: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}"
    for name in ("steps", "rollout", "envs", "epochs", "minibatch", "save_every", "max_new_tokens"):
        if getattr(s, name) < 1:
            return f"--{name.replace('_', '-')} must be 1 or more"
    for name in ("cot_lambda", "gamma", "gae_lambda", "clip"):
        if not 0 <= getattr(s, name) <= 1:
            return f"--{name.replace('_', '-')} must lie between 0 and 1"
    for name in ("lr", "value_lr", "rank", "temperature", "micro_batch", "play_batch", "reward_scale"):
        if getattr(s, name) is not None and not getattr(s, name) > 0:
            return f"--{name.replace('_', '-')} must be above 0"
    if s.model == "cnn":
        if s.cot:
            return "--model cnn writes no thoughts: add --no-cot"
        if s.rank or s.lora_on or s.temperature or s.bits != "auto":
            return "--model cnn has no adapters, temperature or bits: leave these flags out"
    if s.rollout % s.envs:
        return f"--rollout {s.rollout} must be a multiple of --envs {s.envs}"
    if s.steps < s.rollout:
        return f"--steps {s.steps} is less than one rollout of {s.rollout}: lower --rollout (and --envs)"
    for name in ("seed", "eval_episodes", "target_kl", "advantage_floor"):
        if (getattr(s, name) or 0) < 0:
            return f"--{name.replace('_', '-')} must not be negative"
    if s.rollout < 2:
        return "--rollout must be 2 or more: advantages are normalised over it"
    return None
