"""What a machine can do and what it is doing: time, memory, its arithmetic's own speed, its name.

    seconds(function, device)                           # the device's queue emptied before and after
    matmul_rate(device, torch.float32)                  # FLOP/s

Does not handle: machines other than Linux (memory and processor are read from /proc).
"""

import os
import platform
import resource
import time
from pathlib import Path

import torch


def matmul_rate(device, dtype, size=None, repeats=5):
    """Highest FLOP/s of a square matrix product seen in `repeats`: what "100 %" means on this machine."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
            for seed in (0, 1))
    a @ b
    return 2 * size ** 3 / min(seconds(lambda: a @ b, device) for _ in range(repeats))


def seconds(function, device):
    """Wall seconds of one call, the device's queue emptied before and after."""
    _wait(device)
    begun = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """GiB at the highest: of the GPU where there is one (reserved by, and in use in, torch), else of the process."""
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30,
                "peak_memory_in_use_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}      # Linux counts in KiB


def memory_now(device):
    """GiB at present."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__}
