"""What other readers make of an export: the original's, and transformers' older classes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.conftest import LANGUAGE, VISION
from tests.plugins.made_checkpoints import pictures, shaken

from llavakit import LlavaModel, ModelError, Recipe, Registry
from llavakit.model.folder import create_model, load_model, save_model
from llavakit_plugins.checkpoints.hf import Hf
from llavakit_plugins.checkpoints.original import Original

PYTHON = os.environ.get("LLAVAKIT_TRANSFORMERS_4")
"""The python of an environment with the newest transformers 4, torch and Pillow."""
ROWS = 400
FAMILIES = ["llama", "linear", "mistral"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of LLaMA's make."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("pieces")
    words = ["a red circle", "a blue square is in the picture", "USER: what is it? ASSISTANT:"]
    (folder / "text").write_text("\n".join(f"{word} {n}" for word in words for n in range(300)))
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=ROWS - 8,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=1.0, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def native(pieces: Path, tmp_path: Path) -> Any:
    """A function that makes a model of a family, saves it as a model folder, and reads that."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    def make(family: str = "llama", **changes: Any) -> LlavaModel:
        shape = {**LANGUAGE, "vocab_size": ROWS, **changes}
        if family == "linear":
            shape["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}
        language, vision = tmp_path / "language", tmp_path / "vision"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network: Any = (
                MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
                if family == "mistral"
                else LlamaForCausalLM(LlamaConfig(**shape))
            )
            shaken(network).save_pretrained(language)
            shaken(CLIPVisionModel(CLIPVisionConfig(**VISION))).save_pretrained(vision)
        shutil.copy(pieces, language / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        (language / "tokenizer_config.json").write_text(json.dumps(settings))
        use = "causal-lm" if family == "mistral" else "vicuna"
        recipe = tmp_path / "r.toml"
        recipe.write_text(
            f'name = "r"\ndevice = "cpu"\n[model]\nconnector = {{ use = "mlp" }}\n'
            f'vision = {{ use = "clip", source = "{vision}" }}\n'
            f'language = {{ use = "{use}", source = "{language}" }}\n'
            'template = { use = "vicuna_v1", system = "" }\n'
            f'[[steps]]\nuse = "finetune"\ntrain = {{ connector = 1e-3 }}\n'
            f'data = {{ use = "conversations", path = "{recipe}", images = "{tmp_path}" }}\n'
        )
        registry = Registry.installed()
        model = create_model(Recipe.load(recipe, registry).model, registry, seed=1).eval()
        save_model(model, tmp_path / "native")
        return load_model(tmp_path / "native", registry).eval()

    return make


def table(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_finds_all_that_is_written(
    native: Any, tmp_path: Path, pieces: Path, family: str
) -> None:
    Original().export(native(family), tmp_path / "out")
    folder = tmp_path / "out" / "vision_tower"
    assert all(name.startswith("vision_model.") for name in names(folder))
    assert not any(name.startswith("vision_model.vision_model.") for name in names(folder))
    rope = table(tmp_path / "out", "config.json").get("rope_scaling")
    assert rope == ({"type": "linear", "factor": 2.0} if family == "linear" else None)
    settings = table(tmp_path / "out", "tokenizer_config.json")
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert settings["legacy"] is True
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == pieces.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [Hf, Original], ids=lambda kind: kind.name)
def test_settings_are_those_that_every_version_reads(
    native: Any, tmp_path: Path, pieces: Path, family: str, layout: Any
) -> None:
    layout().export(native(family), tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "native" / "language"):
        settings = table(folder, "tokenizer_config.json")
        assert settings["tokenizer_class"] in ("LlamaTokenizer", "PreTrainedTokenizerFast")
        assert isinstance(settings.get("extra_special_tokens", {}), dict)
        assert not settings.keys() & {"backend", "is_local", "local_files_only", "name_or_path"}
        assert (folder / "tokenizer.model").read_bytes() == pieces.read_bytes()
        merges = table(folder, "tokenizer.json")["model"]["merges"]
        assert all(isinstance(pair, str) for pair in merges)


def test_an_imported_tokenizer_json_is_written_as_it_was(native: Any, tmp_path: Path) -> None:
    ours = native("mistral")
    whole = (tmp_path / "native" / "language" / "tokenizer.json").read_bytes()
    Original().export(ours, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == whole
    ours.language.tokenizer.add_tokens(["<new>"])
    Original().export(ours, tmp_path / "more")
    assert "<new>" in (tmp_path / "more" / "tokenizer.json").read_text()


@pytest.mark.parametrize(("family", "changes", "sentence"), [
    ("llama", {"head_dim": 16}, "heads of width 16"),
    ("llama", {"mlp_bias": True}, "biases in its MLP"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
     "positions of type `yarn`"),
    ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
     "positions of type `linear`"),
])  # fmt: skip
def test_what_the_original_would_drop_is_refused(
    native: Any, tmp_path: Path, family: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelError, match=rf"{sentence}, .*`--format hf` writes this one"):
        Original().export(native(family, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tuned_tower_is_not_called_by_the_hubs_name(
    native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llavakit_plugins.checkpoints.original as module

    hubs = tmp_path / "native" / "vision" / "model.safetensors"
    monkeypatch.setattr(module, "find_file", lambda *_: hubs if hubs.is_file() else None)
    ours = native()
    ours.choices["vision"]["source"] = "openai/of-a-test"
    for tuned, named in ((False, "openai/of-a-test"), (True, "vision_tower")):
        if tuned:
            shaken(ours.vision)
        Original().export(ours, tmp_path / f"out-{tuned}")
        assert table(tmp_path / f"out-{tuned}", "config.json")["mm_vision_tower"] == named


def test_a_tensor_that_is_not_found_fails_the_proof(
    native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    import llavakit_plugins.checkpoints.original as module

    write: Any = vars(module)["write_weights"]
    key = "model.layers.0.mlp.up_proj.weight"

    def wrong(tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        return write({("x." + n if n == key else n): t for n, t in tensors.items()}, *rest)

    monkeypatch.setattr(module, "write_weights", wrong)
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight"):
        Original().export(native(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


SCRIPT = """
import json, sys, torch
import transformers
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionModel
from transformers import LlavaForConditionalGeneration
transformers.logging.set_verbosity_error()
hf, original, native, asked, answer = sys.argv[1:]
processor = AutoProcessor.from_pretrained(hf)
tokenizer = AutoTokenizer.from_pretrained(hf)
slow = AutoTokenizer.from_pretrained(original, use_fast=False)
AutoTokenizer.from_pretrained(native + "/language")
model, report = LlavaForConditionalGeneration.from_pretrained(hf, output_loading_info=True)
reports = [report]
for tower in (original + "/vision_tower", native + "/vision"):
    reports.append(CLIPVisionModel.from_pretrained(tower, output_loading_info=True)[1])
given = torch.load(asked)
with torch.no_grad():
    logits = model.eval()(input_ids=given["ids"], pixel_values=given["pixels"]).logits[0]
torch.save(logits, answer)
print(json.dumps({
    "version": transformers.__version__, "slow": type(slow).__name__,
    "lost": [name for r in reports for key in r for name in r[key]],
    "ids": [t(given["text"])["input_ids"] for t in (tokenizer, processor.tokenizer, slow)],
    "pixels": list(processor.image_processor(given["image"])["pixel_values"][0].shape),
}))
"""


@pytest.mark.skipif(
    PYTHON is None,
    reason="LLAVAKIT_TRANSFORMERS_4 names no python of an environment with transformers 4",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_reads_our_exports(native: Any, tmp_path: Path, family: str) -> None:
    ours = native(family)
    Hf().export(ours, tmp_path / "hf")
    Original().export(ours, tmp_path / "original")
    question, image = "<image>\nwhat is it?", pictures(1)[0]
    token = table(tmp_path / "hf", "config.json")["image_token_index"]
    ids: list[int] = []
    for number in ours.prompt(question, [image]).ids.tolist():
        ids += [token] * ours.visual_tokens if number == -200 else [number]
    text = "USER: a red circle  is it? ASSISTANT: a dog"
    given = {
        "ids": torch.tensor([ids]), "pixels": ours.prepare([image]), "text": text,
        "image": torch.randint(0, 255, (3, 40, 36), dtype=torch.uint8),
    }  # fmt: skip
    torch.save(given, tmp_path / "asked.pt")
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, *(str(tmp_path / name) for name in (
            "hf", "original", "native", "asked.pt", "answer.pt"))],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.")
    assert found["lost"] == []
    assert found["slow"] == "LlamaTokenizer"
    expected = ours.prompt(text, [], raw=True).ids.tolist()
    assert found["ids"] == [expected] * 3
    assert found["pixels"] == [3, 32, 32]
    logits = torch.load(tmp_path / "answer.pt")[:, :ROWS]
    torch.testing.assert_close(logits, ours.logits(question, [image]), atol=1e-4, rtol=1e-4)
