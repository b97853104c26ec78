"""Compile kernels for GPUs that need not be here, and print what became of them as JSON.

    python compile_kernels.py NAME[:INDEX]...

A process of its own, since the tests' has Triton in interpreter mode. NAME is a key of KERNELS,
INDEX picks one of the kernel's configurations (all of them without it).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llavakit_kernels import launch
from llavakit_kernels.linear_gelu import triton as gelu
from llavakit_kernels.project_splice import (
    triton as forward,
    triton_backward as backward,
    triton_embedding as embedding,
)

INDEX_TYPES = {
    "visual_rows": "*i64",
    "token_ids": "*i64",
    "sorted_ids": "*i64",
    "order": "*i64",
    "sources": "*i32",
}
POINTERS = ("bias", "embedding", "out", "grad", "weight_grad", "before")


@dataclass(frozen=True)
class Kernel:
    jit: Any
    configs: list[Any]
    constants: dict[str, Any] = field(default_factory=dict)


# The chip and dtype of each family of configurations.
FAMILIES = {
    "hopper": (90, "bf16", "ieee"),
    "ampere": (80, "bf16", "ieee"),
    "tf32": (80, "fp32", "tf32"),
    "float32": (80, "fp32", "ieee"),
}


def kernels() -> dict[str, tuple[str, Kernel]]:
    """Every kernel by `kernel-family`, with the family."""
    found = {}
    for family in FAMILIES:
        product, polynomials = launch.PRODUCT_TILES[family], launch.GELU_TILES[family]
        weight = [launch.WEIGHT_GRAD_TILES[family]]
        text = {"ROWS": forward.TEXT_ROWS, "COLUMNS": forward.TEXT_COLUMNS}
        bias = {"HAS_BIAS": True}
        small = {"COLUMNS": embedding.COLUMNS, "CHUNK": embedding.CHUNK}
        plain = [triton.Config({}, num_warps=4, num_stages=3)]
        for name, kernel in {
            "forward": Kernel(forward.forward_kernel, product, bias | text),
            "features_grad": Kernel(backward.features_grad_kernel, product),
            "weight_grad": Kernel(backward.weight_grad_kernel, weight, bias),
            "gelu": Kernel(gelu.gelu_kernel, polynomials, bias | {"MODE": gelu.FORWARD}),
            "gelu_save": Kernel(
                gelu.gelu_kernel, polynomials, bias | {"MODE": gelu.FORWARD_AND_SAVE}
            ),
            "gelu_backward": Kernel(gelu.gelu_kernel, polynomials, bias | {"MODE": gelu.BACKWARD}),
            "segments": Kernel(embedding.segments_kernel, plain, small),
            "atomics": Kernel(embedding.atomics_kernel, plain, small),
        }.items():
            found[f"{name}-{family}"] = family, kernel
    return found


def compile_one(family: str, kernel: Kernel, config: Any) -> dict[str, Any]:
    capability, dtype, precision = FAMILIES[family]
    names = kernel.jit.arg_names
    constants = {"TMA": capability >= 90, "PRECISION": precision} | kernel.constants | config.kwargs
    constants = {name: value for name, value in constants.items() if name in names}
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _type(name, dtype, constants)
        # Row strides and widths of real models, and every allocation of torch.
        if signature[name].startswith("*") or name in ("E", "D") or name.endswith("_stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel.jit,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    return {
        "config": str(config),
        "shared": compiled.metadata.shared,
        "row_offsets": row_offsets(compiled.asm["ttir"]),
        "tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
        "mma": "mma.sync" in compiled.asm["ptx"],
        "serialized": serialized(compiled.asm["ptx"]),
        **resources(compiled.asm["cubin"]),
    }


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in launch.BLOCKS:
        height, width = launch.BLOCKS[name]
        block = f"[{constants[height]},{constants[width]}]"
        return f"tensordesc<{dtype}{block}>" if constants["TMA"] else f"*{dtype}"
    if name in ("bias_grad", "table_grad"):
        return "*fp32"
    return INDEX_TYPES.get(name) or (f"*{dtype}" if name in POINTERS else "i32")


TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def serialized(ptx: str) -> bool:
    """Whether the assembler has to wait for each of Hopper's asynchronous products by itself, which
    it only says: nothing runs beside them then."""
    chip = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert chip is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        said = subprocess.run(
            [TOOLS / "ptxas", "--verbose", f"--gpu-name={chip[1]}", "-o", "kernel.cubin", source],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
        ).stderr
    assert "registers" in said, said
    return "serialized" in said


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack: a kernel that spills has some."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {"registers": int(found[1]), "stack": int(found[2])}


def row_offsets(ttir: str) -> dict[str, int]:
    """How many sums of a pointer and one offset for each row (a column vector, ROWS x 1) there are,
    by the width of the offset. The column's offset, added to that row's pointer, may be 32 bits."""
    sums = [line for line in ttir.splitlines() if "tt.addptr" in line]
    return {
        width: sum(bool(re.search(rf"tensor<\d+x1x{width}>", line)) for line in sums)
        for width in ("i32", "i64")
    }


def main() -> None:
    found = kernels()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in sys.argv[1:]:
        name, _, index = name.partition(":")
        family, kernel = found[name]
        configs = kernel.configs if not index else [kernel.configs[int(index)]]
        trimmed = (launch.for_kernel(config, kernel.jit.arg_names) for config in configs)
        results[name] = [compile_one(family, kernel, config) for config in dict.fromkeys(trimmed)]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
