"""What a run survives, tried for real: kills, full disks, damaged checkpoints, hostile answers; minutes, with counts.

    python -m extras.torture                                # a table, and one JSON object as the last line
    python -m extras.torture --kills 200 --answers 1000000

A tiny random model trains on NumberLine in forked processes that die: at each call that writes, and at random moments;
or whose disk is full at each such call. Each is resumed and must end, byte for byte, as the run that was left alone.
Every file of a checkpoint gets flipped bits, and must be refused. test_all.py holds a small share of this.
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
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import checkpoint
import lora
import policy
import train
from extras import pocket
from loading import POCKET, load_model
from parse import json_closed, parse

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


def outcome(run):
    """The bytes that a run must end with."""
    names = ("metrics.jsonl", "transcripts.jsonl", "adapter_model.safetensors", "value_head.safetensors",
             "optimizer.safetensors", "generators0.safetensors", "process0.json")
    last = checkpoint.newest_checkpoint(run)
    return [((last if (last / name).exists() else run) / name).read_bytes() for name in names]


def interrupted(command, folder, expected, sabotage):
    """One run that is sabotaged in a child, then resumed: (whether it was, whether it then ended as expected)."""
    process, said = child([*command, "--out", str(folder)], sabotage)
    status, text = ended(process, said)
    return status != 0, _goes_on(command, folder, expected) and "Traceback" not in text


def _goes_on(command, folder, expected):
    status, text = ended(*child([*command, "--out", str(folder), "--resume"]))
    left = [path.name for path in folder.iterdir() if path.name.endswith((".part", ".gone"))]
    same = status == 0 and outcome(folder) == expected and not left
    if not same:
        print(f"{folder}: {text[-500:]} {left}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return same


def torture_writes(command, folder, expected, what):
    """Every call that writes, in turn: (tried, ended as the run left alone)."""
    tried = held = 0
    for number in itertools.count():
        was, same = interrupted(command, folder / f"write-{number}", expected, lambda n=number: at_write(n, what))
        if not was:
            return tried, held                              # there is no such call any more
        tried, held = tried + 1, held + same
    return tried, held


def torture_kills(command, folder, expected, count, seconds, generator):
    """Random moments: (tried, ended as the run left alone)."""
    tried = held = 0
    for number in range(count):
        run = folder / f"kill-{number}"
        process, said = child([*command, "--out", str(run)])
        time.sleep(generator.random() * seconds)
        os.kill(process, signal.SIGKILL)
        if ended(process, said)[0]:                         # else it came too late
            tried, held = tried + 1, held + _goes_on(command, run, expected)
    return tried, held


def torture_damage(command, folder, run, generator, flips=5):
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
    begun, rows = time.perf_counter(), {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            make_tiny(folder / "model")
        command = ["--task", "numberline", "--model", str(folder / "model"), "--sft-steps", "0", "--rank", "2",
                   "--num-envs", "4", "--num-steps", "2", "--total-timesteps", "16", "--max-new-tokens", "4",
                   "--minibatch-size", "8", "--eval-episodes", "0"]
        started = time.perf_counter()
        status, text = ended(*child([*command, "--out", str(folder / "alone")]))
        seconds = time.perf_counter() - started
        if status:
            sys.exit(f"the run left alone failed: {text}")
        expected = outcome(folder / "alone")
        rows["killed at each call that writes, resumed"] = torture_writes(command, folder, expected, die)
        rows["disk full at each call that writes, resumed"] = torture_writes(command, folder, expected, no_space)
        rows["killed at a random moment, resumed"] = torture_kills(command, folder, expected, options.kills, seconds,
                                                                  generator)
        rows["one bit of a checkpoint's file flipped, refused"] = torture_damage(command, folder, folder / "alone",
                                                                                 generator)
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
    parser.add_argument("--answers", type=int, default=100_000, help="hostile strings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON object to a file")
    return parser


if __name__ == "__main__":
    main()
