"""Answers many questions with a model, in batches of similar length; answers are saved at once."""

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
_MORE_TOKENS = 64  # length of a second answer step, as in the original LLaVA's code


@dataclass(frozen=True)
class Pace:
    """The size of a batch, and the threads that prepare images."""

    batch_size: int
    workers: int
    """Threads that read and prepare images of the next batches; 0 means in the model's thread."""


class AnswerFile:
    """A file of answers in LLaVA's format, one JSON object per line, written as they come.

    With `resume`, the answers of an interrupted attempt are read; half a line that a killed process
    left is dropped. Raises DataError for a line that is not an answer of this run.
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
        """Return the answer to a question with the same id, prompt and images, or None."""
        return self._known.get(_key(question))

    def append(self, questions: Sequence[Question], answers: Sequence[str]) -> None:
        """Append answers and wait until they are on disk."""
        self._lines.append(self.row(q, a) for q, a in zip(questions, answers, strict=True))
        self._known |= {_key(q): a for q, a in zip(questions, answers, strict=True)}

    def row(self, question: Question, answer: str, **metadata: Any) -> Row:
        """Return one line: the keys of the original LLaVA, and further facts about the question."""
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
    """Return the greedy answer to each question; answers that `file` holds are not computed again.

    A LlavaModel answers in batches of questions with similar length; the answers are those of one
    question at a time. Any other model with `generate` answers one by one. Raises DataError for a
    question that leaves no room for an answer, and Stopped if the user asked to stop; the answers
    until then are in the file.
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
    # similar lengths in one batch: little padding, and the answers end at about the same time
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
    """Return the answers; continue those that lack the text `then` of their question.

    ScienceQA's answers with reasons first need it: the model writes reasons, and then the second
    step asks for the letter.
    """
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
    """Yield every batch with its pixels, prepared ahead in threads.

    Threads are enough, because Pillow releases the GIL while it decodes and resizes.
    """

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
                # at most one batch for each worker is ahead: pixels of all batches would not fit
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
    """Yield the images' paths; an image that is not a file has no lasting name and gives ""."""
    return (str(image) if isinstance(image, Path) else "" for image in images)
