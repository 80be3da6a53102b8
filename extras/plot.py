"""Redraws the figures of the READMEs from results/, and prints their tables.

    python -m extras.plot               # writes results/curves.png, lambda.png, losses.png

A curve is the success of the episodes that ended in each rollout, the mean over seeds; its band goes from the lowest
to the highest seed. Does not handle: reading the results (recorded.py), what the tables hold (tables.py).
"""

import argparse

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

from extras.recorded import CEILING, LAMBDAS, PAPER, RESULTS, baseline, curves, finals, lambda_runs, metrics, read, runs  # noqa: E402
from extras.tables import lambdas, tables  # noqa: E402


def draw_curves(path):
    """One panel a game: with and without chain of thought over training, the paper's lines as dashes."""
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.8))
    for axes, (task, paper) in zip(panels, PAPER.items()):
        for variant, start, label, color in (("", "start", "RL", "tab:blue"),
                                             ("plain", "start-temperature-0.5", "PPO alone", "tab:purple"),
                                             ("no-cot", "start-no-cot", "RL without CoT", "tab:red")):
            folders = runs(task, variant)
            axes.plot([], [], color=color, label=label)
            if not folders:
                continue
            steps, success = curves(folders)
            axes.plot(steps, np.nanmean(success, 0), color=color)
            axes.fill_between(steps, np.nanmin(success, 0), np.nanmax(success, 0), color=color, alpha=0.2, linewidth=0)
            axes.plot([0], [baseline(task, start)], "o", color=color, markersize=4)
            axes.plot([steps[-1]] * len(folders), finals(folders), "o", color=color, markersize=4)
        for label, height, color in (("the paper, SFT", paper["SFT"], "tab:gray"),
                                     ("the paper, RL", paper["RL"], "tab:orange"),
                                     ("exact ceiling", CEILING[task], "black")):
            axes.axhline(height, linestyle="--", linewidth=0.9, color=color, label=label)
        before = RESULTS / "baselines" / "pocket-two-lessons" / f"{task}.json"
        if before.exists():
            axes.axhline(100 * read(before)["success"], linestyle=":", color="tab:green")
        axes.plot([], [], ":", color="tab:green", label="this model before it was weakened")
        axes.set(title=task, xlabel="environment steps", ylim=(0, 104 if CEILING[task] > 50 else 60))
    panels[0].set_ylabel("success, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=7)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_lambda(path):
    """NumberLine while it learns, a line a λ, the mean over seeds; and both games' held-out success, a dot a seed."""
    figure, (over_time, *panels) = pyplot.subplots(1, 3, figsize=(14, 3.4))
    for weight in LAMBDAS:
        if folders := lambda_runs("numberline", weight):
            steps, success = curves(folders)
            over_time.plot(steps, np.nanmean(success, 0), color=pyplot.cm.viridis(0.95 * float(weight)),
                           label=f"λ = {weight}")
    over_time.set(title="numberline, while it learns", xlabel="environment steps", ylabel="success, %", ylim=(0, 104))
    for axes, task in zip(panels, ("numberline", "blackjack")):
        points = {float(weight): values for weight in LAMBDAS if (values := finals(lambda_runs(task, weight)))}
        for weight, values in points.items():
            axes.plot([weight] * len(values), values, "o", color="tab:blue", markersize=4)
        axes.plot(list(points), [np.mean(values) for values in points.values()], color="tab:blue", label="after RL")
        axes.axhline(baseline(task, "start"), linestyle="--", color="tab:gray", linewidth=0.9, label="SFT start")
        axes.set(title=f"{task}, held-out games", xlabel="λ", xlim=(-0.05, 1.05),
                 ylim=(0, 104 if task == "numberline" else 50))
        axes.legend(fontsize=7, loc="lower right")
    over_time.legend(fontsize=7, loc="center right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_losses(folder, path):
    """How the solvable games of a run end while it learns: won, a right plan not followed, a wrong plan."""
    rows = metrics(folder)
    shares = np.array([[row["lost_plan_not_followed"], row["lost_wrong_plan"]] for row in rows])       # (updates, 2)
    figure, axes = pyplot.subplots(figsize=(7, 3.4))
    axes.stackplot([row["env_steps"] for row in rows], 100 * (1 - shares.sum(1)), *(100 * shares.T),
                   labels=("won", "lost: a right plan, not followed", "lost: a wrong plan"),
                   colors=("tab:green", "tab:orange", "tab:red"), alpha=0.8)
    axes.set(xlabel="environment steps", ylabel="solvable games, %", ylim=(0, 100), title=folder.name, xmargin=0)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def make_parser():
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(arguments=None):
    make_parser().parse_args(arguments)
    draw_curves(RESULTS / "curves.png")
    if lambdas():
        draw_lambda(RESULTS / "lambda.png")
    if (folder := runs("points24")[:1]) and "lost_wrong_plan" in metrics(folder[0])[0]:
        draw_losses(folder[0], RESULTS / "losses.png")
    print(*tables(), sep="\n\n")


if __name__ == "__main__":
    main()
