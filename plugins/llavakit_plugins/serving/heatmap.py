"""Answers `/v1/heatmaps`: where an answer looked, word by word.

I images, G edge of an image's grid of visual tokens.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Any

from starlette.types import Receive, Scope
from torch import Tensor

from llavakit import LlavaModel, Video, open_image
from llavakit.contracts.errors import LlavaError, ModelError
from llavakit_plugins.heatmaps.attention_maps import AttentionMaps, grid_edge, map_answer
from llavakit_plugins.heatmaps.drawing import Region, seen_region
from llavakit_plugins.serving.batch import Prompt
from llavakit_plugins.serving.errors import RequestError
from llavakit_plugins.serving.http import Answer, Bodies
from llavakit_plugins.serving.preparing import Preparer, refused
from llavakit_plugins.serving.requests import HeatmapRequest, read_body
from llavakit_plugins.serving.responses import encode
from llavakit_plugins.serving.scheduler import Scheduler

_TOKENS = 512  # the longest answer that is looked at


def has_heatmaps(model: Any) -> bool:
    """Say whether a model's answers can be asked where they looked."""
    if not isinstance(model, LlavaModel):
        return False
    if model.tiling is not None:  # then it depends on the images
        return True
    try:
        grid_edge(model)
    except ModelError:
        return False
    return True


class Heatmap:
    """The endpoint. The model reads the answer once more, in one pass between two steps."""

    def __init__(
        self,
        model: LlavaModel,
        preparer: Preparer,
        scheduler: Scheduler,
        bodies: Bodies,
        pool: Executor,
    ) -> None:
        self._model, self._preparer, self._scheduler = model, preparer, scheduler
        self._bodies, self._pool = bodies, pool

    async def __call__(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        async with self._bodies.read(scope, receive) as body:
            prompt, ids, regions, sizes = await loop.run_in_executor(
                self._pool, self._prepare, body
            )
        try:
            found = await asyncio.wrap_future(
                # the model belongs to the scheduler's thread: no other may use it at the same time
                self._scheduler.call(
                    lambda: map_answer(self._model, prompt.encoded, prompt.pixels, ids)
                )
            )
        except LlavaError as error:
            raise RequestError(400, str(error)) from error
        await answer.whole(200, encode(_table(found, sizes if found.whole else regions)))

    def _prepare(self, body: bytes) -> tuple[Prompt, list[int], list[Region], list[Region]]:
        """Return what is read, and the parts of the images seen without a tiling, and with."""
        request = read_body(HeatmapRequest, body)
        sample, encoded, length = self._preparer.conversation(request.messages)
        if not sample.images:
            raise RequestError(400, "there is no image to look at", param="messages")
        if any(isinstance(image, Video) for image in sample.images):
            raise RequestError(400, "heat maps show images, not videos", param="messages")
        try:
            whole, _ = self._model.ask(sample, (), begun=request.answer)
            # encoded together with the prompt,
            # as a tokenizer may join an answer's first word with what is before it
            ids = whole.ids[len(encoded.ids) :].tolist()
            if len(ids) > _TOKENS:
                raise RequestError(
                    400,
                    f"`answer` has more than {_TOKENS} tokens; ask about a part",
                    param="answer",
                )
            if whole.length(self._model.visual_tokens) > self._model.language.max_length:
                raise ModelError("the answer does not fit: the model reads at most "
                                 f"{self._model.language.max_length} tokens")  # fmt: skip
            opened = [open_image(image, "the request") for image in sample.images]
            regions = [seen_region(self._model.vision, image.size) for image in opened]
            sizes = [(0.0, 0.0, float(image.width), float(image.height)) for image in opened]
            pixels = self._model.prepare(sample.images, "the request")
        except LlavaError as error:
            raise refused(error) from error
        return Prompt(encoded, pixels, length, 0), ids, regions, sizes


def _table(maps: AttentionMaps, regions: list[Region]) -> dict[str, Any]:
    """Return the maps as the page draws them: the share of attention in each part, row by row."""
    return {
        "object": "heatmaps",
        "answer": maps.answer,
        "grid": maps.weights_AIGG.shape[-1],
        "regions": [[round(edge, 2) for edge in region] for region in regions],
        "mean": _rows(maps.weights_AIGG.mean(dim=0)),
        "words": [{"text": word, "maps": _rows(weights)} for word, weights in maps.words],
    }


def _rows(weights_IGG: Tensor) -> list[list[float]]:
    return [[round(weight, 7) for weight in map_] for map_ in weights_IGG.flatten(1).tolist()]
