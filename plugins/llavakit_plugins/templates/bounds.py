"""Checks that a foreign chat template ends, in a separate process.

A template is a program: it may loop for ever or write more than fits into memory, and Jinja's
sandbox does not prevent that. So it is first rendered in another process with limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llavakit import ModelError

TEMPLATE_FAULTS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
"""What a template raises besides Jinja's own errors."""
_SECONDS, _BYTES, _CHARACTERS = 5, 1 << 30, 10_000_000
_WAIT = 120  # for a machine that is busy with other things
_TURNS = 8


def check_bounds(source: str, variables: Mapping[str, Any], turns: int = 1) -> None:
    """Raise ModelError for a chat template that does not end, or writes without end.

    Tried are conversations of up to `turns` turns, or a few more. `variables` are what else the
    template reads.
    """
    most = _TURNS
    while most < turns:
        most *= 2
    texts = {key: value for key, value in variables.items() if isinstance(value, bool | int | str)}
    refusal = _refusal(source, json.dumps(texts, sort_keys=True), most)
    if refusal is not None:
        raise ModelError(
            f"the chat template that came with the tokenizer {refusal}; choose another prompt "
            "template with --template, such as vicuna_v1"
        )


@lru_cache(maxsize=64)
def _refusal(source: str, variables: str, turns: int) -> str | None:
    """Return what is wrong with a template, or None."""
    task = json.dumps({
        "source": source, "variables": json.loads(variables), "turns": turns,
        "seconds": _SECONDS, "bytes": _BYTES, "characters": _CHARACTERS,
    })  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=task, capture_output=True, text=True, check=False, timeout=_WAIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode < 0:  # stopped by the system for its time or memory
        return f"does not end within {_SECONDS} seconds"
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        return f"cannot be tried ({reason:.200})"
    return done.stdout.strip() or None


_PROGRAM = """
import json, resource, sys
task = json.load(sys.stdin)
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)

def refuse(message):
    raise TemplateError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, **options: json.dumps(value)
environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "1 January 2025"}
resource.setrlimit(resource.RLIMIT_AS, (task["bytes"], task["bytes"]))
resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"]))

def conversations():
    for turns in range(1, task["turns"] + 1):
        for shape in (str, list):
            for system in (False, True):
                messages = [{"role": "system", "content": "Be brief."}] if system else []
                for number in range(turns):
                    content = "text" if shape is str else [
                        {"type": "image"}, {"type": "text", "text": "text"}]
                    messages.append({"role": ("user", "assistant")[number % 2], "content": content})
                yield messages

try:
    template = environment.from_string(task["source"])
    for messages in conversations():
        size = 0
        try:
            for piece in template.generate(
                messages=messages, add_generation_prompt=messages[-1]["role"] == "user",
                **task["variables"],
            ):
                size += len(piece)
                if size > task["characters"]:
                    raise MemoryError
        except (MemoryError, OverflowError, RecursionError):
            raise
        except Exception:
            pass  # it refuses such a conversation
except MemoryError:
    print("writes more than the memory of a short text")
except OverflowError:
    print("counts further than a text is long")
except RecursionError:
    print("calls itself without end")
except Exception:
    pass  # it is said where it is rendered
"""
