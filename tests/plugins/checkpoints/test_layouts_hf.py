"""transformers' LLaVA layout, against transformers' own classes."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugins.made_checkpoints import (
    PROMPTS,
    NativeExporter,
    ask_hf,
    make_hf,
    pictures,
    read_processor,
    weight_files,
)
from torch import nn

import llavakit
from llavakit import Exporter, LlavaError, LlavaModel, ModelError, Registry
from llavakit.model.folder import load_model, save_model
from llavakit_plugins.checkpoints.hf import Hf, HfOptions
from llavakit_plugins.checkpoints.parity import sample_images

KINDS = [("clip", "llama"), ("siglip", "qwen2")]


@pytest.fixture(scope="module", params=KINDS, ids="+".join)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    vision, language = request.param
    folder = tmp_path_factory.mktemp("hf") / "checkpoint"
    return make_hf(folder, vision=vision, language=language), folder


@pytest.fixture(scope="module")
def unspoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unspoilt")
    make_hf(folder)
    return folder


@pytest.fixture
def clip(unspoilt: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(unspoilt, tmp_path / "clip")


def same_answers(theirs: Any, theirs_folder: Path, ours: LlavaModel) -> None:
    """Assert equal logits and greedy tokens; theirs come from their own processor."""
    processor = read_processor(theirs_folder)
    for prompt, count in PROMPTS:
        images = pictures(count)
        inputs = ask_hf(processor, prompt, images)
        with torch.no_grad():
            expected = theirs(**inputs).logits[0]
        found = ours.logits(prompt, images, raw=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        tokens = theirs.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=3
        )[0, inputs["input_ids"].shape[1] :].tolist()
        assert ours.generate_ids(prompt, images, max_new_tokens=12, raw=True) == tokens


def test_what_transformers_saved_is_the_same_model(checkpoint: tuple[Any, Path]) -> None:
    theirs, folder = checkpoint
    same_answers(theirs, folder, llavakit.load(folder, device="cpu"))


@pytest.mark.parametrize("settings", [
    {"vision_feature_layer": -1},
    {"vision_feature_layer": [1]},
    {"vision_feature_layer": [-1, 1, -1]},
    {"vision_feature_select_strategy": "full"},
    {"multimodal_projector_bias": False},
    {"projector_hidden_act": "linear"},
])  # fmt: skip
def test_what_a_configuration_can_say(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = make_hf(tmp_path / "m", **settings)
    same_answers(theirs, tmp_path / "m", llavakit.load(tmp_path / "m", device="cpu"))


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, folder / "model.safetensors")


def version_4_40(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def version_5(name: str) -> str:
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("rename", [version_4_40, version_5])
def test_names_of_every_version_are_read(
    clip: Path, rename: Callable[[str], str], tmp_path: Path
) -> None:
    before = llavakit.load(clip, device="cpu").logits(PROMPTS[0][0], pictures(1), raw=True)
    renamed(clip, rename)
    after = llavakit.load(clip, device="cpu").logits(PROMPTS[0][0], pictures(1), raw=True)
    assert torch.equal(before, after)


def test_shards_and_pickles_are_read(tmp_path: Path) -> None:
    make_hf(tmp_path / "whole")
    make_hf(tmp_path / "shards", shard="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    make_hf(tmp_path / "pickle")
    path = tmp_path / "pickle" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    logits = [
        llavakit.load(tmp_path / name, device="cpu").logits(PROMPTS[0][0], pictures(1), raw=True)
        for name in ("whole", "shards", "pickle")
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vision", "language"), KINDS)
def test_import_export_import_is_byte_identical(
    tmp_path: Path, vision: str, language: str, dtype: torch.dtype
) -> None:
    registry = Registry.installed()
    make_hf(tmp_path / "hf", vision=vision, language=language, dtype=dtype)
    folder = tmp_path / "hf"
    native: list[Path] = []
    exported: list[Path] = []
    for number in range(2):
        model = llavakit.load(folder, device="cpu")
        native.append(tmp_path / f"native-{number}")
        save_model(model, native[-1])
        del model
        exported.append(tmp_path / f"exported-{number}")
        Hf().export(load_model(native[-1], registry).eval(), exported[-1])
        folder = exported[-1]
    assert weight_files(native[0])
    assert weight_files(native[0]) == weight_files(native[1])
    assert weight_files(exported[0]) == weight_files(exported[1])
    saved, back = (
        {name: (str(t.dtype), t) for name, t in load_file(f / "model.safetensors").items()}
        for f in (tmp_path / "hf", exported[0])
    )
    back = {
        name.replace("vision_tower.vision_model.", "vision_tower."): v for name, v in back.items()
    }
    assert saved.keys() == back.keys()
    for name, (precision, tensor) in saved.items():
        assert back[name][0] == precision
        assert torch.equal(back[name][1], tensor)


def test_every_end_token_is_kept(clip: Path, tmp_path: Path) -> None:
    edit(clip / "generation_config.json", eos_token_id=[2, 5])
    model = llavakit.load(clip, device="cpu")
    assert model.language.end_ids == {2, 5}
    Hf().export(model, tmp_path / "out")
    assert llavakit.load(tmp_path / "out", device="cpu").language.end_ids == {2, 5}


# -- our own models, written for transformers ------------------------------------------------------


@pytest.fixture
def native(backbones: Path, write_recipe: Any) -> Callable[..., LlavaModel]:
    """A function that makes a new model of the small recipe, changed."""
    from llavakit.model.folder import create_model
    from llavakit.recipe.recipe import Recipe

    def make(*changes: tuple[str, str]) -> LlavaModel:
        registry = Registry.installed()
        recipe = Recipe.load(write_recipe(*changes), registry)
        model = create_model(recipe.model, registry, seed=1).eval()
        with torch.no_grad():
            for parameter in model.connector.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


CONNECTOR = 'connector = { use = "mlp" }'


@pytest.mark.parametrize("change", [
    [],
    [(CONNECTOR, 'connector = { use = "linear" }')],
    [(CONNECTOR, 'connector = { use = "mlp", depth = 1 }')],
    [('use = "clip"', 'use = "clip"\naspect = "pad"\nlayer = -3')],
    [('use = "clip"', 'use = "clip"\naspect = "squash"\nselect = "cls_patch"')],
    [('use = "vicuna_v1"', 'use = "llava_v0"')],
])  # fmt: skip
def test_transformers_reads_what_we_write(
    native: Callable[..., LlavaModel], tmp_path: Path, change: list[tuple[str, str]]
) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    ours = native(*change)
    figures = Hf().export(ours, tmp_path / "out")
    assert figures["largest_logit_difference"] < 1e-5
    assert figures["processor_ids_equal"] is True
    assert figures["processor_pixel_difference"] < 1e-6
    if importlib.util.find_spec("torchvision"):
        image = sample_images(1)[0]
        default = AutoProcessor.from_pretrained(tmp_path / "out", backend="torchvision")
        found = default.image_processor(image, return_tensors="pt")["pixel_values"]
        away = (found - ours.prepare([image])).abs().max().item()
        assert figures["torchvision_pixel_difference"] == away
        assert away < 1 / 255 / 0.26 + 1e-4  # one level of 255, as normalised
    else:
        assert figures["torchvision_pixel_difference"] is None
    kind: Any = LlavaForConditionalGeneration
    theirs, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    same_answers(theirs.eval(), tmp_path / "out", ours)


def test_pixels_that_transformers_cannot_give_are_said(
    native: Callable[..., LlavaModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Hf().export(native(('use = "clip"', 'use = "clip"\nfast = true')), tmp_path / "fast")
    assert "images are shrunk fast (`vision.fast`), which transformers does not do" in caplog.text
    caplog.clear()
    Hf().export(native(), tmp_path / "whole")
    assert "shrunk fast" not in caplog.text


def test_the_chat_template_that_is_written_asks_as_the_model_was_tuned(
    native: Callable[..., LlavaModel], tmp_path: Path
) -> None:
    ours = native(('system = ""', 'system = "the picture is red ."'))
    Hf().export(ours, tmp_path / "out")
    processor = read_processor(tmp_path / "out")
    image = pictures(1)[0]
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what colour is it ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    encoded = ours.prompt("what colour is it ?", [image])
    assert inputs["input_ids"].shape[1] == encoded.length(ours.visual_tokens)
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    whole = "the picture is red . USER: a ASSISTANT: b</s>"
    assert processor.apply_chat_template([asked, answered]) == whole  # as for training on it
    again = [asked, answered, {"role": "user", "content": "c"}]
    text = processor.apply_chat_template(again, add_generation_prompt=True)
    assert text == f"{whole}USER: c ASSISTANT:"


def test_a_vocabulary_without_room_is_widened_and_answers_stay(
    backbones: Path, tmp_path: Path, native: Callable[..., LlavaModel]
) -> None:
    from transformers import LlavaForConditionalGeneration

    ours = native()
    ours.language.tokenizer.add_tokens([f"word{n}" for n in range(42)])
    assert len(ours.language.tokenizer) == 64 == ours.language.head.out_features
    Hf().export(ours, tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.image_token_index == 64
    assert theirs.lm_head.weight.shape[0] == 128
    images = pictures(1)
    inputs = ask_hf(read_processor(tmp_path / "out"), PROMPTS[0][0], images)
    with torch.no_grad():
        logits = theirs(**inputs).logits[0]
    expected = ours.logits(PROMPTS[0][0], images, raw=True)
    torch.testing.assert_close(logits[:, :64], expected, atol=1e-5, rtol=1e-5)
    assert (logits[:, 64:].amax(1) < expected.amax(1)).all()


def test_the_gelu_form_is_the_linear_projector(
    native: Callable[..., LlavaModel], tmp_path: Path
) -> None:
    ours = native((CONNECTOR, 'connector = { use = "linear" }'))
    Hf(HfOptions(projector="gelu")).export(ours, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layers = [tensors[f"multi_modal_projector.linear_{n}.weight"] for n in (1, 2)]
    biases = [tensors[f"multi_modal_projector.linear_{n}.bias"] for n in (1, 2)]
    features = torch.randn(5, 32)
    hidden = nn.functional.gelu(nn.functional.linear(features, layers[0], biases[0]))
    found = nn.functional.linear(hidden, layers[1], biases[1])
    expected = ours.connector(features[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    back = llavakit.load(tmp_path / "out", device="cpu")
    assert back.connector.name == "linear"
    for mine, theirs in zip(ours.connector.parameters(), back.connector.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_shards_have_the_size_that_was_asked_for(
    native: Callable[..., LlavaModel], tmp_path: Path
) -> None:
    ours = native()
    figures = Hf(HfOptions(max_shard_size="100KB")).export(ours, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == figures["files"] > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(("change", "sentence"), [
    ([(CONNECTOR, 'connector = { use = "mlp", depth = 3 }')], "`--format original` writes it"),
    ([('use = "clip"', 'use = "clip"\nnorm = true')], "behind its final normalisation"),
])  # fmt: skip
def test_what_the_layout_cannot_express_is_refused(
    native: Callable[..., LlavaModel],
    tmp_path: Path,
    change: list[tuple[str, str]],
    sentence: str,
) -> None:
    with pytest.raises(ModelError, match=sentence):
        Hf().export(native(*change), tmp_path / "out")
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_a_wrong_export_is_noticed(
    native: Callable[..., LlavaModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llavakit_plugins.checkpoints.hf

    module: Any = llavakit_plugins.checkpoints.hf

    def wrong(tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        changed = tensors | {"language_model.model.norm.weight": torch.ones(48) * 1.5}
        return write(changed, *rest)

    write = module.write_weights
    monkeypatch.setattr(module, "write_weights", wrong)
    with pytest.raises(ModelError, match="gives other logits"):
        Hf().export(native(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- prompt templates ------------------------------------------------------------------------------


def test_a_chat_template_that_a_builtin_one_equals_gives_that(
    clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llavakit"):
        model = llavakit.load(clip, device="cpu")
    assert model.choices["template"] == {"use": "vicuna_v1", "system": ""}
    assert "vicuna_v1" in caplog.text
    assert "choose another with --template" in caplog.text


def test_another_chat_template_is_used_as_it_is(tmp_path: Path) -> None:
    chat = (
        "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('list') }}"
        "{% endif %}[{{ m['role'] }}] {% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %} / {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    make_hf(tmp_path / "m", chat=chat)
    model = llavakit.load(tmp_path / "m", device="cpu")
    assert model.choices["template"] == {"use": "chat-template"}
    processor = read_processor(tmp_path / "m")
    content = [{"type": "text", "text": "what colour is it ?"}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )  # fmt: skip
    assert model.prompt("what colour is it ?", []).ids.tolist() == expected["input_ids"][0]


def test_a_chat_template_without_end_is_refused_and_another_chosen(
    clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (clip / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    with pytest.raises(ModelError, match=r"writes more .*; choose another .* with --template"):
        llavakit.load(clip, device="cpu")
    model = llavakit.load(clip, device="cpu", template="vicuna_v1")
    assert model.choices["template"] == {"use": "vicuna_v1"}


def test_the_template_can_be_chosen(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llavakit"):
        model = llavakit.load(clip, device="cpu", template="llava_v0")
    assert model.choices["template"] == {"use": "llava_v0"}
    assert not caplog.text
    with pytest.raises(LlavaError, match="no PromptTemplate is called `vicuna`"):
        llavakit.load(clip, device="cpu", template="vicuna")


def test_an_export_notes_the_template(
    native: Callable[..., LlavaModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = native(('use = "vicuna_v1"', 'use = "llava_v1"'))
    Hf().export(ours, tmp_path / "out")
    caplog.clear()
    model = llavakit.load(tmp_path / "out", device="cpu")
    assert model.choices["template"] == {"use": "llava_v1", "system": ""}
    assert not caplog.text


# -- bad input -------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            table.pop(key)
        elif isinstance(value, dict) and isinstance(table.get(key), dict):
            table[key] = {**table[key], **value}
        else:
            table[key] = value
    path.write_text(json.dumps(table))


def without(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def projector(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = f"multi_modal_projector.linear_{key}"
        save_file({**tensors, name: change(tensors[name]).clone()}, folder / "model.safetensors")

    return spoil


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def with_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "image_newline": torch.ones(7)}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def processor(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "processor_config.json", image_processor=changes)


@pytest.mark.parametrize(("spoil", "sentence"), [
    (cut, "damaged or cut short"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer in .* cannot be read"),
    (without("language_model.model.norm.weight"), "LlamaForCausalLM .* it lacks model.n"),
    (without("language_model.lm_head.weight"), "it lacks lm_head"),
    (without("vision_tower.pre_layrnorm.bias"), "a CLIPVisionModel .* it lacks pre_layr"),
    (without("multi_modal_projector.linear_2.weight"), "lacks multi_modal_projector.linear_2"),
    (without("multi_modal_projector.linear_1.bias"), "lacks multi_modal_projector.linear_1.bias"),
    (config(multimodal_projector_bias=False), "holds multi_modal_projector.linear_1.bias, which"),
    (projector("2.weight", torch.Tensor.flatten), r"linear_2.weight is \[2304\] and its bias"),
    (projector("1.weight", lambda tensor: tensor[0, 0]), r"linear_1.weight is \[\] and its bias"),
    (projector("1.bias", lambda tensor: tensor[:7]), r"and its bias \[7\]"),
    (projector("2.bias", torch.Tensor.char), "the projector has weights of torch.int8"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": '),
     "Its config.json cannot be read as JSON: copy that again"),
    (lambda folder: (folder / "processor_config.json").write_text("[" * 100_000),
     "processor_config.json is not valid JSON"),
    (reshaped, r"in another shape, model.norm.weight \[7\]"),
    (with_more, "holds image_newline, the row between tiles of LLaVA-NeXT"),
    (config(model_type="llava_next"), "lacks image_newline"),
    (config(model_type="llava_onevision"), "lacks image_newline"),
    (config(model_type="idefics"), "`llava_next_video`, `llava_onevision` can be read"),
    (config(model_type=None), "`model_type` null"),
    (config(vision_config={"model_type": "hiera"}), "no installed vision encoder reads"),
    (config(text_config={"model_type": "nonsense"}), "knows no language model of type `nonsense`"),
    (config(text_config={"hidden_size": 7}), "makes no language model"),
    (config(text_config={"num_hidden_layers": 10**7}), "tensors for 10,000,000 layers"),
    (config(text_config={"vocab_size": 32000, "hidden_size": 2048, "head_dim": 512}),
     r"lm_head.weight \[64, 48\] for \[32000, 2048\].* 157,\d+,\d+ parameters are asked for"),
    (config(vision_config={"num_attention_heads": 5}), "makes no vision tower"),
    (config(vision_config={"num_attention_heads": 0}), "`num_attention_heads` is 0; it must be a"),
    (config(vision_config={"image_size": [32, 16]}), r"`image_size` is \[32, 16\], which is no sq"),
    (config(vision_config={"image_size": "x"}), "`vision_config`: `image_size` is \"x\"; it must"),
    (config(text_config={"hidden_size": [1]}), r"`text_config`: `hidden_size` is \[1\]; it must"),
    (config(text_config={"mlp_bias": [1]}), "makes no language model .*'mlp_bias'"),
    (processor(image_std=[0, 1, 1]), "`image_std` = .*; it must be three numbers above 0"),
    (processor(resample="llama"), "`resample` = \"llama\"; it must be the number of one of"),
    (processor(size={"shortest_edge": {}}), "processor_config.json: `size` is .*; it must be"),
    (lambda folder: edit(folder / "generation_config.json", eos_token_id=["x"]),
     r"generation_config.json: `eos_token_id` is \[\"x\"\]; it must be the ids of tokens"),
    (lambda folder: (folder / "generation_config.json").write_text("[]"),
     "generation_config.json holds no table"),
    (lambda folder: edit(folder / "tokenizer_config.json", bos_token={"x": 1}),
     "tokenizer_config.json: `bos_token` is .*; it must be a token"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("3"),
     "tokenizer_config.json holds no table"),
    (lambda folder: edit(folder / "tokenizer.json", decoder=7),
     "tokenizer.json is no tokenizer"),
    (config(vision_feature_layer=[1, 2]), r"layer 1 of the projector is \[48, 32\]"),
    (config(vision_feature_layer=[1, "2"]), "or a list of some"),
    (config(vision_feature_layer=9), "3 layers"),
    (config(vision_feature_select_strategy="cls"), "must be default or full"),
    (config(projector_hidden_act="tanh"), "`projector_hidden_act` is 'tanh'"),
    (config(text_config={"quantization_config": {"bits": 4}}), "is quantised"),
    (config(llavakit={"template": {"use": "nonsense"}}), "notes a prompt template"),
    (processor(crop_size={"height": 64, "width": 64}), "reads squares of 32"),
    (processor(do_resize=False), "`do_resize` = False"),
    (processor(image_mean=[1, 2]), "must be three numbers"),
    (processor(rescale_factor=1 / 127.5), "scales pixels by"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(
    clip: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(clip)
    with pytest.raises(LlavaError, match=sentence) as caught:
        llavakit.load(clip, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [
    "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json",
])  # fmt: skip
def test_a_pipe_among_the_files_is_named_and_never_opened(clip: Path, name: str) -> None:
    (clip / name).unlink(missing_ok=True)
    os.mkfifo(clip / name)
    with pytest.raises(ModelError, match=rf"{name}.* (is no regular file|cannot be read as JSON)"):
        llavakit.load(clip, device="cpu")


def test_layers_of_several_precisions_are_used_in_the_widest(clip: Path) -> None:
    before = llavakit.load(clip, device="cpu")
    projector("2.weight", torch.Tensor.bfloat16)(clip)
    projector("1.bias", torch.Tensor.bfloat16)(clip)
    model = llavakit.load(clip, device="cpu")
    assert {parameter.dtype for parameter in model.connector.parameters()} == {torch.float32}
    prompt, count = PROMPTS[0]
    found, expected = (m.logits(prompt, pictures(count), raw=True) for m in (model, before))
    assert torch.allclose(found, expected, atol=0.05)


def test_siglip_without_its_first_patch_is_refused(tmp_path: Path) -> None:
    make_hf(tmp_path / "m", vision="siglip", vision_feature_select_strategy="default")
    with pytest.raises(ModelError, match="with a SigLIP that is a patch"):
        llavakit.load(tmp_path / "m", device="cpu")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_hf(tmp_path / "m", shard="40KB")
    shard = min((tmp_path / "m").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks {shard.name}, which model.safetensors.index.json"):
        llavakit.load(tmp_path / "m", device="cpu")


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    make_hf(tmp_path / "m", shard="40KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = next(iter(table["weight_map"]))
    table["weight_map"][first] = "../../etc/passwd"
    index.write_text(json.dumps(table))
    with pytest.raises(ModelError, match="outside its folder"):
        llavakit.load(tmp_path / "m", device="cpu")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this code must not run",)


def test_a_pickle_that_runs_code_is_refused(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clip / "model.safetensors").unlink()
    torch.save({"x": Evil()}, clip / "pytorch_model.bin")
    with pytest.raises(ModelError, match="may run code"):
        llavakit.load(clip, device="cpu")
    assert "must not run" not in capsys.readouterr().out
    (clip / "pytorch_model.bin").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ModelError, match="damaged"):
        llavakit.load(clip, device="cpu")


def test_a_failed_export_leaves_nothing(
    native: Callable[..., LlavaModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llavakit_plugins.huggingface.writing as module

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(LlavaError, match="No space left on device"):
        Hf().export(native(), tmp_path / "out")
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


class TestHf(NativeExporter):
    def build(self) -> Exporter:
        return Hf()
