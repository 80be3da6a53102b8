"""RL fine-tuning of a vision-language model on a card game: the whole of RL4VLM in one loop.

    python train.py --task blackjack                       # two CPU cores: the pocket model; a 20 GB GPU: LLaVA-1.6-7B
    python train.py --task numberline --no-cot --seed 2
    python train.py --task points24 --out runs/p24 --resume

collect a rollout → advantages → clipped PPO → metrics, checkpoint. On one machine's CPU, a seed and the numbers of
threads and processes (torchrun, parallel.py) fix a run bit for bit, and a run killed at any moment and resumed ends as
the run that was left alone: metrics.jsonl too, byte for byte (the clock is in timing.jsonl). Does not handle: several
tasks at once.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import parallel
from cnn import FeaturePolicy
from env import GAMES
from eval import act, checkpoints, evaluate, model_player
from expert import reads_right
from loading import ModelError, is_small, open_model
from lora import adapter_settings
from parse import make_prompt
from policy import Policy
from ppo import Rollout, gae, ppo_update, score_rollout
from settings import BY_SIZE, REWARD_SCALE, defaults_for, learning_rates, read_settings


class Run:
    """All that a run's future depends on: policy, optimiser, games, generators, counters. save/load are exact."""

    def __init__(self, settings, policy, base="pocket"):
        self.settings, self.policy, self.base, self.update = settings, policy, base, 0
        head = list(policy.value_head.parameters())
        writes = [parameter for name, parameter in policy.trainable() if not name.startswith("value_head")]
        self.optimizer = torch.optim.Adam([{"params": writes, "lr": settings.lr},
                                           {"params": head, "lr": settings.value_lr}], eps=1e-7)     # the paper's ε
        # One seed, independent streams: each process's tokens and fallback actions; the order of samples, the same on
        # every process; and one for each game, of which a process plays its share.
        rank, share = parallel.rank(), settings.envs // parallel.size()
        own = np.random.SeedSequence(settings.seed, spawn_key=(rank,)).generate_state(2).tolist()
        order, *deals = np.random.SeedSequence(settings.seed).generate_state(1 + settings.envs).tolist()
        self.sampling = torch.Generator(policy.device).manual_seed(own[0])
        self.fallback = np.random.default_rng(own[1])
        self.shuffling = torch.Generator().manual_seed(order)
        self.games = [GAMES[settings.task]() for _ in range(share)]
        for game, seed in zip(self.games, deals[rank * share:]):
            game.reset(seed=seed + 2**31)                       # above every held-out seed

    def save(self, folder):
        """Write a checkpoint folder that appears whole or not at all, then drop the one before."""
        whole = Path(folder) / f"checkpoint-{self.update:06d}"
        part = Path(folder) / "checkpoint.part"
        if parallel.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            self.policy.save(part, self.base)
            tensors = {}
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"{index}.{key}": value.cpu().contiguous() for key, value in state.items()}
            save_file(tensors, part / "optimizer.safetensors")
        parallel.wait()
        save_file({"sampling": self.sampling.get_state(), "shuffling": self.shuffling.get_state()},
                  part / f"generators{parallel.rank()}.safetensors")
        (part / f"process{parallel.rank()}.json").write_text(json.dumps({
            "update": self.update, "device": self.policy.device.type, "processes": parallel.size(),
            "fallback": self.fallback.bit_generator.state, "games": [game.get_state() for game in self.games]}))
        parallel.wait()
        if parallel.rank() == 0:
            os.replace(part, whole)
            for other in set(checkpoints(folder)) - {whole}:
                shutil.rmtree(other)
        parallel.wait()

    def load(self, checkpoint):
        """Take up all that save wrote; ModelError where the same random numbers could not be drawn."""
        plain = json.loads((checkpoint / "process0.json").read_text())
        for what, now in (("device", self.policy.device.type), ("processes", parallel.size())):
            if plain[what] != now:
                raise ModelError(f"{checkpoint} was written with {what} {plain[what]}, this is {now}: the random "
                                 "numbers would differ; go on as it began, or start a new run")
        plain = json.loads((checkpoint / f"process{parallel.rank()}.json").read_text())
        self.policy.load(checkpoint)
        generators = load_file(checkpoint / f"generators{parallel.rank()}.safetensors")
        self.sampling.set_state(generators["sampling"])
        self.shuffling.set_state(generators["shuffling"])
        moments = {}
        for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.update, self.fallback.bit_generator.state = plain["update"], plain["fallback"]
        for game, state in zip(self.games, plain["games"]):
            game.set_state(state)


def collect(run, progress=lambda steps: None):
    """Play rollout/envs steps of every game; return (Rollout with advantages, metrics, one transcript).

    A run's first rollout also fits the value head's inputs (policy.ValueHead). Under torchrun: of this process's games;
    the metrics are of all.
    """
    settings, policy, games = run.settings, run.policy, run.games
    L, N = settings.rollout // settings.envs, len(run.games)
    rollout = Rollout()
    rewards, terminated, truncated = torch.zeros(3, L, N)   # each (L, N): L steps of N games
    cut_off = []                                            # (t, game, last picture, its v_in) of truncated episodes
    returns, successes, named, read = [], [], [], []
    states = [game.observe() for game in games]
    for t in range(L):
        pictures, infos = zip(*states)
        prompts, responses, choices = act(policy, games, pictures, infos, run.sampling, run.fallback,
                                          settings.cot, settings.max_new_tokens, batch=settings.play_batch)
        rollout.prompts += prompts
        rollout.responses += responses
        rollout.action_starts += [start for _, _, _, start in choices]
        transcript = {"text": choices[0][1], "action": games[0].legal_actions()[choices[0][0]],
                      "named": choices[0][2]}
        for i, (game, (index, text, by_name, _)) in enumerate(zip(games, choices)):
            named.append(by_name)
            if settings.cot:
                read.append(reads_right(settings.task, text, infos[i]))
            picture, rewards[t, i], done, out_of_time, info = game.step(index)
            terminated[t, i], truncated[t, i] = done, out_of_time
            if out_of_time:
                # subtle: a truncated episode is worth V of its own last state, which the next reset throws away
                cut_off.append((t, i, picture, make_prompt(game, info, settings.cot)))
            if done or out_of_time:
                returns.append(game.episode_return)
                successes.append(info["is_success"])
                picture, info = game.reset()
            states[i] = picture, info
        progress(settings.envs)
    transcript["reward"] = rewards[-1, 0].item()

    if not policy.value_head.fitted:
        policy.value_head.fit(parallel.concat(_batched(run, policy.states, rollout.prompts).float()))
    thought_logp, action_logp = score_rollout(policy, rollout, settings)
    add_advantages(run, rollout, rewards, terminated, truncated, states, cut_off)
    returns, successes, named, read, lengths = (
        parallel.concat(torch.tensor(numbers, dtype=torch.float64)).tolist()
        for numbers in (returns, successes, named, read, [len(response) for response in rollout.responses]))
    metrics = {"episodes": len(returns), "success": _mean(successes), "return_mean": _mean(returns),
               "parse_rate": _mean(named), "reading_rate": _mean(read), "response_tokens": _mean(lengths),
               "thought_logp": thought_logp, "action_logp": action_logp}
    return rollout, metrics, transcript


def add_advantages(run, rollout, rewards, terminated, truncated, states, cut_off):
    """Fill rollout.advantages and .returns (S,) by GAE; rewards, terminated, truncated (L, N).

    states: what each game shows after the last step, (picture, info); cut_off: see collect.
    """
    settings = run.settings
    values = rollout.old_values.view_as(rewards)
    texts = [make_prompt(game, info, settings.cot) for game, (_, info) in zip(run.games, states)]
    last_values = _batched(run, run.policy.value, run.policy.encode([picture for picture, _ in states], texts))
    next_values = torch.cat([values[1:], last_values[None]])
    if cut_off:
        when, which, pictures, texts = zip(*cut_off)
        next_values[when, which] = _batched(run, run.policy.value, run.policy.encode(pictures, texts))
    advantages, targets = gae(rewards * settings.reward_scale, values, next_values, terminated, truncated,
                              settings.gamma, settings.gae_lambda)
    rollout.advantages, rollout.returns = advantages.flatten(), targets.flatten()


def _batched(run, function, prompts):
    """A function of prompts, in micro-batches; its results on the CPU."""
    size = run.settings.micro_batch
    return torch.cat([function(prompts[k:k + size]).cpu() for k in range(0, len(prompts), size)])


def _mean(numbers):
    return float(np.mean(numbers)) if len(numbers) else None


def _fill(settings, defaults):
    """What was not chosen becomes the defaults of the model's size and the task."""
    for name, value in (defaults | {"reward_scale": REWARD_SCALE[settings.task]}).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def make_policy(settings, loaded=None):
    """Return (policy, its base's name); the settings that hang on the model's size are filled in.

    loaded: a loading.Loaded to use instead of what settings.model names.
    """
    if settings.model == "cnn":
        unused = ("rank", "lora_on", "temperature", "gradient_checkpointing")
        _fill(settings, {name: value for name, value in BY_SIZE["small"].items() if name not in unused})
        return FeaturePolicy(GAMES[settings.task]().legal_actions(), settings.seed), "cnn"
    loaded = loaded or open_model(settings.model, settings.bits)
    settings.model, settings.bits = loaded.name, loaded.bits
    if loaded.adapters:
        lora = adapter_settings(loaded.adapters)
        for name, value in (("rank", lora["rank"]), ("lora_on", lora["parts"])):
            if getattr(settings, name) not in (None, value):
                raise ModelError(f"the adapters in {loaded.adapters} have {name} {value}: leave the flag out")
            setattr(settings, name, value)
    elif not is_small(loaded.model.config):
        print("these are plain weights: without supervised fine-tuning first (sft.py) few answers may parse")
    _fill(settings, defaults_for(loaded.model.config))
    if not loaded.adapters:
        lora = {"rank": settings.rank, "parts": settings.lora_on}
    policy = Policy(loaded.model, loaded.processor, **lora, temperature=settings.temperature, seed=settings.seed,
                    gradient_checkpointing=settings.gradient_checkpointing)
    if loaded.adapters:
        policy.load(loaded.adapters, value=False)
    return policy, loaded.base


def train(run, folder, checkpoint=None):
    """Run from the beginning, or on from a checkpoint folder; return the held-out result at the end (or None).

    Under torchrun the first process alone writes, prints and plays the held-out games.
    """
    settings, policy, first = run.settings, run.policy, parallel.rank() == 0
    if checkpoint:
        run.load(checkpoint)
    if first:
        for name in ("metrics.jsonl", "timing.jsonl", "transcripts.jsonl"):
            _keep_lines(folder / name, run.update)
        if run.update == 0 and settings.eval_episodes:
            report("start", held_out(run, folder / "eval_start.json"))
    if checkpoint is None:
        run.save(folder)
    total = settings.updates() * settings.rollout
    with tqdm(total=total, initial=run.update * settings.rollout, unit="step", desc=settings.task,
              disable=None if first else True) as bar:
        while run.update < settings.updates():
            begun = time.perf_counter()
            rates = learning_rates(run.update, settings)
            for group, rate in zip(run.optimizer.param_groups, rates):
                group["lr"] = rate
            rollout, metrics, transcript = collect(run, bar.update)
            collected = time.perf_counter()
            metrics |= ppo_update(policy, run.optimizer, rollout, settings, run.shuffling)
            del rollout                                         # before the next one: kept image features are large
            run.update += 1
            if first:
                head = {"update": run.update, "env_steps": run.update * settings.rollout, "lr": rates[0]}
                record(folder, head, metrics, transcript, (collected - begun, time.perf_counter() - collected), bar)
            if run.update % settings.save_every == 0 or run.update == settings.updates():
                run.save(folder)
    if not (first and settings.eval_episodes):
        return None
    result = held_out(run, folder / "eval.json")
    report("end", result)
    return result


def record(folder, head, metrics, transcript, spent, bar):
    """Write an update's lines into the run folder and show them."""
    _append(folder / "metrics.jsonl", head | metrics)
    _append(folder / "transcripts.jsonl", head | transcript)
    _append(folder / "timing.jsonl", {"update": head["update"], "rollout_s": round(spent[0], 2),
                                      "update_s": round(spent[1], 2)})
    draw_curve(folder)
    bar.write(f"{head['env_steps']:6d}  {transcript['text']}  → {transcript['action']}"
              f"{'' if transcript['named'] else ' (drawn at random)'}, reward {transcript['reward']:g}")
    bar.set_postfix({key: f"{metrics[key]:.3f}" for key in ("success", "return_mean", "parse_rate")
                     if metrics[key] is not None})


def held_out(run, path):
    """Evaluate the present policy on held-out deals, with the run's own temperature, and write the result."""
    settings = run.settings
    print(f"playing {settings.eval_episodes} held-out games (--eval-episodes) …", flush=True)
    player = model_player(run.policy, settings.eval_seed, settings.cot, settings.max_new_tokens,
                          batch=settings.play_batch)
    result = evaluate(player, settings.task, settings.eval_episodes, settings.eval_seed, settings.envs,
                      settings.cot)
    path.write_text(json.dumps(result) + "\n")
    return result


def report(when, result):
    reading = "" if result["reading_rate"] is None else f"pictures read right {result['reading_rate']:.1%}, "
    print(f"{when}: success {result['success']:.1%} ({result['success_low']:.1%} to {result['success_high']:.1%} on "
          f"{result['episodes']} held-out games), return {result['return_mean']:.3f}, answers parsed "
          f"{result['parse_rate']:.1%}, {reading}as the expert {result['expert_agreement']:.1%}")


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
    axes.set(xlabel="environment steps", ylabel="share", ylim=(0, 1.02), title=folder.name)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)


def _append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def _keep_lines(path, count):
    """Cut a file back to its first `count` lines: what came after the checkpoint is played again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:count]
        part = path.with_suffix(".part")
        part.write_text("".join(lines))
        os.replace(part, path)


def _how_to_go_on(settings, folder):
    if (folder / "config.json").exists():
        return f"go on with: python train.py --task {settings.task} --out {folder} --resume"
    return "nothing was saved yet: start it again with the same command"


def main(arguments=None):
    parallel.start()
    settings, resume = read_settings(__doc__, arguments)
    folder = Path(settings.out)
    try:
        if settings.envs % parallel.size():
            raise ModelError(f"--envs {settings.envs} games cannot be shared out evenly to {parallel.size()} processes")
        policy, base = make_policy(settings)
        parallel.wait()                                         # all have read the folder before the first writes to it
        if parallel.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / "config.part"
            part.write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
            os.replace(part, folder / "config.json")
            print(f"run folder: {folder}")
        train(Run(settings, policy, base), folder, (checkpoints(folder) or [None])[-1] if resume else None)
        parallel.stop()
    except KeyboardInterrupt:
        sys.exit(f"\ntrain.py: stopped; {_how_to_go_on(settings, folder)}")
    except (ModelError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"train.py: out of GPU memory; the last checkpoint is intact. Lower --micro-batch (now "
                 f"{settings.micro_batch}) or --play-batch (now {settings.play_batch}); "
                 f"{_how_to_go_on(settings, folder)}")


if __name__ == "__main__":
    main()
