"""Where networks run: the device that a recipe or a user names, and how fast it is."""

from __future__ import annotations

import time

import torch

from llavakit.contracts.errors import ModelError


def pick_device(name: str | torch.device) -> torch.device:
    """Return a device; `auto` is CUDA where there is one, else Apple's MPS, else the CPU."""
    if isinstance(name, torch.device):
        return name
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(
            f"device `{name}` is none of torch's; use auto, cpu, cuda or mps"
        ) from error
    try:
        torch.zeros(1, device=device).sum().item()  # a name may be known, and its driver absent
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device `{name}` is not available on this machine; use cpu or auto"
        ) from error
    return device


def measure_tflops(name: str) -> float:
    """Return the rate of a recipe's `device`, sustained: in float32 on a CPU, bfloat16 on CUDA."""
    kind = "cpu" if name == "cpu" else pick_device("auto").type
    size, dtype = (8192, torch.bfloat16) if kind == "cuda" else (768, torch.float32)
    left, right = (torch.randn(size, size, device=kind, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begun)
    share = 0.5  # what training reaches of a bare matrix product, roughly
    return share * 2 * size**3 / min(seconds) / 1e12
