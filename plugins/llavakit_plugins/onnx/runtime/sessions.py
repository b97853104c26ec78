"""onnxruntime's sessions, and decoding with a key-value cache that stays on the model's device.

Shapes: B sequences, T rows, E width, V vocabulary, G key-value heads, K head dimension, L columns
of the mask, P rows of the cache.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llavakit.contracts.errors import ModelError
from llavakit_plugins.onnx.runtime.agreement import running
from llavakit_plugins.onnx.runtime.folder import Folder, Shapes
from llavakit_plugins.onnx.runtime.layout import DECODER, KEEP, cache_names
from llavakit_plugins.onnx.runtime.saturation import saturates

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
CacheArray = npt.NDArray[Any]
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_KINDS = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}
"""Types of a cache that is not float32."""
_PIECE = 32 << 20
"""Bytes of the largest cache that lies in one piece."""


def pick_provider(device: str) -> str:
    """Return `cuda` or `cpu`; `auto` means CUDA if onnxruntime and the machine have it.

    Raises ModelError for a device that does not exist here.
    """
    runtime = runtime_module()
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise ModelError(f"an ONNX model runs on cpu or cuda, not on `{device}`; use one of them")
    there = _CUDA in runtime.get_available_providers() and _has_gpu(runtime)
    if kind == "cuda" and not there:
        raise ModelError(
            "onnxruntime finds no CUDA device; install onnxruntime-gpu on a machine that has "
            "one, or use cpu"
        )
    return "cuda" if there and kind != "cpu" else "cpu"


def runtime_module() -> Any:
    """Return the module onnxruntime. Raises ModelError if it cannot be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"an ONNX model needs onnxruntime, which cannot be imported ({error!s:.300}); "
            "`pip install 'llavakit[onnx]'`"
        ) from error
    return onnxruntime


def _has_gpu(runtime: Any) -> bool:
    devices = getattr(runtime, "get_ep_devices", None)
    if devices is None:  # before onnxruntime 1.23
        return True
    from pathlib import Path

    return Path("/dev/nvidiactl").exists() or any(device.ep_name == _CUDA for device in devices())


def open_session(
    folder: Folder, graph: str, precision: str, provider: str, threads: int | None
) -> InferenceSession:
    """Return a session of one graph.

    `threads` is the number of CPU threads, None for onnxruntime's own choice. Raises ModelError if
    onnxruntime cannot load the graph.
    """
    runtime = runtime_module()
    options = runtime.SessionOptions()
    # errors come as exceptions; its log, with a graph's own words in it, goes past our sentences.
    # Why CUDA's libraries cannot be loaded is said there alone
    options.log_severity_level = 4 if provider == "cpu" else 3
    # the arena would keep the memory of a long prompt or of an image for the life of the session
    options.enable_cpu_mem_arena = False
    if graph != DECODER:  # idle threads of the other sessions would spin while the decoder works
        options.add_session_config_entry("session.force_spinning_stop", "1")
    # It makes signed weights unsigned, which computes exactly on CPUs without VNNI, as fast as the
    # default that saturates there. With VNNI the default is exact, and takes half the time.
    if saturates(runtime):
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    path = folder.graph(graph, precision, provider)
    providers = [_CUDA, _CPU] if provider == "cuda" else [_CPU]
    try:
        session: InferenceSession = runtime.InferenceSession(
            str(path), sess_options=options, providers=providers
        )
    except Exception as error:  # onnxruntime's errors share no base class
        reason = str(error).strip().partition("\n")[0]
        known = re.search(r"[Oo]pset (\d+)", reason)
        if known is not None or "opset" in reason.lower():
            number = known[1] if known else "of a newer kind"
            raise ModelError(
                f"{path} needs operator set {number}, which onnxruntime {runtime.__version__} "
                "does not know; update onnxruntime, or export the model again"
            ) from error
        raise ModelError(
            f"onnxruntime {runtime.__version__} cannot load {path}: {reason}; export the model "
            "again, or update onnxruntime"
        ) from error
    if provider == "cuda" and _CUDA not in session.get_providers():
        raise ModelError(
            f"onnxruntime could not use CUDA for {path}; check its CUDA libraries, or use cpu"
        )
    return session


def _zeros(count: int, shape: tuple[int, ...], kind: Any) -> list[CacheArray]:
    """Return arrays of zeros, in one piece where that is not large.

    From 4 MB on numpy asks Linux for pages of 2 MB: a prompt is spared thousands of page faults,
    a twentieth of its time. But such a page takes its memory whole, whatever it holds: a large
    cache, which may have far more room than rows, is left in small ones.
    """
    whole = (count, *shape)
    if np.dtype(kind).itemsize * math.prod(whole) <= _PIECE:
        return list(np.zeros(whole, kind))
    return [np.zeros(shape, kind) for _ in range(count)]


def give_back_memory() -> None:
    """Return freed memory to the system, with glibc.

    onnxruntime frees the weights after it has packed them, and an answer frees its activations and
    its cache. glibc would keep these pieces for the process.
    """
    import ctypes
    import sys

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Decoder:
    """The decoder's session, and the key-value cache of the sequences that are being generated.

    Sequences are padded on the right. With GroupQueryAttention (`in_place`) the cache is one buffer
    that the operator writes into; with plain operators every step returns a longer cache. In both
    cases it stays on the device.
    """

    def __init__(
        self, session: InferenceSession, shapes: Shapes, *, in_place: bool, provider: str
    ) -> None:
        self.session, self.shapes, self.in_place, self.device = session, shapes, in_place, provider
        self._past = cache_names(shapes.layers)
        self._present = cache_names(shapes.layers, "present")
        kinds = {value.name: value.type for value in session.get_inputs()}
        self._kind = _KINDS.get(kinds[self._past[0]], np.float32)
        self._cache: list[OrtValue] = []
        self._binding: Any = None  # of the steps, and the arrays that it reads and writes
        self._bound: tuple[FloatArray, IntArray, FloatArray]
        self._mask_BL: IntArray = np.zeros((0, 0), np.int64)

    def again(self) -> Decoder:
        """Return another decoder on the session, without sequences: each answer has its own."""
        other = copy(self)
        other._cache, other._binding = [], None
        return other

    def read(
        self,
        embeds_BTE: FloatArray,
        real_BT: IntArray,
        *,
        keep: int = 0,
        capacity: int = 0,
        held: Sequence[CacheArray] = (),
        known: int = 0,
    ) -> FloatArray:
        """Read prompts; return the logits `[B, keep, V]` of their last `keep` rows (0 means all).

        `real_BT` is 1 for tokens and 0 for the padding behind them. `capacity` is the greatest
        length of a sequence, in rows, after all steps. The first `known` rows of a single prompt
        are not among those to read: they are in `held`, as `held()` has returned it.
        """
        batch, rows = real_BT.shape
        room = max(capacity, known + rows) if self.in_place else known
        shape = (batch, self.shapes.kv_heads, room, self.shapes.head_dim)
        # zeros and not `empty`: masked columns get weight 0, and 0 * NaN would still be NaN
        caches = _zeros(len(self._past), shape, self._kind)
        for array, before in zip(caches, held if known else (), strict=bool(known)):
            array[:, :, :known] = before[:, :, :known]
        self._cache = [self._on_device(array) for array in caches]
        self._binding = None  # of the sequences before
        self._mask_BL = np.concatenate((np.ones((batch, known), np.int64), real_BT), axis=1)
        positions = np.arange(known, known + rows, dtype=np.int64)
        whole_BT = np.broadcast_to(positions, real_BT.shape).copy()
        return self._run(self._bind(keep), embeds_BTE, whole_BT)

    def step(self, embeds_B1E: FloatArray, positions_B1: IntArray) -> FloatArray:
        """Read one more row of each sequence; return its logits `[B, V]`, until the next step."""
        self._mask_BL = np.concatenate((self._mask_BL, np.ones_like(positions_B1)), axis=1)
        if not self.in_place:
            return self._run(self._bind(), embeds_B1E, positions_B1)[:, -1]
        if self._binding is None:
            self._bind_step(embeds_B1E, positions_B1)
        rows, positions, logits_B1V = self._bound
        rows[:], positions[:] = embeds_B1E, positions_B1
        with running(DECODER):
            self._binding.bind_cpu_input("attention_mask", self._mask_BL)
            self.session.run_with_iobinding(self._binding)
        return logits_B1V[:, -1]

    def held(self) -> list[CacheArray]:
        """Return copies of the keys and values `[B, G, P, K]`, layer by layer, on the CPU."""
        return [value.numpy().copy() for value in self._cache]

    def release(self) -> None:
        """Drop the sequences and free their memory."""
        self._cache, self._binding = [], None
        give_back_memory()

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        rows = list(sequences)
        self._cache = [self._on_device(value.numpy()[rows]) for value in self._cache]
        self._binding = None
        self._mask_BL = self._mask_BL[rows]

    def _run(self, binding: Any, embeds_BTE: FloatArray, positions_BT: IntArray) -> FloatArray:
        with running(DECODER):
            binding.bind_cpu_input("inputs_embeds", embeds_BTE)
            binding.bind_cpu_input("attention_mask", self._mask_BL)
            binding.bind_cpu_input("position_ids", positions_BT)
            self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        if not self.in_place:
            self._cache = present
        logits_BKV: FloatArray = logits.numpy()
        return logits_BKV

    def _bind(self, keep: int | None = None) -> Any:
        """Return a binding of the cache.

        `keep` is how many of the last rows get logits; steps have the default.
        """
        binding = self.session.io_binding()
        # sampling runs in numpy, so that logits are needed there; the cache stays on the device
        binding.bind_output("logits", "cpu")
        for past, present, value in zip(self._past, self._present, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            if self.in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, self.device)
        if keep is not None:
            kept = runtime_module().OrtValue.ortvalue_from_numpy(np.asarray(keep, np.int64))
            binding.bind_ortvalue_input(KEEP, kept)  # `bind_cpu_input` refuses one with a default
        return binding

    def _bind_step(self, embeds_B1E: FloatArray, positions_B1: IntArray) -> None:
        """Bind all that the steps of some sequences share, once: the mask alone grows.

        Weights leave no room for Python in the CPU's caches, so each call costs a token its time.
        """
        logits_B1V = np.empty((len(embeds_B1E), 1, self.shapes.vocabulary), np.float32)
        self._bound = embeds_B1E.copy(), positions_B1.copy(), logits_B1V
        self._binding = self._bind()
        self._binding.bind_cpu_input("inputs_embeds", self._bound[0])
        self._binding.bind_cpu_input("position_ids", self._bound[1])
        held = runtime_module().OrtValue.ortvalue_from_numpy(logits_B1V)  # shares its memory
        self._binding.bind_ortvalue_output("logits", held)

    def _on_device(self, held_BGPK: CacheArray) -> OrtValue:
        """Return a tensor of the cache on the device; on a CPU it shares the array's memory."""
        value: OrtValue = runtime_module().OrtValue.ortvalue_from_numpy(held_BGPK, self.device, 0)
        return value
