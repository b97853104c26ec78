"""Adapters of transformers' LLaVAs, against peft on transformers' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_tokenizer
from tests.plugins.made_checkpoints import PROMPTS, ask_hf, make_hf, pictures, read_processor

import llavakit
from llavakit import LlavaModel, ModelError, Registry
from llavakit.model.folder import load_model, save_model
from llavakit.model.load import sketch_any

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore::UserWarning"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {},
    "next": {"grids": ((1, 2), (2, 1))},
    "onevision": {
        "grids": ((1, 1), (1, 2)), "family": "Onevision", "vision": "siglip", "language": "qwen2"
    },
}  # fmt: skip
TIED: dict[str, dict[str, Any]] = {"vision": "siglip", "language": "qwen2"}  # type: ignore[dict-item]
ADAPTERS: dict[str, dict[str, Any]] = {
    "language": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "everywhere": {"target_modules": "all-linear", "use_rslora": True},
    "beside": {"target_modules": ["v_proj"], "modules_to_save": ["multi_modal_projector"]},
    "dora": {"target_modules": ["q_proj", "linear_1"], "use_dora": True},
    "ranks": {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 3}},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}


class Made(NamedTuple):
    base: Path
    adapter: Path
    theirs: Any  #: The base with the adapter, as peft runs it.


def make(folder: Path, config: dict[str, Any], **family: Any) -> Made:
    from peft import LoraConfig, get_peft_model

    base, adapter = folder / "base", folder / "adapter"
    network = make_hf(base, **family)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tuned: Any = get_peft_model(network, LoraConfig(r=2, lora_alpha=8, **config))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:  # what is fresh adds nothing
                    parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(str(adapter))
    return Made(base, adapter, tuned.eval())


def same_logits(made: Made, ours: LlavaModel) -> None:
    processor = read_processor(made.base)
    for prompt, count in PROMPTS:
        images = pictures(count)
        with torch.no_grad():
            expected = made.theirs(**ask_hf(processor, prompt, images)).logits[0]
        found = ours.logits(prompt, images, raw=True)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def all_shapes(model: LlavaModel) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "adapter"),
    [*(("llava", name) for name in ADAPTERS), ("next", "everywhere"), ("onevision", "beside")],
)
def test_adapters_are_merged(tmp_path: Path, family: str, adapter: str) -> None:
    made = make(tmp_path, ADAPTERS[adapter], **FAMILIES[family])
    ours = llavakit.load(made.adapter, base=made.base, device="cpu")
    same_logits(made, ours)
    sketched = sketch_any(made.adapter, Registry.installed(), base=made.base)
    assert sketched is not None
    assert all_shapes(sketched) == all_shapes(ours)
    assert all(weight.is_meta for weight in sketched.parameters())
    save_model(ours, tmp_path / "ours")  # to train on, say
    again = load_model(tmp_path / "ours", Registry.installed(), device=torch.device("cpu"))
    same_logits(made, again.eval())


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["head", "table", "both", "saved"],
)
def test_a_head_that_is_the_embedding_takes_no_others_part(
    tmp_path: Path, config: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    made = make(tmp_path, config, **TIED)
    recwarn.clear()
    ours = llavakit.load(made.adapter, base=made.base, device="cpu")
    assert not recwarn.list
    same_logits(made, ours)
    assert sketch_any(made.adapter, Registry.installed(), base=made.base) is not None
    save_model(ours, tmp_path / "ours")
    again = load_model(tmp_path / "ours", Registry.installed(), device=torch.device("cpu"))
    same_logits(made, again.eval())


@pytest.mark.parametrize("family", [{}, TIED], ids=["apart", "tied"])
@pytest.mark.parametrize("lora", [False, True])
def test_new_tokens_that_were_trained(tmp_path: Path, family: dict[str, Any], lora: bool) -> None:
    """The usual way: the tokenizer and the tables grow, and the adapter holds them whole."""
    from peft import LoraConfig, get_peft_model

    network = make_hf(tmp_path / "base", **family)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_tokens([f"new{number}" for number in range(60)])
    network.resize_token_embeddings(len(tokenizer))
    tables = ["embed_tokens", "lm_head"]
    config = (
        LoraConfig(target_modules=["q_proj", *tables])
        if lora
        else LoraConfig(target_modules=["q_proj"], modules_to_save=tables)
    )
    tuned: Any = get_peft_model(network, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    made = Made(tmp_path / "base", tmp_path / "adapter", tuned.eval())
    ours = llavakit.load(made.adapter, base=made.base, device="cpu")
    assert ours.language.head.out_features == len(tokenizer) > 64
    same_logits(made, ours)
    sketched = sketch_any(made.adapter, Registry.installed(), base=made.base)
    assert sketched is not None
    assert sketched.language.head.out_features == len(tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*vision_tower.*q_proj", "task_type": "CAUSAL_LM"},
        {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"},
    ],
    ids=["vision", "head"],
)
def test_what_an_adapter_belongs_to_is_seen_by_its_layers(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    made = make(tmp_path, config)
    path = made.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))
    same_logits(made, llavakit.load(made.adapter, base=made.base, device="cpu"))


def before_4_52(name: str) -> str:
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    name = name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
    name = name.replace("model.model.multi_modal", "model.multi_modal")
    return name.replace("model.lm_head", "model.language_model.lm_head")


def before_5(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("rename", [before_4_52, before_5])
def test_names_of_every_version_are_read(tmp_path: Path, rename: Any) -> None:
    config = {"target_modules": ["q_proj", "linear_2", "lm_head"]}
    made = make(tmp_path, config)
    path = made.adapter / "adapter_model.safetensors"
    before = load_file(path)
    after = {rename(name): value for name, value in before.items()}
    assert after.keys() != before.keys()
    save_file(after, path)
    same_logits(made, llavakit.load(made.adapter, base=made.base, device="cpu"))


def test_what_trl_saves_beside_it_is_taken(tmp_path: Path) -> None:
    """And the base that it names, where that lies."""
    made = make(tmp_path, ADAPTERS["language"])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = (made.base / "chat_template.jinja").read_text().replace(
        "ASSISTANT:", "ASSISTANT it is :"
    )  # fmt: skip
    tokenizer.save_pretrained(made.adapter)
    path = made.adapter / "adapter_config.json"
    named = {**json.loads(path.read_text()), "base_model_name_or_path": str(made.base)}
    path.write_text(json.dumps(named))
    for beside in (False, True):
        if beside:  # as the advice of other errors would have it
            shutil.copy(made.base / "config.json", made.adapter)
        ours = llavakit.load(made.adapter, device="cpu")
        same_logits(made, ours)
        text = ours.prompt("what ?", ()).ids.tolist()
        assert ours.language.tokenizer.decode(text).endswith("ASSISTANT it is :")


def test_half_precision_and_another_one(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    made = make(tmp_path, ADAPTERS["everywhere"], dtype=torch.bfloat16)
    kept = llavakit.load(made.adapter, base=made.base, device="cpu")
    assert {weight.dtype for weight in kept.parameters()} == {torch.bfloat16}
    wide: Any = LlavaForConditionalGeneration.from_pretrained(made.base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(wide, str(made.adapter)).eval()
    ours = llavakit.load(made.adapter, base=made.base, device="cpu", dtype="float32")
    same_logits(made._replace(theirs=theirs), ours)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    made = make(tmp_path, ADAPTERS["beside"])

    def refused(match: str, folder: Path = made.adapter, base: Path | None = made.base) -> None:
        with pytest.raises(ModelError, match=match):
            llavakit.load(folder, base=base, device="cpu")

    refused(
        r"adapter holds a LoRA adapter alone; give the folder of the LLaVA .* --base", base=None
    )
    refused("is a whole model in the layout `hf`, which needs no `base`", made.base)
    plain = tmp_path / "plain"
    plain.mkdir()
    made.theirs.base_model.model.model.language_model.config.save_pretrained(plain)
    refused("plain is none of transformers' LLaVAs; give the folder of the one", base=plain)
    wider = tmp_path / "wider"
    make_hf(wider, vision="siglip", language="qwen2")
    settings = json.loads((wider / "config.json").read_text())
    settings["text_config"] |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (wider / "config.json").write_text(json.dumps(settings))
    refused("is --base the model it was trained on", base=wider)

    lacking = shutil.copytree(made.base, tmp_path / "lacking")
    state = load_file(lacking / "model.safetensors")
    gone = next(name for name in state if "layers.1.mlp.up_proj" in name)
    save_file({k: v for k, v in state.items() if k != gone}, lacking / "model.safetensors")
    refused(r"lacking lacks model\.language_model\.layers\.1\.mlp\.up_proj", base=lacking)

    path = made.adapter / "adapter_model.safetensors"
    state = load_file(path)
    for part in ("lora_B", "multi_modal_projector"):
        gone = next(name for name in state if part in name)
        save_file({k: v for k, v in state.items() if k != gone}, path)
        refused(f"lacks .*{part}.*, unlike its adapter_config.json")
    save_file({"prompt_embeddings": torch.zeros(2, 48)}, path)
    settings = made.adapter / "adapter_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}))
    refused("the adapter is of type 'PROMPT_TUNING'; LORA can be read")
    settings.write_text(json.dumps({**json.loads(before), "trainable_token_indices": [5000]}))
    refused("does not fit its base model")
    settings.write_text(before)
    path.write_bytes(path.read_bytes()[:50])
    refused("damaged or cut short")
    path.unlink()
    refused("lacks adapter_model.safetensors; copy the whole adapter")
