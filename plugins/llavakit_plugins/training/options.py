"""How a model is trained."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llavakit import Dataset, PromptTemplate, Use
from llavakit_plugins.training.initial import StartOptions

Part = Literal["vision", "connector", "language"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainOptions(StartOptions):
    """Defaults are the original's: AdamW, no weight decay, 3 % warm-up, cosine, clipping at 1."""

    data: Use[Dataset]
    held_out: Use[Dataset] | None = None
    """Samples whose loss is measured but not learned."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at `held_out`; at the end only where absent."""
    samples: int = Field(default=4, ge=0)
    """Held-out questions that are answered at each look."""
    keep_best: bool = False
    """Whether the step's model is the one with the lowest held-out loss, and not the last."""
    train: dict[Part, float]
    """The parts that learn, each with its peak learning rate."""
    template: Use[PromptTemplate] | None = None
    """Another template than the model's, for this step's data only."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=1)
    """Samples of one optimisation step, over all micro-batches."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Rows of the packed stream that go through the model at once; bounds the memory."""
    max_length: int = Field(default=2048, ge=2)
    """Longest sample in tokens, images included; longer ones are cut, as in the original."""
    unlearned: Literal["refuse", "skip"] = "refuse"
    """What to do about samples in which nothing is learned, because their answers are empty or lie
    behind `max_length`: refuse the data, or leave those samples out and say which."""
    prepare: dict[str, Any] = Field(default_factory=dict)
    """Options of the vision encoder that differ for this step's images: `{ aspect = "crop" }`."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all trained parts."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """With bf16 the trained weights stay float32 and products run in bfloat16."""
    shard: bool | None = None
    """On several devices: divide weights and optimiser state among them, or keep all on each; by
    default divided where the language model learns."""
    recompute: bool = False
    """Compute activations again in the backward pass: less memory, a third more work."""
    cache_features: bool | None = None
    """Encode each image once, where the encoder is frozen; by default where images recur."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images ahead; 0 reads them in the training process, as is the default on
    a CPU. On a GPU it is up to 8."""
    log_every: int = Field(default=10, ge=1)
    """Steps between looks at the loss. Nothing waits for the device in between; a loss that is no
    number stops learning at once, and is reported at the next look."""
    checkpoint_every: int = Field(default=500, ge=1)
    keep: int = Field(default=1, ge=1)
    """How many checkpoints to keep."""

    @field_validator("train")
    @classmethod
    def _learns_something(cls, train: dict[Part, float]) -> dict[Part, float]:
        if not train or not all(0 < rate < math.inf for rate in train.values()):
            raise ValueError("name at least one part, each with a finite learning rate above 0")
        return train

    @model_validator(mode="after")
    def _validation_has_data(self) -> Self:
        if self.validate_every is not None and self.held_out is None:
            raise ValueError("`validate_every` looks at `held_out`: name a data set there")
        if self.keep_best and self.validate_every is None:
            raise ValueError("`keep_best` needs `validate_every`, or there is only the last model")
        return self
