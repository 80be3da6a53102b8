"""RL fine-tuning of a vision-language model on a game: RL4VLM's loop.

    python train.py --task blackjack        # on a CPU the pocket model, on a 20 GB GPU LLaVA-1.6-7B
    python train.py --task numberline --no-cot --seed 2
    python train.py --task points24 --out runs/p24 --resume

`train` below is the loop: play, score, advantages, update, record, save. On one machine's CPU, a
seed and the numbers of threads and processes (torchrun, parallel.py) fix a run bit for bit. A run
that is killed at any moment and resumed ends as the run that was left alone: metrics.jsonl too,
byte for byte (the clock is in timing.jsonl). Does not handle: the steps themselves (rollout.py,
ppo.py), several tasks at once.
"""

import contextlib
import gc
import itertools
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
from env import make_game
from eval import evaluate
from groups import add_group_advantages, collect_groups
from imitation import WonGames, imitate, kl_since
from lora import FrozenCopy
from players import model_player
from plumbing.checkpoint import (
    check_run_folder,
    checkpoints,
    keep_lines,
    load,
    locked,
    save,
    write_whole,
)
from plumbing.errors import ModelError, as_model_error, in_words, say
from plumbing.flags import read_settings
from plumbing.loading import find_model, load_policy
from plumbing.report import Report, draw_curve
from plumbing.settings import ModelSettings, Settings, flag, resolve
from ppo import ppo_update
from rollout import add_advantages, collect, rollout_metrics, score_rollout
from sft import SFTSettings, policy_parameters, run_sft


class Run:
    """All that a run's future depends on: policy, optimiser, games, generators, a counter.

    files: how the policy is written and read (plumbing.adapters.PolicyFiles).
    """

    def __init__(self, settings, policy, files):
        self.settings, self.policy, self.files = settings, policy, files
        if settings.compile:
            policy.compile_layers()
        self.update = self.env_steps = 0        # behind us
        self.checkpoint = None      # the folder that holds it as of the last save or load

        # two groups, each with a learning rate of its own: V learns faster; eps is the paper's
        head = list(policy.value_head.parameters())
        weights = [p for _, p in policy_parameters(policy)]
        groups = [{"params": weights, "lr": settings.lr}, {"params": head, "lr": settings.value_lr}]
        self.optimizer = torch.optim.Adam(groups, eps=1e-7)
        self.optimizers = {"optimizer": self.optimizer}     # all that a checkpoint keeps

        # One seed, independent streams: for each process its tokens, fallback actions and order of
        # samples; and one for each game, of which a process plays its share.
        rank, share = parallel.rank(), settings.num_envs // parallel.size()
        own = np.random.SeedSequence(settings.seed, spawn_key=(rank,))
        token_seed, action_seed = own.generate_state(2).tolist()
        shared = np.random.SeedSequence(settings.seed)
        order_seed, *deal_seeds = shared.generate_state(1 + settings.num_envs).tolist()
        self.sampling = torch.Generator(policy.device).manual_seed(token_seed)  # of answers' tokens
        self.fallback = np.random.default_rng(action_seed)      # of actions where none was named
        self.shuffling = torch.Generator().manual_seed(order_seed + rank)   # of samples' order
        self.games = [make_game(settings.task, **settings.game_options) for _ in range(share)]
        for game, seed in zip(self.games, deal_seeds[rank * share:]):
            # the first deal, above every held-out seed; later ones go on from its generator
            game.reset(seed=seed + 2**31)
        # both off by default
        self.start = FrozenCopy(policy.lora) if settings.kl_coef else None
        self.imitation_buffer = None
        if settings.imitation:
            self.imitation_buffer = WonGames(share)
            # its own, or its steps would go on with PPO's momentum
            self.optimizers["imitation"] = torch.optim.Adam(weights, lr=settings.lr, eps=1e-7)


def train(run, folder, report):
    """The loop: from wherever the run is to its last update.

    Under torchrun every process comes here; the first alone writes and prints.
    """
    settings, policy = run.settings, run.policy
    play, advantages = collect, add_advantages
    if settings.advantage != "gae":     # ours, off by default
        play, advantages = collect_groups, add_group_advantages
    # run.env_steps counts the answers behind us; a resumed run begins at its checkpoint's
    while run.env_steps < settings.planned_steps:
        anneal(run)

        # play: prompts, answers, rewards
        rollout = play(policy, run.games, settings, run.sampling, run.fallback, report.bar.update)
        # score: log π and V of the policy that answered, the old ones from now on
        score_rollout(policy, rollout, settings, run.start)
        # advantages: GAE over each game's steps
        advantages(policy, rollout, settings)
        report.lap("rollout_s")

        # update: some epochs of clipped PPO on this rollout
        learned = ppo_update(policy, run.optimizer, rollout, settings, run.shuffling)
        if settings.imitation:
            learned |= imitate_own_wins(run, rollout)
        run.update += 1
        run.env_steps += len(rollout.responses) * parallel.size()
        report.lap("update_s")

        # record, save, show: in this order, so that nothing shown is ever lost
        metrics = rollout_metrics(rollout, settings, run.games[0]) | learned
        # the first game's last answer (in groups: the last answer), as a sample to read
        sample = rollout.choices[-rollout.rewards.shape[1]], rollout.rewards[-1, 0].item()
        lr = run.optimizer.param_groups[0]["lr"]
        report.write(run.update, run.env_steps, lr, metrics, *sample)
        del rollout                 # before the next one: kept image features are large
        if run.update % settings.save_every == 0 or run.env_steps >= settings.planned_steps:
            save(run, folder)
        report.show()


def anneal(run):
    """Each group's learning rate falls on a cosine to lr_end over the run's updates.

    The last update is short of the cosine's end, so it still learns.
    """
    settings = run.settings
    done = run.env_steps / settings.planned_steps
    for group, start in zip(run.optimizer.param_groups, (settings.lr, settings.value_lr)):
        # from 1 to 0
        fall = 0.5 * (1 + math.cos(math.pi * done))
        group["lr"] = settings.lr_end + (start - settings.lr_end) * fall


def imitate_own_wins(run, rollout):
    """--imitation: learn once more from the games that this run has won (imitation.py)."""
    run.imitation_buffer.add(rollout)
    optimizer = run.optimizers["imitation"]
    optimizer.param_groups[0]["lr"] = run.optimizer.param_groups[0]["lr"]
    found = imitate(run.policy, optimizer, run.imitation_buffer, run.games[0], run.settings,
                    run.shuffling)
    return found | {"kl_after_imitation": kl_since(run.policy, rollout, run.settings)}


# ---- a whole run -------------------------------------------------------------------------------
def run_whole(run, folder, checkpoint=None, board=None):
    """A run from its beginning, or on from a checkpoint folder, to its last held-out games."""
    # all that the run depends on, to the last bit
    if checkpoint:
        load(run, checkpoint)
    if parallel.rank() == 0:
        # what came after the checkpoint is played again, and written again
        keep_lines(folder, run.update)
        write_settings(run.settings, folder)
        if run.update:          # the kill may have come before its curve was drawn
            draw_curve(folder)
    # where RL starts is measured on the very deals of the end
    if run.update == 0:
        held_out(run.policy, run.settings, 0, folder / "eval_start.json", board)
    # a kill in the first update then costs nothing but that
    if checkpoint is None:
        save(run, folder)
    with Report(folder, run.settings, run.env_steps, board) as report:
        train(run, folder, report)
    # the last checkpoint plays the held-out games, not the best one
    held_out(run.policy, run.settings, run.update, folder / "eval.json", board)


def held_out(policy, settings, update, path, board=None):
    """Play the held-out games of a run, write and print the result; return it.

    A result that is there already is taken where this very policy played it, before the run was
    stopped. board: extras.board.Board with --tensorboard.
    """
    if parallel.rank() or not settings.eval_episodes:
        return None
    episodes = settings.eval_episodes
    there = f"{path} (delete it, and its games are played again)"
    with as_model_error(there):
        result = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    if result and "update" not in result:
        # eval.py wrote it, of whatever policy: it stays, by another name
        kept = next(
            name for number in itertools.count(1)
            if not (name := path.with_name(f"{path.stem}-{number}.json")).exists())
        path.rename(kept)
        say(f"{path} was not written by train.py: it is {kept} now")
    if (result.get("update"), result.get("seed")) != (update, settings.eval_seed):
        say(f"playing {episodes} held-out games (--eval-episodes) …")
        player = model_player(policy, settings.eval_seed, settings.cot, settings.max_new_tokens,
                              batch_size=settings.play_batch_size)
        with tqdm(total=episodes, unit="game", desc="held out", disable=None, leave=False) as bar:
            watch = lambda picture, choice, episode: bar.update(choice is None)
            result = evaluate(player, settings.task, episodes, settings.eval_seed,
                              settings.num_envs, settings.cot, watch, settings.game_options)
        result["update"] = update
        write_whole(path, json.dumps(result) + "\n")
    if board:
        board.catch_up()
    with as_model_error(there):
        told = [f"return {result['return_mean']:.3f}",
                f"answers parsed {100 * result['parse_rate']:.1f} %"]
        if result["success"] is not None:
            told.insert(0, f"success {100 * result['success']:.1f} % ("
                        f"{100 * result['success_low']:.1f} to {100 * result['success_high']:.1f})")
        if result["reading_rate"] is not None:
            told.append(f"pictures read {100 * result['reading_rate']:.1f} %")
        say(f"{'end' if update else 'start'}: {', '.join(told)}")
    return result


# ---- the command line --------------------------------------------------------------------------
def write_settings(settings, folder):
    write_whole(folder / settings.file, json.dumps(asdict(settings), indent=1) + "\n")


def teach_format(settings):
    """The paper's first stage: a model that was not taught yet learns the answer's format (sft.py).

    Returns the folder of adapters that RL starts from.
    """
    folder = Path(settings.out) / "sft"
    if parallel.rank() == 0:
        say(f"two stages: {settings.sft_steps} batches of supervised fine-tuning in {folder} "
            "(--sft-steps), then RL; the pocket model, which needs no GPU, is --model pocket")
        write_settings(settings, folder.parent)
        given = {entry.name: getattr(settings, entry.name) for entry in fields(ModelSettings)}
        given |= {"micro_batch_size": min(16, settings.micro_batch_size), "out": str(folder),
                  "steps": settings.sft_steps}
        try:
            model = find_model(settings.model, settings.task, device=settings.device)
            run_sft(resolve(SFTSettings, given, model))
        except FloatingPointError as error:
            raise ModelError(
                f"the first stage failed: {error}. Run sft.py by itself with it, and pass its "
                "folder as --model to a new run") from error
        gc.collect()
        torch.cuda.empty_cache()        # RL has the memory
    parallel.wait()
    return str(folder)


def make_policy(settings, checkpoint=None):
    """Return (Policy, its files) that the settings name; the first stage comes before, if needed.

    checkpoint: a folder whose adapters go on, and which names their base.
    """
    start = str(checkpoint or settings.model)
    if settings.sft_steps and not checkpoint:       # a checkpoint has all adapters already
        start = teach_format(settings)
    model = find_model(start, settings.task, base=settings.model, device=settings.device)
    if start != settings.model:
        say(f"model: {model.why}")
    return load_policy(
        model, settings.bits, settings.rank, settings.target_modules, settings.temperature,
        settings.seed, settings.gradient_checkpointing)


def launch(cls, description, arguments, make):
    """A command line's whole run: settings of a class, a policy by `make`, training in its folder.

    What goes wrong is said in a sentence.
    """
    # subtle: at low temperatures gradients fall below 1e-38, where a CPU takes 2.4 times as long
    torch.set_flush_denormal(True)
    with in_words():
        parallel.start()
        settings, resume = read_settings(cls, description, arguments)
    folder = Path(settings.out)
    with in_words(folder / settings.file):
        if settings.compile:        # a machine may have no compiler: said now, not after an hour
            with as_model_error("--compile", RuntimeError):
                torch.compile(torch.neg)(torch.ones(2, device=settings.device))
        if settings.advantage != "gae" and parallel.size() > 1:
            raise ModelError("--advantage rloo and grpo are for one process: their rollouts differ "
                             "in length")
        # torchrun's processes share out the games and each minibatch
        for name in ("num_envs", "minibatch_size"):
            if getattr(settings, name) % parallel.size():
                raise ModelError(
                    f"{flag(name)} {getattr(settings, name)} cannot be shared out evenly to "
                    f"{parallel.size()} processes")
        first = parallel.rank() == 0            # it alone writes, so it alone holds the lock
        with locked(folder) if first else contextlib.nullcontext():
            if first:
                check_run_folder(folder, resume)
            parallel.wait()
            # the newest is whole: checkpoints appear by renaming
            checkpoint = (checkpoints(folder) or [None])[-1] if resume else None
            board = None
            if first and settings.tensorboard:
                from extras.board import Board  # its package is optional
                board = Board(folder)
            policy, files = make(settings, checkpoint)
            parallel.wait()             # all have read the folder before the first writes to it
            say(f"run folder: {folder}")
            run_whole(Run(settings, policy, files), folder, checkpoint, board)
            parallel.stop()


def main(arguments=None):
    launch(Settings, __doc__, arguments, make_policy)


if __name__ == "__main__":
    main()
