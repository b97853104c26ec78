"""The built-in templates: one component for each name in the table of formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llavakit import ModelError, Options, PromptTemplate, Segment, Turn
from llavakit.contracts.data import IMAGE
from llavakit_plugins.templates.formats import FORMATS, Format
from llavakit_plugins.templates.placement import TemplateOptions, exchanges
from llavakit_plugins.templates.styles import Frame, Style, image_and_caption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HashesOptions(TemplateOptions):
    """Options of the templates with the separator `###`."""

    layout: Literal["original", "compact", "lines"] = "original"
    """`compact`: `system###Human: …###Assistant:`. `lines`: each turn on a line of its own.
    `original`: `lines` for a complete conversation and `compact` for one that ends with a question,
    because the original LLaVA trains with the first form and answers with the second."""


class BuiltinTemplate(PromptTemplate):
    """A row of the table; its subclasses differ in nothing else."""

    format: ClassVar[Format]

    def __init__(self, options: Options) -> None:
        self._options = options if isinstance(options, TemplateOptions) else TemplateOptions()
        own = self.format.system
        text = own if self._options.system is None else self._options.system
        self._system = Segment(text, markup=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, (self.name, self._options, self._system)

    def with_system(self, system: str) -> BuiltinTemplate:
        """Return the template with a conversation's system text; `plain` shows it no more than it
        shows the question."""
        return _build(self.name, self._options, Segment(system))

    def segments(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Segment]:
        """Return the segments of the text in order; a last human turn is followed by the prompt for
        the answer.

        Raises DataError for turns that the template cannot show, and ModelError if answers end with
        the end token and the tokenizer has none.
        """
        row = self.format
        pairs = exchanges(turns, self._options)
        if row.image != IMAGE:
            pairs = [
                pair._replace(question=pair.question.replace(IMAGE, row.image)) for pair in pairs
            ]
        frame = Frame(
            system=self._system,
            roles=row.roles,
            # the first exchange has no beginning token here:
            # the encoder adds one in front of the whole text
            begin=(tokenizer.bos_token or "") if row.restart else "",
            end=self._end(tokenizer) if row.ends else "",
            example=row.example,
        )
        segments = self._style(complete=pairs[-1].answer is not None)(frame, pairs)
        if self._options.image == IMAGE:
            return list(segments)
        return [part for segment in segments for part in self._wrapped(segment)]

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Return the separator that ends an answer, where it is not the end token."""
        return self.format.stop

    def _wrapped(self, segment: Segment) -> Iterator[Segment]:
        """Yield a segment with its images written as the options say."""
        # an answer may hold the text `<image>`, which is only text there
        if segment.supervised or IMAGE not in segment.text:
            yield segment
            return
        for number, text in enumerate(segment.text.split(IMAGE)):
            if number:
                yield Segment(self._options.image, markup=True)
            yield segment._replace(text=text)

    def _style(self, *, complete: bool) -> Style:
        layout = self._options.layout if isinstance(self._options, HashesOptions) else "original"
        on_lines = complete if layout == "original" else layout == "lines"
        return self.format.trained if self.format.trained and on_lines else self.format.style

    def _end(self, tokenizer: PreTrainedTokenizerBase) -> str:
        end: str | None = tokenizer.eos_token
        if not end:
            raise ModelError(
                f"the template `{self.name}` ends answers with the end token, and the tokenizer "
                "has none; set its eos_token, or use a template with its own separator (llava_v0)"
            )
        return end


def _component(name: str, row: Format) -> type[BuiltinTemplate]:
    options: type[Options] = TemplateOptions
    if row.trained is not None:
        options = HashesOptions
    elif row.style is image_and_caption:
        options = Options  # no system text, and the caption is always behind the image
    members = {"name": name, "format": row, "Options": options, "__doc__": f"{row.summary}."}
    return type(f"BuiltinTemplate[{name}]", (BuiltinTemplate,), members)


BUILTIN: dict[str, type[BuiltinTemplate]] = {
    name: _component(name, row) for main, row in FORMATS.items() for name in (main, *row.aliases)
}

TEMPLATES = SimpleNamespace(**BUILTIN)
"""The same, as the hook names them: `templates.builtin:TEMPLATES.vicuna_v1`."""


def _build(name: str, options: Options, system: Segment) -> BuiltinTemplate:
    template = BUILTIN[name](options)
    template._system = system
    return template
