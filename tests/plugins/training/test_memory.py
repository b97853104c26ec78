"""What a plan says of memory and network, for any number of devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(llava_run: Callable[..., Any]) -> Plan:
    """A function that returns the plan of stage 2 of LLaVA-1.5's recipe for 13B, and its text."""

    @cache
    def ask(devices: int, *sets: str) -> dict[str, Any]:
        command = ["llava-v1.5-13b", "--plan", "--json", "--devices", devices]
        code, out, err = llava_run(*command, *(word for s in sets for word in ("--set", s)))
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return ask


def stage_2(plan: dict[str, Any]) -> dict[str, Any]:
    step: dict[str, Any] = plan["steps"]["02-finetune"]
    return step


def test_state_is_divided_by_the_devices_that_share_it(plan: Plan) -> None:
    """Mixed precision with Adam takes 16 bytes a parameter (ZeRO, arXiv 1910.02054, 3.1)."""
    one = plan(1)
    learn = one["parts"]["language"]["parameters"] + one["parts"]["connector"]["parameters"]
    encoder = 2 * one["parts"]["vision"]["parameters"] / 1e9  # frozen, in bfloat16, on each device
    for devices, sets, parts in (
        (1, (), 1),
        (8, (), 8),
        (64, (), 64),
        (64, ("steps.finetune.parallel={ replicate = 8 }",), 8),
        (64, ("steps.finetune.shard=false",), 1),
    ):
        found = plan(devices, *sets)
        memory = stage_2(found)["memory"]
        state = memory["weights"] + memory["gradients"] + memory["moments"]
        # ZeRO counts a bfloat16 copy of weights and gradients; here both are float32 alone
        assert state - encoder == pytest.approx(16 * learn / parts / 1e9, rel=1e-3)
        assert (memory["gathered"] > 0) == (parts > 1)
        assert memory["activations"] == stage_2(one)["memory"]["activations"]
    assert stage_2(plan(64))["memory_gb"] == pytest.approx(
        sum(stage_2(plan(64))["memory"].values())
    )


def test_time_and_price_of_more_devices(plan: Plan) -> None:
    eight, many = plan(8), plan(64)
    assert many["tflops"] == 8 * eight["tflops"]
    assert many["machine"]["usd_per_hour"] == pytest.approx(8 * eight["machine"]["usd_per_hour"])
    assert many["machine"]["devices"] == 64


def test_what_a_step_sends_over_the_network(plan: Plan) -> None:
    """ZeRO-3 moves 3 times the weights (arXiv 1910.02054, 7.2): here in 2, 2 and 4 bytes."""
    one = plan(1)
    learn = one["parts"]["language"]["parameters"] + one["parts"]["connector"]["parameters"]
    assert "receives" not in stage_2(one)["note"]
    note = stage_2(plan(64))["note"]  # 128 samples, two a device: one micro-batch
    assert f"receives in each step {8 * learn * 63 / 64 / 1e9:.3g} GB from those" in note
    groups = stage_2(plan(64, "steps.finetune.parallel={ replicate = 8 }"))["note"]
    assert f"{8 * learn * 7 / 8 / 1e9:.3g} GB from those" in groups
    assert f"{8 * learn / 8 * 7 / 8 / 1e9:.3g} GB of gradients from the other copies" in groups


def test_people_get_a_table(llava_run: Callable[..., Any], refused: Callable[..., str]) -> None:
    _, out, _ = llava_run("llava-v1.5-13b", "--plan", "--devices", "64")
    (head,) = [line for line in out.splitlines() if line.startswith("GB a device")]
    assert head.split()[3:] == [
        "64", "devices", "weights", "gradients", "moments", "gathered", "activations", "together",
    ]  # fmt: skip
    assert "64 devices like those of 8x A100-80G" in out
    assert "--devices is about a plan" in refused("tiny", "--devices", "4")
    assert "--json is about a plan" in refused("tiny", "--json")
    assert "one device at least" in refused("tiny", "--plan", "--devices", "0")
