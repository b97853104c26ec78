"""The language model's file: tensors, shape, tokenizer and chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor

from llavakit import LanguageModel, ModelError
from llavakit.contracts.data import IMAGE
from llavakit_plugins.checkpoints.chat_writing import write_chat
from llavakit_plugins.checkpoints.parts import language_state
from llavakit_plugins.gguf.vocabulary import write_vocabulary

if TYPE_CHECKING:
    from llavakit import LlavaModel

_MEDIA = "<__media__>"  # what llama.cpp's programs write in a message's text for an image
_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def language_tensors(language: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors by llama.cpp's names. Raises ModelError for another family."""
    config, state = language_state(language, "gguf")
    architecture = _architecture(config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, tensor in state.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(
                f"a language model of type `{config.model_type}` has {name}, for which GGUF has "
                "no place; `--format hf` keeps it"
            )
        if architecture is gguf.MODEL_ARCH.LLAMA:
            if ".q_proj." in name:
                tensor = _interleaved(tensor, config.num_attention_heads)
            elif ".k_proj." in name:
                tensor = _interleaved(tensor, config.num_key_value_heads)
        tensors[found] = tensor
    return tensors


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys so that pairs which are rotated together are neighbours.

    transformers has the two numbers of a pair half a head apart; for LLaMA, llama.cpp has them as
    the paper does (arXiv 2104.09864). Qwen2 stays as it is.
    """
    turned: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return turned


def _architecture(config: Any) -> gguf.MODEL_ARCH:
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"a language model of type `{kind}` is not written as GGUF, only LLaMA's and Qwen2's "
            "architecture; `--format hf` keeps it, and llama.cpp's own converter may know it"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # other scalings have metadata that llama.cpp reads in its own way: refused, as not proven here
    if rope.get("rope_type", "default") not in ("default", "linear"):
        raise ModelError(
            f"positions of type `{rope['rope_type']}` are not written as GGUF; `--format hf` keeps "
            "them"
        )
    if getattr(config, "use_sliding_window", False):
        raise ModelError("a sliding window is not written as GGUF; `--format hf` keeps it")
    if config.hidden_act != "silu":
        raise ModelError(
            f"llama.cpp runs `{kind}` with the activation `silu` alone, and this model has "
            f"`{config.hidden_act}`; `--format hf` keeps it"
        )
    return _ARCHITECTURES[kind]


def architecture(model: LlavaModel) -> str:
    """Return llama.cpp's name of the language model's architecture."""
    config, _ = language_state(model.language, "gguf")
    return str(gguf.MODEL_ARCH_NAMES[_architecture(config)])


def describe_language(writer: gguf.GGUFWriter, model: LlavaModel) -> None:
    """Write the metadata of the language model's file."""
    config, state = language_state(model.language, "gguf")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"llava-{config.model_type}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(model.language.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    rows = int(state["model.embed_tokens.weight"].shape[0])
    writer.add_vocab_size(rows)
    write_vocabulary(writer, model.language, rows, adds_bos=model.template.adds_bos)
    chat = write_chat(model.template, model.language.tokenizer)
    if chat is not None:
        writer.add_chat_template(chat.replace(IMAGE, _MEDIA))


def identity(width: int, like: Tensor) -> Tensor:
    """Return the identity in the precision of another tensor."""
    return torch.eye(width, dtype=like.dtype, device=like.device)
