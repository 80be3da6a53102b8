"""Several processes that learn as one: what torchrun starts, each with its share of the games.

    torchrun --nproc-per-node=2 train.py --task blackjack       # gloo on CPUs, NCCL on GPUs

Every process holds the whole policy, plays and learns from its own games, and takes the mean of
all gradients, so the copies stay equal. Without torchrun there is one process, which here
counts as all of them. With it, every process must come to each call.
Does not handle: several machines' file systems, sharded weights.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def start():
    """Join the other processes, if torchrun started this one; each gets a GPU of its own."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        sys.exit(
            f"LOCAL_RANK is set but {', '.join(missing)} is not: start several processes with "
            "torchrun, or unset LOCAL_RANK for one"
        )
    if torch.cuda.is_available():
        here, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local >= here:
            sys.exit(f"more processes than GPUs: use torchrun --nproc-per-node={here}")
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # hours: the others wait while the first plays the held-out games
    dist.init_process_group(backend, timeout=timedelta(hours=6))


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process, 0 for the first, which alone writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together():
    """A call that all processes make; where one of them has ended, say so and end too."""
    try:
        yield
    except RuntimeError as error:       # gloo and NCCL have no class of their own for it
        sys.exit(
            f"process {rank()} lost the others; if one of them has ended, it said why: {error}"
        )


def wait():
    """Return when every process has come here."""
    if dist.is_initialized():
        with together():
            dist.barrier()


def concat(values):
    """One tensor of all processes' (n, …) CPU tensors, in the processes' order; n may differ.

    >>> concat(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    if not dist.is_initialized():
        return values
    lengths = torch.eye(size(), dtype=torch.long)[rank()] * len(values)
    with together():
        dist.all_reduce(lengths)
        # gather wants equal shapes: pad to the longest, cut afterwards
        padded = torch.zeros(lengths.max(), *values.shape[1:], dtype=values.dtype)
        padded[:len(values)] = values
        parts = [torch.zeros_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist())])


def average(parameters, numbers):
    """Replace the parameters' gradients, and a CPU tensor of numbers, by their means over all.

    A parameter without a gradient keeps none; which ones have some must be the same everywhere.
    """
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with together():
        for tensor in (flat, numbers):
            dist.all_reduce(tensor)
            tensor /= size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))
