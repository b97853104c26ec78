"""How Sphinx makes the documentation site of these pages and of the public docstrings."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched while docstrings are read
sys.path.insert(0, str(Path(__file__).parent / "extensions"))

# Before autodoc does: it imports with typing.TYPE_CHECKING set, which pydantic does not survive.
import llavakit.testing

for _kind in llavakit.all_kinds():
    llavakit.Registry.installed().all(_kind)
for _name in llavakit.__all__:
    getattr(llavakit, _name)

project = "llavakit"
author = "The llavakit authors"
project_copyright = author
version = release = installed("llavakit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "components", "links"]
exclude_patterns = ["_build", "extensions"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"llavakit {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
