"""A run's folder: config.json, the lines of each update, and the newest checkpoint, from which a run goes on exactly.

    save(run, "runs/blackjack-seed1")                   # checkpoint-000007, whole or not at all
    load(run, newest_checkpoint("runs/blackjack-seed1"))

`run` is train.Run. Files are safetensors and JSON. Does not handle: what the lines say (train.py), the policy's own
files (policy.py).
"""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

from safetensors.torch import load_file, save_file

import parallel
from loading import ModelError


def part_of(path) -> Path:
    """The place beside `path` where a file or a folder is written first."""
    return Path(path).with_name(Path(path).name + ".part")


def put_in_place(path):
    """Let what is whole now appear under its own name, in one step that cannot be cut in two."""
    os.replace(part_of(path), path)


def write_whole(path, text):
    """Write a text file that is never seen half written."""
    part_of(path).write_text(text)
    put_in_place(path)


def append_line(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def keep_lines(path, count):
    """Cut a file back to its first `count` lines: what came after the checkpoint is played again."""
    if path.exists():
        write_whole(path, "".join(path.read_text().splitlines(keepends=True)[:count]))


def checkpoints(folder):
    """The complete checkpoint folders of a run, oldest first. They appear by renaming: the newest is whole."""
    return sorted(Path(folder).glob("checkpoint-" + 6 * "[0-9]"))


def newest_checkpoint(folder):
    """The newest checkpoint of a run folder; ModelError where there is none."""
    if not checkpoints(folder):
        raise ModelError(f"{folder} holds no checkpoint: is it the folder that train.py wrote (--out)?")
    return checkpoints(folder)[-1]


def replace_checkpoint(whole):
    """Put a checkpoint folder that was written to its part_of in place, and drop the ones before."""
    put_in_place(whole)
    for other in set(checkpoints(whole.parent)) - {whole}:
        shutil.rmtree(other)


def save_optimizer(optimizer, folder):
    """Adam's moments and step counts; the rates are the caller's to set."""
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": value.cpu().contiguous() for key, value in state.items()}
    save_file(tensors, Path(folder) / "optimizer.safetensors")


def load_optimizer(optimizer, folder):
    moments = {}
    for name, tensor in load_file(Path(folder) / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def held_back_interrupt():
    """Ctrl-C waits: yields a function that tells whether one came. A second one stops at once."""
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def save(run, folder):
    """Write a checkpoint folder that appears whole or not at all, then drop the ones before."""
    whole = Path(folder) / f"checkpoint-{run.update:06d}"
    part = part_of(whole)
    if parallel.rank() == 0:
        for left in Path(folder).glob("checkpoint-*.part"):             # of an interrupted try
            shutil.rmtree(left)
        run.policy.save(part)
        save_optimizer(run.optimizer, part)
    parallel.wait()
    save_file({"sampling": run.sampling.get_state(), "shuffling": run.shuffling.get_state()},
              part / f"generators{parallel.rank()}.safetensors")
    (part / f"process{parallel.rank()}.json").write_text(json.dumps({
        "update": run.update, "device": run.policy.device.type, "processes": parallel.size(),
        "fallback": run.fallback.bit_generator.state, "games": [game.get_state() for game in run.games]}))
    parallel.wait()
    if parallel.rank() == 0:
        replace_checkpoint(whole)
    parallel.wait()


def load(run, checkpoint):
    """Take up all that save wrote; ModelError where the same random numbers could not be drawn."""
    plain = json.loads((checkpoint / "process0.json").read_text())
    for what, now in (("device", run.policy.device.type), ("processes", parallel.size())):
        if plain[what] != now:
            raise ModelError(f"{checkpoint} was written with {what} {plain[what]}, this is {now}: the random "
                             "numbers would differ; go on as it began, or start a new run")
    plain = json.loads((checkpoint / f"process{parallel.rank()}.json").read_text())
    if len(plain["games"]) != len(run.games):
        raise ModelError(f"{checkpoint} holds {len(plain['games'])} games a process, this run has {len(run.games)}")
    run.policy.load(checkpoint)
    generators = load_file(checkpoint / f"generators{parallel.rank()}.safetensors")
    run.sampling.set_state(generators["sampling"])
    run.shuffling.set_state(generators["shuffling"])
    load_optimizer(run.optimizer, checkpoint)
    run.update, run.fallback.bit_generator.state = plain["update"], plain["fallback"]
    for game, state in zip(run.games, plain["games"]):
        game.set_state(state)
