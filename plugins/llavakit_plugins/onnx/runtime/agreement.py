"""Whether graphs are those that a folder's report describes; one that fails is a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llavakit.contracts.errors import LlavaError, ModelError
from llavakit_plugins.onnx.runtime.folder import Folder
from llavakit_plugins.onnx.runtime.layout import (
    CONNECTOR,
    DECODER,
    EMBEDDINGS,
    FEATURES,
    KEEP,
    REPORT,
    VISION,
    VISUAL_EMBEDS,
    cache_names,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Shape = tuple[int | None, ...]  # None: any size
Tensors = dict[str, Shape]


def check_graphs(folder: Folder, sessions: Mapping[str, InferenceSession]) -> None:
    """Raise ModelError where a graph has other tensors than the report says.

    The report has no hash of its own: without this, files of two models that were mixed would fail
    in the middle of an answer, or fill the memory.
    """
    for graph, (inputs, outputs) in _expected(folder).items():
        given, made = sessions[graph].get_inputs(), sessions[graph].get_outputs()
        found = {value.name: value.shape for value in given}
        if more := found.keys() - inputs.keys() - {KEEP}:
            raise _other(folder, graph, f"it needs `{min(more):.80}`")
        for wanted, there in ((inputs, found), (outputs, {v.name: v.shape for v in made})):
            for name, shape in wanted.items():
                if not _fits(there.get(name), shape):
                    said = "nothing" if name not in there else f"{there[name]}"
                    raise _other(folder, graph, f"`{name}` is {said:.80}, not {list(shape)}")


def _expected(folder: Folder) -> dict[str, tuple[Tensors, Tensors]]:
    size, shapes = folder.manifest.preparation.size, folder.manifest.shapes
    embeds: Shape = (None, None, shapes.width)
    held: Shape = (None, shapes.kv_heads, None, shapes.head_dim)
    past, present = (
        dict.fromkeys(cache_names(shapes.layers, name), held)
        for name in ("past_key_values", "present")
    )
    whole: Shape = (None, None)
    features = shapes.width
    connector: dict[str, tuple[Tensors, Tensors]] = {}
    if shapes.feature_width is not None:
        features = shapes.feature_width
        connector = {CONNECTOR: ({FEATURES: (None, None, features)}, {VISUAL_EMBEDS: embeds})}
    return connector | {
        VISION: (
            {"pixel_values": (None, 3, size, size)},
            {"image_features": (None, shapes.visual_tokens, features)},
        ),
        EMBEDDINGS: ({"input_ids": whole}, {"inputs_embeds": embeds}),
        DECODER: (
            {"inputs_embeds": embeds, "attention_mask": whole, "position_ids": whole, **past},
            {"logits": (None, None, shapes.vocabulary), **present},
        ),
    }


def _fits(there: list[Any] | None, wanted: Shape) -> bool:
    """Say whether a graph's shape, whose open sizes have names, may be the one that is wanted."""
    return (
        there is not None
        and len(there) == len(wanted)
        and all(w is None or not isinstance(t, int) or t == w for t, w in zip(there, wanted))  # noqa: B905
    )


def _other(folder: Folder, graph: str, what: str) -> ModelError:
    return ModelError(
        f"the graph {graph} of {folder.path} is not the one that {REPORT} describes: {what}; copy "
        "the folder again, or export the model again"
    )


@contextmanager
def running(graph: str) -> Iterator[None]:
    """Turn whatever onnxruntime raises, whose errors share no base class, into a sentence."""
    try:
        yield
    except (LlavaError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"onnxruntime cannot run the graph {graph}: {reason:.400}; export the model again"
        ) from error
