"""What a run shows of itself: lines in its folder, a curve, the terminal.

    with Report(folder, settings, env_steps=0) as report:
        report.bar.update(64)                           # games went a step
        report.lap("rollout_s")
        report.write(update, env_steps, lr, metrics, *sample)   # the run folder's lines
        report.show()                                   # curve.png and the terminal

Under torchrun only the first process's report does anything. Does not handle: what the metrics are
(rollout.py, ppo.py), checkpoints (checkpoint.py).
"""

import json
import time

from tqdm import tqdm

import parallel
from plumbing.checkpoint import append_line
from plumbing.errors import ignore_closed_pipe, printable


class Report:
    """See the file's header. board: extras.board.Board with --tensorboard."""

    def __init__(self, folder, settings, env_steps, board=None):
        self.folder, self.settings, self.board = folder, settings, board
        self.first = parallel.rank() == 0
        self.bar = tqdm(
            total=settings.planned_steps, initial=env_steps,
            unit="step", desc=settings.task, disable=None if self.first else True)
        self.spent, self.lap_begun = {}, time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def lap(self, name):
        """The seconds since the last lap were spent on this."""
        now = time.perf_counter()
        self.spent[name] = now - self.lap_begun
        self.lap_begun = now

    def write(self, update, env_steps, lr, metrics, choice, reward):
        """Append an update's lines to the run folder. choice: a sample answer, with its reward."""
        head = {"update": update, "env_steps": env_steps, "lr": lr}
        self.metrics, self.sample = metrics | head, (choice, reward)
        if not self.first:
            return
        answer = {
            "text": choice.text, "action": choice.action, "named": choice.named, "reward": reward}
        clock = {name: round(seconds, 2) for name, seconds in self.spent.items()}
        append_line(self.folder / "metrics.jsonl", head | metrics)
        append_line(self.folder / "transcripts.jsonl", head | answer)
        append_line(self.folder / "timing.jsonl", {"update": update, **clock})

    def show(self):
        """Draw the curve and print the update; a closed or narrow terminal costs nothing."""
        if not self.first:
            return
        with ignore_closed_pipe():
            draw_curve(self.folder)
            if self.board:
                self.board.catch_up()
            self._print()
        self.lap_begun = time.perf_counter()    # writing and showing are no part of the next lap

    def _print(self):
        settings, metrics, (choice, reward) = self.settings, self.metrics, self.sample
        steps = metrics["env_steps"]
        if metrics["ratio_error"] > 0.02:
            self.bar.write(
                f"warning: before any step ratios are off by {metrics['ratio_error']:.3f}, PPO "
                f"clips at {settings.clip_coef}: this machine's arithmetic depends on the batch; "
                "try --bits 32")
        if metrics["update"] == 1:
            seconds = sum(self.spent.values())
            minutes = max(0, settings.planned_steps / steps - 1) * seconds / 60
            self.bar.write(f"the first update took {seconds:.0f} s: about {minutes:.0f} minutes to "
                           "go, held-out games apart")
        drawn = "" if choice.named else " (drawn at random)"
        self.bar.write(f"step {steps}: plays {choice.action}{drawn}, reward {reward:g}\n"
                       f"  {printable(choice.text)}")
        shown = ("success", "return_mean", "parse_rate")
        self.bar.set_postfix(
            {key: f"{metrics[key]:.3f}" for key in shown if metrics[key] is not None})


def draw_curve(folder):
    """Redraw curve.png: success, parse rate and reading rate over environment steps.

    The return alone, where the game cannot tell success.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    known = all(row["success"] is not None or row["return_mean"] is None for row in rows)
    for key in ("success", "parse_rate", "reading_rate") if known else ("return_mean",):
        points = [(row["env_steps"], row[key]) for row in rows if row[key] is not None]
        if points:
            axes.plot(*zip(*points), label=key.replace("_", " "))
    axes.set(xlabel="environment steps", ylim=(0, 1.02) if known else None)
    axes.set_title(printable(folder.name), parse_math=False)    # a name with two "$" is no formula
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)
