"""Reads the weights of a language model: once, in place, and only where all of them fit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavakit import ModelError, cast_weights
from llavakit_plugins.huggingface.filling import fill
from llavakit_plugins.huggingface.hub import fetch_folder
from llavakit_plugins.huggingface.json_files import end_tokens
from llavakit_plugins.huggingface.weights import Weights
from llavakit_plugins.huggingface.writing import write_weights
from llavakit_plugins.language import four_bits
from llavakit_plugins.language.lora import base_weights

if TYPE_CHECKING:
    from llavakit_plugins.language.options import LanguageOptions

NF4_BYTES = 4.127 / 8  # a weight's: 4 bits, and its share of the scales, which are quantized too


def read_weights(network: type[Any], config: Any, options: LanguageOptions) -> Any:
    """Return transformers' model in `options.source`, a folder or a name on the hub.

    Raises ModelError where the weights cannot be had, or are not those of `config`.
    """
    assert options.source is not None
    small = getattr(config, "quantization_config", None) is not None
    if small and options.quantize is None:
        raise ModelError(
            f"{options.source} holds quantised weights; take them in full precision, and give "
            '`quantize = "nf4"` to hold them in 4 bits'
        )
    folder = fetch_folder(options.source, options.revision)
    dtype = getattr(torch, options.dtype)
    how: dict[str, Any] = {}
    if options.device is not None:
        how["device_map"] = {"": options.device}
    if options.quantize is not None:
        how |= _quantized(options, small)
    # on their way elsewhere weights are turned one by one, and need not be held here before
    elsewhere = options.quantize is not None or options.device not in (None, "cpu")
    weights = Weights.within(folder, None if elsewhere else dtype)
    if weights is None:
        raise ModelError(f"{folder} holds no weights of a language model; copy them there")
    try:
        model = fill(network, config, weights, options.source, dtype=dtype, **how)
        if options.quantize is not None:
            four_bits.prepare(model, options.source, dtype)
        if small:
            cast_weights(model, dtype)  # what is not quantised, which transformers leaves as it was
        if (folder / "generation_config.json").is_file():
            model.generation_config = _generation(folder / "generation_config.json")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the weights of {options.source} cannot be read: {error}") from error
    return model


def _generation(path: Path) -> Any:
    """Return a generation configuration. Raises ModelError, which names the file."""
    from transformers import GenerationConfig

    end_tokens(path)
    try:
        return _consistent(GenerationConfig.from_pretrained(path.parent))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path} is no generation configuration ({reason:.200}); copy it again, or remove it"
        ) from error


def _consistent(config: Any) -> Any:
    """Return a generation configuration that can be saved.

    Vicuna's names a temperature and does not say that it samples; transformers before 5.23 reads
    that and refuses to write it.
    """
    for do_sample in (config.do_sample, True):
        config.do_sample = do_sample
        try:
            config.validate(strict=True)
        except ValueError:
            continue
        return config
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return type(config)(**{name: getattr(config, name) for name in tokens})


def save_quantized(model: Any, folder: Path) -> None:
    """Write weights of 4 bits, without adapters, as transformers reads them.

    transformers' own `save_pretrained` writes the adapters of a quantised model among its weights,
    whatever it is told.
    """
    state = base_weights(model)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    write_weights(state, folder, "5GB")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def missing_bitsandbytes() -> str | None:
    """Return what must be installed for weights of 4 bits, or None."""
    if find_spec("bitsandbytes") is not None:
        return None
    return '`quantize = "nf4"` needs bitsandbytes; install it with `pip install llavakit[lora]`'


def _quantized(options: LanguageOptions, small: bool) -> dict[str, Any]:
    """Return transformers' options for 4-bit weights, as QLoRA (arXiv 2305.14314) has them.

    Weights that are `small` already bring theirs.
    """
    if (reason := missing_bitsandbytes()) is not None:
        raise ModelError(reason)
    from transformers import BitsAndBytesConfig

    placed_on = {
        "device_map": {"": options.device or ("cuda" if torch.cuda.is_available() else "cpu")}
    }
    if small:
        return placed_on
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, options.dtype),
    )
    return {**placed_on, "quantization_config": how}
