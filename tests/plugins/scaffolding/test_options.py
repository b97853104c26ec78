"""Options as a table: read from models and their source, for the site and `llava-run plugins`."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from typing import Literal

import pytest
from pydantic import Field
from tests.conftest import Command

from llavakit import Component, Dataset, Options, Registry, Step, Use, all_kinds
from llavakit.contracts.component import InputPath
from llavakit_plugins.scaffolding.options import markdown_table, options_of


class Side(Enum):
    LEFT = "left"


class Inner(Options):
    size: int = 3


class Several(Options):
    path: InputPath
    """A file."""
    data: Use[Dataset] | None = None
    mode: Literal["a", "b"] = "a"
    """One | other,
    over two lines."""
    share: float = Field(default=0.5, ge=0, lt=1)
    names: tuple[str, ...] = ("x", "y")
    inner: Inner = Inner()
    rates: dict[str, float] = Field(default_factory=dict)
    side: Side = Side.LEFT
    system: str = ""


def test_a_table_says_what_each_option_takes() -> None:
    assert list(markdown_table(options_of(Several))) == [
        "| option | takes | default | what it says |",
        "|---|---|---|---|",
        "| `path` | path |  | A file. |",
        "| `data` | a choice of Dataset | none |  |",
        "| `mode` | `a`, `b` | `a` | One &#124; other, over two lines. |",
        "| `share` | number, at least 0, below 1 | `0.5` |  |",
        '| `names` | list of text | `["x", "y"]` |  |',
        "| `inner` | table of `size` | `{ size = 3 }` |  |",
        "| `rates` | table of number | none |  |",
        "| `side` | `left` | `left` |  |",
        '| `system` | text | `""` |  |',
    ]


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.__name__)
def test_every_option_of_every_component_is_told(kind: type[Component]) -> None:
    for component in Registry.installed().all(kind).values():
        options = options_of(component.Options)
        assert [option.name for option in options] == list(component.Options.model_fields)
        for option in options:
            assert option.takes
            assert " object at 0x" not in option.default + option.takes
            assert "typing." not in option.takes
    if kind is Step:
        finetune = {
            o.name: o for o in options_of(Registry.installed().get(Step, "finetune").Options)
        }
        assert finetune["warmup"].text.startswith("Share of the steps in which the learning rate")
        assert finetune["init"].text  # of a model that it derives from


def test_a_component_is_shown_with_its_options(llava_run: Command) -> None:
    code, out, _ = llava_run("plugins", "pool")
    assert code == 0
    assert out.startswith("Connector pool  (llavakit ")
    assert "grid      integer, at least 1; default 12" in out
    (shown,) = json.loads(llava_run("plugins", "pool", "--json").out)
    assert [option["name"] for option in shown["options"]] == ["products", "depth", "grid"]
    kinds = [one["kind"] for one in json.loads(llava_run("plugins", "scienceqa", "--json").out)]
    assert kinds == ["Dataset", "Benchmark"]


def test_a_name_that_nothing_has_is_said(refused: Callable[..., str]) -> None:
    assert refused("plugins", "lineer") == "no component is called `lineer`; did you mean `linear`?"
