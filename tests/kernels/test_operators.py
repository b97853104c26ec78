"""The functions as operators: registration, gradients, torch.compile, torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llavakit_kernels import linear_cross_entropy, linear_gelu, project_splice

N, T, D, E, V, M = 7, 12, 5, 6, 9, 8


def tensors(dtype: torch.dtype, learn: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "features": (N, D),
        "weight": (E, D),
        "bias": (E,),
        "square": (E, E),
        "embedding": (V, E),
        "hidden": (M, E),
        "head": (V, E),
        "head_bias": (V,),
    }
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if learn:
        for tensor in made.values():
            tensor.requires_grad_()
    rows = torch.randperm(T)[:N]
    ids = torch.randint(0, V, (T,))
    targets = torch.randint(0, V, (M,))
    targets[2] = -100
    return made | {"rows": rows, "ids": ids, "targets": targets}


def splice(t: dict[str, Tensor]) -> Tensor:
    return project_splice(
        t["features"], t["weight"], t["bias"], t["ids"], t["embedding"], t["rows"]
    )


def gelu(t: dict[str, Tensor]) -> Tensor:
    return linear_gelu(t["features"], t["weight"], t["bias"])


def gelu_recomputed(t: dict[str, Tensor]) -> Tensor:
    return linear_gelu(t["features"], t["weight"], t["bias"], recompute=True)


def loss(t: dict[str, Tensor]) -> Tensor:
    return linear_cross_entropy(
        t["hidden"], t["head"], t["targets"], bias=t["head_bias"], chunk_rows=M
    )


def small_loss(t: dict[str, Tensor]) -> Tensor:
    return linear_cross_entropy(t["hidden"], t["head"], t["targets"], bias=t["head_bias"])


def loss_in_chunks(t: dict[str, Tensor]) -> Tensor:
    return linear_cross_entropy(
        t["hidden"], t["head"], t["targets"], bias=t["head_bias"], chunk_rows=3, reduction="sum"
    )


def all_by_onednn(t: dict[str, Tensor]) -> Tensor:
    hidden = linear_gelu(t["features"], t["weight"], t["bias"], impl="onednn")
    stream = project_splice(
        hidden, t["square"], None, t["ids"], t["embedding"], t["rows"], impl="onednn"
    )
    return linear_cross_entropy(
        stream[:M], t["head"], t["targets"], bias=t["head_bias"], chunk_rows=M, impl="onednn"
    )


FUNCTIONS = [splice, gelu, gelu_recomputed, loss, small_loss, loss_in_chunks, all_by_onednn]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: Callable[[dict[str, Tensor]], Tensor]) -> None:
    given = tensors(torch.float64)
    names = [name for name, tensor in given.items() if tensor.requires_grad]

    def of_leaves(*leaves: Tensor) -> Tensor:
        return function(given | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(of_leaves, [given[name] for name in names])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_without_graph_breaks(function: Callable[[dict[str, Tensor]], Tensor]) -> None:
    given = tensors(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = function(given), compiled(given)
    torch.testing.assert_close(traced, eager)
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    for one, other in zip(
        torch.autograd.grad(traced.sum(), leaves, allow_unused=True),
        torch.autograd.grad(eager.sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_compiles_once_for_every_packing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(splice, fullgraph=True, backend=counter, dynamic=True)
    for N_, T_ in ((21, 50), (32, 61), (43, 77)):  # no two sizes alike: those would be tied
        given = tensors(torch.float32)
        given["features"] = torch.randn(N_, D)
        given["rows"], given["ids"] = torch.randperm(T_)[:N_], torch.randint(0, V, (T_,))
        torch.testing.assert_close(compiled(given), splice(given))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (splice, "project_splice"),
        (gelu, "linear_gelu"),
        (loss, "linear_cross_entropy"),
    ],
)
def test_exports_as_one_operator(
    function: Callable[[dict[str, Tensor]], Tensor], operator: str
) -> None:
    class Module(torch.nn.Module):
        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return function(given)

    program = torch.export.export(Module(), (tensors(torch.float32, learn=False),))
    names = [str(node.target) for node in program.graph.nodes if "llavakit" in str(node.target)]
    assert names == [f"llavakit.{operator}.default"]


class Seen(TorchDispatchMode):
    """Notes which of our operators PyTorch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "llavakit":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


OPERATORS = [
    (splice, "project_splice"),
    (gelu, "linear_gelu"),
    (gelu_recomputed, "linear_gelu"),
    (loss, "linear_cross_entropy"),
    (loss_in_chunks, "linear_cross_entropy"),
]


@pytest.mark.parametrize(("function", "operator"), OPERATORS)
def test_plain_tensors_get_the_same_without_the_dispatcher(
    function: Callable[[dict[str, Tensor]], Tensor],
    operator: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tensors(torch.float32)
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]

    def found() -> list[Tensor | None]:
        out = function(given)
        return [out, *torch.autograd.grad(out.sum(), leaves, allow_unused=True)]

    with Seen() as seen:
        plain = found()
    assert not seen.names
    monkeypatch.setattr("llavakit_kernels.operators._is_plain", lambda given: False)
    with Seen() as seen:
        traced = found()
    assert f"{operator}.default" in seen.names
    for one, other in zip(plain, traced, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(("function", "operator"), OPERATORS)
def test_tensors_without_values_get_their_shapes(
    function: Callable[[dict[str, Tensor]], Tensor], operator: str
) -> None:
    given = tensors(torch.float32)
    expected = function(given).shape
    meta = {name: tensor.to("meta") for name, tensor in given.items()}
    assert function(meta).shape == expected
    with FakeTensorMode() as mode, Seen() as seen:
        fake: dict[str, Tensor] = {n: mode.from_tensor(tensor) for n, tensor in given.items()}
        assert function(fake).shape == expected
    assert seen.names == [f"{operator}.default"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_batches_them() -> None:
    given = tensors(torch.float32, learn=False)

    def of_weight(weight: Tensor) -> Tensor:
        return splice(given | {"weight": weight})

    weights = torch.randn(3, E, D)
    expected = torch.stack([of_weight(weight) for weight in weights])
    torch.testing.assert_close(torch.func.vmap(of_weight)(weights), expected)


def test_gradients_of_gradients_are_refused() -> None:
    given = tensors(torch.float64)
    weight = given["weight"]
    for function in (splice, gelu, loss_in_chunks):
        leaf = given["hidden"] if function is loss_in_chunks else weight
        (first,) = torch.autograd.grad(function(given).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


# opcheck itself reads .grad of tensors that are no leaves.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@quiet
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_opcheck(impl: str) -> None:
    t = tensors(torch.float32)
    sources = torch.full((T,), -1, dtype=torch.int32)
    sources[t["rows"]] = torch.arange(N, dtype=torch.int32)
    frozen = {name: tensor.detach() for name, tensor in t.items()}
    grad = torch.randn(T, E)
    ops: Any = torch.ops.llavakit
    splice_arguments = (t["features"], t["weight"], t["bias"], t["ids"], t["embedding"], t["rows"])
    torch.library.opcheck(ops.project_splice, (*splice_arguments, sources, impl, True))
    torch.library.opcheck(
        ops.project_splice_features_grad, (grad, frozen["weight"], t["rows"], impl)
    )
    for with_bias in (True, False):
        torch.library.opcheck(
            ops.project_splice_weight_grad,
            (grad, frozen["features"], t["rows"], with_bias, impl),
        )
    torch.library.opcheck(
        ops.project_splice_embedding_grad, (grad, t["ids"], sources, V, N, impl, True)
    )
    for save in (True, False):
        torch.library.opcheck(ops.linear_gelu, (t["features"], t["weight"], t["bias"], impl, save))
    torch.library.opcheck(
        ops.linear_gelu_before_grad,
        (torch.randn(N, E), frozen["features"], frozen["weight"], frozen["bias"], impl),
    )


@quiet
@pytest.mark.parametrize("chunk_rows", [3, M])
@pytest.mark.parametrize("head_learns", [True, False])
def test_opcheck_of_the_loss(chunk_rows: int, head_learns: bool) -> None:
    t = tensors(torch.float32)
    head = t["head"] if head_learns else t["head"].detach()
    targets, row_weights = t["targets"].clamp(0), torch.rand(M)
    needs = (True, head_learns, False)
    torch.library.opcheck(
        torch.ops.llavakit.linear_cross_entropy,
        (t["hidden"], head, None, targets, row_weights, chunk_rows, *needs),
    )
