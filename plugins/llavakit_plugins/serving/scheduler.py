"""Writes the answers to many requests together, in one thread that has the model to itself.

A request waits, is read in chunks, and then its answers are written beside those of others: between
two steps they join, and they leave when they end or their client does. Between two steps at most
one chunk of prompts is read, so nobody who is being answered waits for longer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from llavakit.contracts.errors import LlavaError, ModelError
from llavakit_plugins.serving.batch import Batch, Prompt
from llavakit_plugins.serving.metrics import Metrics
from llavakit_plugins.serving.writing import Choice, Piece, Voice

_log = logging.getLogger(__name__)


class Full(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Job:
    """One request. The scheduler's thread owns it from `submit` on, but for `gone`."""

    prompt: Prompt
    choices: list[Choice]
    inbox: Any = None  #: Where updates go; not for the scheduler.
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False  #: Set, by any thread, where nobody waits for the answer any more.
    first: float | None = None  #: When its first token came.


Update: TypeAlias = tuple[Job, int, "Piece | BaseException"]
"""What happened to a choice of a job: a piece of its text, or why none will come."""


class Scheduler:
    """Runs `batch` in a thread; `deliver` is called there with what each turn has brought."""

    def __init__(
        self,
        batch: Batch,
        voice: Voice,
        *,
        places: int,
        waiting: int,
        deliver: Callable[[list[Update]], None],
        metrics: Metrics,
    ) -> None:
        self._batch, self._voice, self._places, self._most = batch, voice, places, waiting
        self._deliver, self._metrics = deliver, metrics
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0  # jobs that have no place yet
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._writing: list[tuple[Job, Choice]] = []  # by place
        self._updates: list[Update] = []
        self._by_age = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.error: BaseException | None = None  #: What ended the thread.
        metrics.levels |= {
            "requests_waiting": lambda: self._queued,
            "requests_reading": lambda: len(self._reading),
            "answers_writing": lambda: len(self._writing),
        }

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    @property
    def full(self) -> bool:
        """Say whether as many requests wait as may, beside those that the next turn lets in."""
        free = self._places - len(self._reading) - len(self._writing)
        return self._queued >= self._most + max(0, free)

    @property
    def busy(self) -> int:
        """Return how many requests wait or are being answered."""
        return self._queued + len(self._reading) + len({id(job) for job, _ in self._writing})

    def submit(self, job: Job) -> None:
        """Take a request. Raises Full where too many wait, or where the thread has ended."""
        with self._lock:  # what is put here is seen by the thread, also where that ends now
            if self.full or self.error is not None:
                raise Full
            self._queued += 1
            self._inbox.put(job)

    def drop(self, job: Job) -> None:
        """Free what a request holds before the next step; harmless for one that has ended."""
        job.gone = True
        self._inbox.put(_nothing)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function that needs the model between two steps; return its result to come."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def stop(self) -> None:
        """End the thread after the step that it is in; what is unfinished gets no answer."""
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    # -- the model's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._receive():
                self._turn()
                self._flush()
        except BaseException as error:
            with self._lock:
                self.error = error
            _log.exception("the model's thread ended")
            while not self._inbox.empty():  # what came since; nothing more will
                if isinstance(item := self._inbox.get(), Job):
                    self._waiting.append(item)
                elif item is not None:
                    item()
            jobs = [*self._waiting, *self._reading, *(job for job, _ in self._writing)]
            self._updates = [(job, 0, error) for job in jobs]
            self._flush()

    def _flush(self) -> None:
        """Deliver what a turn has brought; all at once, for each wakes the event loop."""
        if self._updates:
            updates, self._updates = self._updates, []
            self._deliver(updates)

    def _receive(self) -> bool:
        """Take what was submitted, waiting where there is nothing else to do; False to end."""
        idle = not (self._waiting or self._reading or self._writing)
        while True:
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, Job):
                self._waiting.append(item)
            else:
                item()
            del item  # while the thread waits, it holds on to nobody's request
            idle = not (self._waiting or self._reading or self._writing)

    def _turn(self) -> None:
        self._drop_gone()
        self._admit()
        if self._reading:
            self._read()
            self._flush()  # first tokens do not wait for the second
        if self._writing:
            self._write()

    def _drop_gone(self) -> None:
        left = [job for job in self._waiting if not job.gone]
        self._leave_queue(len(self._waiting) - len(left))
        abandoned = len(self._waiting) - len(left) + sum(job.gone for job in self._reading)
        self._waiting = deque(left)
        self._reading = [job for job in self._reading if not job.gone]
        places = [place for place, (job, _) in enumerate(self._writing) if job.gone]
        abandoned += len({id(self._writing[place][0]) for place in places})
        self._free(places)
        if abandoned:
            self._metrics.count("abandoned_total", abandoned)

    def _leave_queue(self, number: int) -> None:
        with self._lock:
            self._queued -= number

    def _admit(self) -> None:
        """Let requests in, in the order they came, while there are places and memory."""
        held = [job.prompt.length + choice.room for job, choice in self._writing]
        for job in self._reading:
            held += [job.prompt.length + choice.room for choice in job.choices]
        while self._waiting:
            job = self._waiting[0]
            more = [job.prompt.length + choice.room for choice in job.choices]
            whole = [*held, *more]
            # the first one waits for room and no later one passes it, as a large request would
            # never be served; where nothing is held it is tried in any case
            if held and (len(whole) > self._places or not self._batch.fits(whole)):
                return
            held = whole
            self._reading.append(self._waiting.popleft())
            self._leave_queue(1)

    def _read(self) -> None:
        """Read a chunk: by turns of the oldest prompt, and of the one with the least left."""
        # by age alone a short prompt would wait for a long one;
        # by length alone a long one might never end
        self._by_age = not self._by_age
        order = list(self._reading)
        if not self._by_age:
            order.sort(key=lambda job: (job.prompt.chunks, job.prompt.length - job.prompt.read))
        by_prompt = {id(job.prompt): job for job in order}
        try:
            touched = self._batch.read([job.prompt for job in order])
        except Exception as error:
            self._fail([order[0]], error)
            return
        for prompt in touched:
            if prompt.logits is not None:
                self._begin(by_prompt[id(prompt)])

    def _begin(self, job: Job) -> None:
        """Give a request that is read its places and its first tokens."""
        self._reading.remove(job)
        self._metrics.count("prompt_tokens_total", job.prompt.length)
        first = len(self._writing)
        try:
            for _ in job.choices:
                self._batch.join(job.prompt)
        except Exception as error:
            # a request with several choices may have got some of its places
            self._batch.leave(range(first, len(self._batch)))
            self._fail([job], error)
            return
        self._writing += [(job, choice) for choice in job.choices]
        logits_1V = job.prompt.logits
        # the batch has its own copy; the prompt's cache would take the memory twice
        job.prompt.cache = job.prompt.logits = None
        self._choose(logits_1V, range(first, len(self._writing)))

    def _write(self) -> None:
        """Write one token more of every answer."""
        begun = time.monotonic()
        try:
            logits_SV = self._batch.step([choice.last for _, choice in self._writing])
        except Exception as error:
            jobs = list({id(job): job for job, _ in self._writing}.values())
            self._fail(jobs, error)
            return
        self._choose(logits_SV, range(len(self._writing)))
        self._metrics.time("decode_step_seconds", time.monotonic() - begun)

    def _choose(self, logits_SV: Any, places: Sequence[int]) -> None:
        """Choose the next tokens of the answers at `places`; free the places of those that end."""
        choices = [self._writing[place][1] for place in places]
        pieces = self._voice.speak(logits_SV, choices)
        ended = []
        now = time.monotonic()
        for place, piece in zip(places, pieces, strict=True):
            job, choice = self._writing[place]
            if job.first is None:
                job.first = now
                self._metrics.time("time_to_first_token_seconds", now - job.arrived)
            self._updates.append((job, choice.index, piece))
            if piece.finish is not None:
                ended.append(place)
        self._metrics.count("generation_tokens_total", len(pieces))
        self._free(ended)

    def _free(self, places: Sequence[int]) -> None:
        if places:
            order = self._batch.leave(places)
            self._writing = [self._writing[before] for before in order]

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Give up requests with which the model cannot go on."""
        if not isinstance(error, LlavaError):
            _log.error("the model failed", exc_info=error)
        for job in jobs:
            for choice in job.choices:
                self._updates.append((job, choice.index, error))
        gone = {id(job) for job in jobs}
        self._reading = [job for job in self._reading if id(job) not in gone]
        self._free([place for place, (job, _) in enumerate(self._writing) if id(job) in gone])


def _nothing() -> None:
    """Wake the thread."""


def check_room(length: int, wanted: int, longest: int) -> int:
    """Return how many tokens an answer may have. Raises ModelError where there is room for none."""
    room = min(wanted, longest - length)
    if room < 1:
        raise ModelError(
            f"the prompt has {length} tokens with its images; the language model reads at most "
            f"{longest}: shorten it"
        )
    return room
