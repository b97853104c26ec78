"""The HF export, held to what vLLM's loader of LlavaForConditionalGeneration reads.

vLLM needs a GPU and is not installed here, so this states what its code reads, file by file, with
the places (vllm-project/vllm, 2025-04 at 0004c54 and later where noted):

- vllm/model_executor/model_loader/default_loader.py: `*.safetensors` in the folder, and where there
  are several, those that `model.safetensors.index.json` names;
- vllm/model_executor/models/llava.py: keys of the configuration, the modules that tensors are named
  after, the shape of pixels, the processor;
- vllm/model_executor/models/clip.py, siglip.py: layers behind the one that is used are not built;
- vllm/model_executor/layers/activation.py: the names of activations (`get_act_fn`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors import safe_open
from tests.conftest import RecipeWriter
from tests.plugins.made_checkpoints import make_hf
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaProcessor

import llavakit
from llavakit import Recipe, Registry
from llavakit.model.folder import create_model
from llavakit_plugins.checkpoints.hf import Hf, HfOptions

ACTIVATIONS = {
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "quick_gelu",
}  # fmt: skip
CLIP_LAYER = r"(layer_norm[12]|mlp\.fc[12]|self_attn\.(q_proj|k_proj|v_proj|out_proj))"
LLAMA_LAYER = (
    r"(input_layernorm|post_attention_layernorm|mlp\.(gate|up|down)_proj|"
    r"self_attn\.[qkvo]_proj)"
)
TENSORS = (
    r"vision_tower\.vision_model\.embeddings\.(class_embedding|patch_embedding\.(weight|bias)|"
    r"position_embedding\.weight)",
    r"vision_tower\.vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)",
    rf"vision_tower\.vision_model\.encoder\.layers\.\d+\.{CLIP_LAYER}\.(weight|bias)",
    r"multi_modal_projector\.linear_[12]\.(weight|bias)",
    r"language_model\.model\.(embed_tokens|norm)\.weight",
    rf"language_model\.model\.layers\.\d+\.{LLAMA_LAYER}\.(weight|bias)",
    r"language_model\.lm_head\.weight",
)
"""The names of tensors that its modules have, those that it joins (q, k, v; gate, up) apart."""


@pytest.fixture(scope="module", params=["one file", "shards", "siglip"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A folder that we exported, and the model that it was made of."""
    folder = tmp_path_factory.mktemp("vllm")
    siglip = request.param == "siglip"
    if siglip:
        make_hf(folder / "theirs", vision="siglip", language="qwen2")
    else:
        make_hf(folder / "theirs")
    model = llavakit.load(folder / "theirs", device="cpu")
    size = "40KB" if request.param == "shards" else "5GB"
    Hf(HfOptions(max_shard_size=size)).export(model, folder / "ours")
    return folder / "ours", model


def configuration(folder: Path) -> Any:
    found = AutoConfig.from_pretrained(folder)
    assert isinstance(found, LlavaConfig)
    return found


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def test_the_weights_lie_where_it_looks(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files
    assert not list(folder.glob("consolidated*"))  # it would take the folder for Mistral's own
    index = folder / "model.safetensors.index.json"
    if len(files) > 1:
        assert sorted(set(json.loads(index.read_text())["weight_map"].values())) == files
    else:
        assert files == ["model.safetensors"]


def test_the_configuration_says_what_it_reads(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    config = configuration(folder)
    assert config.architectures == ["LlavaForConditionalGeneration"]
    # the language model is built from its own configuration, by the class that it names
    (inner,) = config.text_config.architectures
    assert inner in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    assert getattr(transformers, inner).config_class is config.text_config.__class__
    assert config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")
    assert config.projector_hidden_act in ACTIVATIONS
    assert config.multimodal_projector_bias is True
    assert isinstance(config.vision_feature_layer, int)
    assert config.vision_feature_select_strategy in ("default", "full")
    table = json.loads((folder / "config.json").read_text())
    assert isinstance(table["image_token_index"], int)
    # how many tokens it puts in place of an image: the patches, and CLIP's class token for "full"
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    counted = patches + (vision.model_type == "clip_vision_model")
    taken = counted - 1 if config.vision_feature_select_strategy == "default" else counted
    assert taken == model.visual_tokens == config.image_seq_length


def test_every_tensor_has_a_module_there(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    config = configuration(folder)
    found = tensors_of(folder)
    names = [name for name in found if "vision_model.head." not in name]  # SigLIP's pooling
    assert [name for name in names if not any(re.fullmatch(p, name) for p in TENSORS)] == []
    layers = config.text_config.num_hidden_layers
    for layer in range(layers):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
            assert f"language_model.model.layers.{layer}.{part}.weight" in found
    # what is used of the vision encoder is there; a projector as wide as the language model
    used = config.vision_feature_layer
    used = config.vision_config.num_hidden_layers + used + 1 if used < 0 else used
    for layer in range(used):
        assert f"vision_tower.vision_model.encoder.layers.{layer}.mlp.fc2.bias" in found
    wide, seen = config.text_config.hidden_size, config.vision_config.hidden_size
    assert found["multi_modal_projector.linear_1.weight"] == (wide, seen)
    assert found["multi_modal_projector.linear_2.weight"] == (wide, wide)
    rows = found["language_model.model.embed_tokens.weight"][0]
    assert rows == config.text_config.vocab_size
    assert config.image_token_index < rows  # it is looked up before the image takes its place


def test_the_processor_is_the_one_it_asks_for(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= names
    assert "processor_config.json" in names
    found = AutoProcessor.from_pretrained(folder)
    assert isinstance(found, LlavaProcessor)
    processor: Any = AutoProcessor.from_pretrained(folder)
    config = configuration(folder)
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert token == config.image_token_index
    picture = Image.fromarray(np.full((50, 31, 3), 90, np.uint8))
    got = processor(images=[picture], text=f"{processor.image_token} what ?", return_tensors="pt")
    edge = config.vision_config.image_size
    assert tuple(got["pixel_values"].shape) == (1, 3, edge, edge)
    assert int((got["input_ids"] == token).sum()) == model.visual_tokens
    # /v1/chat/completions renders by the folder's chat template
    said = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}],
        add_generation_prompt=True,
    )
    assert processor.image_token in said


def test_the_papers_projector_is_not_for_it(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """docs/layouts.md says so: `linear` is no activation of vLLM's."""
    registry = Registry.installed()
    path = write_recipe(('use = "mlp"', 'use = "linear"'))
    model = create_model(Recipe.load(path, registry).parts(), registry, seed=0).eval()
    Hf().export(model, tmp_path / "linear")
    config = json.loads((tmp_path / "linear" / "config.json").read_text())
    assert config["projector_hidden_act"] not in ACTIVATIONS
    # written with GELU the first layer is twice as wide, and vLLM builds it by the configuration
    Hf(HfOptions(projector="gelu")).export(model, tmp_path / "gelu")
    shapes = tensors_of(tmp_path / "gelu")
    config = json.loads((tmp_path / "gelu" / "config.json").read_text())
    wide = config["text_config"]["hidden_size"]
    assert config["projector_hidden_act"] in ACTIVATIONS
    assert shapes["multi_modal_projector.linear_1.weight"][0] == 2 * wide
