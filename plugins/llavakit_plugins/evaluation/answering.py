"""Answers many questions with a model, in batches of similar length; answers are saved at once.

Which questions form a batch depends on all questions and the batch's size alone. So neither an
interrupted attempt nor the number of processes changes a batch, and hence no answer: not by the
rounding of 16 bits, and not by a seed.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

from llavakit import Answering, DataError, Encoded, LlavaModel, ModelError, Question, Stopped
from llavakit.contracts.model import Sampling
from llavakit.contracts.run import Progress
from llavakit_plugins.datasets.rows import listed
from llavakit_plugins.evaluation.answer_files import AnswerFile as AnswerFile
from llavakit_plugins.evaluation.question_files import asked_of
from llavakit_plugins.training.forked import forked, shares_for

_MORE_TOKENS = 64  # length of a second answer step, as in the original LLaVA's code
_LOOK = 4  # batches of one process between looks at whether all are to stop

Batch = list[int]
"""The indices of questions that are answered together."""


@dataclass(frozen=True)
class Pace:
    """The size of a batch, and the threads that prepare images."""

    batch_size: int
    workers: int
    """Threads that read and prepare images of the next batches; 0 means in the model's thread."""
    processes: int = 1
    """Processes that share the batches, where a model of ours is on a CPU, each with one thread,
    which prepares images, too; see `ask`."""


def ask(
    model: Any,
    questions: Sequence[Question],
    file: AnswerFile,
    sampling: Sampling,
    pace: Pace,
    *,
    progress: Progress,
    stopping: Callable[[], bool],
    note: str = "",
) -> list[str]:
    """Return the answer to each question; answers that `file` holds are not computed again.

    A model answers in batches of questions with similar length; greedy answers are those of one
    question at a time. One that has `generate` alone, or whose batches are not alike, answers one
    by one. The processes of the file's group take the batches in turn; the main one alone returns
    the answers of all. With a temperature and a seed, each batch is drawn with a seed of its own.

    Of a process that is alone, forks answer where `pace` says so; it keeps what they send.

    `stopping` is asked equally often in all processes. Raises DataError for a question that leaves
    no room for an answer, and Stopped if the user asked to stop; the answers until then are in the
    file.
    """
    group = file.process_group
    batches = _batches(model, questions, pace.batch_size)
    known = (file.get(question) is not None for question in questions)
    done_before = group.broadcast(bytes(known) if group.is_main else b"")
    open_batches = [
        (number, batch)
        for number, batch in enumerate(batches)
        if not all(done_before[index] for index in batch)
    ]
    own = open_batches[group.rank :: group.size]
    left = sum(len(batch) for _, batch in open_batches)
    progress(len(questions) - left, len(questions), note)
    asked = 0
    # every process counts to the same number: to ask whether to stop, all must
    turns = -(-len(open_batches) // group.size)
    # by all batches, also those that are answered: an attempt that goes on computes as the first
    shares = min(shares_for(model, group, pace.processes), max(1, len(batches)))
    workers = pace.workers if shares == 1 else 0

    def share(number: int) -> Iterator[tuple[Batch, list[str]]]:
        return _answers(model, questions, own[number::shares], sampling, workers)

    with closing(forked(shares, share, "answered questions")) as answered:
        for turn in range(turns):
            if turn < len(own):
                indices, texts = next(answered)
                file.append([questions[index] for index in indices], texts)
                asked += len(indices)
                # what the others have done is estimated by this process's own share
                done = len(questions) - left + min(left, asked * group.size)
                progress(done, len(questions), note)
            look = group.size == 1 or turn % _LOOK == _LOOK - 1
            if look and turn + 1 < turns and stopping():
                raise Stopped
    file.join()
    if not group.is_main:
        return []
    found = [file.get(question) for question in questions]
    if None in found:
        raise DataError(
            f"{file.path.parent} lacks what other processes answered; let them write to a folder "
            "that all of them share"
        )
    return [answer for answer in found if answer is not None]


@dataclass(frozen=True)
class _Room:
    """How long prompts are, and may be, for a model that answers several as it answers each."""

    model: Any
    visual_tokens: int
    most: int

    @classmethod
    def of(cls, model: Any) -> _Room | None:
        """Return it for a model of ours, or an exported one; None for any other."""
        if isinstance(model, LlavaModel):
            return cls(model, model.visual_tokens, model.language.max_length)
        if isinstance(model, Answering) and getattr(model, "batches_alike", False):
            exported: Any = model
            return cls(model, exported.visual_tokens, exported.max_length)
        return None

    def taken(self, question: Question, begun: str = "") -> int:
        """Return how many rows of the sequence a question takes.

        Raises ModelError, naming the question, where the model cannot read it.
        """
        try:
            encoded: Encoded = self.model.prompt(*asked_of(question), begun=begun)
        except ModelError as error:
            raise ModelError(f"question `{question.id!s:.200}`: {error}") from error
        return encoded.length(self.visual_tokens)


def _batches(model: Any, questions: Sequence[Question], size: int) -> list[Batch]:
    """Return the batches, of similar length: little padding, and they end at about one time.

    Raises DataError naming the questions that leave no room for an answer.
    """
    room = _Room.of(model)
    if room is None:
        return [[index] for index in range(len(questions))]
    lengths = array("l", (room.taken(question) for question in questions))
    most = room.most
    long = [questions[index].id for index, length in enumerate(lengths) if length >= most]
    if long:
        raise DataError(
            f"with its images, question {listed(long)} leaves no room for an answer: the language "
            f"model reads at most {most} tokens; shorten it or leave it out"
        )
    # `sorted` is stable: questions of one length keep their order, in every attempt
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def _answers(
    model: Any,
    questions: Sequence[Question],
    batches: Sequence[tuple[int, Batch]],
    sampling: Sampling,
    workers: int,
) -> Iterator[tuple[Batch, list[str]]]:
    """Yield the answers of each batch, in the batches' order."""
    if not isinstance(model, Answering):
        usual = asdict(Sampling())
        stated = {key: value for key, value in asdict(sampling).items() if value != usual[key]}
        stated["max_new_tokens"] = sampling.max_new_tokens
        for _, batch in batches:
            for question in (questions[index] for index in batch):
                prompt, images = asked_of(question)
                yield batch, [model.generate(prompt, images=list(images), **stated)]
        return
    for (number, batch), pixels in _prepared(model, questions, batches, workers):
        asked = [questions[index] for index in batch]
        chosen = replace(sampling, seed=_seed(sampling, number))
        prompts = [asked_of(question) for question in asked]
        texts = model.answer(prompts, chosen, pixels_IHW=pixels)
        yield batch, _gone_on(model, asked, texts)


def _seed(sampling: Sampling, batch: int) -> int | None:
    if sampling.seed is None:
        return None
    return int.from_bytes(sha256(f"{sampling.seed} {batch}".encode()).digest()[:6], "big")


def _gone_on(
    model: Answering[Any], questions: Sequence[Question], answers: Sequence[str]
) -> list[str]:
    """Return the answers; continue those that lack the text `then` of their question.

    ScienceQA's answers with reasons first need it: the model writes reasons, and then the second
    step asks for the letter.
    """
    whole = list(answers)
    room = _Room.of(model)
    begun: dict[int, str] = {}
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if question.then and question.then not in answer and room is not None:
            # the text of the original's second step: the reasons, and then ` ###\nANSWER:`
            start = f" {answer}".rstrip() + f" {question.then}"
            if room.taken(question, begun=start) < room.most:
                begun[number] = start
    if begun:
        prompts = [asked_of(questions[number]) for number in begun]
        ends = model.answer(prompts, Sampling(_MORE_TOKENS), begun=list(begun.values()))
        for number, end in zip(begun, ends, strict=True):
            whole[number] = f"{answers[number]}\n{questions[number].then} {end}".strip()
    return whole


Numbered = tuple[int, Batch]


def _prepared(
    model: Answering[Any],
    questions: Sequence[Question],
    batches: Sequence[Numbered],
    workers: int,
) -> Iterator[tuple[Numbered, Any]]:
    """Yield every batch with its pixels, prepared ahead in threads.

    Threads are enough, because Pillow releases the GIL while it decodes and resizes.
    """

    def prepare(indices: Batch) -> Any:
        asked = [questions[index] for index in indices]
        names = ", ".join(f"`{question.id}`" for question in asked[:3])
        where = f"questions {names}{' …' if len(indices) > 3 else ''}"
        return model.join([model.prepare(question.images, where) for question in asked])

    if not workers:
        yield from ((batch, prepare(batch[1])) for batch in batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Numbered, Future[Any]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(prepare, batch[1])))
                # at most one batch for each worker is ahead: pixels of all batches would not fit
                if len(waiting) > workers:
                    ready, pixels = waiting.popleft()
                    yield ready, pixels.result()
            while waiting:
                ready, pixels = waiting.popleft()
                yield ready, pixels.result()
        finally:
            pool.shutdown(cancel_futures=True)
