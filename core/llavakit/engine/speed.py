"""How fast a device multiplies."""

from __future__ import annotations

import time

import torch


def measure_tflops(name: str) -> float:
    """Return the rate of a recipe's `device`, sustained: in float32 on a CPU, bfloat16 on CUDA."""
    cuda = name != "cpu" and torch.cuda.is_available()
    size = 8192 if cuda else 768
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        product = left @ right
        if cuda:
            product[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    share = 0.5  # what training reaches of a bare matrix product, roughly
    return share * 2 * size**3 / min(seconds) / 1e12
