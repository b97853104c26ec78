"""Correctness and speed of the kernels: sections of gpu.py.

Every fraction is of ceilings measured in the same call.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tests.benchmarks.gpu_session import (
    DEVICE,
    DRY,
    Session,
    clocks,
    milliseconds,
    peak_gigabytes,
    relative_error,
    replayed_milliseconds,
)
from torch import Tensor
from torch.nn import functional as F

from llavakit_kernels import (
    launch,
    linear_cross_entropy,
    linear_gelu,
    project_splice,
    row_sources,
)
from llavakit_kernels.linear_cross_entropy import liger
from llavakit_kernels.linear_gelu import triton as gelu_kernels
from llavakit_kernels.project_splice import (
    triton as forward_kernels,
    triton_backward as backward_kernels,
)

SCRIPT = str(Path(__file__).with_name("gpu.py"))

# --- data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A packed micro-batch: `batch` samples of `text` text tokens around one image each."""

    D: int
    E: int
    tokens: int  # visual tokens of an image
    batch: int
    text: int
    V: int = 32_000

    @property
    def N(self) -> int:
        return self.tokens * self.batch

    @property
    def T(self) -> int:
        return (self.tokens + self.text) * self.batch


@dataclass
class Data:
    """Random arguments at a shape. Ids at visual rows are valid, for the peers' sake."""

    shape: Shape
    features: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    embedding: Tensor
    rows: Tensor
    sources: Tensor
    grad: Tensor

    def spliced(self, features: Tensor | None = None, **options: Any) -> Tensor:
        return project_splice(
            self.features if features is None else features,
            self.weight,
            self.bias,
            self.ids,
            self.embedding,
            self.rows,
            sources=self.sources,
            **options,
        )


def random_data(shape: Shape, dtype: torch.dtype, shuffled: bool = False) -> Data:
    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=DEVICE) * scale).to(dtype)

    at = torch.arange(shape.T, device=DEVICE).view(shape.batch, -1)
    begin = min(5, shape.text)
    rows = at[:, begin : begin + shape.tokens].reshape(-1)
    if shuffled:
        rows = torch.randperm(shape.T, device=DEVICE)[: shape.N]
    ids = torch.randint(0, shape.V - 1, (shape.T,), device=DEVICE)
    ids[rows] = shape.V - 1
    return Data(
        shape,
        normal(shape.N, shape.D),
        normal(shape.E, shape.D, scale=shape.D**-0.5),
        normal(shape.E),
        ids,
        normal(shape.V, shape.E),
        rows,
        row_sources(rows, shape.T),
        normal(shape.T, shape.E),
    )


def shapes(brief: bool = False) -> Iterator[Shape]:
    """The shapes to measure, the most telling one first; `brief`: that one alone."""
    if DRY:
        yield Shape(D=16, E=32, tokens=4, batch=2, text=6, V=20)
        yield Shape(D=16, E=32, tokens=6, batch=2, text=6, V=20)
        return
    first = Shape(D=1024, E=5120, tokens=576, batch=32, text=300)
    yield first
    if brief:
        return
    for batch in (32, 64, 16):
        for E in (5120, 4096):
            for tokens, text in ((576, 300), (256, 22)):
                shape = Shape(D=1024, E=E, tokens=tokens, batch=batch, text=text)
                if shape != first:
                    yield shape


# --- sections ---------------------------------------------------------------------------------


def rates(session: Session) -> None:
    """The ceilings: a copy larger than the cache, and a product of random matrices."""
    size, edge = (2**20, 64) if DRY else (2**32, 8192)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * size / milliseconds(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(edge, edge, device=DEVICE).bfloat16() for _ in range(2))
    # long enough for the clocks to settle where the power limit lets them
    product = 2 * edge**3 / milliseconds(lambda: a @ b, repeat=600) * 1e3
    session.row("rates", copy_TBs=copied / 1e12, product_TFLOPs=product / 1e12, **clocks())


# Widths of a real model, which every fast path takes, and widths that none takes.
EVEN: dict[str, int] = {"D": 1024, "E": 5120}
ODD: dict[str, int] = {"D": 1001, "E": 4099}
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def correctness(session: Session, brief: bool = False) -> None:
    """Forward and backward at real sizes against float64, memory poisoned before.

    `brief`: in bfloat16 at the widths of a real model alone.
    """
    toy = Shape(D=24, E=40, tokens=5, batch=3, text=4, V=17)
    real = toy if DRY else Shape(**EVEN, tokens=576, batch=32, text=300)
    odd = toy if DRY else Shape(**ODD, tokens=577, batch=7, text=33, V=152_064)
    for dtype in (torch.bfloat16,) if brief else LIMITS:
        for shape, shuffled in ((real, False),) if brief else ((real, False), (odd, True)):
            _check_splice(session, random_data(shape, dtype, shuffled))
    _check_long_stream(session)


def _check_splice(session: Session, data: Data) -> None:
    dtype, shape = data.features.dtype, data.shape

    def report(what: str, actual: Tensor, expected: Tensor) -> None:
        session.row(
            "correctness",
            what=what,
            dtype=str(dtype).removeprefix("torch."),
            N=shape.N,
            T=shape.T,
            D=shape.D,
            E=shape.E,
            error=relative_error(actual, expected),
            limit=LIMITS[dtype],
        )

    _poison(shape.T * shape.E, dtype)
    wide = [tensor.double() for tensor in (data.features, data.weight, data.bias)]
    expected = torch.empty(shape.T, shape.E, dtype=torch.float64, device=DEVICE)
    text = (data.sources < 0).nonzero()[:, 0]
    expected[text] = data.embedding[data.ids[text]].double()
    expected[data.rows] = F.linear(*wide)
    report("forward", data.spliced(impl="triton"), expected)

    # What each configuration computes, and not only the one that tuning prefers.
    arguments = (data.features, data.weight, data.bias)
    rest = (data.ids, data.embedding, data.rows, data.sources)
    for config in product_tiles(data):
        out = torch.full((shape.T, shape.E), float("nan"), dtype=dtype, device=DEVICE)
        forward_kernels.forward(*arguments, *rest, out=out, config=config)
        report(f"forward {_short(config)}", out, expected)
    del expected, out

    leaves = [data.features, data.weight, data.bias, data.embedding]
    learning = [leaf.detach().requires_grad_() for leaf in leaves]
    grad_rows = data.grad[data.rows].double()
    for deterministic in (True, False):
        features, weight, bias, embedding = learning
        out = project_splice(
            features,
            weight,
            bias,
            data.ids,
            embedding,
            data.rows,
            sources=data.sources,
            impl="triton",
            deterministic=deterministic,
        )
        _poison(shape.T * shape.E, dtype)
        gradients = torch.autograd.grad(out, learning, data.grad)
        if deterministic:
            report("d features", gradients[0], grad_rows @ wide[1])
            report("d weight", gradients[1], grad_rows.t() @ wide[0])
            report("d bias", gradients[2], grad_rows.sum(0))
        table = torch.zeros(shape.V, shape.E, dtype=torch.float64, device=DEVICE)
        table.index_add_(0, data.ids[text], data.grad[text].double())
        report(f"d embedding, sorted={deterministic}", gradients[3], table)
        del table, out, gradients
    before = F.linear(*wide)
    share = 0.5 * torch.special.erfc(-before / 2**0.5)
    slope = share + before * torch.exp(-0.5 * before**2) / (2 * torch.pi) ** 0.5
    for save in (True, False):
        out, kept = gelu_kernels.forward(*arguments, save)
        report(f"gelu, saved={save}", out, before * share)
        if save:
            report("gelu's argument", kept, before)
    out = gelu_kernels.before_grad(data.grad[: shape.N], *arguments)
    report("d gelu, recomputed", out, data.grad[: shape.N].double() * slope)


def _poison(numel: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next output of this size is likely to get."""
    torch.full((numel,), float("nan"), dtype=dtype, device=DEVICE)


def _check_long_stream(session: Session) -> None:
    """A stream of more than 2^31 elements, compared at its ends."""
    T, E, D, V = (60, 32, 16, 20) if DRY else (2**31 // 4096 + 4096, 4096, 64, 128)
    rows = torch.cat([torch.arange(0, 10), torch.arange(T - 10, T)]).to(DEVICE)
    ids = torch.randint(0, V, (T,), device=DEVICE)
    features = torch.randn(20, D, device=DEVICE).bfloat16()
    weight = torch.randn(E, D, device=DEVICE).bfloat16()
    embedding = torch.randn(V, E, device=DEVICE).bfloat16()
    out = project_splice(features, weight, None, ids, embedding, rows, impl="triton")
    ends = torch.cat([torch.arange(0, 20), torch.arange(T - 20, T)]).to(DEVICE)
    expected = embedding[ids[ends]].double()
    expected[:10], expected[-10:] = (
        F.linear(features.double(), weight.double())[part] for part in (slice(10), slice(10, 20))
    )
    session.row(
        "correctness",
        what="over 2^31 elements",
        dtype="bfloat16",
        N=20,
        T=T,
        D=D,
        E=E,
        error=relative_error(out[ends], expected),
        limit=LIMITS[torch.bfloat16],
    )


def product_tiles(data: Data) -> list[Any]:
    return [launch.SMALL] if DRY else launch.PRODUCT_TILES[launch.family(data.features)]


def gelu_tiles(data: Data) -> list[Any]:
    return [launch.SMALL] if DRY else launch.GELU_TILES[launch.family(data.features)]


def weight_grad_tiles(data: Data) -> list[Any]:
    """The one in use, and for Hopper what else might be."""
    chosen = [launch.weight_grad_tile(data.features)]
    if DRY or launch.family(data.features) != "hopper":
        return chosen
    others = [(128, 256, 4, 8), (128, 256, 7, 8), (256, 128, 5, 8), (128, 128, 5, 4)]
    return chosen + [launch.tile(m, n, 64, warps, stages) for m, n, stages, warps in others]


def compile_jobs(brief: bool = False) -> dict[str, Callable[[], object]]:
    """Every variant of every kernel that the other sections launch, each launched once.

    `brief`: only those of the sections that measure time.
    """
    jobs: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16,) if brief else LIMITS:
        for widths in (EVEN,) if brief else (EVEN, ODD):
            toy = {"D": 24, "E": 40} if DRY else widths
            data = random_data(Shape(**toy, tokens=50, batch=2, text=7, V=100), dtype)
            arguments = (data.features, data.weight, data.bias)
            rest = (data.ids, data.embedding, data.rows, data.sources)

            def add(
                what: str,
                config: Any,
                run: Callable[..., object],
                *given: Any,
                kind: str = f"{dtype} {widths}",
            ) -> None:
                name = f"{what}, {kind}, {_short(config)}"
                jobs[name] = functools.partial(run, *given, config=config)

            for config in product_tiles(data):
                add("forward", config, forward_kernels.forward, *arguments, *rest)
                rows = (data.grad, data.weight, data.rows)
                add("d features", config, backward_kernels.features_grad, *rows)
            for config in weight_grad_tiles(data):
                rows = (data.grad, data.features, data.rows)
                add("d weight", config, backward_kernels.weight_grad, *rows, True)
            for config in gelu_tiles(data):
                for save in (True, False):
                    add(f"gelu, save={save}", config, gelu_kernels.forward, *arguments, save)
                grad = data.grad[: data.shape.N]
                add("d gelu", config, gelu_kernels.before_grad, grad, *arguments)
    return jobs


def compilation(session: Session, brief: bool = False) -> None:
    """Fill Triton's cache from many processes at once: one after another would take minutes."""
    workers = 1 if DRY else max(1, min(14, (os.cpu_count() or 2) - 2))
    command = [sys.executable, SCRIPT] + ["--dry-run"] * DRY + ["--brief"] * brief
    running = [
        subprocess.Popen(
            [*command, "--compile", f"{worker}/{workers}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for worker in range(workers)
    ]
    failed = 0
    for process in running:
        said, _ = process.communicate()
        jobs = [line for line in said.splitlines() if line.startswith(_FAILED)]
        failed += len(jobs)
        for line in jobs:
            session.row("compilation: failed", job=line.removeprefix(_FAILED))
        if process.returncode:  # it died of the job that it named last
            failed += 1
            last = said.splitlines()[-12:]
            session.row("compilation: failed", code=process.returncode, said=last)
    session.row("compilation", variants=len(compile_jobs(brief)), workers=workers, failed=failed)
    if failed:
        session.say(f"compilation: {failed} jobs failed, named in results.json")


_FAILED = "failed: "


def compile_share(share: str, brief: bool) -> None:
    """Run every n-th job; one that fails is named, and the others go on."""
    worker, workers = map(int, share.split("/"))
    for name, job in list(compile_jobs(brief).items())[worker::workers]:
        print(f"{name} ...", flush=True)
        try:
            job()
            if not DRY:
                torch.cuda.synchronize()
        except triton.runtime.errors.OutOfResources:  # a tile for a larger chip: tuning skips it
            continue
        except Exception as error:
            said = " ".join(str(error).split())
            print(f"{_FAILED}{name}: {type(error).__name__}: {said[:300]}", flush=True)


def _short(config: Any) -> str:
    sizes = "x".join(str(config.kwargs[f"BLOCK_{letter}"]) for letter in "MNK")
    more = "".join(
        f" {name.lower()}={config.kwargs[name]}"
        for name in ("FLATTEN", "PIECES", "PER_SM")
        if name in config.kwargs
    )
    return f"{sizes} warps={config.num_warps} stages={config.num_stages}{more}"


# The ways to splice. Each takes the data and the projected features' function, and gives [T, E].

Project = Callable[[Tensor], Tensor]


def by_index_copy(data: Data, project: Project) -> Tensor:
    """The best by hand: a gather of the stream, a product, one index copy."""
    stream = data.embedding.index_select(0, data.ids)
    return stream.index_copy_(0, data.rows, project(data.features))


def by_masked_scatter(data: Data, project: Project) -> Tensor:
    """As transformers' LlavaModel does."""
    stream = F.embedding(data.ids, data.embedding)
    mask = (data.ids == data.shape.V - 1).unsqueeze(-1).expand_as(stream)
    return stream.masked_scatter(mask, project(data.features).to(stream.dtype))


def by_cat(data: Data, project: Project) -> Tensor:
    """As the original's prepare_inputs: sample by sample, text, image, text."""
    visual = project(data.features).view(data.shape.batch, data.shape.tokens, -1)
    samples = []
    for ids, image in zip(data.ids.view(data.shape.batch, -1), visual, strict=True):
        begin = int((ids == data.shape.V - 1).nonzero()[0, 0])
        before = F.embedding(ids[:begin], data.embedding)
        after = F.embedding(ids[begin + data.shape.tokens :], data.embedding)
        samples.append(torch.cat([before, image, after]))
    return torch.stack(samples).view(data.shape.T, -1)


@functools.cache
def compiled() -> Any:
    return torch.compile(
        lambda features, weight, bias, ids, embedding, rows: embedding.index_select(
            0, ids
        ).index_copy(0, rows, F.linear(features, weight, bias)),
        dynamic=True,
        backend="eager" if DRY else "inductor",
    )


def splice(session: Session, brief: bool = False) -> None:
    """linear: one product into the stream; weight and bias learn."""
    for shape in shapes(brief):
        if not session.time_for("splice", 8):
            return
        data = random_data(shape, torch.bfloat16)
        weight, bias = (tensor.detach().requires_grad_() for tensor in (data.weight, data.bias))
        data.weight, data.bias = weight, bias

        def project(features: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return F.linear(features, weight, bias)

        ways: dict[str, Callable[[], Tensor]] = {
            "ours": lambda data=data: data.spliced(),  # type: ignore[misc]
            "torch.compile": lambda data=data: compiled()(  # type: ignore[misc]
                data.features, data.weight, data.bias, data.ids, data.embedding, data.rows
            ),
            "index_copy": functools.partial(by_index_copy, data, project),
            "masked_scatter": functools.partial(by_masked_scatter, data, project),
            "cat loop": functools.partial(by_cat, data, project),
        }
        element = 2
        product = 2 * shape.N * shape.D * shape.E
        read = (shape.N * shape.D + shape.E * shape.D + (shape.T - shape.N) * shape.E) * element
        forward = max(product / session.flops, (read + shape.T * shape.E * element) / session.bytes)
        again = (shape.N * (shape.D + shape.E) + shape.E * shape.D) * element
        backward = max(product / session.flops, again / session.bytes)
        _compare(
            session, "splice", shape, ways, [weight, bias], data.grad, forward * 1e3, backward * 1e3
        )
        del data, ways, weight, bias
    _goals(
        session,
        "splice",
        {
            "masked_scatter / ours, forward": 3.5,
            "index_copy / ours, forward": 1.2,
            "of the limit, forward": 0.70,
            "masked_scatter / ours, both": 5.0,
        },
    )


def mlp(session: Session, brief: bool = False) -> None:
    """mlp: a hidden layer with GELU, then the product into the stream; both layers learn."""
    for shape in shapes(brief):
        if not session.time_for("mlp", 8):
            return
        data = random_data(shape, torch.bfloat16)
        first = data.weight.detach().requires_grad_()
        first_bias = data.bias.detach().requires_grad_()
        second = torch.randn(shape.E, shape.E, device=DEVICE).mul_(shape.E**-0.5).bfloat16()
        second.requires_grad_()
        second_bias = torch.zeros_like(data.bias).requires_grad_()
        learning = [first, first_bias, second, second_bias]

        def project(features: Tensor, learning: list[Tensor] = learning) -> Tensor:
            hidden = F.gelu(F.linear(features, learning[0], learning[1]))
            return F.linear(hidden, learning[2], learning[3])

        def ours(
            data: Data = data, learning: list[Tensor] = learning, recompute: bool = False
        ) -> Tensor:
            hidden = linear_gelu(data.features, learning[0], learning[1], recompute=recompute)
            return project_splice(
                hidden,
                learning[2],
                learning[3],
                data.ids,
                data.embedding,
                data.rows,
                sources=data.sources,
            )

        ways: dict[str, Callable[[], Tensor]] = {
            "ours": ours,
            "recomputed": functools.partial(ours, recompute=True),
            "index_copy": functools.partial(by_index_copy, data, project),
            "masked_scatter": functools.partial(by_masked_scatter, data, project),
        }
        products = 2 * shape.N * shape.E * (shape.D + shape.E)
        forward = products / session.flops
        backward = 2 * shape.N * shape.E * (shape.D + 2 * shape.E) / session.flops
        _compare(session, "mlp", shape, ways, learning, data.grad, forward * 1e3, backward * 1e3)
        del data, ways, learning, first, second
    _goals(
        session,
        "mlp",
        {"masked_scatter / ours, forward": 1.4, "index_copy / ours, forward": 1.0},
    )


def _compare(
    session: Session,
    section: str,
    shape: Shape,
    ways: dict[str, Callable[[], Tensor]],
    learning: list[Tensor],
    grad: Tensor,
    forward_limit: float,
    backward_limit: float,
) -> None:
    """Time the ways forward (without autograd) and forward with backward, in milliseconds."""
    expected: Tensor | None = None
    for name, way in ways.items():

        def forward(way: Callable[[], Tensor] = way) -> None:
            with torch.no_grad():
                way()

        def both(way: Callable[[], Tensor] = way) -> None:
            torch.autograd.grad(way(), learning, grad)

        try:
            with torch.no_grad():
                out = way()
            expected = out if expected is None else expected
            forward_ms, both_ms = milliseconds(forward), milliseconds(both)
            replayed = name in _REPLAYED
            forward_graph_ms = replayed_milliseconds(forward) if replayed else float("nan")
        except Exception as error:
            if name == "ours":
                raise
            session.row(section, E=shape.E, batch=shape.batch, way=name, failed=repr(error)[:200])
            continue
        session.row(
            section,
            E=shape.E,
            visual=shape.tokens,
            text=shape.text,
            batch=shape.batch,
            way=name,
            forward_ms=forward_ms,
            of_limit=forward_limit / forward_ms,
            forward_graph_ms=forward_graph_ms,
            of_limit_graph=forward_limit / forward_graph_ms,
            both_ms=both_ms,
            both_of_limit=(forward_limit + backward_limit) / both_ms,
            peak_GB=peak_gigabytes(both),
            differs=relative_error(out, expected) if out is not expected else 0.0,
        )


_REPLAYED = ("ours", "index_copy")  # the others wait for the device


def _goals(session: Session, section: str, goals: dict[str, float]) -> None:
    """The issue's goals beside what was measured: median, and the worst shape."""
    by_shape: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in session.results.get(section, []):
        if "failed" in row:
            continue
        key = (row["E"], row["visual"], row["text"], row["batch"])
        by_shape.setdefault(key, {})[row["way"]] = row
    for goal, wanted in goals.items():
        part = "both" if goal.endswith("both") else "forward"
        measured = [
            ways["ours"]["of_limit"]
            if goal.startswith("of the limit")
            else ways[goal.split(" / ")[0]][f"{part}_ms"] / ways["ours"][f"{part}_ms"]
            for ways in by_shape.values()
            if goal.split(" / ")[0] in ways or goal.startswith("of the limit")
        ]
        if measured:
            session.goal(
                section,
                goal,
                wanted,
                statistics.median(measured),
                worst=min(measured),
                best=max(measured),
            )


def configurations(session: Session) -> None:
    """Every tile of every kernel, to see whether the choices of launch.py are right here."""
    shape = next(iter(shapes())) if DRY else Shape(**EVEN, tokens=576, batch=32, text=300)
    data = random_data(shape, torch.bfloat16)
    arguments = (data.features, data.weight, data.bias)
    rest = (data.ids, data.embedding, data.rows, data.sources)
    product = 2 * shape.N * shape.D * shape.E
    kernels: dict[str, tuple[list[Any], Callable[[Any, bool], object]]] = {
        "forward": (
            product_tiles(data),
            lambda config, tma: forward_kernels.forward(*arguments, *rest, config=config, tma=tma),
        ),
        "gelu": (
            gelu_tiles(data),
            lambda config, tma: gelu_kernels.forward(*arguments, True, config=config, tma=tma),
        ),
        "d features": (
            product_tiles(data),
            lambda config, tma: backward_kernels.features_grad(
                data.grad, data.weight, data.rows, config=config, tma=tma
            ),
        ),
        "d weight": (
            weight_grad_tiles(data),
            lambda config, tma: backward_kernels.weight_grad(
                data.grad, data.features, data.rows, True, config=config, tma=tma
            ),
        ),
    }
    for name, (configs, run) in kernels.items():
        # Without descriptors only the first: those variants are not compiled yet.
        for config, tma in [(config, True) for config in configs] + [(configs[0], False)]:
            if not session.time_for("configurations", 4):
                return
            try:
                taken = milliseconds(functools.partial(run, config, tma), repeat=50)
            except Exception as error:  # a tile that does not fit this chip is a finding
                session.row("configurations", kernel=name, tile=_short(config), failed=repr(error))
                continue
            session.row(
                "configurations",
                kernel=name,
                tile=_short(config),
                tma=tma,
                ms=taken,
                of_product_rate=product / session.flops * 1e3 / taken,
            )


def loss(session: Session) -> None:
    """The head's loss with its gradients: chunks, liger-kernel, and all logits at once."""
    cases = [
        (4096, 4096, 32_000),
        (9600, 4096, 32_000),
        (9600, 5120, 32_000),
        (4096, 3584, 152_064),
    ]
    for M, E, V in [(20, 16, 30)] if DRY else cases:
        for head_learns in (True, False):
            if not session.time_for("loss", 8):
                return
            hidden = torch.randn(M, E, device=DEVICE).bfloat16().requires_grad_()
            head = (torch.randn(V, E, device=DEVICE) * E**-0.5).bfloat16()
            head.requires_grad_(head_learns)
            targets = torch.randint(0, V, (M,), device=DEVICE)
            leaves = [hidden, head] if head_learns else [hidden]

            def whole(hidden: Tensor = hidden, head: Tensor = head, to: Tensor = targets) -> Tensor:
                return F.cross_entropy(F.linear(hidden, head).float(), to, reduction="sum")

            ways: dict[str, Callable[[], Tensor]] = {"all logits": whole}
            for impl in ("reference", "liger") if liger.INSTALLED and not DRY else ("reference",):
                ways[impl] = functools.partial(
                    linear_cross_entropy, hidden, head, targets, reduction="sum", impl=impl
                )
            products = 2 * M * E * V * (3 if head_learns else 2)
            expected = float(whole().detach())
            for name, way in ways.items():

                def both(way: Callable[[], Tensor] = way, leaves: list[Tensor] = leaves) -> object:
                    return torch.autograd.grad(way() / 1000, leaves)

                taken = milliseconds(both, repeat=100)
                session.row(
                    "loss",
                    M=M,
                    E=E,
                    V=V,
                    head="learns" if head_learns else "frozen",
                    way=name,
                    ms=taken,
                    of_product_rate=products / session.flops * 1e3 / taken,
                    peak_GB=peak_gigabytes(both),
                    differs=abs(float(way().detach()) - expected) / abs(expected),
                )
            del hidden, head, targets, leaves, ways


def sanitizer(session: Session) -> None:
    """compute-sanitizer's memcheck over every kernel at a small size, where it works."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not DRY and not Path(tool).exists():
        session.row("sanitizer", tool="memcheck", outcome="compute-sanitizer is not installed here")
        return
    command = [sys.executable, SCRIPT, "--small-case"]
    command += ["--dry-run"] if DRY else []
    command = command if DRY else [tool, "--tool", "memcheck", "--error-exitcode", "9", *command]
    limit = min(120.0, max(session.left(), 30.0))
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            # Each tensor an allocation of its own: an access past its end is then one past memory.
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    except subprocess.TimeoutExpired:
        session.row("sanitizer", tool="memcheck", outcome=f"did not end in {limit:.0f} s")
        return
    said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    if run.returncode:
        print("\n".join(said[-40:]))
    session.row(
        "sanitizer",
        tool="memcheck",
        outcome=f"exit code {run.returncode}: {said[-1] if said else 'no output'}",
    )


def small_case() -> None:
    """What the sanitizer watches: every kernel once for each way to load, at an odd size."""
    shape = (
        Shape(D=24, E=40, tokens=5, batch=3, text=4, V=17)
        if DRY
        else Shape(D=144, E=528, tokens=101, batch=3, text=21, V=50)
    )
    data = random_data(shape, torch.bfloat16, shuffled=True)
    product, polynomial = product_tiles(data)[::4], gelu_tiles(data)[:1]
    arguments = (data.features, data.weight, data.bias)
    for tma in (True, False):
        for config in product:
            given = (*arguments, data.ids, data.embedding, data.rows, data.sources)
            forward_kernels.forward(*given, config=config, tma=tma)
            backward_kernels.features_grad(
                data.grad, data.weight, data.rows, config=config, tma=tma
            )
        backward_kernels.weight_grad(data.grad, data.features, data.rows, True, tma=tma)
        for config in polynomial:
            gelu_kernels.forward(*arguments, True, config=config, tma=tma)
            gelu_kernels.before_grad(data.grad[: shape.N], *arguments, config=config, tma=tma)
    for deterministic in (True, False):
        torch.ops.llavakit.project_splice_embedding_grad(
            data.grad, data.ids, data.sources, shape.V, shape.N, "triton", deterministic
        )
    if not DRY:
        torch.cuda.synchronize()
    print("every kernel ran")
