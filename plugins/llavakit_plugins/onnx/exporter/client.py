"""Writes the files beside the graphs, which transformers and transformers.js read first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llavakit import IMAGE_ID, ModelError, encode
from llavakit.contracts.data import IMAGE, Sample, Turn
from llavakit_plugins.checkpoints.chat_writing import chat_template
from llavakit_plugins.checkpoints.prompt_format import PromptFormat
from llavakit_plugins.onnx.exporter.images import javascript_settings, python_settings
from llavakit_plugins.onnx.runtime.layout import GRAPHS, graph_file
from llavakit_plugins.onnx.runtime.pictures import Preparation

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from llavakit import LlavaModel, PromptTemplate

_PATCH = 4096
"""Larger than any image. Clients compute the number of image tokens as patches plus
`num_additional_image_tokens`; with 0 patches the sum is the number that we state."""


def write_client_files(
    model: LlavaModel,
    folder: Path,
    *,
    form: PromptFormat,
    preparation: Preparation,
    end_tokens: Sequence[int],
    precisions: Sequence[str],
    external: Mapping[str, int],
) -> None:
    """Write all files of the folder except the graphs and the report.

    `external` are the graphs with weights in a second file. Raises ModelError if no chat template
    makes a client read prompts as the model does.
    """
    tokenizer = model.language.tokenizer
    backend, image_token = client_tokenizer(tokenizer, form)
    template = agreeing_template(model.template, tokenizer, form)
    backend.save(str(folder / "tokenizer.json"))
    # transformers' processor reads this file, transformers.js reads tokenizer_config.json
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    special = {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    clean_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    config = _config(model, image_token, precisions, external)
    tables: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": _generation(tokenizer, end_tokens),
        "preprocessor_config.json": javascript_settings(preparation),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": _PATCH,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": model.visual_tokens,
            "image_processor": python_settings(preparation),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            **special,
            "image_token": IMAGE,
            "clean_up_tokenization_spaces": clean_up,
            "model_max_length": model.language.max_length,
            # generation in batches reads the last row of each prompt,
            # which padding on the right would hide
            "padding_side": "left",
            "chat_template": template,
        },
    }
    for name, table in tables.items():
        text = json.dumps(table, indent=2, ensure_ascii=False)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def client_tokenizer(
    tokenizer: PreTrainedTokenizerBase, form: PromptFormat
) -> tuple[Tokenizer, int]:
    """Return the tokenizer with `<image>` added as a special token, and the id of that token."""
    from tokenizers import AddedToken, Tokenizer

    from llavakit import Reader

    table = json.loads(Reader.of(tokenizer).backend.to_str())
    if not form.adds_bos:  # the template writes `<s>`; a client would then write it twice
        table["post_processor"] = _without_specials(table["post_processor"])
    backend: Tokenizer = Tokenizer.from_str(json.dumps(table))
    # not normalised: a normaliser could change the text of the mark, and it would not be found
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    image_token = backend.token_to_id(IMAGE)
    assert image_token is not None  # it was added
    return backend, image_token


def _without_specials(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if processor is None or processor["type"] == "TemplateProcessing":
        return None
    if processor["type"] == "Sequence":
        kept = [p for p in processor["processors"] if p["type"] != "TemplateProcessing"]
        return {"type": "Sequence", "processors": kept} if kept else None
    return processor


def agreeing_template(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, form: PromptFormat
) -> str:
    """Return a chat template with which a client gets the same prompt ids as the model.

    Two forms are tried, without and with a space behind an image, on several questions. Raises
    ModelError, with the ids that differ, if neither gives the same.
    """
    backend, image_token = client_tokenizer(tokenizer, form)
    questions = [f"{IMAGE}\nWhat is in the picture?", f"{IMAGE}\n{IMAGE}\nWhich is red?"]
    if form.shows_question:
        questions.append("What is the sea like?")
    wanted = []
    for text in questions:
        image_path = Path("picture")  # never opened: only the number of images matters
        sample = Sample("prompt", (Turn("human", text),), (image_path,) * text.count(IMAGE))
        ids = encode(sample, template, tokenizer).ids
        wanted.append(np.where(ids == IMAGE_ID, image_token, ids).tolist())
    got: list[list[int]] = []
    for space in (False, True):
        jinja = chat_template(form, space_behind_image=space)
        prompts = [render(jinja, [{"role": "user", "content": text}]) for text in questions]
        got = [list(backend.encode(prompt).ids) for prompt in prompts]
        if got == wanted:
            return jinja
    number = next(n for n, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    raise ModelError(
        f"a client's tokenizer reads the prompt for {questions[number]!r} as {got[number]}, the "
        f"model as {wanted[number]}; use another prompt template or tokenizer"
    )


def render(template: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt that a client renders from messages, up to where the answer begins."""

    def raise_exception(message: str) -> None:
        raise ModelError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


def _generation(tokenizer: Any, end_tokens: Sequence[int]) -> dict[str, Any]:
    ends = sorted(end_tokens)
    known = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    return {name: value for name, value in known.items() if value is not None}


def _config(
    model: LlavaModel, image_token: int, precisions: Sequence[str], external: Mapping[str, int]
) -> dict[str, Any]:
    layers, heads, width = model.language.cache_shape()
    inner = getattr(model.language, "model", None)
    text = inner.config.to_dict() if inner is not None else {}
    text |= {
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "head_dim": width,
        "hidden_size": model.language.width,
        "vocab_size": model.language.head.weight.shape[0],
        "max_position_embeddings": model.language.max_length,
    }
    vision = getattr(getattr(model.vision, "model", None), "config", None)
    shape = (
        vision.to_dict()
        if vision is not None and hasattr(vision, "to_dict")
        else {"model_type": "clip_vision_model"}
    )
    shape |= {"image_size": model.vision.image_size, "hidden_size": model.vision.width}
    for table in (text, shape):
        # they tell of the parts' own files, and clients would take them for those of this folder
        for name in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            table.pop(name, None)
    clients: dict[str, Any] = {"dtype": dict.fromkeys(GRAPHS, precisions[0])}
    if external:
        clients["use_external_data_format"] = dict(external)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_id": image_token,
        "image_token_index": image_token,
        "image_seq_length": model.visual_tokens,
        "vision_feature_select_strategy": "full",
        "text_config": text,
        "vision_config": shape,
        "tie_word_embeddings": False,
        "transformers.js_config": clients,
    }


def external_files(folder: Path, precisions: Sequence[str]) -> dict[str, int]:
    """Return the graphs that keep weights in a file beside them; the value is the file count."""
    names = [graph_file(graph, precision) for precision in precisions for graph in GRAPHS]
    return {Path(name).name: 1 for name in names if (folder / f"{name}_data").is_file()}
