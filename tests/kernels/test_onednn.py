"""Counted by oneDNN against float64, and torch's own wherever oneDNN's do not serve."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.products import Counted, here
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from llavakit_kernels import linear_cross_entropy, onednn


def near(actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape
    size = exact.norm() + exact.numel() ** 0.5  # a sum may cancel, its error does not
    assert (actual.double() - exact).norm() <= 1e-5 * size


def laid_out(how: str, *shape: int, generator: torch.Generator) -> Tensor:
    """Return random numbers that lie in memory so."""
    *outer, rows, columns = shape
    if how == "by columns":
        return torch.randn(*outer, columns, rows, generator=generator).transpose(-1, -2)
    if how == "with gaps":
        return torch.randn(*outer, 2 * rows, 3 * columns, generator=generator)[..., ::2, 1::3]
    if how == "repeated":
        return torch.randn(*outer, 1, columns, generator=generator).expand(shape)
    return torch.randn(shape, generator=generator)


LAYOUTS = ("by rows", "by columns", "with gaps", "repeated")


@here
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    rows=st.sampled_from((1, 2, 3, 7, 16, 33)),
    I=st.sampled_from((1, 2, 5, 16, 24, 65)),
    O=st.sampled_from((1, 3, 8, 17, 64, 96)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    with_bias=st.booleans(),
    learns=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_products_and_gradients_are_those_of_float64(
    shape: list[int],
    rows: int,
    I: int,  # noqa: E741
    O: int,  # noqa: E741
    layouts: tuple[str, str],
    with_bias: bool,
    learns: tuple[bool, bool],
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = laid_out(layouts[0], *shape, rows, I, generator=random).requires_grad_(learns[0])
    weight = laid_out(layouts[1], O, I, generator=random).requires_grad_(learns[1])
    bias = torch.randn(O, generator=random).requires_grad_(learns[1]) if with_bias else None
    leaves = [x, weight, *(() if bias is None else (bias,))]
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    with Counted() as counted:
        out = onednn.linear(x, weight, bias)
    assert (counted.onednn, counted.torch) == (1, 0)
    near(out, F.linear(*exact))
    wanted = [number for number, leaf in enumerate(leaves) if leaf.requires_grad]
    if not wanted:
        assert not out.requires_grad
        return
    grad = torch.randn(out.shape, generator=random)
    with Counted() as counted:
        mine = torch.autograd.grad(out, [leaves[number] for number in wanted], grad)
    assert (counted.onednn, counted.torch) == (sum(learns), 0)
    theirs = torch.autograd.grad(
        F.linear(*exact), [exact[number] for number in wanted], grad.double()
    )
    for one, other in zip(mine, theirs, strict=True):
        near(one, other)


@here
def test_one_row_without_an_axis_for_rows() -> None:
    x, weight = torch.randn(5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    out = onednn.linear(x, weight)
    out.sum().backward()
    near(out, F.linear(x.double(), weight.double()))
    assert x.grad is not None
    near(x.grad, weight.double().sum(0))
    assert weight.grad is not None
    near(weight.grad, x.double().expand(3, 5))


@here
@pytest.mark.parametrize("M", [5, 300])
def test_the_loss_multiplies_so_in_any_number_of_chunks(M: int) -> None:
    hidden, head = torch.randn(M, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    targets = torch.randint(0, 40, (M,))
    for rows in (None, M, 7):
        # a mode sees the loss as one operator
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            loss = linear_cross_entropy(hidden, head, targets, chunk_rows=rows, impl="onednn")
            torch.autograd.grad(loss, (hidden, head))
        counts = {event.key: event.count for event in seen.key_averages()}
        chunks = 1 if rows is None else -(-M // rows)
        assert counts["mkldnn::_linear_pointwise"] == 3 * chunks
        assert not {"aten::mm", "aten::addmm", "aten::addmm_"} & counts.keys()


@here
def test_recomputing_gives_the_same_bits_and_so_does_a_copy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(onednn.Linear(24, 48), nn.GELU(), onednn.Linear(48, 24))
    other = copy.deepcopy(net)
    assert type(other[0]) is onednn.Linear
    x = torch.randn(2, 9, 24)
    net(net(x)).square().sum().backward()  # each weight is used twice
    checkpoint(lambda x: other(other(x)), x, use_reentrant=False).square().sum().backward()
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.equal(one.grad, two.grad)


def exact_pair(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, **options), torch.randn(4, shape[-1], **options)


class Wrapped(Tensor):
    """A tensor of another type, as DTensor or weights of 4 bits are."""


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        exact_pair(3, 5, dtype=torch.float64),
        exact_pair(3, 5, dtype=torch.bfloat16),
        exact_pair(0, 5),
        (torch.randn(3, 5), torch.randn(4, 5).as_subclass(Wrapped)),
        exact_pair(3, 5, device="meta"),
    ],
    ids=["float64", "bfloat16", "no rows", "another type", "meta"],
)
def test_what_it_does_not_serve_is_torchs(x: Tensor, weight: Tensor) -> None:
    with Counted() as counted:
        out = onednn.linear(x, weight)
    assert counted.onednn == 0
    expected = F.linear(x, weight)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert out.is_meta or torch.equal(out, expected)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One device, which is enough for tensors that are divided in name."""
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@here
def test_divided_tensors_are_torchs_and_what_is_gathered_of_them_is_not(mesh: DeviceMesh) -> None:
    layer = onednn.Linear(5, 4)
    x = torch.randn(3, 5)
    usual = F.linear(x, layer.weight, layer.bias)
    usual.square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    divided = onednn.Linear(5, 4)
    for name, parameter in layer.named_parameters():
        setattr(
            divided, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
        )
    with Counted() as counted:
        out = divided(distribute_tensor(x, mesh, [Replicate()]))
        out.square().sum().backward()
    assert counted.onednn == 0
    assert isinstance(out, DTensor)
    assert torch.equal(out.full_tensor(), usual)
    for parameter, grad in zip(divided.parameters(), expected, strict=True):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), grad)
    fully_shard(layer, mesh=mesh)
    with Counted() as counted:
        out = layer(x)
    assert counted.onednn == 1
    near(out, usual.double())


def test_autocast_is_torchs() -> None:
    x, weight = exact_pair(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), Counted() as counted:
        out = onednn.linear(x, weight)
        assert torch.equal(out, F.linear(x, weight))
    assert out.dtype == torch.bfloat16
    assert counted.onednn == 0


def test_it_compiles_and_exports_as_a_usual_layer() -> None:
    layer, x = onednn.Linear(5, 4), torch.randn(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    usual = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(compiled(x), usual)
    program = torch.export.export(layer, (x,))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
        "aten.linear.default"
    ]


@pytest.fixture
def asked_again(by_onednn: None) -> Iterator[None]:
    """The operator is looked for anew in a test, and after it."""
    onednn._operator.cache_clear()
    yield
    onednn._operator.cache_clear()


def failing(*arguments: object) -> Tensor:
    raise RuntimeError("could not create a primitive\nand more")


def wrong(x: Tensor, weight: Tensor, *arguments: object) -> Tensor:
    return F.linear(x, weight) * 2


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        (SimpleNamespace(), "_linear_pointwise"),
        (SimpleNamespace(_linear_pointwise=SimpleNamespace(default=failing)), "create a primitive"),
        (SimpleNamespace(_linear_pointwise=SimpleNamespace(default=wrong)), "are wrong"),
    ],
    ids=["missing", "failing", "wrong"],
)
def test_without_the_operator_all_is_torchs_and_said_once(
    operators: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    layer, x = onednn.Linear(5, 4), torch.randn(3, 5)
    with caplog.at_level(logging.WARNING, "llavakit"):
        for _ in range(3):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    (said,) = caplog.messages
    assert reason in said
    assert "torch's own are used" in said


@pytest.mark.parametrize(("capability", "fast"), [("AVX512", True), ("AVX2", False)])
def test_it_multiplies_where_the_cpu_gains_by_it(
    capability: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn.faster_here.__wrapped__() == fast
    monkeypatch.setattr(onednn, "faster_here", lambda: fast)
    with Counted() as counted:
        onednn.Linear(5, 4)(torch.randn(3, 5)).sum().backward()
    assert (counted.onednn > 0) == (counted.torch == 0) == (fast and onednn._operator() is not None)


@here
@pytest.mark.parametrize(
    ("size", "edges", "with_bias"),
    [((8, 8), (24, 16), True), ((5, 7), (23, 15), False), ((3, 3), (3, 3), True)],
)
def test_patches_are_those_of_a_convolution(
    size: tuple[int, int], edges: tuple[int, int], with_bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 10, size, stride=size, bias=with_bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = onednn.PatchConv2d
    images = torch.randn(2, 3, *edges, requires_grad=True)
    with Counted() as counted:
        found = fast(images)
    assert counted.onednn == 1
    plain.double()
    exact = plain(images.double())
    near(found, exact)
    grad = torch.randn_like(found)
    leaves = [images, *fast.parameters()]
    mine = torch.autograd.grad(found, leaves, grad)
    theirs = torch.autograd.grad(exact, [images, *plain.parameters()], grad.double())
    for one, other in zip(mine, theirs, strict=True):
        near(one, other.double())
    whole = fast(images.double().float()[0])  # an image without a batch is torch's to cut
    near(whole, exact[0].double())
