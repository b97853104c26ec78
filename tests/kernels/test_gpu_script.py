"""tests/benchmarks/gpu.py, whose minutes on a GPU are few: everything that can be known before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarks import gpu_wheels
from tests.benchmarks.gpu_results import MARK, Outcome, Results

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
CHECKS = ("compilation,correctness", "attention", "models", "smoke", "compile", "tiny")


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """Not needed here: the script says by itself what it cannot run with."""


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_every_kind_of_section_walks_through_on_a_cpu(tmp_path: Path) -> None:
    """At toy sizes. Another distribution's package `tests` is installed, as happens."""
    (tmp_path / "other" / "tests").mkdir(parents=True)
    (tmp_path / "other" / "tests" / "__init__.py").touch()
    sections = (
        "environment,rates,correctness,attention,models,smoke,splice1,mlp1,loss,decode,small,"
        "profile,configurations,compile,rates-after"
    )
    out = tmp_path / "out"
    ended = run(
        "--dry-run", "--only", sections, "--out", out, "--seconds", 500, "--limit", 200,
        PYTHONPATH=os.pathsep.join([str(tmp_path / "other"), *filter(None, sys.path)]),
    )  # fmt: skip
    if "install numpy<2.4" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    found = results(out)
    outcomes = {name: section["outcome"] for name, section in found["sections"].items()}
    assert outcomes == dict.fromkeys(sections.split(","), "done"), ended.stdout[-3000:]
    assert ended.returncode == 0
    rows = found["rows"]
    assert len(rows["rates"]) == 2
    assert [(row["case"], row["way"]) for row in rows["smoke"]] == [
        (case, way)
        for case in ("stage 1, tiny", "stage 2, tiny")
        for way in ("ours", "transformers", "ours, recomputing", "transformers, checkpointing")
    ]
    assert "ours, compiled" in [row["way"] for row in rows["small"]]
    checked = {section for section in rows if any("limit" in row for row in rows[section])}
    expected = {"plugins", "correctness", "attention", "models", "smoke", "small", "compile"}
    assert checked == expected
    assert all(row["same"] == row["of"] for row in rows["decode: same"])
    assert "## " not in ended.stdout
    assert (out / "profile.txt").stat().st_size > 1000
    summary = (out / "summary.txt").read_text()
    assert len(summary.encode()) < 4000
    assert ended.stdout.endswith(summary)


def test_no_section_takes_another_with_it(tmp_path: Path) -> None:
    trouble = {
        "hangs": ("TOO LONG", "ended after 2 s"),
        "crashes": ("FAILED", "killed by SIGSEGV"),
        "fails": ("FAILED", "exit code 1"),
        "exhausts": ("FAILED", "exit code 1"),
        "errs": ("WRONG", "2 of 3 checks, the first: wrong 0.02 0.01"),
    }
    ended = run("--dry-run", "--only", ",".join([*trouble, "rates"]), "--limit", 2,
                "--out", tmp_path)  # fmt: skip
    if "install numpy<2.4" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 1
    found = results(tmp_path)
    told = {n: (s["outcome"], s["why"]) for n, s in found["sections"].items()}
    assert told == trouble | {"rates": ("done", "")}
    assert found["sections"]["hangs"]["seconds"] < 8
    assert [found["rows"][name][0]["found"] for name in ("hangs", "crashes", "fails")] == [1, 2, 3]
    assert "in hangs" in "".join(found["sections"]["hangs"]["last"])  # where it hung
    assert "before the crash" in (tmp_path / "log.txt").read_text()
    summary = (tmp_path / "summary.txt").read_text()
    assert "! exhausts: exit code 1 | torch.OutOfMemoryError: CUDA out of memory" in summary
    assert "illegal memory access" in summary


def test_what_was_found_stays_when_the_call_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--only", "hangs,rates"]
    command += ["--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "results.json").exists() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if "install numpy<2.4" in errors:
        pytest.skip(errors.strip())
    assert process.returncode == 1
    assert results(tmp_path)["rows"]["hangs"] == [{"found": 1}]
    assert "ended from outside by SIGTERM" in said
    assert "SIGTERM" in (tmp_path / "summary.txt").read_text()


def test_the_summary_is_short_and_names_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(None)
    for number in range(300):
        row = {"what": f"case {number} of many", "error": number / 1e4, "limit": 0.02}
        results.line(MARK + json.dumps(["checks", row]))
    results.line(f"{MARK}[cut")  # where a process was killed
    for number in range(80):
        goal = {"goal": f"of the limit {number}", "wanted": 0.6, "measured": number / 100}
        results.line(MARK + json.dumps(["speed: goals", goal]))
    results.ended("checks", 1.0, Outcome.DONE, "")
    capsys.readouterr()
    assert results.close() == 1
    summary = results.summary()
    assert len(summary.encode()) < 4000
    assert "checks: 300 checks, worst 1.49 of its limit (0.0299: case 299 of many" in summary
    assert "speed: of the limit 5 0.05, goal 0.6: MISSED" in summary
    assert "more lines are in results.json" in summary


def test_it_says_what_it_needs() -> None:
    if not torch.cuda.is_available():
        ended = run("--call", "1")
        assert ended.returncode == 2
        assert "measures on a CUDA GPU and this machine has none" in ended.stderr
    old = (
        "import numpy, triton, sys, runpy; numpy.__version__ = '2.5.2'; "
        "triton.__version__ = '3.6.0'; sys.argv = ['gpu.py', '--dry-run']; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "does not run with NumPy 2.5.2: install numpy<2.4" in ended.stderr


def test_what_is_imported_before_the_fork_does_not_open_the_device() -> None:
    """A forked process cannot use a device that its parent has opened."""
    code = (
        f"import sys; sys.argv = ['gpu.py']; sys.path.insert(0, {str(SCRIPT.parents[2])!r})\n"
        "import importlib, torch\n"
        "def opened(*given): raise SystemExit('the device is opened')\n"
        "torch.cuda._lazy_init = opened\n"
        "from tests.benchmarks import gpu\n"
        "for name in gpu.PRELOADED: importlib.import_module(name)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_wheel_keeps_the_library_of_one_version_of_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{x}.so" for x in ("cpu", "cuda121", "cuda130")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (*libraries, "bitsandbytes/cextension.py"):
            archive.writestr(path, "content")
        record = "".join(f"{path},sha256=0,7\n" for path in libraries)
        archive.writestr("bitsandbytes-1.0.dist-info/RECORD", record)
        archive.writestr("bitsandbytes-1.0.dist-info/METADATA", "Requires-Dist: core==1.2\n")
    gpu_wheels._keep_library(wheel, "cuda130")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist()[:3] == [libraries[0], libraries[2], "bitsandbytes/cextension.py"]
        assert "cuda121" not in archive.read("bitsandbytes-1.0.dist-info/RECORD").decode()
    assert gpu_wheels._requirement(wheel, "core") == "core==1.2"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sections", CHECKS)
def test_correct_on_this_gpu(sections: str, tmp_path: Path) -> None:
    # in processes of their own, since this one interprets kernels
    ended = run("--only", sections, "--out", tmp_path)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-4000:]
