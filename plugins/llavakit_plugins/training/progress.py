"""The progress of training: steps, samples and tokens so far, and the speed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from llavakit import LlavaModel, PackedBatch
from llavakit_plugins.training.options import TrainOptions
from llavakit_plugins.training.validation import Look
from llavakit_plugins.training.work import peak_tflops, work_of


@dataclass
class Progress:
    """Counters of training. A checkpoint holds them besides its tensors; names are its format."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Optimisation steps done within the epoch."""
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float, Sequence[str]]] = field(default_factory=list)
    """Validations so far: step, held-out loss, answers."""
    figures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """What the objective reported of each step beside its loss, by name."""

    @property
    def best(self) -> Look | None:
        """The validation with the lowest held-out loss; the first one if several are equal."""
        # `min` would keep a NaN that comes first
        finite = [Look(*look) for look in self.looks if math.isfinite(look[1])]
        return min(finite, key=lambda look: look.loss, default=None)


class Meter:
    """Measures rates of a training since the last measurement; the work is that of this device."""

    def __init__(
        self, progress: Progress, model: LlavaModel, options: TrainOptions, *, cached: bool
    ) -> None:
        work = work_of(model, options.train)
        self._work = replace(work, image=0.0) if cached else work  # encoded once, before
        self._device = device = model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_tflops(name) if options.precision == "bf16" else None
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Measure from now on."""
        self._time, self._samples, self._tokens, self._flop = (
            time.monotonic(),
            progress.samples,
            progress.tokens,
            0.0,
        )

    def work(self, batch: PackedBatch, views: int) -> float:
        """Return the floating-point operations of a micro-batch with so many views of images."""
        return self._work.of(
            views, len(batch.visual_rows_N), batch.packing.lengths, len(batch.targets_M)
        )

    def add(self, flop: float) -> None:
        """Count so many floating-point operations."""
        self._flop += flop

    def rates(self, progress: Progress) -> dict[str, float]:
        """Return what events say of the steps since the last call, by its names in them.

        `length` is the mean length of a sample in rows; `tflops` the work a second and device in
        10^12; `mfu` its share of the device's peak, where that is known; `memory_gb` the most
        memory that was in use.
        """
        # a clock of 16 ms may stand still for a step
        seconds = max(time.monotonic() - self._time, 1e-9)
        samples, tokens = progress.samples - self._samples, progress.tokens - self._tokens
        tflops = self._flop / seconds / 1e12
        rates = {
            "samples_per_s": round(samples / seconds, 2),
            "tokens_per_s": round(tokens / seconds),
            "length": round(tokens / max(1, samples), 1),
            "tflops": float(f"{tflops:.4g}"),
        }
        if self._peak is not None:
            rates["mfu"] = round(tflops / self._peak, 4)
        if (memory := _most_memory(self._device)) is not None:
            rates["memory_gb"] = round(memory / 1e9, 3)
        self.restart(progress)
        return rates


def _most_memory(device: torch.device) -> int | None:
    """Return the most bytes in use so far: on a GPU of tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
