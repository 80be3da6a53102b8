"""TensorBoard: what a run folder holds of a run, as TensorBoard's events.

    python train.py --task blackjack --tensorboard          # then: tensorboard --logdir runs
    python train.py --out runs/blackjack-seed1 --resume --tensorboard       # of a run without

Needs `pip install -r extras/requirements-tensorboard.txt`; nothing else here imports it.
metrics.jsonl stays the truth. When a run begins or goes on, its board is written anew from the
folder's files, so no point is there twice or missing. Then it is kept up with them. Its clock is
that of the writing.
Does not handle: what the metrics mean (results/README.md), evaluations by eval.py.
"""

import json
from pathlib import Path

from plumbing.errors import ModelError, as_model_error


class Board:
    """The events in FOLDER/tensorboard; ModelError where the package is missing."""

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModelError(
                "--tensorboard needs a package: pip install -r extras/requirements-tensorboard.txt "
                f"({error})") from error
        self.folder = Path(folder)
        self.make_writer, self.writer = SummaryWriter, None
        self.lines = 0              # of metrics.jsonl that are written
        self.shown = set()          # the evaluations that are

    def catch_up(self):
        """Write what the folder's files have and the board has not: the first time all."""
        if self.writer is None:
            self._begin()
        rows, answers = self._rows("metrics.jsonl"), self._rows("transcripts.jsonl")
        for row, answer in list(zip(rows, answers))[self.lines:]:
            self._scalars("train", row, row["env_steps"], but=("update", "env_steps"))
            text = answer["text"] or ""
            text += f"\n\nplays {answer['action']}, reward {answer['reward']:g}"
            # indented, for TensorBoard reads Markdown
            text = "    " + text.replace("\n", "\n    ")
            self.writer.add_text("answer", text, row["env_steps"])
        self.lines = len(rows)
        self._evaluation("eval_start", 0)
        self._evaluation("eval", rows[-1]["env_steps"] if rows else 0)
        self.writer.flush()

    def _begin(self):
        events = self.folder / "tensorboard"
        for old in events.glob("events.*"):
            # subtle: not deleted, or a reader that has it open looks for no next file
            old.write_bytes(b"")
        # purge_step: and that reader drops what it has read
        self.writer = self.make_writer(events, purge_step=0)

    def _rows(self, name):
        path = self.folder / name
        if not path.exists():       # before the first update
            return []
        with as_model_error(path):
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def _scalars(self, group, row, step, but):
        for name, value in row.items():
            # None: there was nothing to measure it on
            if isinstance(value, int | float) and name not in but:
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def _evaluation(self, name, step):
        path = self.folder / f"{name}.json"
        if name in self.shown or not path.exists():
            return
        self.shown.add(name)
        with as_model_error(path):
            row = json.loads(path.read_text(encoding="utf-8"))
        self._scalars("held_out", row, step, but=("update", "episodes", "seed", "steps"))
