"""A training step (forward and backward of the default model): rows C1, C2, C3 of the design's targets.

    python -m tests.benchmarks.bench_step [--rows C1,C2,C3] [--device cpu|cuda] [--repeats N] [--crystals 32,64]

C1  milliseconds a step against the dense oracle doing the authors' work (every pair times 5³ images, head by head),
    in the same run; the step makes its plans and radial features anew, the neighbour lists are there as in training.
    roofline: the matrix products of the step of all atoms at the machine's rate for a large one, and own_roofline:
    those of the distinct atoms, which are the ones that are computed (crystalformer/equivalence.py).
C2  peak resident memory of that step in a process of its own, above that of a process that only makes the batch.
C3  a 10,000-atom supercell against a 100-atom cell of the same crystal: time an atom on one thread and peak memory.
With --device cuda the rows are milliseconds of the torch and triton backends, without the oracle.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from crystalformer import CrystalBatch, Crystalformer, ModelConfig
from crystalformer.ops import attention, reference
from tests.benchmarks.crystals import batch, crystals, supercell
from tests.benchmarks.measure import Row, environment, product_rate, report, timing
from tests.benchmarks.operations import step_operations
from tests.benchmarks.options import Parser, device, positive, several, some_of

ORACLE_BOX = 2
"""Images -2..2 along each lattice vector: the authors' least."""

Step = Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the rows asked for, print them and return them."""
    parser = Parser("step", "A training step: speed, memory, large cells")
    parser.add_argument("--rows", type=some_of("C1", "C2", "C3"), default="C1,C2,C3", help="which of C1, C2, C3")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--crystals", type=several(positive), default="32,64", help="batch sizes of C1 on the CPU")
    parser.add_argument("--threads", type=several(_threads), default="1,all", help="thread counts of C1 on the CPU")
    parser.add_argument("--memory", choices=("batch", "auto", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        return _memory_of(options.memory)
    return run(
        rows=options.rows,
        device=options.device,
        repeats=options.repeats,
        counts=options.crystals,
        threads=options.threads,
    )


def _threads(text: str) -> int:
    """A number of threads, or "all"."""
    return torch.get_num_threads() if text == "all" else positive(text)


def run(
    *,
    rows: Sequence[str] = ("C1", "C2", "C3"),
    device: str = "cpu",
    repeats: int = 15,
    counts: Sequence[int] = (32, 64),
    threads: Sequence[int] = (1,),
) -> dict[str, Any]:
    """The rows by name; prints a table and JSON. C3 goes first: it reads this process's peak memory."""
    found: list[Row] = []
    if "C3" in rows:
        found += _large(device)
    if "C2" in rows and device == "cpu":
        found += _memory()
    if "C1" in rows:
        found += _speed_on_gpu(repeats) if device == "cuda" else _speed(repeats, counts, threads)
    return report(found, environment(device))


def training_step(members: CrystalBatch, backend: str, device: str = "cpu") -> tuple[Crystalformer, Step]:
    """The default model with frozen statistics and its step on a batch whose neighbour lists are there."""
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig(), backend=backend).to(device)
    members = members if device == "cpu" else members.to(device)
    oracle = functools.partial(reference.attend_real, box=ORACLE_BOX)
    _freeze(model, members)
    radius = model.config.neighbor_radius
    shells, parameters = members.distinct(radius).shells(radius), list(model.parameters())

    def step() -> None:
        shells.cache.clear()
        for parameter in parameters:
            parameter.grad = None
        model(members).square().sum().backward()

    def dense() -> None:
        with mock.patch.object(attention.reference, "attend_real", oracle):
            step()

    return model, dense if backend == "reference" else step


def _freeze(model: Crystalformer, members: CrystalBatch) -> None:
    """Statistics as the torch backend gives them: the oracle's own would take another forward."""
    twin = Crystalformer(model.config, backend="torch").to(members.device)
    twin.load_state_dict(model.state_dict())
    twin.freeze_statistics(members)
    model.load_state_dict(twin.state_dict())


def _speed(repeats: int, counts: Sequence[int], thread_counts: Sequence[int]) -> list[Row]:
    rows = []
    every = torch.get_num_threads()
    for threads in sorted(set(thread_counts)):
        torch.set_num_threads(threads)
        rate = product_rate("cpu")
        for count in counts:
            members = batch(crystals(count))
            model, step = training_step(members, "auto")
            ours = timing(step, repeats, "cpu", warmup=3)
            radius = model.config.neighbor_radius
            distinct = members.distinct(radius)
            work, own = (step_operations(model, m) for m in (members.unmerged(radius), distinct))
            dense = timing(training_step(members, "reference")[1], 1, "cpu", warmup=0)
            rows.append(
                {
                    "row": "C1",
                    "crystals": count,
                    "atoms": members.num_atoms,
                    "distinct": distinct.num_atoms,
                    "threads": threads,
                    "ms": 1e3 * ours.wall,
                    "oracle_ms": 1e3 * dense.wall,
                    "times_faster": dense.wall / ours.wall,
                    "cpu_ms": 1e3 * ours.cpu if threads == 1 else None,
                    "times_faster_cpu": dense.cpu / ours.cpu if threads == 1 else None,
                    "gflop": work / 1e9,
                    "machine_gflops": rate / 1e9,
                    "roofline_ms": 1e3 * work / rate,
                    "of_roofline": ours.wall * rate / work,
                    "own_gflop": own / 1e9,
                    "of_own_roofline": ours.wall * rate / own,
                    "raw": {"ours_s": ours.raw, "oracle_s": dense.raw},
                }
            )
    torch.set_num_threads(every)
    return rows


def _speed_on_gpu(repeats: int) -> list[Row]:
    rows = []
    for backend in ("torch", "triton"):
        for count in (32, 64, 128):
            members = batch(crystals(count))
            result = timing(training_step(members, backend, "cuda")[1], repeats, "cuda", warmup=5)
            rows.append({"row": "C1", "crystals": count, "backend": backend, "ms": 1e3 * result.wall})
    return rows


def _memory() -> list[Row]:
    peaks = {what: _peak_mb(what) for what in ("batch", "auto", "reference")}
    ours, dense = (peaks[what] - peaks["batch"] for what in ("auto", "reference"))
    row: Row = {"row": "C2", "crystals": 32, "peak_mb": peaks["auto"], "oracle_peak_mb": peaks["reference"]}
    return [{**row, "batch_only_mb": peaks["batch"], "share": ours / dense, "raw": peaks}]


def _peak_mb(what: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--memory", what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output)["peak_mb"])


def _own_peak_mb() -> float:
    """Peak resident memory of this process; Linux's mark first, as getrusage starts at the parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    marks = [float(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return (marks[0] if marks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def _memory_of(what: str) -> dict[str, Any]:
    """Print this process's peak after one step; ``what`` is a backend, or "batch" for no step."""
    torch.set_num_threads(1)
    members = batch(crystals(32))
    members.distinct(ModelConfig().neighbor_radius)
    if what != "batch":
        training_step(members, what)[1]()
    result = {"peak_mb": _own_peak_mb()}
    sys.stdout.write(json.dumps(result) + "\n")
    return result


def _large(device: str) -> list[Row]:
    rows: list[Row] = []
    every = torch.get_num_threads()
    torch.set_num_threads(1)
    for atoms, repeats in ((100, 15), (10_000, 3)):
        members = batch([supercell(atoms)])
        start = time.perf_counter()
        members.distinct(ModelConfig().neighbor_radius)
        lists = time.perf_counter() - start
        _, step = training_step(members, "auto", device)
        result = timing(step, repeats, device)
        rows.append(
            {
                "row": "C3",
                "atoms": members.num_atoms,
                "threads": torch.get_num_threads(),
                "us_an_atom": 1e6 * result.wall / members.num_atoms,
                "cpu_us_an_atom": 1e6 * result.cpu / members.num_atoms,
                "lists_us_an_atom": 1e6 * lists / members.num_atoms,
                "peak_mb": _own_peak_mb(),
                "raw": {"step_s": result.raw},
            }
        )
    torch.set_num_threads(every)
    rows[1]["times_small"] = rows[1]["us_an_atom"] / rows[0]["us_an_atom"]
    rows[1]["times_small_cpu"] = rows[1]["cpu_us_an_atom"] / rows[0]["cpu_us_an_atom"]
    return rows


if __name__ == "__main__":
    main()
