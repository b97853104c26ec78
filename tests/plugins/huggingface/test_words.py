"""Who loads a tokenizer of LLaMA's or GPT-2's make has it read by words: several times as fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings, strategies as st
from tests.core.stream.test_prompts import around, llama_like, read_alike
from tests.plugins.families import their_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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


def gpt2_like(*, trim: bool = True, **cutter: Any) -> Any:
    """Return a byte-level tokenizer whose tokens are whole words and parts of them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **cutter})
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = cast(Any, processors.ByteLevel(trim_offsets=trim))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["ab cd's 12 we'll\n\n  ab é 34.. cd\t\t12 </s"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


TEXTS = st.lists(
    st.sampled_from(
        [*"abcds12'.\n\t\v\x1c\x85é中😀", " ", " ", "  ", "'ll", "'s", "ab", "</s>", "</s", "Ġ"]
    ),
    max_size=8,
).map("".join)
MADE = [(trim, gpt2_like(trim=trim), by_words(gpt2_like(trim=trim))) for trim in (False, True)]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.tuples(TEXTS, st.booleans(), st.sampled_from([False] * 4 + [True]))),
    made=st.sampled_from(MADE),
)
def test_gpt2s_words_are_the_same_one_by_one(
    parts: list[tuple[str, bool, bool]], made: tuple[bool, Any, Any]
) -> None:
    _, whole, words = made
    read_alike(parts, words, whole)


def test_gpt2s_words_are_read_one_by_one_in_ascii_alone(read: list[bool]) -> None:
    answer = Segment(" the ab.", supervised=True)
    for question in ("cd's?\n 12", "é"):
        tokenise([Segment(question), answer, Segment("</s>", markup=True)], by_words(gpt2_like()))
    assert read == [True, False]


@pytest.mark.parametrize("cutter", [{"add_prefix_space": True}, {"use_regex": False}])
def test_a_byte_level_tokenizer_with_other_words_is_read_as_it_is(
    cutter: dict[str, bool], read: list[bool]
) -> None:
    tokenise(SEGMENTS, by_words(gpt2_like(**cutter)))
    assert read == []


def test_a_tokenizer_that_must_see_the_whole_text_is_read_as_it_is(read: list[bool]) -> None:
    reaching = llama_like(extra="d▁d")  # a piece that reaches into the next word
    tokenise(SEGMENTS, by_words(reaching))
    assert read == []
