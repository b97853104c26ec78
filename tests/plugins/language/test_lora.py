"""Adapters: only they learn, they are saved beside the weights, and they merge into them."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import LANGUAGE, RecipeWriter, make_tokenizer
from tests.plugins.families import config_of, qwen_tokenizer, their_model
from tests.plugins.made_checkpoints import make_hf
from torch import Tensor

import llavakit
import llavakit.testing
from llavakit import LanguageModel, ModelError
from llavakit.contracts.packing import Packing
from llavakit_kernels import few_rows
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions
from llavakit_plugins.language.lora import LoraOptions
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


class Contract(llavakit.testing.LanguageModelContract):
    kind_of: ClassVar[Any]
    tokenizer: ClassVar[Callable[[], Any]]

    def build(self) -> LanguageModel:
        torch.manual_seed(0)
        language: LanguageModel = self.kind_of(self.stated_options())
        language.tokenizer = type(self).tokenizer()
        return language

    def stated_options(self) -> Any:
        return self.kind_of.Options(**self.options)


class TestVicunaWithAdapters(Contract):
    options: Mapping[str, Any] = {"config": LANGUAGE, "lora": LORA}
    kind_of = Vicuna
    tokenizer = make_tokenizer


class TestCausalLMWithAdapters(Contract):
    options: Mapping[str, Any] = {"config": config_of("gemma2"), "lora": LORA}
    kind_of = CausalLM
    tokenizer = qwen_tokenizer


del Contract


def adapted(family: str, folder: Path, **lora: Any) -> Any:
    """Return a model of a family from a folder, its adapters as if they had learnt."""
    their_model(family).save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    component = Vicuna if family == "llama" else CausalLM
    options = component.Options(source=str(folder), lora=LoraOptions(**{**LORA, **lora}))
    language = component.create(options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in language.trainable():
        assert "lora" in name
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return language.eval()


def logits_of(language: Any) -> Tensor:
    ids = torch.randint(1, 255, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = language.logits(language.hidden(language.embed(ids), Packing.of([20])))
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_adapters_are_saved_as_peft_does_and_merge_exactly(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    language = adapted(family, tmp_path / "base")
    expected = logits_of(language)
    (tmp_path / "saved").mkdir()
    language.save(tmp_path / "saved")
    again = type(language).load(language.options, tmp_path / "saved").eval()
    assert torch.equal(logits_of(again), expected)

    theirs = PeftModel.from_pretrained(their_model(family), str(tmp_path / "saved" / "adapter"))
    ids = torch.randint(1, 255, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        peft_logits = theirs.eval()(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(expected, peft_logits, atol=1e-5, rtol=1e-5)

    base = load_file(tmp_path / "base" / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert base.keys() == saved.keys()
    assert all(torch.equal(base[name], saved[name]) for name in base)  # the base is unchanged

    merged = language.merged()
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(language), expected)  # merging left it as it was
    assert merged.state_dict().keys() == {
        f"model.{name}" for name in their_model(family).state_dict()
    }
    assert merged.embedding_VE.data_ptr() == language.embedding_VE.data_ptr()  # not a second copy
    (tmp_path / "merged").mkdir()
    merged.save(tmp_path / "merged")
    plain = type(language).create(type(language).Options(source=str(tmp_path / "merged"))).eval()
    assert torch.equal(logits_of(plain), logits_of(merged))


def test_adapters_are_where_the_original_puts_them(tmp_path: Path) -> None:
    """On every linear layer except the head."""
    everywhere = {
        name.rpartition(".lora_A")[0]
        for name, _ in adapted("llama", tmp_path).trainable() if ".lora_A" in name
    }  # fmt: skip
    linear = {
        f"model.{name}"
        for name, module in their_model("llama").named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert everywhere == linear
    few = adapted("llama", tmp_path, targets=["q_proj", "v_proj"])
    assert {n.split(".")[-4] for n, _ in few.trainable()} == {"q_proj", "v_proj"}


def test_targets_and_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no linear layer called `qkv`; it has .*q_proj"):
        Vicuna(VicunaOptions(config=LANGUAGE, lora=LoraOptions(targets=("qkv",))))
    kinds: tuple[tuple[Any, Any], ...] = (
        (Vicuna, LANGUAGE),
        (CausalLM, config_of("qwen2")),
    )
    for kind, config in kinds:
        lora = LoraOptions(targets=("q_proj", "lm_head"))
        with pytest.raises(ModelError, match=r"lora\.targets: `lm_head` is the head, which"):
            kind(kind.Options(config=config, lora=lora))
        with pytest.raises(ModelError, match=r"it has (?!.*lm_head).*q_proj"):
            kind(kind.Options(config=config, lora=LoraOptions(targets=("qkv",))))
    language = adapted("llama", tmp_path / "base")
    (tmp_path / "saved").mkdir()
    language.save(tmp_path / "saved")
    other = language.options.model_copy(
        update={"lora": language.options.lora.model_copy(update={"rank": 2})}
    )
    with pytest.raises(ModelError, match="does not hold the adapters that `lora` describes"):
        Vicuna.load(other, tmp_path / "saved")
    path = tmp_path / "saved" / "adapter" / "adapter_config.json"
    stated = json.loads(path.read_text())
    for changed in ({"use_rslora": True}, {"lora_alpha": 3}, {"alpha_pattern": {"q_proj": 1}}):
        path.write_text(json.dumps({**stated, **changed}))
        with pytest.raises(ModelError, match=f"was trained with `{next(iter(changed))}`"):
            Vicuna.load(language.options, tmp_path / "saved")
    path.write_text(json.dumps(stated))
    (tmp_path / "saved" / "adapter" / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="cannot be read"):
        Vicuna.load(language.options, tmp_path / "saved")


WHOLE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
"""Widths that 4 bits have on every CPU: whole blocks of 64 inputs, and of 32 outputs."""
bits = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is for Linux on x86 and ARM"
)


@bits
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_4_bits_are_those_of_bitsandbytes_and_stay_as_they_are(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU too, where bitsandbytes computes the same, only slowly."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # otherwise theirs computes with bfloat16, asked or not, where the CPU can
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    their_model(family, **WHOLE).save_pretrained(tmp_path / "base")
    qwen_tokenizer().save_pretrained(tmp_path / "base")
    component = Vicuna if family == "llama" else CausalLM
    source = str(tmp_path / "base")
    small = component.create(component.Options(source=source, quantize="nf4")).eval()
    assert not list(small.trainable())
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=how, device_map={"": "cpu"}
    )
    ids = torch.randint(1, 255, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0]
    found = logits_of(small)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    whole = component.create(component.Options(source=source)).eval()
    assert 1e-3 < (found - logits_of(whole)).abs().max() < 0.5

    adapted = component.create(
        component.Options(source=source, quantize="nf4", lora=LoraOptions(**LORA))
    ).eval()
    for number, (name, parameter) in enumerate(adapted.trainable()):
        assert "lora" in name
        torch.manual_seed(number)
        parameter.data = 0.3 * torch.randn_like(parameter)
    (tmp_path / "saved").mkdir()
    adapted.save(tmp_path / "saved")
    again = type(adapted).load(adapted.options, tmp_path / "saved").eval()
    assert torch.equal(logits_of(again), logits_of(adapted))
    assert not torch.equal(logits_of(again), found)
    half = adapted.options.model_copy(update={"dtype": "bfloat16"})
    of_half = type(adapted).load(half, tmp_path / "saved").named_parameters()
    dtypes = {parameter.dtype for name, parameter in of_half if "lora" not in name}
    assert dtypes == {torch.uint8, torch.bfloat16}
    merged = again.merged()
    layers = [m for m in merged.modules() if isinstance(m, torch.nn.Linear)]
    assert {type(m) for m in layers} in ({torch.nn.Linear}, {few_rows.Linear})
    torch.testing.assert_close(logits_of(merged), logits_of(again), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(again), logits_of(adapted))  # merging left it as it was
    torch.testing.assert_close(logits_of(small.merged()), found, atol=1e-5, rtol=1e-5)
    for (name, weight), other in zip(
        whole.named_parameters(), small.merged().parameters(), strict=True
    ):
        if name.endswith("proj.weight"):  # half of NF4's widest gap, 0.28, and the scales' rounding
            blocks, rounded = weight.detach().view(-1, 64), other.detach().view(-1, 64)
            largest = blocks.abs().amax(1, keepdim=True)
            assert ((rounded - blocks).abs() <= 0.16 * largest).all(), name
    (tmp_path / "merged").mkdir()
    merged.save(tmp_path / "merged")
    plain = component.create(component.Options(source=str(tmp_path / "merged"))).eval()
    assert torch.equal(logits_of(plain), logits_of(merged))
    with pytest.raises(ModelError, match="holds quantised weights; take them in full precision"):
        component.create(component.Options(source=str(tmp_path / "saved")))


@pytest.fixture
def a_cpu_that_packs(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make bitsandbytes take this CPU for one with AVX512-BF16; return whether it is one.

    Where it is not, packed weights compute zeros: the packing itself runs on any CPU.
    """
    functional: Any = importlib.import_module("bitsandbytes.functional")

    def zeros(values: Tensor, weight: Tensor, out: None, state: Any) -> Tensor:
        return values.new_zeros(*values.shape[:-1], state.shape[0])

    truly = bool(functional.has_avx512bf16())
    if not truly:
        monkeypatch.setattr(functional, "gemv_4bit", zeros)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    return truly


def packed_layers(language: Any) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in language.named_modules()
        if getattr(getattr(module, "quant_state", None), "packing_format_for_cpu", False)
    }


def four_bits(source: Path, **options: Any) -> Any:
    options = {"dtype": "bfloat16", "quantize": "nf4", **options}
    torch.manual_seed(0)  # of the adapters
    return CausalLM.create(CausalLMOptions(source=str(source), **options)).eval()


@bits
@pytest.mark.parametrize("lora", [None, LoraOptions(**LORA)])
def test_weights_that_a_cpu_packs_are_unpacked_to_the_bit(
    lora: LoraOptions | None, a_cpu_that_packs: bool, tmp_path: Path
) -> None:
    """Before they are saved, merged, or pass gradients on: packed they are other numbers."""
    their_model("llama", **WHOLE).save_pretrained(tmp_path)
    qwen_tokenizer().save_pretrained(tmp_path)
    fresh, language = (four_bits(tmp_path, lora=lora) for _ in range(2))
    expected = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}

    def pack() -> Tensor:
        logits = logits_of(language)
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert packed_layers(language) == (names if lora is None else {"base_layer"})
        return logits

    def input_gradient(model: Any) -> Tensor:
        embeds = model.embed(torch.arange(1, 12)).detach().requires_grad_()
        model.hidden(embeds, Packing.of([11])).float().square().sum().backward()
        gradient: Tensor = embeds.grad
        return gradient

    first = pack()
    found = language.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(pack(), first)
    merged = language.merged()
    for ours, same in zip(merged.parameters(), fresh.merged().parameters(), strict=True):
        assert torch.equal(ours, same)
    pack()
    assert torch.equal(input_gradient(language), input_gradient(fresh))
    pack()
    assert torch.equal(input_gradient(language.train()), input_gradient(fresh.train()))
    language.eval()
    assert torch.equal(pack(), first)
    if a_cpu_that_packs:
        torch.testing.assert_close(first, logits_of(merged), atol=0.05, rtol=0.05)


@bits
@pytest.mark.usefixtures("a_cpu_that_packs")
def test_widths_of_4_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a block of outputs is computed, and said to be slow; half one of inputs is refused."""
    odd = {**WHOLE, "num_key_value_heads": 1, "intermediate_size": 192}  # keys: 16 outputs
    their_model("llama", **odd).save_pretrained(tmp_path / "odd")
    qwen_tokenizer().save_pretrained(tmp_path / "odd")
    language = four_bits(tmp_path / "odd")
    logits_of(language)
    assert packed_layers(language) == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "odd: 6 layers of 4 bits are computed slowly" in caplog.text
    assert "multiples of 32, and `model.layers.0.self_attn.k_proj` has 16" in caplog.text
    exact = four_bits(tmp_path / "odd", dtype="float32")
    torch.testing.assert_close(logits_of(exact), logits_of(exact.merged()), atol=1e-5, rtol=1e-5)
    assert not packed_layers(exact)  # float32 was asked for

    for name, size in (("hidden_size", 96), ("intermediate_size", 100), ("hidden_size", 40)):
        their_model("llama", **{**WHOLE, name: size}).save_pretrained(tmp_path / "half")
        qwen_tokenizer().save_pretrained(tmp_path / "half")
        with pytest.raises(ModelError, match=rf"half: `\S+` has {size} inputs, .*blocks of 64"):
            four_bits(tmp_path / "half", dtype="float32")


@bits
@pytest.mark.parametrize(("name", "size"), [("hidden_size", 96), ("intermediate_size", 100)])
def test_widths_of_4_bits_are_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    """By a plan for a CPU, and by a run on one; a plan that names none may be for CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = their_model("llama", **{**WHOLE, name: size})
    model.save_pretrained(tmp_path / "half")
    qwen_tokenizer().save_pretrained(tmp_path / "half")
    stated = {"source": str(tmp_path / "half"), "quantize": "nf4"}
    said = rf"half: `\S+` has {size} inputs, .*blocks of 64"
    with torch.device("meta"):
        with pytest.raises(ModelError, match=said):
            Vicuna(VicunaOptions.model_validate({**stated, "device": "cpu"}))
        for device in (None, "cuda"):
            Vicuna(VicunaOptions.model_validate({**stated, "device": device}))
    refused = Vicuna.missing(VicunaOptions.model_validate(stated))
    assert refused is not None
    assert re.search(said, refused)
    assert Vicuna.missing(VicunaOptions.model_validate({**stated, "device": "cuda"})) is None
    assert Vicuna.missing(VicunaOptions.model_validate({**stated, "quantize": None})) is None


@bits
def test_any_model_folder_can_be_used_in_4_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llavakit.cli import main

    make_hf(tmp_path / "narrow")
    assert main(["import", str(tmp_path / "narrow"), str(tmp_path / "small")]) == 0
    chat = ["chat", str(tmp_path / "small"), "--prompt", "what ?", "--device", "cpu"]
    assert main([*chat, "--set", "language.quantize=nf4"]) == 2
    assert "has 48 inputs" in capsys.readouterr().err

    for name, size in WHOLE.items():
        monkeypatch.setitem(LANGUAGE, name, size)
    make_hf(tmp_path / "hf")
    model = tmp_path / "model"
    assert main(["import", str(tmp_path / "hf"), str(model)]) == 0
    capsys.readouterr()
    whole = llavakit.load(model, device="cpu")
    small = llavakit.load(model, device="cpu", options={"language": {"quantize": "nf4"}})
    kinds = {p.dtype for p in small.language.parameters()}
    assert kinds == {torch.uint8, torch.float32}
    text = "USER : what colour is it ?"
    difference = small.logits(text, raw=True) - whole.logits(text, raw=True)
    assert 1e-4 < difference.abs().max() < 0.5
    command = ["chat", str(model), "--prompt", "what ?", "--device", "cpu"]
    command += ["--max-new-tokens", "9", "--set", "language.quantize=nf4"]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == small.generate("what ?", max_new_tokens=9).strip()


def test_4_bits_need_bitsandbytes_and_weights(
    backbones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(backbones / "language")
    monkeypatch.setattr("llavakit_plugins.language.weights.find_spec", lambda name: None)
    for component in (Vicuna, CausalLM):
        options = component.Options(source=source, quantize="nf4", lora=LoraOptions(**LORA))
        assert "needs bitsandbytes" in str(component.missing(options))
        with pytest.raises(ModelError, match="needs bitsandbytes"):
            component.create(options)
    monkeypatch.undo()
    new = CausalLMOptions(config=config_of("qwen2"), quantize="nf4")
    assert "give `source`" in str(CausalLM.missing(new))
    with pytest.raises(ModelError, match="give `source`"):
        CausalLM.create(new)


def with_lora(write_recipe: RecipeWriter, name: str, more: str = "") -> Path:
    lora = f"lora = {{ rank = 4, alpha = 8, dropout = 0.1 }}\n{more}"
    return write_recipe(("\n[model.template]", f"{lora}\n\n[model.template]"), name=name)


@pytest.fixture
def resume_in_the_second_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], None]:
    """Runs a recipe into `cut`, stops it behind the second step's first checkpoint, resumes it."""
    from llavakit.cli import main
    from llavakit_plugins.training.checkpoints import Checkpoints

    def run(recipe: Path) -> None:
        saves = []
        save = Checkpoints.save

        def fail(self: Checkpoints, *arguments: Any) -> None:
            save(self, *arguments)
            saves.append(self)
            if len(saves) == 4:
                raise OSError("the plug was pulled")

        monkeypatch.setattr(Checkpoints, "save", fail)
        with pytest.raises(OSError, match="plug"):
            main([str(recipe), "--out", str(tmp_path / "cut")])
        monkeypatch.setattr(Checkpoints, "save", save)
        torch.manual_seed(123)  # whatever the state of the new process
        assert main([str(recipe), "--out", str(tmp_path / "cut"), "--resume"]) == 0

    return run


def assert_same_models(first: Path, second: Path) -> None:
    files = [file.relative_to(second) for file in second.rglob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@bits
def test_a_recipe_trains_adapters_of_4_bits_and_resumes_to_the_same_bytes(
    write_recipe: RecipeWriter,
    backbones: Path,
    tmp_path: Path,
    resume_in_the_second_step: Callable[[Path], None],
) -> None:
    from llavakit.cli import main

    wide = tmp_path / "wide"
    their_model("llama", **WHOLE, vocab_size=LANGUAGE["vocab_size"]).save_pretrained(wide)
    make_tokenizer().save_pretrained(wide)
    recipe = with_lora(write_recipe, "qlora.toml", 'quantize = "nf4"')
    recipe.write_text(recipe.read_text().replace(str(backbones / "language"), str(wide)))
    assert main([str(recipe), "--out", str(tmp_path / "whole")]) == 0
    resume_in_the_second_step(recipe)
    first, second = (tmp_path / out / "02-finetune" / "model" for out in ("cut", "whole"))
    assert_same_models(first, second)
    weights = load_file(second / "language" / "model.safetensors")
    assert {weights[name].dtype for name in weights if name.endswith("proj.weight")} == {
        torch.uint8
    }
    adapters = load_file(second / "language" / "adapter" / "adapter_model.safetensors")
    assert any(adapters[name].any() for name in adapters if "lora_B" in name)
    text = "USER : what colour is it ?"
    expected = llavakit.load(first).logits(text, raw=True)
    assert main(["export", str(second), str(tmp_path / "hf"), "--format", "hf"]) == 0
    exported = llavakit.load(tmp_path / "hf").logits(text, raw=True)
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)


def test_a_recipe_trains_adapters_only_and_resumes_to_the_same_bytes(
    write_recipe: RecipeWriter,
    backbones: Path,
    tmp_path: Path,
    resume_in_the_second_step: Callable[[Path], None],
) -> None:
    from llavakit.cli import main

    recipe = with_lora(write_recipe, "lora.toml")
    assert main([str(recipe), "--out", str(tmp_path / "whole")]) == 0
    first, second = (tmp_path / "whole" / step / "model" for step in ("01-pretrain", "02-finetune"))
    base = load_file(backbones / "language" / "model.safetensors")
    for folder in (first, second):
        saved = load_file(folder / "language" / "model.safetensors")
        assert all(torch.equal(saved[name], base[name]) for name in base)
    before, after = (
        load_file(folder / "language" / "adapter" / "adapter_model.safetensors")
        for folder in (first, second)
    )
    assert before.keys() == after.keys()
    assert all(not before[name].any() for name in before if "lora_B" in name)  # stage 1: untouched
    assert all(not torch.equal(before[name], after[name]) for name in before)
    events = [
        json.loads(line) for line in (tmp_path / "whole/events.jsonl").read_text().splitlines()
    ]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert losses[-1] < losses[0]

    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    count = sum(tensor.numel() for tensor in after.values())
    assert plan["steps"]["02-finetune"]["note"] == f"of `language`, {count:,} parameters learn"
    checkpoint = next((tmp_path / "whole/02-finetune/checkpoints").glob("*/state.safetensors"))
    learnt = [name for name in load_file(checkpoint) if name.startswith("parameter/language")]
    assert len(learnt) == len(after)
    assert all("lora" in name for name in learnt)

    resume_in_the_second_step(recipe)
    assert_same_models(tmp_path / "cut" / "02-finetune" / "model", second)

    model = llavakit.load(tmp_path / "cut" / "model")
    merged = model.language.merged()
    ids = torch.tensor([5, 6, 7, 8])
    both = [part.hidden(part.embed(ids), Packing.of([4])) for part in (model.language, merged)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)

    exported = tmp_path / "exported"  # with the adapters in the weights
    assert main(["export", str(second), str(exported), "--format", "hf"]) == 0
    assert not list(exported.rglob("*adapter*"))
    again, text = llavakit.load(exported), "USER : what colour is it ?"
    torch.testing.assert_close(again.logits(text, raw=True), model.logits(text, raw=True))


def test_gradients_reach_adapters_only(tmp_path: Path) -> None:
    language = adapted("qwen2", tmp_path).requires_grad_(False)
    learning = dict(language.trainable())
    for parameter in learning.values():
        parameter.requires_grad_(True)
    ids = torch.arange(1, 12)
    embeds = language.embed(ids).requires_grad_()
    language.loss(language.hidden(embeds, Packing.of([11])), ids).backward()
    assert all(parameter.grad is not None for parameter in learning.values())
    assert embeds.grad is not None
    assert all(
        parameter.grad is None
        for name, parameter in language.named_parameters() if name not in learning
    )  # fmt: skip


def test_a_plan_of_4_bits_counts_them_as_such() -> None:
    """The figure of a 7B model in 4 bits, whose linear layers take 6.48 of its 6.74 billion."""
    source = "lmsys/vicuna-7b-v1.5"
    with torch.device("meta"):
        whole = Vicuna(VicunaOptions(source=source))
        small = Vicuna(VicunaOptions(source=source, quantize="nf4", lora=LoraOptions(rank=8)))
    assert whole.frozen_bytes(2) == 2 * 6_738_415_616
    adapters = sum(parameter.numel() for _, parameter in small.trainable())
    others = 6_738_415_616 - 32 * (4 * 4096**2 + 3 * 4096 * 11008) + adapters
    assert small.frozen_bytes(2) == pytest.approx(6_476_005_376 * 0.516 + 2 * others, rel=1e-3)
    assert adapters == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
