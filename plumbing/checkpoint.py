"""A run's folder: its lock, its files, its checkpoints. Nothing is half written or taken on trust.

    with locked(folder):                        # one program at a time
        check_run_folder(folder, resume)        # refuse what is not this program's
        save(run, folder)                       # checkpoint-000007, whole or not at all
        load(run, newest_checkpoint(folder))    # refuses what is damaged or another run's

`run` is train.Run. Files are safetensors and JSON. Does not handle: what the lines say (report.py),
the policy's own files (adapters.py), what a manifest holds (manifest.py), the model card (card.py).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

from safetensors.torch import load_file, save_file

import parallel
from plumbing.card import write_card
from plumbing.errors import ModelError, as_model_error, say
from plumbing.manifest import check, hashes, plain, write_manifest

try:
    import fcntl
except ModuleNotFoundError:
    sys.exit("a run folder is locked by fcntl, which Windows has not: use WSL (wsl --install)")

LINES = ("metrics.jsonl", "transcripts.jsonl")      # of a run's folder, a line an update

# what network folders answer where they offer no locks, or no fsync of a folder
NOT_OFFERED = (errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EPERM, errno.ENOTSUP)


# ---- files that are whole or not there ---------------------------------------------------------
def unfinished(path) -> Path:
    """The place beside `path` where a file or a folder is written first."""
    return Path(path).with_name(Path(path).name + ".part")


def put_in_place(path):
    """Let what is whole now appear under its own name, in one step that neither a kill nor a power
    cut halves."""
    part = unfinished(path)
    for file in [*part.rglob("*"), part] if part.is_dir() else [part]:
        to_disk(file)
    os.replace(part, path)
    to_disk(Path(path).parent)


def to_disk(path):
    """Return when a file's or a folder's content is on the disk, not only on its way."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # subtle: of folders alone; a file that does not reach the disk is an error anywhere
        if error.errno not in NOT_OFFERED or not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)


def write_whole(path, text):
    """Write a text file that is never seen half written."""
    unfinished(path).write_text(text, encoding="utf-8")
    put_in_place(path)


def append_line(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())     # a checkpoint must not outlive the lines before it


def first_lines(path, count):
    """The first `count` lines of a file in bytes; of none where it is not there."""
    with as_model_error(path):
        content = path.read_bytes() if path.exists() else b""
    return b"".join(content.splitlines(keepends=True)[:count])


def keep_lines(folder, count):
    """Cut a run's files back to `count` lines: what came after the checkpoint is played again."""
    for name in (*LINES, "timing.jsonl"):
        path, kept = folder / name, first_lines(folder / name, count)
        if path.exists() and path.stat().st_size > len(kept):
            with as_model_error(path):
                write_whole(path, kept.decode())


def kept_hashes(folder, count):
    """{file: hash} of what a run with `count` updates behind it keeps in its folder.

    Not the clock's lines, in which two runs of the same bits differ.
    """
    kept = dict.fromkeys(LINES, count) | {"eval_start.json": 1}
    return {
        name: hashlib.sha256(first_lines(folder / name, lines)).hexdigest()
        for name, lines in kept.items()}


def drop(folder):
    """Delete a folder so that a kill in between leaves nothing that looks whole."""
    gone = Path(folder).with_name(Path(folder).name + ".gone")
    os.replace(folder, gone)
    shutil.rmtree(gone)


# ---- whose folder it is ------------------------------------------------------------------------
@contextlib.contextmanager
def locked(folder, flag="--out"):
    """Hold the folder's lock, until the program ends, however; ModelError says who holds it."""
    with contextlib.ExitStack() as stack:
        with as_model_error(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            links = [path for path in Path(folder).iterdir() if path.is_symlink()]
        if links:
            raise ModelError(
                f"{links[0]} is a link, and what it leads to would be written over: put the file "
                f"or folder itself there, or choose another {flag}")
        with as_model_error(folder):
            file = stack.enter_context(open(Path(folder) / "run.lock", "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another program"
            raise ModelError(
                f"{folder} is in use by {holder}: wait for it, stop it, or choose another {flag}"
            ) from None
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            say(f"note: {folder} lies where no file can be locked ({error.strerror}): nothing "
                "keeps a second program from writing there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_run_folder(folder, resume):
    """Refuse a folder that train.py did not write, or cannot go on with.

    What a kill left of its own is dropped.
    """
    folder = Path(folder)
    lines = folder / "metrics.jsonl"
    has_lines = lines.exists() and lines.stat().st_size > 0
    if not resume and (folder / "sft.json").exists():
        raise ModelError(
            f"{folder} holds a result of sft.py: choose another --out (and {folder} as --model, to "
            "go on from it)")
    has_results = any((folder / name).exists() for name in ("eval_start.json", "eval.json", "sft"))
    if not resume and (has_lines or has_results or list(folder.glob("checkpoint-*"))):
        raise ModelError(
            f"{folder} holds a run's results but no config.json: nothing tells whose they are, so "
            "nothing is touched; choose another --out")
    if resume and has_lines and not checkpoints(folder):
        raise ModelError(
            f"{folder} holds a run's metrics but no checkpoint (a copy of its results?): there is "
            "nothing to go on from, and starting anew would overwrite them; choose another --out")
    drop_leftovers(folder)


def checkpoints(folder, ending=""):
    """The complete checkpoint folders of a run, oldest first. They appear by renaming: the newest
    is whole."""
    return sorted(Path(folder).glob("checkpoint-" + 6 * "[0-9]" + ending))


def drop_leftovers(folder):
    """Delete checkpoints that a kill left half written or half deleted.

    Of ours alone: checkpoint-notes.part is somebody's.
    """
    for left in (*checkpoints(folder, ".part"), *checkpoints(folder, ".gone")):
        shutil.rmtree(left)


def newest_checkpoint(folder):
    """The newest checkpoint of a run folder; ModelError where there is none."""
    if not checkpoints(folder):
        raise ModelError(
            f"{folder} holds no checkpoint: is it the folder that train.py wrote (--out)?")
    return checkpoints(folder)[-1]


def replace_checkpoint(whole, before):
    """Put a checkpoint folder that was written to its unfinished in place; drop the one before."""
    put_in_place(whole)
    if before and before != whole and before.exists():
        drop(before)


# ---- a checkpoint ------------------------------------------------------------------------------
def save_optimizer(optimizer, file):
    """Adam's moments and step counts; the rates are the caller's to set."""
    tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": value.cpu().contiguous() for key, value in state.items()}
    save_file(tensors, file)


def load_optimizer(optimizer, file):
    moments = {}
    for name, tensor in load_file(file).items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def save(run, folder):
    """Write a checkpoint folder that appears whole or not at all, then drop this run's one
    before."""
    if not all(weight.isfinite().all() for _, weight in run.policy.trainable()):
        raise FloatingPointError(
            "the weights are not finite after this update: nothing was saved, the last checkpoint "
            "is intact; start a new run (--out) with a smaller --lr or --bits 32")
    whole = Path(folder) / f"checkpoint-{run.update:06d}"
    part = unfinished(whole)
    if parallel.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)     # of an interrupted try
        run.files.save(run.policy, part)
        for name, optimizer in run.optimizers.items():
            save_optimizer(optimizer, part / f"{name}.safetensors")
        if run.start:
            weights = {str(k): weight.cpu() for k, weight in enumerate(run.start.weights)}
            save_file(weights, part / "start.safetensors")
        if (part / "adapter_config.json").exists():
            learned = f"{run.env_steps} steps of PPO, {run.settings.planned_steps} planned"
            write_card(part, "train.py", run.settings, run.files.base_name, learned)
    parallel.wait()
    # each process has its own draws and its own games
    generators = {"sampling": run.sampling.get_state(), "shuffling": run.shuffling.get_state()}
    save_file(generators, part / f"generators{parallel.rank()}.safetensors")
    buffer = run.imitation_buffer
    (part / f"process{parallel.rank()}.json").write_text(json.dumps({
        "update": run.update, "env_steps": run.env_steps,
        "device": run.policy.device.type, "processes": parallel.size(),
        "fallback": run.fallback.bit_generator.state,
        "games": [game.get_state() for game in run.games],
        "won": buffer and buffer.get_state(),
    }))
    parallel.wait()
    if parallel.rank() == 0:
        depends = run.files.depends | {"run folder": kept_hashes(Path(folder), run.update)}
        write_manifest(part, depends, run.settings)
        replace_checkpoint(whole, run.checkpoint)
    parallel.wait()
    run.checkpoint = whole


def load(run, checkpoint):
    """Take up all that save wrote.

    ModelError where it is damaged, another run's, or would draw other numbers.
    """
    config = checkpoint.parent / run.settings.file
    with as_model_error(config):
        own = json.loads(config.read_text(encoding="utf-8"))["model"]
    depends = depends_now(run, checkpoint, own)
    run.files.depends = check(checkpoint, depends, run.settings)
    stored = json.loads((checkpoint / "process0.json").read_text())
    for what, now in (("device", run.policy.device.type), ("processes", parallel.size())):
        if stored[what] != now:
            raise ModelError(
                f"{checkpoint} was written with {what} {stored[what]}, this is {now}: the random "
                "numbers would differ; go on as it began, or start a new run")
    base = run.files.base_name
    if run.settings.model not in (own, base) and str(Path(run.settings.model).resolve()) != base:
        raise ModelError(
            f"--model {run.settings.model} is not what this run goes on from, {base}: leave it out")
    stored = json.loads((checkpoint / f"process{parallel.rank()}.json").read_text())
    run.files.load(run.policy, checkpoint)
    generators = load_file(checkpoint / f"generators{parallel.rank()}.safetensors")
    run.sampling.set_state(generators["sampling"])
    run.shuffling.set_state(generators["shuffling"])
    for name, optimizer in run.optimizers.items():
        load_optimizer(optimizer, checkpoint / f"{name}.safetensors")
    if run.start:
        weights = load_file(checkpoint / "start.safetensors")
        run.start.weights = [
            weights[str(k)].to(run.policy.device) for k in range(len(weights))]
    run.update, run.env_steps = stored["update"], stored["env_steps"]
    run.fallback.bit_generator.state = stored["fallback"]
    with as_model_error(checkpoint):    # such as the data set's files, which may be others now
        for game, state in zip(run.games, stored["games"]):
            game.set_state(state)
        if run.imitation_buffer:
            run.imitation_buffer.set_state(stored["won"])
    run.checkpoint = checkpoint
    for older in checkpoints(checkpoint.parent)[:-1] if parallel.rank() == 0 else ():
        if _settings_of(older) == plain(run.settings):
            drop(older)                 # a kill may have left this run's; a stranger's stays


def depends_now(run, checkpoint, own):
    """What a checkpoint depends on, as it is now. own: the run's model, before anything moved."""
    folder = checkpoint.parent
    found = {"base model": run.files.depends.get("base model", {})}
    # the adapters in the checkpoint go on; those that the run began from may be gone
    start = folder / "sft" if run.settings.sft_steps else Path(own)
    if (start / "adapter_config.json").exists():
        found["start adapters"] = hashes(start)
    found["run folder"] = kept_hashes(folder, int(checkpoint.name.removeprefix("checkpoint-")))
    return found


def _settings_of(checkpoint):
    """The settings in a checkpoint's manifest; None where there is none that can be read."""
    try:
        return json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def held_back_interrupt():
    """Ctrl-C waits: yields a function that tells whether one came. A second one stops at once."""
    came = []
    if threading.current_thread() is not threading.main_thread():       # Python's rule for signals
        yield lambda: False
        return

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
