"""Runs any causal language model of transformers over the packed stream.

The forward pass is transformers' own. Only its attention is replaced, through transformers'
attention interface, by one that knows where the samples of the stream begin and end.

Shapes: T rows, M selected rows, E width, H query heads, G key-value heads, K head dimension.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llavakit import ModelError, packed_attention
from llavakit.contracts.packing import Packing, Rows
from llavakit_kernels.linear_cross_entropy import linear_cross_entropy
from llavakit_plugins.huggingface.hub import explain_config
from llavakit_plugins.language.options import LanguageOptions
from llavakit_plugins.language.pretrained import PretrainedLanguage
from llavakit_plugins.language.traced import current

_ATTENTION = "llavakit"  # the name under which our attention is registered in transformers
_SUPPORTED = {"full_attention", "sliding_attention", "attention", "dense"}


class CausalLMOptions(LanguageOptions):
    """Options of `causal-lm`."""

    plain_logits: bool = False
    """Leave out the factor or the cap that some families apply to their logits. transformers' LLaVA
    leaves it out, so models in its layout were trained without it."""


class CausalLM(PretrainedLanguage):
    """A causal language model of transformers: Qwen, Mistral, Phi, Gemma, SmolLM, OLMo …"""

    name = "causal-lm"
    Options = CausalLMOptions
    options: CausalLMOptions
    default_template = "chat-template"

    def __init__(self, options: CausalLMOptions, model: Any = None) -> None:
        super().__init__(options, model)
        # The loss works on hidden states and the head's weight, so between them there may be
        # nothing but one linear layer: any other parameter outside the decoder is refused.
        head, own = self.head, f"{self.model.base_model_prefix}."
        known = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        others = [
            name
            for name, parameter in self.model.named_parameters()
            if not name.startswith(own) and id(parameter) not in known
        ]
        if not isinstance(head, nn.Linear) or others:
            self._refuse(
                self.model.config.model_type,
                "its logits are not those of a linear layer behind its decoder",
            )

    @classmethod
    def configure(cls, table: dict[str, Any]) -> tuple[type[Any], Any]:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        kind = table.get("model_type")
        if kind is None:
            raise ModelError('say which model it is in `config`, such as `model_type = "qwen2"`')
        with explain_config(f"`{kind}`"):
            config = AutoConfig.for_model(**table)
        network: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        reason = "it is no causal language model" if network is None else _misfit(network, config)
        if reason is not None:
            cls._refuse(kind, reason)
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
        config._attn_implementation = _ATTENTION
        return network, config

    @classmethod
    def _refuse(cls, kind: str, reason: str) -> NoReturn:
        raise ModelError(
            f"language model `{cls.name}` cannot run `{kind}`: {reason}; use a model of another "
            "family, such as Qwen, Llama, Mistral, Phi or Gemma"
        )

    def _hidden(self, embeds_TE: Tensor, packing: Packing, rows: Rows | None = None) -> Tensor:
        config = self.model.config
        call = _Call(packing, _windows(config))
        # the first layer of a compiled model would be another graph than the next: of a view
        embeds_1TE = embeds_TE[None] if current.stream is None else torch.stack((embeds_TE,))
        with _during(call), self._recomputing(call):
            states_1TE = self.model.base_model(
                inputs_embeds=embeds_1TE,
                position_ids=packing.position_ids_T[None],
                use_cache=False,
            ).last_hidden_state
        # A layer that computes attention in another way would mix the samples of the stream without
        # an error, so each layer must have called our attention exactly once.
        compiled = 0 if current.stream is None else current.stream.blocks
        once = len(call.layers) == len({*call.layers})
        if not once or len(call.layers) + compiled != config.num_hidden_layers:
            self._refuse(
                config.model_type,
                f"of its {config.num_hidden_layers} layers, those that use transformers' attention "
                f"interface are {call.layers}: not each of them once",
            )
        hidden_TE: Tensor = states_1TE[0]
        return hidden_TE if rows is None else hidden_TE.index_select(0, rows.index_M)

    @contextmanager
    def _recomputing(self, call: _Call) -> Iterator[None]:
        """Compute each layer again in the backward pass, if `recompute` is set.

        transformers' own switch works in training mode only. A frozen language model is in
        evaluation mode, though gradients still pass through it to the connector.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            yield
            return
        layers: list[Any] = self.blocks
        before = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            own = partial(_call_during, call, layer.forward)
            layer.forward = partial(checkpoint, own, use_reentrant=False)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def logits(self, hidden_ME: Tensor) -> Tensor:
        scaled: Tensor = self.head(hidden_ME * self._logit_scale)
        cap = self._softcap
        return scaled if cap is None else torch.tanh(scaled / cap) * cap

    def loss(self, hidden_ME: Tensor, targets_M: Tensor) -> Tensor:
        # a cap is not linear, so the chunked loss cannot be used and all logits are computed
        if self._softcap is not None:
            return F.cross_entropy(self.logits(hidden_ME).float(), targets_M, reduction="sum")
        return linear_cross_entropy(
            hidden_ME * self._logit_scale,
            self.head.weight,
            targets_M,
            bias=self.head.bias,
            reduction="sum",
            impl=self._head_impl,
        )

    @property
    def _softcap(self) -> float | None:
        cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)
        return None if self.options.plain_logits else cap

    @property
    def _logit_scale(self) -> float:
        """The factor on the logits: Cohere's config has a factor, Granite's a divisor."""
        config = self.model.config
        if self.options.plain_logits:
            return 1.0
        scale: float = getattr(config, "logit_scale", None) or 1.0
        return scale / (getattr(config, "logits_scaling", None) or 1.0)


@dataclass
class _Call:
    """What our attention needs to know during one forward pass.

    It comes through a context variable and not as an argument, because not all models pass extra
    arguments on to their attention.
    """

    packing: Packing
    windows: tuple[int | None, ...]
    """The sliding window of each layer, used if transformers does not pass one."""
    layers: list[int] = field(default_factory=list)
    """The layers that have called our attention so far, in order."""


_current: ContextVar[_Call] = ContextVar("_current")


@contextmanager
def _during(call: _Call) -> Iterator[None]:
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def _call_during(call: _Call, function: Any, *args: Any, **options: Any) -> Any:
    """Call the function with `call` as current: in the forward pass, and when it is recomputed."""
    with _during(call):
        return function(*args, **options)


def _windows(config: Any) -> tuple[int | None, ...]:
    """Return each layer's sliding window in tokens, the token itself included; None for no limit.

    Configurations without `layer_types` have one window for all layers.
    """
    count: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(module: Any) -> int | None:
    """Return the window of an attention's layer, whose number a graph sees only if it has to."""
    windows = _windows(module.config)
    return windows[0] if len({*windows}) == 1 else windows[module.layer_idx]


def _attention(
    module: Any,
    q_1HTK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention `[1, T, H, K]`; the signature is that of transformers' attention functions.

    Raises ModelError for what a packed stream cannot do: dropout, a mask or a bias by position,
    and attention to later tokens.
    """
    stream, layer = current.stream if torch.compiler.is_compiling() else None, 0
    if stream is None:
        call = _current.get()
        layer = int(module.layer_idx)
        call.layers.append(layer)
    if dropout:
        raise ModelError(
            f"the stream's attention has no dropout, the model asks for {dropout}; set the "
            "attention dropout of its `config` to 0"
        )
    sees_more = is_causal is False or getattr(module, "is_causal", True) is False
    if attention_mask is not None or position_bias is not None or sees_more:
        raise ModelError(
            f"{type(module).__name__} looks at more than the tokens before, or weighs them by "
            "their distance; language model `causal-lm` cannot run it"
        )
    q_THK, k_TGK, v_TGK = (x[0].transpose(0, 1) for x in (q_1HTK, k_1GTK, v_1GTK))
    if "sliding_window" in options:
        window = options["sliding_window"]
    else:
        window = _window(module) if stream is not None else call.windows[layer]
    attended_THK = packed_attention(
        q_THK, k_TGK, v_TGK, call.packing if stream is None else cast("Packing", stream),
        layer=layer, scale=scaling, window=window, softcap=softcap, sinks_H=s_aux,
    )  # fmt: skip
    return attended_THK[None], None


def _misfit(network: type[Any], config: Any) -> str | None:
    """Return the reason why a model cannot run over a packed stream, or None if it can."""
    kinds = set(getattr(config, "layer_types", None) or ()) - _SUPPORTED
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder besides its decoder"
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}, which would mix samples"
    if getattr(config, "alibi", False):
        return "its positions are biases of the attention (ALiBi), not rotations or embeddings"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "each of its layers reads token ids, and an image has none"
    # transformers has no flag that says so for every model, but its source shows it
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(sys.modules[network.__module__]):
        return "its attention does not go through transformers' attention interface"
    return None
