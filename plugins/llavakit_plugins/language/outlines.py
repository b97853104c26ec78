"""The shapes of a LLaMA's weights, for plans. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple, Self

from llavakit_plugins.huggingface.hub import read_config
from llavakit_plugins.language.options import (
    LLAMA_TYPES,
    NF4_BYTES,
    LanguageOptions,
    VicunaOptions,
    is_adapter,
)
from llavakit_plugins.outlines.weights import NotPlain, Outline, Weight, linear, plain_config

_COUNTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048,
    "head_dim": None,
}  # fmt: skip
_OTHERS = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


class _Layer(NamedTuple):
    """A linear layer of each block."""

    name: str
    inputs: int
    outputs: int
    bias: bool


class _Held(NamedTuple):
    """A part of the network that holds these weights."""

    weights: tuple[Weight, ...]

    @property
    def weight(self) -> Weight:
        return self.weights[0]

    def parameters(self) -> Iterator[Weight]:
        return iter(self.weights)


class VicunaOutline(Outline):
    name = "vicuna"
    Options = VicunaOptions
    default_template = "vicuna_v1"
    options: LanguageOptions

    def __init__(self, options: LanguageOptions, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        if config is None:
            stated = read_config(options, "text_config")
            config = plain_config(stated, _COUNTS, _OTHERS, LLAMA_TYPES)
        if options.quantize is not None and (options.device == "cpu" or not _has("bitsandbytes")):
            raise NotPlain("widths for 4 bits are looked at")
        if options.lora is not None and not _has("peft"):
            raise NotPlain("there is no peft")  # the network says so
        self.config = config
        self.width: int = config["hidden_size"]
        self.max_length: int = options.max_length or config["max_position_embeddings"]
        self._layers = _layers(config)
        width, rows = self.width, config["vocab_size"]
        table = Weight((rows, width))
        self._head = _Held((table if config["tie_word_embeddings"] else Weight((rows, width)),))
        self.embedding_VE = table
        self.weights = {"model.embed_tokens.weight": table, "model.norm.weight": Weight((width,))}
        if not config["tie_word_embeddings"]:
            self.weights["lm_head.weight"] = self._head.weight
        for number in range(config["num_hidden_layers"]):
            self.weights |= self._block(f"model.layers.{number}")

    def _block(self, name: str) -> dict[str, Weight]:
        norms = ("input_layernorm", "post_attention_layernorm")
        found = {f"{name}.{norm}.weight": Weight((self.width,)) for norm in norms}
        lora = self.options.lora
        targets = set() if lora is None else set(lora.targets)
        own = {layer.name.rpartition(".")[2] for layer in self._layers}
        if targets - own:
            raise NotPlain("`lora.targets` names other layers")
        for layer in self._layers:
            whole = f"{name}.{layer.name}"
            found |= linear(whole, layer.inputs, layer.outputs, bias=layer.bias)
            if lora is not None and layer.name.rpartition(".")[2] in (targets or own):
                down, up = f"{whole}.lora_A.default", f"{whole}.lora_B.default"
                found |= linear(down, layer.inputs, lora.rank, bias=False)
                found |= linear(up, lora.rank, layer.outputs, bias=False)
        return found

    @property
    def head(self) -> _Held:
        return self._head

    @property
    def blocks(self) -> list[_Held]:
        numbers = range(self.config["num_hidden_layers"])
        return [_Held(tuple(self._block(f"model.layers.{number}").values())) for number in numbers]

    def trainable(self) -> Iterator[tuple[str, Weight]]:
        adapted, quantized = self.options.lora is not None, self.options.quantize is not None
        for name, weight in self.weights.items():
            if is_adapter(name) if adapted else not quantized:
                yield name, weight

    def frozen_bytes(self, each: int) -> float:
        if self.options.quantize is None:
            return super().frozen_bytes(each)
        total = sum(weight.numel() for weight in self.parameters())
        products = sum(layer.inputs * layer.outputs for layer in self._layers)
        small = products * int(self.config["num_hidden_layers"])
        return NF4_BYTES * small + each * (total - small)

    def with_options(self, options: LanguageOptions) -> Self:
        before = self.options.lora
        if before is not None and options.lora != before:
            return super().with_options(options)
        return type(self)(options, self.config)

    def cache_shape(self) -> tuple[int, int, int]:
        """Return (layers, key-value heads, head dimension), as networks do."""
        config = self.config
        heads = config["num_key_value_heads"] or config["num_attention_heads"]
        return config["num_hidden_layers"], heads, _per_head(config)


def _per_head(config: Mapping[str, Any]) -> int:
    found: int = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    return found


def _layers(config: Mapping[str, Any]) -> list[_Layer]:
    """Return the linear layers of a block."""
    width, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    fewer = config["num_key_value_heads"] or heads
    per_head = _per_head(config)
    ids = [config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    known = all(0 <= number < config["vocab_size"] for number in ids)
    if width % heads or heads % fewer or per_head % 2 or not known:
        raise NotPlain("sizes of the language model that do not fit")
    with_bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    return [
        _Layer("self_attn.q_proj", width, heads * per_head, with_bias),
        _Layer("self_attn.k_proj", width, fewer * per_head, with_bias),
        _Layer("self_attn.v_proj", width, fewer * per_head, with_bias),
        _Layer("self_attn.o_proj", heads * per_head, width, with_bias),
        _Layer("mlp.gate_proj", width, inner, mlp_bias),
        _Layer("mlp.up_proj", width, inner, mlp_bias),
        _Layer("mlp.down_proj", inner, width, mlp_bias),
    ]


def _has(library: str) -> bool:
    return find_spec(library) is not None
