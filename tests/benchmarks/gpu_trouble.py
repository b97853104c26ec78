"""Sections that go wrong in every way, for the test of gpu.py: each first finds something."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import torch
from tests.benchmarks.gpu_session import Session


def hangs(session: Session) -> None:
    """It and what it has started do not end, however kindly they are asked to."""
    session.row("hangs", found=1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


def crashes(session: Session) -> None:
    session.row("crashes", found=2)
    print("before the crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def fails(session: Session) -> None:
    session.row("fails", found=3)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def exhausts(session: Session) -> None:
    session.row("exhausts", found=4)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def errs(session: Session) -> None:
    """A result that is not a number is wrong, too."""
    session.row("errs", what="fine", error=0.001, limit=0.01)
    session.row("errs", what="wrong", error=0.02, limit=0.01)
    session.row("errs", what="no number", error=float("nan"), limit=0.01)
