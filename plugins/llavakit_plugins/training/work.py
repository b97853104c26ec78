"""The floating-point operations that training needs: for plans, and for the rate it reaches.

What is needed is counted, not what is done: nothing is added where activations are recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llavakit import PARTS

if TYPE_CHECKING:
    from llavakit import LlavaModel

_PEAKS = {  # 10^12/s of dense bfloat16 products, by NVIDIA's data sheets; the first name that fits
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "L40S": 362, "L4": 121, "RTX 6000 Ada": 364, "A6000": 155, "A10G": 70, "A10": 125,
    "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Return the peak rate of a device in bfloat16, in 10^12/s, or None where it is not known."""
    return next((float(rate) for name, rate in _PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class Work:
    """Operations forward and, of what learns or lies behind it, backward."""

    image: float  #: of one view of an image, in the vision encoder
    visual_row: float  #: of one visual row, in the connector
    row: float  #: of one row of the stream, in the language model's layers
    pair: float  #: of each pair of rows of one sample, in attention
    supervised_row: float  #: of one supervised row, in the head

    def of(self, images: int, visual_rows: int, lengths: Sequence[int], supervised: float) -> float:
        """Return the operations of samples of these lengths together."""
        return (
            self.image * images
            + self.visual_row * visual_rows
            + self.row * sum(lengths)
            + self.pair * sum(length**2 for length in lengths)
            + self.supervised_row * supervised
        )


def measure_work(
    model: LlavaModel,
    train: Collection[str],
    parameters: Callable[[str], int],
    trainable: Callable[[str], int],
) -> Work:
    """Return the work of training the parts `train`.

    `parameters` and `trainable` say how many parameters a part has, and how many of them learn.
    """
    head = model.language.head.weight.numel()
    blocks = parameters("language") - head
    table = model.language.embedding_VE
    if table is not None and table is not model.language.head.weight:
        blocks -= table.numel()
    layers, _, _ = model.language.cache_shape()
    patches = model.vision.tokens(model.vision.image_size) + model.vision.prefix_tokens
    first = next(part for part in PARTS if part in train)

    def times(part: str) -> float:
        """Return how often the forward pass's operations are done, the forward pass included."""
        # gradients of inputs: also within the first part that learns, unless it is a layer or two
        behind = PARTS.index(part) > PARTS.index(first) or part == first != "connector"
        learns = trainable(part) / max(1, parameters(part)) if part in train else 0.0
        return 1.0 + behind + learns

    language = times("language")
    return Work(
        image=2.0 * parameters("vision") * patches * times("vision"),
        visual_row=2.0 * parameters("connector") * times("connector"),
        row=2.0 * blocks * language,
        pair=2.0 * layers * model.language.width * language,
        supervised_row=2.0 * head * language,
    )


def work_of(model: LlavaModel, train: Collection[str]) -> Work:
    """Return the work of training a model whose parameters are marked as they learn."""

    def parameters(part: str) -> int:
        return sum(p.numel() for p in getattr(model, part).parameters())

    def trainable(part: str) -> int:
        return sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad)

    return measure_work(model, train, parameters, trainable)


def measure_tflops(name: str) -> float:
    """Return the rate of a recipe's `device`, sustained: in float32 on a CPU, bfloat16 on CUDA."""
    size, multiply = _numpy_product() if name == "cpu" else _torch_product()
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - begun)
    share = 0.5  # what training reaches of a bare matrix product, roughly
    return share * 2 * size**3 / min(seconds) / 1e12


def _numpy_product() -> tuple[int, Callable[[], object]]:
    """Return a size of matrices and what multiplies such: plans for a CPU import no torch."""
    size = 768
    left, right = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    return size, lambda: left @ right


def _torch_product() -> tuple[int, Callable[[], object]]:
    import torch

    from llavakit import pick_device

    kind = pick_device("auto").type
    if kind == "cpu":
        return _numpy_product()
    size, dtype = (8192, torch.bfloat16) if kind == "cuda" else (768, torch.float32)
    left, right = (torch.randn(size, size, device=kind, dtype=dtype) for _ in range(2))
    return size, lambda: (left @ right)[0, 0].item()  # waits for a GPU
