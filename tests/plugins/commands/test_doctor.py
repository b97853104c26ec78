"""`llava-run doctor` and `completion`: what is said of this environment, and to a shell."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from tests.conftest import Command


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that has libraries be absent, or of another version."""

    def hide(**libraries: str | None) -> None:
        def found(name: str) -> str:
            known = libraries.get(name.replace("-", "_"), "")
            if known is None:
                raise PackageNotFoundError(name)
            return known or version(name)

        monkeypatch.setattr(importlib.metadata, "version", found)

    return hide


def test_it_says_what_is_there(llava_run: Command) -> None:
    code, out, _ = llava_run("doctor", "--json")
    facts = json.loads(out)
    assert code == 0, facts["missing"]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert torch.device(facts["device"]["auto"])
    assert facts["broken plugins"] == {}
    assert facts["extras"]["onnx"]


def test_what_is_missing_comes_with_the_command_that_brings_it(
    llava_run: Command, without: Callable[..., None]
) -> None:
    without(onnxscript=None, tiktoken="0.1")
    code, out, _ = llava_run("doctor", "--json")
    facts = json.loads(out)
    commands = {item["what"].partition(":")[0]: item for item in facts["missing"]}
    assert code == 0, "an extra need not be there"
    assert not facts["extras"]["onnx"]
    assert commands["extra onnx"]["command"] == "pip install 'llavakit[onnx]'"
    assert "onnxscript>=0.6 (not installed)" in commands["extra onnx"]["what"]
    assert "onnxruntime" not in commands["extra onnx"]["what"]
    assert "tiktoken>=0.12 (0.1)" in commands["extra openai"]["what"]
    _, shown, _ = llava_run("doctor")
    assert "pip install 'llavakit[openai]'" in shown


def test_either_onnxruntime_will_do(llava_run: Command, without: Callable[..., None]) -> None:
    without(onnxruntime_gpu=None, onnxruntime="1.31.0")
    assert json.loads(llava_run("doctor", "--json").out)["extras"]["onnx"]


def test_a_library_that_is_required_and_too_old_is_exit_code_2(
    llava_run: Command, without: Callable[..., None]
) -> None:
    without(transformers="4.40.0")
    code, out, _ = llava_run("doctor")
    assert code == 2
    assert "transformers>=5.17 (4.40.0)" in out
    assert "pip install -U 'transformers>=5.17'" in out


def test_a_broken_plugin_is_named(llava_run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_PLUGINS", "no-such-plugin")
    code, out, _ = llava_run("doctor", "--json")
    assert code == 0
    assert "no-such-plugin" in json.dumps(json.loads(out)["broken plugins"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_its_flags(llava_run: Command, shell: str) -> None:
    code, script, _ = llava_run("completion", shell)
    assert code == 0
    for word in ("check-data", "completion", "export", "run", "resume", "max-new-tokens"):
        assert word in script
    if shutil.which(shell) and shell != "tcsh":
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_by_it(llava_run: Command, tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(llava_run("completion", "bash").out)
    program = (
        f"source {script}; COMP_WORDS=(llava-run exp); COMP_CWORD=1; "
        "$(complete -p llava-run | sed 's/.*-F \\([^ ]*\\).*/\\1/') llava-run exp llava-run; "
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["export"]
