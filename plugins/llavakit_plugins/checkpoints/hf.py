"""transformers' layout: a folder for `LlavaForConditionalGeneration`, or, with the tiling `anyres`,
for `LlavaNextForConditionalGeneration` or `LlavaOnevisionForConditionalGeneration`.

Tensors get the names that transformers wrote before version 5, which every version since reads:

    vision_tower.vision_model.…    multi_modal_projector.linear_1|linear_2.…
    language_model.model.…         language_model.lm_head.weight
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llavakit import Exporter, LlavaModel, ModelError, Options, Registry, new_folder
from llavakit_plugins.checkpoints.chat_writing import write_chat
from llavakit_plugins.checkpoints.families import NEXT_VIDEO
from llavakit_plugins.checkpoints.hf_reader import HfReader
from llavakit_plugins.checkpoints.hf_source import is_hf, read_hf
from llavakit_plugins.checkpoints.language_names import embedding_name
from llavakit_plugins.checkpoints.parity import prove
from llavakit_plugins.checkpoints.parts import language_state, plain_encoder, stated_options
from llavakit_plugins.checkpoints.pinpoints import Grids, grids_of, note_frames
from llavakit_plugins.checkpoints.processors import strategy_of, write_processor
from llavakit_plugins.checkpoints.projectors import Layer, projector_layers
from llavakit_plugins.checkpoints.prompts import NOTE, note_template
from llavakit_plugins.huggingface.hub import fetch_folder, quietly
from llavakit_plugins.huggingface.known_models import sketch_named
from llavakit_plugins.huggingface.vocabulary import with_rows, with_tokens
from llavakit_plugins.huggingface.writing import ShardSize, tower_state, write_config, write_weights
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

_log = logging.getLogger("llavakit")


class HfOptions(Options):
    projector: Literal["linear", "gelu"] = "linear"
    """How the paper's linear projector W is written. `linear`: W, no activation, the identity;
    transformers reads that. `gelu`: [W; -W], GELU, [I, -I], for readers that know GELU only and
    take the sizes of the layers from the weights, which transformers' own class does not."""
    max_shard_size: ShardSize = "5GB"


class Hf(Exporter):
    """The layout of transformers' LlavaForConditionalGeneration."""

    name = "hf"
    Options = HfOptions

    def __init__(self, options: HfOptions | None = None) -> None:
        self.options = options or HfOptions()

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return is_hf(folder)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        base: Path | None = None,
        template: str | None = None,
    ) -> LlavaModel:
        """Return the model.

        `base` is the folder of the LLaVA that an adapter of peft or trl was trained with,
        `template` the name of the prompt template where the folder's is not it.
        """
        registry = Registry.installed()
        shapes = device.type == "meta"  # for plans: nothing is merged
        parts = read_hf(folder, registry, dtype=dtype, base=base, template=template, shapes=shapes)
        return parts.join(registry, folder, device)

    @classmethod
    def fetch(cls, name: str) -> Path | None:
        """Return the folder of a model on the hub; its layout is recognised later."""
        return fetch_folder(name) if cls.names(name) else None

    @classmethod
    def names(cls, name: str) -> bool:
        """Return whether `name` has the form of a model name on the hub."""
        return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None

    @classmethod
    def sketch(cls, name: str) -> LlavaModel | None:
        """Return the model of the hub without weights: from its cache, or a known one."""
        return sketch_named(name, Registry.installed()) if cls.names(name) else None

    def export(self, model: LlavaModel, folder: Path) -> Mapping[str, Any]:
        """Write the folder, read it back, and return how far the two are apart.

        It is read back with transformers, but for `projector = "gelu"`, which transformers cannot
        read. Raises ModelError for a model that the layout cannot express.
        """
        registry = Registry.installed()
        options = stated_options(model, "vision", registry)
        vision = _vision(model, options)
        layers, activation = self._projector(model)
        grids = grids_of(model, self.name)
        family = grids.family
        text, state = language_state(model.language, self.name)
        text_model: Any = model.language
        tokenizer, tokens, rows = with_tokens(
            model.language.tokenizer, family.tokens, model.language.head.out_features
        )
        # `<image>` needs an id of its own there, and so a row in the table, which is never read
        state = with_rows(state, (embedding_name(text_model.model), "lm_head.weight"), rows)
        tensors = {f"language_model.{name}": value for name, value in state.items()}
        for name, value in tower_state(vision.model).items():
            tensors[f"vision_tower.{name}"] = value
        for number, layer in enumerate(layers, start=1):
            tensors[f"multi_modal_projector.linear_{number}.weight"] = layer.weight
            tensors[f"multi_modal_projector.linear_{number}.bias"] = layer.bias
        if model.image_newline is not None:
            tensors["image_newline"] = model.image_newline
        one_layer = isinstance(options.layer, int)
        config = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "dtype": _widest(tensors),
            # vLLM builds the language model by the class that its own configuration names
            "text_config": {**text.to_dict(), "architectures": _causal(text), "vocab_size": rows},
            "vision_config": vision.model.config.to_dict(),
            "tie_word_embeddings": bool(text.tie_word_embeddings),
            **{f"{name[1:-1]}_token_index": tokens[name] for name in tokens},
            "image_seq_length": model.visual_tokens,
            "projector_hidden_act": activation,
            "vision_feature_layer": options.layer if one_layer else list(options.layer),
            "vision_feature_select_strategy": strategy_of(vision),
            NOTE: note_template(model.choices["template"]) | note_frames(grids),
        }
        if grids.points:
            config["image_grid_pinpoints"] = grids.points
        if grids.cap is not None:
            config["vision_aspect_ratio"] = f"anyres_max_{grids.cap}"
        if family is NEXT_VIDEO and grids.video is not None:
            config["spatial_pool_mode"] = grids.video.pool
            config["spatial_pool_stride"] = grids.video.stride
        with new_folder(folder) as partial:
            files = write_weights(tensors, partial, self.options.max_shard_size)
            write_config(config, partial, model.language)
            chat = write_chat(
                model.template, model.language.tokenizer, videos=len(family.tokens) > 1
            )
            write_processor(vision, tokenizer, chat, grids, partial)
            return {"files": files, **self._prove(model, partial, folder, grids)}

    def check(self, model: LlavaModel) -> None:
        """Raise ModelError for a model that the layout cannot express."""
        _vision(model, stated_options(model, "vision", Registry.installed()))
        self._projector(model)
        grids_of(model, self.name)
        language_state(model.language, self.name)

    def _projector(self, model: LlavaModel) -> tuple[list[Layer], str]:
        """Return the two layers, and the activation between them."""
        layers = projector_layers(model.connector)
        if layers is None or len(layers) > 2:
            what = f"connector `{model.connector.name}`" + (
                f" of depth {len(layers)}" if layers else ""
            )
            remedy = (
                f"`--format original` writes it, as mlp{len(layers)}x_gelu"
                if layers
                else "`--format onnx` writes any that torch can trace; the model folder keeps it"
            )
            raise ModelError(
                f"{what} does not fit transformers' LLaVA, whose projector is two linear layers "
                f"over every patch; {remedy}"
            )
        if len(layers) == 2:
            return layers, "gelu"
        width = model.language.width
        if not layers and model.vision.width != width:
            raise ModelError("connector `identity` joins parts of different widths; use `linear`")
        example = layers[0].weight if layers else next(model.language.parameters())
        identity = Layer(
            torch.eye(width, dtype=example.dtype), torch.zeros(width, dtype=example.dtype)
        )
        first = layers[0] if layers else identity
        if self.options.projector == "linear":
            return [first, identity], "linear"
        # GELU(x) - GELU(-x) = x
        doubled = Layer(
            torch.cat([first.weight, -first.weight]), torch.cat([first.bias, -first.bias])
        )
        back = torch.cat([identity.weight, -identity.weight], dim=1)
        return [doubled, Layer(back, identity.bias)], "gelu"

    def _prove(
        self, model: LlavaModel, partial: Path, folder: Path, grids: Grids
    ) -> dict[str, Any]:
        if self.options.projector == "gelu" and len(projector_layers(model.connector) or ()) < 2:
            ours = self.load(partial, device=model.device, dtype=None)
            return prove(model, ours, folder)
        with quietly(report=False):
            reader = HfReader(partial, model, grids.family)
            figures = prove(model, reader, folder, videos=grids.video is not None)
            figures |= reader.processor_figures()
        if not figures.get("processor_ids_equal", True):
            _log.warning(
                "note: transformers' processor tokenises the text behind an image otherwise than "
                "this model was tuned on, as its tokenizer puts no space there (legacy = false); "
                "the weights are the same"
            )
        return figures


def _vision(model: LlavaModel, options: Any) -> TransformersEncoder:
    """Return the vision encoder. Raises ModelError if the layout cannot hold it."""
    name = model.vision.name
    found = plain_encoder(model.vision)
    if found is None:
        raise ModelError(
            f"vision encoder `{name}` is none of transformers' own, which alone fit into "
            "transformers' LLaVA; the model folder keeps it, and `--format onnx` writes one that "
            "torch can trace and that prepares images by cropping, padding or squashing"
        )
    if options.norm:
        raise ModelError(
            f"vision encoder `{name}` gives features behind its final normalisation, and "
            "transformers' LLaVA takes them before it; the model folder keeps this"
        )
    if model.vision.prefix_tokens > 1:
        raise ModelError(
            f"vision encoder `{name}` drops {model.vision.prefix_tokens} tokens before the patches,"
            " and transformers' LLaVA one or none; the model folder keeps this"
        )
    return found


def _causal(text: Any) -> list[str]:
    """Return the name of transformers' class of a language model, with its head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]


def _widest(tensors: Mapping[str, Tensor]) -> str:
    """Return the dtype that holds every tensor exactly; transformers has only one for a model."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return str(widest).removeprefix("torch.")
