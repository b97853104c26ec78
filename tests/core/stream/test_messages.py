"""Messages: read once, and rendered for an answer as training renders them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from tests import published
from tests.core.peer import make_pair
from tests.plugins.families import qwen_tokenizer

from llavakit import (
    DataError,
    LlavaError,
    LlavaModel,
    ModelError,
    PromptTemplate,
    Registry,
    Sample,
    Token,
    Turn,
    Video,
    read_asked,
    read_messages,
)
from llavakit.contracts.component import Use
from llavakit.contracts.data import IMAGE
from llavakit.stream.encode import IMAGE_ID, encode
from llavakit_plugins.huggingface.hub import load_tokenizer

PICTURE = Image.new("RGB", (40, 30), "red")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def image(source: Any = PICTURE) -> dict[str, Any]:
    return {"type": "image", "image": source}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


SYSTEM = {"role": "system", "content": "Be brief. </s> is a word."}
DIALOGUE = [
    user([image(), text("What is it ?")]),
    assistant("It is red ."),
    user("Which shape ?"),
    assistant("A square .\nOr not ."),
    user([text("And this ?"), image()]),
]
ANSWER = Turn("gpt", "A circle .")


@pytest.fixture(scope="module", params=["llama", "qwen"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "qwen":
        found = qwen_tokenizer()
    else:
        folder = tmp_path_factory.mktemp("llama")
        shutil.copy(published.llama(), folder / "tokenizer.model")
        config = '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'
        (folder / "tokenizer_config.json").write_text(config)
        found = load_tokenizer(str(folder))
    found.chat_template = (
        "{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
        "{% endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    return found


def templates() -> list[tuple[str, dict[str, Any]]]:
    names = sorted(Registry.installed().all(PromptTemplate))
    of_v0 = {"v0", "default", "llava_v0", "v0_mmtag"}
    layouts: list[dict[str, Any]] = [{"layout": "compact"}, {"layout": "lines"}]
    return [(name, o) for name in names for o in (layouts if name in of_v0 else [{}])]


@pytest.mark.parametrize("system", [None, SYSTEM, {**SYSTEM, "content": ""}], ids=str)
@pytest.mark.parametrize(("name", "options"), templates())
def test_a_dialogue_is_read_as_it_is_trained_on(
    name: str, options: dict[str, Any], system: dict[str, Any] | None, tokenizer: Any
) -> None:
    """Up to the last answer, in every template; the original's v0 asks otherwise than it trains,
    unless its option `layout` says how."""
    template = Registry.installed().build(Use[PromptTemplate](use=name, **options))
    messages: Any = DIALOGUE[:1] if name in ("plain", "v0_plain") else DIALOGUE
    dialogue = read_asked([system, *messages] if system else messages)
    assert (dialogue.system is None) == (system is None)
    trained = Sample("s", (*dialogue.turns, ANSWER), dialogue.images, system=dialogue.system)
    asked, whole = (encode(one, template, tokenizer) for one in (dialogue, trained))
    count = len(asked.ids)
    assert whole.ids[:count].tolist() == asked.ids.tolist()
    assert whole.supervised[count:].any()
    assert not whole.supervised[count - 1] or options == {"layout": "lines"}  # it learns its roles
    shown = tokenizer.decode([i for i in asked.ids if i != IMAGE_ID])
    if system and system["content"] and name not in ("plain", "v0_plain"):
        assert SYSTEM["content"] in shown
        other = replace(dialogue, system="Be brief.")
        for end in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</s>")):  # no markup
            count = encode(other, template, tokenizer).ids.tolist().count(end)
            assert asked.ids.tolist().count(end) == count


def test_a_dialogue_has_the_ids_of_apply_chat_template(tokenizer: Any) -> None:
    template = Registry.installed().build(Use[PromptTemplate](use="chat-template"))
    messages = [
        SYSTEM | {"content": "Be brief."},
        user("What ?"),
        assistant("This ."),
        user("So ?"),
    ]
    for begun in (messages, messages[1:], messages[:2]):
        expected = tokenizer.apply_chat_template(
            begun, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert encode(read_asked(begun), template, tokenizer).ids.tolist() == expected


def test_every_way_to_write_an_image_is_read() -> None:
    given = ["p", "u", "data:image;base64,AA", "o", PICTURE, "next", "last"]
    parts = [
        {"type": "image", "path": "p"},
        {"type": "image", "url": "u"},
        {"type": "image", "base64": "AA"},
        {"type": "image_url", "image_url": {"url": "o", "detail": "low"}},
        image(),
        {"type": "image"},
        text(f"Look at {IMAGE}."),
    ]
    sample = read_messages([user(parts)], ["next", "last"])
    assert sample.images == tuple(given)
    assert sample.turns == (Turn("human", f"{IMAGE}\n" * 6 + f"Look at {IMAGE}."),)
    seen: list[Any] = []

    def look(one: Any) -> Any:
        seen.append(one)
        return one

    read_messages([user(parts)], ["next", "last"], source=look)
    assert seen == given[:5]  # what is given beside needs no leave
    developer = {"role": "developer", "content": [text("Be"), text("brief")]}
    assert read_messages((developer, user("Hi"))).system == "Be\nbrief"


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "no list"),
        ({"role": "user", "content": "Hello"}, "no list"),
        ([3], "message 1 is from 3, expected `user`"),
        ([user(None)], "message 1 has a part that is no text.*: None"),
        ([{"role": "tool", "content": "x"}], "message 1 is from 'tool', expected `user`"),
        ([{"role": "\x1b[2J", "content": "x"}], r"from '\\x1b\[2J'"),
        ([assistant("Hi")], "message 1 is from 'assistant', expected `user`"),
        ([user("a"), user("b")], "message 2 is from 'user', expected `assistant`"),
        ([SYSTEM, SYSTEM], "message 2 is from 'system', expected `user`"),
        ([user("a"), SYSTEM], "message 2 is from 'system', expected `assistant`"),
        ([user([{"type": "audio"}])], "a part that is no text, and no image"),
        ([user(["a"])], "a part that is no text, and no image"),
        ([user([{"type": np.zeros(2)}])], "a part that is no text, and no image"),
        ([user([{"type": "text", "text": 3}])], "a part that is no text"),
        ([user([{"type": "image"}])], "show more images than are given"),
        ([user(f"What is {IMAGE}?")], "show more images than are given"),
        (
            [user("a"), assistant([image()])],
            "message 2 has a part .* image or video of the user's",
        ),
        ([user("a"), assistant(f"{IMAGE}")], "an answer has `<image>`"),
        ([{"role": "system", "content": [image()]}, user("a")], "message 1 has a part"),
        ([user("half a \ud83d")], "half a character"),
        ([{"role": "system", "content": "\ud83d"}, user("a")], "half a character"),
        ([user("a"), assistant("b")], "the last message is the assistant's"),
        ([SYSTEM], "no turns"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(messages: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as raised:
        read_asked(messages)
    assert str(raised.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image", "image_url", "url"]), inner
        )
    ),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "image_url", "x"])})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "x"]),
            "content": JSON | st.lists(PARTS | JSON, max_size=3),
        }
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(messages=JSON | MESSAGES)
def test_whatever_comes_is_read_or_refused(messages: Any) -> None:
    said = ""
    try:
        roles = [turn.role for turn in read_messages(messages).turns]
    except DataError as error:
        said = str(error)
    else:
        assert roles == (["human", "gpt"] * 2)[: len(roles)]
    assert said.isprintable()


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return make_pair()[1]


def test_messages_and_the_shorthand_are_one(model: LlavaModel) -> None:
    model.template = Registry.installed().build(Use[PromptTemplate](use="vicuna_v1"))
    one = [user([image(), text("what is it ?")])]
    options: dict[str, Any] = {"max_new_tokens": 6}
    answer = model.generate("what is it ?", [PICTURE], **options)
    assert model.generate(one, **options) == answer
    assert model.generate([user(f"{IMAGE}\nwhat is it ?")], [PICTURE], **options) == answer
    assert model.generate(read_messages(one), **options) == answer
    assert "".join(model.stream(one, **options)) == answer
    ids = model.generate_ids("what is it ?", [PICTURE], **options)
    assert model.generate_ids(one, **options) == ids
    np.testing.assert_array_equal(model.logits(one), model.logits("what is it ?", [PICTURE]))
    with pytest.raises(ModelError, match="leave `raw` out"):
        model.generate(one, raw=True)
    with pytest.raises(LlavaError, match="`answers` gives several"):
        model.generate(one, n=2)


def test_history_and_system_change_an_answers_logits(model: LlavaModel) -> None:
    """As the same rows packed by training's way."""
    from llavakit import pack

    model.template = Registry.installed().build(Use[PromptTemplate](use="vicuna_v1"))
    dialogue = [SYSTEM | {"content": "a red ."}, *DIALOGUE]
    sample = read_asked(dialogue)
    batch = pack([encode(sample, model.template, model.tokenizer)], [0], model.visual_tokens)
    features = model.features(model.prepare(sample.images))  # type: ignore[arg-type]
    hidden = model.language.hidden(model.embed(batch, features), batch.packing)
    np.testing.assert_allclose(model.logits(dialogue), model.language.logits(hidden).detach())


def test_several_answers_are_those_of_their_seeds(model: LlavaModel) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "seed": 4, "max_new_tokens": 5}
    found = model.answers(DIALOGUE, n=5, logprobs=3, **options)
    assert len({one.text for one in found}) > 1
    assert found[0].text == model.generate(DIALOGUE, **options)
    for one in found:
        assert all(len(token.top) == 3 and token.logprob < 0 for token in one.tokens)  # type: ignore[operator]
        assert (one.finish == "length") == (one.tokens[-1].id not in model.end_ids)
    stop = found[0].text.split()[0]
    assert model.answers(DIALOGUE, stop=[stop], **options)[0].finish == "stop"
    logits = model.logits(DIALOGUE)[-1].double().log_softmax(-1)
    first = found[0].tokens[0]
    assert first.logprob == pytest.approx(float(logits[first.id]), abs=1e-5)


def test_a_template_without_a_place_for_a_system_text_says_so(model: LlavaModel) -> None:
    from tests.core.peer import Bare

    model.template = Bare()
    with pytest.raises(DataError, match="`bare` has no place for a system text"):
        model.generate([SYSTEM, user("a")])


def test_a_path_is_read_from_a_message(model: LlavaModel, tmp_path: Path) -> None:
    model.template = Registry.installed().build(Use[PromptTemplate](use="vicuna_v1"))
    PICTURE.save(tmp_path / "a.png")
    by_path = [user([{"type": "image", "path": str(tmp_path / "a.png")}, text("what ?")])]
    expected = model.generate("what ?", [PICTURE], max_new_tokens=4)
    assert model.generate(by_path, max_new_tokens=4) == expected


@pytest.mark.parametrize("images", [None, "cat.jpg", b"", PICTURE, {}])
@pytest.mark.parametrize("raw", [False, True])
def test_images_are_a_list(model: LlavaModel, images: Any, raw: bool) -> None:
    with pytest.raises(ModelError, match="`images` is a list of images, got "):
        model.generate("a", images, raw=raw)


def test_an_answer_that_a_newline_ends_was_not_cut(model: LlavaModel) -> None:
    words: Any = model.tokenizer
    ids: list[int] = [words.convert_tokens_to_ids(word) for word in ("a", "red")]
    decoded = {(*ids,): "a red\n"}
    original = words.decode
    words.decode = lambda found, **options: decoded.get(tuple(found)) or original(found, **options)
    try:
        tokens = [Token(number) for number in ids]
        found = model._answer(tokens, ("\n",))
        assert (found.text, found.finish) == ("a red", "stop")
        assert model._answer(tokens, ("x",)).finish == "length"
    finally:
        del words.decode


def test_what_a_video_names_is_asked_of_who_decides() -> None:
    """A service that gives `source` alone has it called for videos, too."""
    named: list[object] = []

    def source(what: Any) -> Any:
        named.append(what)
        return b"x"

    part = {"type": "video", "path": "/etc/passwd"}
    sample = read_messages(
        [user([part, {"type": "video_url", "video_url": {"url": "u"}}])], source=source
    )
    assert named == ["/etc/passwd", "u"]
    assert sample.images == (Video(b"x"), Video(b"x"))
    own = read_messages([user([part])], source=source, video=lambda what: Video(f"{what}!"))
    assert own.images == (Video("/etc/passwd!"),)
    assert len(named) == 2
