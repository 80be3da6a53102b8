"""What lies in results/: the runs and baselines that figures and tables are made of, and the paper's own figures.

    runs("blackjack", "no-cot")                         # [results/runs/blackjack-no-cot-seed1, …]
    shown(finals(runs("blackjack")))                    # "41.6 ± 0.3 (5)"

A run's folder is `results/runs/TASK[-VARIANT]-seedN`. "a ± b" is the mean over seeds and half of its 95 % interval
(Student's t). Does not handle: figures (plot.py), tables (tables.py).
"""

import json
import statistics
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent.parent / "results"
# Success in %: the paper's tables (its own runs: peaks of training curves). ALFWorld there is the whole data set.
PAPER = {"numberline": {"SFT": 24.8, "RL": 89.4, "no CoT": 26.9, "CNN": 87.1, "GPT-4V": 65.5, "Gemini": 82.5},
         "ezpoints": {"SFT": 23.0, "RL": 50.0, "no CoT": 29.9, "CNN": 0.0, "GPT-4V": 10.5, "Gemini": 2.0},
         "points24": {"SFT": 2.6, "RL": 2.3, "no CoT": 0.0, "CNN": 0.0, "GPT-4V": 0.0, "Gemini": 0.0},
         "blackjack": {"SFT": 23.1, "RL": 40.2, "no CoT": 40.4, "CNN": 38.8, "GPT-4V": 25.5, "Gemini": 30.0}}
PAPER_ALFWORLD = {"SFT": 17.7, "RL": 21.7, "no CoT": 16.3, "CNN": 0.0, "GPT-4V": 19.4, "Gemini": 13.5}
# Exact: the share of solvable deals, the value of Blackjack's best play (expert.blackjack_value_of_game).
CEILING = {"numberline": 100.0, "ezpoints": 100.0, "points24": 73.1, "blackjack": 43.2}
LAMBDAS = ("0", "0.1", "0.3", "0.5", "0.7", "0.9", "1")
# Student's t, 97.5 %, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def read(path):
    return json.loads(path.read_text())


def runs(task, variant=""):
    """The finished runs of a task (and a variant, such as "no-cot"), a folder a seed."""
    name = f"{task}-{variant}-seed*" if variant else f"{task}-seed*"
    return sorted(folder for folder in (RESULTS / "runs").glob(name) if (folder / "eval.json").exists())


def finals(folders, key="success"):
    return [100 * read(folder / "eval.json")[key] for folder in folders]


def baseline(task, name, key="success"):
    """Of what RL did not train, in %: random, constant, expert, start, start-no-cot."""
    return 100 * read(RESULTS / "baselines" / f"{task}-{name}.json")[key]


def mean_interval(values):
    """(mean, half of its 95 % interval, None for one value).

    >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, 2.48]
    """
    n = len(values)
    return statistics.fmean(values), T[n - 1] * statistics.stdev(values) / n ** 0.5 if n > 1 else None


def shown(values):
    """"mean ± half (n)" of percentages, with as many seeds as there are; "–" where there is none.

    Without an interval below three seeds, where it says nothing: Student's factor for two is 12.7.
    """
    if not values:
        return "–"
    mean, half = mean_interval(values)
    spread = f" ± {half:.1f}" if len(values) > 2 else ""
    return f"{mean:.1f}{spread}" + ("" if len(values) == 3 else f" ({len(values)})")


def metrics(folder):
    """The lines of a run's metrics.jsonl, a dict an update."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves(folders):
    """(env steps (U,), success (seeds, U)): NaN where no episode ended in a rollout."""
    found = [metrics(folder) for folder in folders]
    success = [[np.nan if row["success"] is None else 100 * row["success"] for row in run] for run in found]
    return np.array([row["env_steps"] for row in found[0]]), np.array(success)


def lambda_runs(task, weight):
    return runs(task) if weight == "0.5" else runs(task, f"lambda-{weight}")
