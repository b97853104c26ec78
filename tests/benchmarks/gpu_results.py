"""What gpu.py keeps of its sections: results.json after every row, a log, and a short summary.

Imports neither torch nor anything else that could fail.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

MARK = "\x1e"  # begins a line that is a row, and nothing that a program prints
MOST = 3900  # characters of the summary
SHOWN = ("torch", "triton", "transformers", "numpy", "liger-kernel", "bitsandbytes", "flash-attn")


class Outcome(Enum):
    """How a section ended."""

    DONE = "done"
    WRONG = "WRONG"
    FAILED = "FAILED"
    TOO_LONG = "TOO LONG"
    LEFT_OUT = "left out"


class Results:
    """Rows by section, and how each section ended; written to a folder, if there is one."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.sections: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._last: list[str] = []
        self._begins: dict[str, int] = {}
        self._log: TextIO | None = None
        if out is not None:
            self._log = (out / "log.txt").open("a", encoding="utf-8")

    # -- taking ---------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Take a line of a section's output: a row, or something for the log."""
        if not text.startswith(MARK):
            if text.strip():
                self._last = [*self._last[-19:], text]
                if self._log is not None:
                    self._log.write(text + "\n")
                    self._log.flush()
            return
        try:
            section, values = json.loads(text[1:])
        except ValueError:  # cut where its process was ended
            return
        rows = self.rows.setdefault(section, [])
        if section != "said":
            if not rows or list(rows[-1]) != list(values):
                print(f"\n{section}: " + " | ".join(values), flush=True)
            print("| " + " | ".join(_text(value) for value in values.values()), flush=True)
        rows.append(values)
        self.write()

    def say(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def ended(self, name: str, seconds: float, outcome: Outcome, why: str) -> None:
        """Keep how a section ended; what it printed last is printed if that was not well."""
        wrong = self._wrong(name)
        if outcome is Outcome.DONE and wrong:
            outcome, why = Outcome.WRONG, wrong
        last = [] if outcome in (Outcome.DONE, Outcome.LEFT_OUT) else self._last[-15:]
        self.sections[name] = {
            "outcome": outcome.value, "seconds": round(seconds, 1), "why": why, "last": last,
        }  # fmt: skip
        self._last = []
        self._begins = {section: len(rows) for section, rows in self.rows.items()}
        if last and outcome is not Outcome.WRONG:
            print("\n".join(line[:300] for line in last))
        print(f"({name}: {outcome.value}, {seconds:.1f} s {why})", flush=True)
        self.write()

    def _wrong(self, name: str) -> str:
        """Return what is wrong among the rows that came since the last section ended."""
        new = [
            row
            for section, rows in self.rows.items()
            for row in rows[self._begins.get(section, 0) :]
        ]
        wrong = [row for row in new if _exceeds(row)]
        if not wrong:
            return ""
        first = " ".join(_text(value) for value in list(wrong[0].values())[:3])
        return f"{len(wrong)} of {sum('limit' in row for row in new)} checks, the first: {first}"

    # -- giving ---------------------------------------------------------------------------------

    def write(self) -> None:
        """Rewrite results.json, all of it or nothing."""
        if self.out is None:
            return
        whole = {
            "started": self.started, "versions": versions(), "notes": self.notes,
            "sections": self.sections, "rows": self.rows,
        }  # fmt: skip
        part = self.out / "results.json.part"
        part.write_text(json.dumps(whole, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(part, self.out / "results.json")

    def close(self) -> int:
        """Write everything, print the summary, and return the exit code."""
        self.write()
        summary = self.summary()
        if self.out is not None:
            (self.out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
        print("\n" + "=" * 20 + "\n" + summary, flush=True)
        bad = (Outcome.FAILED.value, Outcome.TOO_LONG.value, Outcome.WRONG.value)
        return int(any(found["outcome"] in bad for found in self.sections.values()))

    def summary(self) -> str:
        """Return what to read first, in fewer than 4,000 characters."""
        card = next(iter(self.rows.get("environment", [])), {})
        lines = [f"{self.started}  {card.get('device', 'no card named')}  {_listed(versions())}"]
        for row in self.rows.get("rates", []):
            lines.append("ceilings: " + _listed(row))
        ended = [
            f"{name} {found['outcome']} {found['seconds']:.0f}s"
            for name, found in self.sections.items()
        ]
        lines.append("sections: " + "; ".join(ended))
        for name, found in self.sections.items():
            if found["outcome"] != Outcome.DONE.value and found["outcome"] != "left out":
                lines.append(f"! {name}: {found['why']} | {_telling(found['last'])[:160]}")
        lines += [f"! {note}" for note in self.notes]
        for section, rows in self.rows.items():
            checks = [row for row in rows if "limit" in row and "error" in row]
            if checks:
                worst = max(checks, key=lambda row: _share(row))
                named = " ".join(_text(value) for value in list(worst.values())[:2])
                lines.append(
                    f"{section}: {len(checks)} checks, worst {_share(worst):.2f} of its limit "
                    f"({_text(worst['error'])}: {named})"
                )
        for section, rows in self.rows.items():
            for row in rows if section.endswith(": goals") else []:
                met = "met" if row["measured"] >= row["wanted"] else "MISSED"
                case = f" {row['case']}" if "case" in row else ""
                spread = f" ({_text(row['worst'])}–{_text(row['best'])})" if "worst" in row else ""
                lines.append(
                    f"{section.removesuffix(': goals')}{case}: {row['goal']} "
                    f"{_text(row['measured'])}{spread}, goal {_text(row['wanted'])}: {met}"
                )
        lines += [row["text"] for row in self.rows.get("said", [])]
        left_out = [f"{row['what']}" for row in self.rows.get("left out", [])]
        if left_out:
            lines.append("no time for: " + ", ".join(left_out))
        return _cut(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _exceeds(row: dict[str, Any]) -> bool:
    """Say whether a row is a check that failed: also where its error is not a number."""
    return "limit" in row and "error" in row and not row["error"] <= row["limit"]


def _share(row: dict[str, Any]) -> float:
    error, limit = row["error"], row["limit"]
    if not math.isfinite(error):
        return math.inf
    return error / limit if limit else math.inf if error else 0.0


def _telling(lines: list[str]) -> str:
    """Return the line of a section's last ones that says most of its end."""
    for begin, from_end in (("Error", True), ("  File ", False)):
        found = [line.strip() for line in lines if begin in line]
        if found:  # of an exception the last line, of a stack of calls the first
            return found[-1 if from_end else 0]
    return lines[-1].strip() if lines else ""


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _cut(lines: list[str]) -> str:
    kept, size = [], 0
    for number, line in enumerate(lines):
        line = line if len(line) <= 400 else line[:397] + "..."
        size += len(line.encode()) + 1
        if size > MOST:
            kept.append(f"... {len(lines) - number} more lines are in results.json")
            break
        kept.append(line)
    return "\n".join(kept)


if __name__ == "__main__":  # python gpu_results.py results.json: the summary of an earlier call
    whole = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = Results(None)
    results.started, results.notes = whole["started"], whole["notes"]
    results.sections, results.rows = whole["sections"], whole["rows"]
    print(results.summary())
