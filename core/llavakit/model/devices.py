"""Where networks run: the device that a recipe or a user names."""

from __future__ import annotations

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
