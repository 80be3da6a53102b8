"""What a run survives, tried for real: kills and full disks.

    python -m lab.torture                       # minutes; a table, and a JSON object as last line
    python -m lab.torture --kills 200
    python -m lab.torture --every 100 --kills 1 # a share of it, as the tests take it

A tiny random model trains on NumberLine in forked processes that die: at each call that writes, and
at random moments; or whose disk is full at each such call; or that are two, as torchrun starts
them, one of which dies. Each run is resumed and must end, byte for byte, as the run that was left
alone. That damaged files are refused, tests/test_runs.py has (DAMAGES).
"""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from families import load_processor
from lab import pocket
from lab.bench import bare_parser, finish
from plumbing import adapters, checkpoint, report
from plumbing.loading import POCKET

# every call of a run that changes something on the disk
WRITES = (
    (adapters, "save_file"), (checkpoint, "save_file"), (Path, "write_text"), (os, "replace"),
    (os, "fsync"), (shutil, "rmtree"), (report, "append_line"), (report, "draw_curve"))


def make_tiny(folder):
    """A random model of some 100,000 weights with the pocket model's processor."""
    processor = load_processor(str(POCKET))
    model = pocket.make_model(
        processor, seed=7, hidden=64, heads=2, vision_layers=1, text_layers=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return ["--task", "numberline", "--model", str(folder), *(
        "--sft-steps 0 --rank 2 --num-envs 4 --num-steps 2 --total-timesteps 16 "
        "--max-new-tokens 4 --minibatch-size 8 --eval-episodes 0").split()]


# ---- runs in processes of their own ------------------------------------------------------------
def start(command, run, *more, count=1, before=lambda: None):
    """Train in `count` forked processes that learn together, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tempfile.TemporaryFile("w+")

    def work(rank):
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        if count > 1:
            os.environ.update(
                WORLD_SIZE=f"{count}", RANK=f"{rank}", LOCAL_RANK=f"{rank}",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        before()
        train.main([*command, "--out", str(run), *more])

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes, said


def end(processes, said):
    """Wait for them: (whether all ended well, what they said)."""
    for process in processes:
        process.join()
    said.seek(0)
    return not any(process.exitcode for process in processes), said.read()


def outcome(run):
    """The bytes that a run must end with."""
    last = sorted(checkpoint.newest_checkpoint(run).iterdir())
    files = (run / "metrics.jsonl", run / "transcripts.jsonl", *last)
    return [file.read_bytes() for file in files]


def goes_on(command, run, text, expected, count=1):
    """Whether a run that was cut off, when it is resumed, ends as expected.

    text: what it said before. Nothing may be left half written.
    """
    well, more = end(*start(command, run, "--resume", count=count))
    left = [path.name for path in run.iterdir() if path.suffix in (".part", ".gone")]
    same = well and not left and "Traceback" not in text and outcome(run) == expected
    if not same:
        print(f"{run}: {text[-500:]} {more[-500:]} {left}", file=sys.stderr)
    shutil.rmtree(run)
    return same


# ---- what is done to them: each yields, of every try, whether it held --------------------------
def at_write(number, what):
    """Make the number-th call of all that writes do `what` instead."""
    calls = itertools.count()
    for owner, name in WRITES:
        plain = getattr(owner, name)

        def counted(*arguments, plain=plain, **options):
            if next(calls) == number:
                what()
            return plain(*arguments, **options)

        setattr(owner, name, counted)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(28, "No space left on device")


def torture_writes(command, folder, expected, what, every):
    """Every so many-th call that writes, in turn, until there is no such call."""
    for number in itertools.count(0, every):
        run = folder / f"{what.__name__}-{number}"
        well, text = end(*start(command, run, before=lambda n=number: at_write(n, what)))
        if well:
            return
        yield goes_on(command, run, text, expected)


def torture_kills(command, folder, expected, tries, seconds, generator, count):
    """One of the processes at a random moment; the others are told to end, as torchrun does."""
    for number in range(tries):
        run = folder / f"kill-{count}-{number}"
        processes, said = start(command, run, count=count)
        time.sleep(generator.random() * seconds)
        generator.choice(processes).kill()
        for process in processes:
            process.terminate()
        well, text = end(processes, said)
        if not well:        # else it came too late
            yield goes_on(command, run, text, expected, count)


def torture(folder, options):
    """{what was tried: [times, held]}."""
    generator, command = random.Random(0), make_tiny(folder / "model")
    expected, seconds = {}, {}
    for count in (1, 2):
        alone = folder / f"alone-{count}"
        begun = time.perf_counter()
        well, text = end(*start(command, alone, count=count))
        seconds[count] = time.perf_counter() - begun
        if not well:
            sys.exit(f"the run left alone failed: {text}")
        expected[count] = outcome(alone)

    def writes(what):
        return torture_writes(command, folder, expected[1], what, options.every)

    def kills(count):
        return torture_kills(
            command, folder, expected[count], options.kills, seconds[count], generator, count)

    rows = {
        "killed at each call that writes, resumed": writes(die),
        "disk full at each call that writes, resumed": writes(no_space),
        "killed at a random moment, resumed": kills(1),
        "one of two processes killed, both resumed": kills(2)}
    found = {}
    for name, tries in rows.items():
        held = list(tries)
        found[name] = len(held), sum(held)
        print(f"{name:50} {len(held):8,} {sum(held):8,}", flush=True)
    return found


def make_parser():
    parser = bare_parser(__doc__)
    for name, default, meaning in (
            ("kills", 30, "at random moments"),
            ("every", 1, "of the calls that write, each so many-th")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} [{default}]")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        rows = torture(Path(folder), options)
    finish({"seconds": round(time.perf_counter() - begun), "tried_held": rows}, options.out)
    sys.exit(any(tried != held for tried, held in rows.values()))


if __name__ == "__main__":
    main()
