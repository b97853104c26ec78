"""Print the oldest versions that pyproject.toml admits, as constraints for pip.

    python tests/minimum.py > constraints.txt

`make test-minimum` runs the tests with them.
"""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path


def minimum() -> dict[str, str]:
    """Return the oldest release of every library that is named with one, by the library's name."""
    table = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    project = table["project"]
    named = chain(
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *table["dependency-groups"].values(),
    )
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in named)
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    for library, version in sorted(minimum().items()):
        print(f"{library}=={version}.*")  # with its mending releases
