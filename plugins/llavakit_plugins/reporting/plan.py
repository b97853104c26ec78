"""A plan as `llava-run RECIPE --plan` prints it: the display `plan` of `llavakit.displays`."""

from __future__ import annotations

from llavakit import Plan, duration
from llavakit_plugins.reporting.plain import aligned


def render(plan: Plan) -> str:
    """Return the plan as text."""
    rows = [["part", "component", "parameters", "width"]]
    rows += [
        [name, part.component, _count(part.parameters), str(part.width)]
        for name, part in plan.parts.items()
    ]
    total = sum(part.parameters for part in plan.parts.values())
    size = "" if plan.own_model else "no model of its own"
    if plan.parts:
        size += "" if plan.own_model else "; that of its steps: "
        size += f"{_count(total)} parameters, {plan.visual_tokens} tokens an image"
    lines = [f"{plan.recipe}: {size}", "", *([*_table(rows), ""] if plan.parts else [])]
    rows = [["step", "trains", "samples", "tokens", "steps", "TFLOP", "memory", "time"]]
    known: list[float] = []
    for name, step in plan.steps.items():
        spent = None
        if step.tflop is not None and plan.tflops is not None:
            known.append(spent := step.tflop / plan.tflops / 3600)
        rows.append(
            [
                name,
                " + ".join(step.trained) or "-",
                *(_count(value) for value in (step.samples, step.tokens, step.steps)),
                "?" if step.tflop is None else f"{step.tflop:,.4g}",
                "?" if step.memory_gb is None else f"{step.memory_gb:,.3g} GB",
                "?" if spent is None else duration(spent * 3600),
            ]
        )
    lines += _table(rows)
    lines += _memory(plan)
    frozen = {
        name: ", ".join(part for part in plan.parts if part not in step.trained)
        for name, step in plan.steps.items()
        if plan.parts and step.trained
    }
    lines += ["", *(f"{name}: {parts or 'nothing'} frozen" for name, parts in frozen.items())]
    lines += [f"{name}: {step.note}" for name, step in plan.steps.items() if step.note]
    lines += _total(plan, known)
    charged = {n: step.cost_usd for n, step in plan.steps.items() if step.cost_usd is not None}
    lines += [f"services: {usd:,.2f} USD for {name}" for name, usd in charged.items()]
    need = max((step.memory_gb or 0.0 for step in plan.steps.values()), default=0.0)
    room = plan.machine.memory_gb
    if room is not None and need > room:
        lines.append(
            f"memory: {need:,.0f} GB are needed, one device has {room:,.0f} GB; fewer "
            "micro_batch_tokens or `recompute = true` need less, and more devices where the "
            "language model learns"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    """Return a table of what takes a device's memory, in GB; empty where no step knows it."""
    known = {name: step.memory for name, step in plan.steps.items() if step.memory}
    if not known:
        return []
    kinds = list(dict.fromkeys(kind for memory in known.values() for kind in memory))
    devices = plan.machine.devices
    rows = [["GB a device", f"{devices} device{'s' * (devices > 1)}", *kinds, "together"]]
    for name, memory in known.items():
        sizes = [*(memory.get(kind, 0.0) for kind in kinds), sum(memory.values())]
        rows.append([name, "", *(f"{size:,.3g}" for size in sizes)])
    return ["", *_table(rows)]


def _total(plan: Plan, known: list[float]) -> list[str]:
    """Return what all steps take together, of those whose hours are known."""
    if plan.tflops is None or not known:
        return ["total: no step says its time", "cost: not known, as the time is not"]
    source = "measured just now" if plan.measured else "as the recipe's [machine] says"
    rate = f"on {plan.machine.name} at {plan.tflops:,.3g} TFLOP/s ({source})"
    more = ", and what the steps with `?` take" if len(known) < len(plan.steps) else ""
    hours, price = sum(known), plan.machine.usd_per_hour
    usd = f"{hours * price:,.2f} USD at {price:g} USD/h"
    cost = usd if price else "no price; set machine.usd_per_hour"
    return [f"total: {duration(hours * 3600)} {rate}{more}", f"cost: {cost}"]


def _count(value: int | None) -> str:
    if value is None:
        return "?"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**4)):
        if value >= size:
            return f"{value / size if unit != 'k' else value / 1000:.3g}{unit}"
    return str(value)


def _table(rows: list[list[str]]) -> list[str]:
    """Return a table's lines: two columns of words, then numbers."""
    return aligned(rows, [column >= 2 for column in range(len(rows[0]))])
