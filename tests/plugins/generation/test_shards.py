"""Shares of a job: disjoint, complete, joined without asking; and memory that does not grow."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.plugins.chat_server import Service, serve, teach
from tests.plugins.generation.test_generation import (
    contexts,
    made,
    rows_of,
    write_recipe,
)
from tests.plugins.generation.test_own_generators import ASKING, Job

from llavakit import ImageContext, Message, Reply, Turn
from llavakit.cli import main
from llavakit_plugins.generation.contexts import Contexts, read_contexts
from llavakit_plugins.generation.items import Items
from llavakit_plugins.generation.options import GenerateOptions
from llavakit_plugins.generation.output import write_output
from llavakit_plugins.generation.requests.ledger import Ledger, Request, record_of
from llavakit_plugins.generation.requests.prompted import Verdict
from llavakit_plugins.generation.review import Review
from llavakit_plugins.generation.sources import open_sources


@pytest.fixture
def service() -> Iterator[Service]:
    with serve(Service(otherwise=teach)) as running:
        yield running


def run(recipe: Path, out: Path, *settings: str) -> int:
    sets = [word for setting in settings for word in ("--set", f"steps.generate.{setting}")]
    return main([str(recipe), "--out", str(out), *sets])


def joining(folder: Path, count: int) -> str:
    return "join=" + json.dumps([str(folder / f"{n}" / "01-generate") for n in range(1, count + 1)])


@pytest.mark.parametrize("total", [*range(12), 10**7])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_shares_are_neighbours_without_a_gap(total: int, count: int) -> None:
    chosen = [
        GenerateOptions.model_construct(shard=f"{number}/{count}").share(total)
        for number in range(1, count + 1)
    ]
    assert (chosen[0].start, chosen[-1].stop) == (0, total)
    assert all(first.stop == second.start for first, second in pairwise(chosen))
    assert max(map(len, chosen)) - min(map(len, chosen)) <= 1


@pytest.mark.parametrize("more", ["", "counts = { detail = 5, reasoning = 3 }\n"])
def test_shares_are_joined_to_what_one_run_makes(
    service: Service, tmp_path: Path, more: str
) -> None:
    recipe = write_recipe(tmp_path, service, 11, more)
    assert run(recipe, tmp_path / "whole") == 0
    whole, asked = made(tmp_path / "whole"), len(service.asked)
    for number in (3, 1, 2):
        assert run(recipe, tmp_path / str(number), f'shard="{number}/3"') == 0
    assert len(service.asked) == 2 * asked  # together as much as one run, and nothing twice
    parts = [tmp_path / str(number) / "01-generate" for number in (1, 2, 3)]
    for name, data in whole.items():  # put behind one another they are the whole, too
        rows = [row for part in parts for row in json.loads((part / name).read_bytes())]
        assert rows == json.loads(data)
    ids = [row["id"] for part in parts for row in rows_of(part / "provenance.jsonl")]
    assert ids == [
        row["id"] for row in rows_of(tmp_path / "whole" / "01-generate" / "provenance.jsonl")
    ]
    assert run(recipe, tmp_path / "joined", joining(tmp_path, 3)) == 0
    assert len(service.asked) == 2 * asked
    assert made(tmp_path / "joined") == whole


def test_an_answer_given_in_two_shares_is_told_when_they_are_joined(
    service: Service, tmp_path: Path
) -> None:
    service.otherwise = lambda h, b: h.answer("It is red, and it stands beside a road by itself.")
    recipe = write_recipe(tmp_path, service, 2, 'kinds = ["detail"]\nattempts = 1\n')
    for number in (1, 2):
        assert run(recipe, tmp_path / str(number), f'shard="{number}/2"') == 0
    assert run(recipe, tmp_path / "joined", joining(tmp_path, 2)) == 0
    step = tmp_path / "joined" / "01-generate"
    assert len(json.loads((step / "instruct.json").read_text())) == 1
    assert [row["notes"] for row in rows_of(step / "rejected.jsonl")] == [
        ["the same as the reply on another image"]
    ]


def test_generators_of_others_have_shares_too(service: Service, tmp_path: Path) -> None:
    job = Job(tmp_path, service, ASKING[0])
    for number in (1, 2):
        job.out = tmp_path / str(number)
        job.run(f'steps.generate.shard="{number}/2"')
    asked = len(service.asked)
    job.out = tmp_path / "joined"
    job.step = job.out / "01-generate"
    job.run(f"steps.generate.{joining(tmp_path, 2)}")
    assert len(service.asked) == asked == 20
    assert job.ids() == [f"{n:04}-{kind}" for n in range(5) for kind in ("detail", "reasoning")]


def test_the_teacher_without_a_network_has_shares_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[[steps]]\nuse = "generate"\ncontexts = "{contexts(tmp_path, 7)}"\n'
        'generator = { use = "offline" }\ncounts = { detail = 4 }\n'
    )
    assert run(recipe, tmp_path / "whole") == 0
    for number in (1, 2):
        assert run(recipe, tmp_path / str(number), f'shard="{number}/2"') == 0
    for name, data in made(tmp_path / "whole").items():
        parts = [made(tmp_path / str(number))[name] for number in (1, 2)]
        assert [row for part in parts for row in json.loads(part)] == json.loads(data)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('shard="4/3"', "there is no share 4 of 3"),
        ('shard="0/3"', "shard"),
        ('shard="1"', "shard"),
        ('join=["FOLDER"]', "FOLDER holds no ledger"),
        ('join=["FOLDER/no"]', "no"),
    ],
)
def test_what_is_no_share_is_refused(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    (tmp_path / "none").mkdir()
    setting = setting.replace("FOLDER", str(tmp_path / "none"))
    assert run(write_recipe(tmp_path, service, 2), tmp_path / "run", setting) == 2
    assert said.replace("FOLDER", str(tmp_path / "none")) in capsys.readouterr().err
    assert not service.asked


# -- memory ----------------------------------------------------------------------------------------


class Teacher:
    """In two halves, and as quick as can be."""

    name = "quick"
    chat = SimpleNamespace(identity="a model")

    def messages(self, context: ImageContext, kind: str) -> tuple[Message, ...]:
        return (Message("user", f"{context.id} {kind}"),)

    def read(self, context: ImageContext, kind: str, reply: Any) -> Verdict:
        turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", f"{context.id} {reply.text}"))
        return Verdict("accepted", turns)


def test_memory_does_not_grow_with_the_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that the contexts are passed through: looked at, judged, and their captions."""
    count, early = 3000, 1500  # by then the caches, which hold a thousand texts, are full
    growth: list[int] = []
    for attempt in range(3):  # threads that other tests left may allocate, too: rarely each time
        folder = tmp_path / str(attempt)
        folder.mkdir()
        growth.append(_growth(folder, count, early, monkeypatch))
        if growth[-1] < 20 * (count - early):
            return
    pytest.fail(f"{growth} bytes more")  # a text in a set would take 80 bytes


def _growth(folder: Path, count: int, early: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return by how much memory grows from the early context to the last, at the most."""
    options = GenerateOptions.model_construct(
        contexts=contexts(folder, count), kinds=("detail",), images=None, join=()
    )
    read = Contexts.__getitem__
    held: list[int] = []

    def measured(self: Contexts, index: Any) -> Any:
        if index in (early, count - 1):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        return read(self, index)

    teacher: Any = Teacher()
    nothing: Any = SimpleNamespace(directory=folder, seed=0, progress=lambda *_: None)
    asked = (Request((Message("user", f"{number:04} detail"),)) for number in range(count))
    with monkeypatch.context() as patched, Ledger(folder / "ledger.sqlite") as ledger:
        patched.setattr(Contexts, "__getitem__", measured)
        ledger.append(*(record_of("a model", each).entry(Reply("A thing.")) for each in asked))
        tracemalloc.start()
        with open_sources(options, folder) as sources:
            items = Items(sources[""], ("detail",), {}, teacher, 1, 0)
            jobs = [("", sources[""], items)]
            outcome = write_output(jobs, ledger, {}, Review(None, 0), nothing)
        tracemalloc.stop()
    assert outcome.metrics["samples"] == count
    assert len(held) == 6
    return max(held[n + 1] - held[n] for n in (0, 2, 4))


def test_contexts_are_found_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit_plugins.generation.contexts._INDEXED", 4)
    path = contexts(tmp_path, 23)
    lines = path.read_text().splitlines()
    path.write_text(
        "\ufeff\n" + "\n\n \n".join(lines) + "\n\n"
    )  # a mark of byte order; empty lines
    found = Contexts(path)
    assert [each.id for each in found] == [f"{n:04}" for n in range(23)]
    for index in (22, 0, 3, 4, 4, 5, 7, 8, 21, 2, -1, 12, 11, 13):
        assert found[index].id == f"{index % 23:04}"
    assert [each.id for each in found[3:9:2]] == ["0003", "0005", "0007"]
    with pytest.raises(IndexError):
        found[23]
    found.close()
    lines[17] = '{"id": 1}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Exception, match=r"contexts\.jsonl:18: a context needs"):
        list(read_contexts(path))
