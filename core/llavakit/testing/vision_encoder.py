"""The contract of a vision encoder."""

from __future__ import annotations

from math import isqrt

import torch
from PIL import Image
from torch import Tensor

from llavakit.contracts.networks import VisionEncoder
from llavakit.testing.contract import hold, holding
from llavakit.testing.network import NetworkContract, hold_close
from llavakit.testing.samples import make_picture

_BATCH = "take the number of images from the input (`pixels_BCHW.shape[0]`, -1), never a constant"


class VisionEncoderContract(NetworkContract[VisionEncoder]):
    """Checks a `VisionEncoder`."""

    kind = VisionEncoder
    picklable = True
    grid: bool = True
    """Whether its tokens are those of a square grid of patches, row by row."""
    colours: bool = True  #: Whether `prepare` gives red, green and blue.
    grows: bool = True  #: Whether a larger image has more tokens.

    def outputs(self, network: VisionEncoder) -> Tensor:
        features: Tensor = network(self._pixels(network).to(self.dtype_of(network)))
        return features

    def _pixels(self, encoder: VisionEncoder, images: int = 2) -> Tensor:
        pictures = [make_picture(seed) for seed in range(images)]
        return torch.stack([encoder.prepare(picture) for picture in pictures])

    def test_prepares_every_image_as_the_same_square(self) -> None:
        encoder = self.build()
        edge = encoder.image_size
        for size in ((40, 30), (30, 40), (edge, edge), (1, 1), (3 * edge, edge)):
            picture = make_picture(size=size)
            before = picture.tobytes()
            pixels = encoder.prepare(picture)
            hold(
                pixels.dtype == torch.float32,
                "`prepare` gives float32", pixels.dtype, "turn the pixels to float32",
            )  # fmt: skip
            hold(
                pixels.shape == (3, edge, edge),
                f"`prepare` gives [3, {edge}, {edge}], as `image_size` says",
                f"{tuple(pixels.shape)} for an image of {size}", "resize and crop to the square",
            )  # fmt: skip
            hold(
                torch.isfinite(pixels).all(),
                "finite pixels", f"NaN or infinity for an image of {size}", "fix `prepare`",
            )  # fmt: skip
            hold(
                torch.equal(pixels, encoder.prepare(picture)),
                "`prepare` gives the same pixels each time", f"others for an image of {size}",
                "augment nothing at random: plans, resumed runs and the cache rely on it",
            )  # fmt: skip
            hold(
                picture.tobytes() == before,
                "`prepare` leaves the image as it is", "it was changed", "work on a copy",
            )  # fmt: skip

    def test_prepares_red_green_and_blue_in_this_order(self) -> None:
        if not self.colours:
            return
        encoder = self.build()
        edge = encoder.image_size
        black = encoder.prepare(Image.new("RGB", (edge, edge)))
        for channel, name in enumerate(("red", "green", "blue")):
            colour = tuple(255 * (channel == other) for other in range(3))
            lit = encoder.prepare(Image.new("RGB", (edge, edge), colour)) - black
            seen = lit.mean((1, 2))
            hold(
                int(seen.argmax()) == channel and seen[channel] > 0,
                f"channel {channel} of `prepare` is {name}",
                f"a {name} image lights channel {int(seen.argmax())}",
                "give [red, green, blue]: PIL's order, not OpenCV's (or say `colours = False`)",
            )

    def test_returns_one_feature_for_each_patch(self) -> None:
        encoder = self.build().eval()
        with torch.no_grad():
            features = self.outputs(encoder)
        hold(
            features.ndim == 3,
            "features [B, P, D]", f"shape {tuple(features.shape)}", "fix `forward`",
        )  # fmt: skip
        patches = encoder.tokens(encoder.image_size)
        expected = (2, encoder.prefix_tokens + patches, encoder.width)
        hold(
            tuple(features.shape) == expected,
            f"{expected} for 2 images: {encoder.prefix_tokens} prefix tokens + {patches} patches, "
            f"width {encoder.width}",
            tuple(features.shape), "fix `prefix_tokens`, `tokens` or `width`",
        )  # fmt: skip

    def test_a_larger_image_has_more_tokens(self) -> None:
        if not self.grows:
            return
        encoder = self.build()
        few, many = (encoder.tokens(edge) for edge in (encoder.image_size, 2 * encoder.image_size))
        hold(
            many > few,
            "`tokens` says how many tokens a square of `image_size` pixels has",
            f"{few} for {encoder.image_size} pixels, {many} for {2 * encoder.image_size}",
            "compute it of its argument; where every size has as many, say `grows = False`",
        )  # fmt: skip

    def test_tokens_follow_the_image_row_by_row_behind_the_prefix(self) -> None:
        """Shown by a patch that changes: no token changes more than its own."""
        encoder = self.build().eval()
        patches = encoder.tokens(encoder.image_size)
        side = isqrt(patches)
        if not self.grid or side * side != patches or side < 2:
            return
        base = make_picture(3, (encoder.image_size,) * 2)
        cell = encoder.image_size // side
        noise = make_picture(4, (cell, cell))
        with torch.no_grad():
            before = encoder(encoder.prepare(base)[None])[0]
            for row, column in ((0, side - 1), (side - 1, 0), (side // 2, 0), (0, side // 2)):
                changed = base.copy()
                changed.paste(noise, (column * cell, row * cell))
                after = encoder(encoder.prepare(changed)[None])[0]
                apart = (after - before).norm(dim=-1)[encoder.prefix_tokens :]
                hold(
                    len(apart) == patches,
                    f"{patches} tokens behind the prefix", len(apart), "fix `prefix_tokens`",
                )  # fmt: skip
                found = divmod(int(apart.argmax()), side)
                hold(
                    found == (row, column),
                    f"the patch in row {row}, column {column} is token {row * side + column} "
                    f"behind {encoder.prefix_tokens} prefix tokens: rows from the top, in each "
                    "from the left",
                    f"the token of row {found[0]}, column {found[1]} changes most with it",
                    "put prefix tokens in front of the patches, and flatten [height, width] in "
                    "this order (`flatten(2).transpose(1, 2)`); where tokens are no grid, "
                    "`grid = False`",
                )

    def test_features_are_of_the_image_and_of_no_other(self) -> None:
        encoder = self.build().eval()
        pixels = self._pixels(encoder, 3)
        with torch.no_grad(), holding("it takes any number of images", _BATCH):
            whole = encoder(pixels)
            for image in range(3):
                hold_close(
                    whole[image : image + 1],
                    encoder(pixels[image : image + 1]),
                    f"the features of image {image} are of it alone, in a batch of 3 as in one of "
                    "1",
                    "normalise and mix within an image, never over dimension 0; batch norms in "
                    "eval mode",
                )
        hold(
            not torch.allclose(whole[0], whole[1]),
            "two images give two features", "the same for both", "use the pixels in `forward`",
        )  # fmt: skip

    def test_it_can_learn(self) -> None:
        encoder = self.build().train()
        encoder.requires_grad_(True)
        self.outputs(encoder).square().sum().backward()
        learning = [p for p in encoder.parameters() if p.grad is not None and p.grad.any()]
        hold(
            learning or not list(encoder.parameters()),
            "a gradient reaches its weights, where a recipe trains it", "none reaches any",
            "run nothing under no_grad or inference_mode in `forward`",
        )  # fmt: skip
