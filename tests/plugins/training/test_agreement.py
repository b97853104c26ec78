"""What one process of a run cannot do, all of them say; none waits for one that has ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.plugins.training.ranks import Rank, in_ranks

from llavakit import DataError, Dataset, LlavaError, LlavaModel, Sample, Turn, Use
from llavakit.contracts.run import ProcessGroup, Run
from llavakit_plugins.training.agreement import in_each
from llavakit_plugins.training.corpus import Corpus
from llavakit_plugins.training.measure import Measure, entry_of
from llavakit_plugins.training.objectives import Dpo, DpoOptions
from llavakit_plugins.training.tokenised import corpus_of


class Said(Dataset):
    name = "said"

    def __init__(self) -> None:
        self.holds = lambda: None  # what cannot be sent to another process

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), (Turn("human", "what ?"), Turn("gpt", "red .")))


def run_in(folder: Path, group: ProcessGroup, build: Any) -> Run:
    return Run(
        folder, {}, build, 0, False, lambda: torch.device("cpu"), None,  # type: ignore[arg-type]
        lambda done, total, note="": None, lambda *_, **__: None, lambda: False, group,
    )  # fmt: skip


def agree(errors: list[Any], sentence: str) -> None:
    assert [type(error) for error in errors].count(DataError) == 1
    assert all(isinstance(error, LlavaError) for error in errors)
    assert [str(error) for error in errors] == [sentence] * len(errors)


def test_all_raise_the_error_of_the_first_that_has_one() -> None:
    def program(rank: Rank) -> int:
        def make() -> int:
            if rank.rank in (1, 3):
                raise DataError(f"no room in {rank.rank} ☃")
            return rank.rank

        return in_each(rank, make)

    errors = in_ranks(4, program)
    assert [str(error) for error in errors] == ["no room in 1 ☃"] * 4
    assert in_ranks(1, program) == [0]


def test_a_data_set_that_one_process_cannot_build(model: LlavaModel, tmp_path: Path) -> None:
    def program(rank: Rank) -> object:
        def build(use: Use[Dataset]) -> Dataset:
            if rank.rank == 1:
                raise DataError("rows.json is not on this machine")
            return Said()

        run = run_in(tmp_path / "step", rank, build)
        use = Use[Dataset].model_validate({"use": "said"})
        return corpus_of(run, use, model, model.template, 64)

    agree(in_ranks(2, program), "rows.json is not on this machine")


def test_images_that_one_process_cannot_read_for_the_reference(
    model: LlavaModel, tmp_path: Path
) -> None:
    corpus = Corpus(Said(), model, model.template, 64)

    def program(rank: Rank) -> None:
        def load(micros: Any) -> Any:
            for samples in micros:
                if rank.rank == 1:
                    raise DataError("a.png is cut short")
                yield corpus.pack(samples), None

        measure = Measure(model, entry_of(model, sharded=False), Dpo(DpoOptions()), corpus)
        run, features = run_in(tmp_path, rank, None), SimpleNamespace(load=load)
        with torch.no_grad():
            measure.refer(run, features, "reference", 64, None, lambda: None)

    agree(in_ranks(2, program), "a.png is cut short")
