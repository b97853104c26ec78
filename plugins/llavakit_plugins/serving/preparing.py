"""From a request's body to what the model reads: in a thread, and nothing of it trusted."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llavakit import Encoded, Reader, read_messages
from llavakit.contracts.data import ImageSource, Sample, Video
from llavakit.contracts.errors import DataError, LlavaError, ModelError
from llavakit_plugins.fetching.images import ImageFetcher
from llavakit_plugins.media import clip
from llavakit_plugins.media.addresses import embedded, is_embedded
from llavakit_plugins.serving.batch import Prompt
from llavakit_plugins.serving.errors import RequestError
from llavakit_plugins.serving.limits import Limits
from llavakit_plugins.serving.requests import ChatRequest, check_messages, read_chat
from llavakit_plugins.serving.scheduler import check_room
from llavakit_plugins.serving.writing import Choice, Voice

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of some others, Pillow runs a program
_PIECE = 1 << 14  # characters of a text that are tokenised at once, where only the size matters


@dataclass
class Prepared:
    """A request that is ready for the scheduler."""

    request: ChatRequest
    prompt: Prompt
    choices: list[Choice]


class Preparer:
    """Reads requests for one model. Its methods run in several threads at once."""

    def __init__(
        self,
        model: Any,
        voice: Voice,
        longest: int,
        *,
        name: str,
        limits: Limits,
        image_hosts: Sequence[str] = (),
    ) -> None:
        self._model, self._voice, self._longest = model, voice, longest
        self._name, self._limits = name, limits
        self._fetcher = ImageFetcher(image_hosts, limits.body_bytes)
        self.seen: Callable[[Sample], None] = lambda sample: None  #: Called with each request.

    def __call__(self, body: bytes) -> Prepared:
        """Return a request. Raises RequestError for one that cannot be answered."""
        request = read_chat(body, self._limits)
        if request.model not in (None, self._name):
            raise RequestError(
                404,
                f"The model `{request.model:.200}` does not exist; this server has `{self._name}`",
                param="model",
                code="model_not_found",
            )
        sample, encoded, length = self.conversation(request.messages)
        try:
            sampling = request.sampling(self._limits, tuple(self._model.stops))
            room = check_room(length, sampling.max_new_tokens, self._longest)
            pixels = self._model.prepare(sample.images, "the request")
        except LlavaError as error:
            raise refused(error) from error
        prompt = Prompt(encoded, pixels, length, room)
        # the prompt's tokens count for the repetition penalty, too
        tokens = encoded.ids.tolist()
        choices = [self._voice.begin(tokens, sampling, n, room) for n in range(sampling.n)]
        return Prepared(request, prompt, choices)

    def conversation(self, messages: list[Any]) -> tuple[Sample, Encoded, int]:
        """Return a conversation that awaits an answer, its tokens and its rows.

        Raises RequestError for none.
        """
        count = 0

        def add() -> None:
            nonlocal count
            count += 1
            if count > self._limits.images:
                raise DataError(f"a request has at most {self._limits.images} images here")

        def source(given: Any) -> ImageSource:
            add()
            return read_image(self._fetcher.source(given), self._limits.image_pixels)

        def video(given: Any) -> Video:
            add()
            return read_video(given, self._limits.video_pixels)

        check_messages(messages)
        try:
            sample = read_messages(messages, where="messages", source=source, video=video)
            self.seen(sample)
            self._check_size(sample)
            encoded = self._model.prompt(sample, ())
            length = encoded.length(self._model.visual_tokens)
            if length >= self._longest:
                check_room(length, 1, self._longest)
        except LlavaError as error:
            raise refused(error) from error
        except RecursionError:
            raise RequestError(400, "`messages` are nested too deeply") from None
        return sample, encoded, length

    def _check_size(self, sample: Sample) -> None:
        """Raise ModelError for texts that are far too long, before all of them are tokenised.

        That would take seconds of what all requests share. Pieces may have some tokens more than
        the whole, and nothing is refused here that has not twice of what there is room for.
        """
        texts = (sample.system or "", *(turn.text for turn in sample.turns))
        if sum(map(len, texts)) <= self._longest:
            return
        backend, count = Reader.of(self._model.tokenizer).backend, 0
        for text in texts:
            for begin in range(0, len(text), _PIECE):
                count += len(backend.encode(text[begin : begin + _PIECE], add_special_tokens=False))
                if count > 2 * self._longest:
                    raise ModelError(
                        f"the prompt has more than {count} tokens; the language model reads at "
                        f"most {self._longest}: shorten it"
                    )


def refused(error: LlavaError) -> RequestError:
    """Return what a client is told of messages that cannot be answered."""
    # some clients shorten a conversation and ask again where they find this code
    long = "reads at most" in str(error)
    code = "context_length_exceeded" if long else "invalid_value"
    return RequestError(400, str(error), param="messages", code=code)


def read_image(given: object, most: int) -> bytes:
    """Return the bytes of an image file: from a `data:` address, or as they were fetched.

    Only its header is read here. Raises DataError for any other address, above all for files of
    this machine, and for more than `most` pixels.
    """
    # bytes were fetched
    data = given if isinstance(given, bytes) else _sent(given, "an image", "data:image/png")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes: checked below
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        width = height = most + 1
    except Exception:  # Pillow raises whatever a damaged header leads it to
        raise DataError(f"an image cannot be read; send {', '.join(_FORMATS)}") from None
    if width * height > most:
        raise DataError(f"an image has more than {most} pixels; shrink it")
    return data


def read_video(given: object, most: int) -> Video:
    """Return a video from a `data:` address; its header is read, or what it lacks is counted.

    Raises DataError for any other address, above all for files of this machine, and for more than
    `most` pixels in all its frames together.
    """
    found = Video(_sent(given, "a video", "data:video/mp4"))
    header = clip(found, "the request")
    if header.width * header.height * header.frames > most:
        raise DataError(f"a video has more than {most} pixels in all frames; cut or shrink it")
    return found


def _sent(given: object, what: str, address: str) -> bytes:
    """Return what a `data:` address holds."""
    head, comma, _ = given.partition(",") if isinstance(given, str) else ("", "", "")
    if not comma or not is_embedded(head) or not head.lower().endswith(";base64"):
        raise DataError(
            f"{what} is sent within the request, as `{address};base64,...`; this server reads no "
            "files and no other addresses"
        )
    try:
        return embedded(str(given))
    except ValueError:
        raise DataError(f"{what}'s base64 is broken; send it again") from None
