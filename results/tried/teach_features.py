"""Teaches `--model cnn` a little EZPoints from noisy labels: makes a run folder that train.py --resume takes up.

    PYTHONPATH=. python results/tried/teach_features.py runs/warm-a && python train.py --out runs/warm-a --resume

Tests whether EZPoints fails on features + MLP for want of a first success (results/tried/README.md).
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from settings import read_settings
from sft import demonstrations, mixed
from train import Run, make_policy

STEPS, BATCH, LABEL_NOISE = 100, 128, 0.6

folder = Path(sys.argv[1])
settings, _ = read_settings("", ["--task", "ezpoints", "--model", "cnn", "--no-cot", "--eval-episodes", "0",
                                 "--out", str(folder)])
folder.mkdir(parents=True)              # before the work: it fails where a run is already
policy, base = make_policy(settings)
writes = [parameter for name, parameter in policy.trainable() if not name.startswith("value_head")]
optimizer = torch.optim.Adam(writes, lr=1e-3)
batches = mixed([demonstrations("ezpoints", 11, LABEL_NOISE, cot=False)], BATCH, np.random.default_rng(11))
for _ in range(STEPS):
    batch = next(batches)
    prompts = policy.encode([d.picture for d in batch], [d.prompt for d in batch])
    if not policy.value_head.fitted:
        policy.value_head.fit(policy.states(prompts))       # what standardises the MLP's inputs too
    labels = [[policy.actions.index(json.loads(d.answer)["action"])] for d in batch]
    loss = -policy.logprobs(prompts, labels)[0].mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
(folder / "config.json").write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
Run(settings, policy, base).save(folder)
