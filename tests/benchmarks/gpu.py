"""The whole measurement of the Triton backend on one GPU, in under 8 minutes: python -m tests.benchmarks.gpu

Needs torch, triton, numpy, pytest and this checkout, nothing else. Prints a table and, with --json FILE, writes it.

correctness  every test case on the GPU against the float64 oracle, and two runs bit for bit
G1           training step (forward, backward, clipping, AdamW) of the default model, batch 256 of about 10 atoms:
             triton against our torch backend, launched one by one and as one CUDA graph
G3           the attention kernels against the floor that this GPU's measured bandwidth, float32 rate and exponentials
             a second set for their bytes and operations
tiles        the same kernels with other tile heights and warps (crystalformer.ops.triton.tiles.choose)

The crystals are made up. An atom has 73 shell rows within its reach; with --sites random 173, since no two images
share a distance; in the real crystals of tests/golden 43.
On a machine without a GPU: TRITON_INTERPRET=1 python -m tests.benchmarks.gpu --device cpu --batch 2 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer
from crystalformer.ops import RadialBasis
from crystalformer.ops.triton import Tiles, launch
from crystalformer.ops.triton.rows import rows_of
from crystalformer.ops.triton.tiles import choose
from tests.crystalformer.ops.triton import cases

SECTIONS = ("correctness", "G1", "G3", "tiles")
VOLUME_AN_ATOM = 15.0
"""Å³, of typical inorganic crystals."""

EXPONENTIALS_A_CLOCK = 16
"""Of one multiprocessor, on NVIDIA GPUs of compute capability 8.0 to 10.0."""

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the chosen sections, print their rows and return them."""
    options = _options(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    batch = make_batch(options.batch, options.atoms, options.sites).to(device)
    sections: dict[str, Callable[[], list[Row]]] = {
        "correctness": lambda: correctness(device, options.cases),
        "G1": lambda: training_steps(batch, options.repeats),
        "G3": lambda: kernel_floors(batch, options.repeats),
        "tiles": lambda: tile_sweep(batch, options.repeats),
    }
    rows: list[Row] = [machine(device, batch)]
    _print(rows[0])
    for name in options.sections:
        start = time.perf_counter()
        try:
            found = sections[name]()
        except RuntimeError as error:  # say so and go on: the time on a GPU is short
            found = [{"passed": False, "error": str(error)}]
        for row in found:
            rows.append({"section": name, **row})
            _print(rows[-1])
        _print({"section": name, "seconds": time.perf_counter() - start})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=256, help="crystals")
    parser.add_argument("--atoms", type=int, default=10, help="atoms a crystal on average")
    parser.add_argument("--sites", default="grid", choices=("grid", "random"), help="where the atoms are")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls; medians are printed")
    parser.add_argument("--cases", nargs="*", help="names of the cases to check (all)")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    return parser.parse_args(arguments)


def _print(row: Row) -> None:
    cells = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items())
    sys.stdout.write("  ".join(cells) + "\n")
    sys.stdout.flush()


def machine(device: torch.device, batch: CrystalBatch) -> Row:
    """What was measured, on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, Triton's interpreter"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, **versions, "crystals": batch.num_crystals, "atoms": batch.num_atoms}


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


def _grid_points(size: int, random: np.random.Generator) -> Any:  # noqa: ANN401 - a float array (size, 3)
    side = int(np.ceil(np.cbrt(2 * size)))
    chosen = random.permutation(side**3)[:size]
    return np.stack(np.unravel_index(chosen, (side, side, side)), axis=1) / side


def correctness(device: torch.device, names: list[str] | None) -> list[Row]:
    """Worst relative error of forward and gradients of every case, and the share of repeated results that agree."""
    rows: list[Row] = []
    for case in [*cases.CASES, cases.LARGE]:
        if names and case.name not in names:
            continue
        found, again = cases.kernels(case, device.type), cases.kernels(case, device.type)
        errors = cases.worst_error(found, cases.oracle(case))
        worst = max(errors, key=lambda name: errors[name])
        same = all(torch.equal(found[name], again[name]) for name in found)
        good = same and errors[worst] < cases.tolerance(case)
        rows.append({"case": case.name, "passed": good, "error": errors[worst], "in": worst, "bitwise": same})
    return rows


def median_ms(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median milliseconds of a call, from its launch to the end of its work."""
    times = []
    for attempt in range(repeats + max(1, repeats // 5)):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        if attempt >= max(1, repeats // 5):
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphed(function: Callable[[], object], calls: int = 1) -> Callable[[], object]:
    """``calls`` calls of a function without host work, as one CUDA graph: what the GPU alone needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def training_step(batch: CrystalBatch, backend: str) -> Callable[[], object]:
    """One step of the default model on a batch whose lists are at hand."""
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig(), backend=backend).to(batch.device)
    model.freeze_statistics(batch)
    model.eval()  # nothing depends on it but the check for frozen statistics, which waits for the GPU
    on_gpu = batch.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=on_gpu, capturable=on_gpu)
    target = torch.randn(batch.num_crystals, 1, device=batch.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(batch) - target).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def training_steps(batch: CrystalBatch, repeats: int) -> list[Row]:
    """G1: milliseconds a step; the ratio is torch backend over this row."""
    rows: list[Row] = []
    for backend in ("torch", "triton"):
        rows.append({"backend": backend, "ms": median_ms(training_step(batch, backend), repeats, batch.device)})
    if batch.device.type == "cuda":
        rows.append({"backend": "triton, one CUDA graph", **_graphed_step(batch, repeats)})
    shells = batch.shells(ModelConfig().neighbor_radius)

    def derive() -> object:
        shells.cache.pop("triton", None)
        return rows_of(shells)

    for row in rows:
        if "ms" in row:
            row["torch_over_this"] = rows[0]["ms"] / row["ms"]
    return [*rows, {"backend": "triton, list of a new batch", "ms": median_ms(derive, repeats, batch.device)}]


def _graphed_step(batch: CrystalBatch, repeats: int) -> Row:
    """The step as one graph, or why it cannot be captured."""
    try:
        return {"ms": median_ms(graphed(training_step(batch, "triton")), repeats, batch.device)}
    except RuntimeError as error:
        return {"not_captured": str(error).partition("\n")[0]}


class Kernels:
    """The attention operators of one layer of the default model on a batch, and what they must at least do."""

    def __init__(self, batch: CrystalBatch, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        n, heads, features = batch.num_atoms, config.head_num, config.head_dim
        shape = (n, heads, features)
        self.device, self.tiles = batch.device, Tiles.fitting(heads, features, config.value_pe_dist_real)
        r_max = config.radial_max(0)
        count = config.value_pe_dist_real
        self.radial = RadialBasis(count=count, r_max=r_max, width=r_max / count)
        self.operands = [torch.randn(shape, generator=generator).to(batch.device) for _ in range(3)]
        self.operands.append((0.9 + 0.4 * torch.rand(shape[:2], generator=generator)).to(batch.device))
        listed = rows_of(batch.shells(config.neighbor_radius))
        self.listed = (listed.start, listed.neighbor, listed.partner, listed.distance, listed.log_count)
        self.numbers = (config.layer_scale_real(0), config.cutoff_sigmas, count, r_max / count, self.radial.width)
        self.kept = self.forward()
        self.rows = int((self.kept[3].long() - listed.start[:-1]).sum())
        self.dy = torch.randn(shape, generator=generator).to(batch.device)
        self.dsums = torch.randn((heads, n, count), generator=generator).to(batch.device)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """forward_kernel."""
        results: tuple[Tensor, Tensor, Tensor, Tensor] = launch.moments(*self.operands, *self.listed, *self.numbers)
        return results

    def backward(self) -> object:
        """query_backward_kernel and key_backward_kernel."""
        scale, _, _, step, width = self.numbers
        return launch.moments_backward(
            self.dy, self.dsums, *self.operands, *self.kept, *self.listed, scale, step, width
        )

    def work(self) -> dict[str, dict[str, float]]:
        """Bytes that must move once, float32 operations and exponentials of each pass, for the rows within reach."""
        n, heads, features = self.operands[0].shape
        count = self.radial.count
        atom_bytes = 4.0 * n * heads
        dense, sums = atom_bytes * features, atom_bytes * count
        listed = self.rows * 12.0 + n * 8.0
        product = 2.0 * self.rows * heads
        exponentials = float(self.rows * (count + heads))
        return {
            "forward": {
                "bytes": 4 * dense + sums + 2 * atom_bytes + listed,
                "flop": product * (2 * features + count),
                "exponentials": exponentials,
            },
            "backward": {
                "bytes": 8 * dense + 2 * sums + 3 * atom_bytes + 2 * listed + 4.0 * self.rows,
                "flop": product * (5 * features + count),
                "exponentials": exponentials,
            },
        }


def kernel_floors(batch: CrystalBatch, repeats: int) -> list[Row]:
    """G3: microseconds of the GPU alone beside the largest of its three floors."""
    kernels = Kernels(batch, ModelConfig())
    work = kernels.work()
    rates = machine_rates(batch.device, repeats)
    rows: list[Row] = [dict(rates)]
    for name, function in {"forward": kernels.forward, "backward": kernels.backward}.items():
        microseconds = kernel_us(function, repeats, batch.device)
        floors = {f"{what}_us": 1e6 * amount / rates[what] for what, amount in work[name].items() if what in rates}
        floor = max(floors.values())
        row = {"pass": name, "us": microseconds, "floor_us": floor, "times_floor": microseconds / floor}
        rows.append({**row, **floors, **work[name], "rows": kernels.rows})
    return rows


def kernel_us(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Microseconds of one call; on a GPU of 20 calls in a graph, so that launching them does not count."""
    if device.type != "cuda":
        return 1e3 * median_ms(function, repeats, device)
    return 1e3 * median_ms(graphed(function, 20), repeats, device) / 20


def machine_rates(device: torch.device, repeats: int) -> dict[str, float]:
    """A second: bytes copied and float32 operations of a matrix product, measured; exponentials by a GPU's clock."""
    on_gpu = device.type == "cuda"
    size = 2**28 if on_gpu else 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), repeats, device) / 1e3
    side = 8192 if on_gpu else 256
    matrix = torch.randn(side, side, device=device)
    product = median_ms(lambda: matrix @ matrix, max(1, repeats // 5), device) / 1e3
    rates = {"bytes": 2.0 * size / copy, "flop": 2.0 * side**3 / product}
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        clock = 1e3 * getattr(properties, "clock_rate", 1_700_000)
        rates["exponentials"] = EXPONENTIALS_A_CLOCK * properties.multi_processor_count * clock
    return rates


def tile_sweep(batch: CrystalBatch, repeats: int) -> list[Row]:
    """Forward and backward with each choice of tile height and warps; the default comes first."""
    kernels = Kernels(batch, ModelConfig())
    default = kernels.tiles
    choices = [default]
    if batch.device.type == "cuda":
        shapes = [(16, 2), (32, 1), (32, 2), (32, 4), (64, 4)]
        choices += [replace(default, rows=height, warps=warps, forward_warps=warps) for height, warps in shapes]
    rows: list[Row] = []
    try:
        for tiles in choices:
            choose(tiles)
            row: Row = {"rows": tiles.rows, "warps": tiles.warps}
            try:
                row["forward_us"] = kernel_us(kernels.forward, repeats, batch.device)
                row["backward_us"] = kernel_us(kernels.backward, repeats, batch.device)
            except OutOfResources as error:
                row["refused"] = str(error)
            rows.append(row)
    finally:
        choose(default)
    return rows


if __name__ == "__main__":
    passed = [row["passed"] for row in main() if "passed" in row]
    sys.exit(0 if all(passed) else 1)
