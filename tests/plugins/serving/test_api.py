"""The server as OpenAI's clients use it: answers are those of `generate`, in OpenAI's form."""

from __future__ import annotations

import json
import threading
from base64 import b64encode, encodebytes
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from tests.conftest import VISION, make_tokenizer
from tests.plugins.serving.conftest import (
    LIVELY,
    Running,
    asks,
    data_url,
    picture,
    request,
    serving,
)

from llavakit import LlavaModel, ModelRecipe, Registry
from llavakit.model.folder import create_model
from llavakit_plugins.heatmaps.attention_maps import map_answer
from llavakit_plugins.heatmaps.drawing import seen_region

openai = pytest.importorskip("openai")

QUESTION = "what colour is the picture ?"
DIALOGUE = [
    {"role": "system", "content": "a red circle is in the picture ."},
    *asks(QUESTION, picture(1)),
    {"role": "assistant", "content": "it is red ."},
    {"role": "user", "content": "what shape is it ?"},
]
SAMPLED = {"temperature": 0.9, "top_p": 0.8, "seed": 11}
REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"messages": asks(QUESTION), "max_tokens": 20},
    "image": {"messages": asks(QUESTION, picture(2)), "max_tokens": 20},
    "two images": {"messages": asks(QUESTION, picture(3), picture(4)), "max_tokens": 12},
    "dialogue": {"messages": DIALOGUE, "max_completion_tokens": 20},
    "sampled": {"messages": asks(QUESTION, picture(2)), "max_tokens": 20, **SAMPLED},
    "penalties": {"messages": asks(QUESTION), "max_tokens": 20, "frequency_penalty": 1.5,
                  "presence_penalty": 0.5, **SAMPLED},
    "stop": {"messages": asks(QUESTION, picture(5)), "max_tokens": 40, "stop": ["circle", "?"]},
    "top k": {"messages": asks("what is it ?"), "max_tokens": 16, "temperature": 1.3, "seed": 3,
              "extra_body": {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2}},
}  # fmt: skip


def expected(model: LlavaModel, asked: dict[str, Any]) -> Any:
    """Return what `answers` gives for a request."""
    options = {**asked, **asked.get("extra_body", {})}
    messages = options.pop("messages")
    options.pop("extra_body", None)
    tokens = options.pop("max_tokens", None) or options.pop("max_completion_tokens")
    return model.answers(messages, max_new_tokens=tokens, **options)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_answers_equal_generates(running: Running, name: str, stream: bool) -> None:
    asked = REQUESTS[name]
    (answer,) = expected(running.model, asked)
    client = running.client()
    if stream:
        chunks = list(client.chat.completions.create(model="small", stream=True, **asked))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk.id for chunk in chunks}) == 1
        finish = chunks[-1].choices[0].finish_reason
        assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    else:
        found = client.chat.completions.create(model="small", **asked)
        text, finish = found.choices[0].message.content, found.choices[0].finish_reason
        assert found.object == "chat.completion"
        assert found.choices[0].message.role == "assistant"
        assert found.usage.completion_tokens == len(answer.tokens)
    assert text == answer.text
    assert finish == answer.finish


def test_everyone_at_once_gets_the_same_as_alone(lively: LlavaModel) -> None:
    asked = [REQUESTS[name] for name in REQUESTS] * 4
    alone = [expected(lively, one)[0].text for one in asked]
    with serving(lively, places=5, chunk=24) as server:
        client = server.client()

        def ask(one: dict[str, Any]) -> str:
            found = client.chat.completions.create(model="small", **one)
            return str(found.choices[0].message.content)

        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(ask, asked)) == alone


def test_several_choices(running: Running) -> None:
    asked = {"messages": asks(QUESTION, picture(2)), "max_tokens": 12, "n": 3, **SAMPLED}
    texts = [answer.text for answer in expected(running.model, asked)]
    assert len(set(texts)) > 1
    client = running.client()
    found = client.chat.completions.create(model="small", **asked)
    assert [choice.message.content for choice in found.choices] == texts
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    ends: list[int] = []
    for chunk in client.chat.completions.create(model="small", stream=True, **asked):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        ends += [choice.index] * (choice.finish_reason is not None)
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]


def test_logprobs_are_those_of_the_logits(running: Running) -> None:
    model, messages = running.model, asks(QUESTION, picture(2))
    found = running.client().chat.completions.create(
        model="small", messages=messages, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    logs = model.logits(messages).log_softmax(-1)[-1]
    best = logs.topk(3)
    first = content[0]
    assert first.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(
        best.values.tolist(), abs=1e-4
    )
    assert first.token == first.top_logprobs[0].token
    assert bytes(first.bytes).decode() == first.token
    assert len(content) == found.usage.completion_tokens
    streamed = list(
        running.client().chat.completions.create(
            model="small",
            messages=messages,
            max_tokens=6,
            logprobs=True,
            top_logprobs=3,
            stream=True,
        )
    )
    told = [one for chunk in streamed if chunk.choices[0].logprobs
            for one in chunk.choices[0].logprobs.content]  # fmt: skip
    assert [one.logprob for one in told] == [one.logprob for one in content]


def test_usage(running: Running) -> None:
    asked = REQUESTS["image"]
    client, model = running.client(), running.model
    usage = client.chat.completions.create(model="small", **asked).usage
    encoded = model.prompt(asked["messages"], ())
    assert usage.prompt_tokens == encoded.length(model.visual_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(model="small", **asked, **options)
    assert last.choices == []
    assert last.usage.model_dump() == usage.model_dump()
    assert all(chunk.usage is None for chunk in chunks)


def test_models_health_and_metrics(running: Running) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "llavakit"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    assert json.loads(running.send("/health")[2])["status"] == "ok"
    client.chat.completions.create(model="small", **REQUESTS["image"])
    status, headers, text = running.send("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = text.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values["llavakit_generation_tokens_total"]) >= 1
    assert int(values["llavakit_images_total"]) >= 1
    count = int(values["llavakit_request_seconds_count"])
    assert int(values['llavakit_request_seconds_bucket{le="+Inf"}']) == count >= 1


def test_errors_are_openais(running: Running) -> None:
    client = running.client()
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="large", messages=asks(QUESTION))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="small", messages=asks(QUESTION), temperature=-1)
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as mixed:
        create(model="small", messages=asks(QUESTION), stop=["red", 1])
    assert mixed.value.param == "stop"
    assert "`stop`: " in mixed.value.message
    with pytest.raises(openai.BadRequestError) as long:
        create(model="small", messages=asks("what is it ? " * 200))
    assert long.value.code == "context_length_exceeded"
    tool = {"type": "function", "function": {"name": "x", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="`tools`"):
        create(model="small", messages=asks(QUESTION), tools=[tool])
    with pytest.raises(openai.BadRequestError, match="colour"):
        create(model="small", messages=asks(QUESTION), extra_body={"colour": 1})
    with pytest.raises(openai.BadRequestError, match="`n` is at most"):
        create(model="small", messages=asks(QUESTION), n=100)
    assert running.send("/v1/nothing")[0] == 404
    assert running.send("/v1/chat/completions")[0] == 405


def part(kind: str = "text", **fields: Any) -> dict[str, Any]:
    return {"type": kind, **({"text": QUESTION} if kind == "text" else {}), **fields}


def shows(**fields: Any) -> dict[str, Any]:
    return part("image_url", **{"image_url": PIXELS, **fields})


def says(*parts: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts) or QUESTION, **fields}]


PIXELS = {"url": data_url(picture(1))}
CALL = {"id": "x", "type": "function", "function": {"name": "x", "arguments": "{}"}}
CALLED = [*says(), {"role": "assistant", "content": "it is red .", "tool_calls": [CALL]}, *says()]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (says(foo=1), "[0].foo"),
        (says(foo=False), "[0].foo"),
        (CALLED, "[1].tool_calls"),
        (says(part(foo=1)), "[0].content[0].foo"),
        (says(part(image_url=PIXELS)), "[0].content[0].image_url"),
        (says(part(), shows(text="?")), "[0].content[1].text"),
        (says(shows(url=PIXELS["url"])), "[0].content[0].url"),
        (says(shows(image_url={**PIXELS, "crop": [0, 1]})), "[0].content[0].image_url.crop"),
        (says(part("video_url", video_url={"fps": 2})), "[0].content[0].video_url.fps"),
    ],
)
def test_a_field_that_is_not_known_is_refused_wherever_it_stands(
    running: Running, messages: list[dict[str, Any]], field: str
) -> None:
    for path, more in (
        ("/v1/chat/completions", {"max_tokens": 2}),
        ("/v1/heatmaps", {"answer": "it is red ."}),
    ):
        status, _, data = running.send(path, {"messages": messages, **more})
        error = json.loads(data)["error"]
        assert (status, error["param"]) == (400, f"messages{field}"), error
        assert error["message"] == f"Unrecognized request argument supplied: messages{field}"
        assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize("options", [{"include_usge": True}, {"continuous_usage_stats": True}])
def test_options_of_a_stream_are_known_or_refused(
    running: Running, options: dict[str, Any]
) -> None:
    asked = {"messages": says(), "max_tokens": 2, "stream": True}
    status, body = running.chat(**asked, stream_options=options)
    assert (status, body["error"]["param"]) == (400, f"stream_options.{next(iter(options))}")
    known = {"include_usage": True, "include_obfuscation": False, "other": None}
    status, _, data = running.send("/v1/chat/completions", {**asked, "stream_options": known})
    assert status == 200
    assert b'"usage":{"prompt_tokens"' in data


def test_what_clients_send_unasked_changes_no_answer(running: Running) -> None:
    question, image = asks(QUESTION), asks(QUESTION, picture(2))
    shown, text = image[0]["content"]
    client = running.client()

    def answer(*messages: Any) -> Any:
        found = client.chat.completions.create(model="small", max_tokens=12, messages=messages)
        return found.choices[0].message

    first = answer(*image)
    plain = {"role": "assistant", "content": first.content}
    truth = answer(*image, plain, *question).content
    shown = {**shown, "image_url": {**shown["image_url"], "detail": "high"}, "text": None}
    cache = {"cache_control": {"type": "ephemeral"}}
    asked = {"role": "user", "content": [shown, {**text, **cache}], "name": "ann", "tool_calls": []}
    names = ("refusal", "tool_calls", "audio", "function_call")
    filled = {**plain, **dict.fromkeys(names), "annotations": []}
    for replied in (first.model_dump(), filled):
        assert answer(asked, replied, {**question[0], **cache}).content == truth
    client.close()


def test_our_own_chat_model_asks_the_server(running: Running) -> None:
    from llavakit import ChatModel, Message, Use

    options = {"base_url": f"{running.url}/v1", "model": "small", "keyless": True, "max_tokens": 9}
    chat = Registry.installed().build(Use[ChatModel].model_validate({"use": "openai", **options}))
    reply = chat.complete([Message("user", QUESTION)])
    expected = running.model.generate(QUESTION, max_new_tokens=9)
    assert reply == expected


def test_a_connection_is_kept_for_the_next_request(running: Running) -> None:
    body = {"messages": asks(QUESTION), "max_tokens": 3}
    sent = request("/v1/chat/completions", body, Connection="keep-alive")
    with running.connect() as connection:
        for _ in range(3):
            connection.sendall(sent)
            data = b""
            while b'"usage"' not in data or not data.endswith(b"}"):
                data += connection.recv(1 << 16)
            assert data.startswith(b"HTTP/1.1 200")


def test_an_image_may_be_of_any_common_kind(running: Running) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        url = data_url(picture(7, kind=kind), f"image/{kind.lower()}")
        content = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
        messages = [{"role": "user", "content": content}]
        status, body = running.chat(messages=messages, max_tokens=4)
        assert status == 200, body
        text = body["choices"][0]["message"]["content"]
        assert text == running.model.generate(messages, max_new_tokens=4)


def test_base64_in_lines_is_what_it_is_in_one(running: Running) -> None:
    data = picture(7)
    texts = []
    for written in (b64encode(data), encodebytes(data), quote(b64encode(data)).encode()):
        content = [
            {"type": "text", "text": QUESTION},
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{written.decode()}"},
            },
        ]
        messages = [{"role": "user", "content": content}]
        status, body = running.chat(messages=messages, max_tokens=4)
        assert status == 200, body
        texts.append(body["choices"][0]["message"]["content"])
        assert texts[-1] == running.model.generate(messages, max_new_tokens=4)
    assert len(set(texts)) == 1


def test_threads_of_one_client(running: Running) -> None:
    """A client object is shared by threads, as libraries do."""
    client, texts = running.client(), []

    def ask() -> None:
        found = client.chat.completions.create(model="small", **REQUESTS["text"])
        texts.append(found.choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected(running.model, REQUESTS["text"])[0].text] * 8


def test_heat_maps_are_those_of_the_answer(running: Running) -> None:
    model, image, answer = running.model, picture(9, (60, 40)), "it is a red circle ."
    asked = asks(QUESTION, image)
    status, _, data = running.send("/v1/heatmaps", {"messages": asked, "answer": answer})
    found = json.loads(data)
    assert status == 200, found
    ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    prompt, images = model.ask(asked, ())
    truth = map_answer(model, prompt, model.prepare(images), ids)
    assert [word["text"] for word in found["words"]] == answer.split()
    maps = np.asarray([word["maps"][0] for word in found["words"]])
    np.testing.assert_allclose(maps, truth.weights_AIGG[:, 0].flatten(1), atol=1e-6)
    np.testing.assert_allclose(np.asarray(found["mean"][0]), maps.mean(axis=0), atol=1e-6)
    assert found["grid"] ** 2 == model.visual_tokens
    (region,) = found["regions"]
    assert region == pytest.approx(seen_region(model.vision, (60, 40)), abs=0.01)
    for wrong in ({"messages": asks(QUESTION), "answer": "x"}, {"messages": asked, "answer": ""},
                  {"messages": asked}, {"messages": asked, "answer": "red " * 600}):  # fmt: skip
        assert running.send("/v1/heatmaps", wrong)[0] == 400


def test_a_model_with_tiles() -> None:
    parts = {
        "vision": {"use": "clip", "config": VISION},
        "connector": {"use": "mlp"},
        "language": {"use": "vicuna", "config": {**LIVELY, "max_position_embeddings": 1024}},
        "template": {"use": "vicuna_v1", "system": ""},
        "tiling": {"use": "anyres"},
    }
    model = create_model(ModelRecipe.model_validate(parts), Registry.installed(), seed=0).eval()
    model.language.tokenizer = make_tokenizer()
    messages = asks(QUESTION, picture(1, (70, 40)), picture(2, (30, 90)))
    expected = model.generate(messages, max_new_tokens=12)
    with serving(model, chunk=40) as server:
        status, body = server.chat(messages=messages, max_tokens=12)
        assert status == 200, body
        assert body["choices"][0]["message"]["content"] == expected
        asked = {"messages": messages, "answer": "it is red ."}
        status, _, data = server.send("/v1/heatmaps", asked)
        assert status == 200, data
        assert json.loads(data)["regions"] == [[0, 0, 70, 40], [0, 0, 30, 90]]
