"""Data of generators that need no service: what is kept of it, and that nothing is made twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from tests.plugins.generation.test_generation import contexts, made

from llavakit import ImageContext, Turn
from llavakit.cli import main
from llavakit_plugins.generation import conversations
from llavakit_plugins.generation.contexts import read_contexts
from llavakit_plugins.generation.rows import BRIEF, caption_row, pick, row_of
from llavakit_plugins.generators.offline import Offline, OfflineOptions

KINDS = ("conversation", "detail", "reasoning")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[[steps]]\nuse = "generate"\ncontexts = "{contexts(tmp_path, 9)}"\n'
        'generator = { use = "offline" }\n'
    )
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The conversations that were made, by their names."""
    found: list[str] = []
    generate = Offline.generate

    def noted(self: Offline, context: ImageContext, kind: str) -> Sequence[Turn]:
        found.append(f"{context.id}-{kind}")
        return generate(self, context, kind)

    monkeypatch.setattr(Offline, "generate", noted)
    return found


def run(recipe: Path, out: Path, *settings: str) -> int:
    sets = [word for setting in settings for word in ("--set", f"steps.generate.{setting}")]
    return main([str(recipe), "--out", str(out), "--resume", *sets])


def test_one_of_several_is_the_one_that_numpys_choice_picks() -> None:
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    for count in (1, 2, 3, 4, 5, 7, 64, 1000):
        items = [str(number) for number in range(count)]
        assert [pick(ours, items) for _ in range(40)] == theirs.choice(items, 40).tolist()
        assert ours.bit_generator.state == theirs.bit_generator.state


def test_files_hold_what_the_generator_makes_of_each_context_alone(
    recipe: Path, tmp_path: Path
) -> None:
    assert run(recipe, tmp_path / "out") == 0
    draw, given = np.random.default_rng(0), list(read_contexts(contexts(tmp_path, 9)))
    expected = {"captions.json": [caption_row(context, draw, BRIEF) for context in given]}
    for kind in KINDS:  # by a generator of its own: what one knows of a context changes no other
        expected[f"{kind}.json"] = [
            row_of(context, kind, Offline(OfflineOptions()).generate(context, kind))
            for context in given
        ]
    expected["instruct.json"] = [
        row for rows in zip(*(expected[f"{kind}.json"] for kind in KINDS), strict=True)
        for row in rows
    ]  # fmt: skip
    found = made(tmp_path / "out")
    assert {name: json.loads(data) for name, data in found.items()} == expected
    for name, data in found.items():
        rows = ",\n ".join(json.dumps(row, ensure_ascii=False) for row in expected[name])
        assert data.decode() == f"[\n {rows}\n]\n"


def test_a_job_that_is_soon_done_leaves_no_ledger_and_a_share_leaves_one(
    recipe: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "_MOST_SHARED", 4)
    monkeypatch.setattr(conversations, "_WRITE_EVERY", 1e9)
    assert run(recipe, tmp_path / "whole") == 0
    assert len(asked) == len(set(asked)) == 27
    assert not (tmp_path / "whole" / "01-generate" / "conversations.sqlite").exists()
    for number in (1, 2):
        assert run(recipe, tmp_path / str(number), f'shard="{number}/2"') == 0
    asked.clear()
    parts = [str(tmp_path / str(number) / "01-generate") for number in (1, 2)]
    assert run(recipe, tmp_path / "joined", f"join={json.dumps(parts)}") == 0
    assert len(asked) <= 2 * 3, "but for those that a share's ledger lacks, three at most"
    assert made(tmp_path / "joined") == made(tmp_path / "whole")


def test_a_kill_loses_no_more_than_what_was_not_written_yet(
    recipe: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "_WRITE_EVERY", 0.0)

    def killed() -> None:
        generate = Offline.generate

        def some(self: Offline, context: ImageContext, kind: str) -> Sequence[Turn]:
            if len(asked) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return generate(self, context, kind)

        monkeypatch.setattr(Offline, "generate", some)
        run(recipe, tmp_path / "out")

    process = get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run(recipe, tmp_path / "out") == 0
    assert len(asked) == 27 - 10
    assert run(recipe, tmp_path / "whole") == 0
    assert made(tmp_path / "out") == made(tmp_path / "whole")
