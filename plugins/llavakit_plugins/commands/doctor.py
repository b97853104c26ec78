"""`llava-run doctor`: says what this installation can do, what is missing, and what brings it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavakit.contracts.commands import Commands

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PACKAGE = "llavakit"
_SAME = {"onnxruntime-gpu": "onnxruntime"}  # either gives the module
_INTERNAL = ("all",)  # extras that only gather others


def add(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor", help="say what is installed, what is missing, and the command that brings it"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)


@dataclass(frozen=True)
class Need:
    """One library that something needs."""

    library: str
    wanted: str  #: Versions, such as `>=2.11`; empty where any will do.
    found: str | None

    @property
    def is_met(self) -> bool:
        from packaging.specifiers import SpecifierSet

        # True: a pre-release, such as a nightly torch, counts as its version
        return self.found is not None and SpecifierSet(self.wanted).contains(self.found, True)

    def __str__(self) -> str:
        return f"{self.library}{self.wanted} ({self.found or 'not installed'})"


def _doctor(arguments: argparse.Namespace) -> int:
    import json

    from llavakit import printable_json, shown

    required, extras = read_needs()
    facts: dict[str, Any] = {
        "versions": _versions(),
        "device": _device(),
        "extras": {name: all(need.is_met for need in needs) for name, needs in extras.items()},
        "missing": _missing(required, extras),
        "broken plugins": {},
    }
    if facts["device"]["auto"] is not None:  # plugins with networks import torch
        facts["broken plugins"] = _broken()
    if arguments.json:
        print(printable_json(json.dumps(facts, indent=2)))
    else:
        print(shown("\n".join(_lines(facts, required, extras))))
    return 2 if any(not need.is_met for need in required) else 0


def read_needs() -> tuple[Sequence[Need], Mapping[str, Sequence[Need]]]:
    """Return what the installed package says it needs here: always, and for each of its extras."""
    from importlib.metadata import metadata, requires

    from packaging.requirements import Requirement

    every = [Requirement(line) for line in requires(_PACKAGE) or ()]
    names = metadata(_PACKAGE).get_all("Provides-Extra") or []
    always = [need for need in every if _holds(need, "")]
    extras = {
        name: [_need(r) for r in every if _holds(r, name) and r not in always]
        for name in sorted(set(names) - set(_INTERNAL))
    }
    return [_need(requirement) for requirement in always], extras


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _need(requirement: Requirement) -> Need:
    name = requirement.name
    found = _version(name) or _version(_SAME.get(name, name))
    return Need(name, str(requirement.specifier), found)


def _version(library: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    import platform

    shown = ("llavakit", "torch", "transformers", "tokenizers", "triton", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: found for name in shown if (found := _version(name))},
    }


def _device() -> dict[str, Any]:
    """Return what a recipe's `device = "auto"` takes, and what torch knows of the others."""
    try:
        import torch
    except Exception as error:  # a torch that is broken is what somebody runs this for
        return {"auto": None, "note": f"torch cannot be imported: {error}"}
    from importlib.util import find_spec

    from llavakit import pick_device

    facts: dict[str, Any] = {"auto": str(pick_device("auto")), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = [f"{d.name}, {d.total_memory / 1e9:.0f} GB" for d in devices]
        facts["flash-attn"] = find_spec("flash_attn") is not None
    # the usual reason for a slow first training: pip took torch's build for CPUs
    elif torch.version.cuda is None and _has_nvidia():
        facts["note"] = (
            "an NVIDIA GPU is there, but this torch is built for CPUs; install torch for CUDA as "
            "pytorch.org/get-started says"
        )
    elif _has_nvidia():
        facts["note"] = (
            f"an NVIDIA GPU is there, but torch (CUDA {torch.version.cuda}) cannot use it: update "
            "its driver, or run `nvidia-smi` to see what is wrong"
        )
    return facts


def _has_nvidia() -> bool:
    import shutil
    from pathlib import Path

    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def _missing(
    required: Sequence[Need], extras: Mapping[str, Sequence[Need]]
) -> list[dict[str, str]]:
    """Return what is not met, each with the command that brings it."""
    missing = [
        {"what": str(need), "command": f"pip install -U '{need.library}{need.wanted}'"}
        for need in required
        if not need.is_met
    ]
    for name, needs in extras.items():
        if lacking := [need for need in needs if not need.is_met]:
            what = f"extra {name}: {', '.join(map(str, lacking))}"
            missing.append({"what": what, "command": f"pip install '{_PACKAGE}[{name}]'"})
    return missing


def _broken() -> dict[str, str]:
    """Return the plugins that cannot be used, and why."""
    import logging

    from llavakit import PluginError, Registry, all_kinds

    log = logging.getLogger("llavakit")
    before = log.level
    log.setLevel(logging.ERROR)  # what is broken is said below
    try:
        registry = Registry.installed()
        broken = {name: str(fault) for name, fault in registry.broken.items()}
        for kind in all_kinds():
            try:
                registry.all(kind)
            except PluginError as error:
                broken[kind.__name__] = str(error)
        return broken
    except PluginError as error:
        return {"LLAVA_PLUGINS": str(error)}
    finally:
        log.setLevel(before)


def _lines(
    facts: Mapping[str, Any], required: Sequence[Need], extras: Mapping[str, Sequence[Need]]
) -> list[str]:
    lines = ["versions", *(f"  {name:14}{value}" for name, value in facts["versions"].items())]
    lines.append("device")
    for name, value in facts["device"].items():
        for item in value if isinstance(value, list) else [value]:
            lines.append(f"  {name:14}{item}")
    met = sum(need.is_met for need in required)
    lines.append(f"required libraries: {met} of {len(required)}")
    lines.append("extras")
    for name, needs in extras.items():
        state = "ready" if facts["extras"][name] else "missing"
        lines.append(f"  {name:14}{state:9}{', '.join(need.library for need in needs)}")
    for name, error in facts["broken plugins"].items():
        lines.append(f"broken plugin {name}: {error}")
    if facts["missing"]:
        lines.append("missing")
    for item in facts["missing"]:
        lines += [f"  {item['what']}", f"    {item['command']}"]
    return lines
