"""Keeps what a run or an evaluation has to show, in the JSON files of this folder.

    python results/keep.py run FOLDER COMMAND --wall-s N        # → runs/NAME.json
    python results/keep.py player NAME EVALUATION.json          # one more line of baselines.json

Imports nothing of the project. Does not handle: what is drawn and printed of them (make.py).
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent


def read(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(content):
    """JSON whose differences can be read: a line a key, of metrics and transcripts a line a row."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if key in ("metrics", "transcripts"):
            rows = [json.dumps(row, ensure_ascii=False) for row in value]
            text = "[\n" + ",\n".join(rows) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def pack(folder, command, wall_s=None):
    """What is kept of a run: command, settings, seconds, code, held-out games, metrics, answers."""
    run = {"command": command, "config": read(folder / "config.json")}
    if not wall_s:      # of one that was interrupted: its updates'
        times = lines(folder / "timing.jsonl")
        wall_s = round(sum(row["rollout_s"] + row["update_s"] for row in times))
    run |= {"wall_s": wall_s, "cores": 1}
    for manifest in sorted(folder.glob("checkpoint-*/manifest.json"))[-1:]:
        run["versions"] = read(manifest)["versions"]        # "method": a hash of its files
    for name in ("eval_start", "eval"):
        if (folder / f"{name}.json").exists():
            run[name] = read(folder / f"{name}.json")
    run["metrics"] = lines(folder / "metrics.jsonl")
    keys = ("update", "text", "action", "named", "reward")
    run["transcripts"] = [{key: row[key] for key in keys}
                          for row in lines(folder / "transcripts.jsonl")]
    return run


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("run", "player"))
    parser.add_argument("name", help="the run's folder; the player's name")
    parser.add_argument("of", help="the run's command; the file of eval.py")
    parser.add_argument("--wall-s", type=int, help="seconds that the run took, on one core")
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    if options.job == "run":
        folder = Path(options.name)
        run = pack(folder, options.of, options.wall_s)
        (RESULTS / "runs" / f"{folder.name}.json").write_text(written(run))
    else:
        file = RESULTS / "baselines.json"
        known = read(file) | {options.name: read(Path(options.of))}
        file.write_text(written(dict(sorted(known.items()))))


if __name__ == "__main__":
    main()
