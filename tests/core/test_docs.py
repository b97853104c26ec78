"""docs/recipes.md says what the steps can be told: every option of them, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llavakit import Registry, Step

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {"evaluate": "Evaluating", "finetune": "Training", "export": "Exporting"}


def table(heading: str) -> dict[str, str]:
    """Return the defaults that a table of options shows, by option."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.partition(f"### {heading}\n")[2], maxsplit=1, flags=re.M)[0]
    shown: dict[str, str] = {}
    for line in re.findall(r"^\| `.*$", section, flags=re.M):
        names, defaults = (cell.strip() for cell in line.strip("| ").split("|")[:2])
        found = re.findall(r"`(\w+)`", names)
        several = re.split(r", (?![^(]*\))", defaults) if len(found) > 1 else [defaults]
        shown |= dict(zip(found, several, strict=True))
    return shown


@pytest.mark.parametrize("step", SECTIONS)
def test_every_option_is_listed_with_its_default(step: str) -> None:
    options: type[BaseModel] = Registry.installed().get(Step, step).Options
    shown = table(SECTIONS[step])
    assert set(shown) == set(options.model_fields)
    for name, field in options.model_fields.items():
        if isinstance(field.default, bool):
            assert shown[name] == str(field.default).lower(), name
        elif isinstance(field.default, int | float):
            assert float(shown[name]) == field.default, name
        elif field.default is PydanticUndefined and field.default_factory is None:
            assert shown[name] == "", name
