"""The library by which a network's linear layers multiply float32 matrices on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from llavakit import Options

if TYPE_CHECKING:
    from torch import nn
    from torch.nn import Conv2d

Products = Literal["torch", "onednn"]


class ProductOptions(Options):
    """The option of every network with linear layers."""

    products: Products = "torch"
    """What multiplies float32 matrices on a CPU: the library that PyTorch takes (MKL, as a rule),
    or `onednn`, which is faster on AMD's CPUs with AVX512 and differs in the last bits. No effect
    without AVX512, or elsewhere."""


def choose_products(network: nn.Module, products: Products, *, decodes: bool = False) -> None:
    """Let a network's linear layers multiply so, in place. Weights and their names stay.

    A convolution that cuts an image into patches is such a layer, too. Where a network decodes, and
    this machine gains by it, products of a few rows without gradients are those of `few_rows`.

    Layers of other types, such as those of 4 bits, are left as they are.
    """
    from torch.nn import Conv2d, Linear

    from llavakit_kernels import few_rows, onednn

    usual: dict[Products, type[Linear]] = {"torch": Linear, "onednn": onednn.Linear}
    few: dict[Products, type[Linear]] = {
        "torch": few_rows.Linear, "onednn": few_rows.OnednnLinear,
    }  # fmt: skip
    chosen = (few if decodes and few_rows.faster_here() else usual)[products]
    patches: dict[Products, type[Conv2d]] = {"torch": Conv2d, "onednn": onednn.PatchConv2d}
    for module in network.modules():
        if type(module) in (*usual.values(), *few.values()):
            module.__class__ = chosen
        elif type(module) in patches.values() and _cuts_patches(cast("Conv2d", module)):
            module.__class__ = patches[products]


def _cuts_patches(convolution: Conv2d) -> bool:
    """Return whether a convolution reads every pixel once: a patch at each position."""
    return (
        convolution.kernel_size == convolution.stride
        and convolution.padding in ("valid", (0, 0))
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
