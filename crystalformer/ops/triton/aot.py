"""Compile the kernels for a GPU that need not be there, as launch.py's launches would have them compiled on it.

Triton compiles a kernel for what it sees of the arguments. Every address is a multiple of 16 bytes (launch.py sees to
that). For AMD GPUs an array within 2 GiB is another case than one past it, since 32 bits address it: here all arrays
are within, as is usual, or all past it; launches with some of either lie between.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from crystalformer.ops.triton import kernels
from crystalformer.ops.triton.launch import POINTER_TYPES
from crystalformer.ops.triton.tiles import Tiles, options

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200; MI300."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of stack and local memory a thread, shared bytes.

    code: ``digest_of`` the PTX or AMD assembly.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    code: str


def compile_kernels(tiles: Tiles, target: str, dtype: str = "fp32", *, past_2_gib: bool = False) -> list[Resources]:
    """Compile the three kernels for ``target`` (a key of TARGETS); dtype: Triton's name of q's, k's and v's type.

    past_2_gib: for arrays all larger than that, in place of all smaller; no difference to NVIDIA GPUs.
    """
    gpu = TARGETS[target]
    jobs: list[tuple[Any, dict[str, Any], int]] = [
        (kernels.forward_kernel, dict(tiles.forward_constants(gpu.backend)), tiles.forward_warps),
        (kernels.query_backward_kernel, dict(tiles.query_constants(gpu.backend)), tiles.warps),
        (kernels.key_backward_kernel, dict(tiles.key_constants()), tiles.warps),
    ]
    seen = "DS" if gpu.backend == "hip" and not past_2_gib else "D"
    return [_compile(kernel, constants, warps, target, dtype, seen) for kernel, constants, warps in jobs]


def _compile(
    kernel: Any,  # noqa: ANN401 - a Triton JITFunction, untyped
    constants: dict[str, Any],
    warps: int,
    target: str,
    dtype: str,
    seen: str,
) -> Resources:
    """seen: Triton's letters for what it sees of the arrays, D (addresses divisible by 16) and S (within 2 GiB)."""
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    signature = {name: "fp32" for name in kernel.arg_names}
    signature |= {name: f"*{POINTER_TYPES.get(name, dtype)}" for name in pointers}
    signature |= {name: "constexpr" for name in constants}
    signature |= {name: "i32" for name in kernel.arg_names if name == "num_atoms"}
    attributes = make_backend(TARGETS[target]).parse_attr(seen)
    attrs = {(kernel.arg_names.index(name),): attributes for name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=TARGETS[target], options=options(warps))
    nvidia = "cubin" in built.asm
    return Resources(
        kernel=kernel.__name__,
        target=target,
        warps=warps,
        shared=built.metadata.shared,
        code=digest_of(built.asm["ptx" if nvidia else "amdgcn"]),
        **(_nvidia_usage(built.asm["cubin"]) if nvidia else _amd_usage(built.asm["amdgcn"])),
    )


def digest_of(assembly: str) -> str:
    """SHA-256 of the instructions: what serves debuggers names the files, and Triton keeps code by their content."""
    code, _, _ = assembly.partition("\t.section\t.debug_")
    lines = [line for line in code.splitlines() if not line.lstrip().startswith((".file", ".loc"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    """The figures of cuobjdump, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def _amd_usage(assembly: str) -> dict[str, int]:
    """The compiler's own figures; scratch is AMD's name for what lies in memory instead of registers."""
    scratch = int(_figure(assembly, r"\.private_segment_fixed_size:\s*(\d+)"))
    spilled = int(_figure(assembly, r"\.vgpr_spill_count:\s*(\d+)"))
    return {"registers": int(_figure(assembly, r"\.vgpr_count:\s*(\d+)")), "stack": scratch, "local": 4 * spilled}


def _figure(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}")
    return match[1]
