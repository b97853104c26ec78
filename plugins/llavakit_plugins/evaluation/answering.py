"""Asks a model many questions: in batches of like length, every answer kept as it comes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from llavakit import DataError, JsonLines, LlavaModel, Question, Stopped, write_text
from llavakit.contracts.data import ImageSource
from llavakit.contracts.model import Sampling
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.rows import listed, read_lines

Row = dict[str, Any]
_MORE_TOKENS = 64  # of a second step, as in the original


@dataclass(frozen=True)
class Pace:
    """How many questions at a time, and who prepares their images."""

    batch_size: int
    workers: int
    """Threads that read and prepare the images of the next batches; 0: none beside the model's."""


class AnswerFile:
    """Answers in LLaVA's format, one JSON object a line, on the disk as soon as they are given.

    With `resume`, what an interrupted attempt left is read back; a line that a killed process left
    half written is dropped.
    """

    def __init__(self, path: Path, model_id: str, *, resume: bool) -> None:
        self.path, self._model_id = path, model_id
        self._known: dict[tuple[str, str, tuple[str, ...]], str] = {}
        if not resume:
            write_text(path, "")
        self._lines = JsonLines(path)
        if resume:
            for where, row in read_lines(path):
                images = row.get("image")
                images = images if isinstance(images, list) else [None]
                texts = [row.get("prompt"), row.get("text"), *images]
                if not all(isinstance(text, str) for text in texts):
                    raise DataError(
                        f"{where}: not an answer that this run wrote; remove the line, and its "
                        "question is asked again"
                    )
                self._known[str(row.get("question_id")), texts[0], tuple(images)] = texts[1]

    def get(self, question: Question) -> str | None:
        """Return the answer to a question with these very words and images, if there is one."""
        return self._known.get(_key(question))

    def append(self, questions: Sequence[Question], answers: Sequence[str]) -> None:
        """Put answers on the disk; when this returns, they are there."""
        self._lines.append(self.row(q, a) for q, a in zip(questions, answers, strict=True))
        self._known |= {_key(q): a for q, a in zip(questions, answers, strict=True)}

    def row(self, question: Question, answer: str, **metadata: Any) -> Row:
        """Return one line: the original's keys, and what else is known of the question."""
        names = list(_names(question.images))
        facts = json.dumps([self._model_id, question.id, question.prompt, names, answer])
        return {
            "question_id": question.id,
            "prompt": question.prompt,
            "image": names,
            "text": answer,
            "truth": question.truth,
            "category": question.category,
            "answer_id": sha256(facts.encode()).hexdigest()[:22],
            "model_id": self._model_id,
            "metadata": {},
            **metadata,
        }


def ask(
    model: Any,
    questions: Sequence[Question],
    file: AnswerFile,
    max_new_tokens: int,
    pace: Pace,
    *,
    progress: Progress,
    stopping: Callable[[], bool],
    note: str = "",
) -> list[str]:
    """Return the greedy answers, one a question; those that `file` has are not asked again.

    A LlavaModel answers in batches of questions of like length, which gives what one at a time
    gives; any other layout that has `generate` answers one by one.
    Raises Stopped where the user asked to stop; what was answered until then is in the file.
    """
    found = [file.get(question) for question in questions]
    todo = [index for index, answer in enumerate(found) if answer is None]
    done = len(questions) - len(todo)
    progress(done, len(questions), note)
    chosen = [questions[index] for index in todo]
    answering = _batched if isinstance(model, LlavaModel) else _one_by_one
    for indices, answers in answering(model, chosen, max_new_tokens, pace):
        file.append([chosen[index] for index in indices], answers)
        for index, answer in zip(indices, answers, strict=True):
            found[todo[index]] = answer
        done += len(indices)
        progress(done, len(questions), note)
        if stopping() and done < len(questions):
            raise Stopped
    return [answer for answer in found if answer is not None]


Answers = Iterator[tuple[list[int], list[str]]]


def _batched(
    model: LlavaModel, questions: Sequence[Question], max_new_tokens: int, pace: Pace
) -> Answers:
    lengths = [
        model.prompt(question.prompt, question.images).length(model.visual_tokens)
        for question in questions
    ]
    most = model.language.max_length
    long = [q.id for q, length in zip(questions, lengths, strict=True) if length >= most]
    if long:
        raise DataError(
            f"with its images, question {listed(long)} leaves no room for an answer: the language "
            f"model reads at most {most} tokens; shorten it or leave it out"
        )
    order = sorted(range(len(questions)), key=lambda index: lengths[index])
    batches = [
        order[begin : begin + pace.batch_size] for begin in range(0, len(order), pace.batch_size)
    ]
    sampling = Sampling(max_new_tokens)
    for indices, pixels in _prepared(model, questions, batches, pace.workers):
        prompts = [(questions[index].prompt, questions[index].images) for index in indices]
        answers = model.answer(prompts, sampling, pixels_IHW=pixels)
        yield indices, _gone_on(model, [questions[index] for index in indices], answers)


def _gone_on(model: LlavaModel, questions: Sequence[Question], answers: Sequence[str]) -> list[str]:
    """Return the answers; those that ended before what they must hold are gone on with."""
    whole = list(answers)
    begun: dict[int, str] = {}
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if question.then and question.then not in answer:
            start = f" {answer}".rstrip() + f" {question.then}"
            prompt = model.prompt(question.prompt, question.images, begun=start)
            if prompt.length(model.visual_tokens) < model.language.max_length:
                begun[number] = start
    if begun:
        prompts = [(questions[number].prompt, questions[number].images) for number in begun]
        ends = model.answer(prompts, Sampling(_MORE_TOKENS), begun=list(begun.values()))
        for number, end in zip(begun, ends, strict=True):
            whole[number] = f"{answers[number]}\n{questions[number].then} {end}".strip()
    return whole


def _prepared(
    model: LlavaModel, questions: Sequence[Question], batches: Sequence[list[int]], workers: int
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Yield every batch with its pixels, prepared ahead in threads (Pillow leaves them run)."""

    def prepare(indices: Sequence[int]) -> Tensor | None:
        images: list[ImageSource] = [i for index in indices for i in questions[index].images]
        names = ", ".join(f"`{questions[index].id}`" for index in indices[:3])
        return model.prepare(images, f"questions {names}{' …' if len(indices) > 3 else ''}")

    if not workers:
        yield from ((indices, prepare(indices)) for indices in batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[list[int], Future[Tensor | None]]] = deque()
        try:
            for indices in batches:
                waiting.append((indices, pool.submit(prepare, indices)))
                if len(waiting) > workers:
                    ready, pixels = waiting.popleft()
                    yield ready, pixels.result()
            while waiting:
                ready, pixels = waiting.popleft()
                yield ready, pixels.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_by_one(
    model: Any, questions: Sequence[Question], max_new_tokens: int, pace: Pace
) -> Answers:
    for index, question in enumerate(questions):
        images = list(question.images)
        text = model.generate(question.prompt, images=images, max_new_tokens=max_new_tokens)
        yield [index], [text]


def _key(question: Question) -> tuple[str, str, tuple[str, ...]]:
    return str(question.id), question.prompt, tuple(_names(question.images))


def _names(images: Sequence[ImageSource]) -> Iterator[str]:
    """Yield the images' paths; one that was never a file has no name that lasts."""
    return (str(image) if isinstance(image, Path) else "" for image in images)
