"""The library by which a network's linear layers multiply float32 matrices on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llavakit import Options

if TYPE_CHECKING:
    from torch import nn

Products = Literal["torch", "onednn"]


class ProductOptions(Options):
    """The option of every network with linear layers."""

    products: Products = "torch"
    """What multiplies float32 matrices on a CPU: the library that PyTorch takes (MKL, as a rule),
    or `onednn`, which is faster on AMD's CPUs and differs in the last bits. No effect elsewhere."""


def choose_products(network: nn.Module, products: Products) -> None:
    """Let a network's linear layers multiply so, in place. Weights and their names stay.

    Layers of other types, such as those of 4 bits, are left as they are.
    """
    from torch.nn import Linear

    from llavakit_kernels import onednn

    kinds: dict[Products, type[Linear]] = {"torch": Linear, "onednn": onednn.Linear}
    for module in network.modules():
        if type(module) in kinds.values():
            module.__class__ = kinds[products]
