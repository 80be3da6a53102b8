"""RL fine-tuning of a vision-language model on a game: RL4VLM's loop; its parts are in rollout.py and ppo.py.

    python train.py --task blackjack                       # two CPU cores: the pocket model; a 20 GB GPU: LLaVA-1.6-7B
    python train.py --task numberline --no-cot --seed 2
    python train.py --task points24 --out runs/p24 --resume

`train` below is the loop: play, score, advantages, update, record, save. On one machine's CPU, a seed and the numbers
of threads and processes (torchrun, plumbing/parallel.py) fix a run bit for bit, and a run killed at any moment and
resumed ends as the run that was left alone: metrics.jsonl too, byte for byte (the clock is in timing.jsonl).
Does not handle: several tasks at once.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import signal
import time
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C in the seconds of importing: no traceback

import numpy as np
import torch
from tqdm import tqdm

from env import make_game
from eval import at_most, evaluate
from imitation import WonGames, imitate
from players import model_player
from plumbing import parallel
from plumbing.checkpoint import append_line, checkpoints, claim, keep_lines, load, locked, save, write_whole
from plumbing.errors import ModelError, foreign, in_words, unheard
from plumbing.settings import ModelSettings, Settings, default_of, read_settings
from ppo import ppo_update
from rollout import add_advantages, collect, play_metrics, score_rollout, value_metrics
from sft import SFTSettings, learning, policy_for, run_sft
from vlm.loading import find_model, is_small, open_model


class Run:
    """All that a run's future depends on: policy, optimiser, games, generators, counter (plumbing/checkpoint.py).

    board: extras.board.Board with --tensorboard, on which nothing depends.
    """

    def __init__(self, settings, policy, board=None):
        self.settings, self.policy, self.update = settings, policy, 0
        self.board = board
        self.checkpoint = None                              # the folder that holds it as of the last save or load
        answers = [parameter for _, parameter in learning(policy)]
        head = list(policy.value_head.parameters())
        self.optimizer = torch.optim.Adam([{"params": answers, "lr": settings.lr},
                                           {"params": head, "lr": settings.value_lr}], eps=1e-7)     # the paper's
        # One seed, independent streams: for each process its tokens, fallback actions and order of samples; and one for
        # each game, of which a process plays its share.
        rank, share = parallel.rank(), settings.num_envs // parallel.size()
        seeds = np.random.SeedSequence(settings.seed, spawn_key=(rank,)).generate_state(2).tolist()
        order, *deals = np.random.SeedSequence(settings.seed).generate_state(1 + settings.num_envs).tolist()
        self.sampling = torch.Generator(policy.device).manual_seed(seeds[0])
        self.fallback = np.random.default_rng(seeds[1])
        self.shuffling = torch.Generator().manual_seed(order + rank)
        self.games = [make_game(settings.task, **settings.world) for _ in range(share)]
        for game, seed in zip(self.games, deals[rank * share:]):
            game.reset(seed=seed + 2**31)                       # above every held-out seed
        self.won = WonGames(share) if settings.imitation else None


def train(run, folder, checkpoint=None):
    """Run from the beginning, or on from a checkpoint folder; return the held-out result at the end (or None).

    Under torchrun every process comes here; the first alone writes, prints and plays the held-out games.
    """
    settings, policy = run.settings, run.policy
    begin(run, folder, checkpoint)
    total = settings.num_updates * settings.batch_size
    with tqdm(total=total, initial=run.update * settings.batch_size, unit="step", desc=settings.task,
              disable=True if parallel.rank() else None) as bar:
        while run.update < settings.num_updates:
            anneal(run)
            begun = time.perf_counter()
            rollout = collect(policy, run.games, settings, run.sampling, run.fallback, bar.update)      # play
            score_rollout(policy, rollout, settings)                                                    # score
            add_advantages(policy, rollout, settings)                                                   # advantages
            collected = time.perf_counter()
            learned = ppo_update(policy, run.optimizer, rollout, settings, run.shuffling)               # update
            if run.won:                                                                 # and again, what was won
                run.won.add(rollout)
                learned |= imitate(policy, run.optimizer, run.won, run.games[0], settings, run.shuffling)
            run.update += 1
            spent = (collected - begun, time.perf_counter() - collected)
            metrics, sample = record(run, folder, rollout, learned, spent)                              # record
            del rollout                                         # before the next one: kept image features are large
            if run.update % settings.save_every == 0 or run.update == settings.num_updates:
                save(run, folder)                                                                       # save
            with unheard():
                show(run, folder, metrics, *sample, spent, bar)
    result = held_out(run, "end", folder / "eval.json")
    if run.board:
        run.board.catch_up()
    return result


def begin(run, folder, checkpoint):
    """Take up a checkpoint, or play the first held-out games and write the first one."""
    if checkpoint:
        load(run, checkpoint)
    if parallel.rank() == 0:
        keep_lines([folder / name for name in ("metrics.jsonl", "timing.jsonl", "transcripts.jsonl")], run.update)
        write_whole(folder / "config.json", json.dumps(dataclasses.asdict(run.settings), indent=1) + "\n")
    if run.update == 0:
        held_out(run, "start", folder / "eval_start.json")
    if checkpoint is None:
        save(run, folder)


def anneal(run):
    """Each group's learning rate falls on a cosine to lr_end over the run's updates, the temperature on a line.

    The last update is one step short of the cosine's end, so lr_end itself is reached after it.
    """
    settings = run.settings
    run.policy.temperature = settings.temperature_at(run.update)
    done = min(1.0, run.update / settings.num_updates)
    for group, start in zip(run.optimizer.param_groups, (settings.lr, settings.value_lr)):
        group["lr"] = settings.lr_end + (start - settings.lr_end) * 0.5 * (1 + math.cos(math.pi * done))


# ---- what a run shows of itself -------------------------------------------------------------------------------------
def record(run, folder, rollout, learned, spent):
    """Write an update's lines into the run folder; return (metrics, (the first game's last Choice, its reward))."""
    metrics = play_metrics(rollout, run.settings) | learned | value_metrics(rollout)
    choice, reward = rollout.choices[-len(run.games)], rollout.rewards[-1, 0].item()
    if parallel.rank():
        return metrics, (choice, reward)
    head = {"update": run.update, "env_steps": run.update * run.settings.batch_size,
            "lr": run.optimizer.param_groups[0]["lr"]}
    append_line(folder / "metrics.jsonl", head | metrics)
    append_line(folder / "transcripts.jsonl", head | {"text": choice.text, "action": choice.action,
                                                      "named": choice.named, "reward": reward})
    append_line(folder / "timing.jsonl", {"update": run.update, "rollout_s": round(spent[0], 2),
                                          "update_s": round(spent[1], 2)})
    return metrics, (choice, reward)


def show(run, folder, metrics, choice, reward, spent, bar):
    """Draw the curve and print an update; after the save, so that a closed or narrow terminal costs nothing."""
    if parallel.rank():
        return
    draw_curve(folder)
    if run.board:
        run.board.catch_up()
    if metrics["ratio_error"] > 0.02:
        bar.write(f"warning: before any step ratios are off by {metrics['ratio_error']:.3f}, PPO clips at "
                  f"{run.settings.clip_coef}: this machine's arithmetic depends on the batch; try --bits 32")
    if run.update == 1:
        minutes = (run.settings.num_updates - 1) * sum(spent) / 60
        bar.write(f"the first update took {sum(spent):.0f} s: about {minutes:.0f} minutes to go, held-out games apart")
    bar.write(f"step {run.update * run.settings.batch_size}: plays {choice.action}"
              f"{'' if choice.named else ' (drawn at random)'}, reward {reward:g}\n  {printable(choice.text)}")
    bar.set_postfix({key: f"{metrics[key]:.3f}" for key in ("success", "return_mean", "parse_rate")
                     if metrics[key] is not None})


def printable(text: str) -> str:
    """The text without anything that a terminal obeys.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def held_out(run, when, path):
    """Evaluate the policy on held-out deals, with the temperature that it has by now; write, print and return it."""
    settings = run.settings
    if parallel.rank() or not settings.eval_episodes:
        return None
    asked = at_most(settings.eval_episodes, settings.world), settings.eval_seed
    there = f"{path} (delete it, and its games are played again)"
    with foreign(there):
        result = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    if result and "update" not in result:                       # eval.py's, of whatever policy: stays, by another name
        kept = next(name for name in (path.with_name(f"{path.stem}-{n}.json") for n in itertools.count(1))
                    if not name.exists())
        path.rename(kept)
        parallel.say(f"{path} was not written by train.py: it is {kept} now")
    # one that fits was played by this very policy before the run was stopped
    if (result.get("update"), result.get("episodes"), result.get("seed")) != (run.update, *asked):
        parallel.say(f"playing {asked[0]} held-out games (--eval-episodes) …")
        run.policy.temperature = settings.temperature_at(run.update)
        player = model_player(run.policy, settings.eval_seed, settings.cot, settings.max_new_tokens,
                              batch_size=settings.play_batch_size)
        with tqdm(total=asked[0], unit="game", desc="held out", disable=None, leave=False) as bar:
            watch = lambda picture, choice, episode: bar.update(choice is None)
            if run.board:
                watch = run.board.filming(path, watch)
            result = evaluate(player, settings.task, settings.eval_episodes, settings.eval_seed, settings.num_envs,
                              settings.cot, watch, settings.world) | {"update": run.update}
        write_whole(path, json.dumps(result) + "\n")
    with foreign(there):
        success, low, high = (100 * result[key] for key in ("success", "success_low", "success_high"))
        read = f", pictures read {100 * result['reading_rate']:.1f} %" if settings.cot else ""
        parallel.say(f"{when}: success {success:.1f} % ({low:.1f} to {high:.1f}), return {result['return_mean']:.3f}, "
                     f"answers parsed {100 * result['parse_rate']:.1f} %{read}")
    return result


def draw_curve(folder):
    """Redraw curve.png: success, parse rate and reading rate over environment steps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in ("success", "parse_rate", "reading_rate"):
        points = [(row["env_steps"], row[key]) for row in rows if row[key] is not None]
        if points:
            axes.plot(*zip(*points), label=key.replace("_", " "))
    axes.set(xlabel="environment steps", ylabel="share", ylim=(0, 1.02))
    axes.set_title(printable(folder.name), parse_math=False)    # a name with two "$" is no formula
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)


# ---- the command line -----------------------------------------------------------------------------------------------
def starting_model(settings):
    """Return the name of the model that RL starts from: --model's, or the first stage's result where that is needed.

    Fills in what "auto" stood for. The first stage is the paper's: plain large weights are taught the format.
    """
    found = find_model(settings.model, settings.bits, settings)
    parallel.say(f"model: {found.why}")
    settings.model = found.name
    # the fewest of all processes' bits: each has its own GPU's free memory, and they must hold the same weights
    settings.bits = str(parallel.concat(torch.tensor([int(found.bits)])).min().item())
    if settings.sft_steps is None:
        taught = found.adapters or (Path(found.folder) / SFTSettings.file).exists()
        settings.sft_steps = 0 if taught else default_of(Settings, "sft_steps", is_small(found.config))
    if not settings.sft_steps:
        return settings.model
    folder = Path(settings.out) / "sft"
    if parallel.rank() == 0:
        parallel.say(f"two stages: {settings.sft_steps} batches of supervised fine-tuning in {folder} (--sft-steps), "
                     "then RL; the pocket model, which needs no GPU, is --model pocket")
        write_whole(folder.parent / settings.file, json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
        try:
            shared = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(ModelSettings)}
            run_sft(SFTSettings(**shared, micro_batch_size=settings.micro_batch_size, out=str(folder),
                                steps=settings.sft_steps))
        except FloatingPointError as error:
            raise ModelError(f"the first stage failed: {error}. Run sft.py by itself with it, and pass its folder as "
                             "--model to a new run") from error
        gc.collect()
        torch.cuda.empty_cache()                                # the second stage measures the GPU's free memory
    parallel.wait()
    return str(folder)


def make_policy(settings, checkpoint=None, loaded=None):
    """Return the Policy that the settings name; what hangs on the model's size is filled in.

    checkpoint: a folder whose adapters go on, and which names their base. loaded: a vlm.loading.Loaded to use as it is.
    """
    if loaded is None:
        start = checkpoint or starting_model(settings)
        loaded = open_model(start, settings.bits, settings)
        if start != settings.model:
            parallel.say(f"model: {loaded.why}")
    return policy_for(settings, loaded)


def launch(settings, resume, make=make_policy):
    """Make the policy and train it in settings.out; what goes wrong is said in a sentence."""
    folder = Path(settings.out)
    # subtle: at low temperatures gradients fall below 1e-38, where a CPU takes 2.4 times as long for the backward pass
    torch.set_flush_denormal(True)
    with in_words(lambda: _how_to_go_on(folder)):
        parallel.start()
        for name in ("num_envs", "minibatch_size"):
            if getattr(settings, name) % parallel.size():
                raise ModelError(f"--{name.replace('_', '-')} {getattr(settings, name)} cannot be shared out evenly to "
                                 f"{parallel.size()} processes")
        first = parallel.rank() == 0
        with locked(folder) if first else contextlib.nullcontext():
            if first:
                claim(folder, resume)
            parallel.wait()
            checkpoint = (checkpoints(folder) or [None])[-1] if resume else None
            board = None
            if first and settings.tensorboard:
                # before anything is played, for its package is optional
                from extras.board import Board
                board = Board(folder)
            policy = make(settings, checkpoint)
            parallel.wait()                                     # all have read the folder before the first writes to it
            parallel.say(f"run folder: {folder}")
            train(Run(settings, policy, board), folder, checkpoint)
            parallel.stop()


def _how_to_go_on(folder):
    if (folder / "config.json").exists():
        return f"go on with the same command and --resume (its run folder is {folder})"
    return "nothing was saved yet: start it again with the same command"


def main(arguments=None):
    with in_words():
        settings, resume = read_settings(Settings, __doc__, arguments)
    launch(settings, resume)


if __name__ == "__main__":
    main()
