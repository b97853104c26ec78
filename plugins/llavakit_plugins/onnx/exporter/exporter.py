"""Writes a folder of ONNX graphs, proves that it computes what the model computes, and loads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import save_file
from torch import nn

from llavakit import Exporter, ModelError, Options, digest, new_folder
from llavakit_plugins.onnx.exporter.attention import Attention
from llavakit_plugins.onnx.runtime import folder as folders
from llavakit_plugins.onnx.runtime.layout import (
    CONNECTOR,
    DECODER,
    GRAPHS,
    REPORT,
    Precision,
    graph_file,
)
from llavakit_plugins.onnx.runtime.model import OnnxModel
from llavakit_plugins.onnx.runtime.sessions import pick_provider

if TYPE_CHECKING:
    from llavakit import LlavaModel
    from llavakit_plugins.onnx.exporter.cache import Scales

_LEAST: Mapping[str, float] = {"fp32": 1.0, "fp16": 0.95, "q8": 0.9, "int8": 0.5, "q4": 0.3}
_WORK = "work"
Share = Annotated[float, Field(ge=0, le=1)]


class OnnxOptions(Options):
    """Options of `onnx`."""

    precisions: tuple[Precision, ...] = Field(default=("fp32",), min_length=1)
    """The graphs are written in each precision; clients use the first one by default."""
    operators: Literal["microsoft", "plain"] = "microsoft"
    """`microsoft`: GroupQueryAttention and fused norms, for onnxruntime. `plain`: ONNX's own
    operators, which run elsewhere, too, and take batches with padding at any position."""
    block_size: int | None = Field(default=None, ge=16, le=256)
    """Number of weights that share a scale in q8 and q4, a power of two; by default 128,
    fewer in narrow models."""
    cache: Literal["auto", "float", "int8"] = "auto"
    """`auto`: q4 has a second decoder beside the one for all clients, with keys and values in 8
    bits, which llavakit's runtime takes on a CPU. `float`: none has it. `int8`: the only decoder of
    int8, q8 and q4 is such a one; transformers.js gives its caches in float and does not run it."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Largest allowed difference between a logit of fp32 and PyTorch's."""
    least_agreement: dict[Precision, Share] = Field(default_factory=dict)
    """For each smaller precision, the least share of rows whose most likely token is PyTorch's; by
    default fp16 0.95, q8 0.9, int8 0.5, q4 0.3."""
    external_data_over: int = Field(default=1_900_000_000, ge=0)
    """Graphs with more bytes of weights than this keep them in a second file. ONNX's format is
    limited to 2 GB for one file."""

    @field_validator("precisions", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("block_size")
    @classmethod
    def _power(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError("must be a power of two: 16, 32, 64, 128 or 256")
        return value

    @model_validator(mode="after")
    def _served(self) -> OnnxOptions:
        if self.cache == "int8" and self.operators == "plain":
            raise ValueError('a cache of 8 bits needs `operators = "microsoft"`')
        return self


class Onnx(Exporter):
    """Exports graphs, and the files with which onnxruntime and transformers.js run them."""

    name = "onnx"
    Options = OnnxOptions

    def __init__(self, options: OnnxOptions) -> None:
        self.options = options

    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        """Write the folder, whole or not at all; return how closely each precision agrees.

        Raises ModelError if a part has no ONNX form, if logits of fp32 differ from PyTorch's by
        more than `tolerance`, or if another precision agrees in too few rows.
        """
        needs_onnx()
        with _in_float32(model) as reference, new_folder(folder) as partial:
            report = self._write(reference, partial)
        return {
            f"{precision} {name}": value
            for precision, figures in report["parity"].items()
            for name, value in figures.items()
        }

    def check(self, model: LlavaModel) -> None:
        """Raise ModelError if clients cannot prepare images or write prompts as the model does.

        Cheap, so that a recipe is refused before it trains.
        """
        from llavakit_plugins.checkpoints.chat_writing import find_format
        from llavakit_plugins.onnx.exporter.images import find_preparation

        find_preparation(model.vision)
        if hasattr(model.language, "tokenizer"):
            find_format(model.template, model.language.tokenizer)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return folders.recognises(folder)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype | None) -> Any:
        """Return the model of the folder's first precision; its logits are a torch tensor."""
        checked, precision = folders.read(folder, _half_where_asked(dtype))
        provider = pick_provider(device.type)
        return OnnxModel(checked, precision, provider=provider, array=torch.from_numpy)

    def _write(self, model: LlavaModel, partial: Path) -> dict[str, Any]:
        from llavakit_plugins.checkpoints.chat_writing import find_format
        from llavakit_plugins.checkpoints.parity import cases
        from llavakit_plugins.onnx.exporter import client, parity
        from llavakit_plugins.onnx.exporter.cache import find_scales
        from llavakit_plugins.onnx.exporter.graphs import pools_features
        from llavakit_plugins.onnx.exporter.images import find_preparation

        pools = pools_features(model)
        options = self.options
        preparation = find_preparation(model.vision)
        tokenizer = model.language.tokenizer
        form = find_format(model.template, tokenizer)
        tried = cases(model, new_tokens=parity.NEW_TOKENS, raw=True, videos=pools)
        _, image_token = client.client_tokenizer(tokenizer, form)
        attention = self._attention(model)
        small = self._small_caches(attention)
        scales = dict.fromkeys(small, find_scales(model, tried) if small else [])
        self._write_graphs(model, partial, attention, image_token + 1, scales)
        if (newline_E := model.image_newline) is not None:
            save_file({"image_newline": newline_E.detach()}, partial / folders.NEWLINE)
        ends = _ends(model, form.stops)
        client.write_client_files(
            model,
            partial,
            form=form,
            preparation=preparation,
            end_tokens=ends,
            precisions=options.precisions,
            external=client.external_files(partial, options.precisions),
        )
        layers, heads, width = model.language.cache_shape()
        report: dict[str, Any] = {
            "format": folders.FORMAT,
            "precisions": list(options.precisions),
            "attention": attention,
            "settings": options.model_dump(mode="json"),
            "shapes": {
                "visual_tokens": model.visual_tokens,
                "width": model.language.width,
                "vocabulary": model.language.head.weight.shape[0],
                "layers": layers,
                "kv_heads": heads,
                "head_dim": width,
                "max_length": model.language.max_length,
                **({"feature_width": model.vision.width} if pools else {}),
            },
            "preparation": preparation.model_dump(mode="json"),
            "learned": getattr(model.vision, "learned", None),
            "prompt": form.model_dump(mode="json"),
            "tiling": model.choices.get("tiling"),
            "end_tokens": sorted(model.language.end_ids),
            "parts": model.choices,
            "versions": _versions(),
            "sha256": {},
        }
        manifest = folders.Manifest.model_validate(report)
        checked = folders.Folder(partial, manifest)
        exported: dict[str, OnnxModel] = {
            precision: OnnxModel(checked, precision)
            for precision in dict.fromkeys(("fp32", *options.precisions))
        }
        stated = {str(name): least for name, least in options.least_agreement.items()}
        limits = {**_LEAST, **stated}
        report["parity"] = parity.prove(model, exported, limits, options.tolerance, tried)
        del exported
        if options.cache == "auto":
            for precision in small:
                found = parity.small_cache(checked, precision, limits[precision], tried)
                report["parity"] |= {f"{precision}, int8 cache": found} if found else {}
        report["prompts"] = [case.text for case in tried]
        # fp32 graphs are always written, for the proof; they go if they were not requested
        if "fp32" not in options.precisions:
            for graph in (*GRAPHS, CONNECTOR):
                for left in partial.glob(f"{graph_file(graph, 'fp32')}*"):
                    left.unlink()
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        # of all files, but for the report itself, which holds the sums
        report["sha256"] = {file.relative_to(partial).as_posix(): digest(file) for file in files}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (partial / REPORT).write_text(f"{text}\n", encoding="utf-8")
        return report

    def _attention(self, model: LlavaModel) -> Attention:
        """Return the form of attention; onnxruntime's operator needs head sizes divisible by 8."""
        _, _, width = model.language.cache_shape()
        if self.options.operators == "plain":
            return "plain"
        if width % 8 and self.options.cache == "int8":
            raise ModelError(
                "a cache of 8 bits needs GroupQueryAttention, which takes head sizes that are a "
                f"multiple of 8, and this model's is {width}; leave `cache` at `float`"
            )
        if width % 8:
            logging.getLogger(__name__).warning(
                "GroupQueryAttention takes head sizes that are a multiple of 8, and this model's "
                "is %d: its attention is written with plain operators",
                width,
            )
            return "plain"
        return "group_query"

    def _small_caches(self, attention: Attention) -> tuple[Precision, ...]:
        """Return the precisions that have a decoder with an 8-bit cache."""
        from llavakit_plugins.onnx.exporter.cache import EIGHT_BIT_CACHES
        from llavakit_plugins.onnx.exporter.small_cache import BESIDE

        if self.options.cache == "float" or attention == "plain":
            return ()
        able = EIGHT_BIT_CACHES if self.options.cache == "int8" else BESIDE
        return tuple(precision for precision in self.options.precisions if precision in able)

    def _write_graphs(
        self,
        model: LlavaModel,
        partial: Path,
        attention: Attention,
        rows: int,
        scales: Mapping[Precision, Scales],
    ) -> None:
        """Write every graph in every precision, and always in fp32, for the proof.

        `rows` is the least number of rows of the embedding table; `scales` are those of the
        precisions that have an 8-bit cache.
        """
        import onnx
        import onnx_ir as ir

        from llavakit_plugins.onnx.exporter.cache import quantise
        from llavakit_plugins.onnx.exporter.fusion import fuse
        from llavakit_plugins.onnx.exporter.graphs import graphs
        from llavakit_plugins.onnx.exporter.precision import convert
        from llavakit_plugins.onnx.exporter.small_cache import write_beside

        (partial / "onnx").mkdir()
        work = partial / _WORK
        work.mkdir()
        for name, trace in graphs(model, attention, rows).items():
            traced = trace()
            if name == DECODER and self.options.operators == "microsoft":
                fuse(traced, model.language.max_length)
            # each precision is converted from the file: a converter changes the graph that it gets
            source = work / f"{name}.onnx"
            ir.save(traced, source, external_data=f"{name}.onnx_data")
            del traced
            for precision in dict.fromkeys(("fp32", *self.options.precisions)):
                graph = convert(name, onnx.load(source), precision, self.options.block_size)
                smaller = name == DECODER and precision in scales
                if smaller and self.options.cache == "int8":
                    graph = quantise(graph, scales[precision])
                self._save(graph, partial / graph_file(name, precision))
                if smaller and self.options.cache == "auto":
                    write_beside(partial, precision, scales[precision])
            rmtree(work)
            work.mkdir()
        work.rmdir()

    def _save(self, graph: Any, path: Path) -> None:
        import onnx

        size = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
        onnx.save_model(
            graph,
            path,
            save_as_external_data=size > self.options.external_data_over,
            location=f"{path.name}_data",
            size_threshold=1024,
        )


def needs_onnx() -> None:
    """Raise ModelError if a library of the extra `onnx` is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"the ONNX export needs {', '.join(missing)}; install it with "
            "`pip install 'llavakit[onnx]'`"
        )


class _in_float32:
    """Gives the model on the CPU, in float32 and in evaluation mode; itself if it is so already."""

    def __init__(self, model: LlavaModel) -> None:
        self._model, self._training = model, model.training

    def __enter__(self) -> LlavaModel:
        kinds = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        if kinds == {torch.float32} and self._model.device.type == "cpu":
            return self._model.eval()
        # Weight by weight: `deepcopy(model).to("cpu")` would first copy the model on its device,
        # which may have no room for two.
        copies = {
            id(p): nn.Parameter(p.detach().to("cpu", torch.float32), requires_grad=False)
            for p in self._model.parameters()
            if p.is_floating_point()
        }
        return deepcopy(self._model, copies).to("cpu").eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._training)


def _half_where_asked(dtype: torch.dtype | None) -> str | None:
    return "fp16" if dtype in (torch.float16, torch.bfloat16) else None


def _ends(model: LlavaModel, stops: tuple[str, ...]) -> list[int]:
    """Return the ids at which clients stop: the end tokens, and stop texts that are one token.

    Clients take ids only; a stop text of several tokens is known to our own runtime alone.
    """
    backend = model.language.tokenizer.get_added_vocab()
    return sorted({*model.language.end_ids, *(backend[s] for s in stops if s in backend)})


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("llavakit", "torch", "transformers", "onnx")}
