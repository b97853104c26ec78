"""Finds the files of a Hugging Face model: in a folder, on the hub, or a configuration alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import Field, model_validator

from llavakit import ModelError, Options
from llavakit_plugins.huggingface.json_files import check_shape, read_json, refuse_devices
from llavakit_plugins.huggingface.known_configs import KNOWN
from llavakit_plugins.huggingface.tokenizer_faults import (
    blame_file,
    is_fault,
    refuse_large_ids,
    without_panics,
)
from llavakit_plugins.huggingface.tokenizer_writing import remember_origin
from llavakit_plugins.huggingface.tokenizers import fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_LAYERS = 1000


class PretrainedOptions(Options):
    """Weights of a folder or the hub, or a new model of a given shape."""

    source: str | None = None
    """A local folder, or a name on the hub such as `openai/clip-vit-large-patch14`."""
    revision: str | None = None
    """Commit or tag on the hub."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The shape of a new model, as in a config.json; needed where there is no `source`."""

    @model_validator(mode="after")
    def _needs_a_shape(self) -> PretrainedOptions:
        if self.source is None and not self.config:
            raise ValueError("give `source` (a folder or hub name) or `config` (a new model)")
        return self

    def alone(self) -> Self:
        if self.source is None:
            return self
        shape = {"source": None, "revision": None, "config": read_config(self)}
        return self.model_copy(update=shape)


def read_config(options: PretrainedOptions, part: str = "vision_config") -> dict[str, Any]:
    """Return the configuration: the source's, changed by `config`. Nothing is downloaded.

    If the source is a whole model with such a `part` (a CLIP or a LLaVA), it is the part's. Raises
    ModelError if the source's configuration is not on this machine.
    """
    if options.source is None:
        return _bounded(dict(options.config))  # its own: who is given it may take things out
    found = find_file(options, "config.json")
    if found is not None:
        table = read_json(found)
        inner = table.get(part)
        table = {**table, **inner} if isinstance(inner, dict) else table
        check_shape(table, found)
    elif options.source in KNOWN:
        table = KNOWN[options.source]
    else:
        raise ModelError(
            f"`{options.source}` is neither a folder with a config.json nor in the local hub "
            f"cache; fetch it with `hf download {options.source}`, or give its shape as `config`"
        )
    return _bounded({**table, **options.config})


def _bounded(table: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration. Raises ModelError for so many layers that building them never ends.

    Widths cost nothing before there are weights; layers are objects, one after another.
    """
    layers = table.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(
            f"`num_hidden_layers` is {layers}, and no model has more than {_MOST_LAYERS}; fix "
            "`config`, or the source's config.json"
        )
    return table


class UnfitConfig(ModelError):
    """A configuration that transformers cannot build; `__cause__` is transformers' error."""


@contextmanager
def explain_config(kind: str) -> Iterator[None]:
    """Turn errors of transformers about a configuration that it cannot build into UnfitConfig."""
    from huggingface_hub.errors import StrictDataclassError

    faults = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except (*faults, ArithmeticError, AssertionError, StrictDataclassError) as error:
        raise UnfitConfig(
            f"transformers cannot make a {kind} of this configuration "
            f"({type(error).__name__}: {' '.join(str(error).split())}); fix `config`"
        ) from error


def fetch_config(options: PretrainedOptions, part: str = "vision_config") -> dict[str, Any]:
    """Return the configuration of `options.source`, as `read_config`; fetch it where it must be.

    Raises ModelError where it can be had neither here nor from the hub.
    """
    from transformers.utils.hub import cached_file

    assert options.source is not None
    if find_file(options, "config.json") is None:
        try:
            cached_file(options.source, "config.json", revision=options.revision or "main")
        except Exception as error:  # of a connection that breaks off, httpx's own, too
            raise ModelError(f"`{options.source}` has no config.json: {error}") from error
    return read_config(options, part)


_BESIDE = (
    "*.json", "*.jinja", "*.model", "*.txt",  # configuration, tokenizer and preprocessing
    "adapter_model.*", "mm_projector.bin", "non_lora_trainables.bin",
)  # fmt: skip
"""Files that stand beside a model's weights, or instead of them."""


def fetch_folder(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder with the files of `source`: itself, or a snapshot of the hub's.

    What the hub's cache lacks is fetched: configuration, tokenizer, preprocessing, `weights`.
    Raises ModelError where they can be had neither here nor from the hub.
    """
    from huggingface_hub import snapshot_download

    if (folder := Path(source)).is_dir():
        refuse_devices(folder)
        return folder
    try:
        for pattern in ("model*.safetensors", "pytorch_model*.bin") if weights else ("*.json",):
            folder = Path(
                snapshot_download(
                    source,
                    revision=revision,
                    allow_patterns=[*_BESIDE, pattern],
                    ignore_patterns=["*/*"],  # other formats and precisions
                )
            )
            if any(folder.glob(pattern)):
                break
    except Exception as error:  # of a connection that breaks off, httpx's own, too
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"`{source}` is no folder, and the hub's model of that name cannot be had: {reason}"
        ) from error
    return folder


def find_file(options: PretrainedOptions, name: str) -> Path | None:
    """Return a file of the source, where it lies on this machine."""
    assert options.source is not None
    folder = Path(options.source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(options.source, name, revision=options.revision)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(cached) if isinstance(cached, str) else None


def missing_source(what: str, options: PretrainedOptions) -> str | None:
    """Return a sentence on what is missing and how to get it, or None if the weights are here."""
    if options.source is None:
        return None
    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    if any(find_file(options, name) for name in names):
        return None
    if Path(options.source).is_dir():
        return f"{what}: {options.source} holds no model.safetensors; copy the weights into it"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("1", "ON", "YES", "TRUE") and online():
        return None
    return (
        f"the weights of {what} `{options.source}` are not on this machine; fetch them with "
        f"`hf download {options.source}`, or set `source` to a folder that holds them"
    )


def online() -> bool:
    """Return whether the hub can be reached, so that a run can download missing files itself."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT

    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=3.0).close()
    except HTTPError:
        return True  # it answered
    except (URLError, OSError):
        return False
    return True


@contextmanager
def quietly(*, report: bool = True) -> Iterator[None]:
    """Suppress transformers' own progress bars: a step already shows one.

    Without `report`, transformers' list of missing and unused weights is suppressed, too, for
    callers that check missing weights themselves.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    if not report:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def load_tokenizer(
    source: str, revision: str | None = None, legacy: bool | None = None, where: object = None
) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer from a folder or the hub; errors call it that of `where`.

    `legacy` says whether a LLaMA tokenizer puts a space behind special tokens too. Raises
    ModelError where it cannot be read.
    """
    find = partial(find_file, PretrainedOptions(source=source, revision=revision))
    try:
        if Path(source).is_dir():
            refuse_devices(Path(source))
        refuse_large_ids(find("tokenizer.json"))
        with without_panics():
            tokenizer = fast_tokenizer(
                source, revision, **({} if legacy is None else {"legacy": legacy})
            )
            tokenizer("a \u2603")  # some faults are seen when it is used, of a character it lacks
        remember_origin(tokenizer, find)
    except BaseException as error:  # tokenizers raises nothing narrower for a damaged file
        if not is_fault(error):
            raise
        reason: object = error
        if not isinstance(error, ModelError):
            try:
                blame_file(find)
            except ModelError as blame:
                reason = blame
        text = " ".join(str(reason).split()).replace(source, str(where or source))
        raise ModelError(
            f"the tokenizer in {where or source} cannot be read ({text:.400}); copy it again"
        ) from error
    if legacy is not None:
        _put_spaces(tokenizer, source, "always" if legacy else "first")
    known = getattr(tokenizer, "legacy", None) if legacy is None else legacy
    if known is not None:  # transformers 5.23 forgets to save it, and then takes False
        tokenizer.init_kwargs["legacy"] = known
    return tokenizer


def _put_spaces(tokenizer: Any, source: str, scheme: Literal["always", "first"]) -> None:
    """Make a tokenizer put a space before every stretch of text, or only before the first.

    transformers ignores `legacy` for a tokenizer.json, which states the spaces itself.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    spaces = getattr(backend, "pre_tokenizer", None)
    if isinstance(spaces, pre_tokenizers.Sequence):  # so transformers reads a bare tokenizer.model
        spaces = cast(Any, spaces)[0]
    # older files put spaces by a normalizer, which does so in front of every stretch
    old = isinstance(getattr(backend, "normalizer", None), normalizers.Sequence) and not spaces
    if backend is None or not (old or isinstance(spaces, pre_tokenizers.Metaspace)):
        raise ModelError(
            f"`legacy` is about LLaMA's SentencePiece tokenizers, and that of {source} is none; "
            "leave it out"
        )
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
