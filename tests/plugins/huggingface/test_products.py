"""`products = "onednn"`: models learn and answer by oneDNN as they do by torch's own library."""

from __future__ import annotations

import logging
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import LANGUAGE, VISION, Command, RecipeWriter
from tests.core import processes
from tests.core.peer import make_pair, their_inputs
from tests.plugins.families import qwen_tokenizer, their_model
from tests.plugins.training.test_sharded import same, sets
from tests.products import Counted, here, there
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import llavakit
from llavakit import LlavaModel, ModelError
from llavakit.contracts.model import Sampling
from llavakit.contracts.packing import Packing, Rows, Stream
from llavakit_kernels import few_rows, onednn
from llavakit_plugins.connectors.mlp import Linear, Mlp
from llavakit_plugins.connectors.pool import Pool
from llavakit_plugins.huggingface.products import Products
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.vision.clip import Clip
from llavakit_plugins.vision.siglip import Siglip
from llavakit_plugins.vision.timm import Timm, TimmOptions

LENGTHS = [5, 1, 9]


def both(make: Callable[[Products], Any]) -> tuple[Any, Any]:
    """Return a network with torch's products, and one with oneDNN's, of the same weights."""
    one, other = make("torch"), make("onednn")
    other.load_state_dict(one.state_dict())
    return one, other


def near(mine: Tensor | None, theirs: Tensor | None) -> None:
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(
        mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max() + 1)
    )


@here
@pytest.mark.parametrize("encoder", [Clip, Siglip])
def test_encoders_of_transformers(encoder: type[Clip] | type[Siglip]) -> None:
    def make(products: Products) -> Any:
        return encoder(encoder.Options(config=VISION, products=products))

    plain, fast = both(make)
    pixels = torch.randn(2, 3, 32, 32)
    with Counted() as counted, torch.no_grad():
        features = fast(pixels)
    assert counted.onednn == 6 * fast.depth + 1  # six in a layer, and one of the patches
    assert counted.torch == 0
    near(features, plain(pixels))


@here
def test_an_encoder_of_timm() -> None:
    options = {"model": "vit_tiny_patch16_224", "pretrained": False, "config": {"img_size": 64}}

    def make(products: Products) -> Any:
        return Timm(TimmOptions.model_validate({**options, "products": products}))

    plain, fast = both(make)
    pixels = torch.randn(1, 3, 64, 64)
    with Counted() as counted, torch.no_grad():
        features = fast(pixels)
    assert counted.onednn
    assert counted.torch == 0
    near(features, plain(pixels))


def language(kind: str, products: Products, **options: Any) -> Any:
    if kind == "vicuna":
        return Vicuna(VicunaOptions(config=LANGUAGE, products=products, **options))
    config = {**LANGUAGE, "model_type": kind}
    return CausalLM(CausalLMOptions(config=config, products=products, **options))


@here
@pytest.mark.parametrize("kind", ["vicuna", "qwen2", "gemma2"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_of_language_models(kind: str, adapted: bool, recompute: bool) -> None:
    options = {"lora": {"rank": 4, "dropout": 0.0}} if adapted else {}
    plain, fast = both(lambda products: language(kind, products, **options))
    fast.recompute = plain.recompute = recompute
    ids, packing = torch.randint(4, 64, (sum(LENGTHS),)), Packing.of(LENGTHS)
    rows = Rows(torch.tensor([1, 3, 5, 8, 14]), (2, 1, 2))
    targets = torch.randint(4, 64, (5,))
    losses = []
    for model in (plain, fast):
        with Counted() as counted:
            hidden = model.hidden(model.embed(ids), packing, rows)
            losses.append(model.loss(hidden, targets))
            losses[-1].backward()
        if model is fast:
            assert counted.onednn > 40
            assert counted.torch == 0
        else:
            assert counted.onednn == 0
    near(losses[1], losses[0])
    theirs = dict(plain.trainable())
    for name, parameter in fast.trainable():
        near(parameter.grad, theirs[name].grad)


@here
def test_greedy_answers_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "faster_here", lambda: False)  # its rows have their own test
    theirs, ours = make_pair(products="onednn")
    ours.language.tokenizer.eos_token = None
    prompt, pixels = "<image> what colour is it ?", torch.randn(1, 3, 32, 32)
    inputs = their_inputs(ours, prompt, pixels)
    asked: Any = [(prompt, [None])]
    with Counted() as counted:
        (answer,) = ours.answer_ids(asked, Sampling(24), raw=True, pixels_IHW=pixels)
    assert counted.onednn > 24 * 15
    assert counted.torch == 0
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=24, min_new_tokens=24)
    assert answer == expected[0, inputs["input_ids"].shape[1] :].tolist()


@here
@pytest.mark.parametrize("connector", [Linear, Mlp, Pool])
def test_connectors(connector: type[Linear | Mlp]) -> None:
    def make(products: Products) -> Any:
        options: Any = connector.Options
        return connector(options(products=products), vision_width=8, language_width=12)

    plain, fast = both(make)
    torch.manual_seed(0)
    kept = 144 if connector is Pool else 576
    features, table = torch.randn(1, 576, 8), torch.randn(5, 12)
    stream = Stream(
        torch.randint(0, 5, (600,)), torch.arange(7, 7 + kept), None, table.__getitem__, table
    )
    made = []
    for one in (plain, fast):
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            out = one.project_into(features, stream)
            out.square().sum().backward()
        made.append(out)
        counts = {event.key: event.count for event in seen.key_averages()}
        products = 2 if connector is Linear else 5
        assert counts.get("mkldnn::_linear_pointwise", 0) == (products if one is fast else 0)
        assert one is plain or not {"aten::mm", "aten::addmm"} & counts.keys()
    near(made[1], made[0])
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        near(mine.grad, theirs.grad)
    near(fast(features), plain(features))


def with_products(write_recipe: RecipeWriter) -> Path:
    parts = [f'use = "{use}"\n' for use in ("clip", "vicuna")]
    changes = [(part, f'{part}products = "onednn"\n') for part in parts]
    return write_recipe(*changes, ('use = "mlp"', 'use = "mlp", products = "onednn"'))


def weights(model: Path) -> dict[str, bytes]:
    files = model.rglob("*.safetensors")
    return {file.relative_to(model).as_posix(): file.read_bytes() for file in files}


@there
def test_a_recipe_trains_with_it_and_resumes_to_the_same_bytes(
    write_recipe: RecipeWriter, tmp_path: Path, llava_run: Command, data: Path
) -> None:
    recipe = with_products(write_recipe)
    assert llava_run(recipe, "--out", tmp_path / "whole").code == 0
    cut = (recipe, "--out", tmp_path / "cut")
    assert processes.run(tmp_path, *cut, kill_at=78) == -signal.SIGKILL
    assert (tmp_path / "cut" / "01-pretrain" / "model").is_dir()
    assert not (tmp_path / "cut" / "02-finetune" / "model").exists()
    assert processes.run(tmp_path, *cut, "--resume") == 0
    made = tmp_path / "whole" / "model"
    assert weights(made) == weights(tmp_path / "cut" / "model")
    manifest = tomllib.loads((made / "model.toml").read_text())
    assert manifest["vision"]["products"] == manifest["language"]["products"] == "onednn"
    assert manifest["connector"]["products"] == "onednn"
    # and the same within rounding as by torch's own products
    assert llava_run(write_recipe(), "--out", tmp_path / "usual").code == 0
    usual = llavakit.load(tmp_path / "usual" / "model", device="cpu")
    fast = llavakit.load(made, device="cpu")
    for one, other in zip(fast.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    asked = ("--image", data / "images" / "0.png", "--prompt", "what colour is it ?")
    said = llava_run("chat", made, *asked, "--max-new-tokens", 5, "--device", "cpu")
    assert said.code == 0
    other = ("--set", "language.products=torch", "--set", "vision.products=torch")
    assert llava_run("chat", made, *asked, *other, "--max-new-tokens", 5).out == said.out


@here
def test_any_model_folder_can_be_asked_with_it(model: Path) -> None:
    usual = llavakit.load(model, device="cpu")
    chosen = {"vision": {"products": "onednn"}, "language": {"products": "onednn"}}
    fast = llavakit.load(model, device="cpu", options=chosen)
    with Counted() as counted:
        logits = fast.logits("USER : what colour is it ?", raw=True)
    assert counted.onednn
    assert counted.torch == 0
    near(logits, usual.logits("USER : what colour is it ?", raw=True))
    with pytest.raises(ModelError, match="products"):
        llavakit.load(model, options={"language": {"products": "mkl"}})


@pytest.fixture
def without_it(monkeypatch: pytest.MonkeyPatch, by_onednn: None) -> Iterator[None]:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    onednn._operator.cache_clear()
    yield
    onednn._operator.cache_clear()


def test_a_folder_opens_and_answers_the_same_where_there_is_no_onednn(
    model: Path, without_it: None, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = model / "model.toml"
    text = manifest.read_text()
    for use in ("clip", "vicuna"):
        text = text.replace(f'use = "{use}"\n', f'use = "{use}"\nproducts = "onednn"\n')
    assert text.count("onednn") == 2
    usual = llavakit.load(model, device="cpu")
    manifest.write_text(text)
    with caplog.at_level(logging.WARNING, "llavakit"):
        fast = llavakit.load(model, device="cpu")
        asked = [one.logits("USER : what colour is it ?", raw=True) for one in (fast, fast, usual)]
    assert torch.equal(asked[0], asked[2])
    assert [said for said in caplog.messages if "onednn" in said] == caplog.messages[:1]
    assert isinstance(fast, LlavaModel)


@here
def test_adapters_beside_weights_of_4_bits(tmp_path: Path) -> None:
    """Those weights are bitsandbytes' to multiply; the adapters', in float32, are oneDNN's."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    their_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    qwen_tokenizer().save_pretrained(tmp_path / "base")
    options = {
        "source": str(tmp_path / "base"), "quantize": "nf4",
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
    }  # fmt: skip

    def make(products: Products) -> Any:
        torch.manual_seed(0)
        options_of = VicunaOptions.model_validate({**options, "products": products})
        made = Vicuna.create(options_of)
        for name, parameter in made.trainable():
            if "lora_B" in name:  # zeros would hide what it adds
                parameter.data = 0.1 * torch.randn_like(parameter)
        return made

    plain, fast = make("torch"), make("onednn")
    kinds = {name: f"{type(m).__module__}.{type(m).__name__}" for name, m in fast.named_modules()}
    adapters = [name for name in kinds if "lora_A.default" in name or "lora_B.default" in name]
    assert {kinds[name] for name in adapters} <= {
        "llavakit_kernels.onednn.Linear", "llavakit_kernels.few_rows.OnednnLinear",
    }  # fmt: skip
    bases = [name for name in kinds if name.endswith("base_layer")]
    assert {kinds[name] for name in bases} == {"bitsandbytes.nn.modules.Linear4bit"}
    ids, packing = torch.randint(4, 64, (sum(LENGTHS),)), Packing.of(LENGTHS)
    rows, targets = Rows(torch.tensor([1, 3, 5, 8, 14]), (2, 1, 2)), torch.randint(4, 64, (5,))
    losses, counts = [], []
    for model in (plain, fast):
        with Counted() as counted:
            losses.append(model.loss(model.hidden(model.embed(ids), packing, rows), targets))
            losses[-1].backward()
        counts.append(counted)
    adapted = 2 * sum(1 for name, _ in fast.trainable() if "lora_A" in name)
    assert counts[0].onednn == 0
    assert counts[1].onednn >= 2 * adapted  # forward, and backward
    assert counts[0].torch - counts[1].torch >= adapted
    near(losses[1], losses[0])
    theirs = dict(plain.trainable())
    for name, parameter in fast.trainable():
        near(parameter.grad, theirs[name].grad)


@there
def test_divided_weights_learn_by_it(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """What FSDP has gathered for a layer is a plain tensor: multiplied as one process does."""
    recipe = with_products(write_recipe)
    gentle = sets(**{
        "steps.finetune.train": "{ vision = 1e-4, connector = 1e-4, language = 1e-4 }",
        "steps.finetune.max_steps": "3", "steps.1.skip": "true",
    })  # fmt: skip
    assert processes.run(tmp_path, recipe, *gentle, "--out", tmp_path / "one") == 0
    shard = sets(**{"steps.finetune.shard": "true"})
    ended = processes.run_ranks(tmp_path, 2, recipe, *gentle, *shard, "--out", tmp_path / "two")
    assert ended.code == 0, ended.said
    same(tmp_path / "one" / "model", tmp_path / "two" / "model")
