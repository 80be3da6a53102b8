"""TensorBoard: what a run folder holds of a run, as TensorBoard's events.

    python train.py --task blackjack --tensorboard          # then: tensorboard --logdir runs
    python train.py --out runs/blackjack-seed1 --resume --tensorboard       # of a run without

Needs `pip install -r extras/requirements-tensorboard.txt`; nothing else here imports it. metrics.jsonl stays the truth:
when a run begins or goes on, its board is written anew from the folder's files, so no point is twice there or missing,
and then kept up with them. Its clock is that of the writing. Does not handle: what the metrics mean
(results/README.md), evaluations by eval.py.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from extras.film import Film
from plumbing.errors import ModelError, foreign


class Board:
    """The events in FOLDER/tensorboard; ModelError where the package is missing."""

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModelError("--tensorboard needs a package: pip install -r extras/requirements-tensorboard.txt "
                             f"({error})") from error
        self.folder, self.make_writer, self.writer = Path(folder), SummaryWriter, None
        self.lines, self.shown = 0, set()                   # of metrics.jsonl, and the evaluations that are written

    def catch_up(self):
        """Write what the folder's files have and the board has not: the first time all."""
        if self.writer is None:
            for old in (self.folder / "tensorboard").glob("events.*"):
                old.write_bytes(b"")        # subtle: not deleted, or a reader that has it open looks for no next file
            # purge_step: and that reader drops what it has read
            self.writer = self.make_writer(self.folder / "tensorboard", purge_step=0)
        rows, answers = (self._rows(name) for name in ("metrics.jsonl", "transcripts.jsonl"))
        for row, answer in list(zip(rows, answers))[self.lines:]:
            self._scalars("train", row, row["env_steps"], but=("update", "env_steps"))
            text = f"{answer['text'] or ''}\n\nplays {answer['action']}, reward {answer['reward']:g}"
            self.writer.add_text("answer", "    " + text.replace("\n", "\n    "), row["env_steps"])     # as it is
        self.lines = len(rows)
        for name, step in (("eval_start", 0), ("eval", rows[-1]["env_steps"] if rows else 0)):
            self._evaluation(name, step)
        self.writer.flush()

    def _rows(self, name):
        path = self.folder / name
        with foreign(path):
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _scalars(self, group, row, step, but):
        for name, value in row.items():
            if isinstance(value, int | float) and name not in but:          # None: nothing to measure it on
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def _evaluation(self, name, step):
        path = self.folder / f"{name}.json"
        if name in self.shown or not path.exists():
            return
        self.shown.add(name)
        with foreign(path):
            self._scalars("held_out", json.loads(path.read_text(encoding="utf-8")), step, ("episodes", "seed", "steps"))
        if path.with_suffix(".png").exists():
            with foreign(path.with_suffix(".png")):
                picture = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB"))
            self.writer.add_image("held_out/game", picture, step, dataformats="HWC")

    def filming(self, path, other):
        """A `watch` for eval.evaluate: another one, which also leaves the first game beside `path`, as a PNG."""
        film = Film()

        def watch(picture, choice, episode):
            other(picture, choice, episode)
            film(picture, choice, episode)
            if episode == 0 and choice is None:
                film.save(str(path.with_suffix(".png")))

        return watch
