"""G4: the kernels compile for GPUs that are not here, without spills or local memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after the check for triton

from crystalformer.ops.triton import aot  # noqa: E402
from crystalformer.ops.triton.launch import POINTER_TYPES  # noqa: E402
from crystalformer.ops.triton.tiles import Tiles, options  # noqa: E402
from tests.crystalformer.ops.triton import test_launch  # noqa: E402

NVIDIA = ("sm_80", "sm_90", "sm_100")

DEFAULT = (8, 16, 64)
"""H, D, K of the default model."""

SHAPES = [DEFAULT, (8, 16, 0), (8, 16, 128), (4, 32, 64), (16, 8, 64)]
"""The default model, without and with more radial bases, and other splits of 128 features."""

EDGES = [(2, 256, 512), (20, 4, 96), (3, 24, 48)]
"""Largest D and K; more heads than a program takes; sizes that are no powers of two."""

NAMES = ["forward_kernel", "query_backward_kernel", "key_backward_kernel"]


def show(capsys: pytest.CaptureFixture[str], shape: tuple[int, int, int], found: list[aot.Resources]) -> None:
    """Print the resource table whatever pytest captures."""
    with capsys.disabled():
        for used in found:
            sys.stdout.write(
                f"\n{used.target:>7} H={shape[0]} D={shape[1]} K={shape[2]} {used.kernel:<21} warps {used.warps} "
                f"REG {used.registers} STACK {used.stack} LOCAL {used.local} SHARED {used.shared}"
            )


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("shape", [*SHAPES, *EDGES], ids=str)
def test_no_spills_and_no_local_memory(
    shape: tuple[int, int, int], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = aot.compile_kernels(Tiles.fitting(*shape), target)
    show(capsys, shape, found)
    assert [used.kernel for used in found] == NAMES
    assert all(used.stack == 0 and used.local == 0 for used in found)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_operands_of_16_bits(dtype: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = aot.compile_kernels(Tiles.fitting(*DEFAULT), target, dtype)
    show(capsys, DEFAULT, found)
    assert all(used.stack == 0 and used.local == 0 for used in found)


@pytest.mark.parametrize("past_2_gib", [False, True])
def test_an_amd_target_compiles(past_2_gib: bool, capsys: pytest.CaptureFixture[str]) -> None:
    found = aot.compile_kernels(Tiles.fitting(*DEFAULT), "gfx942", past_2_gib=past_2_gib)
    show(capsys, DEFAULT, found)
    assert [used.kernel for used in found] == NAMES
    assert all(used.stack == 0 and used.local == 0 for used in found)


class AmdDriver(test_launch.OfflineDriver):
    """Stands for the driver of an AMD GPU, as far as compiling goes."""

    def get_current_target(self) -> GPUTarget:
        return aot.TARGETS["gfx942"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are compiled for an AMD GPU as long as this lasts, and forgotten with it."""
    monkeypatch.setattr(triton.runtime.driver, "_active", AmdDriver())
    for kernel in test_launch.KERNELS:
        kernel.device_caches.clear()
    yield
    for kernel in test_launch.KERNELS:
        kernel.device_caches.clear()


def arguments(kernel: Any, constants: dict[str, Any], size: int) -> dict[str, Any]:
    """Of a launch, by name: arrays of ``size`` bytes without memory (nothing is launched) and numbers."""
    dtypes = {"fp32": torch.float32, "i32": torch.int32, "i64": torch.int64}
    found: dict[str, Any] = {name: 1.5 for name in kernel.arg_names} | {"num_atoms": 7} | constants
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            dtype = dtypes[POINTER_TYPES.get(name, "fp32")]
            found[name] = torch.empty(size // dtype.itemsize, dtype=dtype, device="meta")
    return {name: found[name] for name in kernel.arg_names}


@pytest.mark.parametrize("past_2_gib", [False, True])
def test_the_code_for_amd_is_that_of_a_launch(past_2_gib: bool, offline: None) -> None:
    """What a launch makes of its arguments is Triton's affair: the code looked at above must be the one it runs."""
    tiles = Tiles.fitting(*DEFAULT)
    constants: list[dict[str, Any]] = [
        {**tiles.forward_constants("hip")},
        {**tiles.query_constants("hip")},
        {**tiles.key_constants()},
    ]
    ahead, other = (aot.compile_kernels(tiles, "gfx942", past_2_gib=past) for past in (past_2_gib, not past_2_gib))
    for kernel, own, looked_at, different in zip(test_launch.KERNELS, constants, ahead, other, strict=True):
        given = arguments(kernel, own, 2**31 if past_2_gib else 2**31 - 16)
        built = kernel.warmup(**given, grid=(1,), **options(looked_at.warps))
        code = aot.digest_of(built.asm["amdgcn"])
        assert code == looked_at.code, looked_at.kernel
        assert code != different.code, looked_at.kernel
