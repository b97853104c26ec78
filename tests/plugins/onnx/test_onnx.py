"""The ONNX export: what others find in the folder, and that it is the same model."""

from __future__ import annotations

import inspect
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from tests.plugins.onnx_models import make_model, make_pictures

import llavakit
from llavakit import (
    Connector,
    LlavaError,
    LlavaModel,
    ModelError,
    Options,
    Prefixes,
    VisionEncoder,
    digest,
)
from llavakit.cli import main
from llavakit.contracts.data import IMAGE
from llavakit.contracts.model import Sampling
from llavakit.model.folder import save_model

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as runtime

from llavakit_plugins.onnx.exporter import graphs as tracing
from llavakit_plugins.onnx.exporter.exporter import Onnx, OnnxOptions
from llavakit_plugins.onnx.exporter.images import find_preparation
from llavakit_plugins.onnx.runtime import OnnxModel, load
from llavakit_plugins.onnx.runtime.sessions import Decoder

QUESTION = "what colour is the picture ?"


@dataclass(frozen=True)
class Exported:
    model: LlavaModel
    native: Path
    folder: Path
    pictures: list[Path]
    figures: Mapping[str, Any]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One model, exported once for all tests: tracing takes most of their time."""
    place = tmp_path_factory.mktemp("onnx")
    model = make_model()
    save_model(model, place / "native")
    options = OnnxOptions(precisions=("fp32", "q8"), least_agreement={"q8": 0.5})
    figures = Onnx(options).export(model, place / "exported")
    return Exported(model, place / "native", place / "exported", make_pictures(place), figures)


@pytest.fixture
def traced(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The graphs of `exported`, given to later exports of the same model instead of new ones."""
    import onnx_ir as ir

    def read(name: str) -> Callable[[], Any]:
        return lambda: ir.load(exported.folder / "onnx" / f"{name}.onnx")

    names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    found: dict[str, Any] = {name: read(name) for name in names}
    monkeypatch.setattr(tracing, "graphs", lambda *_: found)
    return found


# -- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1, 2])
def test_llavakit_load_gives_what_pytorch_gives(exported: Exported, images: int) -> None:
    model, pictures = exported.model, exported.pictures[:images]
    loaded = llavakit.load(exported.folder, device="cpu")
    expected = model.logits(QUESTION, pictures)
    torch.testing.assert_close(loaded.logits(QUESTION, pictures), expected, atol=1e-4, rtol=0)
    ids = model.generate_ids(QUESTION, pictures, max_new_tokens=24)
    assert loaded.generate_ids(QUESTION, pictures, max_new_tokens=24) == ids
    answer = model.generate(QUESTION, images=pictures, max_new_tokens=24)
    assert loaded.generate(QUESTION, images=pictures, max_new_tokens=24) == answer
    assert "".join(loaded.stream(QUESTION, pictures, max_new_tokens=24)) == answer


@pytest.mark.parametrize("name", ["logits", "prepare"])
def test_its_methods_take_what_a_pytorch_model_takes(name: str) -> None:
    def taken(model: type) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(getattr(model, name)).parameters.values()
        return [(each.name, each.kind, each.default) for each in parameters]

    assert taken(OnnxModel) == taken(LlavaModel)


def test_a_dialogue_is_answered_as_in_pytorch(exported: Exported) -> None:
    loaded, model = load(exported.folder), exported.model
    first, second = ({"type": "image", "image": picture} for picture in exported.pictures)
    question = {"type": "text", "text": QUESTION}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "a red circle ."},
        {"role": "user", "content": [first, question]},
        {"role": "assistant", "content": "it is blue ."},
        {"role": "user", "content": [question, second]},
    ]
    for begun in (messages, messages[1:], messages[1:2]):
        np.testing.assert_allclose(loaded.logits(begun), model.logits(begun), atol=1e-4)
        assert loaded.generate_ids(begun) == model.generate_ids(begun)
    options: dict[str, Any] = {
        "temperature": 1.5, "top_k": 9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5,
        "presence_penalty": 0.5, "n": 4, "logprobs": 2, "max_new_tokens": 8,
    }  # fmt: skip
    ours, theirs = loaded.answers(messages, **options), model.answers(messages, **options)
    assert [one.text for one in ours] == [one.text for one in theirs]
    assert len({one.text for one in ours}) > 1
    assert [one.finish for one in ours] == [one.finish for one in theirs]
    logarithms: Any = [[t.logprob for one in run for t in one.tokens] for run in (ours, theirs)]
    np.testing.assert_allclose(logarithms[0], logarithms[1], atol=1e-3)


def test_an_answer_that_has_begun_goes_on_as_in_pytorch(exported: Exported) -> None:
    loaded, model = load(exported.folder), exported.model
    prompts = [(QUESTION, exported.pictures), ("blue", [])]
    begun = [" it is", " a red circle"]
    expected = model.answer_ids(prompts, Sampling(12), begun=begun)
    assert expected != model.answer_ids(prompts, Sampling(12))
    assert loaded.answer_ids(prompts, Sampling(12), begun=begun) == expected


def test_stop_texts_end_an_answer_as_in_pytorch(exported: Exported) -> None:
    loaded, model, question = load(exported.folder), exported.model, "blue"
    whole = model.generate(question, max_new_tokens=24, raw=True)
    stop = max(whole.split(), key=whole.index)  # the word that comes last for the first time
    settings: dict[str, Any] = {"max_new_tokens": 24, "stop": [stop, "never"], "raw": True}
    expected = model.generate(question, **settings)
    assert 0 < len(expected) < len(whole)
    assert loaded.generate(question, **settings) == expected
    assert "".join(loaded.stream(question, **settings)) == expected
    sampling = Sampling(24, stop=(stop,))
    shorter = model.answer_ids([(question, ())], sampling, raw=True)
    assert loaded.answer_ids([(question, ())], sampling, raw=True) == shorter
    assert len(shorter[0]) < 24
    assert loaded.decode(shorter[0]) == model.decode(shorter[0])
    with pytest.raises(ModelError, match="empty text"):
        loaded.generate(question, stop=[""])


def test_a_batch_is_answered_as_one_by_one(exported: Exported) -> None:
    one, two = exported.pictures
    prompts = [(QUESTION, [one]), ("a red circle is it ?", []), ("the shape", [two, one])]
    expected = [exported.model.generate_ids(*prompt, max_new_tokens=12) for prompt in prompts]
    loaded = load(exported.folder)
    assert loaded.answer_ids(prompts, Sampling(12)) == expected
    answers = exported.model.answer(prompts, Sampling(12))
    assert loaded.answer(prompts, Sampling(12)) == answers


def test_raw_prompts_and_placeholders_within_the_text(exported: Exported) -> None:
    loaded, (one, two) = load(exported.folder), exported.pictures
    text = f"the {IMAGE} is red ? {IMAGE}"
    for raw in (False, True):
        ids = exported.model.generate_ids(text, [one, two], max_new_tokens=6, raw=raw)
        assert loaded.generate_ids(text, [one, two], max_new_tokens=6, raw=raw) == ids
    with pytest.raises(ModelError, match="2 `<image>` for 1 images"):
        loaded.generate_ids(text, [one], raw=True)


def test_sampling_follows_the_probabilities(exported: Exported) -> None:
    loaded = load(exported.folder)
    settings: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.5, "raw": True}
    first = loaded.generate(QUESTION, seed=1, **settings)
    assert first == loaded.generate(QUESTION, seed=1, **settings)
    assert len({loaded.generate(QUESTION, seed=seed, **settings) for seed in range(6)}) > 1
    greedy = loaded.generate(QUESTION, max_new_tokens=16, raw=True)
    certain = loaded.generate(QUESTION, seed=1, top_p=1e-9, **settings)
    assert certain == greedy, "the smallest nucleus holds the likeliest token alone"
    with pytest.raises(ModelError, match="temperature=-1"):
        loaded.generate(QUESTION, temperature=-1)


def test_too_long_a_prompt_is_said(exported: Exported) -> None:
    with pytest.raises(ModelError, match="reads at most 256"):
        load(exported.folder).generate("red " * 300)


def test_the_report_holds_the_proof(exported: Exported) -> None:
    report = json.loads((exported.folder / "export.json").read_text())
    assert set(report["parity"]) == {"fp32", "q8"}
    assert report["parity"]["fp32"]["largest"] <= 1e-4
    assert report["parity"]["fp32"]["tokens"] == 1.0
    assert 0 < report["parity"]["q8"]["largest"] < 1
    assert exported.figures["fp32 largest"] == report["parity"]["fp32"]["largest"]
    assert report["settings"]["operators"] == "microsoft"
    small = load(exported.folder, precision="q8").logits(QUESTION, exported.pictures[:1])
    exact = exported.model.logits(QUESTION, exported.pictures[:1]).numpy()
    assert 1e-6 < np.abs(small - exact).max() < 1, "8 bits are near, and not the same"


# -- what others find ----------------------------------------------------------------------------


def test_graphs_say_nothing_of_the_machine_that_made_them(exported: Exported) -> None:
    graphs = sorted((exported.folder / "onnx").glob("*.onnx"))
    assert graphs
    for graph in graphs:
        written = graph.read_bytes()
        for path in (Path(__file__).parents[3], Path(torch.__file__).parents[1]):
            assert str(path).encode() not in written, graph.name


def test_the_graphs_are_those_clients_expect(exported: Exported) -> None:
    decoder = onnx.load(exported.folder / "onnx/decoder_model_merged.onnx")
    onnx.checker.check_model(onnx.load(exported.folder / "onnx/embed_tokens.onnx"))
    operators = {node.op_type for node in decoder.graph.node}
    assert {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"} <= operators
    assert "If" not in operators
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*decoder.graph.input, *decoder.graph.output)
    }
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["inputs_embeds"] == ["batch_size", "sequence_length", 64]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["logits"][-1] == 64
    session = runtime.InferenceSession(decoder.SerializeToString())
    required = [value.name for value in session.get_inputs()]
    assert required == [
        "inputs_embeds", "attention_mask", "position_ids",
        "past_key_values.0.key", "past_key_values.0.value",
        "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    small = onnx.load(exported.folder / "onnx/decoder_model_merged_quantized.onnx")
    assert "MatMulNBits" in {node.op_type for node in small.graph.node}
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2
    assert config["transformers.js_config"]["dtype"]["decoder_model_merged"] == "fp32"


def test_a_plain_client_reads_and_writes_the_same_tokens(exported: Exported) -> None:
    """transformers' processor and bare onnxruntime, as someone who has never heard of us."""
    from transformers import AutoProcessor, LlavaConfig

    config = LlavaConfig.from_pretrained(exported.folder)
    processor = AutoProcessor.from_pretrained(exported.folder)
    picture = Image.open(exported.pictures[0])
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=picture, text=prompt, return_tensors="np")
    ids = inputs["input_ids"]
    rows = exported.model.prompt(QUESTION, exported.pictures[:1]).expand(
        exported.model.visual_tokens
    )
    expected = np.where(rows.visual, config.image_token_id, rows.token_ids)
    assert ids[0].tolist() == expected.tolist()
    pixels = exported.model.prepare(exported.pictures[:1])
    assert pixels is not None
    assert np.abs(inputs["pixel_values"] - pixels.numpy()).max() < 0.06, "torchvision, not Pillow"
    written = _generate(exported.folder, ids, pixels.numpy(), config.image_token_id, 10)
    assert written == exported.model.generate_ids(
        QUESTION, exported.pictures[:1], max_new_tokens=10
    )


def _generate(
    folder: Path, ids: npt.NDArray[np.int64], pixels: Any, image_token: int, count: int
) -> list[int]:
    names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    vision, embed, decoder = (
        runtime.InferenceSession(str(folder / f"onnx/{name}.onnx")) for name in names
    )
    (features,) = vision.run(None, {"pixel_values": pixels})
    (embeds,) = embed.run(None, {"input_ids": ids})
    embeds[ids == image_token] = features.reshape(-1, features.shape[-1])
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in decoder.get_inputs()
        if value.name.startswith("past")
    }
    written: list[int] = []
    total = 0
    while True:
        rows = embeds.shape[1]
        total += rows
        logits, *present = decoder.run(
            None,
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(total - rows, total)[None],
                **past,
            },
        )
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == 2 or len(written) == count:
            return written
        past = dict(zip(past, present, strict=True))
        (embeds,) = embed.run(None, {"input_ids": np.asarray([written[-1:]])})


def _nodes(folder: Path, name: str, operator: str) -> list[dict[str, Any]]:
    """Return the attributes of a graph's nodes of one operator."""
    graph = onnx.load(folder / f"onnx/{name}.onnx").graph
    return [
        {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for node in graph.node
        if node.op_type == operator
    ]


def test_only_rows_whose_logits_are_asked_for_pass_the_last_mlp(exported: Exported) -> None:
    path = exported.folder / "onnx/decoder_model_merged.onnx"
    model = onnx.load(path)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    down = products[-2].output[0]  # the last is the head
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(down))
    session = runtime.InferenceSession(model.SerializeToString())
    feeds: dict[str, Any] = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    feeds["inputs_embeds"] = np.random.default_rng(0).normal(size=(1, 7, 64)).astype(np.float32)
    feeds["attention_mask"] = np.ones((1, 7), np.int64)
    feeds["position_ids"] = np.arange(7)[None]
    whole, every = session.run(["logits", down], feeds)
    feeds["num_logits_to_keep"] = np.asarray(2)
    last, few = session.run(["logits", down], feeds)
    assert (every.shape[1], few.shape[1]) == (7, 2)
    np.testing.assert_allclose(last, whole[:, -2:], atol=1e-5)


def test_weights_in_blocks_are_hardly_padded(
    exported: Exported, traced: object, tmp_path: Path
) -> None:
    settings = {"precisions": ["q8", "q4"], "least_agreement": {"q8": 0.3, "q4": 0.1}}
    Onnx(OnnxOptions.model_validate(settings)).export(exported.model, tmp_path / "out")
    for suffix, bits in (("quantized", 8), ("q4", 4)):
        for name in ("vision_encoder", "decoder_model_merged"):
            nodes = _nodes(tmp_path / "out", f"{name}_{suffix}", "MatMulNBits")
            assert {node["bits"] for node in nodes} == {bits if "decoder" in name else 8}
            sizes = [(node["K"], node["N"], node["block_size"]) for node in nodes]
            padded = sum(-(-rows // block) * block * columns for rows, columns, block in sizes)
            assert padded <= 1.05 * sum(rows * columns for rows, columns, _ in sizes)
    wide = OnnxOptions.model_validate({**settings, "precisions": "q8", "block_size": 16})
    Onnx(wide).export(exported.model, tmp_path / "wide")
    found = _nodes(tmp_path / "wide", "decoder_model_merged_quantized", "MatMulNBits")
    assert {node["block_size"] for node in found} == {16}, "what is asked for is taken as it is"


@pytest.mark.parametrize("without_vnni", [False, True])
def test_integer_products_do_not_saturate(
    exported: Exported, tmp_path: Path, without_vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs of 255 * 127 are more than the 16 bits that AVX2 adds them up in."""
    from llavakit_plugins.onnx.runtime import sessions
    from llavakit_plugins.onnx.runtime.folder import read
    from llavakit_plugins.onnx.runtime.sessions import open_session

    if without_vnni:  # what is done on such a CPU is right on all of them
        monkeypatch.setattr(sessions, "saturates", lambda _: True)

    size, tensor = 64, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                "DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft"
            )
        ],
        "saturating",
        [onnx.helper.make_tensor_value_info("x", tensor, [4, size])],
        [onnx.helper.make_tensor_value_info("y", tensor, [4, size])],
        [
            onnx.numpy_helper.from_array(np.full((size, size), 127, np.int8), "w"),
            onnx.numpy_helper.from_array(np.asarray(1 / 127, np.float32), "s"),
        ],
    )
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    (tmp_path / "onnx").mkdir()
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=domains, ir_version=10),
        tmp_path / "onnx/vision_encoder.onnx",
    )
    folder = replace(read(exported.folder, None)[0], path=tmp_path)
    session = open_session(folder, "vision_encoder", "fp32", "cpu", 1)
    (product,) = session.run(None, {"x": np.ones((4, size), np.float32)})
    np.testing.assert_allclose(product, size, rtol=0.01)


def test_an_answer_leaves_no_cache_behind(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is kept of the last dialogues."""
    made: list[Any] = []
    again = Decoder.again

    def see(decoder: Decoder) -> Decoder:
        made.append(again(decoder))
        return made[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(Decoder, "again", see)
    loaded = load(exported.folder)
    answer = loaded.stream("blue", max_new_tokens=8, raw=True)
    next(answer)
    assert made[-1].held()
    del answer
    assert made[-1].held() == []
    expected = exported.model.generate("blue", max_new_tokens=8, raw=True)
    assert loaded.generate("blue", max_new_tokens=8, raw=True) == expected
    assert made[-1].held() == [] == loaded.decoder.held()
    loaded.prefixes = Prefixes(0)
    assert loaded.generate("blue", max_new_tokens=8, raw=True) == expected
    assert not loaded.prefixes.kept


def test_a_next_turn_reads_what_is_new(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    read = Decoder.read

    def see(decoder: Decoder, embeds: Any, *rest: Any, **options: Any) -> Any:
        rows.append(embeds.shape[1])
        return read(decoder, embeds, *rest, **options)

    monkeypatch.setattr(Decoder, "read", see)
    loaded, plain = load(exported.folder), load(exported.folder)
    plain.prefixes = Prefixes(0)
    images = [{"type": "image", "image": picture} for picture in exported.pictures]
    messages: list[Any] = []
    answers, before = [], 0
    for number in range(4):
        text = {"type": "text", "text": f"{QUESTION} {'a red ' * number}"}
        messages.append({"role": "user", "content": [*images[number : number + 1], text]})
        answers.append(loaded.generate_ids(messages, max_new_tokens=6))
        assert answers[-1] == plain.generate_ids(messages, max_new_tokens=6)
        assert answers[-1] == exported.model.generate_ids(messages, max_new_tokens=6)
        new, whole = rows[-2:]
        assert whole == loaded.prompt(messages, ()).length(loaded.visual_tokens)
        if number:
            assert new <= whole - before + 7  # the answer before and the new question
        before = whole
        messages.append({"role": "assistant", "content": loaded.decode(answers[-1])})
    options: dict[str, Any] = {"n": 3, "temperature": 2.0, "seed": 1, "max_new_tokens": 5}
    drawn = [one.text for one in loaded.answers(messages[:-1], **options)]
    assert drawn == [one.text for one in plain.answers(messages[:-1], **options)]
    assert len(loaded.prefixes.kept) == 1


# -- without torch -------------------------------------------------------------------------------

_BLOCKED = """\
import json, sys
for name in ("torch", "transformers", "onnx"):
    sys.modules[name] = None
from llavakit.cli import main
from llavakit_plugins.onnx.runtime import OnnxModel, load
from llavakit_plugins.onnx.runtime.sessions import Decoder
folder, picture, question = sys.argv[1:]
assert main(["chat", folder, "--image", picture, "--prompt", question]) == 0
model = load(folder)
ids = model.generate_ids(question, [picture], max_new_tokens=8)
print(json.dumps([ids, model.generate(question, [picture]), list(model.logits(question).shape)]))
"""


def test_it_runs_where_torch_cannot_be_imported(exported: Exported) -> None:
    command: list[str | Path] = [
        sys.executable,
        "-c",
        _BLOCKED,
        exported.folder,
        exported.pictures[0],
        QUESTION,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chat, last = done.stdout.strip().rsplit("\n", 1)
    ids, answer, shape = json.loads(last)
    pictures = exported.pictures[:1]
    assert ids == exported.model.generate_ids(QUESTION, pictures, max_new_tokens=8)
    assert answer == exported.model.generate(QUESTION, pictures)
    assert chat == exported.model.generate(QUESTION, pictures, max_new_tokens=512)
    assert shape == list(exported.model.logits(QUESTION).shape)


# -- from the command line -----------------------------------------------------------------------


def test_export_and_chat(
    exported: Exported, traced: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ["--set", 'precisions=["q8"]', "--set", "least_agreement={q8=0.5}"]
    assert main(["export", str(exported.native), str(out), "--format", "onnx", *settings]) == 0
    assert "fp32 largest" in capsys.readouterr().out
    assert not (out / "onnx/decoder_model_merged.onnx").exists(), "only what was asked for"
    chat = ["chat", str(exported.folder), "--image", str(exported.pictures[0]), "--device", "cpu"]
    assert main([*chat, "--prompt", QUESTION]) == 0
    expected = exported.model.generate(QUESTION, exported.pictures[:1], max_new_tokens=512)
    assert capsys.readouterr().out.strip() == expected


# -- refusals ------------------------------------------------------------------------------------


def test_graphs_that_differ_are_refused_with_the_layer(
    exported: Exported, traced: dict[str, Any], tmp_path: Path
) -> None:
    import onnx_ir as ir

    def spoilt() -> Any:
        graph: Any = ir.load(exported.folder / "onnx/decoder_model_merged.onnx")
        language: Any = exported.model.language
        down = language.model.model.layers[0].mlp.down_proj.weight
        name = next(  # of the first layer, whatever the exporter calls it
            node.inputs[1].name
            for node in graph.graph
            if node.op_type == "MatMul" and node.inputs[1].name in graph.graph.initializers
            and tuple(node.inputs[1].shape) == tuple(down.t().shape)
        )  # fmt: skip
        value = graph.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=name)
        return graph

    traced["decoder_model_merged"] = spoilt
    with pytest.raises(ModelError, match=r"layer 1 \(or the output of layer 0\)"):
        Onnx(OnnxOptions()).export(exported.model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_CONVERTED = """\
import logging, sys
import onnx
from llavakit_plugins.onnx.exporter.precision import convert
for precision in ("int8", "q8", "q4"):
    convert("decoder_model_merged", onnx.load(sys.argv[1]), precision, None)
logging.getLogger("onnx_ir").info("heard")
print(logging.root.handlers, logging.root.level == logging.WARNING)
"""


def test_converting_leaves_the_logging_of_the_process_alone(exported: Exported) -> None:
    graph = exported.folder / "onnx/decoder_model_merged.onnx"
    command: list[str | Path] = [sys.executable, "-c", _CONVERTED, graph]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[] True\n", "")


def test_a_precision_below_its_limit_is_refused(
    exported: Exported, traced: object, tmp_path: Path
) -> None:
    options = OnnxOptions(precisions=("q4",), least_agreement={"q4": 1.0})
    with pytest.raises(ModelError, match=r"precision q4 agrees .* `least_agreement`"):
        Onnx(options).export(exported.model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 50 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(
    exported: Exported, traced: object, tmp_path: Path, small_files: None
) -> None:
    with pytest.raises(LlavaError, match="cannot write"):
        Onnx(OnnxOptions()).export(exported.model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _spoil(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def _newer(content: bytes) -> bytes:
    model = onnx.load_model_from_string(content)
    for known in model.opset_import:
        if known.domain == "":
            known.version = 99
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("onnx/embed_tokens.onnx", None, "lacks onnx/embed_tokens.onnx; copy"),
        ("tokenizer.json", None, "lacks tokenizer.json; copy"),
        ("export.json", None, "lacks export.json; copy"),
        ("export.json", lambda _: b"{", "export.json is not valid JSON"),
        ("export.json", lambda c: c.replace(b'"format": 1', b'"format": 9'), "has format 9"),
        ("onnx/vision_encoder.onnx", lambda c: c + b"\0", "differs from what export.json says"),
    ],
)
def test_a_damaged_folder_is_named(
    exported: Exported,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    folder = copytree(exported.folder, tmp_path / "copy")
    if change is None:
        (folder / name).unlink()
    else:
        _spoil(folder, name, change)
    with pytest.raises(ModelError, match=message):
        llavakit.load(folder, device="cpu")


def _restate(folder: Path, section: str, key: str, value: Any) -> None:
    report = json.loads((folder / "export.json").read_text())
    report[section][key] = value
    (folder / "export.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("preparation", "size", 16, "vision_encoder .* `pixel_values` is .* not .*, 3, 16, 16"),
        ("preparation", "size", 10**30, "`preparation.size`"),
        ("preparation", "resized", 1 << 31, "`preparation.resized`"),
        ("preparation", "mean", [0, 0, 1e308], "`preparation.mean.2`"),
        ("shapes", "visual_tokens", 1, "vision_encoder .* `image_features`"),
        ("shapes", "visual_tokens", 1 << 31, "`shapes.visual_tokens`"),
        ("shapes", "layers", 1, r"decoder_model_merged .* needs `past_key_values.1.key`"),
        ("shapes", "layers", 3, r"`past_key_values.2.key` is nothing"),
        ("shapes", "layers", 1 << 31, "`shapes.layers`"),
        ("shapes", "kv_heads", 1, r"`past_key_values.0.key` is .*, not \[None, 1, None, 16\]"),
        ("shapes", "head_dim", 1 << 31, "`shapes.head_dim`"),
        ("shapes", "vocabulary", 3, "`logits` is"),
        ("prompt", "beginning", [1 << 31], "`prompt.beginning.0`"),
    ],
)
def test_a_report_that_describes_other_graphs_is_refused(
    exported: Exported, tmp_path: Path, section: str, key: str, value: Any, message: str
) -> None:
    folder = copytree(exported.folder, tmp_path / "copy")
    _restate(folder, section, key, value)
    with pytest.raises(ModelError, match=message):
        llavakit.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"use": "anyres", "grids": [[0, 1]]}, r"reads \(`tiling.grids.0.0`: "),
        ({"x": 1}, r"reads \(`tiling.use`: "),
        ({"use": "grid", "rows": 100_000}, r"reads \(`tiling.rows`: "),
        ({"use": "anyres"}, "does not list tiling.safetensors, which the model needs"),
    ],
)
def test_a_tiling_that_cannot_be_is_refused(
    exported: Exported, tmp_path: Path, tiling: dict[str, Any], message: str
) -> None:
    folder = copytree(exported.folder, tmp_path / "copy")
    report = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(report | {"tiling": tiling}))
    with pytest.raises(ModelError, match=message):
        llavakit.load(folder, device="cpu")


@pytest.mark.parametrize("content", [b"garbage", {"x": 48}, {"image_newline": 3}])
def test_a_learned_row_that_is_none_is_refused(
    exported: Exported, tmp_path: Path, content: bytes | dict[str, int]
) -> None:
    from safetensors.numpy import save_file

    folder = copytree(exported.folder, tmp_path / "copy")
    file = folder / "tiling.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file({name: np.zeros(n, np.float32) for name, n in content.items()}, file)
    report = json.loads((folder / "export.json").read_text())
    report["sha256"][file.name] = digest(file)
    (folder / "export.json").write_text(json.dumps(report | {"tiling": {"use": "anyres"}}))
    with pytest.raises(ModelError, match=r"tiling.safetensors holds no `image_newline` of \d+ num"):
        llavakit.load(folder, device="cpu")


def test_a_graph_s_own_words_reach_no_terminal(
    exported: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime would log names of nodes as they are; what it raises is a sentence."""
    folder = copytree(exported.folder, tmp_path / "copy")
    _restate(folder, "prompt", "beginning", [5000])
    with pytest.raises(ModelError, match="onnxruntime cannot run the graph embed_tokens"):
        llavakit.load(folder, device="cpu").generate(QUESTION)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(exported: Exported, tmp_path: Path) -> None:
    folder = copytree(exported.folder, tmp_path / "copy")
    report = json.loads((folder / "export.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        report["sha256"].pop(name)
    (folder / "export.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match=r"lacks tokenizer(_config)?.json; copy"):
        llavakit.load(folder, device="cpu")


def test_graphs_in_each_others_places_are_refused(exported: Exported, tmp_path: Path) -> None:
    names = [f"onnx/{name}.onnx" for name in ("vision_encoder", "embed_tokens")]
    names.append("onnx/decoder_model_merged.onnx")
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        folder = copytree(exported.folder, tmp_path / Path(name).stem)
        (folder / name).write_bytes((exported.folder / other).read_bytes())
        _restate(folder, "sha256", name, digest(folder / name))
        with pytest.raises(ModelError, match=f"graph {Path(name).stem} of .* is not the one"):
            llavakit.load(folder, device="cpu")


def test_a_graph_that_fails_says_so(exported: Exported, tmp_path: Path) -> None:
    folder = copytree(exported.folder, tmp_path / "copy")
    _restate(folder, "prompt", "beginning", [5000])
    with pytest.raises(ModelError, match="onnxruntime cannot run the graph embed_tokens"):
        llavakit.load(folder, device="cpu").generate(QUESTION)


def test_a_tokenizer_without_its_unknown_token_is_named(exported: Exported, tmp_path: Path) -> None:
    folder = copytree(exported.folder, tmp_path / "copy")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["model"]["unk_token"] = "nothing"
    (folder / "tokenizer.json").write_text(json.dumps(table))
    _restate(folder, "sha256", "tokenizer.json", digest(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read: .*UNK"):
        llavakit.load(folder, device="cpu")


def test_an_unknown_operator_set_is_named(exported: Exported, tmp_path: Path) -> None:
    from llavakit.recipe.files import digest

    folder = copytree(exported.folder, tmp_path / "copy")
    name = "onnx/embed_tokens.onnx"
    known = digest(folder / name)
    _spoil(folder, name, _newer)
    new = digest(folder / name).encode()
    _spoil(folder, "export.json", lambda content: content.replace(known.encode(), new))
    with pytest.raises(ModelError, match=r"operator set 99, .*update onnxruntime"):
        llavakit.load(folder, device="cpu")


def test_a_precision_or_device_that_is_not_there(exported: Exported) -> None:
    with pytest.raises(ModelError, match="no precision `q4`, only fp32, q8"):
        load(exported.folder, precision="q4")
    with pytest.raises(ModelError, match="runs on cpu or cuda, not on `tpu`"):
        load(exported.folder, device="tpu")


def test_it_recognises_by_content(exported: Exported, tmp_path: Path) -> None:
    assert Onnx.recognises(exported.folder)
    assert not Onnx.recognises(exported.native)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert not Onnx.recognises(tmp_path)


_WITHOUT = """\
import sys
for name in ("onnx", "onnxruntime", "onnxscript", "onnx_ir"):
    sys.modules[name] = None
from pathlib import Path
import llavakit
from llavakit import LlavaError
from llavakit.contracts.interfaces import Exporter
exporter = llavakit.Registry.installed().get(Exporter, "onnx")
model = llavakit.load(sys.argv[1], device="cpu")
for attempt in (
    lambda: exporter(exporter.Options()).export(model, Path("nowhere")),
    lambda: llavakit.load(sys.argv[2], device="cpu"),
):
    try:
        attempt()
    except LlavaError as error:
        print(error)
"""


def test_without_the_extra_a_sentence_says_how_to_get_it(exported: Exported) -> None:
    command: list[str | Path] = [sys.executable, "-c", _WITHOUT, exported.native, exported.folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install 'llavakit[onnx]'") == 2, done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ["q5"]}, "precisions"),
        ({"precisions": []}, "precisions"),
        ({"block_size": 48}, "power of two"),
        ({"least_agreement": {"q8": 95}}, "least_agreement"),
        ({"operators": "nvidia"}, "operators"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnnxOptions(**options)


@torch.library.custom_op("llavakit_test::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@mystery.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Mysterious(Connector):
    """A connector with an operator of its own."""

    name = "mysterious"

    def __init__(self, options: Options, *, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(vision_width, language_width)

    def forward(self, features_BPD: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = mystery(self.layer(features_BPD))
        return embeddings


class Patches(VisionEncoder):
    """One convolution."""

    name = "patches"
    width, image_size = 8, 16

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, self.width, 8, 8)

    def tokens(self, image_size: int) -> int:
        return (image_size // 8) ** 2

    def prepare(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layer(pixels_BCHW).flatten(2).transpose(1, 2)
        return features


def test_an_operator_without_onnx_form_is_named_with_its_component(
    exported: Exported, tmp_path: Path
) -> None:
    model = make_model()
    model.vision = Patches(Options())
    model.connector = Mysterious(Options(), vision_width=8, language_width=64)
    message = r"connector `mysterious` uses the operator `llavakit_test.mystery`"
    with pytest.raises(ModelError, match=message):
        Onnx(OnnxOptions()).export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_SHALLOW = {
    "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


# -- what clients are told of images -------------------------------------------------------------


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_the_preparation_is_found(aspect: str) -> None:
    from llavakit_plugins.vision.clip import Clip, ClipOptions

    vision = Clip(ClipOptions.model_validate({"config": _SHALLOW, "aspect": aspect}))
    found = find_preparation(vision)
    assert (found.aspect, found.resample, found.size) == (aspect, "bicubic", 16)
    assert found.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073), abs=1e-6)


@pytest.mark.parametrize("option", [{"backend": "torchvision"}, {"fast": True}])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_that_are_not_pillows_are_exported_as_the_nearest_with_a_warning(
    option: dict[str, Any], interpolation: str, caplog: pytest.LogCaptureFixture
) -> None:
    from llavakit_plugins.vision.clip import Clip, ClipOptions

    options = {"config": _SHALLOW, "aspect": "pad", "interpolation": interpolation, **option}
    found = find_preparation(Clip(ClipOptions.model_validate(options)))
    assert (found.aspect, found.resample) == ("pad", interpolation)
    assert "differ by up to 2 of 255 levels" in caplog.text


def test_pixels_other_than_those_learned_from_are_said(
    exported: Exported, traced: object, tmp_path: Path
) -> None:
    native = tmp_path / "native"
    copytree(exported.native, native)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(exported.folder)
    # what is learned is what the folder remembers, and not with what options it was opened
    with pytest.warns(UserWarning, match="is given them with 'torchvision'"):
        other = llavakit.load(native, device="cpu", options={"vision": {"backend": "torchvision"}})
    near = OnnxOptions(tolerance=0.1)  # pixels a level apart
    Onnx(near).export(other, tmp_path / "opened")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "opened")
    path = native / "model.toml"
    text = path.read_text("utf-8")
    path.write_text(text.replace("[vision]", '[vision]\nbackend = "torchvision"', 1), "utf-8")
    Onnx(near).export(llavakit.load(native, device="cpu"), tmp_path / "learned")
    said = "learned from images with `vision.backend = 'torchvision'` and is given them with 'pil'"
    for opened in (load, llavakit.load):
        with pytest.warns(UserWarning, match=said):
            opened(tmp_path / "learned")


def test_a_preparation_that_was_changed_is_said(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    copytree(exported.folder, folder)
    report = json.loads((folder / "export.json").read_text("utf-8"))
    assert report["learned"] == {"aspect": "crop", "backend": "pil", "fast": False}
    report["preparation"]["aspect"] = "pad"
    (folder / "export.json").write_text(json.dumps(report), "utf-8")
    with pytest.warns(UserWarning, match=r"`vision.aspect = 'crop'` and is given them with 'pad'"):
        load(folder)
    del report["learned"]  # as exports before had it
    (folder / "export.json").write_text(json.dumps(report), "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_a_squashed_square_with_another_filter_is_found() -> None:
    found = find_preparation(Patches(Options()))
    assert (found.aspect, found.resample) == ("squash", "bilinear")
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_a_preparation_that_no_client_can_repeat_is_refused() -> None:
    from llavakit_plugins.vision.clip import Clip, ClipOptions

    class Flipped(Clip):
        name = "flipped"

        def prepare(self, image: Image.Image) -> torch.Tensor:
            return super().prepare(image).flip(-1)

    with pytest.raises(ModelError, match="`flipped` prepares images in a way"):
        find_preparation(Flipped(ClipOptions.model_validate({"config": _SHALLOW})))
