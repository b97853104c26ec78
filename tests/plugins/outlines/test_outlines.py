"""Outlines have the shapes of the networks that they stand for, and plans by them are the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llavakit import (
    LlavaError,
    ModelError,
    Options,
    Plan,
    Recipe,
    Registry,
    find_recipe,
    make_plan,
    recipe_files,
)
from llavakit_plugins.connectors.identity import Identity
from llavakit_plugins.connectors.mlp import Linear, Mlp
from llavakit_plugins.connectors.options import MlpOptions, PoolOptions
from llavakit_plugins.connectors.outlines import (
    IdentityOutline,
    LinearOutline,
    MlpOutline,
    PoolOutline,
)
from llavakit_plugins.connectors.pool import Pool
from llavakit_plugins.language.options import VicunaOptions
from llavakit_plugins.language.outlines import VicunaOutline
from llavakit_plugins.language.vicuna import Vicuna
from llavakit_plugins.outlines import plan as outlined
from llavakit_plugins.outlines.weights import NotPlain
from llavakit_plugins.vision.clip import Clip
from llavakit_plugins.vision.options import SiglipOptions, TransformersOptions
from llavakit_plugins.vision.outlines import ClipOutline, SiglipOutline
from llavakit_plugins.vision.siglip import Siglip

TEXT = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "max_position_embeddings": 64,
}  # fmt: skip
SEEN = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 30, "patch_size": 7,
}  # fmt: skip
LANGUAGES: dict[str, dict[str, Any]] = {
    "plain": {"config": TEXT},
    "tied": {"config": {**TEXT, "tie_word_embeddings": True}},
    "grouped queries": {"config": {**TEXT, "num_key_value_heads": 2}},
    "one key-value head": {"config": {**TEXT, "num_key_value_heads": 1}},
    "head_dim": {"config": {**TEXT, "head_dim": 10, "num_key_value_heads": 3}},
    "attention_bias": {"config": {**TEXT, "attention_bias": True, "num_key_value_heads": 2}},
    "mlp_bias": {"config": {**TEXT, "mlp_bias": True}},
    "all biases": {"config": {**TEXT, "mlp_bias": True, "attention_bias": True, "head_dim": 16}},
    "a shorter context": {"config": TEXT, "max_length": 32},
    "half precision": {"config": TEXT, "dtype": "bfloat16"},
    "oneDNN": {"config": TEXT, "products": "onednn"},
    "the defaults": {"config": {"num_hidden_layers": 2}},
    "named": {"source": "lmsys/vicuna-13b-v1.3", "dtype": "bfloat16", "max_length": 2048},
    "named, changed": {"source": "lmsys/vicuna-7b-v1.5", "config": {"vocab_size": 32064}},
    "SmolLM2": {"source": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "adapters": {"config": TEXT, "lora": {"rank": 4}},
    "adapters of some": {"config": TEXT, "lora": {"rank": 4, "targets": ["q_proj", "up_proj"]}},
    "adapters, tied": {"config": {**TEXT, "tie_word_embeddings": True}, "lora": {"rank": 3}},
    "adapters, biases": {
        "config": {**TEXT, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
        "lora": {"rank": 5},
    },
    "4 bits": {"config": TEXT, "quantize": "nf4"},
    "4 bits, biases": {"config": {**TEXT, "attention_bias": True}, "quantize": "nf4"},
    "4 bits, adapters": {"config": TEXT, "quantize": "nf4", "lora": {"rank": 4}},
    "4 bits, tied, some adapters": {
        "config": {**TEXT, "tie_word_embeddings": True, "num_key_value_heads": 3},
        "quantize": "nf4",
        "lora": {"rank": 4, "targets": ["k_proj"]},
    },
}
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {"config": SEEN},
    "the defaults": {"config": {"num_hidden_layers": 2}},
    "greys": {"config": {**SEEN, "num_channels": 1}},
    "several layers": {"config": SEEN, "layer": [-2, -1, 1]},
    "the embeddings": {"config": SEEN, "layer": 0},
    "half precision": {"config": SEEN, "dtype": "float16"},
    "oneDNN": {"config": SEEN, "products": "onednn"},
    "torchvision": {"config": SEEN, "backend": "torchvision"},
}
CLIPS = {
    **ENCODERS,
    "class tokens": {"config": SEEN, "select": "cls_patch"},
    "named": {"source": "openai/clip-vit-large-patch14-336"},
    "ViT-H": {"source": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "config": {"projection_dim": 9}},
}
SIGLIPS = {
    **ENCODERS,
    "no head": {"config": {**SEEN, "vision_use_head": False}},
    "named": {"source": "google/siglip-so400m-patch14-384"},
    "SigLIP 2": {"source": "google/siglip2-base-patch16-256"},
}
BEYOND: dict[str, tuple[type, type, dict[str, Any]]] = {
    "an unknown key": (Vicuna, VicunaOutline, {**TEXT, "hidden_sizes": 3}),
    "a frequency": (Vicuna, VicunaOutline, {**TEXT, "rope_scaling": {"rope_type": "dynamic"}}),
    "no number": (Vicuna, VicunaOutline, {**TEXT, "hidden_size": "48"}),
    "a flag for a number": (Vicuna, VicunaOutline, {**TEXT, "num_hidden_layers": True}),
    "none": (Vicuna, VicunaOutline, {**TEXT, "vocab_size": None}),
    "heads": (Vicuna, VicunaOutline, {**TEXT, "num_attention_heads": 5}),
    "a token": (Vicuna, VicunaOutline, {**TEXT, "pad_token_id": 96}),
    "an activation": (Vicuna, VicunaOutline, {**TEXT, "hidden_act": "silly"}),
    "a kind": (Vicuna, VicunaOutline, {**TEXT, "model_type": "qwen2"}),
    "layers without end": (Vicuna, VicunaOutline, {**TEXT, "num_hidden_layers": 10**6}),
    "a huge width": (Vicuna, VicunaOutline, {**TEXT, "intermediate_size": 10**15}),
    "oblong": (Clip, ClipOutline, {**SEEN, "image_size": [30, 60]}),
    "heads of CLIP": (Clip, ClipOutline, {**SEEN, "num_attention_heads": 3}),
    "another family": (Clip, ClipOutline, {**SEEN, "model_type": "siglip"}),
    "a patch": (Siglip, SiglipOutline, {**SEEN, "patch_size": 31}),
}


class Shapes(NamedTuple):
    """The shapes of all parameters, and of those that learn, by name."""

    all: dict[str, tuple[int, ...]]
    learning: dict[str, tuple[int, ...]]
    bytes: tuple[float, float]


def name_of(name: str) -> str:
    """Return a parameter's name without what wraps the network."""
    for prefix in ("model.", "vision_model."):
        name = name.removeprefix(prefix)
    return name.replace(".base_layer.", ".")


def shapes_of(network: Any) -> Shapes:
    own = {name_of(name): tuple(weight.shape) for name, weight in network.named_parameters()}
    learning = {name_of(name): tuple(weight.shape) for name, weight in network.trainable()}
    return Shapes(own, learning, (network.frozen_bytes(2), network.frozen_bytes(4)))


def outlined_shapes(outline: Any, prefix: str = "") -> Shapes:
    own = {name.removeprefix(prefix): one.shape for name, one in outline.weights.items()}
    learning = {name.removeprefix(prefix): one.shape for name, one in outline.trainable()}
    return Shapes(own, learning, (outline.frozen_bytes(2), outline.frozen_bytes(4)))


def on_meta(network: Callable[..., Any], *given: Any, **more: Any) -> Any:
    with torch.device("meta"):
        return network(*given, **more)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the hub is here: names are known by the packaged list."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def compare_languages(options: VicunaOptions) -> None:
    network, outline = on_meta(Vicuna, options), VicunaOutline(options)
    # the network holds a causal model within itself, and that a decoder of the same name
    assert outlined_shapes(outline, "model.") == shapes_of(_Unwrapped(network))
    for name in ("width", "max_length", "default_template", "name"):
        assert getattr(outline, name) == getattr(network, name)
    assert outline.cache_shape() == network.cache_shape()
    assert outline.head.weight.shape == tuple(network.head.weight.shape)
    assert outline.embedding_VE.shape == tuple(network.embedding_VE.shape)
    tied = network.embedding_VE is network.head.weight
    assert (outline.embedding_VE is outline.head.weight) is tied
    assert blocks_of(outline) == blocks_of(network)


def blocks_of(language: Any) -> list[int]:
    return [sum(one.numel() for one in block.parameters()) for block in language.blocks]


class _Unwrapped:
    """A language model's parameters by their names in transformers' decoder."""

    def __init__(self, network: Any) -> None:
        self.frozen_bytes = network.frozen_bytes
        self._network = network

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, weight in self._network.named_parameters():
            yield name.removeprefix("model."), weight

    def trainable(self) -> Iterator[tuple[str, Any]]:
        for name, weight in self._network.trainable():
            yield name.removeprefix("model."), weight


@pytest.mark.parametrize("stated", LANGUAGES.values(), ids=LANGUAGES.keys())
def test_language_models(stated: dict[str, Any]) -> None:
    if "lora" in stated:
        pytest.importorskip("peft")
    if "quantize" in stated:
        pytest.importorskip("bitsandbytes")
    compare_languages(VicunaOptions.model_validate(stated))


def compare_encoders(network: Any, outline: Any) -> None:
    assert outlined_shapes(outline) == shapes_of(network)
    for name in ("name", "width", "image_size", "prefix_tokens", "kept", "depths"):
        assert getattr(outline, name) == getattr(network, name)
    assert outline.default_tiling == network.default_tiling
    for size in (network.image_size, 2 * network.image_size):
        assert outline.tokens(size) == network.tokens(size)
    sizes = (next(iter(one.parameters())).dtype.itemsize for one in (network, outline))
    assert next(sizes) == next(sizes)


@pytest.mark.parametrize("stated", CLIPS.values(), ids=CLIPS.keys())
def test_clip(stated: dict[str, Any]) -> None:
    options = TransformersOptions.model_validate(stated)
    compare_encoders(on_meta(Clip, options), ClipOutline(options))


@pytest.mark.parametrize("stated", SIGLIPS.values(), ids=SIGLIPS.keys())
def test_siglip(stated: dict[str, Any]) -> None:
    options = SiglipOptions.model_validate(stated)
    compare_encoders(on_meta(Siglip, options), SiglipOutline(options))


@pytest.mark.parametrize(
    ("network", "outline", "options"),
    [
        (Linear, LinearOutline, Options()),
        (Identity, IdentityOutline, Options()),
        *((Mlp, MlpOutline, MlpOptions(depth=depth)) for depth in (1, 2, 5)),
        *((Pool, PoolOutline, PoolOptions(depth=depth, grid=3)) for depth in (1, 2)),
    ],
)
def test_connectors(network: Any, outline: Any, options: Options) -> None:
    widths = {"vision_width": 24, "language_width": 24 if network is Identity else 40}
    real, found = on_meta(network, options, **widths), outline(options, **widths)
    assert outlined_shapes(found) == shapes_of(real)
    assert found.name == real.name
    for patches in (9, 36, 49):
        assert found.tokens(patches) == real.tokens(patches)


def test_connectors_that_do_not_fit() -> None:
    with pytest.raises(NotPlain):
        IdentityOutline(Options(), vision_width=1, language_width=2)
    for pool in (Pool, PoolOutline):
        found = pool(PoolOptions(grid=3), vision_width=4, language_width=8)
        for patches, said in ((10, "square grid"), (4, "3 x 3 tokens")):
            with pytest.raises(ModelError, match=said):
                found.tokens(patches)


@pytest.mark.parametrize(("network", "outline", "config"), BEYOND.values(), ids=BEYOND.keys())
def test_what_is_beyond_arithmetic_is_left_to_networks(
    network: Any, outline: Any, config: dict[str, Any]
) -> None:
    with pytest.raises((NotPlain, ModelError)):
        outline(network.Options(config=config))


def test_any_configuration_is_counted_as_transformers_counts_it_or_left_to_it() -> None:
    draw = random.Random(7)
    plain = 0
    for _ in range(60):
        stated: dict[str, Any] = {
            "vocab_size": draw.choice([2, 3, 33, 96]),
            "hidden_size": draw.choice([8, 24, 36, 48]),
            "intermediate_size": draw.choice([1, 20, 64]),
            "num_hidden_layers": draw.choice([1, 2]),
            "num_attention_heads": draw.choice([1, 2, 3, 4, 6]),
            "num_key_value_heads": draw.choice([None, 1, 2, 3, 0, -1]),
            "head_dim": draw.choice([None, 4, 6, 7]),
            "max_position_embeddings": draw.choice([16, 64]),
            "tie_word_embeddings": draw.choice([True, False]),
            "attention_bias": draw.choice([True, False]),
            "mlp_bias": draw.choice([True, False, "yes"]),
            "rope_theta": draw.choice([1e4, 5e5]),
            "pad_token_id": draw.choice([0, 1, 50]),
        }
        kept = {name: value for name, value in stated.items() if draw.random() < 0.8}
        options = VicunaOptions(config={**TEXT, **kept})
        try:
            VicunaOutline(options)
        except NotPlain:
            continue
        plain += 1
        compare_languages(options)
    assert plain > 10, "few of them were counted, so this shows little"


def plans(path: Path, *overrides: str) -> tuple[Plan | str, Plan | str]:
    """Return a recipe's plan by networks and by whatever does, or what is said against it."""

    def load(registry: Registry) -> Recipe:
        return Recipe.load(path, registry, overrides)

    def usual() -> Plan:
        registry = Registry.installed()
        return make_plan(load(registry), registry)

    found: list[Plan | str] = []
    for make in (usual, lambda: outlined.plan_of(load)):
        try:
            found.append(make())
        except LlavaError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found[0], found[1]


@pytest.mark.parametrize("name", recipe_files())
def test_every_recipe_is_planned_as_by_networks(name: str) -> None:
    usual, found = plans(find_recipe(name), "machine.tflops=0.1")
    assert found == usual


@pytest.mark.parametrize(
    "override",
    [
        "model.language.config.hidden_size=130",
        "model.language.config.num_hidden_layers=0",
        "model.language.config.hidden_act=silly",
        "model.language.config.max_position_embeddings=9",
        "model.language.config.rope_scaling={rope_type='linear',factor=2.0}",
        "model.language.config={}",
        "model.language.lora={rank=4}",
        "model.language.lora={rank=4,targets=['qkv']}",
        "model.language.source=nowhere/nothing",
        "model.language.quantize=nf4",
        "model.language.hidden=3",
        "model.vision.layer=9",
        "model.vision.select=cls_patch",
        "model.vision.interpolation=lanczos",
        "model.vision.config.image_size=[72,36]",
        "model.vision.config.patch_size=80",
        "model.vision.use=siglip",
        "model.vision.use=clippy",
        "model.connector={use='identity'}",
        "model.connector={use='pool',grid=2}",
        "model.connector={use='pool',grid=4}",
        "model.connector={use='mlp',depth=0}",
        "model.tiling={use='anyres',grids=[[2,2]]}",
        "model.template={use='nothing'}",
        "steps.finetune.train={vision=1e-3}",
        "steps.finetune.prepare={aspect='pad'}",
        "steps.finetune.prepare={size=4}",
        "steps.finetune.prepare={config={image_size=48}}",
        "steps.finetune.init=@pretrain/best",
        "steps.finetune.init=@pretrain/model",
        "steps.finetune.changes={language={lora={rank=4}}}",
        "steps.finetune.parallel={replicate=2,shard=2}",
        "steps.finetune.feature_cache=kept",
        "steps.export.format={use='original'}",
        "steps.export.format={use='hf'}",
        "steps.evaluate.init=nowhere",
        "machine.devices=4",
    ],
)
def test_a_changed_recipe_is_planned_or_refused_as_by_networks(override: str) -> None:
    usual, found = plans(find_recipe("tiny"), "machine.tflops=0.1", override)
    assert found == usual


def test_changes_of_a_model_of_an_earlier_step() -> None:
    start = "steps.finetune.init=@pretrain/model"
    for changes in (
        "{language={lora={rank=4}}}",
        "{language={quantize='nf4',lora={rank=4}}}",
        "{language={max_length=64}}",
        "{language={max_length=8}}",
        "{language={rank=4}}",
        "{vision={layer=-1,dtype='float16'}}",
        "{vision={layer=[-1,-2]}}",
    ):
        overrides = ("machine.tflops=0.1", start, f"steps.finetune.changes={changes}")
        usual, found = plans(find_recipe("tiny"), *overrides)
        assert found == usual, changes


@pytest.mark.parametrize(
    "name", ["tiny", "tiny-anyres", "llava13b", "llava-v1.5-7b", "llava7b-qlora"]
)
def test_no_network_is_built_for_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("networks were built for a plan")

    monkeypatch.setattr("llavakit.model.folder.sketch_model", refuse)

    def load(registry: Registry) -> Recipe:
        return Recipe.load(find_recipe(name), registry, ["machine.tflops=0.1"])

    assert outlined.plan_of(load).parts["vision"].parameters > 0
    with pytest.raises(pytest.fail.Exception):
        make_plan(load(Registry.installed()), Registry.installed())
