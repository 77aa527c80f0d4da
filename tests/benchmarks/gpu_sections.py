"""The tasks of the processes of tests/benchmarks/gpu.py, and of them the machine, correctness and tests."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.ops import periodic_attention
from tests.benchmarks.gpu_kernels import floor_tasks, tile_tasks
from tests.benchmarks.gpu_process import Row, Task, summary_of
from tests.benchmarks.gpu_steps import compile_tasks, set_as_in_training, step_tasks
from tests.crystalformer.ops.triton import cases

ROOT = Path(__file__).parents[2]

VOLUME_AN_ATOM = 15.0
"""Å³, of typical inorganic crystals."""

OUTCOME = re.compile(r"::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \(.*)?\s+\[ *\d+%\]$", re.MULTILINE)
"""In a line of ``pytest -v``."""

TAIL_LINES = 200
"""Of pytest's output that a row keeps, where a test failed."""


def tasks_of(part: str, options: argparse.Namespace) -> list[Task]:
    """The tasks of one process. options: gpu.py's, and ``end``, when its time is up on the monotonic clock."""
    device = torch.device(options.device)
    if part == "correctness":
        return correctness_tasks(device, options.cases)
    if part == "tests":
        left = options.end - time.monotonic()
        return [Task("pytest -m gpu", lambda: run_tests(["tests/crystalformer"], device, left))]
    if part in ("G1-deterministic", "compile"):
        set_as_in_training()
    else:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.manual_seed(0)
    batch = make_batch(options.batch, options.atoms, options.sites).to(device)
    if part == "machine":
        return [Task("machine", lambda: machine(device, batch))]
    if part == "G3":
        return floor_tasks(batch, options.repeats)
    if part == "tiles":
        return tile_tasks(batch, options.repeats)
    if part == "compile":
        return compile_tasks(batch, options.repeats)
    return step_tasks(batch, options.repeats, deterministic=part == "G1-deterministic")


def machine(device: torch.device, batch: CrystalBatch) -> Row:
    """What was measured, on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, Triton's interpreter"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"device": name, **versions, "date": date, "crystals": batch.num_crystals, "atoms": batch.num_atoms}


def make_batch(crystals: int, atoms: int, sites: str) -> CrystalBatch:
    """Crystals of 1 to 2 * atoms - 1 atoms at a usual density.

    "grid": tetragonal cells, atoms on half the points of a cubic grid or fewer, so that many images share a distance,
    as in real crystals. "random": skewed cells, atoms anywhere.
    """
    random = np.random.default_rng(0)
    sizes = random.integers(1, 2 * atoms, crystals)
    if sites == "grid":
        axes = np.eye(3) * np.where(random.random((crystals, 1, 1)) < 0.5, 1.0, [[[1.0], [1.0], [1.3]]])
        positions = [_grid_points(size, random) for size in sizes]
    else:
        axes = np.eye(3) + 0.2 * random.uniform(-1, 1, (crystals, 3, 3))
        positions = [random.random((size, 3)) for size in sizes]
    cells = axes * np.cbrt(sizes * VOLUME_AN_ATOM / np.abs(np.linalg.det(axes)))[:, None, None]
    cartesian = [points @ cell for points, cell in zip(positions, cells, strict=True)]
    return CrystalBatch.from_arrays(np.concatenate(cartesian), random.integers(1, 99, sizes.sum()), cells, sizes)


def _grid_points(size: int, random: np.random.Generator) -> Any:  # a float array (size, 3)
    side = int(np.ceil(np.cbrt(2 * size)))
    chosen = random.permutation(side**3)[:size]
    return np.stack(np.unravel_index(chosen, (side, side, side)), axis=1) / side


def correctness_tasks(device: torch.device, names: Sequence[str] | None) -> list[Task]:
    """Every case, or those named: forward and gradients against the float64 oracle, twice."""
    chosen = [case for case in [*cases.CASES, cases.LARGE] if not names or case.name in names]
    if unknown := {*(names or [])} - {case.name for case in chosen}:
        raise ValueError(f"there are no cases {', '.join(sorted(unknown))}")
    return [Task(case.name, partial(_correctness, case, device)) for case in chosen]


def _correctness(case: cases.Case, device: torch.device) -> Row:
    expected = cases.oracle(case)
    row = judged(case, cases.kernels(case, device.type), cases.kernels(case, device.type), expected)
    try:
        torch_errors = cases.worst_error(torch_results(case, device), expected)
        row["torch_error"] = torch_errors[_worst(torch_errors)]
    except Exception as error:  # noqa: BLE001 - it is there for comparison; the kernels' verdict stands without it
        row["torch_error"] = summary_of(error)
    return row


def judged(case: cases.Case, found: dict[str, Tensor], again: dict[str, Tensor], expected: dict[str, Tensor]) -> Row:
    """The verdict on two runs of a case: its worst relative error beside the limit, and whether they are one."""
    errors = cases.worst_error(found, expected)
    worst, limit = _worst(errors), cases.tolerance(case)
    same = all(torch.equal(found[name], again[name]) for name in found)
    verdict = {"passed": same and errors[worst] < limit, "relative_error": errors[worst], "limit": limit}
    return {**verdict, "in": worst, "bitwise": same}


def _worst(errors: dict[str, float]) -> str:
    """Whose error is largest; one that is no number is larger than any."""
    return max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))


def torch_results(case: cases.Case, device: torch.device) -> dict[str, Tensor]:
    """What ``cases.kernels`` gives, by the torch backend in the case's dtype (float32 but for one) on that device."""
    batch, operands = cases.make_batch(case).to(device), cases.make_operands(case)
    operands = {name: value.to(device, case.dtype) for name, value in operands.items()}
    dy = operands.pop("dy")
    leaves = {name: value.requires_grad_() for name, value in operands.items()}
    y = periodic_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["rho"],
        batch,
        scale=case.scale,
        rho_min=cases.RHO_MIN,
        radial=cases.radial_of(case),
        weight=leaves.get("weight"),
        cutoff_sigmas=cases.CUTOFF_SIGMAS,
        backend="torch",
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: value.cpu().double() for name, value in found.items()}


def run_tests(paths: list[str], device: torch.device, limit: float) -> Row:
    """``pytest -m gpu`` on paths: how many of the tests ended how, and the end of its output where not all passed.

    limit: seconds that the section has left. pytest is stopped somewhat earlier, so that what it has done is told.
    Of pyproject.toml's options only the markers are kept, and no plugin is loaded: a lent machine has none of ours.
    """
    words = ["-m", "gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    words += ["--continue-on-collection-errors"]
    words += ["-o", "faulthandler_timeout=60", "-W", "ignore::pytest.PytestConfigWarning", *paths]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "COLUMNS": "200"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            status: int | str = subprocess.run(
                [sys.executable, "-m", "pytest", *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, limit - 8.0),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "stopped: no time was left"
        file.seek(0)
        output = file.read()
    count = Counter(OUTCOME.findall(output))
    counts = {"succeeded": count["PASSED"], "failed": count["FAILED"] + count["ERROR"], "skipped": count["SKIPPED"]}
    # On a machine without a GPU all of them are skipped; on one with a GPU that would be no test at all.
    good = status == 0 and (counts["succeeded"] > 0 or device.type != "cuda")
    row = {"passed": good, **counts, "status": status, "seconds": time.perf_counter() - start}
    return row if good else {**row, "tail": "\n".join(output.splitlines()[-TAIL_LINES:])}
