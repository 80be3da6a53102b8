"""Redraws the README's figure and its tables of results: what was measured here from results/, the rest from PAPER.

    python plot.py                      # writes results/curves.png, prints the tables

A curve is the success of the episodes that ended in each rollout; dots are the held-out games before and after.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

RESULTS = Path(__file__).parent / "results"
# Success in %: the paper's tables (peaks of training curves) and the exact ceilings (the share of solvable deals,
# expert.blackjack_value_of_game).
PAPER = {"numberline": {"LLaVA-sft": 24.8, "RL": 89.4, "ceiling": 100.0},
         "ezpoints": {"LLaVA-sft": 23.0, "RL": 50.0, "ceiling": 100.0},
         "points24": {"LLaVA-sft": 2.6, "RL": 2.3, "ceiling": 73.1},
         "blackjack": {"LLaVA-sft": 23.1, "RL": 40.2, "ceiling": 43.2}}


def read(path):
    return json.loads(path.read_text())


def runs_of(task):
    """The folders of a task's main runs, a folder a seed."""
    return sorted(folder for folder in RESULTS.glob(f"{task}-seed*") if (folder / "eval.json").exists())


def curve(folder):
    """(env steps, success) of a run, as arrays."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["success"] is not None]
    return np.array([row["env_steps"] for row in rows]), np.array([row["success"] for row in rows])


def draw_curves(path):
    """One panel a game: every seed's curve, held-out success before and after, the paper's lines as dashes."""
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.4))
    for axes, (task, paper) in zip(panels, PAPER.items()):
        for folder in runs_of(task):
            steps, success = curve(folder)
            axes.plot(steps, 100 * success, color="tab:blue", alpha=0.8, linewidth=1.2)
            ends = [100 * read(folder / name)["success"] for name in ("eval_start.json", "eval.json")]
            axes.plot([0, steps[-1]], ends, "o", color="tab:blue")
        for (name, level), style in zip(paper.items(), ("tab:gray", "tab:orange", "black")):
            axes.axhline(level, linestyle="--", linewidth=0.9, color=style,
                         label={"RL": "the paper, RL", "LLaVA-sft": "the paper, SFT"}.get(name, name))
        axes.set(title=task, xlabel="environment steps", ylim=(0, 104 if paper["ceiling"] > 50 else 60))
    panels[0].set_ylabel("success, %")
    panels[0].legend(fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table():
    """The main table in Markdown: a row per run, held-out success in % with its 95 % interval."""
    lines = ["| run | random | best constant action | exact ceiling | the paper: SFT → RL | here: SFT start | here: RL | "
             "minutes |", "|---|---|---|---|---|---|---|---|"]
    for task, paper in PAPER.items():
        chance, constant = (100 * read(RESULTS / "baselines" / f"{task}-{name}.json")["success"]
                            for name in ("random", "constant"))
        for folder in runs_of(task):
            start, end = read(folder / "eval_start.json"), read(folder / "eval.json")
            wall = read(folder / "wall.json") if (folder / "wall.json").exists() else None
            minutes = f"{wall['wall_s'] / 60:.1f}" if wall else "–"
            shares = [f"{100 * r['success']:.1f} ({100 * r['success_low']:.1f} to {100 * r['success_high']:.1f})"
                      for r in (start, end)]
            lines.append(f"| {folder.name} | {chance:.1f} | {constant:.1f} | {paper['ceiling']} | "
                         f"{paper['LLaVA-sft']} → {paper['RL']} | {shares[0]} | **{shares[1]}** | {minutes} |")
    return "\n".join(lines)


def conduct():
    """What a run's answers are like before → after, in Markdown."""
    keys = {"parse_rate": "named a legal action", "reading_rate": "read the picture right",
            "expert_agreement": "played as the expert"}
    lines = [f"| run | {' | '.join(keys.values())} |", "|---|---|---|---|"]
    for folder in [folder for task in PAPER for folder in runs_of(task)]:
        start, end = read(folder / "eval_start.json"), read(folder / "eval.json")
        shares = " | ".join(f"{100 * start[key]:.1f} → {100 * end[key]:.1f}" for key in keys)
        lines.append(f"| {folder.name} | {shares} |")
    return "\n".join(lines)


def decisions():
    """How often each Blackjack policy hits, by total, in Markdown: what the average does not show."""
    keys = {"hit_rate_to_11": "on 4 to 11", "hit_rate_12_to_16": "on 12 to 16", "hit_rate_from_17": "on 17 to 21"}
    lines = [f"| hits | {' | '.join(keys.values())} | wins |", "|---|---|---|---|---|"]
    rows = [("the exact best play for wins", RESULTS / "baselines" / "blackjack-expert.json")]
    for folder in runs_of("blackjack"):
        rows += [(f"{folder.name}: SFT start", folder / "eval_start.json"),
                 (f"{folder.name}: after RL", folder / "eval.json")]
    for name, path in rows:
        result = read(path)
        shares = " | ".join(f"{100 * result[key]:.0f} %" for key in keys)
        lines.append(f"| {name} | {shares} | {100 * result['success']:.1f} % |")
    return "\n".join(lines)


def plans():
    """How often the formula games' written plan is right, and is followed, in Markdown."""
    lines = ["| formula games | plan right while a solution is in reach | next symbol follows the plan | success |",
             "|---|---|---|---|"]
    for folder in [*runs_of("ezpoints"), *runs_of("points24")]:
        for name, file in (("SFT start", "eval_start.json"), ("after RL", "eval.json")):
            result = read(folder / file)
            shares = " | ".join(f"{100 * result[key]:.0f} %" for key in ("plan_rate", "plan_followed"))
            lines.append(f"| {folder.name}: {name} | {shares} | {100 * result['success']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    draw_curves(RESULTS / "curves.png")
    print(table(), conduct(), decisions(), plans(), sep="\n\n")
