"""Functions that a trace sees as one operator, and that plain tensors reach without a detour.

An operator of `torch.library` is opaque to torch.compile and torch.export, and known to fake
tensors. But the way through PyTorch's dispatcher takes 60 to 90 microseconds of the host a call,
and twice that with gradients: more than small kernels take. So it is taken in traces alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


class Operator:
    """A function of tensors and numbers that is `torch.ops.llavakit.NAME` where it is traced."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._operator = torch.library.custom_op(f"llavakit::{name}", function, mutates_args=())
        self._function = function

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Set what gives empty tensors of the result's shapes and dtypes."""
        self._operator.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        """Set the gradients, as `torch.library.register_autograd` has them."""
        self._operator.register_autograd(backward, setup_context=setup_context)
        function = self._function

        class Plain(torch.autograd.Function):
            # with a `setup_context` of its own it would take as long as the operator
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                found = function(*given)
                setup_context(ctx, given, found)
                return found

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self._function = Plain.apply

    def __call__(self, *given: Any) -> Any:
        """Return the function of `given`, which has a value for every argument."""
        return self._function(*given) if _is_plain(given) else self._operator(*given)


def _is_plain(given: tuple[Any, ...]) -> bool:
    # what batches or differentiates functions asks more of them than a plain backward pass
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for one in given:
        if isinstance(one, Tensor) and (type(one) not in _PLAIN or one.is_meta):
            return False
    return True
