"""The two stages of training (paper, section 4.2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavakit import (
    DataError,
    ModelError,
    Outcome,
    PromptTemplate,
    Run,
    Sample,
    Shown,
    Step,
    Turn,
    Views,
    and_more,
    link_folder,
)
from llavakit.contracts.data import IMAGE
from llavakit.contracts.run import Planner, StepPlan
from llavakit.contracts.sections import Card, Curves, Gallery, Section
from llavakit_plugins.datasets.usual_visuals import LONG, usual_visuals
from llavakit_plugins.language.at_hand import tokenizer_at_hand
from llavakit_plugins.reporting.pictures import save_thumbnail
from llavakit_plugins.templates.chat import ChatTemplate
from llavakit_plugins.training.division import parts_of_weights
from llavakit_plugins.training.memory import device_memory, network_note
from llavakit_plugins.training.options import TrainOptions
from llavakit_plugins.training.parts import PARTS, require_weights
from llavakit_plugins.training.preparing import preparation
from llavakit_plugins.training.starting import missing_model, own_row, sketch_start
from llavakit_plugins.training.work import measure_work

if TYPE_CHECKING:
    from llavakit import LlavaModel

_log = logging.getLogger("llavakit")
_SHOWN = 6  # looks of the validation in the gallery
_SUPERVISED = 0.5  # rough share of a sample's text that is supervised, for plans only


class TrainStep(Step):
    """Trains the model of the newest earlier step, or of `init`, by an objective."""

    Options = TrainOptions
    needs_model = True
    together = True

    def __init__(self, options: TrainOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        # only now: a plan needs no torch
        from llavakit import save_model
        from llavakit_plugins.training.agreement import in_main
        from llavakit_plugins.training.answers import LastAnswer, both_answers
        from llavakit_plugins.training.initial import start_unread
        from llavakit_plugins.training.loop import Trainer
        from llavakit_plugins.training.tokenised import corpus_of
        from llavakit_plugins.training.tokenised_steps import settle

        options = self.options
        if options.precision == "bf16" and run.device.type == "cpu" and run.process_group.is_main:
            _log.warning(
                "note: most CPUs compute slower in bf16 than in float32: try --set "
                "steps.%s.precision=fp32", self.name,
            )  # fmt: skip
        model, unread = start_unread(run, options)
        if parts_of_weights(model, options, run.process_group.size) == 1:
            unread.read(model, run.device)
            model.to(run.device)
        own_tiling = model.tiling
        if options.tiling is not None:
            tiling = own_row(model, run.build(options.tiling))
            model.tiling = tiling if tiling.varies else None
        template = run.build(options.template) if options.template else model.template
        objective = run.build(options.objective)
        data, held, as_read, together = options.data, options.held_out, template, 1
        if objective.compares:
            data, held = both_answers(data), None if held is None else both_answers(held)
            as_read, together = LastAnswer(template), 2
        corpus, notes = corpus_of(
            run, data, model, as_read, options.max_length, unlearned=options.unlearned,
            together=together, workers=options.workers,
        )  # fmt: skip
        if "language" not in options.train and not len(corpus.images.identities):
            parts = and_more(options.train, spell="`{}`".format)
            raise DataError(
                f"`train` names {parts} alone, which learn from images, and the data has none; let "
                "`language` learn, or choose data with images"
            )
        if corpus.skipped:
            notes.append(f"Nothing is learned from {corpus.name_skipped()}: they are left out.")
        for note in notes:
            run.event("note", text=note)
        held_out = None
        if held is not None:
            held_out, _ = corpus_of(
                run, held, model, as_read, options.max_length, together=together,
                workers=options.workers,
            )  # fmt: skip
        files = [read.file for read in (corpus, held_out) if read is not None]
        in_main(run.process_group, lambda: settle(run, files))
        run.event("corpus", samples=len(corpus), tokens=corpus.tokens, cut=corpus.cut)
        with _explain_memory(_less_memory(options)):
            trainer = Trainer(model, corpus, options, run, held_out, template, unread)
            progress = trainer.train()
        if not run.process_group.is_main:
            return Outcome({})
        model = trainer.model
        model.tiling = own_tiling
        metrics = {
            "loss": _tail_mean([loss for _, loss in progress.losses]),
            "steps": float(progress.step),
        }
        for name, told in progress.figures.items():
            metrics[name.replace("/", "_")] = _tail_mean([value for _, value in told])
        if corpus.skipped:
            metrics["left_out"] = float(len(corpus.skipped))
        if progress.looks:
            metrics["held_out_loss"] = progress.looks[-1][1]
        kept = run.directory / ("last" if options.keep_best else "model")
        save_model(model, kept)
        if (best := trainer.recall_best()) is not None:
            metrics |= {"best_held_out_loss": best.loss, "best_step": float(best.step)}
            kept = run.directory / "best"
            save_model(model, kept)
        if options.keep_best:
            link_folder(run.directory / "model", kept)
        curve = Curves(
            title="Training loss",
            x="step",
            y="loss a pair" if objective.compares else "loss a token",
            series={self.name: [(float(at), loss) for at, loss in progress.losses]},
            caption=f"{progress.samples:,} samples, {progress.tokens:,} tokens, of which "
            f"{progress.targets:,} supervised. {' '.join(notes)}".rstrip(),
        )
        sections: list[Section] = [curve]
        if options.validate_every:
            curve.series["held out"] = [(float(at), loss) for at, loss, _ in progress.looks]
        for name, told in progress.figures.items():
            points = {self.name: [(float(at), value) for at, value in told]}
            sections.append(Curves(title=name.capitalize(), x="step", y=name, series=points))
        if trainer.questioned:
            sections.append(_gallery(trainer.questioned, progress.looks, run.directory))
        return Outcome(metrics, sections)

    @classmethod
    def missing(cls, options: TrainOptions) -> str | None:
        return missing_model(options)

    @classmethod
    def leaves(cls, options: TrainOptions) -> Mapping[str, bool]:
        looks = options.validate_every is not None
        kinds = {"model": True, "best": looks, "last": options.keep_best}
        return {name: True for name, is_left in kinds.items() if is_left}

    @classmethod
    def plan(cls, options: TrainOptions, planner: Planner) -> StepPlan:
        trained = tuple(part for part in PARTS if part in options.train)
        sketch_start(planner, options)
        if not planner.has_model:
            note = f"its model, {options.init}, is not on this machine, so its shape is not known"
            return StepPlan(trained=trained, note=note)
        for part in trained:
            require_weights(part, planner.trainable(part))
        preparation(planner.model, options.prepare, planner.build)  # for its errors
        if options.template is not None:
            _try_template(planner.build(options.template), planner.model)
        notes = [
            f"of `{part}`, {planner.trainable(part):,} parameters learn"
            for part in trained
            if planner.trainable(part) < planner.parameters(part)
        ]
        views = planner.model.views
        if options.tiling is not None:
            tiling = own_row(planner.model, planner.build(options.tiling))
            views = views._replace(tiling=tiling if tiling.varies else None)
        visual = len(views.of().index_RK)
        length = min(options.max_length, planner.model.language.max_length)
        if length <= visual:
            notes.append(
                f"an image takes {visual} tokens and a sample is cut at "
                f"{length}: nothing is learned from samples with an image"
            )
        notes += _about_videos(views, length)
        if options.compile:
            notes.append("blocks are compiled in the first step, which takes longer")
        memory = device_memory(options, planner)
        need: dict[str, Any] = {"memory": memory, "memory_gb": sum(memory.values())}
        expected = planner.expect(options.data)
        if expected is None:
            notes.append(
                f"`{options.data.use}` cannot say yet how much data there is; its option `expect`, "
                "where it has that, says it for plans"
            )
            return StepPlan(trained=trained, **need, note="; ".join(notes))
        samples, text = expected
        found = usual_visuals(options.data, views)
        share = 1 / sum(one.samples for one in found)
        lengths = [min(one.rows + text, options.max_length) for one in found]
        length = sum(one.samples * own for one, own in zip(found, lengths, strict=True)) * share
        answers = 2 if planner.build(options.objective).compares else 1
        steps = -(-samples // options.batch_size) * options.epochs
        seen = samples * options.epochs
        if options.max_steps is not None and options.max_steps < steps:
            steps = options.max_steps
            seen = steps * options.batch_size
        if options.feature_cache is not None:
            of_sample = sum(one.samples * one.views for one in found) * share
            size = samples * of_sample * _view_bytes(planner.model) / 1e9
            size = min(size, options.feature_cache_gb)
            notes.append(f"features take up to {size:,.3g} GB in {options.feature_cache}")
        work = measure_work(planner.model, options.train, planner.parameters, planner.trainable)
        if network := network_note(options, planner, round(options.batch_size * length)):
            notes.append(network)
        sample = share * sum(
            one.samples * work.of(one.views, one.rows, [own], text * _SUPERVISED)
            for one, own in zip(found, lengths, strict=True)
        )
        return StepPlan(
            samples=seen,
            tokens=round(seen * answers * length),
            steps=steps,
            tflop=seen * answers * sample / 1e12,
            trained=trained,
            **need,
            note="; ".join(notes),
        )


def _try_template(template: PromptTemplate, model: LlavaModel) -> None:
    """Raise ModelError where a step's template needs one of the tokenizer, which has none."""
    if not isinstance(template, ChatTemplate):
        return
    if (tokenizer := tokenizer_at_hand(model.language)) is not None:
        template.segments((Turn("human", "?"), Turn("gpt", "!")), tokenizer)


def _about_videos(views: Views, length: int) -> list[str]:
    """Return what a plan says of the longest video, where the tiling shows any."""
    frames = None if views.tiling is None else views.tiling.sample(LONG)
    if frames is None:
        return []
    rows = len(views.of(Shown(LONG.width, LONG.height, 1, len(frames))).index_RK)
    most = f"a video of {len(frames)} frames takes {rows:,} tokens"
    if rows < length:
        return [most]
    return [f"{most} and a sample is cut at {length:,}: nothing is learned from one so long"]


def _gallery(
    samples: Sequence[Sample], looks: Sequence[tuple[int, float, Sequence[str]]], folder: Path
) -> Gallery:
    """Return what was answered over time: at the first step, at the last, and a few between."""
    count = min(_SHOWN, len(looks))
    chosen = sorted({round(n * (len(looks) - 1) / max(1, count - 1)) for n in range(count)})
    cards = []
    for number, sample in enumerate(samples):
        shown = None
        if sample.images:
            shown = save_thumbnail(sample.images[0], folder / "images", f"{number:03}")
        question = sample.turns[0].text.replace(IMAGE, "").strip()
        said = [(f"step {looks[index][0]}", looks[index][2][number]) for index in chosen]
        truth = [("truth", sample.turns[1].text)] if len(sample.turns) > 1 else []
        cards.append(Card(image=shown, lines=[("question", question), *said, *truth]))
    return Gallery(title="Held-out answers while it learns", cards=cards)


def _view_bytes(model: LlavaModel) -> int:
    """Return the size of the features of one view."""
    vision = model.vision
    dtype = next(vision.parameters()).dtype
    return vision.tokens(vision.image_size) * vision.width * dtype.itemsize


def _less_memory(options: TrainOptions) -> str:
    """Return what to change where a device is full."""
    ways = [f"fewer `micro_batch_tokens` (now {options.micro_batch_tokens:,})"]
    if not options.recompute:
        ways.append("`recompute = true`")
    if options.precision != "bf16":
        ways.append('`precision = "bf16"` on a GPU')
    return f"less is needed with {', '.join(ways)}, or a shorter `max_length`"


def _tail_mean(losses: list[float]) -> float:
    """Return the mean of the last tenth: one step's loss is noise."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


class Pretrain(TrainStep):
    """Stage 1, feature alignment: as a rule only the connector learns."""

    name = "pretrain"


class Finetune(TrainStep):
    """Stage 2, instruction tuning: as a rule the connector and the language model learn."""

    name = "finetune"


@contextmanager
def _explain_memory(remedy: str) -> Iterator[None]:
    """Turn a device that is full into a sentence; `remedy` says what needs less."""
    try:
        yield
    except RuntimeError as error:  # torch's own on CUDA; on a CPU it raises nothing narrower
        import torch

        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        reason = str(error).partition("\n")[0].partition(". GPU ")[0].rstrip(".")
        raise ModelError(f"out of memory ({reason}); {remedy}") from error
