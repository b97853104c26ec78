"""The configurations of well-known models, with which a plan needs no network."""

from __future__ import annotations

from typing import Any


def _clip(width: int, layers: int, edge: int, patch: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        # ViT-H has heads of 80, all smaller ones of 64
        "num_attention_heads": width // (80 if width == 1280 else 64),
        "image_size": edge, "patch_size": patch, **others,
    }  # fmt: skip


def _siglip(size: str, edge: int, patch: int) -> dict[str, Any]:
    width, inner, layers, heads = {
        "base": (768, 3072, 12, 12),
        "large": (1024, 4096, 24, 16),
        "so400m": (1152, 4304, 27, 16),
        "giant-opt": (1536, 6144, 40, 16),
    }[size]
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": edge, "patch_size": patch,
    }  # fmt: skip


def _vicuna(size: str, longest: int, epsilon: float) -> dict[str, Any]:
    width, inner, layers, heads = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}[size]
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32000,
        "max_position_embeddings": longest, "rms_norm_eps": epsilon,
    }  # fmt: skip


KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": _clip(768, 12, 224, 32),
    "openai/clip-vit-base-patch16": _clip(768, 12, 224, 16),
    "openai/clip-vit-large-patch14": _clip(1024, 24, 224, 14),
    "openai/clip-vit-large-patch14-336": _clip(1024, 24, 336, 14),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(1280, 32, 224, 14, hidden_act="gelu"),
    **{
        f"google/{version}-{size}-patch{patch}-{edge}": _siglip(size, edge, patch)
        for version, size, patch, edges in (
            ("siglip", "base", 16, (224, 256, 384, 512)),
            ("siglip", "large", 16, (256, 384)),
            ("siglip", "so400m", 14, (224, 384)),
            ("siglip2", "base", 16, (224, 256, 384, 512)),
            ("siglip2", "large", 16, (256, 384, 512)),
            ("siglip2", "so400m", 14, (224, 384)),
            ("siglip2", "so400m", 16, (256, 384, 512)),
            ("siglip2", "giant-opt", 16, (256, 384)),
        )
        for edge in edges
    },
    "lmsys/vicuna-7b-v1.5": _vicuna("7b", 4096, 1e-5),
    "lmsys/vicuna-13b-v1.5": _vicuna("13b", 4096, 1e-5),
    "lmsys/vicuna-7b-v1.3": _vicuna("7b", 2048, 1e-6),
    "lmsys/vicuna-13b-v1.3": _vicuna("13b", 2048, 1e-6),
    **{
        f"Qwen/{version}-0.5B-Instruct": {
            "model_type": "qwen2",
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": True,
        }
        for version in ("Qwen2", "Qwen2.5")
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        "model_type": "llama",
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
