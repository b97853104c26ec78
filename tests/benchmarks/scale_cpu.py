"""What scales, and how flat it stays, on one machine's CPU; one section a subject.

    python tests/benchmarks/scale_cpu.py [SECTION ...]

Without a name all sections run, one after another. Each prints one small table: what was measured,
the ratio, the limit. A section is a function without arguments, listed in `SECTIONS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


def data() -> None:
    """Start-up and memory of a rank, from 10,000 samples to 10 million."""
    print("data: see below")


SECTIONS: dict[str, Callable[[], None]] = {"data": data}


def main() -> None:
    names = sys.argv[1:] or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        sys.exit(f"no section `{unknown[0]}`, but {', '.join(SECTIONS)}")
    for name in names:
        print(f"\n{name}: {SECTIONS[name].__doc__}\n", flush=True)
        SECTIONS[name]()


if __name__ == "__main__":
    main()
