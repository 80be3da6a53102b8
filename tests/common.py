"""What the tests share: models, runs, and ways to harm them. conftest.py tells pytest of the fixtures."""

import copy
import itertools
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

import parse
import ppo
import rollout as playing
import train
from env import GAMES
from games import draw
from plumbing import checkpoint
from plumbing.adapters import PolicyFiles
from plumbing.loading import POCKET, find_model
from plumbing.settings import Settings, resolve
from policy import Policy, load_model
from tests import tiny as tiny_models

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shipped():
    """(model, processor) of the repository's own checkpoint, fp32."""
    return load_model(str(POCKET), bits=32)


@pytest.fixture
def agent(shipped):
    """A fresh Policy on a copy of the shipped model, with LoRA of rank 8."""
    return Policy(copy.deepcopy(shipped[0]), shipped[1], rank=8, seed=3)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, shipped):
    """A checkpoint folder of a small random model, with the shipped processor: loading code runs on it for real."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.llava_of(shipped[1]).save_pretrained(folder)
    shipped[1].save_pretrained(folder)
    return folder


def states_of(task, count, seed=0):
    """count (game, picture, info) met by random play."""
    generator, game, found = np.random.default_rng(seed), GAMES[task](), []
    picture, info = game.reset(seed=seed)
    while len(found) < count:
        snapshot = GAMES[task]()
        snapshot.set_state(game.get_state())
        found.append((snapshot, picture, info))
        picture, _, terminated, truncated, info = game.step(int(generator.integers(len(game.legal_actions()))))
        if terminated or truncated:
            picture, info = game.reset()
    return found


def samples_of(agent, count=2, tasks=tuple(GAMES), tokens=60):
    """(prompts, responses) of all tasks: real prompts, really sampled answers."""
    found = [state for task in tasks for state in states_of(task, count)]
    prompts = agent.encode([p for _, p, _ in found], [parse.make_prompt(g, i) for g, _, i in found])
    return prompts, agent.generate(prompts, torch.Generator().manual_seed(0), tokens, parse.json_closed)


def shake(agent, seed=0, size=0.05):
    """Move the adapters away from zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in agent.lora.values():
            layer.lora_B.normal_(std=size, generator=generator)


def play(task, actions, **state):
    """Step a game through actions' texts from a given state; return the game, [(reward, ended)] and the last info."""
    game = GAMES[task]()
    game.reset(seed=0)
    for name, value in state.items():
        setattr(game, name, value)
    steps = []
    for action in actions:
        _, reward, terminated, truncated, info = game.step(game.actions.index(action))
        steps.append((reward, "t" if terminated else "x" if truncated else ""))
    return game, steps, info


def cards(*ranks):
    return [4 * draw.RANKS.index(rank) for rank in ranks]


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory):
    """{family: a checkpoint folder of random weights}, each in its family's own layout."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in tiny_models.KINDS}
    for kind, folder in folders.items():
        tiny_models.make(kind, folder)
    return folders


def family_agent(folder, **changes):
    return Policy(*load_model(str(folder)), **({"rank": 2, "temperature": 0.7} | changes))


def mixed_prompts(agent):
    """Prompts of three lengths, each with its picture and text."""
    states = [states_of(task, 3)[-1] for task in ("blackjack", "points24", "numberline")]
    texts = [parse.make_prompt(game, info) for game, _, info in states]
    pictures = [picture for _, picture, _ in states]
    return agent.encode(pictures, texts), pictures, texts


def mistral_model(config, layers=2, side=336):
    """LLaVA-1.6-Mistral's configuration in miniature, its vocabulary whole, (side / 14)² image tokens."""
    vars(config.text_config).update(hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
                                    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.08)
    vars(config.vision_config).update(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                      initializer_range=0.08, image_size=side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaNextForConditionalGeneration(config)


def pocket_settings(task, **changes):
    """What a run of the pocket model has by default, and changes."""
    return resolve(Settings, {"task": task, "model": "pocket"} | changes, find_model("pocket", task))


def make_run(shipped, task, **changes):
    """A short run of the pocket model, of 16 games and two updates."""
    settings = pocket_settings(task, **({
        "num_envs": 16, "num_steps": 2, "total_timesteps": 64, "rank": 8, "lr": 1e-3, "value_lr": 1e-3,
        "reward_scale": 0.1, "advantage_floor": 0.0, "target_kl": 0.0, "micro_batch_size": 16,
        "max_new_tokens": 80} | changes))
    agent = Policy(copy.deepcopy(shipped[0]), shipped[1], rank=settings.rank, seed=settings.seed,
                   temperature=settings.temperature)
    return train.Run(settings, agent, PolicyFiles("pocket"))


def run_metrics(folder):
    """The lines of a run's metrics.jsonl, a dict an update."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def play_out(run):
    """A rollout, scored and with advantages."""
    rollout = playing.collect(run.policy, run.games, run.settings, run.sampling, run.fallback)
    playing.score_rollout(run.policy, rollout, run.settings)
    playing.add_advantages(run.policy, rollout, run.settings)
    return rollout


def largest_ratio_error(policy, rollout, *batches):
    """max |ρ − 1| over samples that are scored again in other company."""
    worst = 0.0
    for group, prompts, responses, shape in itertools.chain.from_iterable(map(rollout.micro_batches, batches)):
        with torch.no_grad():
            logp, _ = policy.logprobs(prompts, responses, shape)
        new = ppo.answer_logprob(logp, rollout.action_starts[group], 0.5)
        worst = max(worst, ((new - rollout.old_logp[group]).exp() - 1).abs().max().item())
    return worst


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory, tiny):
    """(folder, command): a run of the tiny model that was stopped after two of four updates."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(tiny, folder / "model")
    command = ["--task", "numberline", "--model", str(folder / "model"), "--sft-steps", "0", "--rank", "2",
               "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "32", "--max-new-tokens", "4",
               "--minibatch-size", "8", "--eval-episodes", "0"]
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(train, "save", stop_at(2, checkpoint.save))
        with pytest.raises(SystemExit):
            train.main([*command, "--out", str(folder / "run")])
    return folder / "run", command


def flip(file):
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "run.lock"}


def stop_at(update, save):
    """A save that is interrupted as by Ctrl-C, after it has written the checkpoint of that update."""
    def stopping(run, folder):
        save(run, folder)
        if run.update == update:
            raise KeyboardInterrupt
    return stopping


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
