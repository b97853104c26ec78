"""Which library multiplies."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from llavakit_kernels import onednn

there = pytest.mark.skipif(
    onednn._operator() is None, reason="this PyTorch has no products by oneDNN"
)


def here(test: Any) -> Any:
    """Run a test with products by oneDNN, where this PyTorch has them."""
    return pytest.mark.usefixtures("by_onednn")(there(test))


class Counted(TorchDispatchMode):
    """Counts the products of either library, without attention's (of many small matrices)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        onednn._operator()  # its trial is not counted
        self.onednn = self.torch = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name()
        self.onednn += name == "mkldnn::_linear_pointwise"
        self.torch += name.startswith(("aten::mm", "aten::addmm", "aten::linear"))
        return function(*args, **(kwargs or {}))
