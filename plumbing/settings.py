"""What a run is made of: every setting with its meaning, its default, the paper's value.

    settings, resume = read_settings(Settings, __doc__, ["--task", "blackjack", "--seed", "2"])
    settings = resolve(Settings, {"task": "blackjack", "seed": 2}, find_model("pocket"))

The flags of train.py and sft.py, their help and a run's config.json are all made from the
dataclasses here and in sft.py. `resolve` is the one place where defaults are made; its result is
frozen. Names are CleanRL's and PEFT's where they have one. Does not handle: what the settings do.
"""

import argparse
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from env import TASKS, check_game, find_game
from families import PARTS
from games import outside
from plumbing.errors import ModelError, as_model_error, say
from plumbing.loading import find_model
from plumbing.memory import fit_to_gpu, memory_note


def setting(default=None, help="", *, pocket=None, paper=None, why=None, choices=None):
    """A dataclass's field with its meaning.

    default: a large model's. pocket: the pocket model's, where it has another. paper: the paper's,
    where it tells one. why: the reason where ours is another than the paper's.
    """
    return field(default=default, metadata={
        "help": help, "pocket": pocket, "paper": paper, "why": why, "choices": choices})


@dataclass(frozen=True)
class ModelSettings:
    """What supervised fine-tuning and RL share."""

    task: str = setting(None, f"the game (needed; --resume knows it): {', '.join(TASKS)}, or "
                        "my_game.py:CLASS, gymnasium:ID (YOUR_OWN_GAME.md)")
    game: tuple = setting((), "its constructor's options, such as max_position=9")
    model: str = setting(
        "auto", "auto, pocket, a hub name, a folder (chat VLMs: families.py), or adapters")
    bits: str = setting(
        "auto", "of the frozen weights; auto: 32 on a CPU, 16 on a GPU with room, else 4",
        paper="16", why="4 fit a 24 GB GPU, a CPU multiplies 32",
        choices=("auto", "4", "16", "32"))
    rank: int = setting(
        128, "of the LoRA adapters, r; α = 2 r as in the paper", pocket=32, paper=128,
        why="the pocket model's layers are small")
    device: str = setting(
        "auto", "auto: a GPU where one is; cpu leaves it alone", choices=("auto", "cpu", "cuda"))
    target_modules: tuple = setting(tuple(PARTS), "the parts that have LoRA adapters and learn")
    gradient_checkpointing: int = setting(
        1, "less memory for more time: of every layer (1), of every second (2), of none (0); a GPU "
        "with room takes 0 or 2", pocket=0)
    cot: bool = setting(True, "chain of thought; --no-cot: the action alone, an ablation")
    seed: int = setting(1, "fixes the whole run")

    # Not fields: the settings' file, the end of a run folder's default name, and what may change
    # when a run is resumed: places (a model is held against its hash), sizes that are for memory.
    file, folder_suffix = "config.json", ""
    changeable = ("out", "model", "micro_batch_size", "play_batch_size", "save_every")

    @property
    def game_options(self):
        """What env.make_game takes beside the task."""
        return outside.read_options(find_game(self.task), self.game)

    def problem(self):
        """What is wrong with the settings, in words, or None."""
        _ = self.game_options       # GameError, where there is no such game or option
        if unknown := set(self.target_modules) - set(PARTS):
            there = ", ".join(PARTS)
            return f"--target-modules: no part {', '.join(sorted(unknown))}; there are {there}"
        for name, value in vars(self).items():
            # beyond 1e9 Adam's arithmetic ends; nan is not below it either
            limit = {float: 1e9, int: 2**31 - 1}.get(type(value))
            if limit and not value <= limit:
                return f"{_flag(name)} {value} is too large, or no number"
        if self.rank > 2**14:
            return "--rank must be 16384 or less: no layer is wider"
        if not str(self.out).strip() or not str(self.model).strip():
            return "--out and --model must not be empty"
        return None


@dataclass(frozen=True)
class Settings(ModelSettings):
    """A run of RL, whole."""

    out: str = setting(None, "run folder (runs/TASK-seedN)")
    temperature: float = setting(
        0.2, "of sampling and scoring", pocket=0.5, paper=0.2, why="a weak start has to explore")
    # playing
    total_timesteps: int = setting(15_000, "environment steps in all", paper=15_000)
    num_envs: int = setting(64, "games side by side", paper=1, why="answers come in batches")
    num_steps: int = setting(
        8, "steps of each game per update", paper=512, why="games × steps are a rollout")
    max_new_tokens: int = setting(256, "longest answer", paper=256)
    play_batch_size: int = setting(
        64, "answers generated at once, or what a GPU has room for (another number draws other "
        "tokens)")
    # learning
    cot_lambda: float = setting(0.5, "λ, weight of the thoughts' log-probability", paper=0.5)
    gamma: float = setting(0.9, "discount", paper=0.9)
    gae_lambda: float = setting(0.95, "of generalised advantage estimation", paper=0.95)
    reward_scale: float = setting(
        1.0, "rewards are multiplied by it for GAE", paper=1.0, why="returns of about 1")
    advantage_floor: float = setting(
        0.0, "advantages are divided by their standard deviation, by this at least", pocket=1.0,
        paper=0.0, why="V's errors are not blown up at the end")
    imitation: int = setting(
        0, "minibatches of the run's own won games learned again after each update: a flag of ours "
        "(imitation.py)", paper=0)
    clip_coef: float = setting(0.1, "ε of the ratio", paper=0.1)
    update_epochs: int = setting(4, "passes over a rollout", paper=4)
    minibatch_size: int = setting(128, "answers per optimiser step", paper=128)
    micro_batch_size: int = setting(
        4, "answers per forward pass (sums round otherwise); a GPU takes as many as make 4096 "
        "tokens, or what it has room for", pocket=64)
    compile: bool = setting(
        False, "torch.compile for learning, which rounds otherwise; a GPU's gain is not measured")
    target_kl: float = setting(
        0.0, "the policy's update ends at a minibatch's approx_kl above this; 0: never", pocket=0.1,
        paper=0.0, why="at its learning rate some updates overshoot")
    lr: float = setting(
        1e-5, "learning rate, falling on a cosine", pocket=2e-4, paper=1e-5,
        why="a small model learns faster")
    value_lr: float = setting(
        1e-5, "the value head's, falling likewise", pocket=1e-3, paper=1e-5,
        why="V has to know the state before it is of use")
    lr_end: float = setting(1e-9, "what both fall towards", paper=1e-9)
    max_grad_norm: float = setting(
        1.0, "policy's and value head's gradients are each scaled down to this", paper=0.01,
        why="DeepSpeed may ignore the published 0.01")
    # before
    sft_steps: int = setting(
        100, "batches of supervised fine-tuning before RL; 0 for a model that was taught", pocket=0,
        paper=780, why="enough for the format")
    save_every: int = setting(1, "a checkpoint every so many updates")
    tensorboard: bool = setting(
        False, "also for TensorBoard (extras/requirements-tensorboard.txt), in OUT/tensorboard")
    eval_episodes: int = setting(
        200, "held-out games at the start and at the end; 0 for none", pocket=1000)
    eval_seed: int = setting(10_000, "they are dealt by this seed and the following ones")

    changeable = (*ModelSettings.changeable, "tensorboard")

    @property
    def batch_size(self):
        """S, the samples of one rollout."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self):
        return self.total_timesteps // self.batch_size

    def problem(self):
        for name in ("total_timesteps", "num_steps", "num_envs", "update_epochs", "minibatch_size",
                     "save_every", "max_new_tokens"):
            if getattr(self, name) < 1:
                return f"{_flag(name)} must be 1 or more"
        for name in ("cot_lambda", "gamma", "gae_lambda", "clip_coef"):
            if not 0 <= getattr(self, name) <= 1:
                return f"{_flag(name)} must lie between 0 and 1"
        for name in ("lr", "value_lr", "lr_end", "rank", "temperature", "micro_batch_size",
                     "play_batch_size", "reward_scale", "max_grad_norm"):
            if not getattr(self, name) > 0:
                return f"{_flag(name)} must be above 0"
        if self.temperature < 1e-3:
            return "--temperature must be 0.001 or more: logits are divided by it"
        if self.lr_end > min(self.lr, self.value_lr):
            return "--lr-end must not be above --lr or --value-lr, which fall towards it"
        for name in ("seed", "eval_episodes", "eval_seed", "target_kl", "advantage_floor",
                     "sft_steps", "gradient_checkpointing", "imitation"):
            if getattr(self, name) < 0:
                return f"{_flag(name)} must not be negative"
        if self.eval_seed + self.eval_episodes > 2**31:
            return "--eval-seed + --eval-episodes must be at most 2³¹: training deals begin there"
        if self.batch_size < 2:
            return "--num-envs × --num-steps must be 2 or more: advantages are normalised over it"
        if self.total_timesteps < self.batch_size:
            return (f"--total-timesteps {self.total_timesteps} is less than one rollout of "
                    f"{self.batch_size} (--num-envs × --num-steps): lower one of these")
        return super().problem()


# ---- defaults ----------------------------------------------------------------------------------
def resolve(cls, given: dict, model=None):
    """Return cls with every setting filled: the one place where defaults are made.

    Of several values the last wins: a large model's default, the pocket model's, the game's own
    (its class), what the model's files ask for, what was given. What depends on a GPU's memory
    comes last (memory.fit_to_gpu). model: loading.FoundModel, None where no model plays.
    ModelError where the settings make no sense.
    """
    entries = cls.__dataclass_fields__
    given = {name: value for name, value in given.items() if value != "auto"}
    values = {name: entry.default for name, entry in entries.items()}
    if model and model.is_pocket:
        values |= {
            name: entry.metadata["pocket"] for name, entry in entries.items()
            if entry.metadata["pocket"] is not None}
    game = find_game(given["task"])
    values |= game.paper_settings | game.preferred_settings
    own = _of_the_model(model, given) if model else {}
    values |= own | given | ({"model": model.name} if model else {})
    if values.get("full"):                      # sft.py
        if {"rank", "target_modules"} & set(given):
            raise ModelError("--full trains all weights and has no adapters: leave --rank and "
                             "--target-modules out")
        values |= {"rank": 0, "target_modules": ()}
    if values["device"] == "auto":
        values["device"] = model.device.partition(":")[0] if model else "cpu"
    small = model is None or model.is_pocket or model.device == "cpu" or values.get("full")
    if values["bits"] == "auto" and small:
        values["bits"] = "32"
    settings = cls(**{name: value for name, value in values.items() if name in entries})
    if problem := settings.problem():
        raise ModelError(problem)
    if small:
        return settings
    return fit_to_gpu(model, settings, {*own, *given})


def _of_the_model(model, given):
    """The settings that a model's own files ask for; ModelError where others were given."""
    found = {}
    if model.is_taught:
        found["sft_steps"] = 0
    if model.is_quantised:
        found["bits"] = "4"
    for name, value in model.adapter_flags.items():
        if given.get(name, value) != value:
            raise ModelError(f"the adapters to go on with have {name} {value}: leave the flag out")
        found[name] = value
    return found


def departures(settings, given=()) -> list[str]:
    """A line for each setting that is not the paper's, with the reason; given: names chosen."""
    game, lines = find_game(settings.task), []
    for entry in fields(settings):
        paper = game.paper_settings.get(entry.name, entry.metadata["paper"])
        value = getattr(settings, entry.name)
        no_adapters = entry.name == "rank" and not value        # sft.py --full
        if paper is not None and value != paper and not no_adapters:
            why = "as given" if entry.name in given else entry.metadata["why"]
            lines.append(f"{entry.name:16} {value!s:8} the paper's: {paper!s:8} {why}")
    return lines


# ---- the command line --------------------------------------------------------------------------
def add_flags(parser, cls, names=None):
    """Add a flag for each field of a settings class that has a help, or for those named.

    What is not given on the command line is not in the result.
    """
    for entry in map(cls.__dataclass_fields__.get, names or cls.__dataclass_fields__):
        if not entry.metadata["help"]:
            continue
        options = {"help": _help(entry), "default": argparse.SUPPRESS}
        if entry.name == "game":
            options |= {"action": GameOption, "nargs": "+", "metavar": "NAME=VALUE"}
        elif entry.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif entry.type is tuple:
            options |= {"type": _parts, "metavar": "PART,PART"}
        else:
            options |= {"type": entry.type, "choices": entry.metadata["choices"]}
        parser.add_argument(_flag(entry.name), **options)
        if entry.name == "game":        # and three options of games/wrapped.py by their own names
            for name, value in (("actions", "A,B"), ("success_return", "R"), ("description", "T")):
                options |= {"dest": "game", "const": name, "metavar": value, "nargs": None}
                options["help"] = f"gymnasium: the same as --game {name}={value}"
                parser.add_argument(_flag(name), **options)


class GameOption(argparse.Action):
    """Adds NAME=VALUE to the tuple `game`; const: the NAME, where the flag's value is a VALUE."""

    def __call__(self, parser, namespace, values, option_string=None):
        texts = [f"{self.const}={values}"] if self.const else values
        namespace.game = (*getattr(namespace, "game", ()), *texts)


def make_parser(cls, description=None):
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_is)
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
    """A flag's help: its meaning, all its defaults, and the paper's value where ours is another."""
    told = []
    if entry.default not in (None, ()):
        told.append(",".join(entry.default) if entry.type is tuple else f"{entry.default}")
    if entry.metadata["pocket"] is not None:
        told.append(f"pocket {entry.metadata['pocket']}")
    for task, game in TASKS.items():
        own = game.paper_settings | game.preferred_settings
        if entry.name in own:
            told.append(f"{task} {own[entry.name]}")
    if entry.metadata["why"]:
        told.append(f"the paper {entry.metadata['paper']}: {entry.metadata['why']}")
    text = entry.metadata["help"] + (f" [{'; '.join(told)}]" if told else "")
    return text.replace("%", "%%")              # argparse formats it


def read_settings(cls, description, arguments=None):
    """Return (settings, resume): from the command line, or from the config.json of the run.

    Prints what the settings of a new run are, where they are not the paper's.
    """
    parser = make_parser(cls, description)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run folder's last checkpoint")
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume")
    if "out" not in given and "task" in given:
        name = find_game(given["task"]).__name__.lower() + cls.folder_suffix
        given["out"] = f"runs/{name}-seed{given.get('seed', cls.seed)}"
    config = Path(given.get("out", "")) / cls.file
    exists = "out" in given and config.exists()
    if resume and exists:
        settings = _resumed(cls, config, given)
        check_game(settings.task, settings.game)
        return settings, True
    if "task" not in given:
        parser.error("--task is needed" + (f": there is no {config} to resume" if resume else ""))
    if exists:
        parser.error(f"{config.parent} holds a run: go on with --resume, or choose another --out")
    if resume:
        say(f"there is no run in {config.parent} yet: this starts one")
    check_game(given["task"], given.get("game", ()))
    model = find_model(given.get("model", cls.model), given["task"], device=given.get("device"))
    settings = resolve(cls, given, model)
    say(f"model: {model.why}, in {settings.bits} bits{memory_note(model, settings)}")
    if found := departures(settings, given):
        say("\n  ".join(["settings that are not the paper's:", *found]))
    return settings, False


def stored_settings(cls, config):
    """The settings in a run's config.json; ModelError where they are damaged, or not this
    version's."""
    with as_model_error(config):
        stored = json.loads(Path(config).read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a run's settings")
    if unknown := set(stored) ^ {entry.name for entry in fields(cls)}:
        raise ModelError(
            f"{config} was written by another program or version ({', '.join(sorted(unknown))} "
            "differ): finish or evaluate the run with that one, or start a new one with --out")
    with as_model_error(config):
        for entry in fields(cls):
            value, choices = stored[entry.name], entry.metadata["choices"]
            kinds = {float: (float, int), tuple: (tuple, list)}.get(entry.type, (entry.type,))
            if type(value) not in kinds or choices and value not in choices:
                raise ValueError(f"{entry.name} is {value!r}")
            if entry.type is tuple:
                stored[entry.name] = tuple(value)
        settings = cls(**stored)
        if problem := settings.problem():
            raise ValueError(problem)
    return settings


def _resumed(cls, config, given):
    """The settings in config.json, with those given that may change in mid-run."""
    stored = stored_settings(cls, config)
    given = {name: value for name, value in given.items() if value != "auto"}
    other = {
        name: value for name, value in given.items()
        if name not in cls.changeable and value != getattr(stored, name)}
    if other:
        said = ", ".join(f"{name} {getattr(stored, name)}, not {other[name]}" for name in other)
        may = ", ".join(_flag(name) for name in cls.changeable[1:])
        raise ModelError(
            f"--resume goes on with the run's own settings: {config} has {said}. Leave these flags "
            f"out ({may} may change), or start a new run with --out")
    changed = {name: value for name, value in given.items() if name in cls.changeable}
    settings = replace(stored, **changed)
    if problem := settings.problem():
        raise ModelError(problem)
    return settings
