"""A program that renders chat templates within limits, and says of each whether it kept them.

Run by `bounds`, in a process of its own: python bounded_renderer.py SECONDS BYTES CHARACTERS. It
reads one task a line, as JSON: `messages`, `variables`, `template`, a number, and its `source`
where the number is new. It answers each with a line: what is wrong with the template, or null.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """The tag that marks generated text, as transformers adds it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    # the options are those of transformers: with others, the text tried here would be another one
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    # transformers' own filter takes options;
    # they change the text's length too little to matter here
    made.filters["tojson"] = lambda value, **options: json.dumps(value)
    made.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    return made


class _Impossible(nodes.Impossible):
    """What Jinja raises where it cannot compute a constant, and goes on without.

    With more memory than here it could, even for a branch that is never rendered.
    """

    too_large = False

    def __init__(self) -> None:
        _Impossible.too_large |= isinstance(sys.exc_info()[1], MemoryError)


nodes.Impossible = _Impossible  # type: ignore[assignment,misc]


class _Renderer:
    def __init__(self, characters: int) -> None:
        self._environment, self._characters = _environment(), characters
        self._templates: dict[int, Template] = {}

    def refusal(self, task: dict[str, Any]) -> str | None:
        """Return what is wrong with a rendering. What the template itself refuses is no fault."""
        try:
            self._render(task)
        except MemoryError:
            return "writes more than the memory of a short text"
        except OverflowError:
            return "counts further than a text is long"
        except RecursionError:
            return "calls itself without end"
        except Exception:
            pass  # it is said where the text is needed
        return None

    def _render(self, task: dict[str, Any]) -> None:
        number, messages, size = task["template"], task["messages"], 0
        if "source" in task:  # compiling it computes what is constant in it
            _Impossible.too_large = False
            self._templates[number] = self._environment.from_string(task["source"])
            if _Impossible.too_large:
                raise MemoryError
        opens = messages[-1]["role"] == "user"
        for piece in self._templates[number].generate(
            messages=messages, add_generation_prompt=opens, **task["variables"]
        ):
            # piece by piece, so that a template that writes
            # without end is stopped before memory is full
            size += len(piece)
            if size > self._characters:
                raise MemoryError


def main(seconds: int, size: int, characters: int) -> None:
    """Answer every line of the input."""
    renderer = _Renderer(characters)
    limited = sys.platform != "win32"  # which has neither of these limits
    if limited:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for line in sys.stdin.buffer:
        if limited:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # of its own time; then it is ended
        said = renderer.refusal(json.loads(line))
        if limited:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
