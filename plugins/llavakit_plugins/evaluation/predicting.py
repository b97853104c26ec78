"""Answers a file of questions with a model or a service, for `llava-run predict`.

Work in progress lies in the folder `OUT.work`; OUT itself is written when all is answered, in the
order of the questions. The same command, run again after a kill, asks what is left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llavakit import (
    ChatError,
    ChatModel,
    DataError,
    LlavaError,
    Question,
    RecipeError,
    and_more,
    explain_write,
    new_file,
    one_writer,
    peek_json,
    printable_json,
    write_text,
)
from llavakit.contracts.model import Sampling
from llavakit.contracts.run import ProcessGroup, Progress
from llavakit_plugins.datasets.rows import read_lines
from llavakit_plugins.evaluation.answer_files import AnswerFile, row_of
from llavakit_plugins.evaluation.answering import Pace, ask
from llavakit_plugins.evaluation.question_files import messages_of
from llavakit_plugins.generation.requests.ledger import SUFFIX, Entry, Ledger, Request, record_of
from llavakit_plugins.generation.requests.send_all import send_all

_SETTINGS, _ANSWERS, _LEDGER = "settings.json", "answers.jsonl", f"ledger{SUFFIX}"


@dataclass(frozen=True)
class Job:
    """A file to write, and what decides the answers in it."""

    out: Path
    model_id: str
    """What the answers call the model."""
    metadata: Mapping[str, Any]
    """What every answer says of how it was made: the sampling."""
    settings: Mapping[str, Any]
    """What must be the same where an interrupted attempt is gone on with."""

    @property
    def work(self) -> Path:
        """The folder of work in progress."""
        return self.out.with_name(f"{self.out.name}.work")

    def done_before(self, questions: Sequence[Question]) -> bool:
        """Say whether OUT holds the answers already. Raises DataError where it holds others."""
        if not self.out.exists():
            return False
        other = DataError(
            f"{self.out} is there already, and not with these questions' answers of this model; "
            "name another file, or remove it"
        )
        # not strict zip: a file that is longer or shorter than the questions is another one, too
        for line, question in zip_longest(read_lines(self.out), questions):
            if line is None or question is None:
                raise other
            row, own = line[1], row_of(question, str(line[1].get("text")), self.model_id)
            same = all(row.get(key) == own[key] for key in ("question_id", "prompt", "model_id"))
            made = row.get("metadata")
            made = made if isinstance(made, dict) else {}
            if not same or not self.metadata.items() <= made.items():
                raise other
        return True

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the folder of work in progress; no other process may write to it."""
        with explain_write(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        with one_writer(self.work):
            path = self.work / _SETTINGS
            if path.exists():
                # through JSON and back, as a tuple becomes a list there and would never be equal
                known, own = peek_json(path), json.loads(json.dumps(self.settings))
                changed = [key for key in known | own if known.get(key) != own.get(key)]
                if changed:
                    raise RecipeError(
                        f"{self.work} holds answers that were made with another "
                        f"{and_more(changed, spell='`{}`'.format)}; state the same again, name "
                        "another OUT, or remove that folder"
                    )
            write_text(path, json.dumps(self.settings, indent=1))
            try:
                yield
            except LlavaError:  # a model that is not there, say: nothing is answered yet
                if {item.name for item in self.work.iterdir()} <= {_SETTINGS, ".lock"}:
                    shutil.rmtree(self.work, ignore_errors=True)
                raise

    def write(self, answers: Iterable[tuple[Question, str, Mapping[str, Any]]]) -> None:
        """Write OUT, whole or not at all."""
        with new_file(self.out) as file:
            for question, text, more in answers:
                metadata = {**self.metadata, **more}
                row = row_of(question, text, self.model_id, metadata=metadata)
                print(printable_json(json.dumps(row, ensure_ascii=False)), file=file)


def predict(
    model: Any,
    questions: Sequence[Question],
    job: Job,
    sampling: Sampling,
    pace: Pace,
    *,
    process_group: ProcessGroup,
    progress: Progress,
    stopping: Callable[[], bool],
) -> None:
    """Answer with a model of ours, on all processes of the group, and write `job.out`.

    Raises Stopped if the user asked to stop; what was answered until then is kept.
    """
    path = job.work / _ANSWERS
    file = AnswerFile(path, job.model_id, resume=path.exists(), process_group=process_group)
    answers = ask(model, questions, file, sampling, pace, progress=progress, stopping=stopping)
    if process_group.is_main:
        job.write((q, a, {}) for q, a in zip(questions, answers, strict=True))
        # only after OUT is whole on the disk: a kill before that loses no answer
        shutil.rmtree(job.work, ignore_errors=True)


def predict_by_service(
    chat: ChatModel,
    questions: Sequence[Question],
    requests: Callable[[], Iterable[Request]],
    job: Job,
    *,
    concurrency: int,
    budget_usd: float | None,
    progress: Progress,
    stopping: Callable[[], bool],
) -> None:
    """Answer by a chat model and write `job.out`. The replies stay in `job.work`: they are paid.

    A question that the service refuses for good gets an empty answer, and the reason in its
    metadata. Raises ChatError where others have no answer yet.
    """
    total = len(questions)
    with Ledger(job.work / _LEDGER, identity=chat.identity) as ledger:
        done = sum(record_of(chat.identity, request).key in ledger for request in requests())
        progress(done, total)

        def show(entry: Entry) -> None:
            nonlocal done
            done += 1
            progress(done, total, "" if ledger.usd is None else f"{ledger.usd:.2f} USD")

        try:
            tally = send_all(
                chat,
                requests,
                ledger,
                concurrency=concurrency,
                budget_usd=budget_usd,
                stopping=stopping,
                progress=show,
            )
        except ChatError as error:
            raise _again(error) from None
        waiting = [why for key, why in tally.unanswered.items() if key not in tally.refused]
        if waiting:
            raise _again(
                ChatError(
                    f"{len(waiting)} of {total} questions have no answer for now; run the same "
                    f"command again, which asks these alone. The last: {waiting[-1]}"
                )
            )

        def answers() -> Iterator[tuple[Question, str, Mapping[str, Any]]]:
            for question, request in zip(questions, requests(), strict=True):
                key = record_of(chat.identity, request).key
                entry = ledger.get(key)
                if entry is None:
                    yield question, "", {"finish": "refused", "error": tally.unanswered.get(key)}
                else:
                    yield question, entry.text, {"finish": entry.finish, "model": entry.model}

        job.write(answers())


def requests_of(questions: Sequence[Question]) -> Iterator[Request]:
    """Yield the request for each question."""
    for question in questions:
        yield Request(messages_of(question), 0, str(question.id))


def _again(error: ChatError) -> ChatError:
    """Return the error in the words of this command, which has no flag for going on."""
    return ChatError(str(error).replace(" with --resume", ""))


def fingerprint(folder: Path) -> str:
    """Return what tells the files of a model from others at the same place: sizes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # not their contents: a model may have many gigabytes, and each call of the command asks this
    stamps = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]
    return sha256(json.dumps(stamps).encode()).hexdigest()[:16]
