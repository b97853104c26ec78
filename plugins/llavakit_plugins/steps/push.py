"""Puts the trained model on Hugging Face's hub, with a card made of the run."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import field_validator

from llavakit import Exporter, Outcome, Run, Step, Use, write_text
from llavakit.contracts.run import Planner, StepPlan
from llavakit.contracts.sections import Table
from llavakit_plugins.publishing.card import read_story, write_card
from llavakit_plugins.publishing.layouts import lay_out
from llavakit_plugins.publishing.push import check_name, missing_token, send_folder
from llavakit_plugins.training.starting import StartOptions, missing_model, sketch_start


class PushOptions(StartOptions):
    name: str
    """The model's name on the hub: `owner/model`."""
    private: bool = False
    """Whether it is private, if it is new."""
    formats: tuple[Use[Exporter], ...] = (Use[Exporter](use="hf"),)
    """The layouts to send: the first is the repository's own, each other one has a folder."""
    licence: str | None = None
    """By the hub's short name; by default what all parts have, or `other`."""

    @field_validator("name")
    @classmethod
    def _may_be_one(cls, name: str) -> str:
        return check_name(name)

    @field_validator("formats")
    @classmethod
    def _are_some(cls, formats: tuple[Use[Exporter], ...]) -> tuple[Use[Exporter], ...]:
        if not formats or len({use.use for use in formats}) < len(formats):
            raise ValueError("name one layout or more, none of them twice")
        return formats


class Push(Step):
    """Lays the newest model out in its folder, and sends that; resumed, it sends what is left."""

    name = "push"
    Options = PushOptions
    needs_model = True

    def __init__(self, options: PushOptions) -> None:
        self.options = options

    def run(self, run: Run) -> Outcome:
        from llavakit_plugins.training.initial import start

        options = self.options
        model = start(run, options).eval()
        folder = run.directory / "upload"
        run.progress(0, 2, "writing")
        # laid out on disk first: if the network fails, a resumed run sends the same files again
        layouts = lay_out(model, [run.build(use) for use in options.formats], folder)
        story = read_story(run.directory)
        write_text(folder / "README.md", write_card(options.name, story, layouts, options.licence))
        run.progress(1, 2, "sending")
        message = f"{story.run.name if story.run else self.name}, by llava-run"
        address = send_folder(folder, options.name, private=options.private, message=message)
        run.progress(2, 2, "sent")
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = float(sum(file.stat().st_size for file in files))
        table = Table(title="On the hub", columns=["address"], rows=[[address]])
        return Outcome({"files": float(len(files)), "bytes": size}, [table])

    @classmethod
    def missing(cls, options: PushOptions) -> str | None:
        return missing_model(options) or missing_token()

    @classmethod
    def leaves(cls, options: PushOptions) -> Mapping[str, bool]:
        return {}

    @classmethod
    def plan(cls, options: PushOptions, planner: Planner) -> StepPlan | None:
        sketch_start(planner, options)
        if planner.has_model:
            for use in options.formats:
                planner.build(use).check(planner.model)
        return None
