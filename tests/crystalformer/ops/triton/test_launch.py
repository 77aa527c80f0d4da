"""What the launcher does without a GPU: refusals, the transposed list, and how often it compiles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after the check for triton

from crystalformer.ops.triton import aot, kernels, launch, rows  # noqa: E402
from crystalformer.ops.triton.tiles import Tiles  # noqa: E402
from tests.crystalformer.ops.triton import cases  # noqa: E402


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, crystalformer, crystalformer.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tensors_off_the_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu"):
        launch.validate(torch.device("cpu"), torch.float32, 8, 16, 64)


def test_a_gpu_that_triton_cannot_reach_has_a_reason_and_auto_does_without(monkeypatch) -> None:
    """As where there is no C compiler: Triton then fails at its first kernel, in the middle of a run."""
    problem = launch.driver_problem()
    if torch.cuda.is_available():
        assert problem is None
        return
    assert problem is not None and problem.startswith("triton backend: cannot launch kernels: ")
    assert "\n" not in problem
    monkeypatch.setattr(launch, "_DRIVER_PROBLEM", problem)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert launch.refusal(torch.device("cuda"), torch.float32, 8, 16, 64) == problem


def test_too_many_features_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be 1 to 256, got 257"):
        Tiles.fitting(1, 257, 64)


def test_too_many_radial_bases_are_refused() -> None:
    with pytest.raises(ValueError, match="value_pe_dist_real must be 0 to 512, got 528"):
        Tiles.fitting(8, 16, 528)


def test_a_tile_higher_than_the_padding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows must be one of \(16, 32, 64, 128\), got 256"):
        replace(Tiles.fitting(8, 16, 64), rows=256)


@pytest.mark.parametrize("case", [cases.CASES[0], cases.CASES[1]], ids=str)
def test_every_row_is_kept_and_knows_its_partner(case: cases.Case) -> None:
    shells = cases.make_batch(case).shells(5.0)
    listed = rows.rows_of(shells)
    place = torch.nonzero(listed.distance != rows.NO_DISTANCE).squeeze(1)
    assert torch.equal(listed.neighbor[place].long(), shells.neighbor)
    assert torch.equal(listed.distance[place], shells.distance.float())
    assert torch.equal(listed.log_count[place].exp2().round().long(), shells.count)
    atom = torch.searchsorted(listed.start, place, right=True) - 1
    assert torch.equal(atom, torch.repeat_interleave(torch.arange(len(shells.ptr) - 1), shells.ptr.diff()))
    partner = listed.partner[place].long()
    where = torch.searchsorted(place, partner)
    assert torch.equal(place[where], partner)
    assert torch.equal(atom[where], shells.neighbor)
    assert torch.equal(shells.neighbor[where], atom)
    assert torch.equal(shells.distance[where], shells.distance)
    assert torch.equal(shells.count[where], shells.count)


@pytest.mark.parametrize("case", [cases.CASES[0], cases.CASES[1]], ids=str)
def test_rows_that_fill_up_have_no_weight_and_no_partner(case: cases.Case) -> None:
    listed = rows.rows_of(cases.make_batch(case).shells(5.0))
    assert not bool((listed.start % 16).any())
    filling = listed.distance == rows.NO_DISTANCE
    assert int(filling.sum()) >= 128
    assert bool(torch.isneginf(listed.log_count[filling]).all())
    assert set(listed.partner[filling].tolist()) == {rows.NO_PARTNER}
    assert not bool(torch.isneginf(listed.log_count[~filling]).any())


def test_rows_derived_in_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        listed = rows.rows_of(cases.make_batch(cases.CASES[1]).shells(5.0))
    assert not any(getattr(listed, name).is_inference() for name in ("start", "neighbor", "partner", "distance"))


def test_rows_are_derived_once_a_list() -> None:
    shells = cases.make_batch(cases.CASES[0]).shells(5.0)
    listed = rows.rows_of(shells)
    assert rows.rows_of(shells) is listed


KERNELS = (kernels.forward_kernel, kernels.query_backward_kernel, kernels.key_backward_kernel)


class OfflineDriver:
    """Stands for the driver of an sm_90 GPU, as far as compiling goes."""

    def get_current_target(self) -> GPUTarget:
        return aot.TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """Every launch compiles for sm_90 and stops there; yields the kernels compiled so far, by name and cache key."""
    compiled: dict[str, dict[str, Any]] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.__name__, {})[kernel.hash] = kernel
        return kernel

    monkeypatch.setattr(triton.runtime.driver, "_active", OfflineDriver())
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "validate", lambda *_: None)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield compiled
    for kernel in KERNELS:
        kernel.device_caches.clear()


def test_batches_of_any_size_share_one_compilation_and_it_is_the_one_tested(
    offline: dict[str, dict[str, Any]],
) -> None:
    for sizes in [(1,), (1, 1), (3, 5), (16,), (2, 6, 8), (31, 4)]:
        case = cases.Case(name="count", sizes=sizes, heads=8, features=16, bases=64, scale=0.5)
        cases.kernels(case, "cpu")
    assert sorted(offline) == ["forward_kernel", "key_backward_kernel", "query_backward_kernel"]
    assert [len(kernel.device_caches[0][0]) for kernel in KERNELS] == [1, 1, 1]
    ahead = {used.kernel: used for used in aot.compile_kernels(Tiles.fitting(8, 16, 64), "sm_90")}
    for name, built in offline.items():
        (ptx,) = {kernel.asm["ptx"] for kernel in built.values()}
        assert aot.digest_of(ptx) == ahead[name].code
