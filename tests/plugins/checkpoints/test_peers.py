"""Others' tools read our export as it is: transformers' pipeline and auto classes, peft, trl."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.plugins.made_checkpoints import pictures

import llavakit
from llavakit import Exporter, LlavaModel, Registry, Use
from llavakit.model.folder import create_model
from llavakit.recipe.model_choice import ModelRecipe

QUESTION = "what colour is it ?"


@pytest.fixture(scope="module")
def ours(backbones: Path) -> LlavaModel:
    parts = {
        "vision": {"use": "clip", "source": str(backbones / "vision")},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "source": str(backbones / "language")},
        "template": {"use": "vicuna_v1", "system": ""},
    }
    model = create_model(ModelRecipe.model_validate(parts), Registry.installed(), seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.connector.parameters():  # so that the image decides the answer
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(ours: LlavaModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our export in the layout of Hugging Face."""
    folder = tmp_path_factory.mktemp("peers") / "hf"
    Registry.installed().build(Use[Exporter](use="hf")).export(ours, folder)
    return folder


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return pictures(1)[0]


def turn(image: Image.Image, text: str = QUESTION) -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def test_auto_classes(ours: LlavaModel, folder: Path, image: Image.Image) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor.apply_chat_template(
        [turn(image)], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = found[0, inputs["input_ids"].shape[1] :].tolist()
    expected = ours.generate_ids(QUESTION, [image], max_new_tokens=8)
    assert new == expected
    other = ours.generate_ids(QUESTION, [Image.new("RGB", (32, 32))], max_new_tokens=8)
    assert other != expected, "else the image might have been left out"


def test_pipeline(ours: LlavaModel, folder: Path, image: Image.Image) -> None:
    from transformers import pipeline

    ask: Any = pipeline("image-text-to-text", model=str(folder), device="cpu")
    (answer,) = ask(text=[turn(image)], max_new_tokens=8, do_sample=False, return_full_text=False)
    assert answer["generated_text"].strip() == ours.generate(QUESTION, [image], max_new_tokens=8)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is absent (pip install llavakit[lora])")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's calls of transformers
def test_peft(ours: LlavaModel, folder: Path, image: Image.Image, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(text=["USER: <image>\n" + QUESTION], images=[image], return_tensors="pt")
    inputs.pop("token_type_ids", None)

    def fresh() -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder)

    adapted: Any = get_peft_model(fresh(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        before = adapted(**inputs).logits
    torch.testing.assert_close(
        before[0],
        ours.logits("USER: <image>\n" + QUESTION, [image], raw=True),
        atol=1e-4,
        rtol=1e-4,
    )
    optimiser = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits[0]
    ours_adapted = llavakit.load(tmp_path / "adapter", base=folder, device="cpu")
    found = ours_adapted.logits("USER: <image>\n" + QUESTION, [image], raw=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    back = llavakit.load(tmp_path / "merged", device="cpu")
    found = back.logits("USER: <image>\n" + QUESTION, [image], raw=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is absent")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
def test_trl(folder: Path, image: Image.Image, tmp_path: Path, lora: bool) -> None:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trl: Any = pytest.importorskip("trl")

    said = {"role": "assistant", "content": [{"type": "text", "text": "it is red ."}]}
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    rows = [{"messages": [asked, said], "images": [image]} for _ in range(4)]
    trainer: Any = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2,
            learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, max_length=None,
            save_strategy="no", bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder, backend="pil"),
        peft_config=LoraConfig(target_modules="all-linear") if lora else None,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], json.dumps(losses)
    trainer.save_model(str(tmp_path / "tuned"))
    back = llavakit.load(tmp_path / "tuned", device="cpu")  # which names its base
    plain: Any = AutoModelForImageTextToText.from_pretrained(folder if lora else tmp_path / "tuned")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "tuned") if lora else plain
    inputs = trainer.processing_class(
        text=["USER: <image>\n" + QUESTION], images=[image], return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = theirs.eval()(**inputs).logits[0]
    found = back.logits("USER: <image>\n" + QUESTION, [image], raw=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
