"""Each fault that authors made in components without weights is caught, in a sentence of use."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tests.core.contracts import test_contracts as good
from tests.core.contracts.faulty import caught, run_check

import llavakit.testing
from llavakit import (
    LlavaModel,
    Message,
    Outcome,
    PromptTemplate,
    Question,
    Run,
    Sample,
    Score,
    Segment,
    Step,
    Stopped,
    Tracker,
    Turn,
)
from llavakit.contracts.data import ImageContext
from llavakit.model.folder import save_model
from llavakit_plugins.datasets.conversations import Conversations


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("faults")
    for number in range(6):
        llavakit.testing.make_picture(number).save(folder / f"{number}.png")
    (folder / "rows.json").write_text(json.dumps(good.ROWS))
    good.Place.folder = folder


# -- data sets -------------------------------------------------------------------------------------


class OtherRow(Conversations):
    def __getitem__(self, index: int) -> Sample:
        images = super().__getitem__((index + 1) % len(self)).images
        return replace(super().__getitem__(index), images=images)


class Augmented(Conversations):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pixels = np.asarray(Image.open(sample.images[0])).copy()  # type: ignore[arg-type]
        pixels[0, 0] = [random.randrange(256) for _ in range(3)]
        return replace(sample, images=(Image.fromarray(pixels),))


class Recurring(Conversations):
    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), id=f"s{index // 2}")


class LastLost(Conversations):
    def __len__(self) -> int:
        return super().__len__() - 1

    def __getitem__(self, index: int) -> Sample:
        if index >= len(self):
            raise IndexError(index)
        return super().__getitem__(index)


class Locked(Conversations):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.lock = threading.Lock()


# -- templates -------------------------------------------------------------------------------------


@dataclass
class Prompt(PromptTemplate):
    """`Q: question A: answer</s>`, with what each case gets wrong."""

    name = "prompt"
    fault: str = ""
    system: str = ""

    def with_system(self, system: str) -> Prompt:
        if self.fault == "changes":
            self.system = system
            return self
        return Prompt(self.fault, "" if self.fault == "loses" else system)

    def segments(self, turns: Sequence[Turn], tokenizer: Any) -> list[Segment]:
        Sample("x", tuple(turns), (Path(),) * sum(t.text.count("<image>") for t in turns)).check()
        segments = [Segment("<s>", markup=True)] if self.fault == "bos" else []
        segments.append(Segment(self.system, self.fault == "learns", self.fault == "marks"))
        for number, turn in enumerate(turns):
            if self.fault == "later" and number > 1 and turn.role == "human":
                continue
            if turn.role == "human":
                early = self.fault == "early"
                segments += [Segment("Q: ", markup=True), Segment(turn.text)]
                segments.append(Segment(" A" if early else " A:", markup=True))
                segments += [Segment(":", True, markup=True)] if early else []
            else:
                cut = turn.text[:-1] if self.fault == "cut" else turn.text
                segments += [Segment(f" {cut}", True), Segment("</s>", True, markup=True)]
        return segments


# -- benchmarks ------------------------------------------------------------------------------------


class Quiz(good.Quiz):
    """Two questions of different truths, with what each case gets wrong."""

    fault = ""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault, self.right, self.asked = fault, 0, 0

    def questions(self) -> Sequence[Question]:
        return [Question("a", "what ?", truth="red"), Question("b", "what ?", truth="blue")]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Score:
        right = [answer == q.truth for q, answer in zip(questions, answers, strict=True)]
        if self.fault == "position":
            truths = [q.truth for q in self.questions()]
            right = [answer == truths[n] for n, answer in enumerate(answers)]
        if self.fault == "guess":
            right = [
                r or (a not in ("red", "blue") and bool(a) and random.random() < 0.5)
                for r, a in zip(right, answers, strict=True)
            ]
        self.right, self.asked = self.right + sum(right), self.asked + len(right)
        if self.fault == "sum":
            return Score({"accuracy": self.right / self.asked}, right)
        return Score({"accuracy": sum(right) / len(right)}, right)


# -- chat models and generators --------------------------------------------------------------------


class Chat(good.Echo):
    fault: ClassVar[str] = ""
    heard = ""

    def complete(self, messages: Sequence[Message]) -> str:
        kept = [m for m in messages if m.role != "system" or self.fault != "system"]
        self.heard = str(kept[-1:] if self.fault == "last" else kept)
        return "It is."


class NoSystem(Chat):
    fault = "system"


class LastOnly(Chat):
    fault = "last"


class Spoken(good.Echo):
    """Gives its error as a reply."""

    def complete(self, messages: Sequence[Message]) -> str:
        return "Error: 401 Unauthorized"


class Raw(good.Echo):
    def complete(self, messages: Sequence[Message]) -> str:
        raise ConnectionError("refused")


def sent(_: object, model: Any) -> Any:
    return model.heard


@dataclass
class Teacher(good.Teacher):
    """Says the caption, or the same of every image."""

    turns: tuple[Turn, ...] = ()
    same: bool = False

    def generate(self, context: ImageContext, kind: Any) -> Sequence[Turn]:
        answer = "a bus" if self.same else context.captions[0]
        return [Turn("human", "<image>\nwhat is it ?"), Turn("gpt", answer)]


# -- exporters -------------------------------------------------------------------------------------


class Whole(good.Boxed):
    """Never looks at `dtype`."""

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> Any:
        return super().load(folder, device=device, dtype=None)


# -- trackers --------------------------------------------------------------------------------------


class Lines(Tracker):
    """Appends events to a file, with what each case gets wrong."""

    name = "lines"

    def __init__(self, fault: str = "") -> None:
        self.fault, self.kept = fault, list[Mapping[str, Any]]()

    def begin(self, directory: Path) -> None:
        self.file = directory / "lines.txt"
        if self.fault == "overwrites":
            self.file.write_text("")

    def record(self, event: Mapping[str, Any]) -> None:
        if self.fault == "blocks":
            threading.Event().wait(60)
        if self.fault == "keeps":
            self.kept.append(event)
            return
        with self.file.open("a") as file:
            file.write(f"{dict(event)}\n")

    def close(self) -> None:
        if self.fault == "keeps":
            self.file.write_text(str(self.kept))
        if self.fault == "changes" and self.kept:
            self.kept[0]["closed"] = True  # type: ignore[index]


class Later(Lines):
    """Keeps the event, and adds to it when it is closed."""

    def record(self, event: Mapping[str, Any]) -> None:
        self.kept.append(event)


def read_lines(_: object, tracker: Lines, folder: Path) -> str:
    return tracker.file.read_text()


# -- steps -----------------------------------------------------------------------------------------


@dataclass
class Count(Step):
    """Adds numbers to a weight, saves as it goes, and leaves a model."""

    name = "count"
    fault: str = ""

    @classmethod
    def leaves(cls, options: Any) -> Mapping[str, bool]:
        return {"model": True}

    def run(self, run: Run) -> Outcome:
        state, begun, total = run.directory / "state.json", 0, 0.0
        if run.resume and state.is_file():
            begun, total = json.loads(state.read_text())
            if self.fault == "stale":
                begun = max(begun - 1, 0)
        draws = np.random.default_rng(run.seed).random(4)
        for at in range(begun, 4):
            if self.fault != "deaf" and run.stopping():
                if self.fault != "lost":
                    state.write_text(json.dumps([at, total]))
                raise Stopped
            total += float(draws[at])
            if self.fault == "lost":
                state.write_text(json.dumps([at, total]))
        if self.fault == "elsewhere":
            Path("result.json").write_text("1")
        if self.fault != "no model":
            model = run.model()
            with torch.no_grad():
                next(model.connector.parameters()).fill_(total)
            save_model(model, run.directory / "model")
        return Outcome({"total": 1.0 if self.fault == "weights" else total})


class StepContract(llavakit.testing.StepContract):
    def model(self) -> LlavaModel:
        return good.small_model()


def data(component: type[Conversations]) -> Any:
    return lambda: good.conversations(component)


ECHO = {"sent": sent}
LINES = {"recorded": read_lines, "patience": 1.0}
FAULTS: list[tuple[type[Any], Any, str, str, dict[str, Any]]] = [
    (good.TestConversations, data(OtherRow), "samples_of_its_data", "other pixels", {}),
    (good.TestConversations, data(Augmented), "every_index", "augment nothing at random", {}),
    (good.TestConversations, data(Augmented), "every_build", "augment nothing at random", {}),
    (good.TestConversations, data(Recurring), "ids_are_unique", "['s0', 's1', 's2'] recur", {}),
    (good.TestConversations, data(LastLost), "samples_of_its_data", "5 samples, not 6", {}),
    (good.TestConversations, data(Locked), "another_process_has", "no open file", {}),
    (good.TestVicunaV1, lambda: Prompt("early"), "loss_begins", "learned is ': To the left.", {}),
    (good.TestVicunaV1, lambda: Prompt("cut"), "the_answer_is_learned", "all of it", {}),
    (good.TestVicunaV1, lambda: Prompt("later"), "every_turn", "without ['And then?']", {}),
    (good.TestVicunaV1, lambda: Prompt("bos"), "begins_once", "`adds_bos = False`", {}),
    (good.TestVicunaV1, lambda: Prompt("changes"), "system_text", "return another template", {}),
    (good.TestVicunaV1, lambda: Prompt("loses"), "system_text", "in front of its question", {}),
    (good.TestVicunaV1, lambda: Prompt("learns"), "system_text", "neither markup nor learned", {}),
    (good.TestVicunaV1, lambda: Prompt("marks"), "system_text", "a segment of its own", {}),
    (good.TestExactMatch, lambda: Quiz("position"), "by_its_position", "not by position", {}),
    (good.TestExactMatch, lambda: Quiz("sum"), "scoring_twice", "keep nothing on `self`", {}),
    (good.TestExactMatch, lambda: Quiz("guess"), "unreadable", "count what cannot be read", {}),
    (good.TestEcho, NoSystem, "every_message", "the system's too", ECHO),
    (good.TestEcho, LastOnly, "every_message", "hand on all of `messages`", ECHO),
    (good.TestEcho, Chat, "never_a_reply", "as a reply it would", {"failing": lambda _: Spoken()}),
    (good.TestEcho, Chat, "never_a_reply", "ConnectionError", {"failing": lambda _: Raw()}),
    (good.TestOffline, lambda: Teacher(same=True), "another_context", "use the captions", {}),
    (good.TestBoxed, Whole, "precision", "hand `dtype` on", {}),
    (good.TestMemory, lambda: Lines("blocks"), "holds_the_run_up", "hand events to a", LINES),
    (good.TestMemory, lambda: Lines("overwrites"), "resumed_run", "append (open with 'a'", LINES),
    (good.TestMemory, lambda: Lines("keeps"), "when_it_came", "copy it", LINES),
    (good.TestMemory, lambda: Later("changes"), "changes_none", "copy it first", LINES),
    (StepContract, lambda: Count("deaf"), "can_be_stopped", "never looks at `run.stopping`", {}),
    (StepContract, lambda: Count("elsewhere"), "own_folder", "working directory", {}),
    (StepContract, lambda: Count("no model"), "leaves_the_models", "holds nothing", {}),
    (StepContract, lambda: Count("stale"), "stopped_and_resumed", "from the newest", {}),
    (StepContract, lambda: Count("lost"), "stopped_and_resumed", "from the newest", {}),
]
GOOD: list[tuple[type[Any], Any, dict[str, Any]]] = [
    (good.TestConversations, data(Conversations), {}),
    (good.TestVicunaV1, Prompt, {}),
    (good.TestExactMatch, Quiz, {}),
    (good.TestEcho, Chat, ECHO),
    (good.TestOffline, Teacher, {}),
    (good.TestBoxed, good.Boxed, {}),
    (good.TestMemory, Lines, LINES),
    (StepContract, Count, {}),
]


@pytest.mark.parametrize(("contract", "build", "test", "said", "more"), FAULTS)
def test_a_planted_fault_is_caught(
    contract: type[Any], build: Any, test: str, said: str, more: dict[str, Any], tmp_path: Path
) -> None:
    caught(contract, build, test, tmp_path / "x", said, **more)


@pytest.mark.parametrize(("contract", "build", "more"), GOOD)
def test_the_same_component_without_a_fault_keeps_its_contract(
    contract: type[Any], build: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    """Else a contract that refuses everything would pass the test above."""
    tests = {row[2] for row in FAULTS if row[0] is contract}
    assert tests
    for number, test in enumerate(sorted(tests)):
        run_check(contract, build, test, tmp_path / str(number), **more)


def test_a_contract_that_is_not_told_what_to_compare_with_fails() -> None:
    class Untold(llavakit.testing.DatasetContract):
        def build(self) -> Any:
            return good.conversations(Conversations)

    with pytest.raises(AssertionError, match="Untold has no `expected`; return the samples"):
        Untold().test_it_has_the_samples_of_its_data()


def test_build_may_write_files_and_state_its_options() -> None:
    class Written(llavakit.testing.DatasetContract):
        def build(self) -> Any:
            path = self.tmp_path / "rows.json"
            path.write_text(json.dumps(TEXT_ONLY))
            self.options = {"path": path}
            return Conversations(Conversations.Options(**self.options))

    contract = Written()
    contract.test_options_are_frozen_and_refuse_unknown_keys()
    contract.test_a_plan_expects_what_is_there()
    assert contract.tmp_path == contract.tmp_path
    assert Written().tmp_path != contract.tmp_path


TEXT_ONLY = [
    {
        "id": "t",
        "conversations": [{"from": "human", "value": "why ?"}, {"from": "gpt", "value": "so ."}],
    }
]
