"""What a run survives, tried for real: kills, full disks, damaged checkpoints, hostile answers; minutes, with counts.

    python -m extras.torture                                # a table, and one JSON object as the last line
    python -m extras.torture --kills 200 --answers 1000000
    python -m extras.torture --every 9 --kills 3            # a share of it, as test_all.py takes it

A tiny random model trains on NumberLine in forked processes that die: at each call that writes, and at random moments;
or whose disk is full at each such call; or that are two, as torchrun starts them, one of which dies. Each run is
resumed and must end, byte for byte, as the run that was left alone. Every file of a checkpoint gets flipped bits, and
must be refused.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import policy
import train
from extras import pocket
from parse import json_closed, parse
from plumbing import checkpoint
from vlm import lora
from vlm.loading import POCKET, load_model

WRITES = ((checkpoint, "save_file"), (policy, "save_file"), (lora, "save_file"), (checkpoint.os, "replace"),
          (checkpoint.os, "fsync"), (Path, "write_text"), (checkpoint.shutil, "rmtree"), (train, "append_line"),
          (train, "draw_curve"))
PIECES = ('"action"', ":", '"hit"', '"', "{", "}", "\\", " ", "\n", "hit", "ſ", "\ud7ff", "😀", "\x00", "}" * 50,
          "action")


def make_tiny(folder):
    """A random model of some 100,000 weights with the pocket model's processor."""
    _, processor = load_model(str(POCKET))
    model = pocket.make_model(processor, seed=7, hidden=64, heads=2, vision_layers=1, text_layers=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def child(arguments, before=lambda: None):
    """Train in a forked process; return its exit status (negative: the signal that ended it) and what it said."""
    said = tempfile.TemporaryFile("w+")
    process = os.fork()
    if process == 0:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            before()
            train.main(arguments)
            os._exit(0)
        except SystemExit as stop:
            print(stop.code, file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException:                               # never back into the parent's own stack
            traceback.print_exc()
            os._exit(2)
    return process, said


def ended(process, said):
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    said.seek(0)
    return status, said.read()


def at_write(number, what):
    """Make the number-th call of all that writes do `what` instead; the calls are counted in the returned list."""
    calls = itertools.count()
    for owner, name in WRITES:
        plain = getattr(owner, name)

        def counted(*arguments, plain=plain, **options):
            if next(calls) == number:
                what()
            return plain(*arguments, **options)

        setattr(owner, name, counted)
    return calls


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(28, "No space left on device")


def several(arguments, count):
    """`count` children that learn together, as torchrun starts them; one alone where count is 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [child(arguments, lambda rank=str(rank): count > 1 and os.environ.update(names, RANK=rank, LOCAL_RANK=rank))
            for rank in range(count)]


def outcome(run):
    """The bytes that a run must end with."""
    return [file.read_bytes() for file in (run / "metrics.jsonl", run / "transcripts.jsonl",
                                           *sorted(checkpoint.newest_checkpoint(run).iterdir()))]


def goes_on(command, folder, expected, count=1):
    """Whether a run that was cut off, when it is resumed, ends as expected and leaves nothing half written."""
    results = [ended(*one) for one in several([*command, "--out", str(folder), "--resume"], count)]
    left = [path.name for path in folder.iterdir() if path.name.endswith((".part", ".gone"))]
    same = not any(status for status, _ in results) and outcome(folder) == expected and not left
    if not same:
        print(f"{folder}: {[text[-500:] for _, text in results]} {left}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return same


def torture_writes(command, folder, expected, what, every):
    """Every so many-th call that writes, in turn: (tried, ended as the run left alone)."""
    tried = held = 0
    for number in itertools.count(0, every):
        run = folder / f"write-{number}"
        status, text = ended(*child([*command, "--out", str(run)], lambda n=number: at_write(n, what)))
        if status == 0:
            return tried, held                              # there is no such call any more
        tried, held = tried + 1, held + (goes_on(command, run, expected) and "Traceback" not in text)


def torture_kills(command, folder, expected, tries, seconds, generator, count=1):
    """One of the processes at a random moment, the others are then told to end, as torchrun does: (tried, ended as the
    run left alone)."""
    tried = held = 0
    for number in range(tries):
        run = folder / f"kill-{count}-{number}"
        processes = several([*command, "--out", str(run)], count)
        time.sleep(generator.random() * seconds)
        killed = generator.choice(processes)
        for one in processes:
            os.kill(one[0], signal.SIGKILL if one is killed else signal.SIGTERM)
        results = [ended(*one) for one in processes]
        if any(status for status, _ in results):            # else it came too late
            same = goes_on(command, run, expected, count)
            tried, held = tried + 1, held + (same and not any("Traceback" in text for _, text in results))
    return tried, held


def torture_damage(command, run, generator, flips=5):
    """A bit flipped in each file of a checkpoint, some times each: (tried, refused)."""
    tried = refused = 0
    for file in sorted(checkpoint.newest_checkpoint(run).iterdir()):
        for _ in range(flips):
            whole = file.read_bytes()
            damaged, place = bytearray(whole), generator.randrange(len(whole))
            damaged[place] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            status, text = ended(*child([*command, "--out", str(run), "--resume"]))
            tried, refused = tried + 1, refused + (status == 1 and "Traceback" not in text)
            file.write_bytes(whole)
    return tried, refused


def torture_answers(count, generator):
    """Random strings of what the parser looks at: (tried, read without an exception)."""
    legal, read = ("stand", "hit", "10", "1"), 0
    for _ in range(count):
        text = "".join(generator.choices(PIECES, k=generator.randrange(30)))
        action, start = parse(text, legal)
        read += (action in (*legal, None)) and 0 <= start <= len(text) and json_closed(text) in (True, False)
    return count, read


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(1)
    generator, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="torture-"))
    expected, seconds = {}, {}
    begun, rows = time.perf_counter(), {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            make_tiny(folder / "model")
        command = ["--task", "numberline", "--model", str(folder / "model"), "--sft-steps", "0", "--rank", "2",
                   "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "16", "--max-new-tokens", "4",
                   "--minibatch-size", "8", "--eval-episodes", "0"]
        for count in (1, 2):
            started, alone = time.perf_counter(), folder / f"alone-{count}"
            for status, text in [ended(*one) for one in several([*command, "--out", str(alone)], count)]:
                if status:
                    sys.exit(f"the run left alone failed: {text}")
            expected[count], seconds[count] = outcome(alone), time.perf_counter() - started
        rows["killed at each call that writes, resumed"] = torture_writes(command, folder, expected[1], die,
                                                                          options.every)
        rows["disk full at each call that writes, resumed"] = torture_writes(command, folder, expected[1], no_space,
                                                                             options.every)
        for count, name in (1, "killed at a random moment, resumed"), (2, "one of two processes killed, both resumed"):
            rows[name] = torture_kills(command, folder, expected[count], options.kills, seconds[count], generator,
                                       count)
        rows["one bit of a checkpoint's file flipped, refused"] = torture_damage(command, folder / "alone-1",
                                                                                 generator, options.flips)
        rows["hostile answers, read"] = torture_answers(options.answers, generator)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, (tried, held) in rows.items():
        print(f"{name:50} {tried:8,} {held:8,}")
    figures = {"seconds": round(time.perf_counter() - begun), "tried_held": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))
    sys.exit(any(tried != held for tried, held in rows.values()))


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="at random moments")
    parser.add_argument("--every", type=int, default=1, help="of the calls that write, each so many-th")
    parser.add_argument("--flips", type=int, default=5, help="flipped bits a file")
    parser.add_argument("--answers", type=int, default=100_000, help="hostile strings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


if __name__ == "__main__":
    main()
