"""The contract of a connector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.networks import Connector
from llavakit.contracts.packing import Stream
from llavakit.testing.network import NetworkContract


class ConnectorContract(NetworkContract[Connector]):
    """Checks a `Connector`, built for `vision_width` and `language_width`."""

    kind = Connector
    vision_width: int = 8
    language_width: int = 16
    patches: int = 5  #: How many patch features an image has.

    def context(self) -> dict[str, Any]:
        return {"vision_width": self.vision_width, "language_width": self.language_width}

    def features(self, images: int = 2) -> Tensor:
        """Return features `[B, P, D]`, the same each time."""
        draw = torch.Generator().manual_seed(images)
        return torch.randn(images, self.patches, self.vision_width, generator=draw)

    def outputs(self, network: Connector) -> Tensor:
        embeddings: Tensor = network(self.features())
        return embeddings

    def test_maps_the_vision_width_to_the_language_width(self) -> None:
        embeddings = self.outputs(self.build())
        assert embeddings.ndim == 3, f"expected [B, P, E], got {tuple(embeddings.shape)}"
        assert embeddings.shape[0] == 2, "one image in, one image out"
        assert embeddings.shape[2] == self.language_width, (
            f"it gives width {embeddings.shape[2]}, the language model's is {self.language_width}"
        )

    def test_says_how_many_tokens_it_gives(self) -> None:
        connector = self.build()
        tokens = connector.tokens(self.patches)
        found = self.outputs(connector).shape[1]
        assert found == tokens, (
            f"`tokens({self.patches})` says {tokens}, but forward gives {found}: fix `tokens`"
        )

    def test_embeddings_are_of_the_image_and_of_no_other(self) -> None:
        connector = self.build().eval()
        features = self.features()
        with torch.no_grad():
            torch.testing.assert_close(
                connector(features)[1:], connector(features[1:]), atol=1e-5, rtol=1e-4
            )

    def test_gradient_reaches_every_parameter_and_the_encoder(self) -> None:
        connector = self.build()
        features = self.features().requires_grad_()
        connector(features).square().sum().backward()
        dead = [name for name, p in connector.named_parameters() if p.grad is None]
        assert not dead, f"no gradient reaches {dead}"
        assert features.grad is not None, "no gradient reaches the vision encoder"
        assert features.grad.any(), "the gradient that reaches the vision encoder is zero"

    def test_fills_the_stream_as_forward_and_a_copy_do(self) -> None:
        for kept in (None, -1):  # every visual token, or all but the last: cut by max_length
            connector = self.build().eval()
            draw = torch.Generator().manual_seed(0)
            table = torch.randn(11, self.language_width, generator=draw, requires_grad=True)
            visual = 2 * connector.tokens(self.patches)
            index = None if kept is None else torch.arange(visual - 1)
            count = visual if kept is None else visual - 1
            ids = torch.randint(1, 11, (count + 6,), generator=draw)
            rows = torch.randperm(count + 6, generator=draw)[:count].sort().values
            ids[rows] = 0
            stream = Stream(ids, rows, index, lambda i, t=table: F.embedding(i, t), table)  # type: ignore[misc]
            found = connector.project_into(self.features(), stream)
            expected = table[ids].index_copy(0, rows, self.outputs(connector).flatten(0, 1)[:count])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            weights = torch.randn(found.shape, generator=draw)
            for embeds in (found, expected):
                table.grad = None
                connector.zero_grad()
                (embeds * weights).sum().backward()
                gradients = [table.grad, *(p.grad for p in connector.parameters())]
                if embeds is found:
                    first = [None if g is None else g.clone() for g in gradients]
            torch.testing.assert_close(first, gradients, atol=1e-4, rtol=1e-4)
