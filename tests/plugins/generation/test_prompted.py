"""The prompted generator: what it asks, and what it makes of replies good and bad."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests import published
from tests.plugins.chat_server import KEY, Service, serve, teach

from llavakit import ChatModel, DataError, Generator, ImageContext, Message, Reply
from llavakit.contracts.component import Use
from llavakit.contracts.data import IMAGE, RESPONSE_KINDS, Box, ResponseKind, Sample
from llavakit.registry import Registry
from llavakit.testing import GeneratorContract
from llavakit_plugins.chat_models.replay import Replay, ReplayOptions
from llavakit_plugins.evaluation.judging import JudgeSettings, replies
from llavakit_plugins.evaluation.reviews import read_scores
from llavakit_plugins.generation.contexts import Contexts, as_text, read_contexts, write_contexts
from llavakit_plugins.generation.requests.ledger import Ledger, Request, record_of
from llavakit_plugins.generators.prompted import Prompted, PromptedOptions
from llavakit_plugins.generators.prompts import load_prompt

SHARED = published.folder()
CONTEXT = ImageContext(
    "000000033471",
    "000000033471.jpg",
    ("A man rides a red bus.", "A bus on a street."),
    (Box("bus", (0.1, 0.25, 0.9004, 1.0)), Box("person", (0.0, 0.3333333, 0.34, 0.5))),
)


@cache
def teacher(prompts: Path | None = None) -> Prompted:
    chat = {"use": "openai", "model": "gpt-4o", "base_url": "http://localhost:1/v1"}
    settings = PromptedOptions.model_validate({"chat": chat, "prompts": prompts})
    return Prompted(settings, build=Registry.installed().build)


def read(text: str, kind: ResponseKind = "conversation", finish: str = "stop") -> Any:
    verdict = teacher().read(CONTEXT, kind, Reply(text, finish))
    return verdict.outcome, list(verdict.notes), [turn.text for turn in verdict.turns]


class TestPrompted(GeneratorContract):
    @pytest.fixture(autouse=True)
    def _serve(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with serve(Service(otherwise=teach)) as self.service:
            yield

    @property
    def options(self) -> Any:  # type: ignore[override]
        return {"chat": {"use": "openai", "model": "gpt-4o"}}

    def build(self) -> Generator:
        chat = {"use": "openai", "model": "gpt-4o", "base_url": self.service.url}
        options = PromptedOptions(chat=Use[ChatModel].model_validate(chat))
        return Prompted(options, build=Registry.installed().build)


# -- what is asked ---------------------------------------------------------------------------------


def test_the_context_is_rendered_as_the_paper_does() -> None:
    captions = "A man rides a red bus.\nA bus on a street."
    assert as_text(CONTEXT, boxes=False) == captions
    assert as_text(CONTEXT, boxes=True) == (
        f"{captions}\n\nbus: [0.1, 0.25, 0.9, 1.0]\nperson: [0.0, 0.333, 0.34, 0.5]"
    )


def test_real_contexts_are_rendered_as_their_file_has_them() -> None:
    path = SHARED / "coco80" / "caps_boxes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    contexts = Contexts(path)
    assert len(contexts) == len(rows) == 60
    for row, context in zip(rows, contexts, strict=True):
        lines = [*row["captions"]]
        if row["instances"]:
            lines += ["", *(f"{item['category']}: {item['bbox']}" for item in row["instances"])]
        assert as_text(context, boxes=True).split("\n") == [line.strip() for line in lines]
    contexts.close()


def test_contexts_are_read_one_by_one_and_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "contexts.jsonl"
    write_contexts(path, [CONTEXT])
    text = path.read_text()
    path.write_text(f"{text}\n\n{text}{{broken\n")
    contexts = Contexts(path)
    assert (len(contexts), contexts[1]) == (3, CONTEXT)
    assert contexts[:2] == [CONTEXT, CONTEXT]
    with pytest.raises(DataError, match=r"contexts\.jsonl:5:2: not valid JSON"):
        contexts[2]
    with pytest.raises(IndexError):
        contexts[3]
    contexts.close()
    path.write_text('{"id": "7", "image": "7.jpg", "captions": [" "]}\n')
    with pytest.raises(DataError, match=r"contexts\.jsonl:1: context `7` has no captions"):
        list(read_contexts(path))
    path.write_text(f"\ufeff{text}", encoding="utf-8")  # as some editors write it
    contexts = Contexts(path)
    assert (contexts[0], list(read_contexts(path))) == (CONTEXT, [CONTEXT])
    contexts.close()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('"captions": "a dog"', "`captions` is no list of texts but 'a dog'"),  # a paid letter each
        ('"captions": ["a", null]', "`captions` is no list of texts but ['a', None]"),
        (r'"captions": ["half a \ud83d"]', "a text ends within a character"),
        ('"captions": ["a"], "instances": [{"category": "dog", "bbox": [12, 30, 200.5, 90]}]',
         "the corners of `dog` are within 0..1"),
        ('"captions": ["a"], "instances": [{"category": "dog", "bbox": [0, NaN, 1, 1]}]',
         "the corners of `dog` are within 0..1"),
        ('"captions": ["a"], "x": ' + "[" * 100_000, "nested too deeply"),
        ('"captions": ["a"], "x": ' + "9" * 5000, "a number too long"),
    ],
)  # fmt: skip
def test_contexts_that_are_not_meant_are_refused(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "contexts.jsonl"
    path.write_text(f'{{"id": "7", "image": "7.jpg", {more}}}\n')
    with pytest.raises(DataError) as caught:
        list(read_contexts(path))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", RESPONSE_KINDS)
def test_messages_stand_in_the_papers_order(kind: ResponseKind) -> None:
    prompt = load_prompt(kind, None)
    messages = teacher().messages(CONTEXT, kind)
    assert [message.role for message in messages] == [
        "system", *["user", "assistant"] * len(prompt.examples), "user",
    ]  # fmt: skip
    assert len(prompt.examples) == {"conversation": 2, "detail": 3, "reasoning": 3}[kind]
    assert messages[-1].content == as_text(CONTEXT, boxes=kind != "conversation")
    for context, _ in prompt.examples:
        captions, _, boxes = context.partition("\n\n")
        assert len(captions.split("\n")) == 5
        assert bool(boxes) == (kind != "conversation")


@pytest.mark.parametrize("kind", RESPONSE_KINDS)
def test_the_examples_are_what_is_asked_for(kind: ResponseKind) -> None:
    for told, reply in load_prompt(kind, None).examples:
        captions, _, boxes = told.partition("\n\n")
        named = tuple(Box(line.partition(":")[0], (0, 0, 1, 1)) for line in boxes.splitlines())
        context = ImageContext("x", "x.jpg", tuple(captions.split("\n")), named)
        verdict = teacher().read(context, kind, Reply(reply))
        assert (verdict.outcome, verdict.notes) == ("accepted", ())
        assert len(verdict.turns) >= (8 if kind == "conversation" else 2)


def test_there_are_as_many_questions_as_in_the_papers_tables() -> None:
    from llavakit_plugins.steps.generate import brief_questions

    detail = load_prompt("detail", None).questions
    assert len(set(detail)) == len(detail) == 16
    assert len(set(brief_questions())) == len(brief_questions()) == 11


def test_questions_and_the_images_place_are_drawn_once_for_each_context() -> None:
    reply = Reply("A red bus stands on a street, and a man is in it.")
    questions, orders = Counter[str](), Counter[bool]()
    for number in range(800):
        context = ImageContext(str(number), "x.jpg", CONTEXT.captions, CONTEXT.boxes)
        first, again = (teacher().read(context, "detail", reply).turns for _ in range(2))
        assert first == again
        text = first[0].text
        orders[text.startswith(f"{IMAGE}\n")] += 1
        questions[text.replace(IMAGE, "").strip()] += 1
    assert set(questions) == set(load_prompt("detail", None).questions)
    assert min(questions.values()) > 20
    assert 300 < orders[True] < 500


def test_prompts_can_be_replaced_kind_by_kind(tmp_path: Path) -> None:
    own = tmp_path / "reasoning"
    own.mkdir()
    (own / "system.txt").write_text("Think.\n")
    (own / "b_context.txt").write_text("B")
    (own / "b_reply.txt").write_text("Question:\nB?\n===\nAnswer:\nB.\n===")
    (own / "a_context.txt").write_text("A")
    (own / "a_reply.txt").write_text("Question:\nA?\n===\nAnswer:\nA.\n===")
    mine = teacher(prompts=tmp_path)
    texts = [message.content for message in mine.messages(CONTEXT, "reasoning")]
    assert texts[0] == "Think."
    assert texts[1:5:2] == ["A", "B"]
    assert mine.messages(CONTEXT, "detail") == teacher().messages(CONTEXT, "detail")
    (own / "b_reply.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read the prompt .*b_reply\.txt"):
        load_prompt("reasoning", tmp_path)
    (own / "b_reply.txt").write_text(" ")
    with pytest.raises(DataError, match="is empty"):
        load_prompt("reasoning", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load_prompt("detail", tmp_path / "none")


def test_a_folder_of_prompts_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    """A job with the packaged prompts would cost as much, and not be what was asked for."""
    with pytest.raises(DataError, match="is empty; a folder of prompts has conversation, detail"):
        load_prompt("detail", tmp_path)
    (tmp_path / "reasoning").mkdir()
    (tmp_path / "details").mkdir()
    with pytest.raises(DataError, match="details is no kind of response"):
        load_prompt("detail", tmp_path)


# -- what is made of replies -----------------------------------------------------------------------

GOOD = (
    "Question:\nWhat is red?\n===\nAnswer:\nThe bus is red.\n===\n"
    "Question:\nWho rides it?\n===\nAnswer:\nA man rides it.\n==="
)
DRAFT = "Let me see.\nQuestion:\nIs it blue?\n===\nAnswer:\nPerhaps it is.\n===\nNo."
PAIRS = ["What is red?", "The bus is red.", "Who rides it?", "A man rides it."]
ONE = PAIRS[:2]

REPAIRED: dict[str, tuple[str, str, list[str]]] = {
    "no last separator": (GOOD.removesuffix("\n==="), "", PAIRS),
    "windows line ends": (GOOD.replace("\n", "\r\n"), "", PAIRS),
    "labels on the line": (
        GOOD.replace("Question:\n", "Question: ").replace("Answer:\n", "Answer: "),
        "a label was written in another way", PAIRS,
    ),
    "bold labels": (GOOD.replace("Question:", "**Question 1:**"), "another way", PAIRS),
    "short labels": (
        GOOD.replace("Question:", "Q:").replace("Answer:", "A:"), "another way", PAIRS,
    ),
    "no separators": (GOOD.replace("\n===", ""), "a separator was missing", PAIRS),
    "a preface": (f"Sure! Here it is:\n\n{GOOD}", "text outside of the layout", PAIRS),
    "a code block": (f"```text\n{GOOD}\n```", "code block", PAIRS),
    "a question left open": (f"{GOOD}\nQuestion:\nAnd?\n===", "question without an answer", PAIRS),
    "an answer alone": (f"Answer:\nYes.\n===\n{GOOD}", "answer without its question", PAIRS),
    "asked twice": (f"{GOOD}\n{GOOD}", "asked before", PAIRS),
    "an empty answer": (f"{GOOD}\nQuestion:\nAnd?\n===\nAnswer:\n===", "dropped: empty", PAIRS),
    "a caption is mentioned": (
        f"{GOOD}\nQuestion:\nWhere?\n===\nAnswer:\nThe captions say on a street.\n===",
        "dropped: speaks of captions", PAIRS,
    ),
    "a refusal among others": (
        f"{GOOD}\nQuestion:\nWho is it?\n===\nAnswer:\nI'm sorry, I can't tell.\n===",
        "dropped: the teacher refuses", PAIRS,
    ),
    "numbers": (
        f"{GOOD}\nQuestion:\nWhere is it?\n===\nAnswer:\nAt [0.1, 0.25, 0.9, 1.0].\n===",
        "dropped: speaks of captions", PAIRS,
    ),
    "a marker": (
        f"{GOOD}\nQuestion:\nWhat?\n===\nAnswer:\nIt ends.</s>\n===",
        "dropped: holds a marker", PAIRS,
    ),
    **{
        f"thinking {begin}{end}": (f"{begin}{DRAFT}{end}\n{GOOD}", "the thinking", PAIRS)
        for begin, end in [
            ("<think>", "</think>"), ("<think>\n", "\n</think>\n"), ("<thinking>", "</thinking>"),
            ("<THINK>", "</THINK>"), ("<think >", "< / think >"), ("", "</think>"),
            ("", "</thinking>"), ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"),
            ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
            ("<think>a<think>", "</think>b</think>"), ("<think>", "</think><think>x</think>"),
        ]
    },
    "thinking between": (GOOD.replace("A man", "<think>He.</think>A man"), "the thinking", PAIRS),
    "nothing thought": (f"<think>\n\n</think>\n\n{GOOD}", "the thinking", PAIRS),
    **{
        f"rule {rule}": (f"{GOOD.replace('===', rule)}\n{rule}", "separator was written", PAIRS)
        for rule in ("---", "-----", "***", "* * *", "___", "- - -", "———", "~~~")
    },
    "rules beside separators": (GOOD.replace("===", "===\n\n---"), "separator was written", PAIRS),
    "rules, no separators": (GOOD.replace("===\nQ", "---\n\nQ"), "separator was written", PAIRS),
    "a rule within an answer": (
        f"{GOOD}\nQuestion:\nWhat?\n===\nAnswer:\nA bus.\n---\nA man.\n===",
        "dropped: holds a rule", PAIRS,
    ),
    "a character that drives a terminal": (
        f"{GOOD}\nQuestion:\nWhat?\n===\nAnswer:\nA \x9b31mbus.\n===",
        "dropped: holds characters", PAIRS,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "note", "expected"), REPAIRED.values(), ids=REPAIRED)
def test_what_can_be_mended_is(text: str, note: str, expected: list[str]) -> None:
    outcome, notes, texts = read(text)
    assert [text.replace(IMAGE, "").strip() for text in texts] == expected
    assert texts[0].count(IMAGE) == 1
    assert outcome == ("repaired" if note else "accepted")
    assert note in " | ".join(notes)


PROSE = "A red bus stands at the kerb: a man rides it. Okay, the street is wet."


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (PROSE, ""),
        (f"Sure!\n{PROSE}", "said to the person who asked"),
        (f"Certainly! Here is a detailed account of the picture:\n\n{PROSE}", "who asked"),
        (f"Here's what can be seen: {PROSE}", "who asked"),
        (f"{PROSE}\n\nLet me know if you would like to hear more!", "who asked"),
        (f"Of course. {PROSE} I hope this helps.", "who asked"),
        (f"Description: {PROSE}", "a label in front"),
        (f"```\n{PROSE}\n```", "code block"),
        (f"<think>\nA car?\n</think>\n\n{PROSE}", "the thinking"),
        (f"A car?</think>{PROSE}", "the thinking"),
        (f"---\n{PROSE}\n\n---", "a rule around it"),
    ],
)
def test_of_a_description_the_picture_alone_is_kept(text: str, note: str) -> None:
    outcome, notes, texts = read(text, "detail")
    assert texts[1] == PROSE
    assert outcome == ("repaired" if note else "accepted")
    assert note in " | ".join(notes)


def test_a_good_reply_is_accepted_as_it_is() -> None:
    outcome, notes, texts = read(GOOD)
    assert (outcome, notes) == ("accepted", [])
    assert [text.replace(IMAGE, "").strip() for text in texts] == PAIRS


REJECTED: dict[str, tuple[str, ResponseKind, str, str]] = {
    "nothing": ("", "conversation", "stop", "empty"),
    "spaces": (" \n", "detail", "stop", "empty"),
    "withheld": ("", "detail", "content_filter", "content filter"),
    "refusal by the service": ("I won't.", "reasoning", "refusal", "refuses"),
    "refusal": ("I'm sorry, but I can't help with that.", "conversation", "stop", "refuses"),
    "refusal in prose": ("I cannot see the image you refer to.", "detail", "stop", "refuses"),
    "an AI": ("As an AI language model, I have no eyes.", "detail", "stop", "refuses"),
    "prose for a conversation": ("A bus.", "conversation", "stop", "no question and answer"),
    "cut prose": ("A red bus stands on the", "detail", "length", "cut"),
    "cut reasoning": ("Question:\nWhy?\n===\nAnswer:\nBecause", "reasoning", "length", "cut"),
    "mostly bad": (
        "Question:\nA?\n===\nAnswer:\nThe box is at the left.\n===",
        "conversation",
        "stop",
        "speaks",
    ),
    "box": ("The bounding box shows a bus.", "detail", "stop", "speaks"),
    "coordinates": ("The bus is at the coordinates given.", "detail", "stop", "speaks"),
    "the descriptions": ("The descriptions speak of a bus.", "detail", "stop", "speaks"),
    "numbers": ("A bus (0.1, 0.25) is there.", "detail", "stop", "speaks"),
    "a placeholder": ("The <image> shows a bus.", "detail", "stop", "marker"),
    "thinking without end": (f"<think>\n{GOOD}", "conversation", "stop", "not clear"),
    "thinking that is cut": (f"<think>\n{GOOD}", "conversation", "length", "not clear"),
    "thinking that ends twice": (
        f"<think>a</think>b</think>{GOOD}", "conversation", "stop", "not clear",
    ),
    "nothing but thinking": ("<think>A bus.</think>\n", "detail", "stop", "empty"),
    "thinking without end in prose": ("A bus. <think>Or", "detail", "stop", "not clear"),
    "a rule within a description": ("A bus.\n\n---\n\nA man.", "detail", "stop", "a rule"),
    "a lone surrogate": ("A bus \ud800.", "detail", "stop", "no text"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "finish", "why"), REJECTED.values(), ids=REJECTED)
def test_what_cannot_be_used_says_why(text: str, kind: ResponseKind, finish: str, why: str) -> None:
    outcome, (note,), turns = read(text, kind, finish)
    assert (outcome, turns) == ("rejected", [])
    assert why in note


def test_of_a_conversation_that_was_cut_the_whole_pairs_are_kept() -> None:
    outcome, notes, texts = read(GOOD.removesuffix(" it.\n==="), finish="length")
    assert outcome == "repaired"
    assert [text.replace(IMAGE, "").strip() for text in texts] == ONE
    assert any("cut" in note for note in notes)


def test_of_several_reasonings_the_first_is_kept() -> None:
    outcome, notes, texts = read(GOOD, "reasoning")
    assert (outcome, notes) == ("repaired", ["more than one question: the first is kept"])
    assert [text.replace(IMAGE, "").strip() for text in texts] == ONE


def test_a_box_that_is_in_the_picture_may_be_spoken_of() -> None:
    text = Reply("A cat sits in a cardboard box.")
    context = ImageContext("1", "x.jpg", ("A cat in a box.",))
    assert teacher().read(context, "detail", text).outcome == "accepted"
    assert teacher().read(CONTEXT, "detail", text).outcome == "rejected"


def test_a_judges_thinking_is_no_part_of_its_review(tmp_path: Path) -> None:
    review = "8 9\nThe second says more."
    said = [
        review, f"<think>\n7 7\nNo.\n</think>\n\n{review}", f"3 4\nHm.\n</think>\n{review}",
        f"<think>{review}", f"1 2\na</think>3 4\nb</think>{review}",
    ]  # fmt: skip
    messages = [(Message("user", str(number)),) for number in range(len(said))]
    with Ledger(tmp_path / "said") as ledger:
        for asked_for, text in zip(messages, said, strict=True):
            ledger.append(record_of("", Request(asked_for)).entry(Reply(text)))
    judge = Replay(ReplayOptions(path=tmp_path / "said"), build=Registry.installed().build)
    found = replies(judge, messages, [str(number) for number in range(len(said))], JudgeSettings())
    assert found.texts == [review, review, review, None, None]
    assert [read_scores(text or "") for text in found.texts] == [(8, 9)] * 3 + [None] * 2


def test_published_answers_of_gpt4_are_nearly_all_accepted() -> None:
    """LLaVA-Bench's references: GPT-4 told captions and boxes of the same images."""
    rows = SHARED / "coco80" / "caps_boxes.jsonl"
    contexts = {context.id: context for context in read_contexts(rows)}
    folder = SHARED / "llava_bench_coco"
    questions, answers = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("questions.jsonl", "gpt4_answers.jsonl")
    )
    outcomes = Counter[str]()
    for question, answer in zip(questions, answers, strict=True):
        identity = Path(question["image"]).stem.rpartition("_")[2]
        context = contexts.get(identity, ImageContext(identity, question["image"], ()))
        if answer["category"] == "detail":
            verdict = teacher().read(context, "detail", Reply(answer["text"]))
        else:
            layout = f"Question:\n{question['text']}\n===\nAnswer:\n{answer['text']}\n==="
            verdict = teacher().read(context, "reasoning", Reply(layout))
        outcomes[verdict.outcome] += 1
        if verdict.turns:
            Sample("x", verdict.turns, (Path("x"),)).check()
    assert outcomes.total() == 90
    assert outcomes["accepted"] >= 86, outcomes
