"""The connectors of LLaVA (one linear layer) and LLaVA-1.5 (two layers with GELU between).

Shapes: B images, P patches, D vision width, E language width, N visual rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llavakit import Connector
from llavakit.contracts.packing import Stream
from llavakit_kernels import linear_gelu, project_splice
from llavakit_kernels.arguments import Impl
from llavakit_plugins.connectors.options import LinearOptions, MlpOptions as MlpOptions
from llavakit_plugins.huggingface.products import Products, choose_products


class Linear(Connector):
    """The connector of LLaVA: one linear layer W (arXiv 2304.08485, section 4.1)."""

    name = "linear"
    Options = LinearOptions

    def __init__(self, options: Any, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.layers = nn.Linear(vision_width, language_width)
        # plain options are taken, too: this connector had no others
        products: Products = getattr(options, "products", "torch")
        choose_products(self, products)
        self.impl = _impl(products)

    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings_BPE: Tensor = self.layers(features_BPD)
        return embeddings_BPE

    def project_into(self, features_BPD: Tensor, stream: Stream) -> Tensor:
        if stream.embedding_VE is None:
            return super().project_into(features_BPD, stream)
        # with a plain table to look up, no text row is written twice
        features_ND = _visible(features_BPD, stream)
        return _splice(features_ND, self.layers, stream, stream.embedding_VE, self.impl)


class Mlp(Connector):
    """Linear layers with exact (erf) GELU between them (LLaVA-1.5, arXiv 2310.03744)."""

    name = "mlp"
    Options = MlpOptions

    def __init__(self, options: MlpOptions, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(vision_width, language_width)]
        for _ in range(1, options.depth):
            layers += [nn.GELU(), nn.Linear(language_width, language_width)]
        self.layers = nn.Sequential(*layers)
        choose_products(self, options.products)
        self.impl = _impl(options.products)

    def forward(self, features_BPD: Tensor) -> Tensor:
        embeddings_BPE: Tensor = self.layers(features_BPD)
        return embeddings_BPE

    def project_into(self, features_BPD: Tensor, stream: Stream) -> Tensor:
        if stream.embedding_VE is None:
            return super().project_into(features_BPD, stream)
        # the last layer's kernel writes its rows straight into the stream
        *hidden, last = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        features_ND = _visible(features_BPD, stream)
        for layer in hidden:
            features_ND = linear_gelu(
                features_ND.to(layer.weight.dtype), layer.weight, layer.bias, impl=self.impl
            )
        return _splice(features_ND, last, stream, stream.embedding_VE, self.impl)


def _visible(features_BPD: Tensor, stream: Stream) -> Tensor:
    """Return the features `[N, D]` of the visual tokens that truncation has kept."""
    features_ND = features_BPD.flatten(0, 1)
    kept = stream.visual_kept_N  # projecting rows that are cut would be wasted work
    return features_ND if kept is None else features_ND.index_select(0, kept)


def _impl(products: Products) -> Impl:
    """Return the kernels' implementation: they multiply by a layer without calling it."""
    return "onednn" if products == "onednn" else "auto"


def _splice(
    features_ND: Tensor, layer: nn.Linear, stream: Stream, embedding_VE: Tensor, impl: Impl
) -> Tensor:
    """Return the stream `[T, E]` of text rows and projected visual rows; one launch on CUDA."""
    return project_splice(
        features_ND.to(layer.weight.dtype),
        layer.weight,
        layer.bias,
        stream.token_ids_T,
        embedding_VE,
        stream.visual_rows_N,
        impl=impl,
    )
