"""Opens the files of contexts of a job, one context per line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

from llavakit import DataError
from llavakit_plugins.generation.coco import convert_coco, is_coco
from llavakit_plugins.generation.contexts import Contexts
from llavakit_plugins.generation.requests.shelf import Shelf

if TYPE_CHECKING:
    from llavakit_plugins.generation.options import GenerateOptions


@contextmanager
def open_sources(
    options: GenerateOptions, folder: Path, *, shown: bool = False
) -> Iterator[dict[str, Contexts]]:
    """Yield the contexts and the held-out contexts, by the folder that their data go to.

    COCO's files are converted to lines in `folder`, once. All lines are checked before anything is
    paid for. Raises DataError if a file cannot be used or is empty, if `instances` are given for
    contexts that are not COCO's, for an id that occurs twice, and for an image outside its folder;
    with `shown`, also for images that are missing or broken: the chat model is to see them.
    """
    if options.instances is not None and not is_coco(options.contexts):
        raise DataError(
            f"`instances` are COCO's boxes, but {options.contexts} is not COCO's captions: it has "
            "boxes of its own; leave `instances` out"
        )
    with ExitStack() as stack:
        opened = {}
        for name, path in (("", options.contexts), ("held-out", options.held_out)):
            if path is None:
                continue
            lines = path
            if is_coco(path):
                lines = folder / f"{name or 'all'}-contexts.jsonl"
                # the file is written whole or not at all, so that one that is there is complete
                if not lines.is_file():
                    convert_coco(path, options.instances, lines)
            opened[name] = contexts = Contexts(lines)
            stack.callback(contexts.close)
            if not len(contexts):
                raise DataError(f"{path} holds no contexts; it needs one JSON object a line")
            _check(contexts, path, options.images or Path())
            if shown:
                _check_images(contexts, options.images)
        yield opened


def _check(contexts: Contexts, path: Path, images: Path) -> None:
    from llavakit_plugins.datasets.image_files import inside

    with closing(Shelf()) as seen:
        for context in contexts:
            inside(images, context.image, f"context `{context.id}` of {path}")
            if not seen.add(context.id.encode()):
                raise DataError(
                    f"{path} has context `{context.id}` more than once, and samples are named "
                    "after it; keep one, or give the others ids of their own"
                )


def _check_images(contexts: Contexts, folder: Path | None) -> None:
    from llavakit_plugins.datasets.image_files import check_image, whole_images

    if folder is None:
        raise DataError("the generator shows images: name their folder with the step's `images`")
    # `whole_images` is some thousands of paths ahead, and no more
    ahead, behind = tee((str(folder / context.image), context.id) for context in contexts)
    looked = whole_images(image for image, _ in ahead)
    for (image, identity), whole in zip(behind, looked, strict=True):
        if not whole:
            check_image(image, f"context `{identity}`")
