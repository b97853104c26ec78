"""The shapes of the connectors' weights, for plans. Without torch."""

from __future__ import annotations

from typing import Any

from llavakit_plugins.connectors.options import LinearOptions, MlpOptions, PoolOptions, smaller_grid
from llavakit_plugins.outlines.weights import NotPlain, Outline, linear


class _ConnectorOutline(Outline):
    """Built with the widths, as connectors are."""

    def __init__(self, options: Any, *, vision_width: int, language_width: int) -> None:
        super().__init__(options)
        self.widths = (vision_width, language_width)
        self.weights = {}

    def tokens(self, patches: int) -> int:
        return patches


class LinearOutline(_ConnectorOutline):
    name = "linear"
    Options = LinearOptions

    def __init__(self, options: Any, **widths: int) -> None:
        super().__init__(options, **widths)
        self.weights = linear("layers", *self.widths)


class MlpOutline(_ConnectorOutline):
    name = "mlp"
    Options = MlpOptions

    def __init__(self, options: MlpOptions, **widths: int) -> None:
        super().__init__(options, **widths)
        vision_width, width = self.widths
        self.weights = linear("layers.0", vision_width, width)
        for number in range(1, options.depth):
            self.weights |= linear(f"layers.{2 * number}", width, width)


class PoolOutline(MlpOutline):
    name = "pool"
    Options = PoolOptions
    options: PoolOptions

    def tokens(self, patches: int) -> int:
        smaller_grid(patches, self.options.grid)
        return self.options.grid**2


class IdentityOutline(_ConnectorOutline):
    name = "identity"

    def __init__(self, options: Any, **widths: int) -> None:
        super().__init__(options, **widths)
        if len(set(self.widths)) > 1:
            raise NotPlain("parts of different widths")  # the connector says so
