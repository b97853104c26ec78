"""The contract of a connector."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.contracts.networks import Connector
from llavakit.contracts.packing import Stream
from llavakit.testing.contract import hold, holding
from llavakit.testing.network import NetworkContract, hold_close

_BATCH = "take the number of images from the input (`features_BPD.shape[0]`, -1), never a constant"


class ConnectorContract(NetworkContract[Connector]):
    """Checks a `Connector`, built for `vision_width` and `language_width`."""

    kind = Connector
    picklable = True
    vision_width: int = 8
    language_width: int = 16
    patches: int = 5  #: How many patch features an image has.
    any_patches: bool = True  #: Whether it takes images of four times as many patches, too.
    exports: bool = True  #: Whether it can become ONNX.

    def context(self) -> dict[str, Any]:
        return {"vision_width": self.vision_width, "language_width": self.language_width}

    def features(self, images: int = 2, patches: int | None = None) -> Tensor:
        """Return features `[B, P, D]`, the same each time."""
        draw = torch.Generator().manual_seed(images)
        return torch.randn(images, patches or self.patches, self.vision_width, generator=draw)

    def outputs(self, network: Connector) -> Tensor:
        embeddings: Tensor = network(self.features().to(self.dtype_of(network)))
        return embeddings

    def test_maps_the_vision_width_to_the_language_width(self) -> None:
        embeddings = self.outputs(self.build())
        hold(
            embeddings.ndim == 3,
            "embeddings [B, P', E]", f"shape {tuple(embeddings.shape)}", "fix `forward`",
        )  # fmt: skip
        hold(
            embeddings.shape[0] == 2,
            "one image in, one image out", f"2 in, {embeddings.shape[0]} out", _BATCH,
        )  # fmt: skip
        hold(
            embeddings.shape[2] == self.language_width,
            f"embeddings of `language_width`, {self.language_width}",
            f"width {embeddings.shape[2]}", "end in a layer of `language_width` outputs",
        )  # fmt: skip

    def test_says_how_many_tokens_it_gives(self) -> None:
        connector = self.build().eval()
        for patches in (self.patches, 4 * self.patches) if self.any_patches else (self.patches,):
            with (
                torch.no_grad(),
                holding(
                    f"it takes {patches} patches an image",
                    "take the number of patches from the input, or say `any_patches = False`",
                ),
            ):
                found = connector(self.features(2, patches)).shape[1]
            said = connector.tokens(patches)
            hold(
                found == said,
                f"`tokens({patches})` says {said}", f"forward gives {found}",
                "fix `tokens`: compute it of its argument",
            )  # fmt: skip

    def test_embeddings_are_of_the_image_and_of_no_other(self) -> None:
        connector = self.build().eval()
        features = self.features(3)
        with torch.no_grad(), holding("it takes any number of images", _BATCH):
            whole = connector(features)
            for image in range(3):
                hold_close(
                    whole[image : image + 1],
                    connector(features[image : image + 1]),
                    f"the embeddings of image {image} are of it alone, in a batch of 3 as in one "
                    "of 1",
                    "normalise and mix within an image (dimensions 1 and 2), never over "
                    "dimension 0",
                    atol=1e-5,
                    rtol=1e-4,
                )

    def test_takes_any_number_of_images(self) -> None:
        connector = self.build().eval()
        for images in (1, 2, 3, 5):
            with torch.no_grad(), holding("it takes any number of images", _BATCH):
                found = connector(self.features(images))
            hold(
                found.shape[0] == images,
                "one image in, one image out", f"{images} in, {found.shape[0]} out", _BATCH,
            )  # fmt: skip

    def test_is_traced_with_any_number_of_images(self) -> None:
        """As the exporter to ONNX traces it: the number of images stays open."""
        if not self.exports:
            return
        connector = self.build().eval()
        change = (
            f"{_BATCH}; no Python number of it (`int(x.shape[0])`, `len`, a loop over images) may "
            "enter the graph; where it need never become ONNX, say `exports = False`"
        )
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with holding(f"`{connector.name}` can be traced with 2 images for any number", change):
                program = torch.export.export(
                    connector,
                    (self.features(2),),
                    dynamic_shapes=({0: torch.export.Dim("images")},),
                ).module()
            for images in (1, 3):
                features = self.features(images)
                with holding(f"the trace of `{connector.name}` takes {images} images", change):
                    found = program(features)
                hold(
                    found.shape[0] == images,
                    "one image in, one image out", f"{images} in, {found.shape[0]} out", change,
                )  # fmt: skip
                hold_close(found, connector(features), "the trace gives what it gives", change)

    def test_gradient_reaches_every_parameter_and_the_encoder(self) -> None:
        connector = self.build()
        features = self.features().requires_grad_()
        connector(features).square().sum().backward()
        dead = [name for name, p in connector.named_parameters() if p.grad is None]
        hold(
            not dead,
            "a gradient reaches every parameter", f"none reaches {dead}",
            "use each in `forward`, or remove it",
        )  # fmt: skip
        hold(
            features.grad is not None and features.grad.any(),
            "a gradient reaches the vision encoder", "none or zero", "detach nothing in `forward`",
        )  # fmt: skip

    def test_fills_the_stream_as_forward_and_a_copy_do(self) -> None:
        change = "leave `project_into` out, or give what the inherited one gives"
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
            with holding("it fills a packed stream", change):
                found = connector.project_into(self.features(), stream)
            expected = table[ids].index_copy(0, rows, self.outputs(connector).flatten(0, 1)[:count])
            hold_close(
                found,
                expected,
                "the stream holds text embeddings, and in visual rows what `forward` gives",
                change,
                atol=1e-5,
                rtol=1e-4,
            )
            weights = torch.randn(found.shape, generator=draw)
            for embeds in (found, expected):
                table.grad = None
                connector.zero_grad()
                (embeds * weights).sum().backward()
                named = [("the text's table", table), *connector.named_parameters()]
                gradients = {name: p.grad for name, p in named}
                if embeds is found:
                    first = {n: None if g is None else g.clone() for n, g in gradients.items()}
            for name, expected_grad in gradients.items():
                mine = first[name]
                hold(
                    (mine is None) == (expected_grad is None),
                    f"a gradient of {name} as through `forward`", "one of two has none", change,
                )  # fmt: skip
                if mine is not None and expected_grad is not None:
                    hold_close(
                        mine, expected_grad, f"the gradient of {name} as through `forward`", change
                    )
