"""The contract of a vision encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from llavakit.contracts.networks import VisionEncoder
from llavakit.testing.network import NetworkContract
from llavakit.testing.samples import make_picture


class VisionEncoderContract(NetworkContract[VisionEncoder]):
    """Checks a `VisionEncoder`."""

    kind = VisionEncoder

    def outputs(self, network: VisionEncoder) -> Tensor:
        features: Tensor = network(self._pixels(network))
        return features

    def _pixels(self, encoder: VisionEncoder) -> Tensor:
        pictures = [make_picture(seed) for seed in range(2)]
        return torch.stack([encoder.prepare(picture) for picture in pictures])

    def test_prepares_every_image_as_the_same_square(self) -> None:
        encoder = self.build()
        edge = encoder.image_size
        for size in ((40, 30), (30, 40), (edge, edge), (1, 1), (3 * edge, edge)):
            picture = make_picture(size=size)
            before = picture.tobytes()
            pixels = encoder.prepare(picture)
            assert pixels.dtype == torch.float32, f"`prepare` gives {pixels.dtype}, not float32"
            assert pixels.shape == (3, edge, edge), (
                f"`prepare` gives {tuple(pixels.shape)} for an image of {size}, but image_size is "
                f"{edge}"
            )
            assert torch.isfinite(pixels).all()
            assert torch.equal(pixels, encoder.prepare(picture)), "`prepare` is not deterministic"
            assert picture.tobytes() == before, "`prepare` changes the image it is given"

    def test_returns_one_feature_for_each_patch(self) -> None:
        encoder = self.build().eval()
        with torch.no_grad():
            features = self.outputs(encoder)
        assert features.ndim == 3, f"expected [B, P, D], got {tuple(features.shape)}"
        tokens = encoder.prefix_tokens + encoder.tokens(encoder.image_size)
        assert tuple(features.shape) == (2, tokens, encoder.width), (
            f"expected 2 images, {encoder.prefix_tokens} + {encoder.tokens(encoder.image_size)} "
            f"tokens, width {encoder.width}; got {tuple(features.shape)}"
        )

    def test_features_are_of_the_image_and_of_no_other(self) -> None:
        encoder = self.build().eval()
        pixels = self._pixels(encoder)
        with torch.no_grad():
            both, alone = encoder(pixels), encoder(pixels[1:])
        torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(both[0], both[1]), "two images give the same features"

    def test_it_can_learn(self) -> None:
        encoder = self.build().train()
        encoder.requires_grad_(True)
        self.outputs(encoder).square().sum().backward()
        learning = [p for p in encoder.parameters() if p.grad is not None and p.grad.any()]
        assert learning or not list(encoder.parameters()), "no gradient reaches any weight"
