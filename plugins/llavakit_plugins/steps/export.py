"""Writes the trained model for others, reads it back as they would, and tries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import getattr_static, signature
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

import llavakit
from llavakit import (
    Dataset,
    Exporter,
    ModelError,
    Outcome,
    Registry,
    Run,
    Step,
    Use,
    explain_write,
)
from llavakit.contracts.data import IMAGE, ImageSource
from llavakit.contracts.run import Planner, StepPlan
from llavakit.contracts.sections import Card, Gallery
from llavakit_plugins.heatmaps.drawing import draw_attention_maps
from llavakit_plugins.reporting.pictures import save_image, save_thumbnail
from llavakit_plugins.training.starting import StartOptions, missing_model, sketch_start

if TYPE_CHECKING:
    from llavakit import Answer, LlavaModel

_LOOKS = (
    "Attention from the answer's tokens to the image's patches, the mean over layers and heads: "
    "of the whole answer, and of each word. Each picture's hottest place is its largest weight."
)


class ExportOptions(StartOptions):
    format: Use[Exporter] | None = None
    """The layout; by default a model folder of llavakit."""
    tries: Use[Dataset] | None = None
    """Samples whose first question the exported model must answer as the model does."""
    count: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=96, ge=1, le=10**9)
    heatmaps: int = Field(default=0, ge=0)
    """Number of tries that are shown with attention maps, word by word."""

    @model_validator(mode="after")
    def _shows_tries(self) -> Self:
        if self.heatmaps and self.tries is None:
            raise ValueError("`heatmaps` shows some of `tries`: name a data set there")
        return self


class Export(Step):
    """Writes the newest model, reads it back, and asks it a few questions."""

    name = "export"
    Options = ExportOptions
    needs_model = True

    def __init__(self, options: ExportOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        from llavakit import save_model
        from llavakit_plugins.training.initial import start

        model = start(run, self.options).eval()
        metrics: dict[str, float] = {}
        folder, read_back = run.directory / "model", True
        if self.options.format is None:
            save_model(model, folder)
        else:
            folder = run.directory / self.options.format.use
            exporter = run.build(self.options.format)
            # LoRA's matrices are added to the weights first: other programs read plain layers only
            proof = exporter.export(model.merged(), folder)
            metrics |= {k: float(v) for k, v in proof.items() if isinstance(v, int | float)}
            read_back = _can_load(exporter)
        exported = llavakit.load(folder, device=run.device) if read_back else model
        cards: list[Card] = []
        looks: list[Card] = []
        if self.options.tries is not None:
            data = run.build(self.options.tries)
            # spread over the data, as neighbours often have the same kind of question
            stride = max(1, len(data) // self.options.count)
            for index in range(0, min(len(data), stride * self.options.count), stride):
                sample = data[index]
                question = sample.turns[0].text.replace(IMAGE, "").strip()
                images = list(sample.images)
                tokens = self.options.max_new_tokens
                answer = exported.generate(question, images=images, max_new_tokens=tokens)
                # greedy decoding on the same device, so that equal weights must give equal text
                own = model.answers(question, images=images, max_new_tokens=tokens)[0]
                if answer != own.text:
                    raise ModelError(
                        f"{folder} answers sample `{sample.id}` differently from the model it was "
                        "made of; the export is not faithful"
                    )
                lines = [("question", question), ("answer", answer)]
                if len(sample.turns) > 1:
                    lines.append(("teacher", sample.turns[1].text))
                shown = None
                if images:
                    shown = save_thumbnail(images[0], run.directory / "images", f"{index:03}")
                cards.append(Card(image=shown, lines=lines))
                if images and len(looks) < self.options.heatmaps:
                    sheet = _look(run, model, question, images, own, f"{index:03}")
                    looks.append(Card(image=sheet, lines=lines[:2]))
                run.progress(len(cards), self.options.count, "trying it")
        parameters = sum(p.numel() for p in model.parameters())
        metrics["parameters"] = float(parameters)
        metrics["bytes"] = float(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
        whose = "exported model" if read_back else "model"
        sections = [Gallery(title=f"The {whose}'s answers", cards=cards)]
        if looks:
            sections.append(Gallery(title="Where it looks", cards=looks, caption=_LOOKS))
        return Outcome(metrics, sections)

    @classmethod
    def missing(cls, options: ExportOptions) -> str | None:
        return missing_model(options)

    @classmethod
    def leaves(cls, options: ExportOptions) -> Mapping[str, bool]:
        if options.format is None:
            return {"model": True}
        read = Registry.installed().get(Exporter, options.format.use).load
        # a layout says by its type whether what it reads back is a model of ours
        return {
            options.format.use: signature(read).return_annotation == llavakit.LlavaModel.__name__
        }

    @classmethod
    def plan(cls, options: ExportOptions, planner: Planner) -> StepPlan | None:
        sketch_start(planner, options)
        if planner.has_model and options.format is not None:
            planner.build(options.format).check(planner.model)
        return None


def _look(
    run: Run,
    model: LlavaModel,
    question: str,
    images: Sequence[ImageSource],
    answer: Answer,
    name: str,
) -> str:
    """Draw the attention maps of an answer; return the image's name in the step's folder."""
    from llavakit_plugins.heatmaps.attention_maps import map_answer

    ids = [token.id for token in answer.tokens]
    maps = map_answer(model, model.prompt(question, images), model.prepare(images), ids)
    path = run.directory / "heatmaps" / f"{name}.png"
    with explain_write(path):
        path.parent.mkdir(exist_ok=True)
    save_image(draw_attention_maps(maps, images, model.vision), path)
    return f"{path.parent.name}/{path.name}"


def _can_load(exporter: Exporter) -> bool:
    """Say whether the layout can be read back; where not, the exporter's own proof must do."""
    # static: reading the attribute in the usual way
    # would bind the class method, a new object each time
    return getattr_static(type(exporter), "load") is not getattr_static(Exporter, "load")
