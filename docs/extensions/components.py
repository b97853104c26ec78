"""Directives that read the code, so that pages cannot be wrong.

`components`: every component that llavakit brings, with its options. `names`: what options of other
programs are called here.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

import llavakit
from llavakit import Registry, all_kinds
from llavakit.contracts.component import Component
from llavakit_plugins.scaffolding.names import SOURCES
from llavakit_plugins.scaffolding.options import markdown_table, options_of

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class Components(SphinxDirective):
    """Lists components by kind: a heading, what each is, and a table of its options."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        registry = Registry.installed()
        found: list[nodes.Node] = []
        for kind in all_kinds():
            title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).capitalize()
            section = self._section(f"{title}s", f"kind-{kind.__name__}")
            origins = registry.origins(kind)
            for name, component in registry.all(kind).items():
                if origins[name][0] == "llavakit":
                    section += self._described(kind, name, component)
            found.append(section)
        return found

    def _section(self, title: str, label: str) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(label)])
        section += nodes.title(text=title)
        self.state.document.note_explicit_target(section)
        return section

    def _described(
        self, kind: type[Component], name: str, component: type[Component]
    ) -> nodes.section:
        section = self._section(name, f"{kind.__name__}-{name}")
        lines = (inspect.getdoc(component) or "").partition("\n\n")[0].splitlines()
        if options := options_of(component.Options):
            lines += ["", *markdown_table(options)]
        self.state.nested_parse(StringList(lines, source=f"options of {name}"), 0, section)
        return section


class Names(SphinxDirective):
    """Shows what options of other programs are called here: the table that recipes' hints use."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for source, names in SOURCES.items():
            section = nodes.section(ids=[nodes.make_id(f"names-{source}")])
            section += nodes.title(text=source)
            lines = ["| there | here | |", "|---|---|---|"]
            for name, one in names.items():
                here = f"`{one.ours}`" if one.ours else "nothing"
                lines.append(f"| `{name}` | {here} | {one.say} |")
            self.state.nested_parse(StringList(lines, source="names"), 0, section)
            found.append(section)
        return found


class PublicNames(SphinxDirective):
    """Documents each public name of `llavakit` that is no contract, which stand elsewhere."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name in sorted(set(llavakit.__all__) - {"load", "LlavaModel", "Answering"}):
            thing = getattr(llavakit, name)
            module = getattr(thing, "__module__", "llavakit")
            if module.startswith("llavakit.contracts") or not module.startswith("llavakit"):
                continue
            if inspect.isclass(thing):
                lines += [f".. autoclass:: llavakit.{name}", "   :no-members:", ""]
            elif callable(thing):
                lines += [f".. autofunction:: llavakit.{name}", ""]
            else:
                lines += [f".. py:data:: llavakit.{name}", f"   :value: {thing!r:.80}", ""]
        section = nodes.container()
        self.state.nested_parse(StringList(lines, source="public names"), 0, section)
        return section.children


def indented_is_code(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Mark what stands indented in a docstring as code, as Markdown has it."""
    marked: list[str] = []
    within = False
    for line in lines:
        if line.startswith("    ") and not within and not (marked and marked[-1].strip()):
            marked += ["::", ""]
            within = True
        elif line.strip() and not line.startswith("    "):
            within = False
        marked.append(line)
    lines[:] = marked


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", indented_is_code)
    app.add_directive("components", Components)
    app.add_directive("names", Names)
    app.add_directive("public-names", PublicNames)
    return {"version": "1", "parallel_read_safe": True}
