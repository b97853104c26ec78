"""Making data, from the command line, where nothing may import torch or transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.chat_server import KEY, TEACHER, Handler, Service, serve, teach

Run = Callable[..., subprocess.CompletedProcess[str]]

_FORBIDDEN = ("torch", "transformers", "torchvision", "timm")
_PEAK = """\
import sys
from llavakit.cli import main
code = main(sys.argv[1:])
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("peak in kB", peak.split()[1])
raise SystemExit(code)
"""

OFFLINE = """\
name = "offline"

[[steps]]
use = "generate"
contexts = "{contexts}"
generator = {{ use = "offline" }}

[[steps]]
use = "filter"
captions = "@generate/captions.json"
chunker = "light"
minimum = 1
workers = 2
"""
ASKED = (
    """\
name = "asked"

[[steps]]
use = "generate"
contexts = "{contexts}"
kinds = ["detail"]
{more}
"""
    + TEACHER
)


@pytest.fixture
def llava_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs the command in processes that fail where they import what is heavy."""
    blocked = tmp_path / "blocked"
    for name in _FORBIDDEN:
        (blocked / name).mkdir(parents=True)
        fail = f"raise RuntimeError('{name} is imported')\n"
        (blocked / name / "__init__.py").write_text(fail)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(blocked), before])))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _PEAK, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return call


@pytest.fixture
def service() -> Iterator[Service]:
    with serve(Service(otherwise=teach)) as running:
        yield running


def write_recipe(folder: Path, text: str, count: int = 6, **more: str) -> Path:
    contexts = folder / "contexts.jsonl"
    rows = [
        {
            "id": f"{number:06}",
            "image": f"{number:06}.jpg",
            "captions": [f"A cat of number {number} sits on a mat.", "A cat."],
            "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}],
        }
        for number in range(count)
    ]
    contexts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.toml"
    path.write_text(text.format(contexts=contexts, **more))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_what_has_networks_is_stopped_here(llava_run: Run) -> None:
    """Else the other tests would show nothing."""
    done = llava_run("small", "--plan")  # any causal language model of transformers has no outline
    assert done.returncode != 0
    assert "torch is imported" in done.stderr


@pytest.mark.parametrize("recipe", ["tiny", "llava13b", "llava-v1.5-7b", "llava7b-lora"])
def test_plans_of_built_in_networks(llava_run: Run, recipe: str) -> None:
    done = llava_run(recipe, "--plan")
    assert done.returncode == 0, done.stderr
    assert "GB a device" in done.stdout


def test_the_offline_teacher_and_the_filter(llava_run: Run, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, OFFLINE), tmp_path / "run"
    done = llava_run(recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(read(out / "01-generate" / "instruct.json")) == 18
    assert len(read(out / "02-filter" / "captions.json")) == 6
    facts = read(out / "environment.json")
    assert facts["device"] is None
    assert facts["device_name"] == "no device"
    assert "no device" in (out / "report.html").read_text()
    (begun, *_) = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    assert begun["device"] == "none"

    again = llava_run(recipe, "--out", out)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == 2
    other = llava_run(recipe, "--out", tmp_path / "other", "--reuse", out)
    assert other.returncode == 0, other.stderr
    assert other.stderr.count("taken from") == 2


def test_a_teacher_behind_http_and_its_plan_and_its_resume(
    llava_run: Run, service: Service, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, ASKED, url=service.url, more="budget_usd = 0.125")
    out = tmp_path / "run"
    plan = llava_run(recipe, "--plan")
    assert plan.returncode == 0, plan.stderr
    assert "6 requests" in plan.stdout
    assert "services: " in plan.stdout

    stopped = llava_run(recipe, "--out", out)
    assert stopped.returncode == 2, stopped.stderr
    assert "stopped at budget_usd = 0.125" in stopped.stderr
    paid = len(service.asked)
    assert 0 < paid < 6

    more = ("--set", "steps.generate.budget_usd=100")
    done = llava_run(recipe, "--out", out, "--resume", *more)
    assert done.returncode == 0, done.stderr
    assert len(service.asked) == 6, "a reply that was paid for was asked for again"
    assert len(read(out / "01-generate" / "detail.json")) == 6
    assert (out / "01-generate" / "review.html").is_file()


def test_what_is_wrong_with_such_a_recipe(llava_run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ASKED, url="http://127.0.0.1:9/v1", more="concurency = 3")
    done = llava_run(recipe)
    assert done.returncode == 2
    assert "unknown option `concurency` of `generate`" in done.stderr
    done = llava_run(recipe, "--set", "steps.generate.use=generat")
    assert "no Step is called `generat`; did you mean `generate`?" in done.stderr


def test_many_contexts_take_little_memory(llava_run: Run, tmp_path: Path) -> None:
    """The limit for 100,000 contexts is 500 MB; that is a benchmark, generate_throughput.py."""
    count = 600

    def brief(handler: Handler, body: dict[str, Any]) -> None:
        handler.answer(f"A thing of the sort {hash(json.dumps(body))} lies here.")

    with serve(Service(otherwise=brief)) as service:
        recipe = write_recipe(tmp_path, ASKED, count, url=service.url, more="concurrency = 64")
        done = llava_run(recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "run" / "01-generate" / "detail.json")) == count
    peak = int(done.stdout.split()[-1]) / 1024
    assert peak < 200, f"{peak:.0f} MB"
