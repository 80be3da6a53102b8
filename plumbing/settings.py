"""What a run is made of: every setting with its meaning, its default, the paper's value.

    settings = resolve(Settings, {"task": "blackjack", "seed": 2}, find_model("pocket"))

`resolve` is the one place where defaults are made; its result is frozen. Names are CleanRL's and
PEFT's where they have one. Does not handle: what the settings do, the command line and config.json
(flags.py).
"""

from dataclasses import dataclass, field, fields

from env import TASKS, find_game
from families import PARTS
from games import outside
from plumbing.errors import ModelError
from plumbing.memory import fit_to_gpu, multiplies_bfloat16


def setting(default=None, help="", *, small=None, pocket=None, paper=None, why=None, choices=None):
    """A dataclass's field with its meaning.

    default: a large model's. small: of a model of some hundred million weights and of the pocket
    one, where they have another, set on SmolLM2-135M (results/SMOL.md) and not tried on others;
    pocket: the pocket model's, where it has one of its own. paper: the paper's, where it tells one.
    why: the reason where ours is another than the paper's.
    """
    return field(default=default, metadata={
        "help": help, "small": small, "pocket": pocket, "paper": paper, "why": why,
        "choices": choices})


def flag(name):
    """A field's flag on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class ModelSettings:
    """What supervised fine-tuning and RL share."""

    task: str = setting(None, f"the game (needed; --resume knows it): {', '.join(TASKS)}, or "
                        "my_game.py:CLASS, gymnasium:ID (YOUR_OWN_GAME.md)")
    game: tuple = setting((), "its constructor's options, such as max_position=9")
    model: str = setting(
        "auto", "auto, pocket, a hub name, a folder (chat VLMs: families.py), or adapters")
    bits: str = setting(
        "auto", "of the frozen weights; auto: 16 on a GPU with room, else 4; on a CPU 16 where it "
        "multiplies them and the model is not the pocket one, else 32",
        paper="16", why="4 fit a 24 GB GPU, most CPUs multiply 32",
        choices=("auto", "4", "16", "32"))
    rank: int = setting(
        128, "of the LoRA adapters, r; α = 2 r as in the paper", small=32, paper=128,
        why="a small model's layers are small")
    device: str = setting(
        "auto", "auto: a GPU where one is; cpu leaves it alone", choices=("auto", "cpu", "cuda"))
    target_modules: tuple = setting(tuple(PARTS), "the parts that have LoRA adapters and learn")
    gradient_checkpointing: int = setting(
        1, "less memory for more time: of every layer (1), of every second (2), of none (0); a GPU "
        "with room takes 0 or 2", small=0)
    cot: bool = setting(True, "chain of thought; --no-cot: the action alone, an ablation")
    seed: int = setting(1, "fixes the whole run")

    # Not fields: the settings' file, a run folder's suffix, and what may change when a run is
    # resumed: places (a model is held against its hash), sizes that are for memory.
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
                return f"{flag(name)} {value} is too large, or no number"
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
        0.2, "of sampling and scoring", small=0.5, paper=0.2, why="a weak start has to explore")
    # playing
    total_timesteps: int = setting(15_000, "environment steps in all", paper=15_000)
    num_envs: int = setting(
        64, "games side by side", small=32, pocket=64, paper=1, why="answers come in batches")
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
        0.0, "advantages are divided by their standard deviation, by this at least", small=1.0,
        paper=0.0, why="V's errors are not blown up at the end")
    advantage: str = setting(
        "gae", "gae; or without V, by the returns of a deal's episodes: rloo, grpo (groups.py)",
        paper="gae", choices=("gae", "rloo", "grpo"))
    group_size: int = setting(8, "with rloo and grpo: episodes of each deal")
    kl_coef: float = setting(
        0.0, "weight of ½ (log π − log π_start)² of whole answers in the loss", paper=0.0)
    imitation: int = setting(
        0, "minibatches of the run's own won games learned again after each update: a flag of ours "
        "(imitation.py)", paper=0)
    clip_coef: float = setting(0.1, "ε of the ratio", paper=0.1)
    update_epochs: int = setting(
        4, "passes over a rollout", small=2, pocket=4, paper=4, why="half the time")
    minibatch_size: int = setting(
        128, "answers per optimiser step", small=64, pocket=128, paper=128,
        why="rollouts are half as large")
    micro_batch_size: int = setting(
        4, "answers per forward pass (sums round otherwise); a GPU takes as many as make 4096 "
        "tokens, or what it has room for", small=16, pocket=64)
    compile: bool = setting(
        False, "torch.compile for learning, which rounds otherwise; a GPU's gain is not measured")
    target_kl: float = setting(
        0.0, "the policy's update ends at a minibatch's approx_kl above this; 0: never", small=0.1,
        paper=0.0, why="at its learning rate some updates overshoot")
    lr: float = setting(
        1e-5, "learning rate, falling on a cosine", small=1e-4, pocket=2e-4, paper=1e-5,
        why="a small model learns faster")
    value_lr: float = setting(
        1e-5, "the value head's, falling likewise", small=1e-3, paper=1e-5,
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
    tensorboard: bool = setting(False, "also for TensorBoard (extras/), in OUT/tensorboard")
    eval_episodes: int = setting(
        200, "held-out games at the start and at the end; 0 for none", pocket=1000)
    eval_seed: int = setting(10_000, "they are dealt by this seed and the following ones")

    changeable = (*ModelSettings.changeable, "tensorboard")

    @property
    def batch_size(self):
        """S, the samples of one rollout."""
        return self.num_envs * self.num_steps

    @property
    def planned_steps(self):
        """As many as whole rollouts have."""
        return self.total_timesteps // self.batch_size * self.batch_size

    def problem(self):
        for name in ("total_timesteps", "num_steps", "num_envs", "update_epochs", "minibatch_size",
                     "save_every", "max_new_tokens"):
            if getattr(self, name) < 1:
                return f"{flag(name)} must be 1 or more"
        for name in ("cot_lambda", "gamma", "gae_lambda", "clip_coef"):
            if not 0 <= getattr(self, name) <= 1:
                return f"{flag(name)} must lie between 0 and 1"
        for name in ("lr", "value_lr", "lr_end", "rank", "temperature", "micro_batch_size",
                     "play_batch_size", "reward_scale", "max_grad_norm"):
            if not getattr(self, name) > 0:
                return f"{flag(name)} must be above 0"
        if self.temperature < 1e-3:
            return "--temperature must be 0.001 or more: logits are divided by it"
        if self.lr_end > min(self.lr, self.value_lr):
            return "--lr-end must not be above --lr or --value-lr, which fall towards it"
        for name in ("seed", "eval_episodes", "eval_seed", "target_kl", "advantage_floor",
                     "sft_steps", "gradient_checkpointing", "imitation", "kl_coef"):
            if getattr(self, name) < 0:
                return f"{flag(name)} must not be negative"
        if self.eval_seed + self.eval_episodes > 2**31:
            return "--eval-seed + --eval-episodes must be at most 2³¹: training deals begin there"
        if self.advantage != "gae" and (self.group_size < 2 or self.num_envs % self.group_size):
            return "--group-size must be 2 or more and divide --num-envs"
        if self.advantage != "gae" and self.imitation:
            return "--imitation goes with --advantage gae alone"
        if self.batch_size < 2:
            return "--num-envs × --num-steps must be 2 or more: advantages are normalised over it"
        if self.total_timesteps < self.batch_size:
            return (f"--total-timesteps {self.total_timesteps} is less than one rollout of "
                    f"{self.batch_size} (--num-envs × --num-steps): lower one of these")
        return super().problem()


# ---- defaults ----------------------------------------------------------------------------------
# a model's size (loading.FoundModel) → the columns of defaults that it takes, the last wins
SIZES = {"large": (), "small": ("small",), "pocket": ("small", "pocket")}


def resolve(cls, given: dict, model=None):
    """Return cls with every setting filled: the one place where defaults are made.

    Of several values the last wins: a large model's default, a smaller one's, the game's own, what
    the model's files ask for, what was given; then what depends on a GPU's memory. model:
    loading.FoundModel, None where no model plays. ModelError where the settings make no sense.
    """
    entries = cls.__dataclass_fields__
    given = {name: value for name, value in given.items() if value != "auto"}
    values = {name: entry.default for name, entry in entries.items()}
    for size in SIZES[model.size if model else "large"]:
        values |= {
            name: entry.metadata[size] for name, entry in entries.items()
            if entry.metadata[size] is not None}
    game = find_game(given["task"])
    values |= game.paper_settings | game.preferred_settings
    own = _of_the_model(model, given) if model else {}
    values |= own | given | ({"model": model.name} if model else {})
    if values.get("full"):                      # sft.py
        if {"rank", "target_modules"} & set(given):
            raise ModelError("--full has no adapters: leave --rank and --target-modules out")
        values |= {"rank": 0, "target_modules": ()}
    if values["device"] == "auto":
        values["device"] = model.device.partition(":")[0] if model else "cpu"
    needs_32 = model is None or model.size == "pocket" or values.get("full")
    fits = needs_32 or model.device == "cpu"        # whatever the GPU
    if values["bits"] == "auto" and fits:
        values["bits"] = "32" if needs_32 or not multiplies_bfloat16() else "16"
    settings = cls(**{name: value for name, value in values.items() if name in entries})
    if problem := settings.problem():
        raise ModelError(problem)
    if fits:
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
