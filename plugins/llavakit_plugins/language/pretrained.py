"""What the built-in language models share: transformers' weights, configuration and tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from llavakit import LanguageModel, ModelError, cast_weights
from llavakit.contracts.packing import Packing, Rows
from llavakit_plugins.huggingface.hub import (
    explain_config,
    fetch_config,
    load_tokenizer,
    missing_source,
    quietly,
    read_config,
)
from llavakit_plugins.huggingface.products import choose_products
from llavakit_plugins.huggingface.tokenizer_writing import write_tokenizer
from llavakit_plugins.huggingface.vocabulary import fit_tokenizer
from llavakit_plugins.language.four_bits import refuse_widths
from llavakit_plugins.language.lora import (
    FOLDER as ADAPTERS,
    add_adapters,
    base_weights,
    load_adapters,
    merge_adapters,
    missing_peft,
    save_adapters,
)
from llavakit_plugins.language.options import NF4_BYTES, LanguageOptions, is_adapter
from llavakit_plugins.language.replay import Replay, is_step
from llavakit_plugins.language.weights import (
    missing_bitsandbytes,
    read_weights,
    save_quantized,
    small_device,
)

_NOTHING_TO_QUANTIZE = "`quantize` is for weights that are there: give `source`"
_BY_LENGTH = ("dynamic", "longrope")  # their rotary frequencies depend on the longest position


class PretrainedLanguage(LanguageModel):
    """A language model whose attribute `model` is a causal language model of transformers."""

    Options: ClassVar[type[LanguageOptions]] = LanguageOptions

    model: Any
    options: LanguageOptions

    def __init__(self, options: LanguageOptions, model: Any = None) -> None:
        super().__init__()
        if model is None:
            network, config = self.configure(read_config(options, "text_config"))
            with explain_config(network.__name__):
                model = network(config)
            cast_weights(model, getattr(torch, options.dtype))
            if options.quantize is not None and options.device == "cpu":
                refuse_widths(model, options.source)
        if options.lora is not None:
            add_adapters(model, options.lora)
        choose_products(model, options.products, decodes=True)
        self.options = options
        self.model = model
        self.width: int = model.get_input_embeddings().embedding_dim
        self.max_length = _longest(self.name, model.config, options.max_length)
        self._replay = Replay()

    @classmethod
    @abstractmethod
    def configure(cls, table: dict[str, Any]) -> tuple[type[Any], Any]:
        """Return transformers' class and configuration for the content of a config.json.

        Raises ModelError, with the reason, for a model that this component cannot run.
        """

    @classmethod
    def create(cls, options: Any, **context: Any) -> Self:
        if options.source is not None:
            return cls._pretrained(options.source, options.revision, options)
        if options.quantize is not None:
            raise ModelError(_NOTHING_TO_QUANTIZE)
        return cls(options, **context)

    @classmethod
    def load(cls, options: Any, folder: Path, **context: Any) -> Self:
        language = cls._pretrained(str(folder), None, options)
        if options.lora is not None:
            load_adapters(language.model, folder / ADAPTERS)
        return language

    @classmethod
    def _pretrained(cls, source: str, revision: str | None, options: LanguageOptions) -> Self:
        own = options.model_copy(update={"source": source, "revision": revision})
        network, config = cls.configure(fetch_config(own, "text_config"))
        language = cls(options, read_weights(network, config, own))
        language.tokenizer = load_tokenizer(source, revision, options.legacy)
        rows = language.model.get_input_embeddings().num_embeddings
        fit_tokenizer(language.tokenizer, rows, source)
        return language

    def save(self, folder: Path) -> None:
        """Write weights and tokenizer to `folder`, and adapters to a folder within it."""
        adapted = self.options.lora is not None
        if self.options.quantize is not None:
            save_quantized(self.model, folder)
        else:
            with quietly():
                self.model.save_pretrained(
                    folder, state_dict=base_weights(self.model) if adapted else None
                )
        write_tokenizer(self.tokenizer, folder)
        if adapted:
            save_adapters(self.model, folder / ADAPTERS)

    @classmethod
    def missing(cls, options: Any) -> str | None:
        lacks = missing_peft() if options.lora is not None else None
        if options.quantize is not None:
            lacks = lacks or (_NOTHING_TO_QUANTIZE if options.source is None else None)
            lacks = lacks or missing_bitsandbytes()
        lacks = lacks or missing_source("language model", options)
        if lacks is None and options.quantize is not None and small_device(options) == "cpu":
            # a plan made here may be for a machine with CUDA, a run is for this one
            try:
                with torch.device("meta"):
                    cls(options.model_copy(update={"device": "cpu", "lora": None}))
            except ModelError as error:
                return str(error)
        return lacks

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        adapted, quantized = self.options.lora is not None, self.options.quantize is not None
        for name, parameter in self.named_parameters():
            if is_adapter(name) if adapted else not quantized:
                yield name, parameter

    def frozen_bytes(self, each: int) -> float:
        if self.options.quantize is None:
            return super().frozen_bytes(each)
        # transformers quantises all linear layers except the head
        total = sum(parameter.numel() for parameter in self.parameters())
        small = sum(
            module.weight.numel()
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not self.head and not is_adapter(name)
        )
        return NF4_BYTES * small + each * (total - small)

    def merged(self) -> Self:
        """Return the model with plain weights only; the model itself if it has no others.

        Adapters are added to the weights, and 4-bit weights are dequantised. Weights that do not
        change are shared with this model.
        """
        if self.options.lora is None and self.options.quantize is None:
            return self
        plain = self.options.model_copy(update={"lora": None, "quantize": None})
        language = type(self)(plain, merge_adapters(self.model))
        language.tokenizer = self.tokenizer
        return language.train(self.training)

    def with_options(self, options: Any) -> Self:
        """Return a language model that shares this one's network and has other options.

        `lora` gives a network without adapters new ones. Raises ModelError if it has other adapters
        already, or if a library is missing.
        """
        if self.options.lora is not None and options.lora != self.options.lora:
            raise ModelError(
                "the language model has adapters already, so `lora` cannot give it others; leave "
                "it out, and those learn on"
            )
        lacks = missing_bitsandbytes() if options.quantize is not None else None
        if lacks is not None:
            raise ModelError(lacks)
        has_them = self.options.lora is not None
        own = options.model_copy(update={"lora": None}) if has_them else options
        language = type(self)(own, self.model)
        language.options = options
        if hasattr(self, "tokenizer"):  # a new model, or a plan's, has none
            language.tokenizer = self.tokenizer
        return language

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    @property
    def _head_impl(self) -> Literal["auto", "onednn"]:
        """Return how the loss multiplies by the head, whose module it does not call."""
        return "onednn" if self.options.products == "onednn" else "auto"

    @property
    def embedding_VE(self) -> Tensor | None:
        table = self.model.get_input_embeddings()
        # a subclass may scale the embeddings (Gemma does); then a plain look-up would be wrong, and
        # callers use `embed`
        return table.weight if type(table) is nn.Embedding else None

    def embed(self, ids_T: Tensor) -> Tensor:
        embeds_TE: Tensor = self.model.get_input_embeddings()(ids_T)
        return embeds_TE

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's and those of generation_config.json."""
        ends = self.model.generation_config.eos_token_id
        more = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return super().end_ids | frozenset(more)

    @property
    def blocks(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        if packing.position_ids_T.shape[0] != embeds_TE.shape[0]:
            raise ModelError(
                f"the stream has {embeds_TE.shape[0]} rows, its packing "
                f"{packing.position_ids_T.shape[0]}"
            )
        if rows is None and is_step(embeds_TE, packing):
            return self._replay(self._hidden, embeds_TE, packing)
        return self._hidden(embeds_TE, packing, rows)

    @abstractmethod
    def _hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        """Return what `hidden` does, of a stream and a packing that fit."""

    def cache_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        per_head = config.hidden_size // config.num_attention_heads
        width: int = getattr(config, "head_dim", None) or per_head
        return config.num_hidden_layers, heads, width


def _longest(name: str, config: Any, wanted: int | None) -> int:
    """Return the longest sequence in tokens that the model reads.

    Raises ModelError if `wanted` is so long that the model would change its rotary frequencies: in
    a packed stream one long sample would change those of its neighbours.
    """
    own: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for kind in kinds:
        short = kind.get("original_max_position_embeddings") or own
        if kind.get("rope_type") in _BY_LENGTH and max(wanted or short, short) > short:
            raise ModelError(
                f"language model `{name}` changes its positions where a sequence is longer than "
                f"{short}, and with it those of its neighbours in the stream; use "
                f"`max_length = {short}` or less"
            )
        if kind.get("rope_type") in _BY_LENGTH:
            own = min(own, short)
    return wanted or own
