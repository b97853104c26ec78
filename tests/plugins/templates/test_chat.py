"""`chat-template`: its ids are those of transformers' `apply_chat_template`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llavakit import DataError, ModelError, Sample, Turn
from llavakit.contracts.data import Role
from llavakit.stream.encode import IMAGE_ID, Encoded, encode
from llavakit_plugins.templates.chat import ChatTemplate, ChatTemplateOptions

# Written for these tests, each in the manner of a family.
CHATML = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nA default of the family.<|im_end|>\\n' }}
{%- endif %}""" + CHATML.replace(
    "assistant\\n'",
    "assistant\\n' + ('' if enable_thinking is not false else '<think>\\n\\n</think>\\n\\n')",
)
MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}
{%- endfor %}"""
PHI = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MARKED = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PLAIN = """\
{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SPECIAL += ["<|end|>", "<start_of_turn>", "<end_of_turn>"]

Make = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def make() -> Make:
    """A function that returns a small byte-level tokenizer with a chat template."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["assistant user system model the image shows a cat on a mat\n\n"] * 20
    trained.train_from_iterator(corpus, trainer)

    def build(source: str, *, eos: str = "</s>", trim: bool = False) -> PreTrainedTokenizerBase:
        tokenizer = Tokenizer.from_str(trained.to_str())
        begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        offsets = processors.ByteLevel(trim_offsets=trim)
        tokenizer.post_processor = cast(Any, processors.Sequence([offsets, begin]))
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<s>"
        )
        made.chat_template = source
        return made

    return build


def turns(*texts: str) -> tuple[Turn, ...]:
    roles: tuple[Role, Role] = ("human", "gpt")
    return tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))


def encoded(tokenizer: PreTrainedTokenizerBase, *texts: str, **options: Any) -> Encoded:
    images = sum(text.count("<image>") for text in texts[::2])
    template = ChatTemplate(ChatTemplateOptions(**options))
    return encode(Sample("s1", turns(*texts), (Path("x"),) * images), template, tokenizer)


def supervised(tokenizer: PreTrainedTokenizerBase, *texts: str, **options: Any) -> str:
    result = encoded(tokenizer, *texts, **options)
    return str(tokenizer.decode(result.ids[result.supervised]))


def oracle(
    tokenizer: PreTrainedTokenizerBase, *texts: str, system: str | None = None, **variables: Any
) -> list[int]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for number, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text})
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=len(texts) % 2 == 1, return_dict=False, **variables
    )
    return cast("list[int]", ids)


CONVERSATIONS = [
    ("What is it?",),
    ("What is it?", "A cat."),
    ("What is it?", "A cat.", "And\n\nthen?"),
    ("What is it? 中", "A  cat 😀.", "And then?", "\n It sat.\n\n"),
    (" padded ", " A cat. ", "1", "2", "3", "4"),
]


@pytest.mark.parametrize("texts", CONVERSATIONS)
@pytest.mark.parametrize("source", [CHATML, QWEN, MISTRAL, PHI, GEMMA, MARKED, PLAIN])
@pytest.mark.parametrize("trim", [False, True])
def test_ids_equal_apply_chat_template(
    make: Make, source: str, texts: tuple[str, ...], trim: bool
) -> None:
    tokenizer = make(source, trim=trim)
    assert encoded(tokenizer, *texts).ids.tolist() == oracle(tokenizer, *texts)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "A cat.<|im_end|>It sat.\n\n<|im_end|>"),
        (QWEN, "A cat.<|im_end|>It sat.\n\n<|im_end|>"),
        (MISTRAL, " A cat.</s> It sat.\n\n</s>"),
        (PHI, "A cat.<|end|>It sat.\n\n<|end|>"),
        (GEMMA, "A cat.<end_of_turn>It sat.<end_of_turn>"),
        (MARKED, "A cat.<|im_end|>\nIt sat.\n\n<|im_end|>\n"),
        (PLAIN, " A cat.\n It sat.\n\n\n"),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_answers_are_learned_with_what_ends_them(
    make: Make, source: str, expected: str, trim: bool
) -> None:
    tokenizer = make(source, trim=trim)
    assert supervised(tokenizer, "What is it?", "A cat.", "And then?", "It sat.\n\n") == expected
    assert supervised(tokenizer, "What is it?", "A cat.", "And?") == expected[
        : expected.index("It")
    ].rstrip(" ")
    assert supervised(tokenizer, "What is it?") == ""


def test_marked_templates_learn_what_transformers_masks(make: Make) -> None:
    tokenizer = make(MARKED)
    texts = ("Q", "A cat.", "And?", "B")
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
    ]
    expected: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    result = encoded(tokenizer, *texts)
    assert result.ids.tolist() == expected["input_ids"]
    assert result.supervised.astype(int).tolist() == expected["assistant_masks"]


def test_images_cut_the_text(make: Make) -> None:
    tokenizer = make(CHATML)
    result = encoded(tokenizer, "What?\n<image>", "A cat.")
    expected = oracle(tokenizer, "IMAGE\nWhat?", "A cat.")
    before, after = str(tokenizer.decode(expected)).split("IMAGE")
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    assert result.ids.tolist() == [*ids[0], IMAGE_ID, *ids[1]]


def test_system_texts(make: Make) -> None:
    tokenizer = make(QWEN)
    ids = encoded(tokenizer, "Q", system="Be brief.").ids.tolist()
    assert ids == oracle(tokenizer, "Q", system="Be brief.")
    # none: Qwen's default needs an empty message to go away, ChatML needs no message at all
    assert encoded(tokenizer, "Q", system="").ids.tolist() == oracle(tokenizer, "Q", system="")
    assert "default" in tokenizer.decode(encoded(tokenizer, "Q").ids)
    chatml = make(CHATML)
    assert encoded(chatml, "Q", system="").ids.tolist() == oracle(chatml, "Q")
    gemma = make(GEMMA)
    assert encoded(gemma, "Q", system="").ids.tolist() == oracle(gemma, "Q")
    with pytest.raises(ModelError, match=r"System role not supported; leave `system` out"):
        encoded(gemma, "Q", system="Be brief.")


def test_variables_reach_the_template(make: Make) -> None:
    tokenizer = make(QWEN)
    variables: dict[str, Any] = {"enable_thinking": False}
    ids = encoded(tokenizer, "Q", variables=variables).ids.tolist()
    assert ids == oracle(tokenizer, "Q", **variables)
    assert "</think>" in tokenizer.decode(ids)
    assert supervised(tokenizer, "Q", "A", variables=variables) == "A<|im_end|>"


@pytest.mark.parametrize(
    ("source", "eos", "stop"),
    [
        (CHATML, "</s>", ("<|im_end|>",)),
        (CHATML, "<|im_end|>", ()),
        (MISTRAL, "</s>", ()),
        (GEMMA, "</s>", ("<end_of_turn>",)),
        (MARKED, "</s>", ("<|im_end|>",)),
        (PLAIN, "</s>", ()),
    ],
)
def test_stop(make: Make, source: str, eos: str, stop: tuple[str, ...]) -> None:
    template = ChatTemplate(ChatTemplateOptions())
    assert tuple(template.stop(make(source, eos=eos))) == stop


def test_special_tokens_spelt_out_by_users_are_text(make: Make) -> None:
    tokenizer = make(CHATML)
    result = encoded(tokenizer, "Say <|im_end|>.", "It is <|im_start|>!")
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("start", "end"))
    ids = result.ids.tolist()
    assert ids.count(end) == ids.count(start) == 2
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nSay <|im_end|>.<|im_end|>\n"
        "<|im_start|>assistant\nIt is <|im_start|>!<|im_end|>\n"
    )
    # ordinary text in their place leaves the ids around them as they are
    plain = encoded(tokenizer, "Say no.", "It is no!").ids.tolist()
    assert ids[:4] == plain[:4]
    assert ids[-3:] == plain[-3:]


def test_templates_that_cannot_be_used_are_refused(make: Make) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        encoded(make(cast(Any, None)), "Q")
    with pytest.raises(ModelError, match="leaves out, repeats or reorders"):
        encoded(make("{{ messages[-1].content }}"), "Q", "A", "Q2")
    rewrites = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    assert encoded(make(rewrites), "Q", "A").expand(1).supervised.any()
    with pytest.raises(DataError, match=r"sample `s1`: .*rewrites the text"):
        encoded(make(rewrites), "Q", "<think>hm</think>A")
    with pytest.raises(ModelError, match="refuses a conversation"):
        encoded(make("{{ messages[0].content.no.such }}"), "Q")


HOSTILE = [
    ("{% for i in range(10**10) %}x{% endfor %}", "counts further than a text is long"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "does not end within 5 seconds"),
    ("{{ 'x' * 10**10 }}", "more than the memory"),
    ("{{ 'x' | center(10**11) }}", "more than the memory"),
    ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
     "more than the memory"),
    ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than the memory"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("{% if messages | length > 4 %}{{ 'x' * 10**10 }}{% endif %}", "more than the memory"),
    ("{% if messages[0].content == 'Q' %}{{ messages[0].content * 10**10 }}{% endif %}",
     "more than the memory"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "sentence"), HOSTILE)
def test_a_template_without_end_is_refused(make: Make, source: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=rf"{sentence}.*; choose another .* with --template"):
        encoded(make(source + CHATML), "Q", "A")


def test_a_template_without_end_for_one_text_alone_is_refused_there(make: Make) -> None:
    """In time, in size, and with many turns; what comes before and behind is rendered."""
    traps = (
        "{% for m in messages %}"
        "{% if 'loop' in m.content %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}"
        "{% if 'grow' in m.content %}{{ m.content * 10**9 }}{% endif %}"
        "{% endfor %}{% if messages | length > 40 %}{{ messages[0].content * 10**9 }}{% endif %}"
    )
    tokenizer = make(traps + CHATML)
    for text in ("Q", "grow", "loop"):
        if text == "Q":
            assert encoded(tokenizer, text, "A").ids.any()
            continue
        sentence = "does not end" if text == "loop" else "more than the memory"
        with pytest.raises(ModelError, match=sentence):
            encoded(tokenizer, f"what is a {text} ?", "A")
    with pytest.raises(ModelError, match="more than the memory"):
        encoded(tokenizer, *["Q", "A"] * 21)
    assert encoded(tokenizer, *["Q", "A"] * 20).ids.any()


def test_forked_processes_render_by_themselves(make: Make) -> None:
    """As a data loader's do: none reads what another was answered."""
    tokenizer = make(CHATML)
    encoded(tokenizer, "Q", "A")

    def many(count: int) -> None:
        for number in range(count):
            assert encoded(tokenizer, f"Q{number}", "A").ids.any()
        os._exit(0)

    child = os.fork()
    if child == 0:
        try:
            many(50)
        finally:
            os._exit(1)
    for number in range(50):
        assert encoded(tokenizer, f"Q{number}", "A").ids.any()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ 'a'[0:].x.y }}", "{{ '%d' % 'x' }}", "{%"])
def test_what_a_template_raises_is_said(make: Make, source: str) -> None:
    with pytest.raises(ModelError, match="refuses a conversation") as caught:
        encoded(make(source + CHATML), "Q", "A")
    assert "\n" not in str(caught.value)


def test_a_template_may_write_what_changes(make: Make) -> None:
    tokenizer = make("{{ pad_token }}" + CHATML)  # as others write the date
    template = ChatTemplate(ChatTemplateOptions())
    for pad in ("<s>", "<|end|>"):
        tokenizer.pad_token = pad
        segments = template.segments(turns("Q", "A"), tokenizer)
        assert segments[0].text.startswith(f"{pad}<|im_start|>user")


def test_it_survives_pickling(make: Make) -> None:
    template = ChatTemplate(ChatTemplateOptions(system="S"))
    tokenizer = make(CHATML)
    segments = template.segments(turns("Q", "A"), tokenizer)
    again: ChatTemplate = pickle.loads(pickle.dumps(template))  # noqa: S301
    assert again.segments(turns("Q", "A"), tokenizer) == segments
