"""Who loads a tokenizer of LLaMA's make has it read by words: several times as fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tests.core.stream.test_prompts import around, llama_like
from tests.plugins.families import their_model

from llavakit import Ids, Segment
from llavakit.stream.encode import tokenise
from llavakit_plugins.checkpoints.tokenizers import read_tokenizer
from llavakit_plugins.huggingface.tokenizers import find_tokenizer
from llavakit_plugins.huggingface.words import Words, by_words
from llavakit_plugins.language.causal_lm import CausalLM
from llavakit_plugins.language.vicuna import Vicuna
from llavakit_plugins.onnx.runtime.folder import Folder
from llavakit_plugins.onnx.runtime.text import TextTokenizer

SEGMENTS = (Segment("ab cd\n"), Segment("<image> ab. "), Segment("</s>", True, markup=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a small Llama, its tokenizer, and what an exported folder says."""
    their_model("llama").save_pretrained(tmp_path)
    llama_like(post=around("<s> $A")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return what `Words.read` was asked since: whether it read each stretch itself."""
    calls: list[bool] = []
    whole = Words.read

    def counted(self: Words, parts: Any, into: Ids) -> bool:
        found = whole(self, parts, into)
        calls.append(found)
        return found

    monkeypatch.setattr(Words, "read", counted)
    return calls


def language(component: Any) -> Callable[[Path], Any]:
    return lambda folder: component.create(component.Options(source=str(folder))).tokenizer


@pytest.mark.parametrize(
    "load",
    [
        language(Vicuna),
        language(CausalLM),
        lambda folder: find_tokenizer(str(folder)),
        lambda folder: find_tokenizer(str(folder / "tokenizer.json")),
        lambda folder: read_tokenizer(folder, "llama"),
        lambda folder: TextTokenizer.of(Folder(folder, cast(Any, None))),
    ],
    ids=["vicuna", "causal-lm", "check-data", "check-data, a file", "checkpoint", "ONNX client"],
)
def test_whoever_loads_a_tokenizer_has_it_read_by_words(
    load: Callable[[Path], Any], folder: Path, read: list[bool]
) -> None:
    ids, supervised = tokenise(SEGMENTS, load(folder))
    assert read == [True, True]  # the text in front of the image, and that behind it
    expected_ids, expected = tokenise(SEGMENTS, llama_like(post=around("<s> $A")))
    assert read == [True, True]  # nobody asked for it there
    assert ids.tolist() == expected_ids.tolist()
    assert supervised.tolist() == expected.tolist()


def test_a_lone_tokenizer_json_is_read_by_words(folder: Path, read: list[bool]) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenise(SEGMENTS, find_tokenizer(str(folder / "tokenizer.json")))
    assert read == [True, True]


def test_tokens_that_are_added_later_count(read: list[bool]) -> None:
    tokenizer: Any = by_words(llama_like())
    before, _ = tokenise([Segment("ab<x>", markup=True)], tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    after, _ = tokenise([Segment("ab<x>", markup=True)], tokenizer)
    assert read == [True, True]
    assert after.tolist() == [before[0], len(tokenizer) - 1] != before.tolist()


def test_a_tokenizer_that_must_see_the_whole_text_is_read_as_it_is(read: list[bool]) -> None:
    reaching = llama_like(extra="d▁d")  # a piece that reaches into the next word
    tokenise(SEGMENTS, by_words(reaching))
    assert read == []
