"""Prompt templates as Jinja: what a client renders and reads is what the model was tuned on."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import published
from tests.conftest import make_tokenizer

from llavakit import ModelError, PromptTemplate, Registry, Turn, read_messages
from llavakit.contracts.component import Use
from llavakit.contracts.data import IMAGE, Sample
from llavakit.stream.encode import IMAGE_ID, encode, tokenise

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llavakit_plugins.checkpoints.chat_writing import chat_template, find_format
from llavakit_plugins.checkpoints.prompt_format import PromptFormat
from llavakit_plugins.huggingface.hub import load_tokenizer
from llavakit_plugins.onnx.exporter.client import agreeing_template, client_tokenizer, render

NAMES = [
    "vicuna_v1", "llava_v1", "v1_mmtag", "llava_v0", "v0", "v0_mmtag", "llama_2", "llava_llama_2",
    "mistral_instruct", "mpt", "chatml", "plain",
]  # fmt: skip
LLAMA = published.llama()


def _template(name: str, **options: Any) -> PromptTemplate:
    return Registry.installed().build(Use[PromptTemplate](use=name, **options))


def _text(template: PromptTemplate, tokenizer: Any, *turns: str) -> str:
    roles = ("human", "gpt")
    parts = [Turn(roles[n % 2], text) for n, text in enumerate(turns)]  # type: ignore[arg-type]
    return "".join(segment.text for segment in template.segments(parts, tokenizer))


def _chat(*turns: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)]


@pytest.mark.parametrize("name", NAMES)
def test_a_client_renders_what_the_template_renders(name: str) -> None:
    template, tokenizer = _template(name), make_tokenizer()
    jinja = agreeing_template(template, tokenizer, find_format(template, tokenizer))
    question = "What is it?\nSay why."
    expected = _text(template, tokenizer, f"{IMAGE}\n{question}")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    assert render(jinja, _chat(content)) == expected
    assert render(jinja, _chat(f"{question}\n{IMAGE}")) == expected
    two = [{"type": "text", "text": question}, {"type": "image"}, {"type": "image"}]
    assert render(jinja, _chat(two)) == _text(template, tokenizer, f"{IMAGE}\n{IMAGE}\n{question}")
    if name != "plain":
        assert render(jinja, _chat(question)) == _text(template, tokenizer, question)
        later = (f"{IMAGE}\n{question}", "It is red.", "And now?")
        assert render(jinja, _chat(*later)) == _text(template, tokenizer, *later)
    with pytest.raises(ModelError, match="system text"):
        render(jinja, [{"role": "system", "content": "x"}, *_chat(question)])


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_without_the_template_reads_the_same_dialogues(name: str) -> None:
    template, tokenizer = _template(name), make_tokenizer()
    form = PromptFormat.model_validate_json(find_format(template, tokenizer).model_dump_json())
    texts = (f"{IMAGE}\nwhat is it ?", " a <s> circle . ", f"a {IMAGE} red </s> ?", "a", " is it ?")
    turns = tuple(Turn(("human", "gpt")[n % 2], text) for n, text in enumerate(texts))
    for count, system in product((1, 3, 5) if name != "plain" else (1,), (None, "", "a </s> red")):
        images = (Path("x"),) * sum(text.count(IMAGE) for text in texts[:count])
        sample = Sample("x", turns[:count], images, system=system)
        expected = encode(sample, template, tokenizer)
        ids, _ = tokenise(list(form.pieces(turns[:count], system)), tokenizer, begin=False)
        begin = list(form.beginning) if form.adds_bos else []
        assert [*begin, *ids.tolist()] == expected.ids.tolist()
    if name == "plain":
        with pytest.raises(ModelError, match=r"does not say how .* `plain` writes earlier turns"):
            list(form.pieces(turns))
    if name == "vicuna_v1":  # as folders of earlier exports have it
        with pytest.raises(ModelError, match="writes a system text; export the model again"):
            list(form.model_copy(update={"system": None}).pieces(turns, "a"))


@pytest.mark.parametrize("name", NAMES)
def test_a_runtime_without_the_template_reads_the_same(name: str) -> None:
    template, tokenizer = _template(name), make_tokenizer()
    found = find_format(template, tokenizer)
    form = PromptFormat.model_validate_json(found.model_dump_json())
    for text in (f"{IMAGE}\nwhat is it ?", f"a {IMAGE} red <s> {IMAGE} </s> square", IMAGE):
        images = (Path("x"),) * text.count(IMAGE)
        expected = encode(Sample("x", (Turn("human", text),), images), template, tokenizer)
        pieces = list(form.pieces([Turn("human", text)]))
        ids, _ = tokenise(pieces, tokenizer, begin=False)
        begin = list(form.beginning) if form.adds_bos else []
        assert [*begin, *ids.tolist()] == expected.ids.tolist()


def test_a_tokenizers_own_chat_template_writes_its_beginning_once() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] | trim }} "
        "{{ eos_token }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    template = _template("chat-template")
    form = find_format(template, tokenizer)
    assert form.trims
    assert form.beginning == (1,)
    jinja = agreeing_template(template, tokenizer, form)
    backend, image_token = client_tokenizer(tokenizer, form)
    sample = Sample("x", (Turn("human", f"{IMAGE}\nwhat is it ?"),), (Path("x"),))
    ids = encode(sample, template, tokenizer).ids
    expected = np.where(ids == IMAGE_ID, image_token, ids).tolist()
    content = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
    assert backend.encode(render(jinja, _chat(content))).ids == expected
    assert expected.count(1) == 1


def test_the_system_text_and_the_stop_texts_are_the_models_own() -> None:
    tokenizer = make_tokenizer()
    form = find_format(_template("llava_v0", system="Be brief."), tokenizer)
    assert form.head.startswith("Be brief.###Human: ")
    assert form.stops == ("###",)


PICTURE, FILM = {"type": "image"}, {"type": "video"}


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "mpt", "chat-template"])
@pytest.mark.parametrize("placement", ["keep", "front"])
@pytest.mark.parametrize("content", [
    f"a {IMAGE} b", f" a\n{IMAGE} ", ["a", PICTURE, "b"], [PICTURE, " two"], [PICTURE, "two "],
    [PICTURE, "a\n"], ["a ", PICTURE], [" a ", PICTURE, PICTURE, f"b {IMAGE} c"],
    [PICTURE, "", "a"], [" a ", " b "], [PICTURE],
])  # fmt: skip
def test_a_list_of_parts_is_written_as_it_is_read(
    name: str, placement: str, content: str | list[Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] | trim }} {{ eos_token }} "
        "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    template = _template(name, image_placement=placement)
    form = find_format(template, tokenizer)
    assert form.placement == placement
    if isinstance(content, list):
        content = [{"type": "text", "text": x} if isinstance(x, str) else x for x in content]
    messages = [{"role": "user", "content": content}]
    (turn,) = read_messages(messages, [Path("x")] * str(messages).count("image")).turns
    jinja = chat_template(form, space_behind_image=False)
    assert render(jinja, messages) == _text(template, tokenizer, turn.text)


@pytest.mark.parametrize(("placement", "expected"), [
    ("front", "<video>\n<image>\na\n\nb"), ("keep", "a\n<video>\nb\n<image>"),
])  # fmt: skip
def test_videos_have_their_own_mark(placement: str, expected: str) -> None:
    template, tokenizer = _template("vicuna_v1", image_placement=placement), make_tokenizer()
    form = find_format(template, tokenizer)
    jinja = chat_template(form, space_behind_image=False, videos=True)
    parts = [{"type": "text", "text": "a"}, FILM, {"type": "text", "text": "b"}, PICTURE]
    assert expected in render(jinja, _chat(parts))


def test_a_template_that_draws_the_place_of_images_is_refused() -> None:
    template = _template("vicuna_v1", image_placement="random", seed=1)
    with pytest.raises(ModelError, match='image_placement = "front"'):
        find_format(template, make_tokenizer())


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LLaMA's tokenizer; the two put spaces behind special tokens, or not."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "llava_v0", "v1_mmtag"])
def test_llamas_tokenizer_reads_as_the_model_does(name: str, llama: Any) -> None:
    """Behind an image LLaVA begins a text anew, and LLaMA's tokenizer puts a space there."""
    template = _template(name)
    form = find_format(template, llama)
    jinja = agreeing_template(template, llama, form)
    backend, image_token = client_tokenizer(llama, form)
    for text in ("What is in the picture?", "Wie heißt das? 日本", "a  b\n\nc"):
        sample = Sample("x", (Turn("human", f"{IMAGE}\n{text}"),), (Path("x"),))
        ids = encode(sample, template, llama).ids
        expected = np.where(ids == IMAGE_ID, image_token, ids).tolist()
        content = [{"type": "image"}, {"type": "text", "text": text}]
        assert backend.encode(render(jinja, _chat(content))).ids == expected
