"""What holds for every component with weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llavakit.contracts.networks import Network
from llavakit.model.folder import cast_weights
from llavakit.registry import Registry
from llavakit.testing.contract import Contract, hold, holding

NetworkT = TypeVar("NetworkT", bound=Network)


def hold_close(
    found: Tensor,
    expected: Tensor,
    promise: str,
    change: str,
    *,
    atol: float = 1e-4,
    rtol: float = 1e-3,
) -> None:
    """Fail where two tensors differ, by how much at most."""
    came = ""
    if found.shape != expected.shape:
        came = f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    elif not torch.allclose(found.double(), expected.double(), atol=atol, rtol=rtol):
        apart = (found.double() - expected.double()).abs().max().item()
        came = f"they differ by up to {apart:.3g} (allowed: {atol:g} + {rtol:g} of the value)"
    hold(not came, promise, came, change)


class NetworkContract(Contract[NetworkT], ABC):
    """Checks weights: their shapes, and that they come back from a folder."""

    half_close: float = 0.1
    """How far an output in bfloat16 may be from float32's, as a share of its largest value."""

    _inputs: torch.dtype = torch.float32

    def context(self) -> dict[str, Any]:
        """Return what it is built with besides its options; `build` is added where it is taken."""
        return {}

    def _context(self, component: type[Network]) -> dict[str, Any]:
        made = self.context()
        if "build" in signature(component.__init__).parameters:
            made.setdefault("build", Registry.installed().build)
        return made

    @abstractmethod
    def outputs(self, network: NetworkT) -> Tensor:
        """Return what it makes of a fixed input, in the precision of its weights."""

    def test_the_same_input_gives_the_same_output(self) -> None:
        network = self.build().eval()
        with torch.no_grad():
            first, second = self.outputs(network), self.outputs(network)
        hold(
            torch.equal(first, second),
            "the same input gives the same output in eval mode",
            f"outputs that differ by up to {(first - second).abs().max().item():.3g}",
            "draw nothing at random in `forward` unless `self.training`",
        )  # fmt: skip
        hold(
            torch.isfinite(first).all(),
            "finite outputs", "NaN or infinity", "look for a division by zero in `forward`",
        )  # fmt: skip

    def test_options_alone_determine_the_shape_of_every_weight(self) -> None:
        built = self.build()
        change = "make every shape of `self.options` and the widths that are handed over"
        with (
            holding("a plan builds it on the meta device, from its options alone", change),
            torch.device("meta"),  # as a plan does: no weight may be read
        ):
            sketch = type(built)(self.stated(), **self._context(type(built)))
        expected = {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
        found = {name: tuple(weight.shape) for name, weight in sketch.state_dict().items()}
        differing = sorted(
            name for name in {**expected, **found} if expected.get(name) != found.get(name)
        )
        hold(
            not differing,
            "building it again from its options gives the same shapes",
            "; ".join(
                f"{name}: {found.get(name)} instead of {expected.get(name)}"
                for name in differing[:3]
            ),
            f"{change}; and state in `options` of {type(self).__name__} what `build` uses",
        )

    def test_weights_come_back_from_a_folder(self, tmp_path: Path) -> None:
        network = self.build().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.ones_like(parameter))  # none as it was made
        network.save(tmp_path)
        pickles = [
            file.name for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth")
        ]
        hold(not pickles, "weights are safetensors", f"{pickles} are pickles", "write safetensors")
        change = "override `create`, `save` and `load` together, or none of them"
        with holding("`load` takes what `save` wrote", change):
            context = self._context(type(network))
            loaded = type(network).load(self.stated(), tmp_path, **context).eval()
        names, kept = set(network.state_dict()), set(loaded.state_dict())
        hold(
            names == kept,
            "every weight comes back", f"other names: {sorted(names ^ kept)[:3]}", change,
        )  # fmt: skip
        with torch.no_grad():
            hold(
                torch.equal(self.outputs(loaded), self.outputs(network)),
                "what `load` returns is what `save` wrote", "other outputs", change,
            )  # fmt: skip

    def test_it_runs_in_half_precision(self) -> None:
        whole = self.build().eval()
        half = deepcopy(whole)
        cast_weights(half, torch.bfloat16)
        change = (
            "make constants and buffers of the input's dtype (`x.new_zeros`, `.to(x)`), and give "
            "back the precision that comes in"
        )
        with torch.no_grad():
            expected = self.outputs(whole)
            self._inputs = torch.bfloat16  # of one without weights
            with holding("it runs with weights and inputs in bfloat16, as training does", change):
                found = self.outputs(half)
        hold(
            found.dtype == torch.bfloat16,
            "outputs in the precision of weights and inputs, bfloat16", found.dtype, change,
        )  # fmt: skip
        hold_close(
            found,
            expected,
            "in bfloat16 nearly what float32 gives",
            "compute what needs it (norms, softmax, positions) in float32 and turn it back, or "
            "widen `half_close`",
            atol=self.half_close * expected.abs().max().item(),
            rtol=0.0,
        )

    def dtype_of(self, network: NetworkT) -> torch.dtype:
        """Return the precision of its weights, which its inputs have, too."""
        floating = (p.dtype for p in network.parameters() if p.is_floating_point())
        return next(floating, self._inputs)
