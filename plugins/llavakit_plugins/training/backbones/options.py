"""The options of both trainings from nothing. Without torch, as plans need them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llavakit import Use
from llavakit_plugins.training.backbones.distortions import Distortions
from llavakit_plugins.training.kinds import Optimiser

CLIPS_ADAMW = Use[Optimiser].model_validate({"use": "adamw", "betas": (0.9, 0.98)})
"""The optimiser of CLIP (arXiv 2103.00020, table 18)."""


class ContrastiveOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    text: Mapping[str, Any] = Field(
        default_factory=lambda: {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    )
    """Configuration of the text half, as in a config.json. It is discarded after the training."""
    steps: int = Field(default=1200, ge=1)
    batch_size: int = Field(default=64, ge=2)
    """Images in a batch. Families of eight neighbours in the data stay together in a batch."""
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    optimiser: Use[Optimiser] = CLIPS_ADAMW
    warmup: float = Field(default=0.05, ge=0, lt=1)
    first: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps that use only the first file of contexts (the easier ones), 0 to 1."""
    distortions: Distortions | None = None
    """Random changes of each patch at each step, against learning few images by heart."""
    loudness: float = Field(default=0.4, gt=0)
    """Standard deviation of new embeddings. The usual 0.02 is too small for a short training."""


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=48, ge=1)
    """Documents of a step."""
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    optimiser: Use[Optimiser] = CLIPS_ADAMW
    warmup: float = Field(default=0.05, ge=0, lt=1)
