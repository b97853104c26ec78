"""The options of the step `train`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llavakit import Dataset, Options, PromptTemplate, Tiling, Use
from llavakit_plugins.training.adamw import Beta
from llavakit_plugins.training.callbacks import Callback
from llavakit_plugins.training.kinds import Objective, Optimiser, Schedule
from llavakit_plugins.training.starting import StartOptions

Part = Literal["vision", "connector", "language"]


class _Numbers(Options):
    """Options whose numbers are not `true` or `false`, which pydantic would read as 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, stated: Any, info: ValidationInfo) -> Any:
        table = stated.values() if isinstance(stated, dict) else stated
        values = [stated] if isinstance(table, str) or not isinstance(table, Iterable) else table
        wanted = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(value, bool) for value in values) and _has_number(wanted):
            raise ValueError("true and false are no numbers: state one")
        return stated


def _has_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_has_number, get_args(annotation)))


class Parallel(_Numbers):
    """How devices share the weights: `replicate` groups, each of which holds them all, divided."""

    replicate: int = Field(default=1, ge=1)
    shard: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Devices among which the weights are divided. `all`: all of a group."""


class TrainOptions(_Numbers, StartOptions):
    """Options of training. The defaults are those of the original LLaVA: AdamW without weight
    decay, 3 % warm-up, cosine schedule, gradients clipped at norm 1."""

    data: Use[Dataset]
    held_out: Use[Dataset] | None = None
    """Samples whose loss is measured; they are not trained on."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations on `held_out`; by default only at the end."""
    samples: int = Field(default=4, ge=0)
    """Number of held-out questions that are answered at each validation."""
    keep_best: bool = False
    """Whether to keep the model with the lowest held-out loss instead of the last one."""
    train: dict[Part, Annotated[float, Field(allow_inf_nan=True)]]  # refused below, all in one way
    """The parts that are trained, each with its peak learning rate."""
    template: Use[PromptTemplate] | None = None
    """A prompt template for this step's data only; by default the model's."""
    tiling: Use[Tiling] | None = None
    """How images are cut in this step only; by default as the model does it. LLaVA-NeXT, for
    example, aligns with `single` before it tunes with `anyres`."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=1)
    """Samples in one optimisation step, over all micro-batches and devices."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Rows of the packed stream that pass the model at once; this limits the memory."""
    max_length: int = Field(default=2048, ge=2)
    """Longest sample in tokens, images included; longer ones are cut, as in the original."""
    unlearned: Literal["refuse", "skip"] = "refuse"
    """What to do with samples without a supervised token (the answers are empty or lie behind
    `max_length`): refuse the data, or skip these samples and name them."""
    prepare: dict[str, Any] = Field(default_factory=dict)
    """Changed options of the vision encoder for this step's images: `{ aspect = "crop" }`."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises, 0 to 1."""
    schedule: Use[Schedule] = Use[Schedule](use="cosine")
    """How the rate goes behind that: `"cosine"`, or `{ use = "wsd", decay = 0.2 }`."""
    optimiser: Use[Optimiser] = Use[Optimiser](use="adamw")
    """What updates the weights: `"adamw"`, or `{ use = "muon", momentum = 0.9 }`."""
    objective: Use[Objective] = Use[Objective](use="next-token")
    """What is made small: the loss of the next token, or a plugin's."""
    callbacks: tuple[Use[Callback], ...] = ()
    """What is called after each step: `[{ use = "norms", every = 100 }]`, or a plugin's."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] | None = None
    """`betas` of the optimiser, stated here."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all trained parts."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """With bf16, trained weights stay float32 and matrix products run in bfloat16."""
    shard: bool | None = None
    """On several devices: shard weights and optimiser state (FSDP), or keep all on each device.
    By default sharded if the language model or the encoder is trained."""
    parallel: Parallel | None = None
    """On several devices: in how many groups they hold the weights, and how many make up a group.
    `{ replicate = 4, shard = 8 }` divides weights within each of 4 machines of 8 devices (HSDP)."""
    timeout: float = Field(default=30.0, gt=0)
    """Minutes that several devices wait for one that does not go on: within a step, or in reading
    its samples. Then all stop, and the one that is behind is named."""
    recompute: bool = False
    """Compute activations again in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Compile each block of the language model (and of an encoder whose features are not kept) by
    torch.compile. The first step takes longer, the last bits of the result differ."""
    cache_features: bool | None = None
    """Encode each image once and keep the features; only for a frozen encoder. By default if
    images are used more than once and the features fit into 4 GiB."""
    feature_cache: Path | None = None
    """A folder in which the features of a frozen encoder are kept on the disk, for all processes,
    steps and runs that name it. It may be removed at any time that no run is at work."""
    feature_cache_gb: float = Field(default=100.0, gt=0)
    """Most GB that the features of one encoder take there; images beyond are encoded each time."""
    processes: int = Field(default=1, ge=1)
    """On a CPU, without torchrun: so many processes share the samples of each step, and the images
    that are encoded once, each with one thread. Small networks learn faster so; each process has
    gradients of its own. The result depends on the number, not on the machine's cores."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read images ahead; 0 reads them in the training process. By default 0 on a
    CPU and up to 8 on a GPU. Also the most that tokenise: by default one a core, up to 8."""
    log_every: int = Field(default=10, ge=1)
    """Steps between log entries. Nothing waits for the device in between. A loss that is not finite
    stops the updates at once, and is reported with the next log entry."""
    checkpoint_every: int = Field(default=500, ge=1)
    keep: int = Field(default=1, ge=1)
    """Number of checkpoints to keep."""

    @model_validator(mode="before")
    @classmethod
    def _reads_names(cls, stated: Any) -> Any:
        if not isinstance(stated, dict):
            return stated
        found = dict(stated)
        for key in ("schedule", "optimiser", "objective"):
            if isinstance(found.get(key), str):
                found[key] = {"use": found[key]}
        optimiser = found.get("optimiser", {"use": "adamw"})
        if found.get("betas") is not None and isinstance(optimiser, dict):
            if "betas" in optimiser:
                raise ValueError("`betas` are in `optimiser` already: state them once")
            found["optimiser"] = {**optimiser, "betas": found["betas"]}
        return found

    @field_validator("train")
    @classmethod
    def _learns_something(cls, train: dict[Part, float]) -> dict[Part, float]:
        if not train or not all(0 < rate < math.inf for rate in train.values()):
            raise ValueError("name at least one part, each with a finite learning rate above 0")
        return train

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.validate_every is not None and self.held_out is None:
            raise ValueError("`validate_every` looks at `held_out`: name a data set there")
        if self.shard is False and self.parallel is not None:
            raise ValueError("`parallel` divides weights and `shard = false` does not: state one")
        for name in ("feature_cache", "cache_features"):
            if getattr(self, name) and "vision" in self.train:
                raise ValueError(f"`{name}` is for a frozen encoder: `train` names `vision`")
        if self.compile and self.processes > 1:
            raise ValueError("compiled blocks cannot learn in `processes`: state one of both")
        if self.processes > self.batch_size:
            raise ValueError(
                f"`processes = {self.processes}` share the samples of a step, and `batch_size = "
                f"{self.batch_size}`: state no more of them"
            )
        if self.keep_best and self.validate_every is None:
            raise ValueError("`keep_best` needs `validate_every`, or there is only the last model")
        return self
