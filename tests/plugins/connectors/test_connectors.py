"""Connectors keep their contract, equal numpy, and say what does not fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from llavakit import Connector, ModelError, Options
from llavakit.testing import ConnectorContract
from llavakit_plugins.connectors.identity import Identity
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.connectors.pool import Pool, PoolOptions


class TestIdentity(ConnectorContract):
    language_width = 8

    def build(self) -> Connector:
        return Identity(Options(), vision_width=8, language_width=8)


class TestPool(ConnectorContract):
    options: Mapping[str, Any] = {"grid": 2}
    patches = 16

    def build(self) -> Connector:
        torch.manual_seed(0)
        return Pool(PoolOptions(grid=2), vision_width=8, language_width=16)


class TestPoolToAGridThatDoesNotDivide(TestPool):
    options: Mapping[str, Any] = {"grid": 3, "depth": 1}
    patches = 25

    def build(self) -> Connector:
        torch.manual_seed(0)
        return Pool(PoolOptions(grid=3, depth=1), vision_width=8, language_width=16)


class TestMlpOfOneLayer(ConnectorContract):
    options: Mapping[str, Any] = {"depth": 1}

    def build(self) -> Connector:
        torch.manual_seed(0)
        return Mlp(MlpOptions(depth=1), vision_width=8, language_width=16)


class TestMlpOfFourLayers(TestMlpOfOneLayer):
    options: Mapping[str, Any] = {"depth": 4}

    def build(self) -> Connector:
        torch.manual_seed(0)
        return Mlp(MlpOptions(depth=4), vision_width=8, language_width=16)


@pytest.mark.parametrize(("edge", "grid"), [(24, 12), (16, 8), (4, 4), (6, 1), (27, 14), (5, 3)])
def test_pool_is_the_mean_over_each_cell_in_float64(edge: int, grid: int) -> None:
    torch.manual_seed(0)
    pool = Pool(PoolOptions(grid=grid, depth=1), vision_width=6, language_width=4)
    features = torch.randn(2, edge * edge, 6)
    cells = features.double().numpy().reshape(2, edge, edge, 6)
    low = [i * edge // grid for i in range(grid)]
    high = [-(-(i + 1) * edge // grid) for i in range(grid)]
    spans = [slice(a, b) for a, b in zip(low, high, strict=True)]
    pooled = np.stack([cells[:, r, c].mean((1, 2)) for r in spans for c in spans], 1)
    weight, bias = (p.detach().double().numpy() for p in pool.parameters())
    with torch.no_grad():
        found = pool(features).numpy()
    assert found.shape == (2, grid * grid, 4)
    np.testing.assert_allclose(found, pooled @ weight.T + bias, atol=1e-5)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ModelError, match="gives 8 and the language model takes 16; use `linear`"):
        Identity(Options(), vision_width=8, language_width=16)
    pool = Pool(PoolOptions(grid=5), vision_width=8, language_width=16)
    with pytest.raises(ModelError, match=r"5 x 5 tokens of an image's 4 x 4; .* up to 4"):
        pool.tokens(16)
    with pytest.raises(ModelError, match=r"an image has 17 visual tokens; .*select = \"patch\""):
        pool.tokens(17)
