"""Reads blocks of a data set in several processes of one machine, to the same columns as in one.

The processes are forks, which have the tokenizer and other large things without a copy. Each reads
pieces of blocks and sends their columns; files are written by the process that forked them. So a
fork may be killed at any time, and at the end all are. A piece that a fork cannot read in silence,
for an error, a warning or a message, is read once more by the process that forked it, which then
raises and says what it would have without forks.
"""

from __future__ import annotations

import gc
import io
import logging
import multiprocessing
import os
import pickle
import warnings
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from llavakit import TrainingError
from llavakit.contracts.run import ProcessGroup
from llavakit_plugins.datasets.columns import Columns, joined
from llavakit_plugins.training.forks import begin_fork, held_signals, how_ended, may_fork
from llavakit_plugins.training.rows import Reading, Shows

WORTH = 1 << 13  # samples: a third of a second in one process, and forks take a tenth
_MOST = 8
_PIECE = 1 << 10  # samples, of which a fork has two pieces to do: their columns are held in memory
_MOST_COPIED = 1 << 24  # bytes of a data set's own objects
_BLOB = 1 << 10  # bytes; larger ones are not copied

_log = logging.getLogger("llavakit")


def processes_for(group: ProcessGroup, workers: int | None) -> int:
    """Return how many processes may read for this one: a recipe's `workers`, but no more than its
    share of this machine's cores."""
    if not may_fork():
        return 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or group.size) if group.size > 1 else 1
    share = len(os.sched_getaffinity(0)) // ranks
    return max(1, min(share, _MOST if workers is None else workers))


def read_blocks(
    made: Reading, blocks: Sequence[range], processes: int, shows: Shows
) -> Generator[Columns]:
    """Yield the columns of each block, in order; `shows` is told how many samples are done.

    Raises what `Reading.block` raises of the first sample that cannot be read, and TrainingError
    where a process was killed. Must be closed.
    """
    total = sum(map(len, blocks))
    sent = _packed(made) if processes > 1 and total >= WORTH else None
    done = 0

    def shown(read: int) -> None:
        shows(done + read)

    if sent is None:
        for block in blocks:
            yield made.block(block.start, block.stop, shown)
            done += len(block)
        return
    cut = [[block[at : at + _PIECE] for at in range(0, len(block), _PIECE)] for block in blocks]
    with _forks(sent, processes) as forks:
        found = _in_order(forks, [piece for pieces in cut for piece in pieces])
        for pieces in cut:
            parts = []
            for piece in pieces:
                part = next(found)
                if part is None:
                    part = made.block(piece.start, piece.stop, shown)
                parts.append(part)
                done += len(piece)
                shows(done)
            yield joined(parts, made.counts(parts))


class _Packed(NamedTuple):
    """What a fork makes its own copy of, and what it has without."""

    pickled: bytes
    shared: Sequence[Any]

    def own(self) -> Reading:
        """Return the fork's own copy."""
        found: Reading = _Unpacker(self).load()
        return found


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: _Packed) -> None:
        super().__init__(io.BytesIO(packed.pickled))
        self._shared = packed.shared

    def persistent_load(self, number: int) -> Any:
        return self._shared[number]


class _Packer(pickle.Pickler):
    """Pickles what may hold a file's position, or a connection: forks must not share those.

    Numbers, blobs and the tokenizer are memory that nobody writes to. Raises OverflowError where
    the rest is too much to copy.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pickled, self.shared = bytearray(), list[Any]()
        self._tokenizer = tokenizer
        super().__init__(self, protocol=5)

    def write(self, pickled: bytes) -> None:
        self.pickled += pickled
        if len(self.pickled) > _MOST_COPIED:
            raise OverflowError("there is too much of it to copy")

    def persistent_id(self, held: Any) -> int | None:
        is_memory = (
            held is self._tokenizer
            or isinstance(held, array)
            or (isinstance(held, np.ndarray) and not held.dtype.hasobject)
            or (isinstance(held, bytes) and len(held) > _BLOB)
        )
        if not is_memory:
            return None
        self.shared.append(held)
        return len(self.shared) - 1


def _packed(made: Reading) -> _Packed | None:
    """Return what forks need, or None where it cannot be copied, as may be with a plugin's."""
    packer = _Packer(made.tokenizer)
    try:
        packer.dump(made)
    except Exception as error:  # whatever stands in a plugin's way
        _log.info("`%s` is read by one process: it cannot be copied (%s)", made.data.name, error)
        return None
    return _Packed(bytes(packer.pickled), packer.shared)


class _Fork:
    """One of the processes, as the one that forked it sees it."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe

    def received(self) -> tuple[int, Columns | None]:
        """Return a piece's number and columns. Raises TrainingError where the process is gone."""
        try:
            found: tuple[int, Columns | None] = self.pipe.recv()
            return found
        except (EOFError, OSError):
            self.process.join()
        raise TrainingError(
            f"a process that read data {how_ended(self.process.exitcode)}; close other programs, "
            "or set workers = 0, which reads in one process, and go on with --resume"
        )


@contextmanager
def _forks(sent: _Packed, count: int) -> Iterator[list[_Fork]]:
    """Yield forks that wait for pieces, and end them; fewer than `count` where no more can be."""
    context = multiprocessing.get_context("fork")
    forks: list[_Fork] = []
    try:
        with held_signals():
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(sent, there))
                try:
                    process.start()
                except OSError as error:
                    here.close()
                    _log.info("data is read by %d more processes (%s)", len(forks), error)
                    break
                finally:
                    there.close()  # the end of the pipe says that of the process
                forks.append(_Fork(process, here))
        yield forks
    finally:
        for fork in forks:
            fork.process.kill()  # it has nothing to put away
        for fork in forks:
            fork.process.join()
            fork.pipe.close()


def _in_order(forks: Sequence[_Fork], pieces: Sequence[range]) -> Iterator[Columns | None]:
    """Yield the columns of each piece, None where a fork did not read it in silence."""
    free = [*forks, *forks]  # the next piece waits in the pipe
    of_pipe: dict[Any, _Fork] = {fork.pipe: fork for fork in forks}
    held: dict[int, Columns | None] = {}
    given = 0
    for wanted in range(len(pieces)):
        while True:
            while free and given < min(len(pieces), wanted + 2 * len(forks)):
                with suppress(OSError):  # of one that is gone the pipe's other end says so
                    free.pop(0).pipe.send((given, pieces[given]))
                given += 1
            if wanted in held or not forks:  # of none, nothing is read
                break
            for pipe in wait(list(of_pipe)):
                number, columns = of_pipe[pipe].received()
                held[number] = columns
                free.append(of_pipe[pipe])
        yield held.pop(wanted, None)


def _work(sent: _Packed, pipe: Connection) -> None:
    """Read pieces until this process is ended, which the end of its parent does, too."""
    try:
        begin_fork()
        gc.freeze()  # what is not looked at stays shared
        made: Reading | None = None
        with suppress(EOFError, OSError), _listening() as noises:
            while True:
                number, piece = pipe.recv()
                found = None
                with suppress(BaseException):  # the one that forked this one shall raise it
                    made = made or sent.own()
                    found = made.block(piece.start, piece.stop)
                pipe.send((number, None if noises() else found))
    finally:
        os._exit(1)  # nothing that was begun before the fork may end here


@contextmanager
def _listening() -> Iterator[Callable[[], bool]]:
    """Silence this process for good, and yield what says whether it would have said something
    since it was last asked."""
    heard = io.StringIO()
    logging.Logger.handle = lambda *_: heard.write(".")  # type: ignore[method-assign,assignment]
    with (
        redirect_stdout(heard), redirect_stderr(heard),
        warnings.catch_warnings(record=True) as warned,
    ):  # fmt: skip

        def noises() -> bool:
            noisy = bool(heard.tell() or warned)
            heard.seek(0)
            warned.clear()
            return noisy

        yield noises
