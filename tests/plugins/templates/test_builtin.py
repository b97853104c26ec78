"""The built-in templates: their text against published hashes, their ids against SentencePiece."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import ValidationError
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from llavakit import DataError, ModelError, PromptTemplate, Registry, Sample, Segment, Turn
from llavakit.contracts.data import IMAGE, Role
from llavakit.stream.encode import IMAGE_ID, Encoded, encode, tokenise

# name, length and hash of the rendered probe; length and hash of the system text
PROBES = [
    ("default", 1704, "ae7747f153a9", 156, "ace78a978005"),
    ("v0", 1704, "ae7747f153a9", 156, "ace78a978005"),
    ("llava_v0", 217, "129350366331", 156, "ace78a978005"),
    ("v0_mmtag", 372, "d4b0484ba881", 311, "563c2a621b11"),
    ("v1", 208, "080b3549d584", 154, "1fa69e2371b7"),
    ("vicuna_v1", 208, "080b3549d584", 154, "1fa69e2371b7"),
    ("llava_v1", 210, "ff54643a6973", 156, "ace78a978005"),
    ("v1_mmtag", 365, "a26c3bd49529", 311, "563c2a621b11"),
    ("llama_2", 580, "ce0da33a83ab", 508, "d52c188a3c96"),
    ("llava_llama_2", 258, "5853d830822f", 186, "790f4cfc0552"),
    ("mistral_instruct", 50, "b89525f98314", 0, "e3b0c44298fc"),
    ("mpt", 259, "45965cc860c1", 127, "c20002e5cc3a"),
    ("chatml", 172, "654dfeac3e00", 40, "9ce12280308e"),
    ("chatml_direct", 172, "654dfeac3e00", 40, "9ce12280308e"),
    ("mistral_direct", 172, "654dfeac3e00", 40, "9ce12280308e"),
]
LLAMA_LIKE = cast(PreTrainedTokenizerBase, SimpleNamespace(bos_token="<s>", eos_token="</s>"))


REGISTRY = Registry.installed()


def template(use: str, **options: Any) -> PromptTemplate:
    component = cast(Any, REGISTRY.get(PromptTemplate, use))
    built: PromptTemplate = component(component.Options(**options))
    return built


def turns(*texts: str) -> tuple[Turn, ...]:
    roles: tuple[Role, Role] = ("human", "gpt")
    return tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))


def sample(*texts: str) -> Sample:
    images = sum(text.count(IMAGE) for text in texts[::2])
    return Sample("s1", turns(*texts), (Path("image.jpg"),) * images)


def rendered(template: PromptTemplate, *texts: str) -> str:
    return "".join(segment.text for segment in template.segments(turns(*texts), LLAMA_LIKE))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize(("name", "length", "hashed", "system_length", "system_hash"), PROBES)
def test_text_is_that_of_the_original(
    name: str, length: int, hashed: str, system_length: int, system_hash: str
) -> None:
    prompt = rendered(template(name), "<image>\nQ1", "A1", "Q2")
    if name.endswith("mmtag"):  # the probe has no tags: the original sets them when it reads data
        assert "<Image><image></Image>\nQ1" in prompt
        prompt = prompt.replace("<Image><image></Image>", "<image>")
    assert (len(prompt), digest(prompt)) == (length, hashed)
    start, _, _ = prompt.partition("<image>")
    system = start
    for around in ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n", "###Human: ", " USER: ", "[INST] "):
        system = system.replace(around, "")
    if name.startswith(("mpt", "chatml", "mistral_d")):
        system = system.removesuffix("<|im_end|><|im_start|>user\n")
    if name not in ("v0", "default"):  # where the example stands behind it
        assert (len(system), digest(system)) == (system_length, system_hash)


@pytest.mark.parametrize("name", [probe[0] for probe in PROBES])
@pytest.mark.parametrize("layout", ["original", "compact", "lines"])
def test_an_empty_system_text_leaves_nothing_behind(name: str, layout: str) -> None:
    own = template(name)
    options = {} if "layout" not in type(own).Options.model_fields else {"layout": layout}
    if not options and layout != "original":
        return
    bare = template(name, system="", **options)
    for texts in (("Q",), ("Q", "A"), ("Q", "A", "Q2")):
        text = rendered(bare, *texts)
        assert text[0] not in " \n"
        assert text.startswith(("USER: ", "### Human: ", "Human: ", "[INST] Q", "<|im_start|>user"))
    assert rendered(template(name, system="Be brief.", **options), "Q").find("Be brief.") >= 0


def test_the_original_trains_v0_with_another_text_than_it_asks_with() -> None:
    v0 = template("llava_v0", system="S")
    assert rendered(v0, "Q") == "S###Human: Q###Assistant:"
    assert rendered(v0, "Q", "A") == "S\n\n### Human: Q\n### Assistant: A\n### "
    lines = template("llava_v0", system="S", layout="lines")
    assert rendered(lines, "Q", "A", "Q2") == (
        "S\n\n### Human: Q\n### Assistant: A\n### Human: Q2\n### Assistant:"
    )
    compact = template("llava_v0", system="S", layout="compact")
    assert rendered(compact, "Q", "A") == "S###Human: Q###Assistant: A###"


def test_v0s_example_is_shown_but_not_learned() -> None:
    segments = template("v0", layout="compact").segments(turns("Q", "A"), LLAMA_LIKE)
    assert "".join(s.text for s in segments if s.supervised) == " A###"
    assert "renewable" not in rendered(template("v0"), "Q", "A")  # the original trains without


@pytest.mark.parametrize(
    ("placement", "question", "expected"),
    [
        ("front", "What?\n<image>", "<image>\nWhat?"),
        ("front", "<image>\nWhat?", "<image>\nWhat?"),
        ("front", " in <image> the middle ", "<image>\nin  the middle"),
        ("front", "<image>", "<image>"),
        ("front", "<image><image> Compare.", "<image>\n<image>\nCompare."),
        ("front", "  no image ", "  no image "),
        ("keep", "What?\n<image> ", "What?\n<image> "),
    ],
)
def test_images_are_placed(placement: str, question: str, expected: str) -> None:
    made = template("vicuna_v1", system="", image_placement=placement)
    assert rendered(made, question) == f"USER: {expected} ASSISTANT:"


def test_random_placement_is_even_and_depends_on_seed_and_text_alone() -> None:
    def behind(seed: int) -> list[bool]:
        made = template("vicuna_v1", system="", image_placement="random", seed=seed)
        prompts = [rendered(made, f"<image>\nWhat is {number}?") for number in range(400)]
        assert all(p.count(IMAGE) == 1 for p in prompts)
        return [p.endswith("?\n<image> ASSISTANT:") for p in prompts]

    assert behind(1) == behind(1) != behind(2)
    assert 150 < sum(behind(1)) < 250


def test_templates_survive_pickling_and_list_their_summary() -> None:
    for name, component in REGISTRY.all(PromptTemplate).items():
        assert component.__doc__, name
        made = cast(Any, component)(component.Options())
        again = pickle.loads(pickle.dumps(made))  # noqa: S301
        assert type(again) is component
    kept = pickle.loads(pickle.dumps(template("v1", system="S")))  # noqa: S301
    assert rendered(kept, "Q") == "S USER: Q ASSISTANT:"


def test_stop_texts() -> None:
    stops = {name: tuple(template(name).stop(LLAMA_LIKE)) for name, *_ in PROBES}
    assert stops["llava_v0"] == stops["v0"] == ("###",)
    assert stops["chatml"] == stops["mpt"] == ("<|im_end|>",)
    assert stops["vicuna_v1"] == stops["llama_2"] == ()  # the end token
    assert tuple(template("plain").stop(LLAMA_LIKE)) == ("\n",)


def test_what_cannot_be_shown_is_refused_with_a_reason() -> None:
    plain = template("plain")
    with pytest.raises(DataError, match="one image and its caption"):
        rendered(plain, "no image", "caption")
    with pytest.raises(DataError, match="one image and its caption"):
        rendered(plain, "<image>", "a", "b", "c")
    with pytest.raises(ValidationError):
        template("plain", system="S")
    made = template("vicuna_v1")
    with pytest.raises(DataError, match="turn 1 is from `gpt`"):
        made.segments([Turn("gpt", "A")], LLAMA_LIKE)
    with pytest.raises(DataError, match="turn 2 is from `human`"):
        made.segments([Turn("human", "Q"), Turn("human", "Q")], LLAMA_LIKE)
    with pytest.raises(DataError, match="no turns"):
        made.segments([], LLAMA_LIKE)
    endless = cast(PreTrainedTokenizerBase, SimpleNamespace(bos_token=None, eos_token=None))
    with pytest.raises(ModelError, match="eos_token"):
        made.segments(turns("Q"), endless)
    template("llava_v0").segments(turns("Q"), endless)


# -- ids and masks with the real LLaMA tokenizer ---------------------------------------------------


def pieces(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokens, learned ones in brackets."""
    shown = []
    for number, supervised in zip(encoded.ids.tolist(), encoded.supervised, strict=True):
        token = IMAGE if number == IMAGE_ID else str(tokenizer.convert_ids_to_tokens(number))
        shown.append(f"[{token}]" if supervised else token)
    return " ".join(shown)


def test_plain_learns_caption_and_newline(llama: PreTrainedTokenizerBase) -> None:
    encoded = encode(sample("Describe.\n<image>", "ok"), template("plain"), llama)
    assert pieces(encoded, llama) == "<s> <image> [▁ok] [<0x0A>]"
    encoded = encode(sample("<image>", "1é"), template("plain"), llama)
    assert pieces(encoded, llama) == "<s> <image> [▁] [1] [é] [<0x0A>]"
    encoded = encode(sample("<image>"), template("plain"), llama)
    assert encoded.ids.tolist() == [1, IMAGE_ID]


def test_v1_learns_answers_and_end_tokens(llama: PreTrainedTokenizerBase) -> None:
    v1 = template("vicuna_v1", system="S.")
    encoded = encode(sample("<image>\nhi", "ok", "Q", "1"), v1, llama)
    user = "▁US ER" if cast(Any, llama).legacy else "USER"
    assert pieces(encoded, llama) == (
        "<s> ▁S . ▁US ER : ▁ <image> ▁ <0x0A> hi ▁A SS IST ANT : [▁ok] [</s>] "
        f"{user} : ▁Q ▁A SS IST ANT : [▁] [1] [</s>]"
    )


def test_v0_learns_all_hashes_and_the_assistants_turns(llama: PreTrainedTokenizerBase) -> None:
    v0 = template("llava_v0", system="S.")
    encoded = encode(sample("<image>\nhi", "ok", "Q", "1"), v0, llama)
    assert pieces(encoded, llama) == (
        "<s> ▁S . <0x0A> <0x0A> [##] [#] ▁Human : ▁ <image> ▁ <0x0A> hi <0x0A> "
        "[##] [#] [▁Ass] [istant] [:] [▁ok] [<0x0A>] [##] [#] ▁Human : ▁Q <0x0A> "
        "[##] [#] [▁Ass] [istant] [:] [▁] [1] [<0x0A>] [##] [#] [▁]"
    )
    compact = template("llava_v0", system="S.", layout="compact")
    encoded = encode(sample("hi", "ok", "Q", "1"), compact, llama)
    assert pieces(encoded, llama) == (
        "<s> ▁S . ## # H uman : ▁hi ## # Ass istant : [▁ok] [##] [#] H uman : ▁Q ## # "
        "Ass istant : [▁] [1] [##] [#]"
    )


def test_llama_2_learns_the_space_before_the_end_token(llama: PreTrainedTokenizerBase) -> None:
    encoded = encode(sample("<image>\nhi", "ok", "Q", "1"), template("llama_2", system=""), llama)
    inst = "▁[ INST" if cast(Any, llama).legacy else "[ INST"
    assert pieces(encoded, llama) == (
        "<s> ▁[ INST ] ▁ <image> ▁ <0x0A> hi ▁[ / INST ] [▁ok] [▁] [</s>] "
        f"<s> {inst} ] ▁Q ▁[ / INST ] [▁] [1] [▁] [</s>]"
    )
    mistral = encode(sample("hi", "ok", "Q"), template("mistral_instruct"), llama)
    assert pieces(mistral, llama) == (
        f"<s> ▁[ INST ] ▁hi ▁[ / INST ] [▁ok] [▁] [</s>] {inst} ] ▁Q ▁[ / INST ]"
    )


def expected_ids(
    sentencepiece: SentencePieceProcessor, stretches: Sequence[Sequence[str]], *, legacy: bool
) -> list[int]:
    """Tokenise by SentencePiece alone: stretches between images, special tokens as elements."""
    special = {"<s>": 1, "</s>": 2}
    ids = [1]
    for number, stretch in enumerate(stretches):
        if number:
            ids.append(IMAGE_ID)
        for place, text in enumerate(stretch):
            if text in special:
                ids.append(special[text])
            elif legacy or not place:
                ids += sentencepiece.encode(text) if text else []
            else:
                ids += sentencepiece.encode(f"\n{text}")[2:]  # without the space put in front
    return ids


def test_three_exchanges_have_72_or_70_ids(
    llama: PreTrainedTokenizerBase, sentencepiece: SentencePieceProcessor
) -> None:
    v1 = template("vicuna_v1")
    texts = ("<image>\nWhat?", "ok", "more", "fine", "Why so?", "bye")
    encoded = encode(sample(*texts), v1, llama)
    legacy = cast(Any, llama).legacy
    assert len(encoded.ids) == (72 if legacy else 70)
    system = rendered(v1, "Q").removesuffix(" USER: Q ASSISTANT:")
    stretches = [
        [f"{system} USER: "],
        [
            "\nWhat? ASSISTANT: ok",
            "</s>",
            "USER: more ASSISTANT: fine",
            "</s>",
            "USER: Why so? ASSISTANT: bye",
            "</s>",
        ],
    ]
    assert encoded.ids.tolist() == expected_ids(sentencepiece, stretches, legacy=legacy)


# SentencePiece and tokenizers differ over rare characters (normalisation, U+2581 itself)
TEXT = st.lists(
    st.sampled_from([*"ab Z19.,:#<>/\n\té中文😀'\"[]|_", "</s>", "<s>", "  ", "cat", "# "]),
    max_size=20,
).map("".join)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(questions=st.lists(TEXT, min_size=1, max_size=3), answers=st.lists(TEXT, max_size=3))
def test_any_conversation_equals_sentencepiece_and_learns_its_answers(
    llama: PreTrainedTokenizerBase,
    sentencepiece: SentencePieceProcessor,
    questions: list[str],
    answers: list[str],
) -> None:
    answers = answers[: len(questions)]
    questions = questions[: len(answers) + 1]
    texts = [text for pair in zip(questions, answers, strict=False) for text in pair]
    texts += questions[len(answers) :]
    encoded = encode(sample(*texts), template("vicuna_v1", system=""), llama)
    stretch: list[str] = []
    for number, question in enumerate(questions):
        asked = f"USER: {question} ASSISTANT:"
        if number < len(answers):
            stretch += [f"{asked} {answers[number]}", "</s>"]
        else:
            stretch.append(asked)
    legacy = cast(Any, llama).legacy
    assert encoded.ids.tolist() == expected_ids(sentencepiece, [stretch], legacy=legacy)
    supervised = encoded.ids[encoded.supervised]
    ends = supervised == llama.eos_token_id
    assert ends.sum() == len(answers)
    start = 0
    for answer, end in zip(answers, ends.nonzero()[0], strict=True):
        # behind `:`, so that the space in front of the answer is not taken for the text's start
        prefix = llama.convert_tokens_to_ids(":")
        text = llama.decode([prefix, *supervised[start:end].tolist()])
        assert text == f": {answer}"
        start = end + 1


ANY = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "▁", "\n", "<image>", "</s>", "<0x0A>", "a", " dog", "\ufeff"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    max_size=8,
).map("".join)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stretches=st.lists(st.lists(st.tuples(ANY, st.booleans()), max_size=3), max_size=4))
def test_any_text_between_images_equals_sentencepiece(
    llama: PreTrainedTokenizerBase,
    sentencepiece: SentencePieceProcessor,
    stretches: list[list[tuple[str, bool]]],
) -> None:
    segments: list[Segment] = []
    texts: list[list[str]] = [[]]
    for number, stretch in enumerate(stretches):
        if number:
            segments.append(Segment(IMAGE))
            texts.append([])
        texts[-1].append("")
        for text, ended in stretch:
            text = text.replace(IMAGE, "image")
            segments.append(Segment(text))
            texts[-1][-1] += text
            if ended:
                segments.append(Segment("</s>", markup=True))
                texts[-1] += ["</s>", ""]
    ids, _ = tokenise(segments, llama)
    expected = [1]
    for number, pieces in enumerate(texts):
        expected += [IMAGE_ID] * (number > 0)
        for place, text in enumerate(pieces):
            if place % 2:
                expected.append(2)
            elif cast(Any, llama).legacy or not place:
                expected += sentencepiece.encode(text)
            else:
                expected += sentencepiece.encode(f"\n{text}")[2:]  # no space put in front
    assert ids.tolist() == expected


def test_text_behind_an_image_may_begin_with_a_space(
    llama: PreTrainedTokenizerBase, sentencepiece: SentencePieceProcessor
) -> None:
    encoded = encode(sample("<image>", " a dog"), template("plain"), llama)
    caption = sentencepiece.encode(" a dog\n")
    assert encoded.ids.tolist() == [1, IMAGE_ID, *caption]
    assert encoded.supervised.tolist() == [False, False, *[True] * len(caption)]
    asked = encode(sample("<image>"), template("vicuna_v1", system=""), llama)
    at = asked.ids.tolist().index(IMAGE_ID)
    behind = sentencepiece.encode(" ASSISTANT:")  # with SentencePiece's own space in front
    assert asked.ids.tolist()[at + 1 :][: len(behind) - 1] == behind[:-1]
    if sentencepiece.piece_to_id("\u2581dog") == 11203:  # the published model
        assert caption == [29871, 263, 11203, 13]
        assert asked.ids.tolist()[at : at + 3] == [IMAGE_ID, 29871, 319]


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v0", "llama_2", "chatml", "v1_mmtag"])
def test_ids_are_those_of_the_whole_text(name: str, llama: PreTrainedTokenizerBase) -> None:
    made = template(name)
    texts = ("<image>\nWhat is 2+2? 中 😀", " It's\n\n4. ", "And  why?", "Because.")
    encoded = encode(sample(*texts), made, llama)
    before, after = "".join(s.text for s in made.segments(turns(*texts), llama)).split(IMAGE)
    expected = llama(before)["input_ids"] + [IMAGE_ID] + llama(after)["input_ids"][1:]
    assert encoded.ids.tolist() == expected


def test_traps_of_the_original(llama: PreTrainedTokenizerBase) -> None:
    """Each of these leaves the whole sample unlearned in the original."""
    v1 = template("vicuna_v1", system="")

    def supervised(*texts: str) -> str:
        encoded = encode(sample(*texts), v1, llama)
        return str(llama.decode(encoded.ids[encoded.supervised]))

    assert supervised("Q", "as ASSISTANT: would say") == "as ASSISTANT: would say</s>"
    assert supervised("what is ASSISTANT: ?", "A") == "A</s>"
    assert supervised("Q", "") == "</s>"
    assert supervised("Q", "A", "and then?") == "A</s>"
    encoded = encode(sample("What is </s>?", "It is </s> <s> <unk>."), v1, llama)
    assert encoded.ids.tolist().count(2) == 1
    assert encoded.ids.tolist().count(1) == 1
    assert encoded.ids.tolist().count(0) == 0
    hashes = template("llava_v0", system="")
    encoded = encode(sample("Q", "### Human: me"), hashes, llama)
    assert "### Human: me\n### " in llama.decode(encoded.ids[encoded.supervised])


def test_image_text_in_an_answer_is_text(llama: PreTrainedTokenizerBase) -> None:
    encoded = encode(sample("<image>\nQ", "write <image> here"), template("vicuna_v1"), llama)
    assert encoded.image_count == 1
    assert llama.decode(encoded.ids[encoded.supervised]) == "write <image> here</s>"


def test_max_length_cuts_as_the_original(llama: PreTrainedTokenizerBase) -> None:
    v1 = template("vicuna_v1", system="")
    long_answer = encode(sample("<image>\nQ", "word " * 50), v1, llama, max_length=40)
    rows = long_answer.expand(visual_tokens=16)
    assert len(rows.token_ids) == 40
    assert 2 not in rows.token_ids[rows.supervised]  # the end token is behind the cut
    assert long_answer.expand(16).supervised.any()
    long_question = encode(sample("<image>\n" + "word " * 50, "A"), v1, llama, max_length=40)
    assert not long_question.expand(16).supervised.any()  # for the training step to report
    assert long_question.length(16) == 40


def test_leftovers_of_other_calls_and_added_tokens_do_no_harm(
    llama: PreTrainedTokenizerBase,
) -> None:
    llama = copy.deepcopy(llama)
    v1 = template("vicuna_v1")
    expected = encode(sample("Q </s>", "A"), v1, llama).ids.tolist()
    llama.pad_token = llama.pad_token or "<unk>"
    llama(["a"], padding="max_length", truncation=True, max_length=5, split_special_tokens=True)
    assert encode(sample("Q </s>", "A"), v1, llama).ids.tolist() == expected
    ids, _ = tokenise(template("plain").segments(turns("<image>", "<new>"), llama), llama)
    size = len(llama)
    llama.add_special_tokens({"additional_special_tokens": ["<new>"]})
    again, _ = tokenise(template("plain").segments(turns("<image>", "<new>"), llama), llama)
    assert ids.tolist() == again.tolist()
    assert size not in again


def test_an_image_may_stand_between_special_tokens(llama: PreTrainedTokenizerBase) -> None:
    """As LLaVA's first models saw it: the text is cut at the image, the tokens are themselves."""
    llama = copy.deepcopy(llama)
    llama.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    wrapping = template("vicuna_v1", image="<im_start><image><im_end>", system="")
    segments = wrapping.segments(turns("<image>\nIs <im_end> a word?"), llama)
    ids, _ = tokenise(segments, llama)
    before = llama("USER: <im_start>")["input_ids"]
    assert ids[: len(before)].tolist() == before
    assert ids[len(before)] == IMAGE_ID
    end = llama.convert_tokens_to_ids("<im_end>")
    assert ids[len(before) + 1] == end
    assert (ids == end).sum() == 1  # the one in the question is text
    with pytest.raises(ValidationError, match="must hold `<image>` once"):
        template("vicuna_v1", image="<img>")
