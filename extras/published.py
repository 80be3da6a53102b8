"""The published code's way through one update, on our model, games and answers: what extras/bench.py measures against.

It plays one game at a time, writes an answer token by token, scores it in a second pass over the answer padded to a
fixed length, and learns from one answer at a time. Does not handle: its model (theirs is a fork of LLaVA).
"""

import functools
import math

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from extras.machine import seconds
from plumbing.settings import Settings


def published_update(run, rollout, samples, longest):
    """(seconds playing, seconds learning) of the published code's way through a rollout's steps, on the same model.

    Playing, one game at a time: write the answer token by token (of the stored length, so that both procedures write
    equally much), then score it in a second pass over the answer padded to `longest` tokens (published: twice the
    maximum), with the logits and all hidden states of every position. Learning: the same pass with gradients, one
    answer at a time, an optimiser step every `minibatch_size` answers, `update_epochs` times. No gradient
    checkpointing, as there. Left out, in its favour: the games' time, preparing pictures, bootstrap values, clipping
    gradients. Measured on the first `samples` steps after one to warm up, scaled to the rollout; optimiser steps apart.
    """
    settings, policy, device = run.settings, run.policy, run.policy.device
    policy._set_mode(train=False)                           # whatever the last pass left
    stored = list(zip(rollout.prompts, rollout.responses))

    def images(prompt):
        return {"image": BaseModelOutputWithPooling(pooler_output=list(policy.image_features([prompt])))}

    def score(prompt, response):
        padded = response + [0] * (longest - len(response))
        ids, mask, positions, P, _ = policy._collate([prompt], [padded])
        out = policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True,
                           mm_encoder_outputs=images(prompt))
        logp = (out.logits.float() / policy.temperature).log_softmax(-1)
        logp = logp[:, P - 1:-1].gather(-1, ids[:, P:, None]).squeeze(-1)[:, :len(response)]
        return logp.sum() + policy.value_head(out.hidden_states[-1][:, P - 1].float()).sum()

    @torch.no_grad()
    def play(count):
        for prompt, response in stored[:count]:
            ids, mask, positions, _, _ = policy._collate([prompt])
            cache, features = None, images(prompt)
            for token in response:
                out = policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                   mm_encoder_outputs=features, use_cache=True, logits_to_keep=1)
                torch.multinomial((out.logits[:, -1].float() / policy.temperature).softmax(-1), 1,
                                  generator=run.sampling)
                cache, features, ids = out.past_key_values, None, torch.tensor([[token]], device=device)
                mask, positions = nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
            score(prompt, response)

    def learn(count):
        for prompt, response in stored[:count]:
            score(prompt, response).backward()

    play(1), learn(1), run.optimizer.step()
    playing, learning = (seconds(functools.partial(part, samples), device) * len(stored) / samples
                         for part in (play, learn))
    steps = settings.update_epochs * math.ceil(len(stored) / settings.minibatch_size)
    learning = settings.update_epochs * learning + steps * seconds(run.optimizer.step, device)
    run.optimizer.zero_grad()
    return playing, learning


def compare(run, rollout, measured, samples=None):
    """The published procedure's figures, and how many times as long as ours it takes (`ratio`).

    `ratio_without_padding`: were each answer scored at its own length; the rest of the ratio is the padding's.
    """
    samples, found = min(samples or len(rollout.prompts), len(rollout.prompts)), {}
    for name, longest in (("", 2 * Settings.max_new_tokens), ("_without_padding", 0)):
        try:
            playing, learning = published_update(run, rollout, samples, longest)
        except torch.cuda.OutOfMemoryError:
            found[f"baseline{name}"] = "out of memory"
            continue
        found[f"baseline{name}"] = {"rollout_s": playing, "update_s": learning, "whole_update_s": playing + learning,
                                    "samples_measured": samples}
        found[f"ratio{name}"] = (playing + learning) / measured["whole_update_s"]
    return found
