"""What the server lets in, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each is a flag of `llava-run serve`, or a constant of the protocol."""

    places: int = 16  #: Answers that are written at once.
    queue: int = 64  #: Requests that may wait for a place; more get status 429.
    chunk: int = 256  #: Rows of prompts that are read between two steps of decoding.
    cache_rows: int | None = None  #: Rows of the key-value cache; None: what memory allows.
    body_bytes: int = 32 * 2**20
    bodies_bytes: int = 256 * 2**20  #: Of all bodies that are being read or parsed.
    image_pixels: int = 50_000_000
    video_pixels: int = 5_000_000_000  #: Of all frames of one video: 80 seconds of 1080p.
    images: int = 8  #: In one request, videos included.
    choices: int = 8  #: The largest `n`.
    default_tokens: int = 512  #: Of an answer whose request names no number.
    tokens: int | None = None  #: The most of an answer; None: what the model can.
    seconds: float = 600.0  #: From a request's last byte to its answer's last.
    header_seconds: float = 15.0
    body_seconds: float = 60.0
    send_seconds: float = 60.0  #: That a client may take to read what is sent.
    grace_seconds: float = 20.0  #: For the answers that are being written when the server stops.
    connections: int = 1000
    workers: int = 2  #: Threads that parse requests and prepare images.
