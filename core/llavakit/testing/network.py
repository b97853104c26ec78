"""What holds for every component with weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llavakit.contracts.networks import Network
from llavakit.testing.contract import Contract

NetworkT = TypeVar("NetworkT", bound=Network)


class NetworkContract(Contract[NetworkT], ABC):
    """Checks weights: their shapes, and that they come back from a folder."""

    def context(self) -> dict[str, Any]:
        """Return what it is built with besides its options."""
        return {}

    @abstractmethod
    def outputs(self, network: NetworkT) -> Tensor:
        """Return what it makes of a fixed input."""

    def test_the_same_input_gives_the_same_output(self) -> None:
        network = self.build().eval()
        with torch.no_grad():
            first, second = self.outputs(network), self.outputs(network)
        assert torch.equal(first, second), "`forward` is not deterministic in eval mode"
        assert torch.isfinite(first).all(), "`forward` gives NaN or infinity"

    def test_options_alone_determine_the_shape_of_every_weight(self) -> None:
        built = self.build()
        with torch.device("meta"):  # as a plan does: no weight may be read
            sketch = type(built)(self.stated(), **self.context())
        expected = {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
        found = {name: tuple(weight.shape) for name, weight in sketch.state_dict().items()}
        assert found == expected, "building it again from its options gives other shapes"

    def test_weights_come_back_from_a_folder(self, tmp_path: Path) -> None:
        network = self.build().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.ones_like(parameter))  # none as it was made
        network.save(tmp_path)
        pickles = [
            file.name for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth")
        ]
        assert not pickles, f"{pickles} are pickles; write safetensors"
        loaded = type(network).load(self.stated(), tmp_path, **self.context()).eval()
        assert set(loaded.state_dict()) == set(network.state_dict())
        with torch.no_grad():
            assert torch.equal(self.outputs(loaded), self.outputs(network)), (
                "what `load` returns is not what `save` wrote"
            )
