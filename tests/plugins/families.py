"""Small random language models of several families, and a tokenizer as Qwen's is."""

from __future__ import annotations

from typing import Any

import torch

_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "mistral": {"sliding_window": 5},
    "phi": {},  # a head with bias
    "phi3": {"sliding_window": 5},
    "gemma": {"head_dim": 12},
    "gemma2": {
        "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7,
    },
    "gemma3_text": {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 10},
    "llama": {},
    "smollm3": {},
    "olmo2": {},
    "stablelm": {},
    "gpt_neox": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere2": {"sliding_window": 5, "logit_scale": 0.5},
    "qwen2_moe": {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "num_experts": 4,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "gpt_oss": {"head_dim": 12, "sliding_window": 5, "num_local_experts": 4},
}  # fmt: skip


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a small model of a family."""
    return {"model_type": family, **_SHAPE, **FAMILIES[family], **changes}


def their_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' own model with eager attention, float32, no weight as it was made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(**config_of(family, **changes))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():  # zero biases would hide a forgotten one
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def qwen_tokenizer() -> Any:
    """Return a byte-level tokenizer without beginning, padding and unknown token, as Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made
