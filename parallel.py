"""Several processes that learn as one: what torchrun starts, each with its share of the games.

    torchrun --nproc-per-node=2 train.py --task blackjack          # gloo on CPUs, NCCL on GPUs

Every process holds the whole policy, starts from the same weights and adds the same gradients, so the copies stay
equal. Without torchrun there is one process and every function here does nothing; with it, every process must come
to each call. Samples of a rollout are numbered over all processes, the first process's first. Does not handle: several
machines' file systems, sharded weights.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def start():
    """Join the other processes, if torchrun started this one; each gets its own GPU where there are some."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            here, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if local >= here:
                sys.exit(f"more processes than GPUs: use torchrun --nproc-per-node={here}")
            torch.cuda.set_device(local)
        if os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")                  # one process speaks for all
        # hours: the others wait while the first plays the held-out games
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(hours=6))


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def add(tensor):
    """Replace the tensor, in place, by its sum over all processes; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def concat(values):
    """One tensor of all processes' (n, …) CPU tensors, in the processes' order; n may differ.

    >>> concat(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if not dist.is_initialized():
        return values
    lengths = add(torch.eye(size(), dtype=torch.long)[rank()] * len(values)).tolist()
    if not max(lengths):
        return values
    padded = torch.zeros(max(lengths), *values.shape[1:], dtype=values.dtype)
    padded[:len(values)] = values
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)])


def add_gradients(parameters):
    """Replace every gradient by its sum over all processes, in one exchange; a missing one counts as zero."""
    if not dist.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)
