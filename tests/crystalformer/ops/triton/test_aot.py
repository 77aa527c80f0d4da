"""G4: the kernels compile for GPUs that are not here, without spills or local memory."""

from __future__ import annotations

import sys

import pytest

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from crystalformer.ops.triton import Tiles, aot  # noqa: E402 - after the check for triton

SHAPES = [(8, 16, 64), (8, 16, 0), (8, 16, 128), (4, 32, 64), (16, 8, 64)]
"""H, D, K: the default model, without and with more radial bases, and other splits of 128 features."""

EDGES = [(2, 256, 512), (20, 4, 96), (3, 24, 48)]
"""Largest D and K; more heads than a program takes; sizes that are no powers of two."""


def show(capsys: pytest.CaptureFixture[str], shape: tuple[int, int, int], found: list[aot.Resources]) -> None:
    """Print the resource table whatever pytest captures."""
    with capsys.disabled():
        for used in found:
            sys.stdout.write(
                f"\n{used.target:>7} H={shape[0]} D={shape[1]} K={shape[2]} {used.kernel:<21} warps {used.warps} "
                f"REG {used.registers} STACK {used.stack} LOCAL {used.local} SHARED {used.shared}"
            )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_spills_and_no_local_memory(
    shape: tuple[int, int, int], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = aot.compile_kernels(Tiles.fitting(*shape), target)
    show(capsys, shape, found)
    assert [used.kernel for used in found] == ["forward_kernel", "query_backward_kernel", "key_backward_kernel"]
    assert all(used.stack == 0 and used.local == 0 for used in found)


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_the_largest_and_oddest_sizes_fit_too(
    shape: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = aot.compile_kernels(Tiles.fitting(*shape), "sm_90")
    show(capsys, shape, found)
    assert all(used.stack == 0 and used.local == 0 for used in found)


def test_bfloat16_operands(capsys: pytest.CaptureFixture[str]) -> None:
    found = aot.compile_kernels(Tiles.fitting(8, 16, 64), "sm_90", "bf16")
    show(capsys, (8, 16, 64), found)
    assert all(used.stack == 0 and used.local == 0 for used in found)


def test_an_amd_target_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    found = aot.compile_kernels(Tiles.fitting(8, 16, 64), "gfx942")
    show(capsys, (8, 16, 64), found)
    assert all(used.stack == 0 and used.local == 0 for used in found)
