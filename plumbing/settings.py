"""What a run is made of: every setting once, with its meaning, its default and the paper's value.

    parser = make_parser(Settings)                     # the command line: a flag a field
    settings, resume = read_settings(Settings, "train", ["--task", "blackjack", "--seed", "2"])
    fill_in(settings, small=True)                      # the defaults that hang on the model's size, and on the game

The flags of train.py and sft.py, their help and a run's config.json are all made from the dataclasses here and in
sft.py. Names are CleanRL's and PEFT's where they have one. Does not handle: what the settings do.
"""

import argparse
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from env import TASKS
from plumbing import parallel
from plumbing.errors import ModelError, foreign
from vlm.families import PARTS

# The formula games pay 10, ALFWorld 50: scaled, all returns are about 1, which value_lr and advantage_floor are for.
REWARD_SCALE = {"numberline": 1.0, "ezpoints": 0.1, "points24": 0.1, "blackjack": 1.0, "alfworld": 0.02}
# Other defaults on ALFWorld: λ and the steps in all are the paper's; games are slower there, and longer.
TASK_DEFAULTS = {"alfworld": {"cot_lambda": 0.2, "total_timesteps": 5_000, "num_envs": 32, "num_steps": 16,
                              "eval_episodes": 100}}
# What only the pocket model has other defaults for: the large ones' are the paper's, and were not tried otherwise.
POCKET_DEFAULTS = {"points24": {"temperature": 0.3, "temperature_end": 0.1, "negative_weight": 0.25, "imitation": 8}}
WORLD = ("houses", "receptacles", "objects", "scene_text", "all_commands")      # settings of ALFWorld alone


def setting(default=None, help="", *, small=None, large=None, choices=None):
    """A dataclass's field with its meaning. small, large: the defaults for a pocket model and for a 7B one."""
    by_size = None if small is None else {"small": small, "large": large}
    return field(default=default, metadata={"help": help, "by_size": by_size, "choices": choices, "flag": True})


def fixed(default):
    """A field that is no flag: for a subclass in which it cannot be chosen."""
    return field(default=default, metadata={"by_size": None, "flag": False})


@dataclass
class ModelSettings:
    """What supervised fine-tuning and RL share."""
    task: str = setting(None, "the game (needed; --resume knows it)", choices=TASKS)
    model: str = setting("auto", "auto, pocket, a hub name, a folder (chat VLMs: vlm/families.py), or adapters")
    bits: str = setting("auto", "of the frozen weights; auto: 32 on a CPU, 16 on a GPU with room, else 4",
                        choices=("auto", "4", "16", "32"))
    rank: int = setting(None, "of the LoRA adapters, r; α = 2 r as in the paper", small=32, large=128)
    target_modules: tuple = setting(None, f"the parts that have LoRA adapters and learn ({','.join(PARTS)})")
    gradient_checkpointing: int = setting(None, "less memory for more time: of every layer (1), of every second (2), "
                                          "of none (0; also where it fits the GPU so)", small=0, large=1)
    cot: bool = setting(True, "chain of thought; --no-cot: the action alone, the paper's ablation")
    seed: int = setting(1, "fixes the whole run")
    houses: str = setting("small", "alfworld: dealt ones, or the data set's ($ALFWORLD_DATA)",
                          choices=("small", "data"))
    receptacles: int = setting(5, "alfworld: in a dealt house (more than 8 are hard to read in the picture)")
    objects: int = setting(4, "alfworld: in a dealt house")
    scene_text: bool = setting(True, "alfworld: the engine's words beside the picture")
    all_commands: bool = setting(False, "alfworld: also commands that change nothing, such as look")

    # Not fields: where the settings are kept in the run folder, and what of them may change in mid-run: where and how
    # often it is written; the sizes of batches, for memory (sums then round otherwise, another play_batch_size draws
    # other tokens); where the base model lies (its weights are held against their hash).
    file, variant = "config.json", ""
    free = ("out", "model", "micro_batch_size", "play_batch_size", "save_every")

    @property
    def world(self):
        """What env.make_game takes beside the task."""
        return {name: getattr(self, name) for name in WORLD} if self.task == "alfworld" else {}

    def problem(self):
        """What is wrong with the settings, in words, or None."""
        for name in WORLD if self.task != "alfworld" else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                return f"{_flag(name)} is for --task alfworld"
        if not (4 <= self.receptacles <= 40 and 3 <= self.objects <= 40):
            return "--receptacles must be 4 to 40, --objects 3 to 40"
        if self.houses == "data" and (self.receptacles, self.objects) != (5, 4):
            return "--receptacles and --objects are for dealt houses: --houses data has its own"
        if unknown := set(self.target_modules or ()) - set(PARTS):
            return f"--target-modules: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}"
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value) or type(value) is int and value >= 2**31:
                return f"{_flag(name)} {value} is too large, or no number"
        if not str(self.out).strip() or not str(self.model).strip():
            return "--out and --model must not be empty"
        return None


@dataclass
class Settings(ModelSettings):
    """A run of RL, whole. Where the paper has a value it is the large model's default, or the help names it."""
    out: str = setting(None, "run folder (runs/TASK-seedN)")
    # the policy
    temperature: float = setting(None, "of sampling and of scoring", small=0.5, large=0.2)
    temperature_end: float = setting(None, "the last update's, reached in even steps [--temperature where given]")
    # playing
    total_timesteps: int = setting(15_000, "environment steps in all")
    num_envs: int = setting(64, "games side by side")
    num_steps: int = setting(8, "steps of each game per update: 512 samples (paper: 1024 on the formula games)")
    max_new_tokens: int = setting(256, "longest answer")
    play_batch_size: int = setting(None, "answers generated at once, for memory (another size draws other tokens)",
                                   small=64, large=32)
    # learning
    cot_lambda: float = setting(0.5, "λ, the weight of the thoughts' log-probability, 0 to 1")
    gamma: float = setting(0.9, "discount")
    gae_lambda: float = setting(0.95, "of generalised advantage estimation")
    reward_scale: float = setting(None, "of what GAE sees (formula games: 0.1, alfworld: 0.02, else 1; paper: 1)")
    advantage_floor: float = setting(None, "advantages are divided by their standard deviation, by this at least",
                                     small=1.0, large=0.0)
    negative_weight: float = setting(None, "of advantages below 0 [1, which is PPO]")
    imitation: int = setting(None, "minibatches of the run's own won games that are learned again after each update "
                             "(imitation.py) [0]")
    clip_coef: float = setting(0.1, "ε of the ratio")
    update_epochs: int = setting(4, "passes over a rollout")
    minibatch_size: int = setting(128, "answers per optimiser step")
    micro_batch_size: int = setting(None, "answers per forward pass, for memory (sums round otherwise)",
                                    small=64, large=4)
    target_kl: float = setting(None, "the policy's update ends when a minibatch's KL exceeds this; 0: never",
                               small=0.1, large=0.0)
    lr: float = setting(None, "learning rate, falling on a cosine", small=2e-4, large=1e-5)
    value_lr: float = setting(None, "the value head's, falling likewise", small=1e-3, large=1e-5)
    lr_end: float = setting(1e-9, "what both fall towards")
    max_grad_norm: float = setting(1.0, "policy's and value head's gradients are each scaled down to this (ours)")
    # before
    sft_steps: int = setting(None, "batches of supervised fine-tuning before RL, from plain weights (paper: 780)",
                             small=0, large=100)
    # keeping
    save_every: int = setting(1, "a checkpoint every so many updates")
    tensorboard: bool = setting(False, "also for TensorBoard (extras/requirements-tensorboard.txt), in OUT/tensorboard")
    eval_episodes: int = setting(None, "held-out games at the start and at the end; 0 for none", small=1000, large=200)
    eval_seed: int = setting(10_000, "they are dealt by this seed and the following ones")

    free = (*ModelSettings.free, "tensorboard")

    @property
    def batch_size(self):
        """S, the samples of one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self):
        return self.total_timesteps // self.batch_size

    def temperature_at(self, update):
        """The temperature of an update, counted from 0, and of what is played after the last one."""
        done = min(1.0, update / max(1, self.num_updates - 1))
        return self.temperature + (self.temperature_end - self.temperature) * done

    def problem(self):
        for name in ("total_timesteps", "num_steps", "num_envs", "update_epochs", "minibatch_size", "save_every",
                     "max_new_tokens"):
            if getattr(self, name) < 1:
                return f"{_flag(name)} must be 1 or more"
        for name in ("cot_lambda", "gamma", "gae_lambda", "clip_coef", "negative_weight"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                return f"{_flag(name)} must lie between 0 and 1"
        for name in ("lr", "value_lr", "lr_end", "rank", "temperature", "temperature_end", "micro_batch_size",
                     "play_batch_size", "reward_scale", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                return f"{_flag(name)} must be above 0"
        if min(self.temperature or 1, self.temperature_end or 1) < 1e-3:
            return "--temperature and --temperature-end must be 0.001 or more: logits are divided by them"
        if (self.rank or 0) > 2**14:
            return "--rank must be 16384 or less: no layer is wider"
        if self.lr_end > min(self.lr or 1, self.value_lr or 1):
            return "--lr-end must not be above --lr or --value-lr, which fall towards it"
        if self.eval_seed + (self.eval_episodes or 0) > 2**31:
            return "--eval-seed + --eval-episodes must be at most 2³¹: training deals begin there"
        for name in ("seed", "eval_episodes", "eval_seed", "target_kl", "advantage_floor", "sft_steps",
                     "gradient_checkpointing", "imitation"):
            if (getattr(self, name) or 0) < 0:
                return f"{_flag(name)} must not be negative"
        if self.batch_size < 2:
            return "--num-envs × --num-steps must be 2 or more: advantages are normalised over a rollout"
        if self.total_timesteps < self.batch_size:
            return (f"--total-timesteps {self.total_timesteps} is less than one rollout of {self.batch_size} "
                    "(--num-envs × --num-steps): lower one of these")
        return super().problem()


def default_of(cls, name, small):
    """The default of a field that hangs on the model's size.

    >>> default_of(Settings, "temperature", small=False)
    0.2
    """
    return cls.__dataclass_fields__[name].metadata["by_size"]["small" if small else "large"]


def with_task_defaults(cls, given):
    """Settings of what was given, and the task's own defaults."""
    own = {name: value for name, value in TASK_DEFAULTS.get(given["task"], {}).items()
           if name in cls.__dataclass_fields__}
    return cls(**(own | given))


def take_up(settings, adapters):
    """Rank and parts become those of adapters to go on with (lora.adapter_settings); ModelError if others were set."""
    for name in ("rank", "target_modules"):
        if getattr(settings, name) not in (None, adapters[name]):
            raise ModelError(f"the adapters to go on with have {name} {adapters[name]}: leave the flag out")
        setattr(settings, name, adapters[name])


def fill_in(settings, small):
    """Give what was not chosen the defaults of the model's size and of the game."""
    values = dict(POCKET_DEFAULTS.get(settings.task, {}) if small else {})
    if getattr(settings, "temperature", None) is not None:
        values.pop("temperature_end", None)                 # a temperature that was chosen stays
    values |= {entry.name: default_of(type(settings), entry.name, small) for entry in fields(settings)
               if entry.metadata["by_size"] and entry.name not in values}
    for name, value in values.items():
        if getattr(settings, name, 0) is None:              # SFTSettings has not all of them
            setattr(settings, name, value)
    if isinstance(settings, Settings):
        for name, value in {"temperature_end": settings.temperature, "negative_weight": 1.0, "imitation": 0,
                            "reward_scale": REWARD_SCALE[settings.task]}.items():
            if getattr(settings, name) is None:
                setattr(settings, name, value)


# ---- the command line -----------------------------------------------------------------------------------------------
def add_flags(parser, cls, names=None):
    """Add a flag for each field of a settings class, or for those named; what is not given is not in the result."""
    for entry in [cls.__dataclass_fields__[name] for name in names or cls.__dataclass_fields__]:
        if entry.metadata["flag"]:
            options = {"help": _help(entry), "default": argparse.SUPPRESS}
            if entry.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif entry.type is tuple:
                options |= {"type": _parts, "metavar": "PART,PART"}
            else:
                options |= {"type": entry.type, "choices": entry.metadata["choices"]}
            parser.add_argument(_flag(entry.name), **options)


def make_parser(cls, description=None):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, cls)
    return parser


def _flag(name):
    return "--" + name.replace("_", "-")


def _parts(text):
    """Comma-separated parts in PARTS' own order; what is none comes last, for `problem` to name.

    >>> _parts("language,vision")
    ('vision', 'language')
    """
    return tuple(sorted(set(text.split(",")), key=lambda part: [*PARTS, part].index(part)))


def _help(entry):
    default, by_size = entry.default, entry.metadata["by_size"]
    if by_size:
        default = f"{by_size['small']} pocket, {by_size['large']} else"
    own = "".join(f"; {task}: {values[entry.name]}" for task, values in TASK_DEFAULTS.items() if entry.name in values)
    text = entry.metadata["help"] + ("" if default is None else f" [{default}{own}]")
    text += "".join(f" [pocket's {task}: {values[entry.name]}]" for task, values in POCKET_DEFAULTS.items()
                    if entry.name in values)
    return text.replace("%", "%%")                          # argparse formats it


def read_settings(cls, description, arguments=None):
    """Return (settings, resume): from the command line, or from the config.json of the run to resume."""
    parser = make_parser(cls, description)
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    if "out" not in given and "task" in given:
        given["out"] = f"runs/{given['task']}{cls.variant}-seed{given.get('seed', cls.seed)}"
    config = Path(given.get("out", "")) / cls.file
    exists = "out" in given and config.exists()
    if resume and exists:
        try:
            settings = _stored_settings(cls, config, given, parser)
        except ModelError as error:
            parser.error(str(error))
    elif "task" not in given:
        parser.error("--task is needed" + (f": there is no {config} to resume" if resume else ""))
    else:
        settings = with_task_defaults(cls, given)
        if resume:
            parallel.say(f"there is no run in {config.parent} yet: this starts one")
    try:
        with foreign(config):                               # such as a null where a number belongs
            problem = settings.problem()
    except ModelError as error:
        problem = str(error)
    if problem:
        parser.error(problem)
    if exists and not resume:
        parser.error(f"{config.parent} holds a run already: go on with --resume, or choose another --out")
    return settings, resume and exists


def as_settings(cls, stored):
    """A config.json's dict with the types that the fields have; ValueError for what is of another, or no choice."""
    found = dict(stored)
    for entry in fields(cls):
        value, kinds = found.get(entry.name), {float: (float, int), tuple: (tuple, list)}.get(entry.type, (entry.type,))
        choices = entry.metadata.get("choices")
        if value is not None and (type(value) not in kinds or choices and value not in choices):
            raise ValueError(f"{entry.name} is {value!r}")
        if entry.type is tuple and value is not None:
            found[entry.name] = tuple(value)
    return found


def _stored_settings(cls, config, given, parser):
    """The settings in config.json, with those given that may change in mid-run."""
    with foreign(config):
        stored = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a run's settings")
    unknown = set(stored) ^ {entry.name for entry in fields(cls)}
    if unknown := unknown - {"tensorboard"}:                # a run from before there was one goes on without
        parser.error(f"{config} was written by another program or version ({', '.join(sorted(unknown))} "
                     "differ): finish the run with that one, or start a new one with --out")
    with foreign(config):
        stored = as_settings(cls, stored)
    other = [name for name, value in given.items() if name not in cls.free and value not in (stored[name], "auto")]
    if other:
        parser.error(f"--resume goes on with the run's own settings: {config} has "
                     f"{', '.join(f'{name} {stored[name]}, not {given[name]}' for name in other)}. Leave these flags "
                     f"out ({', '.join(map(_flag, cls.free[1:]))} may change), or start a new run with --out")
    return cls(**(stored | {name: value for name, value in given.items() if name in cls.free and value != "auto"}))
