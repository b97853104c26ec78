"""Reads an exported folder and checks its report, its files and their hashes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from llavakit import Registry, Tiling, Use, differs, listed_file
from llavakit.contracts.errors import ModelError
from llavakit_plugins.checkpoints.prompt_format import PromptFormat
from llavakit_plugins.huggingface.json_files import read_json
from llavakit_plugins.onnx.runtime.layout import (
    CONNECTOR,
    DECODER,
    GRAPHS,
    REPORT,
    SMALL_CACHE,
    SUFFIXES,
    Precision,
    graph_file,
)
from llavakit_plugins.onnx.runtime.pictures import Preparation

FORMAT = 1
NEWLINE = "tiling.safetensors"
"""The file with the learned row of a tiling, `image_newline`."""


Size = Annotated[int, Field(gt=0, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]


class Shapes(BaseModel):
    """The sizes that a runtime needs to know."""

    model_config = ConfigDict(frozen=True)

    visual_tokens: Size
    """Embeddings of one view of an image (P'), which is its rows where it is one view."""
    width: Size
    """Size of one embedding (E)."""
    feature_width: Size | None = None
    """Size of one feature of the encoder (D), where the connector is a graph of its own."""
    vocabulary: Size
    layers: Annotated[int, Field(gt=0, le=1 << 12)]
    kv_heads: Size
    head_dim: Size
    max_length: Size
    """Longest sequence in tokens, images included."""


class Learned(BaseModel):
    """The options of the vision encoder by which images became what the model learned from.

    None: the encoder's own way, which is that of the folder's preparation.
    """

    model_config = ConfigDict(frozen=True)

    aspect: Literal["crop", "pad", "squash"] | None = None
    backend: Literal["pil", "torchvision"] | None = None
    fast: bool | None = None


class Manifest(BaseModel):
    """The part of export.json that a runtime needs."""

    model_config = ConfigDict(frozen=True)

    format: int
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]
    attention: Literal["group_query", "plain"]
    """`group_query` writes into the cache that it gets; `plain` returns a new one."""
    shapes: Shapes
    preparation: Preparation
    learned: Learned | None = None
    """None: of an encoder without such options, or an older export."""
    prompt: PromptFormat
    tiling: dict[str, Any] | None = None
    """How images become views and rows, as in a recipe; None: each is one view."""
    end_tokens: tuple[TokenId, ...]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Folder:
    """A folder that was checked: its files exist and are those that the export wrote."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name

    def graph(self, graph: str, precision: str, provider: str) -> Path:
        """Return the file of a graph; on a CPU the decoder with a small cache, where there is one.

        onnxruntime computes with such a cache on a CPU, and other clients give theirs in float.
        """
        small = graph_file(SMALL_CACHE, precision)
        if graph == DECODER and provider == "cpu" and small in self.manifest.sha256:
            return self.file(small)
        return self.file(graph_file(graph, precision))

    @cached_property
    def tiling(self) -> Tiling | None:
        """The tiling. Raises PluginError where it is not installed.

        Raises ModelError for one that pools features, where the connector is no graph of its own.
        """
        if self.manifest.tiling is None:
            return None
        try:
            tiling = Registry.installed().build(Use[Tiling].model_validate(self.manifest.tiling))
        except ValidationError as error:
            raise _unreadable(self.path / REPORT, error, "tiling.") from error
        if tiling.pools and CONNECTOR not in self.graphs:
            raise ModelError(
                f"{self.path / REPORT} has a tiling that pools features in front of the connector, "
                "and says nothing of a graph for the connector (`shapes.feature_width`); export "
                "the model again"
            )
        return tiling

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that answer: with the connector, where that is one."""
        return GRAPHS if self.manifest.shapes.feature_width is None else (*GRAPHS, CONNECTOR)

    def newline(self) -> Any:
        """Return the learned row `[E]` of the tiling, None where it has none.

        Raises ModelError where its file is not what an export writes.
        """
        if self.tiling is None or not self.tiling.separates:
            return None
        try:
            row_E = load_file(self.path / NEWLINE)["image_newline"]
            known = row_E.dtype.kind == "f" and row_E.shape == (self.manifest.shapes.width,)
        except (SafetensorError, LookupError, OSError):
            known = False
        if not known:
            raise ModelError(
                f"{self.path / NEWLINE} holds no `image_newline` of {self.manifest.shapes.width} "
                "numbers; copy the folder again, or export the model again"
            )
        return row_E

    def require(self, name: str) -> None:
        """Raise ModelError for a file that the report does not list: its hash was not compared."""
        if name not in self.manifest.sha256:
            raise ModelError(
                f"{self.path / REPORT} does not list {name}, which the model needs; copy the whole "
                "folder again, or export the model again"
            )

    def json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file."""
        return _json(self.path / name)


def recognises(path: Path) -> bool:
    """Return whether a folder holds ONNX graphs of a LLaVA, judged by its content."""
    graphs = [path / graph_file(DECODER, precision) for precision in SUFFIXES]
    if not any(graph.is_file() for graph in graphs) and not (path / REPORT).is_file():
        return False
    try:
        config = _json(path / "config.json")
    except ModelError:
        return False
    return config.get("model_type") == "llava" and "transformers.js_config" in config


def read(path: Path, precision: str | None) -> tuple[Folder, str]:
    """Return a checked folder and the precision to run; by default the folder's first.

    Raises ModelError if a file is missing, or is not the one that was exported.
    """
    if not path.is_dir():
        raise ModelError(f"model {path} does not exist; give the folder an export wrote")
    try:
        manifest = Manifest.model_validate(_json(path / REPORT))
    except ValidationError as error:
        raise _unreadable(path / REPORT, error) from error
    if manifest.format != FORMAT:
        raise ModelError(
            f"{path / REPORT} has format {manifest.format}, this llavakit reads {FORMAT}; "
            "install the llavakit that wrote it, or export the model again"
        )
    chosen = precision or manifest.precisions[0]
    if chosen not in manifest.precisions:
        raise ModelError(
            f"{path} holds no precision `{chosen}`, only {', '.join(manifest.precisions)}; choose "
            "one of them, or export the model again"
        )
    others = {name for name in manifest.sha256 if name.startswith("onnx/")}
    others -= {name for name in others if Path(name).stem.endswith(_stems(chosen))}
    for name, known in manifest.sha256.items():
        file = listed_file(path, name)
        if not file.is_file():
            raise ModelError(f"{path} lacks {name}; copy the whole folder again")
        if name in others:  # graphs of other precisions are not hashed: they may be gigabytes
            continue
        if differs(file, known):
            raise ModelError(f"{file} differs from what {REPORT} says; copy the folder again")
    folder = Folder(path, manifest)
    for graph in folder.graphs:
        folder.require(graph_file(graph, chosen))
    if folder.tiling is not None and folder.tiling.separates:
        folder.require(NEWLINE)
    _warn_of_other_pixels(path / REPORT, manifest)
    return folder, chosen


def _warn_of_other_pixels(report: Path, manifest: Manifest) -> None:
    """Say so where images become other pixels than those that the model learned from."""
    if manifest.learned is None:
        return
    given = Learned(aspect=manifest.preparation.aspect, backend="pil", fast=False)
    for (name, before), (_, now) in zip(manifest.learned, given, strict=True):
        if before not in (None, now):
            warnings.warn(
                f"the model in {report.parent} learned from images with `vision.{name} = "
                f"{before!r}` and is given them with {now!r}: its answers may be worse; export a "
                f"model that learned with `vision.{name} = {now!r}`, or ask it in PyTorch",
                stacklevel=3,
            )


def _unreadable(report: Path, error: ValidationError, front: str = "") -> ModelError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return ModelError(
        f"{report} is not one this llavakit reads (`{front}{where}`: {first['msg']}); export the "
        "model again"
    )


def _stems(precision: str) -> tuple[str, ...]:
    graphs = (*GRAPHS, CONNECTOR, SMALL_CACHE)
    return tuple(f"{graph}{SUFFIXES[precision]}" for graph in graphs)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(f"{path.parent} lacks {path.name}; copy the whole folder again")
    return read_json(path)
