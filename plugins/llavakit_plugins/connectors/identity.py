"""A connector that changes nothing: patch features serve as the language model's embeddings."""

from __future__ import annotations

from torch import Tensor

from llavakit import Connector, ModelError, Options


class Identity(Connector):
    """Returns patch features unchanged. It has no weights, so a step cannot train it.

    Raises ModelError if the widths of encoder and language model differ.
    """

    name = "identity"

    def __init__(self, options: Options, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        # else it would fail in the middle of a run, as shapes of tensors
        if vision_width != language_width:
            raise ModelError(
                f"connector `identity` needs equal widths, but the vision encoder gives "
                f"{vision_width} and the language model takes {language_width}; use `linear`"
            )

    def forward(self, features_BPD: Tensor) -> Tensor:
        return features_BPD
