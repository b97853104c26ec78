"""Converts configurations and tensors of a checkpoint to our components, and back.

Tensors are used as they are and never copied: a memory-mapped file stays mapped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from llavakit import (
    LanguageModel,
    LlavaModel,
    ModelError,
    ModelRecipe,
    Registry,
    Tiling,
    Use,
    VisionEncoder,
    join_model,
)
from llavakit_plugins.checkpoints.language_names import family_names, layout_names, scaled_logits
from llavakit_plugins.checkpoints.precision import DTYPES, State, precision
from llavakit_plugins.checkpoints.projectors import Layer, make_connector
from llavakit_plugins.checkpoints.prompts import TemplateUse
from llavakit_plugins.huggingface.filling import fill
from llavakit_plugins.huggingface.hub import UnfitConfig
from llavakit_plugins.huggingface.json_files import check_shape, end_tokens
from llavakit_plugins.huggingface.vocabulary import fit_tokenizer
from llavakit_plugins.vision.pixels import Pixels
from llavakit_plugins.vision.vision_transformer import TransformersEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("llavakit")
_MALFORMED = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what transformers raises for configurations that make no sense


@dataclass(frozen=True)
class Parts:
    """Everything that a model is made of, read from another layout."""

    vision: VisionEncoder
    vision_use: Use[VisionEncoder]
    language: LanguageModel
    language_use: Use[LanguageModel]
    projector: Sequence[Layer]
    """Linear layers with exact GELU between them; none is the identity."""
    template: TemplateUse
    tiling: Use[Tiling] | None = None
    image_newline: Tensor | None = None

    def join(self, registry: Registry, where: object, device: torch.device) -> LlavaModel:
        """Return the model on a device. Raises ModelError where the projector fits neither side."""
        use, connector = make_connector(
            self.projector, self.vision.width, self.language.width, registry, where
        )
        recipe = ModelRecipe(
            vision=self.vision_use,
            connector=use,
            language=self.language_use,
            template=self.template,
            tiling=self.tiling,
        )
        model = join_model(recipe, registry, self.vision, connector, self.language)
        if self.image_newline is not None:
            model.image_newline = nn.Parameter(self.image_newline)
        model = model.to(device).eval()
        network: Any = self.language
        network.model.tie_weights()  # what is moved to the meta device is shared no more
        return model


# -- from a configuration and tensors --------------------------------------------------------------


def make_vision(
    table: Mapping[str, Any],
    state: State,
    registry: Registry,
    where: object,
    *,
    layer: int | Sequence[int],
    select: str,
    pixels: Pixels,
) -> tuple[Use[VisionEncoder], VisionEncoder]:
    """Return the installed vision encoder for a configuration, with these tensors.

    Raises ModelError, which begins with `where`, for what does not fit.
    """
    kind = _type_of(table, "vision tower", where)
    found = {
        _config_class(component).model_type: component
        for component in registry.all(VisionEncoder).values()
        if issubclass(component, TransformersEncoder)
    }
    # an encoder of ours reads these, but not as a LLaVA of this layout hands it its images
    if kind.startswith("siglip2"):
        raise ModelError(
            f"{where}: the vision tower is a SigLIP 2 of the kind NaFlex, which reads images in "
            "their own proportions, and LLaVA hands it squares; take one of a fixed size, such as "
            "google/siglip2-base-patch16-224"
        )
    if kind not in found:
        raise ModelError(
            f"{where}: no installed vision encoder reads a vision tower of type `{kind}`; known: "
            f"{', '.join(sorted(found))}"
        )
    component = found[kind]
    network: Any = component.architecture()
    with _sensible("vision tower", where):
        config = _config_class(component)(**_own(table, "model_type"))
    dtype = precision(state, "vision tower", where)
    with _sensible("vision tower", where):
        model = fill(network, config, state, where, dtype=dtype)
    options = {
        "config": config_table(config),
        "layer": layer if isinstance(layer, int) else list(layer),
        "select": select,
        **pixels._asdict(),
        "dtype": DTYPES[model.dtype],
    }
    vision: VisionEncoder = component(component.Options(**options), model)
    return Use[VisionEncoder].model_validate({"use": component.name, **options}), vision


def _config_class(component: type[TransformersEncoder]) -> Any:
    return component.architecture().config_class


def make_language(
    table: Mapping[str, Any],
    state: State,
    registry: Registry,
    where: object,
    *,
    max_length: int | None = None,
    plain_logits: bool = False,
) -> tuple[Use[LanguageModel], LanguageModel]:
    """Return the installed language model for a configuration, with these tensors, no tokenizer.

    With `plain_logits` a family's factor or cap on its logits is left out. Whether the head is the
    embedding follows from the tensors where they contradict `table`.
    Raises ModelError, which begins with `where`, for what does not fit.
    """
    from transformers import CONFIG_MAPPING

    kind = _type_of(table, "language model", where)
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{where}: transformers knows no language model of type `{kind}`; fix `model_type` in "
            "config.json, or install the transformers that does"
        )
    component: Any = registry.get(LanguageModel, "vicuna" if kind == "llama" else "causal-lm")
    with _sensible("language model", where):
        network, config = component.configure(_own(table))
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        config.tie_word_embeddings = head.shape == embedding.shape and torch.equal(head, embedding)
    dtype = precision(state, "language model", where)
    with _sensible("language model", where):
        state = family_names(state, network, config)
        model = fill(network, config, state, where, dtype=dtype)
    options: dict[str, Any] = {"config": config_table(config), "dtype": DTYPES[model.dtype]}
    if max_length is not None:
        options["max_length"] = max_length
    if plain_logits and (scaled := scaled_logits(config)) is not None:
        options["plain_logits"] = True
        _log.warning(
            "note: %s: transformers' LLaVA leaves out `%s` of a language model of type `%s`, so "
            "it is left out here; set `plain_logits = false` in the imported model.toml for the "
            "family's own logits", where, scaled, kind,
        )  # fmt: skip
    language: LanguageModel = component(component.Options(**options), model)
    return Use[LanguageModel].model_validate({"use": component.name, **options}), language


def set_tokenizer(
    language: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    where: Path,
    source: Path | None = None,
) -> None:
    """Give a language model its tokenizer, and the end tokens of generation_config.json in `where`.

    Raises ModelError, which names the tokenizer's own folder `source` if that is another, where the
    tokenizer writes more tokens than the model has rows for.
    """
    fit_tokenizer(tokenizer, language.head.out_features, source or where)
    language.tokenizer = tokenizer
    ends = end_tokens(where / "generation_config.json")
    if ends is not None:
        network: Any = language
        network.model.generation_config.eos_token_id = ends


def config_table(config: Any) -> dict[str, Any]:
    """Return what a configuration says of the architecture, as a recipe would."""
    return {key: value for key, value in config.to_diff_dict().items() if key not in _PROVENANCE}


_PROVENANCE = ("transformers_version", "architectures", "dtype", "_name_or_path")


def _own(table: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return a configuration without the precision, which the tensors say, and the `others`."""
    return {k: v for k, v in table.items() if k not in ("dtype", "torch_dtype", *others)}


def _type_of(table: Mapping[str, Any], what: str, where: object) -> str:
    if table.get("quantization_config"):
        raise ModelError(
            f"{where}: the {what} is quantised; take the checkpoint in full precision, and choose "
            "4 bits when it is used"
        )
    kind = table.get("model_type")
    check_shape(table, f"{where}: config.json of the {what}")
    if not isinstance(kind, str):
        raise ModelError(f"{where}: config.json gives the {what} no `model_type`; add it")
    return kind


@contextmanager
def _sensible(what: str, where: object) -> Iterator[None]:
    """Turn errors of transformers about a configuration into a ModelError."""
    try:
        yield
    except (*_MALFORMED, UnfitConfig) as error:
        cause = error.__cause__ if isinstance(error, UnfitConfig) else error
        reason = " ".join(str(cause).split())[:300]
        raise ModelError(
            f"{where}: transformers makes no {what} of this config.json ({reason}); fix it, or "
            "copy the checkpoint again"
        ) from error


# -- from our components ---------------------------------------------------------------------------


def plain_encoder(vision: VisionEncoder) -> TransformersEncoder | None:
    """Return a vision encoder if it is one of transformers', as its LLaVA would build it."""
    from transformers import MODEL_MAPPING

    if not isinstance(vision, TransformersEncoder):
        return None
    usual: Any = MODEL_MAPPING.get(type(vision.model.config), None)
    return vision if usual is type(vision.model) else None


def language_state(language: LanguageModel, layout: str) -> tuple[Any, dict[str, Tensor]]:
    """Return transformers' configuration and tensors of a language model.

    Names begin with `model.` or are `lm_head.weight`; a head that is tied to the embedding is left
    out. Raises ModelError if `layout` cannot hold the model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    model: Any = getattr(language, "model", None)
    usual: Any = None
    if isinstance(model, PreTrainedModel):
        usual = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    remedy = "the model folder keeps it"  # onnx takes transformers' own alone, too
    if usual is None or usual is not type(model):
        raise ModelError(
            f"language model `{language.name}` is none of transformers' own, which alone fit into "
            f"the layout `{layout}`; {remedy}"
        )
    config = model.config
    state = layout_names(model)
    strange = [n for n in state if not n.startswith("model.") and n != "lm_head.weight"]
    scaled = scaled_logits(config)
    if scaled is not None and getattr(getattr(language, "options", None), "plain_logits", False):
        scaled = None
    if strange or scaled:
        what = strange[0] if strange else scaled
        raise ModelError(
            f"a language model of type `{config.model_type}` has {what}, for "
            f"which the layout `{layout}` has no place; {remedy}"
        )
    return config, state


def stated_options(model: LlavaModel, part: str, registry: Registry) -> Any:
    """Return a part's options as its recipe states them, with the defaults."""
    choice = dict(model.choices[part])
    kind: Any = {"vision": VisionEncoder, "language": LanguageModel}[part]
    return registry.get(kind, choice.pop("use")).Options(**choice)
