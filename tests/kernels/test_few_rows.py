"""Products of a few rows by numpy against float64, and torch's own wherever they do not fit."""

from __future__ import annotations

import platform
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tests.products import Counted, here
from torch import Tensor, nn
from torch.nn import functional as F

from llavakit_kernels import few_rows, onednn

pytestmark = pytest.mark.skipif(
    not hasattr(np, "vecdot"), reason="this numpy has no products of vectors"
)
SHAPES = [(1, 1), (5, 3), (48, 96), (257, 130), (7, 12000)]  # outputs and inputs


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def near(actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape
    assert actual.dtype == torch.float32
    size = exact.norm() + exact.numel() ** 0.5  # a sum may cancel, its error does not
    assert (actual.double() - exact).norm() <= 1e-5 * size


def drawn(rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return torch.randn(rows, inputs), weight, torch.randn(outputs)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_float64(rows: int, shape: tuple[int, int], with_bias: bool) -> None:
    x, weight, bias = drawn(rows, *shape)
    added = bias if with_bias else None
    with Counted() as counted:
        found = few_rows.linear(x, weight, added)
    assert counted.torch == counted.onednn == 0
    assert found.is_contiguous()
    near(found, F.linear(x.double(), weight.double(), bias.double() if with_bias else None))
    for row, other in zip(x, found, strict=True):  # whatever is beside a row changes no bit of it
        assert torch.equal(few_rows.linear(row, weight, added), other)
    assert torch.equal(few_rows.linear(x[None, :, None], weight, added), found[None, :, None])
    gaps = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(few_rows.linear(gaps, weight, added), found)


def test_a_weights_memory_can_be_freed_afterwards() -> None:
    """As FSDP frees the weights that it has gathered."""
    layer = few_rows.Linear(64, 32)
    with torch.no_grad():
        layer(torch.ones(1, 64))
    for weight in layer.parameters():
        storage = weight.untyped_storage()
        storage.resize_(0)
        assert storage.nbytes() == 0


@here
@torch.inference_mode()
@pytest.mark.parametrize("rows", [5, 16])
def test_a_few_more_rows_of_a_large_matrix_are_onednns(rows: int) -> None:
    for outputs, by_onednn in ((2048, 1), (48, 0)):
        x, weight, bias = drawn(rows, outputs, 96)
        with Counted() as counted:
            found = few_rows.linear(x, weight, bias)
        assert (counted.onednn, counted.torch) == (by_onednn, 1 - by_onednn)
        near(found, F.linear(x.double(), weight.double(), bias.double()))


@torch.inference_mode()
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_threads_share_a_large_matrix_and_change_no_bit(
    rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = drawn(rows, 257, 130)
    alone = few_rows.linear(x, weight, bias)
    divided, asked = few_rows._divided, []

    def seen(input_RI: Any, weight_OI: Any, pieces: int) -> Any:
        asked.append(pieces)
        return divided(input_RI, weight_OI, pieces)

    monkeypatch.setattr(few_rows, "_PIECE", 1024)
    monkeypatch.setattr(few_rows, "_divided", seen)
    torch.set_num_threads(threads)
    assert torch.equal(few_rows.linear(x, weight, bias), alone)
    assert asked == [threads]
    torch.set_num_threads(1)  # who asks for one thread gets one
    assert torch.equal(few_rows.linear(x, weight, bias), alone)
    assert asked == [threads]


def test_several_rows_of_a_small_matrix_are_torchs_where_it_has_many_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    x, weight, bias = drawn(2, 48, 96)
    with torch.inference_mode(), Counted() as counted:
        few_rows.linear(x, weight, bias)
        assert counted.torch == 1
        few_rows.linear(x[:1], weight, bias)
        assert counted.torch == 1
    assert few_rows.by_vectors(4, 4 * few_rows._PIECE)
    assert not few_rows.by_vectors(5, 4 * few_rows._PIECE)


FORK = """
import os
import torch
from llavakit_kernels import few_rows
few_rows._PIECE = 1024
torch.set_num_threads(2)
x, weight = torch.randn(1, 64), torch.randn(64, 64)
with torch.inference_mode():
    before = few_rows.linear(x, weight)
    child = os.fork()
    same = torch.equal(few_rows.linear(x, weight), before)
    if not child:
        os._exit(0 if same else 3)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no forks there")
def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=120)


@torch.inference_mode()
def test_numbers_that_grow_too_large_are_no_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn(2, 48, 96)
    x[0, 0], x[1, 1], x[1, 2] = 3e38, float("inf"), float("nan")
    weight[:, 0] = 10.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = few_rows.linear(x, weight, bias)
        monkeypatch.setattr(few_rows, "_PIECE", 1024)
        torch.set_num_threads(2)
        again = few_rows.linear(x, weight, bias)
    assert found[0].isinf().all()
    assert found[1].isnan().all()
    assert torch.equal(found[0], again[0])


class Wrapped(Tensor):
    """A tensor of another type, as DTensor or weights of 4 bits are."""


@torch.inference_mode()
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(2, 5).double(), torch.randn(4, 5).double()),
        (torch.randn(2, 5).bfloat16(), torch.randn(4, 5).bfloat16()),
        (torch.randn(0, 5), torch.randn(4, 5)),
        (torch.randn(2, 5), torch.randn(4, 5).as_subclass(Wrapped)),
        (torch.randn(2, 5, device="meta"), torch.randn(4, 5, device="meta")),
        (torch.randn(2, 5), torch.randn(5, 4).t()),
        (torch.randn(17, 5), torch.randn(4, 5)),
    ],
    ids=["float64", "bfloat16", "no rows", "another type", "meta", "by columns", "many rows"],
)
def test_what_does_not_fit_is_torchs(
    x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(few_rows, "multiply")
    found = few_rows.linear(x, weight)
    expected = F.linear(x, weight)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.is_meta or torch.equal(found, expected)


def test_autocast_is_torchs() -> None:
    x, weight, _ = drawn(2, 48, 96)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = few_rows.linear(x, weight)
        assert torch.equal(found, F.linear(x, weight))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_gradients_are_torchs_to_the_last_bit(rows: int) -> None:
    x, _, _ = drawn(rows, 48, 96)
    plain = nn.Linear(96, 48)
    few = few_rows.Linear(96, 48)
    few.load_state_dict(plain.state_dict())
    grads = []
    for layer in (plain, few):
        own = x.clone().requires_grad_()
        found = layer(own)
        found.square().sum().backward()
        grads.append((found.detach(), own.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_it_compiles_exports_and_is_traced_as_a_usual_layer() -> None:
    layer, x = few_rows.Linear(5, 4), torch.randn(1, 5)
    with torch.no_grad():
        usual = F.linear(x, layer.weight, layer.bias)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), usual)
        program = torch.export.export(layer, (x,))
        assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
            "aten.linear.default"
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            traced: Any = torch.jit.trace(layer, (x,))
        near(traced(x + 1), F.linear((x + 1).double(), layer.weight.double(), layer.bias.double()))


@here
def test_the_layer_beside_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = few_rows.OnednnLinear(96, 48)
    with Counted() as counted, torch.no_grad():
        layer(torch.randn(1, 96))
        assert counted.onednn == 0
        layer(torch.randn(40, 96))
        assert counted.onednn == 1
    with Counted() as counted:
        layer(torch.randn(1, 96)).sum().backward()
    assert counted.onednn == 2  # the product, and the weight's gradient
    assert counted.torch == 0
    assert isinstance(layer, onednn.Linear)


@pytest.mark.parametrize(
    ("vendor", "blas", "mkl", "expected"),
    [
        ("vendor_id : AuthenticAMD", "scipy-openblas", True, True),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", "openblas", True, True),
        ("vendor_id : GenuineIntel", "scipy-openblas", True, False),
        ("vendor_id : AuthenticAMD", "mkl-sdl", True, False),
        ("vendor_id : AuthenticAMD", "blas", True, False),
        ("vendor_id : AuthenticAMD", "scipy-openblas", False, False),
    ],
)
def test_where_it_is_faster(
    vendor: str, blas: str, mkl: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {"Build Dependencies": {"blas": {"name": blas}}}
    monkeypatch.setattr(np, "show_config", lambda mode: built)
    monkeypatch.setattr(few_rows, "_processor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    asked = few_rows.faster_here.__wrapped__
    assert asked() is expected
    monkeypatch.delattr(np, "vecdot")  # as before numpy 2
    assert asked() is False


def test_the_processor_is_named() -> None:
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert "vendor_id" in few_rows._processor()
    assert few_rows.faster_here() in (True, False)
