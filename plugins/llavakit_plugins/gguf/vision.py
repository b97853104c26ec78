"""The file beside it: vision encoder and projector, which llama.cpp calls mmproj."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor

from llavakit import ModelError, VisionEncoder
from llavakit_plugins.checkpoints.parts import plain_encoder
from llavakit_plugins.checkpoints.projectors import projector_layers
from llavakit_plugins.gguf.language import identity
from llavakit_plugins.huggingface.writing import tower_state
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

if TYPE_CHECKING:
    from llavakit import LlavaModel

_TOWERS = ("clip_vision_model", "siglip_vision_model")
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def vision_tensors(vision: VisionEncoder) -> dict[str, Tensor]:
    """Return the encoder's tensors by llama.cpp's names, of the layers that run alone."""
    encoder = _encoder(vision)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, encoder.depth)
    tensors = {}
    for name, tensor in tower_state(encoder.model).items():
        inner = name.removeprefix("vision_model.")
        part, _, rest = inner.partition(".layers.")
        if part == "encoder" and int(rest.partition(".")[0]) >= encoder.depth:
            continue
        if inner.startswith(("head.", "embeddings.position_ids")) or (
            inner.startswith("post_layernorm.") and not encoder.normalised
        ):
            continue  # llama.cpp applies the last norm wherever it is there
        found = names.get_name(
            f"vision_tower.vision_model.{inner}", try_suffixes=(".weight", ".bias")
        )
        if found is None:
            raise ModelError(f"vision encoder `{vision.name}` has {inner}, which llama.cpp has not")
        tensors[found] = tensor
    return tensors


def _encoder(vision: VisionEncoder) -> TransformersEncoder:
    """Return the encoder. Raises ModelError for one that llama.cpp's LLaVA does not run."""
    encoder = plain_encoder(vision)
    if encoder is None or encoder.model.config.model_type not in _TOWERS:
        raise ModelError(
            f"vision encoder `{vision.name}` is not written as GGUF, only CLIP and SigLIP; "
            "`--format onnx` writes any that torch can trace"
        )
    if encoder.kept:
        raise ModelError(
            'llama.cpp drops the class token, and this model keeps it (`select = "cls_patch"`); '
            "`--format hf` keeps it"
        )
    if encoder.depth < 1:
        raise ModelError("llama.cpp runs one layer of the vision encoder at least; choose another")
    act = encoder.model.config.hidden_act
    if act not in (*_GELUS, "quick_gelu", "silu"):
        raise ModelError(f"llama.cpp has no vision encoder with the activation `{act}`")
    return encoder


def projector(model: LlavaModel) -> dict[str, Tensor]:
    """Return the two layers, with a GELU between them, that llama.cpp's LLaVA runs.

    A linear projector W becomes two such layers without loss, for each GELU there is: g(x) - g(-x)
    = x, so [W; -W] is the first, and [I, -I] the second.
    """
    if model.tiling is not None:
        raise ModelError(
            f"tiling `{model.tiling.name}` is not written as GGUF, only `single`; `--format hf` "
            "and `--format onnx` keep it"
        )
    layers = projector_layers(model.connector)
    if layers is None or len(layers) > 2:
        what = f"`{model.connector.name}`" + (f" of depth {len(layers)}" if layers else "")
        raise ModelError(
            f"connector {what} is not written as GGUF, only `linear`, `identity` and `mlp` of "
            "depth 1 or 2; `--format onnx` writes it"
        )
    if len(layers) == 2:
        first, second = layers
        weights = (first.weight, first.bias, second.weight, second.bias)
    else:
        width = model.language.width
        like = layers[0].weight if layers else next(model.language.parameters())
        eye = identity(width, like)
        weight, bias = layers[0] if layers else (eye, torch.zeros_like(eye[0]))
        if weight.shape[1] != model.vision.width:
            raise ModelError("connector `identity` joins parts of different widths; use `linear`")
        weights = (
            torch.cat([weight, -weight]), torch.cat([bias, -bias]),
            torch.cat([eye, -eye], dim=1), torch.zeros_like(eye[0]),
        )  # fmt: skip
    return dict(zip(("mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"), weights, strict=True))


def describe_vision(writer: gguf.GGUFWriter, model: LlavaModel) -> None:
    """Write the metadata of the vision encoder's file."""
    encoder = _encoder(model.vision)
    config: Any = encoder.model.config
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(f"llava-{config.model_type}")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.language.width)
    writer.add_vision_image_size(encoder.image_size)
    writer.add_vision_patch_size(encoder.patch_size)
    writer.add_vision_embedding_length(encoder.width)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(encoder.depth)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    # without it llama.cpp leaves the last of the layers out; with it, it runs so many
    writer.add_array("clip.vision.feature_layer", [encoder.depth])
    writer.add_vision_image_mean([float(value) for value in encoder.square.mean])
    writer.add_vision_image_std([float(value) for value in encoder.square.std])
    act = config.hidden_act
    if act in _GELUS:
        writer.add_vision_use_gelu(True)
    elif act == "silu":
        writer.add_vision_use_silu(True)
