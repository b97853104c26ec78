"""Compiles the transformer blocks of a model while a step trains it (`compile = true`).

Each block is compiled by itself, and one compilation serves all blocks that are alike, for streams
of any length: the graph takes the block's weights as it takes the stream. Modules, their names and
their weights stay as they are; what is compiled is what a block's `forward` calls, behind the hooks
with which FSDP gathers its weights.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from llavakit import LlavaModel, TrainingError, VisionEncoder
from llavakit.contracts.packing import Packing, Rows
from llavakit_plugins.language.traced import Traced, current, mark_rows
from llavakit_plugins.training.options import TrainOptions

_log = logging.getLogger("llavakit")
BACKEND = "inductor"
_LEAST = 2  # rows: to a compiler, sizes of 0 and 1 are constants


@contextmanager
def compiled(model: LlavaModel, options: TrainOptions, *, cached: bool) -> Iterator[None]:
    """Let the blocks of a model run compiled within it, if `options.compile` says so.

    The vision encoder's are among them unless its features are `cached`. Raises TrainingError where
    PyTorch cannot compile them.
    """
    if not options.compile:
        yield
        return
    given = {model.choices.get(part, {}).get("products") for part in ("vision", "language")}
    if model.device.type == "cpu" and "onednn" in given:
        _log.warning(
            'note: `compile` leaves products within blocks to PyTorch: `products = "onednn"` has '
            "no effect there"
        )
    blocks = Compiled(model, encoder=not cached)
    try:
        yield
    except _errors() as error:  # of a backward pass, which is compiled when it is first needed
        raise _refusal(error, "the training step") from error
    finally:
        blocks.undo()


class Compiled:
    """The compiled blocks of a model, until `undo`.

    The language model's run compiled where gradients are wanted; `encoder` adds the vision
    encoder's. Raises TrainingError for a language model whose blocks cannot be replaced.
    """

    def __init__(self, model: LlavaModel, *, encoder: bool) -> None:
        language, vision = model.language, model.vision
        named = f"language model `{language.name}`"
        if not language.blocks:
            raise TrainingError(f"`compile`: {named} does not say what its `blocks` are; {_OFF}")
        self._before: list[tuple[nn.Module, Any]] = []
        self._language = language
        self._hidden = language.hidden
        language.hidden = self._keep_stream  # type: ignore[method-assign]
        try:
            self._replace(language.blocks, _LanguageRegion, named)
            if encoder:
                self._replace(_blocks(vision), _Region, f"vision encoder `{vision.name}`")
        except TrainingError:
            self.undo()
            raise

    def undo(self) -> None:
        """Let all blocks run as they did before."""
        for block, before in self._before:
            if before is None:
                del block.forward
            else:
                block.forward = before
        del self._language.hidden
        current.stream = None

    def _replace(self, blocks: Sequence[nn.Module], kind: type[_Region], named: str) -> None:
        regions: dict[Any, _Region] = {}
        for block in blocks:
            own = _function(block)
            if own is None:
                raise TrainingError(
                    f"`compile`: `forward` of the blocks of {named} is no method of theirs; {_OFF}"
                )
            if own not in regions:
                regions[own] = kind(own, named)
            self._before.append((block, block.__dict__.get("forward")))
            # a method, as it was: a copy of the block calls itself and not this one
            block.forward = MethodType(regions[own], block)

    def _keep_stream(self, embeds_TE: Any, packing: Packing, rows: Rows | None = None) -> Any:
        """Tell the blocks which stream passes them, for those that are not handed its packing."""
        trains = torch.is_grad_enabled() and packing.cache is None and packing.watch is None
        current.stream = Traced(packing) if trains else None
        return self._hidden(embeds_TE, packing, rows)


def _function(block: nn.Module) -> Any:
    """Return what a block's `forward` calls with the block first; None for another `forward`."""
    forward: Any = block.forward
    if isinstance(forward, partial):
        bound = len(forward.args) == 1 and forward.args[0] is block and not forward.keywords
        return forward.func if bound else None
    own = getattr(forward, "__self__", None) is block
    return getattr(forward, "__func__", None) if own else None


def _blocks(vision: VisionEncoder) -> Sequence[nn.Module]:
    blocks = list(getattr(vision, "blocks", ()))
    if not blocks:
        _log.warning(
            "`compile`: the vision encoder `%s` does not say what its `blocks` are; it runs as it "
            "is", vision.name,
        )  # fmt: skip
    return blocks


class _Region:
    """Blocks with the same `forward`, compiled as one."""

    def __init__(self, own: Callable[..., Any], named: str) -> None:
        self._own, self._named = own, named
        self._runs, self._given_up = False, False

        def region(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return own(block, *args, **kwargs)

        # graphs are kept by the code that they were made of, and each region wants its own
        alone = FunctionType(
            region.__code__.replace(), region.__globals__, closure=region.__closure__
        )
        # in one graph: at a break the host would go on in Python
        self._compiled = torch.compile(alone, fullgraph=True, dynamic=True, backend=BACKEND)

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` of a block returns."""
        if self._given_up or not self._serves(args):
            return self._own(block, *args, **kwargs)
        try:
            output = self._run(block, args, kwargs)
        except _errors() as error:
            if not self._runs:
                raise _refusal(error, f"the blocks of the {self._named}") from error
            self._given_up = True
            _log.warning(
                "`compile`: the blocks of the %s go on uncompiled (%s)", self._named, _reason(error)
            )
            return self._own(block, *args, **kwargs)
        self._runs = True
        return output

    def _serves(self, args: tuple[Any, ...]) -> bool:
        return True

    def _run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._compiled(block, *args, **kwargs)


class _LanguageRegion(_Region):
    """Blocks of a language model: in training only, not in validation and answering."""

    def _serves(self, args: tuple[Any, ...]) -> bool:
        stream = current.stream
        if stream is None or not torch.is_grad_enabled() or len(stream.position_ids_T) < _LEAST:
            return False
        # on a CPU a block that computes some rows only asks the host where they lie
        rows = next((one for one in args if isinstance(one, Rows)), None)
        return rows is None or (rows.index_M.is_cuda and len(rows.index_M) >= _LEAST)

    def _run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = cast("Traced", current.stream)
        stream.attended = False
        given = [_traced(one) for one in args]
        output = self._compiled(block, *given, **{name: _traced(kwargs[name]) for name in kwargs})
        stream.blocks += stream.attended
        return output


def _traced(given: Any) -> Any:
    """Return what a graph takes for an argument: nothing of it may be a list of the host's."""
    if isinstance(given, Packing):
        return current.stream
    if isinstance(given, Rows):
        return Rows(mark_rows(given.index_M, len(given.index_M)), ())
    if isinstance(given, tuple):
        return tuple(_traced(one) for one in given)
    if isinstance(given, torch.Tensor) and current.stream is not None:
        return mark_rows(given, len(current.stream.position_ids_T))
    return given


_OFF = "leave `compile` out"


class _Never(Exception):
    """Stands for errors that cannot occur, as nothing is compiled."""


def _errors() -> tuple[type[Exception], ...]:
    if "torch._dynamo" not in sys.modules:
        return (_Never,)
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler)


def _refusal(error: Exception, what: str) -> TrainingError:
    if "InvalidCxxCompiler" in repr(error) or "No working C++ compiler" in str(error):
        return TrainingError(
            f"`compile`: on a CPU PyTorch needs a C++ compiler for {what}, and this machine has "
            f"none; install one (g++ or clang++), or {_OFF}"
        )
    return TrainingError(f"`compile`: PyTorch cannot compile {what} ({_reason(error)}); {_OFF}")


def _reason(error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)  # what a backend raised
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {' '.join(lines[:2])}"[:200].rstrip(":. ")
