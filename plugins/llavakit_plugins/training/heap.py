"""Lets glibc keep memory that a step on a CPU frees, for the next step needs as much again.

By default it gives freed memory back to the system where there is more of it than twice the largest
piece that was freed so far, and takes it anew page by page, each of them cleared: 5,000 to 16,000
pages a step of `tiny`, a twentieth of its CPU time. What PyTorch's tuning guide has against it,
another allocator, must be there before a process begins.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST = 32 << 20  # bytes: larger pieces are taken from the system and given back one by one
_KEPT = 2 * _LARGEST  # bytes that may be free at the heap's end


def settle() -> None:
    """Set at once what glibc itself comes to when a piece of 32 MB is freed.

    Does nothing without glibc, and where variables of the environment say how it takes memory.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if set_option is not None:
        set_option(_MMAP, _LARGEST)
        set_option(_TRIM, _KEPT)
