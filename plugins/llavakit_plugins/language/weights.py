"""Reads and writes the weights of a language model.

Each tensor is read once, directly into the model, and a model with missing or wrong weights is
refused.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavakit import ModelError, cast_weights
from llavakit_plugins.huggingface.filling import fill
from llavakit_plugins.huggingface.hub import fetch_folder
from llavakit_plugins.huggingface.json_files import end_tokens
from llavakit_plugins.huggingface.unread import being_left
from llavakit_plugins.huggingface.weights import Weights
from llavakit_plugins.huggingface.writing import write_weights
from llavakit_plugins.language import four_bits
from llavakit_plugins.language.lora import base_weights

if TYPE_CHECKING:
    from llavakit_plugins.language.options import LanguageOptions


def read_weights(network: type[Any], config: Any, options: LanguageOptions) -> Any:
    """Return transformers' model `network` with the weights of `options.source`.

    The source is a folder or a name on the hub. Raises ModelError if the weights are missing or
    damaged, or if they do not fit `config`.
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
    # Weights for another device, or for 4 bits, are converted one by one on their way there.
    # Converting them here first would hold all of them in the CPU's memory.
    elsewhere = options.quantize is not None or options.device not in (None, "cpu")
    later = elsewhere or being_left() is not None
    weights = Weights.within(folder, None if later else dtype)
    if weights is None:
        raise ModelError(f"{folder} holds no weights of a language model; copy them there")
    try:
        model = fill(network, config, weights, options.source, dtype=dtype, **how)
        if options.quantize is not None:
            four_bits.prepare(model, options.source, dtype)
        if small:
            # transformers leaves the weights that are not quantised in the file's dtype
            cast_weights(model, dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = _generation(folder / "generation_config.json")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the weights of {options.source} cannot be read: {error}") from error
    return model


def _generation(path: Path) -> Any:
    """Return the generation configuration in a file. Raises ModelError, which names the file."""
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
    """Return a generation configuration that transformers agrees to save.

    Vicuna's states a temperature but not `do_sample`. transformers before 5.23 reads such a
    configuration and refuses to write it. If nothing else helps, only the special tokens are kept.
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
    """Write 4-bit weights, without adapters, in the form that transformers reads.

    transformers' own `save_pretrained` is not used: with a quantised model it ignores `state_dict`
    and writes the adapters among the weights.
    """
    state = base_weights(model)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    write_weights(state, folder, "5GB")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def small_device(options: LanguageOptions) -> str:
    """Return where weights of 4 bits are read to."""
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def missing_bitsandbytes() -> str | None:
    """Return a sentence on what must be installed for 4-bit weights, or None."""
    if find_spec("bitsandbytes") is not None:
        return None
    return "`quantize = \"nf4\"` needs bitsandbytes; install it with `pip install 'llavakit[lora]'`"


def _quantized(options: LanguageOptions, small: bool) -> dict[str, Any]:
    """Return transformers' options for reading 4-bit weights, those of QLoRA (arXiv 2305.14314).

    Files that are quantised already (`small`) bring options of their own. Raises ModelError if
    bitsandbytes is not installed.
    """
    if (reason := missing_bitsandbytes()) is not None:
        raise ModelError(reason)
    from transformers import BitsAndBytesConfig

    placed_on = {"device_map": {"": small_device(options)}}
    if small:
        return placed_on
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, options.dtype),
    )
    return {**placed_on, "quantization_config": how}
