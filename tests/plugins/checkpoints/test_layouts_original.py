"""The original LLaVA's layout: checkpoints written by its rules for names, against a composition by
hand of transformers' classes."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import LANGUAGE, VISION, make_tokenizer
from tests.plugins.made_checkpoints import (
    NativeExporter,
    make_hf,
    pictures,
    shaken,
    weight_files,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import llavakit
from llavakit import Exporter, LlavaError, LlavaModel, ModelError, Registry
from llavakit.model.folder import load_model, save_model
from llavakit_plugins.checkpoints.hf import Hf
from llavakit_plugins.checkpoints.original import Original, OriginalOptions

PROMPT = "USER : <image> what colour is it ? ASSISTANT :"
SETTINGS: dict[str, Any] = {
    "mm_vision_tower": "openai/clip-of-a-test", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu",
    "use_mm_proj": True, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad", "tokenizer_model_max_length": 128,
}  # fmt: skip


@dataclass
class Made:
    """A LLaVA by hand, and where it was written."""

    vision: Any
    projector: nn.Module
    language: Any
    tokenizer: Any
    folder: Path
    tower: Path
    config: dict[str, Any]
    layer: int = -2
    first: int = 1

    def logits(self, prompt: str, images: list[Any], *, pad: bool = True) -> Tensor:
        """Return logits as the original computes them: split, embed, splice."""
        from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

        edges: dict[str, Any] = {
            "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32},
        }  # fmt: skip
        processor: Any = CLIPImageProcessorPil(**edges)
        if pad:
            processor = LlavaImageProcessorPil(do_pad=True, **edges)
        rows: list[Tensor] = []
        with torch.no_grad():
            for number, text in enumerate(prompt.split("<image>")):
                if number:
                    pixels = processor(images[number - 1], return_tensors="pt")["pixel_values"]
                    states = self.vision(pixels, output_hidden_states=True).hidden_states
                    rows.append(self.projector(states[self.layer][0, self.first :]))
                ids = self.tokenizer(text, add_special_tokens=number == 0)["input_ids"]
                rows.append(
                    self.language.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
                )
            logits: Tensor = self.language(inputs_embeds=torch.cat(rows)[None]).logits[0]
        return logits


def make(
    folder: Path,
    *,
    depth: int = 2,
    inside: bool = False,
    shards: bool = False,
    pickle: bool = False,
    whole_clip: bool = False,
    tokens: tuple[str, ...] = (),
    model_type: str = "llava_llama",
    dtype: torch.dtype = torch.float32,
    language: dict[str, Any] = LANGUAGE,
    **settings: Any,
) -> Made:
    """Write `checkpoint` and its tower `clip` below `folder`, by the rules of the original."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = shaken(CLIPVisionModel(CLIPVisionConfig(**VISION)))
        mistral = model_type == "llava_mistral"
        causal = shaken(
            MistralForCausalLM(MistralConfig(**language, sliding_window=None))
            if mistral
            else LlamaForCausalLM(LlamaConfig(**language))
        )
        width = language["hidden_size"]
        layers: list[nn.Module] = [nn.Linear(32, width)]
        for _ in range(1, depth):
            layers += [nn.GELU(), nn.Linear(width, width)]
        projector = shaken(layers[0] if depth == 1 else nn.Sequential(*layers))
    for module in (vision, causal, projector):
        module.to(dtype)
    kind = "linear" if depth == 1 else f"mlp{depth}x_gelu"
    checkpoint, tower = folder / "checkpoint", folder / "clip"
    vision.save_pretrained(tower)
    causal.save_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(checkpoint)
    state = {name: value.clone() for name, value in causal.state_dict().items()}
    state |= {f"model.mm_projector.{n}": v for n, v in projector.state_dict().items()}
    if inside:
        prefix = "model.vision_tower.vision_tower.vision_model."
        state |= {prefix + name: value for name, value in vision.state_dict().items()}
    write(checkpoint, state, shards=shards, pickle=pickle)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {**SETTINGS, "model_type": model_type, "mm_projector_type": kind, **settings}
    config["architectures"] = ["LlavaLlamaForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    if whole_clip:
        tensors = load_file(tower / "model.safetensors")
        whole = {f"vision_model.{name}": value for name, value in tensors.items()}
        save_file({**whole, "text_model.x": torch.ones(2), "logit_scale": torch.ones(1)},
                  tower / "model.safetensors")  # fmt: skip
        table = json.loads((tower / "config.json").read_text())
        table = {"model_type": "clip", "vision_config": table, "text_config": {}}
        (tower / "config.json").write_text(json.dumps(table))
    return Made(vision, projector, causal, tokenizer, checkpoint, tower, config)


def write(folder: Path, state: dict[str, Tensor], *, shards: bool, pickle: bool) -> None:
    names = sorted(state)
    suffix, stem = ("bin", "pytorch_model") if pickle else ("safetensors", "model")
    groups = [names[::2], names[1::2]] if shards else [names]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05}-of-00002.{suffix}" if shards else f"{stem}.{suffix}"
        tensors = {key: state[key].contiguous() for key in group}
        if pickle:
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(group, name)
    if shards:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def same(made: Made, ours: LlavaModel, *, pad: bool = True) -> None:
    images = pictures(2)
    for prompt, some in ((PROMPT, images[1:]), (PROMPT + " <image> .", images), ("what ?", [])):
        expected = made.logits(prompt, some, pad=pad)
        found = ours.logits(prompt, some, raw=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [
    {},
    {"depth": 1},
    {"depth": 3, "pickle": True},
    {"shards": True, "inside": True},
    {"shards": True, "pickle": True, "whole_clip": True},
    {"model_type": "llava"},
    {"model_type": "llava_mistral"},
    {"image_aspect_ratio": "square"},
], ids=str)  # fmt: skip
def test_a_whole_checkpoint_is_the_same_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = make(tmp_path, **settings)
    ours = llavakit.load(made.folder, device="cpu", vision=made.tower)
    assert ours.language.max_length == 128
    same(made, ours, pad=settings.get("image_aspect_ratio") != "square")


def test_layer_and_class_token_are_those_of_the_configuration(tmp_path: Path) -> None:
    made = make(tmp_path, mm_vision_select_layer=-3, mm_vision_select_feature="cls_patch")
    made.layer, made.first = -3, 0
    ours = llavakit.load(made.folder, device="cpu", vision=made.tower)
    assert ours.visual_tokens == 17
    same(made, ours)


@pytest.mark.parametrize("name", ["absolute", "relative", "vision_tower"])
def test_the_vision_tower_is_found_where_it_is_named(tmp_path: Path, name: str) -> None:
    made = make(tmp_path)
    named = {"absolute": str(made.tower), "relative": "../clip", "vision_tower": "a/name"}[name]
    if name == "vision_tower":
        made.tower.rename(made.folder / "vision_tower")
    table = {**made.config, "mm_vision_tower": named}
    (made.folder / "config.json").write_text(json.dumps(table))
    same(made, llavakit.load(made.folder, device="cpu"))


def test_a_projector_alone_needs_its_language_model(tmp_path: Path) -> None:
    made = make(tmp_path, depth=1)
    alone = tmp_path / "projector"
    alone.mkdir()
    state = {f"model.mm_projector.{n}": v for n, v in made.projector.state_dict().items()}
    torch.save(state, alone / "mm_projector.bin")
    (alone / "config.json").write_text(json.dumps(made.config))
    base = tmp_path / "vicuna"
    made.language.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    with pytest.raises(ModelError, match=r"holds a projector alone; give the folder .* as --base"):
        llavakit.load(alone, device="cpu", vision=made.tower)
    same(made, llavakit.load(alone, device="cpu", vision=made.tower, base=base))


def test_new_tokens_of_a_projector_get_their_rows(tmp_path: Path) -> None:
    """`<im_start>` and `<im_end>`: their embeddings are in mm_projector.bin."""
    made = make(tmp_path, depth=1)
    words = 40
    filler = [f"word{n}" for n in range(words)]
    assert len(make_tokenizer()) + words == 62  # of 64 rows
    rows = torch.randn(2, 48)
    for trained in (rows, torch.cat([torch.randn(64, 48), rows])):
        alone, base = tmp_path / f"p{len(trained)}", tmp_path / f"b{len(trained)}"
        alone.mkdir()
        made.language.save_pretrained(base)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([*filler, "x", "y"])
        tokenizer.save_pretrained(base)
        state = {f"model.mm_projector.{n}": v for n, v in made.projector.state_dict().items()}
        torch.save({**state, "model.embed_tokens.weight": trained}, alone / "mm_projector.bin")
        table = {**made.config, "mm_use_im_start_end": True}
        (alone / "config.json").write_text(json.dumps(table))
        ours = llavakit.load(alone, device="cpu", vision=made.tower, base=base)
        assert ours.language.head.out_features == 66
        numbers = ours.language.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
        assert numbers == [64, 65]
        table_VE = ours.language.embed(torch.arange(66))
        assert torch.equal(table_VE[64:], rows)
        old = made.language.get_input_embeddings().weight
        assert torch.equal(table_VE[:64], old)
        ids = ours.prompt("what ?", pictures(1)).ids.tolist()
        at = ids.index(-200)
        assert (ids[at - 1], ids[at + 1]) == (64, 65)


class Computed(TorchDispatchMode):
    """Counts the numbers that a CPU adds, multiplies or copies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if isinstance(found, Tensor) and found.device.type == "cpu":
            self.counts[name] += found.numel()
        return found


def sketched(folder: Path, **given: Any) -> LlavaModel:
    """Return the model as plans know it; what a plan computes of it is small."""
    from llavakit.model.load import sketch_any

    with Computed() as computed:
        model = sketch_any(folder, llavakit.Registry.installed(), **given)
    assert model is not None
    assert model.language.head.weight.is_meta
    blocks = sum(p.numel() for block in model.language.blocks for p in block.parameters())
    assert computed.counts["add_"] + computed.counts["mm"] + computed.counts["clone"] < blocks / 4
    return model


def shapes(model: LlavaModel) -> dict[str, Any]:
    return {name: (value.shape, value.dtype) for name, value in model.named_parameters()}


def test_a_lora_adapter_is_merged(tmp_path: Path) -> None:
    made = make(tmp_path)
    base, adapter = tmp_path / "vicuna", tmp_path / "adapter"
    made.language.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter.mkdir()
    rank, alpha = 3, 12
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.05, "bias": "none", "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
    }))  # fmt: skip
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for number, block in enumerate(made.language.model.layers):
            for name, layer in (
                ("self_attn.q_proj", block.self_attn.q_proj),
                ("mlp.down_proj", block.mlp.down_proj),
            ):
                a, b = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
                key = f"base_model.model.model.layers.{number}.{name}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                layer.weight += b @ a * (alpha / rank)
    state = {f"model.mm_projector.{n}": v for n, v in made.projector.state_dict().items()}
    beside = {f"base_model.model.{name}": value for name, value in state.items()}
    torch.save(beside, adapter / "non_lora_trainables.bin")
    for pickle in (True, False):
        (adapter / "config.json").write_text(json.dumps(made.config))
        if pickle:
            torch.save(tensors, adapter / "adapter_model.bin")
        else:
            (adapter / "adapter_model.bin").unlink()
            save_file(tensors, adapter / "adapter_model.safetensors")
        whole = llavakit.load(adapter, device="cpu", base=base, vision=made.tower)
        same(made, whole)
        assert shapes(sketched(adapter, base=base, vision=made.tower)) == shapes(whole)
    with pytest.raises(ModelError, match=r"was `lmsys/vicuna-7b-v1.5`\) as --base DIR"):
        llavakit.load(adapter, device="cpu", vision=made.tower)
    del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="unlike its adapter_config"):
        llavakit.load(adapter, device="cpu", base=base, vision=made.tower)
    (adapter / "non_lora_trainables.bin").unlink()
    with pytest.raises(ModelError, match="its saves in between lack it"):
        llavakit.load(adapter, device="cpu", base=base, vision=made.tower)
    (adapter / "config.json").unlink()
    with pytest.raises(ModelError, match="its saves in between lack it"):
        llavakit.load(adapter, device="cpu", base=base, vision=made.tower)


@pytest.mark.filterwarnings("ignore")  # peft's own, as the adapter is made
def test_biases_without_a_place_are_named(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made = make(tmp_path)
    base, adapter = tmp_path / "vicuna", tmp_path / "adapter"
    made.language.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_bias=True)
    get_peft_model(made.language, config).save_pretrained(str(adapter))
    (adapter / "config.json").write_text(json.dumps(made.config))
    state = {f"model.mm_projector.{n}": v for n, v in made.projector.state_dict().items()}
    torch.save({f"base_model.model.{name}": value for name, value in state.items()},
               adapter / "non_lora_trainables.bin")  # fmt: skip
    for read in (sketched, partial(llavakit.load, device="cpu")):
        with pytest.raises(ModelError, match=r"adds a bias to .*q_proj \(`lora_bias`\)"):
            read(adapter, base=base, vision=made.tower)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_delta_is_added_to_its_llama(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Rows of added tokens are whole, the projector too; the norms say that the rest is not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = make(tmp_path, depth=1, model_type="llava", dtype=torch.float16)
    rows = LANGUAGE["vocab_size"] - 3
    llama = LlamaForCausalLM(LlamaConfig(**{**LANGUAGE, "vocab_size": rows})).half()
    target = made.language.state_dict()
    whole = load_file(made.folder / "model.safetensors")
    delta = {name: value.clone() for name, value in whole.items()}
    for name, value in llama.state_dict().items():
        value.copy_(target[name][: len(value)] + 0.01 * torch.randn_like(value))
        delta[name][: len(value)] -= value
    save_file(delta, made.folder / "model.safetensors")
    base = tmp_path / "llama"
    llama.save_pretrained(base)
    ours = llavakit.load(made.folder, device="cpu", base=base, vision=made.tower, dtype=dtype)
    found = ours.language.model.state_dict()
    if dtype is None:
        assert shapes(sketched(made.folder, base=base, vision=made.tower)) == shapes(ours)
    for name, value in llama.state_dict().items():
        summed = delta[name].clone()
        summed[: len(value)] += value  # in float16, as the original does
        assert torch.equal(found[name], summed.to(dtype or torch.float16)), name
    (projector, _) = ours.connector.parameters()
    assert torch.equal(projector, whole["model.mm_projector.weight"].to(dtype or torch.float16))
    with pytest.raises(ModelError, match=r"holds a delta, .* as --base DIR"):
        llavakit.load(made.folder, device="cpu", vision=made.tower)
    with pytest.raises(ModelError, match="holds a delta itself"):
        llavakit.load(made.folder, device="cpu", vision=made.tower, base=made.folder)
    LlamaForCausalLM(LlamaConfig(**{**LANGUAGE, "hidden_size": 96})).save_pretrained(base)
    with pytest.raises(ModelError, match=r"is a delta whose .* give the LLaMA it was made of"):
        llavakit.load(made.folder, device="cpu", vision=made.tower, base=base)
    save_file(whole, made.folder / "model.safetensors")
    with pytest.raises(ModelError, match="holds a whole model, which needs no `base`"):
        llavakit.load(made.folder, device="cpu", vision=made.tower, base=base)


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {},
    {"depth": 1, "dtype": torch.float16},
    {"depth": 3},
    {"model_type": "llava_mistral"},
    {"image_aspect_ratio": "square", "mm_vision_select_feature": "cls_patch"},
], ids=str)  # fmt: skip
def test_import_export_import_is_byte_identical(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = make(tmp_path, **settings)
    folder = made.folder
    vision: Path | None = made.tower
    native: list[Path] = []
    exported: list[Path] = []
    for number in range(2):
        model = llavakit.load(folder, device="cpu", vision=vision)
        native.append(tmp_path / f"native-{number}")
        save_model(model, native[-1])
        exported.append(tmp_path / f"exported-{number}")
        figures = Original().export(
            load_model(native[-1], Registry.installed()).eval(), exported[-1]
        )
        exact = settings.get("dtype", torch.float32) == torch.float32
        assert figures["largest_logit_difference"] < (1e-5 if exact else 1e-2)
        folder, vision = exported[-1], None  # it has its tower within
    assert weight_files(native[0])
    assert weight_files(native[0]) == weight_files(native[1])
    assert weight_files(exported[0]) == weight_files(exported[1])
    before = load_file(made.folder / "model.safetensors")
    after = load_file(exported[0] / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    table = json.loads((exported[0] / "config.json").read_text())
    for key in SETTINGS.keys() - {"mm_vision_tower"}:
        assert table[key] == made.config[key], key


@pytest.fixture
def native(backbones: Path, write_recipe: Any) -> Callable[..., LlavaModel]:
    """A function that makes a new model of the small recipe, changed."""
    from llavakit.model.folder import create_model
    from llavakit.recipe.recipe import Recipe

    def create(*changes: tuple[str, str]) -> LlavaModel:
        registry = Registry.installed()
        recipe = Recipe.load(write_recipe(*changes), registry)
        return create_model(recipe.model, registry, seed=1).eval()

    return create


@pytest.mark.parametrize(("change", "sentence"), [
    ([('use = "clip"', 'use = "clip"\nnorm = true')], "does not know features behind"),
    ([('use = "clip"', 'use = "clip"\naspect = "squash"')], "does not know squashed images"),
])  # fmt: skip
def test_what_the_layout_cannot_express_is_refused(
    native: Callable[..., LlavaModel],
    tmp_path: Path,
    change: list[tuple[str, str]],
    sentence: str,
) -> None:
    with pytest.raises(ModelError, match=sentence):
        Original().export(native(*change), tmp_path / "out")
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_siglip_and_qwen_are_refused_and_sent_to_hf(tmp_path: Path) -> None:

    make_hf(tmp_path / "s", vision="siglip")
    with pytest.raises(ModelError, match="and not `siglip`; `--format hf`"):
        Original().export(llavakit.load(tmp_path / "s", device="cpu"), tmp_path / "out")
    make_hf(tmp_path / "q", language="qwen2")
    with pytest.raises(ModelError, match=r"no language model of type `qwen2`.*`--format hf`"):
        Original().export(llavakit.load(tmp_path / "q", device="cpu"), tmp_path / "out")


def test_the_name_of_the_tower_can_be_chosen(
    native: Callable[..., LlavaModel], tmp_path: Path
) -> None:
    exporter = Original(OriginalOptions(vision_tower="openai/clip-vit-large-patch14"))
    exporter.export(native(), tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    assert table["mm_vision_tower"] == "openai/clip-vit-large-patch14"
    assert llavakit.load(tmp_path / "out", device="cpu").vision.width == 32


# -- prompt templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "name"), [
    ({}, "vicuna_v1"),
    ({"tokens": ("[PAD]",)}, "llava_v0"),
    ({"model_type": "llava_mistral"}, "mistral_instruct"),
])  # fmt: skip
def test_the_template_follows_from_the_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], name: str
) -> None:
    made = make(tmp_path, **settings)
    renamed = made.folder.rename(tmp_path / "llava-llama-2-mpt-v1-34b")  # says nothing
    with caplog.at_level(logging.WARNING, "llavakit"):
        ours = llavakit.load(renamed, device="cpu", vision=made.tower)
    assert ours.choices["template"] == {"use": name}
    assert f"`{name}`" in caplog.text
    chosen = llavakit.load(renamed, device="cpu", vision=made.tower, template="v1_mmtag")
    assert chosen.choices["template"] == {"use": "v1_mmtag"}


@pytest.mark.parametrize("token", ["[PAD]", "<image>"])
def test_a_token_without_a_row_that_is_never_written_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, token: str
) -> None:
    """The first LLaVAs' tokenizers have [PAD], token 32,000, and their weights 32,000 rows."""
    rows = LANGUAGE["vocab_size"]
    filler = [f"w{n}" for n in range(rows - len(make_tokenizer()))]
    made = make(tmp_path, tokens=(*filler, token))
    with caplog.at_level(logging.WARNING, "llavakit"):
        ours = llavakit.load(made.folder, device="cpu", vision=made.tower)
    assert f"the tokenizer has `{token}`, and the language model no row for it" in caplog.text
    assert ours.choices["template"]["use"] == ("llava_v0" if token == "[PAD]" else "vicuna_v1")
    assert len(ours.language.tokenizer) == rows
    text = f"what is {token} ?" if token != "<image>" else "what ?"
    assert ours.prompt(text, [], raw=True).ids.max() < rows
    same(made, ours)
    save_model(ours, tmp_path / "native")
    again = load_model(tmp_path / "native", Registry.installed()).eval()
    same(made, again)
    Original().export(again, tmp_path / "original")
    same(made, llavakit.load(tmp_path / "original", device="cpu"))
    assert Hf().export(again, tmp_path / "hf")["processor_ids_equal"]


def test_tokens_that_would_be_written_need_their_rows(tmp_path: Path) -> None:
    filler = [f"w{n}" for n in range(LANGUAGE["vocab_size"] - len(make_tokenizer()))]
    for number, more in enumerate((["word"], ["[PAD]", "word"], ["<|im_end|>"])):
        made = make(tmp_path / str(number), tokens=(*filler, *more))
        with pytest.raises(ModelError, match=r"tokens, the language model 64; take the tokenizer"):
            llavakit.load(made.folder, device="cpu", vision=made.tower)


# -- bad input -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("whole"))


def changed(name: str, value: Any) -> Callable[[Made], None]:
    def spoil(made: Made) -> None:
        table = {**made.config, name: value}
        (made.folder / "config.json").write_text(json.dumps(table))

    return spoil


def dropped(name: str) -> Callable[[Made], None]:
    def spoil(made: Made) -> None:
        tensors = load_file(made.folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, made.folder / "model.safetensors")

    return spoil


@pytest.mark.parametrize(("spoil", "sentence"), [
    (changed("model_type", "llava_mpt"), "`model_type` 'llava_mpt'; of the original"),
    (changed("mm_projector_type", "mlp3x_gelu"), "lacks mm_projector.4.weight"),
    (changed("mm_projector_type", "linear"), "lacks mm_projector.weight"),
    (changed("mm_projector_type", "mlp1x_gelu"), "holds mm_projector.2.bias"),
    (changed("mm_projector_type", "qformer"), "`mm_projector_type` is `qformer`"),
    (changed("image_aspect_ratio", "anyres"), "`mm_patch_merge_type` is 'flat'; with tiles"),
    (changed("s2", True), "reads images at several scales"),
    (changed("image_aspect_ratio", "round"), "`image_aspect_ratio` is 'round'"),
    (changed("mm_vision_select_feature", "all"), "must be patch or cls_patch"),
    (changed("mm_vision_select_layer", None), "must be a number"),
    (changed("num_attention_heads", 5), "makes no language model"),
    (changed("num_hidden_layers", 3), "LlamaForCausalLM .* it lacks model.layers.2."),
    (changed("num_hidden_layers", 1), "it has, unasked for, model.layers.1."),
    (changed("intermediate_size", 8), "it has, in another shape, "),
    (dropped("model.norm.weight"), r"LlamaForCausalLM .* it lacks model\.norm\.weight"),
    (dropped("model.mm_projector.0.weight"), "lacks mm_projector.0.weight"),
    (lambda made: (made.tower / "model.safetensors").unlink(), "no weights of a vision encoder"),
    (lambda made: (made.folder / "model.safetensors").unlink(), "alone; give|holds no weights"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(
    whole: Made, tmp_path: Path, spoil: Callable[[Made], None], sentence: str
) -> None:
    checkpoint = shutil.copytree(whole.folder, tmp_path / "checkpoint")
    made = replace(whole, folder=checkpoint, tower=shutil.copytree(whole.tower, tmp_path / "clip"))
    spoil(made)
    with pytest.raises(LlavaError, match=sentence) as caught:
        llavakit.load(made.folder, device="cpu", vision=made.tower)
    assert "\n" not in str(caught.value)


def test_a_projector_of_other_widths_is_named(tmp_path: Path) -> None:
    made = make(tmp_path)
    tensors = load_file(made.folder / "model.safetensors")
    tensors["model.mm_projector.0.weight"] = torch.ones(48, 31)
    save_file(tensors, made.folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer 1 of the projector is \[48, 31\]"):
        llavakit.load(made.folder, device="cpu", vision=made.tower)


def test_a_tower_that_is_nowhere_is_named(tmp_path: Path) -> None:
    made = make(tmp_path)
    with pytest.raises(ModelError, match=r"tower `openai/clip-of-a-test`.*--vision"):
        llavakit.load(made.folder, device="cpu")
    with pytest.raises(ModelError, match="nothing does not exist"):
        llavakit.load(made.folder, device="cpu", vision=tmp_path / "nothing")


def test_sources_that_a_layout_has_no_use_for_are_refused(tmp_path: Path) -> None:

    make_hf(tmp_path / "hf")
    with pytest.raises(ModelError, match="layout `hf`, which needs no `base`"):
        llavakit.load(tmp_path / "hf", device="cpu", base=tmp_path)


class TestOriginal(NativeExporter):
    def build(self) -> Exporter:
        return Original()
