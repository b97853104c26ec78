"""The table of built-in templates.

Published weights were trained with these system texts: changing a letter changes what those models
answer. The tests check lengths and hashes of the rendered text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llavakit_plugins.templates import styles
from llavakit_plugins.templates.placement import Exchange
from llavakit_plugins.templates.styles import Style


@dataclass(frozen=True)
class Format:
    """One template, as data."""

    summary: str
    style: Style
    trained: Style | None = None
    """The style of complete conversations, if the original trains with another style than it uses
    to answer."""
    system: str = ""
    roles: tuple[str, str] = ("", "")
    example: tuple[Exchange, ...] = ()
    """Exchanges that stand in front of every conversation when asked."""
    restart: bool = False
    """Whether later exchanges begin with the tokenizer's beginning token again."""
    ends: bool = False
    """Whether answers end with the tokenizer's end token."""
    image: str = "<image>"
    """What an image is written as."""
    stop: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_POLITE_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_POLITE_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Some texts look like mistakes and are the original's: no space before "The visual content", two
# spaces after "safe.", and v0's "human" in llava_v1.
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist "
    "the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_ENERGY = Exchange(
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively "
    "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be "
    "depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n",
)

_LLAVA_V0 = Format(
    "Vicuna v0 as LLaVA asks it: `###` between turns (the paper's models)",
    style=styles.hashes,
    trained=styles.hashes_on_lines,
    system=_POLITE_HUMAN,
    roles=("Human", "Assistant"),
    stop=("###",),
)
_VICUNA_V1 = Format(
    "Vicuna v1.1 and later: `USER:`, `ASSISTANT:` and the end token (LLaVA-1.5 was tuned on it)",
    style=styles.roles_and_end_token,
    system=_POLITE_USER,
    roles=("USER", "ASSISTANT"),
    ends=True,
    aliases=("v1",),
)
_INSTRUCT = Format(
    "Mistral Instruct: `[INST]`, no system text",
    style=styles.instructions,
    ends=True,
)
_CHATML = Format(
    "ChatML without newlines between turns (LLaVA-1.6 34B)",
    style=styles.chatml,
    system="Answer the questions.",
    roles=("user", "assistant"),
    stop=("<|im_end|>",),
    aliases=("chatml_direct", "mistral_direct"),
)

FORMATS: dict[str, Format] = {
    "plain": Format(
        "image, caption, newline: the question is left out (stage 1 of LLaVA from v1.0 on)",
        style=styles.image_and_caption,
        stop=("\n",),
        aliases=("v0_plain",),
    ),
    "v0": replace(
        _LLAVA_V0,
        summary="Vicuna v0 with its example exchange, which is shown when asked",
        example=(_ENERGY,),
        aliases=("default",),
    ),
    "llava_v0": _LLAVA_V0,
    "v0_mmtag": replace(
        _LLAVA_V0,
        summary="llava_v0 with `<Image>…</Image>` around images",
        system=_TAGGED,
        image="<Image><image></Image>",
    ),
    "vicuna_v1": _VICUNA_V1,
    "llava_v1": replace(
        _VICUNA_V1,
        summary="vicuna_v1 with v0's system text (what LLaVA's command line asks with)",
        system=_POLITE_HUMAN,
        aliases=(),
    ),
    "v1_mmtag": replace(
        _VICUNA_V1,
        summary="vicuna_v1 with `<Image>…</Image>` around images",
        system=_TAGGED,
        image="<Image><image></Image>",
        aliases=(),
    ),
    "llama_2": replace(
        _INSTRUCT,
        summary="Llama 2 chat with Meta's system text",
        system=_LLAMA_2,
        restart=True,
    ),
    "llava_llama_2": replace(
        _INSTRUCT,
        summary="Llama 2 chat with LLaVA's system text",
        system=_LLAVA_LLAMA_2,
        restart=True,
    ),
    "mistral_instruct": _INSTRUCT,
    "mpt": replace(
        _CHATML,
        summary="ChatML with MPT's system text",
        system=_MPT,
        aliases=(),
    ),
    "chatml": _CHATML,
}

NAMES = tuple(name for main, row in FORMATS.items() for name in (main, *row.aliases))
