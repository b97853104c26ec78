"""GGUF files: what is in them, by gguf's own reader and by llama.cpp's rules in numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests import published
from tests.conftest import LANGUAGE, VISION, Command, RecipeWriter, make_tokenizer

import llavakit
from llavakit import Exporter, LlavaModel, ModelError, ModelRecipe, Registry, Turn, Use
from llavakit.model.folder import create_model, save_model
from llavakit.testing import ExporterContract, byte_tokenizer
from llavakit_plugins.gguf.exporter import Gguf, GgufOptions

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
from llavakit_plugins.gguf.vocabulary import (  # noqa: E402
    _SPLITS as vocabulary_rules,
    check_tokenizer,
    remarks,
    write_vocabulary,
)

SHAPE = {**LANGUAGE, "hidden_size": 64, "vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2}
MODELS = [("clip", "linear", "llama"), ("clip", "mlp", "qwen2"), ("siglip", "mlp", "llama")]
IDS = ["-".join(names) for names in MODELS]


def make_model(
    vision: str,
    connector: str,
    family: str,
    folder: Path,
    tokenizer: Any = None,
    **changes: dict[str, Any],
) -> LlavaModel:
    """Return a small model whose tokenizer has bytes alone, and whose vocabulary is padded."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "llama":
            LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        else:
            network = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
            for block in network.model.layers:
                torch.nn.init.normal_(block.self_attn.q_proj.bias)
            network.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    recipe = {
        "vision": {"use": vision, "config": VISION, **changes.get("of_vision", {})},
        "connector": {"use": connector, **changes.get("of_connector", {})},
        "language": {"use": "vicuna" if family == "llama" else "causal-lm", "source": str(folder)},
        "template": {"use": "vicuna_v1", "system": ""},
        **({"tiling": changes["tiling"]} if "tiling" in changes else {}),
    }
    return create_model(ModelRecipe.model_validate(recipe), Registry.installed(), seed=0)


@pytest.fixture(scope="module", params=MODELS, ids=IDS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlavaModel, Path]:
    """A model, and the folder that it was written to in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    vision, connector, family = request.param
    model = make_model(vision, connector, family, folder / "language")
    export(model, folder / "out", type="f32", vision_type="f32")
    return model, folder / "out"


def export(model: LlavaModel, folder: Path, **options: Any) -> Mapping[str, Any]:
    use = Use[Exporter].model_validate({"use": "gguf", **options})
    return Registry.installed().build(use).export(model, folder)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return the metadata and the tensors of a file, as gguf's own reader has them."""
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    return fields, tensors


class TestGguf(ExporterContract):
    reads_back = False

    def build(self) -> Exporter:
        return Gguf(GgufOptions())

    def model(self) -> LlavaModel:
        return make_model("clip", "linear", "llama", self.tmp_path)


def test_the_language_model_is_described_as_llama_cpp_reads_it(
    written: tuple[LlavaModel, Path],
) -> None:
    model, folder = written
    fields, tensors = read(folder / "model-f32.gguf")
    config: Any = cast(Any, model.language).model.config
    kind = fields["general.architecture"]
    assert kind == config.model_type
    assert fields["general.type"] == "model"
    assert fields[f"{kind}.block_count"] == 2
    assert fields[f"{kind}.embedding_length"] == 64
    assert fields[f"{kind}.feed_forward_length"] == 96
    assert fields[f"{kind}.attention.head_count"] == 4
    assert fields[f"{kind}.attention.head_count_kv"] == 2
    assert fields[f"{kind}.context_length"] == 256
    assert fields[f"{kind}.rope.dimension_count"] == 16
    assert fields[f"{kind}.rope.freq_base"] == 10_000
    assert fields[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (tensors["token_embd.weight"].shape, tensors["output.weight"].shape) == ((260, 64),) * 2
    known = gguf.MODEL_TENSORS[{v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind]]
    names = {gguf.TENSOR_NAMES[tensor].partition(".{bid}")[2] for tensor in known}
    for name in tensors:
        stem = name.rpartition(".")[0]
        assert stem in {gguf.TENSOR_NAMES[t] for t in known} or f".{stem.split('.', 2)[2]}" in names


def test_queries_and_keys_turn_as_llama_cpp_turns_them(written: tuple[LlavaModel, Path]) -> None:
    """Rotated by llama.cpp's rule for the family, products of queries and keys are the same."""
    model, folder = written
    fields, tensors = read(folder / "model-f32.gguf")
    state = cast(Any, model.language).model.model.layers[0].self_attn.state_dict()
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(5, 64))
    angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(8) / 8)
    neighbours = fields["general.architecture"] == "llama"  # else half a head apart

    def turned(weight: Any, bias: Any, heads: int, *, pairs: bool) -> np.ndarray[Any, Any]:
        x = rows @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
        x = x.reshape(5, heads, 16)
        left, right = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :8], x[..., 8:])
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([left * cos - right * sin, left * sin + right * cos], -1)

    products = []
    for of, pairs in ((tensors, neighbours), (None, False)):
        found = []
        for name, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
            table: Mapping[str, Any] = of or {}
            weight = table.get(f"blk.0.{name}.weight", state[f"{ours}.weight"])
            bias = table.get(f"blk.0.{name}.bias", state.get(f"{ours}.bias", np.zeros(1)))
            found.append(turned(weight, bias, heads, pairs=pairs))
        query, key = found[0], np.repeat(found[1], 2, axis=1)
        products.append(np.einsum("qhij,khij->hqk", query, key))
    np.testing.assert_allclose(products[0], products[1], atol=1e-9)


def test_the_vision_encoder_is_described_as_llama_cpp_reads_it(
    written: tuple[LlavaModel, Path],
) -> None:
    model, folder = written
    fields, tensors = read(folder / "mmproj-f32.gguf")
    encoder: Any = model.vision
    assert fields["general.architecture"] == "clip"
    assert fields["clip.projector_type"] == "mlp"
    assert fields["clip.has_vision_encoder"] is True
    assert fields["clip.vision.image_size"] == 32
    assert fields["clip.vision.patch_size"] == 8
    assert fields["clip.vision.projection_dim"] == 64
    assert fields["clip.vision.block_count"] == encoder.depth == 2  # of three, as `layer = -2` has
    assert fields["clip.vision.feature_layer"] == [2]
    assert list(fields["clip.vision.image_mean"]) == pytest.approx(list(encoder.square.mean))
    act = encoder.model.config.hidden_act
    assert fields.get("clip.use_gelu", False) is (act != "quick_gelu")
    blocks = {name.split(".")[2] for name in tensors if name.startswith("v.blk.")}
    assert blocks == {"0", "1"}
    assert not any("post_ln" in name or "head" in name for name in tensors)
    assert ("v.class_embd" in tensors) == (encoder.name == "clip")
    assert tensors["v.patch_embd.weight"].shape == (32, 3, 8, 8)


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_the_projector_is_the_models_for_either_gelu(
    written: tuple[LlavaModel, Path], form: str
) -> None:
    """A linear one for any GELU, exactly; an MLP for the one that it was trained with."""
    model, folder = written
    if form == "tanh" and model.connector.name == "mlp":
        return  # llama.cpp's own GELU is this one: answers differ by less than float16 does
    _, tensors = read(folder / "mmproj-f32.gguf")
    features = np.random.default_rng(0).normal(size=(7, model.vision.width))
    table = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    inner = torch.from_numpy(features @ table["mm.0.weight"].T + table["mm.0.bias"])
    approximate = "none" if form == "erf" else "tanh"
    hidden = torch.nn.functional.gelu(inner, approximate=approximate).numpy()
    found = hidden @ table["mm.2.weight"].T + table["mm.2.bias"]
    with torch.no_grad():
        expected = model.connector.double()(torch.from_numpy(features)[None])[0].numpy()
        model.connector.float()
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(("kind", "error"), [("f32", 0.0), ("f16", 2e-3), ("q8_0", 2e-2)])
def test_every_tensor_is_checked_and_its_error_told(
    kind: str, error: float, tmp_path: Path
) -> None:
    model = make_model("clip", "linear", "llama", tmp_path / "language")
    figures = export(model, tmp_path / "out", type=kind, vision_type=kind)
    assert figures["tensors"] > 50
    assert 0 <= figures[f"largest_error_{kind}"] <= error
    assert figures["largest_error_f32"] == 0  # vectors, and what is added to them
    reader = gguf.GGUFReader(str(tmp_path / "out" / f"model-{kind}.gguf"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"
    vision = gguf.GGUFReader(str(tmp_path / "out" / f"mmproj-{kind}.gguf"))
    types = {tensor.name: tensor.tensor_type.name for tensor in vision.tensors}
    assert types["v.patch_embd.weight"] == {"q8_0": "F16"}.get(kind, kind.upper())
    assert types["v.position_embd.weight"] == "F32"


def test_the_tokenizer_and_the_chat_template_are_the_models(
    written: tuple[LlavaModel, Path],
) -> None:
    import jinja2

    model, folder = written
    fields, _ = read(folder / "model-f32.gguf")
    tokenizer = model.language.tokenizer
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert tokens[:259] == tokenizer.convert_ids_to_tokens(list(range(259)))
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[1], kinds[5]) == (3, 1)  # control, normal
    if 259 not in tokenizer.get_vocab().values():
        assert (tokens[259], kinds[259]) == ("[PAD259]", 5)  # a row without a token: unused
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is True
    template = jinja2.Environment().from_string(fields["tokenizer.chat_template"])
    said = [{"role": "user", "content": "What is it?"}]
    text = template.render(messages=said, add_generation_prompt=True)
    segments = model.template.segments((Turn("human", "What is it?"),), tokenizer)
    assert text == "".join(segment.text for segment in segments)


def speaking(tokenizer: Any, ends: frozenset[int] = frozenset({2})) -> Any:
    """Return what a vocabulary is written of."""
    return SimpleNamespace(tokenizer=tokenizer, end_ids=ends)


def vocabulary(
    tokenizer: Any, folder: Path, rows: int, ends: frozenset[int] = frozenset({2})
) -> dict[str, Any]:
    """Return what is written of a tokenizer."""
    writer = gguf.GGUFWriter(str(folder / "t.gguf"), "llama")
    write_vocabulary(writer, speaking(tokenizer, ends), rows, adds_bos=True)
    values = {key: value.value for table in writer.kv_data for key, value in table.items()}
    return {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}


def test_llamas_own_tokenizer_keeps_pieces_and_scores(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    from llavakit_plugins.huggingface.tokenizer_writing import remember_origin
    from llavakit_plugins.huggingface.tokenizers import find_tokenizer

    model = SentencePieceProcessor(str(published.llama()))
    tokenizer = find_tokenizer(str(published.llama()))
    files = {"tokenizer.model": published.llama()}
    remember_origin(tokenizer, files.get)  # as a language model does with what it reads
    count = model.vocab_size()
    values = vocabulary(tokenizer, tmp_path, count + 64)
    assert values["model"] == "llama"
    assert values["tokens"][3:count] == [model.IdToPiece(i) for i in range(3, count)]
    assert values["scores"][3:count] == [model.GetScore(i) for i in range(3, count)]
    kinds = values["token_type"]
    assert [kinds[i] for i in (1, 3, 300)] == [3, 6, 1]  # control, byte, normal
    assert kinds[-1] == 5


def test_without_its_file_llamas_tokenizer_has_scores_that_merge_the_same(tmp_path: Path) -> None:
    """Merged by llama.cpp's rule, the best score first, a text has the tokenizer's own ids."""
    from llavakit_plugins.huggingface.tokenizers import find_tokenizer

    tokenizer = find_tokenizer(str(published.llama()))
    values = vocabulary(tokenizer, tmp_path, len(tokenizer))
    scores = dict(zip(values["tokens"], values["scores"], strict=True))
    for text in ("The picture shows two dogs.", "Which colour is it, then?", "unbelievable 1984"):
        parts = list("\u2581" + text.replace(" ", "\u2581"))
        while True:
            pairs = [a + b for a, b in pairwise(parts)]
            known = [(scores[pair], -n) for n, pair in enumerate(pairs) if pair in scores]
            if not known:
                break
            place = -max(known)[1]
            parts[place : place + 2] = [pairs[place]]
        assert parts == tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:]


def byte_level(cutter: Any, normalizer: Any = None) -> Any:
    """Return a byte-level tokenizer with merges, which cuts texts as asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = cutter, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["a cat and a dog, 12 of them"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def cutters() -> dict[str, Any]:
    from tokenizers import Regex, normalizers, pre_tokenizers as cut

    def after(first: Any, **own: Any) -> Any:
        return cut.Sequence([first, cut.ByteLevel(add_prefix_space=False, **own)])

    qwen2 = cut.Split(
        Regex(next(regex for regex, name in vocabulary_rules.items() if name == "qwen2")),
        "isolated",
    )
    plain = cut.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": (plain,),
        "smollm": (after(cut.Digits(individual_digits=True)),),
        "qwen2": (after(qwen2, use_regex=False), normalizers.NFC()),
        "digits together": (after(cut.Digits(individual_digits=False)),),
        "split twice": (after(qwen2, use_regex=True),),
        "prefix": (cut.ByteLevel(add_prefix_space=True),),
        "lower": (plain, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2"])
def test_how_bytes_are_cut_has_llama_cpp_s_name(name: str, tmp_path: Path) -> None:
    values = vocabulary(byte_level(*cutters()[name]), tmp_path, 310)
    assert (values["model"], values["pre"]) == ("gpt2", name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("digits together", "no name for the way in which this tokenizer splits text"),
        ("split twice", "no name for the way in which this tokenizer splits text"),
        ("prefix", r"puts a space in front of a text before it merges bytes \(`add_prefix_space`"),
        ("lower", "nothing like NFKC, Lowercase of this tokenizer to a text before it merges"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        check_tokenizer(byte_level(*cutters()[name]))


def llamas(**settings: Any) -> Any:
    """Return LLaMA's tokenizer with settings of its own, as transformers' class has it."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        shutil.copy(published.llama(), Path(folder) / "tokenizer.model")
        stated = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(stated))
        return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "space", "said"),
    [
        ({"legacy": True}, True, []),
        ({"legacy": False}, True, ["llama.cpp puts a space in front of texts behind special"]),
        ({"legacy": False, "add_prefix_space": False}, False, []),
    ],
)
def test_the_space_in_front_is_the_tokenizer_s(
    settings: dict[str, bool], space: bool, said: list[str], tmp_path: Path
) -> None:
    tokenizer = llamas(**settings)
    assert vocabulary(tokenizer, tmp_path, len(tokenizer))["add_space_prefix"] is space
    found = list(remarks(speaking(tokenizer)))
    assert [sentence[: len(words)] for words, sentence in zip(said, found, strict=True)] == said


def test_letters_that_are_changed_before_pieces_are_refused() -> None:
    from tokenizers import normalizers

    tokenizer = llamas(legacy=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ModelError, match="nothing like NFKC of this tokenizer"):
        check_tokenizer(tokenizer)


def test_three_tokens_end_an_answer_and_others_are_told(tmp_path: Path) -> None:
    tokenizer = byte_level(*cutters()["gpt-2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    other = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for ends, left in (({2}, []), ({2, 7, 9}, []), ({2, 7, 9, other}, []), ({2, 7, 9, 11}, [11])):
        values = vocabulary(tokenizer, tmp_path, 310, frozenset(ends))
        places = [values.get(f"{name}_token_id") for name in ("eot", "eom")]
        assert [place for place in places if place is not None] == sorted(ends - {2})[:2]
        said = list(remarks(speaking(tokenizer, frozenset(ends))))
        names = tokenizer.convert_ids_to_tokens(left)
        assert [sentence.partition(": at ")[2].split()[0] for sentence in said] == names


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image"}, {"type": "text", "text": "What is it?"}],
        [{"type": "text", "text": "What is it?"}, {"type": "text", "text": "<__media__>"}],
        "<__media__>What is it?",
        "<__media__>\nWhat is it?",
    ],
    ids=["part", "text behind", "one text", "a line"],
)
def test_the_chat_template_knows_llama_cpp_s_image(
    content: Any, written: tuple[LlavaModel, Path]
) -> None:
    """As its programs hand messages over: with its mark for an image among the text."""
    import jinja2

    model, folder = written
    fields, _ = read(folder / "model-f32.gguf")
    template = jinja2.Environment().from_string(fields["tokenizer.chat_template"])
    text = template.render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True
    )
    turns = (Turn("human", "<image>\nWhat is it?"),)
    shown = "".join(s.text for s in model.template.segments(turns, model.language.tokenizer))
    assert text == shown.replace("<image>", "<__media__>")


# -- what has no place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"of_connector": {"use": "pool", "grid": 2}}, "connector `pool` is not written as GGUF"),
        ({"of_connector": {"use": "mlp", "depth": 3}}, "`mlp` of depth 3 is not written"),
        ({"of_vision": {"select": "cls_patch"}}, "llama.cpp drops the class token"),
        ({"of_vision": {"layer": 0}}, "runs one layer of the vision encoder at least"),
        ({"tiling": {"use": "grid"}}, "tiling `grid` is not written as GGUF"),
        ({"tokenizer": "words"}, "tokenizer of the kind WordLevel is not written"),
    ],
)
def test_what_has_no_place_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    given = dict(changes)
    if given.pop("tokenizer", None):
        given["tokenizer"] = make_tokenizer()
    model = make_model("clip", "linear", "llama", tmp_path / "language", **given)
    with pytest.raises(ModelError, match=sentence):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "gpt_neox"}, "only LLaMA's and Qwen2's architecture"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "positions of type `yarn`"),
        ({"use_sliding_window": True}, "a sliding window"),
        ({"hidden_act": "gelu"}, "activation `silu` alone"),
    ],
)
def test_other_language_models_are_refused_before_training(
    config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = make_model("clip", "linear", "llama", tmp_path / "language")
    own = cast(Any, model.language).model.config
    for name, value in config.items():
        setattr(own, name, value) if name != "model_type" else setattr(type(own), name, value)
    try:
        with pytest.raises(ModelError, match=sentence):
            Gguf(GgufOptions()).check(model)
    finally:
        type(own).model_type = "llama"


def test_a_tokenizer_without_a_place_is_refused_before_training(
    write_recipe: RecipeWriter, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = write_recipe()
    export = '\n[[steps]]\nuse = "export"\nformat = { use = "gguf" }\n'
    path.write_text(path.read_text() + export)
    for more in (("--plan",), ("--out", tmp_path / "run")):
        said = refused(path, *more, "--set", "model.vision.aspect=pad")
        assert "a tokenizer of the kind WordLevel is not written as GGUF" in said
    assert not (tmp_path / "run").exists()


def test_the_command_writes_both_files(
    llava_run: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    model = make_model("siglip", "mlp", "llama", tmp_path / "language")
    save_model(model, tmp_path / "model")
    options = ["--format", "gguf", "--set", "type=q8_0"]
    code, out, _ = llava_run("export", tmp_path / "model", tmp_path / "out", *options)
    assert code == 0
    assert "largest_error_q8_0: " in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model-q8_0.gguf", "mmproj-f16.gguf"}
    said = refused(
        "export", tmp_path / "model", tmp_path / "x", "--format", "gguf", "--set", "type=q3"
    )
    assert "option `type` of `gguf`" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"aspect": "pad"}, []),
        ({"aspect": "crop"}, ['`vision.aspect = "crop"`: give llama.cpp images cut to the square']),
        ({"aspect": "squash"}, ['`vision.aspect = "squash"`: give llama.cpp images stretched']),
        ({"aspect": "pad", "fast": True}, ["`vision.fast = true`"]),
    ],
)
def test_pixels_other_than_those_learned_from_are_said(
    options: dict[str, Any], said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By what a model folder remembers, and not by what it was opened with."""
    model = make_model("clip", "linear", "llama", tmp_path / "language", of_vision=options)
    save_model(model, tmp_path / "model")
    opened = {
        "aspect": "crop" if options["aspect"] != "crop" else "squash",
        "fast": not options.get("fast", False),
    }
    with pytest.warns(UserWarning, match="is given them with"):
        model = llavakit.load(tmp_path / "model", device="cpu", options={"vision": opened})
    caplog.clear()
    export(model, tmp_path / "out")
    messages = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert len(messages) == len(said)
    assert all(words in message for words, message in zip(said, messages, strict=True))
