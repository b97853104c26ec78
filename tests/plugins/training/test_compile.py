"""`compile = true`: blocks compiled one for all, with the same results, for streams of any length.

Most tests take the backends "eager" and "aot_eager", which trace as any but need no C++ compiler.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import LANGUAGE, VISION, Command, RecipeWriter
from tests.core import processes
from tests.core.peer import Bare
from tests.plugins.training.test_sharded import losses, same, sets, tensors
from tests.plugins.training.test_sharded_checkpoints import as_if_killed
from torch import Tensor

from llavakit import LanguageModel, LlavaModel, TrainingError, packed_attention
from llavakit.contracts.packing import Packing
from llavakit.stream.batch import PackedBatch, pack
from llavakit.stream.encode import Encoded
from llavakit_plugins.connectors.mlp import Mlp, MlpOptions
from llavakit_plugins.language.causal_lm import CausalLM, CausalLMOptions
from llavakit_plugins.language.traced import current
from llavakit_plugins.language.vicuna import Vicuna, VicunaOptions
from llavakit_plugins.training import compiling
from llavakit_plugins.training.compiling import Compiled
from llavakit_plugins.vision.clip import Clip, ClipOptions
from llavakit_plugins.vision.siglip import Siglip, SiglipOptions
from llavakit_plugins.vision.siglip2 import Siglip2Naflex

# PyTorch's tracing looks at the gradient of hidden states, which have none
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

OPERATOR = "llavakit.packed_attention.default"
LAYERS = LANGUAGE | {"num_hidden_layers": 4}
KINDS: dict[str, dict[str, Any]] = {
    "vicuna": {},
    "qwen2": {"model_type": "qwen2"},
    "gemma2": {
        "model_type": "gemma2", "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16,
        "final_logit_softcapping": None, "pad_token_id": 0,
    },
    "gpt_neox": {"model_type": "gpt_neox"},
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every graph that was compiled, by a backend that needs no compiler.

    One that PyTorch traced again, once it knew which numbers are constants, is empty.
    """
    found: list[Any] = []
    aot_eager: Any = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.utils.counters.clear()
    yield found
    torch._dynamo.reset()
    current.stream = None  # where a test failed on the way


def model_of(kind: str, **more: Any) -> LlavaModel:
    """Return a small model whose language model is of this kind."""
    torch.manual_seed(0)
    language: LanguageModel
    if kind == "vicuna":
        language = Vicuna(VicunaOptions(config=LAYERS | more))
    else:
        language = CausalLM(CausalLMOptions(config=LAYERS | KINDS[kind] | more))
    connector = Mlp(MlpOptions(), vision_width=32, language_width=48)
    vision = Clip(ClipOptions(config=VISION))
    return LlavaModel(vision, connector, language, Bare(), choices={}).eval()


def batch_of(*lengths: int) -> tuple[PackedBatch, Tensor]:
    """Return samples of these many text tokens, each with an image, and their pixels."""
    draw = np.random.default_rng(sum(lengths))
    samples = []
    for length in lengths:
        ids = draw.integers(3, 60, length)
        ids[1] = -200
        samples.append(Encoded(ids, np.arange(length) >= length // 2))
    pixels = torch.randn(len(lengths), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return pack(samples, range(len(lengths)), 16), pixels


def gradients(model: LlavaModel, *lengths: int) -> dict[str, Tensor]:
    """Return the loss and the gradients of a micro-batch."""
    model.zero_grad(set_to_none=True)
    batch, pixels = batch_of(*lengths)
    loss = model.loss(batch, model.features(pixels))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def counts(graphs: list[Any]) -> tuple[int, int]:
    """Return how many graphs are of language models' blocks, and how many of encoders'."""
    names = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    languages = sum(OPERATOR in own for own in names)
    return languages, sum(map(bool, names)) - languages


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [*((kind, False) for kind in KINDS), ("vicuna", True), ("qwen2", True)],
)
def test_one_compilation_serves_all_layers_and_lengths(
    kind: str, recompute: bool, graphs: list[Any]
) -> None:
    model = model_of(kind)
    model.language.recompute = recompute
    lengths = [(9, 12, 30), (25, 8), (40,), (7, 11, 13, 17, 8), (9, 12, 30)]
    expected = [gradients(model, *each) for each in lengths]
    names = [name for name, _ in model.named_parameters()], list(model.state_dict())
    blocks = Compiled(model, encoder=False)
    assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == names
    for each, plain in zip(lengths, expected, strict=True):
        found = gradients(model, *each)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    windows = 2 if kind == "gemma2" else 1  # every other layer has one
    assert counts(graphs) == (windows, 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == windows
    assert not torch._dynamo.utils.counters["graph_break"]
    blocks.undo()
    assert current.stream is None
    for name, value in gradients(model, 9, 12, 30).items():
        assert torch.equal(value, expected[0][name]), name
    assert counts(graphs) == (windows, 0)


@pytest.mark.parametrize("kind", ["siglip", "siglip2-naflex", "timm"])
def test_every_encoder_has_blocks_that_compile(kind: str, graphs: list[Any]) -> None:
    model = model_of("vicuna")
    torch.manual_seed(0)
    model.vision = encoder_of(kind)
    pixels = [torch.randn(n, model.vision.channels, 32, 32) for n in (2, 3)]
    if kind == "siglip2-naflex":  # the fourth channel holds the patches' places
        pixels = [model.vision.prepare(Image.new("RGB", (40, 20)))[None].repeat(n, 1, 1, 1)
                  for n in (2, 3)]  # fmt: skip
    expected = [model.features(each) for each in pixels]
    blocks = Compiled(model, encoder=True)
    for each, plain in zip(pixels, expected, strict=True):
        torch.testing.assert_close(model.features(each), plain, atol=1e-6, rtol=1e-5)
    assert counts(graphs) == (0, 1)
    blocks.undo()


def encoder_of(kind: str) -> Any:
    if kind == "siglip":
        return Siglip(SiglipOptions(config=VISION)).eval()
    if kind == "siglip2-naflex":
        shape = {**VISION, "num_patches": 16}
        del shape["image_size"], shape["projection_dim"]
        return Siglip2Naflex(Siglip2Naflex.Options(config=shape)).eval()
    timm = pytest.importorskip("llavakit_plugins.vision.timm")
    small = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2}
    options = timm.TimmOptions(model="vit_tiny_patch16_224", pretrained=False, config=small)
    return timm.Timm(options).eval()


@pytest.mark.parametrize("learns", [True, False])
def test_an_encoder_is_compiled_for_one_image_and_for_many(learns: bool, graphs: list[Any]) -> None:
    model = model_of("vicuna")
    model.vision.requires_grad_(learns)
    lengths = [(9, 12, 30), (25,), (7, 11, 13, 17, 8), (11,)]
    expected = [gradients(model, *each) for each in lengths]
    blocks = Compiled(model, encoder=True)
    for each, plain in zip(lengths, expected, strict=True):
        found = gradients(model, *each)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert counts(graphs) == (1, 2)
    blocks.undo()


def test_sinks_and_half_precision_pass_a_graph(graphs: list[Any]) -> None:
    """What the operator's gradients are made of, in bfloat16 as autocast has it on a CPU."""
    model = model_of("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, 9, 12, 30)
        blocks = Compiled(model, encoder=False)
        found = gradients(model, 9, 12, 30)
        blocks.undo()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, atol=0.03 * scale, rtol=0, msg=name)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=draw, dtype=torch.float64)
    given = [tensor.requires_grad_() for tensor in (q, k, v)]
    starts = torch.tensor([0, 4, 9])

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        operator = torch.ops.llavakit.packed_attention
        return operator(q, k, v, starts, 0.3, 3, 2.0, sinks)  # type: ignore[no-any-return]

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return packed_attention(
            q, k, v, Packing.of([4, 5]), layer=0, scale=0.3, window=3, softcap=2.0, sinks_H=sinks
        )

    given += [sinks.requires_grad_()]
    grads = [torch.autograd.grad(run(*given).square().sum(), given) for run in (attend, plain)]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.abs().max() > 0
    for how in ((0.3, None, None, None), (None, 3, 2.0, sinks)):
        torch.library.opcheck(torch.ops.llavakit.packed_attention, (*given[:3], starts, *how))


def test_answers_and_validation_stay_as_they_are(graphs: list[Any]) -> None:
    model = model_of("vicuna")
    batch, pixels = batch_of(9, 12)
    with torch.no_grad():
        expected = model.loss(batch, model.features(pixels))
        blocks = Compiled(model, encoder=False)
        assert torch.equal(model.loss(batch, model.features(pixels)), expected)
    ids = torch.arange(3, 9)
    packing = Packing.of([6])
    hidden = model.language.hidden(model.language.embed(ids), packing)
    assert counts(graphs) == (1, 0)  # gradients are on
    with torch.no_grad():
        plain = model.language.hidden(model.language.embed(ids), packing)
    torch.testing.assert_close(hidden, plain, atol=1e-6, rtol=0)
    twin = copy.deepcopy(model)  # calls its own blocks
    before = gradients(model, 9, 12)["loss"]
    with torch.no_grad():
        for parameter in twin.language.parameters():
            parameter.zero_()
    assert torch.equal(gradients(model, 9, 12)["loss"], before)
    assert float(gradients(twin, 9, 12)["loss"]) == pytest.approx(
        len(batch.targets_M) * np.log(64), rel=1e-5
    )
    blocks.undo()


# -- in a recipe -----------------------------------------------------------------------------------

BOTH = sets(**{"steps.pretrain.compile": "true", "steps.finetune.compile": "true"})
GENTLE = sets(**{"steps.finetune.train": "{ connector = 1e-4, language = 1e-4 }"})


@pytest.mark.parametrize(
    ("encoder", "more"),
    [
        (False, {}),
        (False, {"steps.finetune.recompute": "true"}),
        (True, {"steps.finetune.cache_features": "false"}),
        (True, {"steps.finetune.train": "{ vision = 1e-4, connector = 1e-4, language = 1e-4 }"}),
    ],
    ids=["cached", "recompute", "encoder", "encoder learns"],
)
def test_both_stages_learn_the_same(
    encoder: bool, more: dict[str, str], write_recipe: RecipeWriter, llava_run: Command,
    tmp_path: Path, graphs: list[Any],
) -> None:  # fmt: skip
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    more = {"steps.pretrain.cache_features": "true", **more}
    arguments = (write_recipe(), *GENTLE, *sets(**more))
    assert llava_run(*arguments, "--out", plain).code == 0
    assert not graphs
    code, _, err = llava_run(*arguments, *BOTH, "--out", compiled)
    assert code == 0, err
    languages, encoders = counts(graphs)
    assert languages == 2, "one for a stage: other weights learn"
    assert bool(encoders) == encoder
    assert losses(compiled) == pytest.approx(losses(plain), abs=2e-6)
    same(compiled / "model", plain / "model", atol=2e-6)
    recipes = [(run / "model" / "model.toml").read_text() for run in (plain, compiled)]
    assert recipes[0] == recipes[1]


@pytest.mark.slow
def test_a_resumed_training_ends_the_same(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, graphs: list[Any]
) -> None:
    pytest.importorskip("peft")
    lora = 'use = "vicuna"\nlora = { rank = 4, alpha = 8, dropout = 0.1 }'
    arguments = (
        write_recipe(('use = "vicuna"', lora)), *GENTLE, *BOTH,
        *sets(**{"steps.finetune.keep": "9"}),
    )  # fmt: skip
    whole = tmp_path / "whole"
    assert llava_run(*arguments, "--out", whole).code == 0
    again = as_if_killed(whole, tmp_path / "again", 2)
    shutil.rmtree(again / "model", ignore_errors=True)
    compiled = len(graphs)
    assert llava_run(*arguments, "--out", again, "--resume").code == 0
    assert len(graphs) > compiled
    assert losses(again)[-4:] == losses(whole)[-4:]
    expected, found = tensors(whole / "model"), tensors(again / "model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = sorted(path.name for path in (whole / "02-finetune" / "checkpoints").iterdir())
    assert files == ["step-000002", "step-000004", "step-000006"]


def without_compiler(arguments: list[str]) -> int:
    """Run the command with blocks compiled by a backend that needs no compiler."""
    from llavakit.cli import main

    compiling.BACKEND = "aot_eager"
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["true", "false"])
def test_two_processes_learn_as_one_does(
    shard: str, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """With whole weights in each (summed gradients), and with divided ones (FSDP2)."""
    arguments = (write_recipe(), *GENTLE)
    one, two = tmp_path / "one", tmp_path / "two"
    assert processes.run(tmp_path, *arguments, "--out", one) == 0
    given = (*arguments, *BOTH, *sets(**{"steps.finetune.shard": shard}))
    ended = processes.run_ranks(tmp_path, 2, *given, "--out", two, program=without_compiler)
    assert ended.code == 0, ended.said
    assert "uncompiled" not in ended.said
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    same(one / "model", two / "model")


def test_a_plan_says_it_and_needs_no_torch(write_recipe: RecipeWriter, llava_run: Command) -> None:
    note = "blocks are compiled in the first step"
    assert note not in llava_run(write_recipe(), "--plan").out
    code, out, err = llava_run(write_recipe(), *BOTH, "--plan")
    assert code == 0, err
    assert note in " ".join(out.split())


# -- what cannot be compiled -----------------------------------------------------------------------


def test_what_pytorch_cannot_compile_is_a_sentence(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, graphs: list[Any],
) -> None:  # fmt: skip
    from torch._inductor.exc import InvalidCxxCompiler

    def backend(graph: Any, inputs: Any) -> Any:
        raise error

    monkeypatch.setattr(compiling, "BACKEND", backend)
    error: Exception = InvalidCxxCompiler()
    text = refused(write_recipe(), *BOTH, "--out", tmp_path / "a")
    assert "`compile`: on a CPU PyTorch needs a C++ compiler for the blocks of the" in text
    assert "install one (g++ or clang++), or leave `compile` out" in text
    error = ValueError("no such operation\nanywhere\nat all")
    cached = sets(**{"steps.pretrain.cache_features": "true"})
    text = refused(write_recipe(), *BOTH, *cached, "--out", tmp_path / "b")
    assert (
        "`compile`: PyTorch cannot compile the blocks of the language model `vicuna` "
        "(ValueError: no such operation anywhere); leave `compile` out" in text
    )


def test_a_backward_pass_that_cannot_be_compiled_is_a_sentence(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, graphs: list[Any],
) -> None:  # fmt: skip
    from torch._inductor.exc import CppCompileError

    def fail(*given: Any) -> None:
        raise CppCompileError(["g++"], "no space left")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    text = refused(write_recipe(), *BOTH, "--out", tmp_path / "run")
    assert text.startswith("`compile`: PyTorch cannot compile the training step (CppCompileError: ")


def test_a_break_of_the_graph_is_a_sentence(graphs: list[Any]) -> None:
    model = model_of("vicuna")
    for block in model.language.blocks:
        block.mlp.act_fn = Breaking()  # type: ignore[union-attr]
    blocks = Compiled(model, encoder=False)
    with pytest.raises(TrainingError, match="cannot compile the blocks of the language model `vic"):
        gradients(model, 9, 12)
    blocks.undo()
    gradients(model, 9, 12)


class Breaking(torch.nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return values


def test_blocks_go_on_uncompiled_where_a_later_compilation_fails(
    graphs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("vicuna")
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)  # is another graph
    with half():
        expected = gradients(model, 9, 12)
    blocks = Compiled(model, encoder=False)
    gradients(model, 30, 12)
    limited = torch._dynamo.config.patch(recompile_limit=1)
    with caplog.at_level(logging.WARNING, "llavakit"), limited, half():
        found = gradients(model, 9, 12)
        gradients(model, 9, 14)
    assert torch.equal(found["loss"], expected["loss"])
    (told,) = [message for message in caplog.messages if "uncompiled" in message]
    assert "the blocks of the language model `vicuna` go on uncompiled (FailOnRecompile" in told
    blocks.undo()


def test_parts_that_do_not_say_what_their_blocks_are(
    graphs: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("vicuna")
    monkeypatch.setattr(Clip, "blocks", ())
    with caplog.at_level(logging.WARNING, "llavakit"):
        Compiled(model, encoder=True).undo()
    assert caplog.messages == [
        "`compile`: the vision encoder `clip` does not say what its `blocks` are; it runs as it is"
    ]
    monkeypatch.setattr(model.language.blocks[1], "forward", lambda *given: given[0])
    with pytest.raises(TrainingError, match=r"`forward` of the blocks of language model `vicuna`"):
        Compiled(model, encoder=False)
    assert "hidden" not in vars(model.language)
    monkeypatch.setattr(Vicuna, "blocks", ())
    with pytest.raises(TrainingError, match=r"`vicuna` does not say what its `blocks` are; leave"):
        Compiled(model, encoder=False)


def test_products_that_a_graph_leaves_out_are_named(
    write_recipe: RecipeWriter, llava_run: Command, tmp_path: Path, graphs: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    products = sets(**{"model.language.products": "onednn", "steps.2.skip": "true"})
    assert llava_run(write_recipe(), *products, *BOTH, "--out", tmp_path / "run").code == 0
    (told,) = [message for message in caplog.messages if "onednn" in message]
    assert told.startswith("note: `compile` leaves products within blocks to PyTorch")


# -- with PyTorch's own compiler -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, which are its own
def test_inductor_gives_the_same_on_this_cpu() -> None:
    if compiling.BACKEND != "inductor" or not any(
        map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))
    ):
        pytest.skip("no C++ compiler is on this machine")
    model = model_of("vicuna")
    lengths = [(9, 12, 30), (25, 8), (40,)]
    expected = [gradients(model, *each) for each in lengths]
    torch._dynamo.utils.counters.clear()
    blocks = Compiled(model, encoder=False)
    for each, plain in zip(lengths, expected, strict=True):
        found = gradients(model, *each)
        for name, value in plain.items():
            scale = max(float(value.abs().max()), 1e-3)
            torch.testing.assert_close(found[name], value, atol=1e-5 * scale, rtol=0, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    blocks.undo()
    torch._dynamo.reset()
