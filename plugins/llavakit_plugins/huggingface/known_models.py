"""What a plan knows about a model on the hub: from the hub's cache, or from a packaged list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavakit import LlavaModel, ModelRecipe, Registry, sketch_any, sketch_model


def _llava_15(size: str, rows: int) -> dict[str, Any]:
    """Return the parts of LLaVA-1.5 with so many rows in its vocabulary."""
    return {
        "vision": {
            "use": "clip",
            "source": "openai/clip-vit-large-patch14-336",
            "aspect": "pad",
            "dtype": "float16",
        },
        "connector": {"use": "mlp"},
        "language": {
            "use": "vicuna",
            "source": f"lmsys/vicuna-{size}-v1.5",
            "config": {"vocab_size": rows},
            "dtype": "float16",
        },
        "template": {"use": "vicuna_v1"},
    }


KNOWN_MODELS = {
    **{f"liuhaotian/llava-v1.5-{size}": _llava_15(size, 32000) for size in ("7b", "13b")},
    # transformers adds <image> and <pad>, and rounds up to a multiple of 64
    **{f"llava-hf/llava-1.5-{size}-hf": _llava_15(size, 32064) for size in ("7b", "13b")},
}


def sketch_named(name: str, registry: Registry) -> LlavaModel | None:
    """Return the hub's model of a name on the meta device; None where it is not known.

    Nothing is fetched.
    """
    if (folder := _cached(name)) is not None:
        return sketch_any(folder, registry)
    known = KNOWN_MODELS.get(name)
    return None if known is None else sketch_model(ModelRecipe.model_validate(known), registry)


def _cached(name: str) -> Path | None:
    """Return the folder of the hub's cache where it holds a model's configuration and weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    weights = ("*.safetensors", "*.bin")
    found = (folder / "config.json").is_file() and any(any(folder.glob(w)) for w in weights)
    return folder if found else None
