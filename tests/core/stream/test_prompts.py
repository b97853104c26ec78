"""Ids and masks with small tokenizers of every make; LLaMA's own is in tests/templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llavakit import DataError, ModelError, PromptTemplate, Sample, Segment, Turn
from llavakit.stream.encode import IMAGE_ID, encode, tokenise
from llavakit_plugins.huggingface.words import by_words

LETTERS = ["▁", *"abcd.#</s>:é", "ab", "▁a", "▁ab", "▁▁", "cd", "</", "▁<"]
MERGES = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "▁"), ("c", "d"), ("<", "/"), ("▁", "<")]
SPECIAL = ["<unk>", "<s>", "</s>"]


def llama_like(scheme: Any = "first", post: Any = None, extra: str = "") -> PreTrainedTokenizerBase:
    """Return a small tokenizer of LLaMA's make: BPE over ▁ and bytes."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    pieces = dict.fromkeys([*SPECIAL, *bytes_, *LETTERS, *extra.split()])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if post is not None:
        backend.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def around(single: str) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])


def shown(tokenizer: PreTrainedTokenizerBase, *segments: Segment, begin: bool = True) -> str:
    """Return the tokens, learned ones in brackets."""
    ids, supervised = tokenise(segments, tokenizer, begin=begin)
    tokens = [
        "<image>" if number == IMAGE_ID else str(tokenizer.convert_ids_to_tokens(number))
        for number in ids.tolist()
    ]
    return " ".join(f"[{t}]" if flag else t for t, flag in zip(tokens, supervised, strict=True))


@pytest.mark.parametrize(
    ("post", "begins"),
    [(None, ""), ("<s> $A", "<s> "), ("<s> $A </s>", "<s> "), ("$A </s>", "")],
)
def test_only_the_beginning_is_taken_of_what_a_tokenizer_adds(
    post: str | None, begins: str
) -> None:
    tokenizer = llama_like(post=None if post is None else around(post))
    segments = (Segment("ab"), Segment(" c", supervised=True), Segment("</s>", True, markup=True))
    assert shown(tokenizer, *segments) == f"{begins}▁ab [▁] [c] [</s>]"
    assert shown(tokenizer, *segments, begin=False) == "▁ab [▁] [c] [</s>]"
    image = (Segment("<image>"), Segment("c", supervised=True))
    assert shown(tokenizer, *image) == f"{begins}<image> [▁] [c]"


def test_text_between_images_is_read_by_itself() -> None:
    tokenizer = llama_like("always")
    segments = (Segment("a <image>\nb<image><image>"), Segment("ab", supervised=True))
    assert shown(tokenizer, *segments) == "▁a ▁ <image> ▁ <0x0A> b <image> <image> [▁ab]"


def test_tokens_that_reach_over_a_border_are_learned() -> None:
    tokenizer = llama_like()
    assert shown(tokenizer, Segment("ca"), Segment("b", supervised=True)) == "▁ c [ab]"
    assert shown(tokenizer, Segment("c", supervised=True), Segment("d")) == "[▁] [cd]"
    assert shown(tokenizer, Segment("c"), Segment("é😀", supervised=True), Segment("d")) == (
        "▁ c [é] [<0xF0>] [<0x9F>] [<0x98>] [<0x80>] d"
    )
    assert shown(tokenizer, Segment("c"), Segment("", supervised=True), Segment("d")) == "▁ cd"


def test_special_tokens_count_in_markup_only() -> None:
    for scheme, behind in (("first", ""), ("always", "▁ ")):
        tokenizer = llama_like(scheme)
        assert shown(tokenizer, Segment("c</s>d")) == "▁ c </ s > d"
        assert shown(tokenizer, Segment("c</s>d", markup=True)) == f"▁ c </s> {behind}d"
        both = (Segment("c</s>d"), Segment("</s>c", markup=True), Segment("<s>", supervised=True))
        assert shown(tokenizer, *both) == f"▁ c </ s > d </s> {behind}c [<] [s] [>]"


def test_image_text_in_an_answer_is_text() -> None:
    ids, _ = tokenise([Segment("<image>"), Segment("<image>", supervised=True)], llama_like())
    assert (ids == IMAGE_ID).sum() == 1


PARTS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([*"abcd.#é😀▁\n", " ", "  ", "中"]), max_size=6).map("".join),
        st.booleans(),
        st.booleans(),
    ),
    max_size=6,
)


def read_alike(
    parts: Sequence[tuple[str, bool, bool]], words: Any, whole: Any
) -> tuple[list[Segment], Any]:
    """Return segments of texts, supervised or not, with `</s>` behind them or not, and their ids,
    which both tokenizers must agree on."""
    segments = []
    for text, flag, special in parts:
        segments.append(Segment(text, flag))
        if special:
            segments.append(Segment("</s>", flag, markup=True))
    ids, supervised = tokenise(segments, words)
    expected_ids, expected_learned = tokenise(segments, whole)
    assert ids.tolist() == expected_ids.tolist()
    assert supervised.tolist() == expected_learned.tolist()
    return segments, ids


@settings(max_examples=100, deadline=None)
@given(parts=PARTS, scheme=st.sampled_from(["first", "always", "never"]))
def test_reading_by_words_changes_nothing(parts: list[tuple[str, bool, bool]], scheme: str) -> None:
    words, whole = by_words(llama_like(scheme)), llama_like(scheme)
    segments, ids = read_alike(parts, words, whole)
    text = "".join(segment.text for segment in segments)
    if scheme == "always":
        assert ids.tolist() == as_sentencepiece(words)(text)["input_ids"]
    elif not text.startswith((" ", "▁")):  # Metaspace puts no space in front of a space
        assert ids.tolist() == words(text, add_special_tokens=False)["input_ids"]


def as_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the space put in front by a normalizer, whatever begins there."""
    backend = Tokenizer.from_str(cast(Any, tokenizer).backend_tokenizer.to_str())
    backend.pre_tokenizer = cast(Any, None)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_text_that_begins_with_a_space_gets_another_as_by_sentencepiece() -> None:
    image, answer = Segment("<image>"), Segment(" ab", supervised=True)
    for scheme in ("first", "always"):
        assert shown(llama_like(scheme), image, Segment(" a")) == "<image> ▁ ▁a"
        assert shown(llama_like(scheme), image, answer) == "<image> [▁] [▁ab]"
        assert shown(llama_like(scheme), Segment(""), Segment(" "), answer) == "▁▁ [▁ab]"
    end = Segment("</s>", markup=True)
    assert shown(llama_like("first"), end, Segment(" a")) == "</s> ▁a"
    assert shown(llama_like("always"), end, Segment(" a")) == "</s> ▁ ▁a"
    assert shown(llama_like("always"), Segment("</s> a", markup=True)) == "</s> ▁ ▁a"
    assert shown(llama_like("never"), image, Segment(" a")) == "<image> ▁a"


def byte_level(*, trim: bool) -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, "Ġa", "ĊĊ", ".Ċ"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ċ", "Ċ"), (".", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = cast(Any, processors.ByteLevel(trim_offsets=trim))
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("trim", [False, True])
def test_spaces_left_out_of_offsets_are_learned(trim: bool) -> None:
    tokenizer = byte_level(trim=trim)
    end = Segment("</s>", supervised=True, markup=True)
    question = Segment("q:\n", markup=True)
    answer = Segment("\n a\n\n", supervised=True)
    assert shown(tokenizer, question, answer, end, Segment("\n", markup=True)) == (
        "q : [ĊĊ] [Ġa] [ĊĊ] [</s>] Ċ"
    )
    assert shown(tokenizer, Segment("q:"), Segment(" ", True), end) == "q : [Ġ] [</s>]"
    assert shown(tokenizer, Segment("q"), Segment("é", True), Segment("x")) == "q [Ã] [©] x"


def test_other_makes_of_tokenizer() -> None:
    pieces = [*SPECIAL, "▁a", "▁b", "b", "/", "s", ">", "<", "▁"]
    scores = [(piece, 0.0 if piece in SPECIAL else -1.0) for piece in pieces]
    unigram = Tokenizer(models.Unigram(scores, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    segments = (Segment("a b</s>"), Segment(" b", True), Segment("</s>", True, markup=True))
    assert shown(tokenizer, *segments) == "▁a ▁b < / s > [▁b] [</s>]"


class _Fixed(PromptTemplate):
    name = "fixed"

    def __init__(self, *segments: Segment) -> None:
        self._segments = segments

    def segments(self, turns: Any, tokenizer: Any) -> tuple[Segment, ...]:
        return self._segments


def test_what_is_wrong_names_the_sample() -> None:
    sample = Sample("s7", (Turn("human", "<image> a"),), (Path("a.jpg"),))
    with pytest.raises(DataError, match=r"sample `s7` has 1 images, .*`fixed` renders 0"):
        encode(sample, _Fixed(Segment("a")), llama_like())
    for tokenizer in (llama_like(), byte_level(trim=False)):
        with pytest.raises(DataError, match=r"sample `s7`: the text is no valid Unicode"):
            encode(sample, _Fixed(Segment("a <image> \ud83d")), tokenizer)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ModelError, match="fast tokenizer"):
        tokenise([Segment("a")], cast(PreTrainedTokenizerBase, _Slow()))


class _Slow:
    pass


def test_templates_may_begin_the_text_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llama_like(post=around("<s> $A"))
    sample = Sample("s1", (Turn("human", "a"),))
    template = _Fixed(Segment("<s>a", markup=True))
    assert encode(sample, template, tokenizer).ids.tolist()[:2] == [1, 1]
    monkeypatch.setattr(type(template), "adds_bos", False)
    assert encode(sample, template, tokenizer).ids.tolist()[0] == 1
    assert encode(sample, template, tokenizer).ids.tolist().count(1) == 1
