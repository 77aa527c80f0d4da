"""G3: the attention kernels of one layer beside the floors that a GPU sets for them, and other tiles for them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig
from crystalformer.ops import RadialBasis
from crystalformer.ops.triton import launch
from crystalformer.ops.triton.rows import rows_of
from crystalformer.ops.triton.tiles import Tiles, choose
from tests.benchmarks.gpu_process import Row, Task
from tests.benchmarks.gpu_timing import kernel_us, median_ms

EXPONENTIALS_A_CLOCK = 16
"""Of one multiprocessor, on NVIDIA GPUs of compute capability 8.0 to 10.0."""

ASSUMED_CLOCK = 1.7e9
"""Hz, where neither torch nor nvidia-smi tells."""

TILE_SHAPES = [(16, 2), (32, 1), (32, 2), (32, 4), (64, 4)]
"""Rows and warps to try beside the default."""


class Kernels:
    """The attention operators of one layer of the default model on a batch, and what they must at least do."""

    def __init__(self, batch: CrystalBatch, config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        n, heads, features = batch.num_atoms, config.head_num, config.head_dim
        shape = (n, heads, features)
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


def floor_tasks(batch: CrystalBatch, repeats: int) -> list[Task]:
    """The GPU's rates; then each pass: microseconds of the GPU alone beside the largest of its floors."""
    kernels = cache(lambda: Kernels(batch, ModelConfig()))
    rates = cache(lambda: machine_rates(batch.device, repeats))

    def measured(name: Literal["forward", "backward"]) -> Row:
        function = kernels().forward if name == "forward" else kernels().backward
        microseconds, work = kernel_us(function, repeats, batch.device), kernels().work()[name]
        floor = floors(work, rates())
        beside = {"us": microseconds, "times_floor": microseconds / floor["floor_us"]}
        return {**beside, **floor, **work, "rows": kernels().rows}

    return [
        Task("rates", rates),
        Task("forward", lambda: measured("forward")),
        Task("backward", lambda: measured("backward")),
    ]


def floors(work: dict[str, float], rates: Row) -> Row:
    """The least microseconds for the bytes, operations and exponentials of ``work`` at ``rates``; floor_us: overall.

    Operations can be done as float32, or as three TF32 products each on the matrix units (tf32x3, as accurate):
    nothing keeps a kernel from the faster of the two, so that is the floor of the operations. Both units at work at
    once, which no kernel here tries, could go below it, to half at best.
    """
    found = {f"{what}_us": 1e6 * amount / rates[what] for what, amount in work.items() if what in rates}
    arithmetic = ["flop_us"]
    if "tf32_flop" in rates:
        found["tf32x3_us"] = 1e6 * 3.0 * work["flop"] / rates["tf32_flop"]
        arithmetic.append("tf32x3_us")
    quicker = min(arithmetic, key=lambda name: found[name])
    binding = max({*found} - {*arithmetic} | {quicker}, key=lambda name: found[name])
    return {"floor_us": found[binding], "floor_of": binding.removesuffix("_us"), **found}


def machine_rates(device: torch.device, repeats: int) -> Row:
    """What the device does in a second: measured, but for the exponentials.

    bytes: copied, read and written ones both counted. flop, tf32_flop: operations of a large product of matrices, in
    float32 proper and (GPUs only) with TF32 allowed. exponentials: of all multiprocessors at the highest clock; a GPU
    that runs below it does fewer.
    """
    on_gpu = device.type == "cuda"
    size = 2**28 if on_gpu else 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), repeats, device) / 1e3
    side = 8192 if on_gpu else 256
    matrix = torch.randn(side, side, device=device)

    def operations(precision: str) -> float:
        with float32_products(precision):
            milliseconds = median_ms(lambda: matrix @ matrix, max(1, repeats // 5), device)
        return 2.0 * side**3 / (milliseconds / 1e3)

    rates: Row = {"bytes": 2.0 * size / copy, "flop": operations("ieee")}
    if on_gpu:
        rates["tf32_flop"] = operations("tf32")
        properties = torch.cuda.get_device_properties(device)
        rates["clock"], clock = clock_of(properties)
        rates["exponentials"] = EXPONENTIALS_A_CLOCK * properties.multi_processor_count * clock
    return rates


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within, products on a GPU are "ieee" float32 or may be "tf32".

    By the setting that the library's own_precision uses: torch refuses a mix of it with the older allow_tf32.
    """
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def clock_of(properties: Any) -> tuple[str, float]:  # torch's, whose fields differ by version
    """Where the highest clock of the multiprocessors comes from, in words, and the clock in Hz."""
    kilohertz = getattr(properties, "clock_rate", 0)
    if kilohertz:
        return "reported", 1e3 * kilohertz
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    if hasattr(properties, "uuid"):
        command.append(f"--id=GPU-{properties.uuid}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return "nvidia-smi", 1e6 * float(answer.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return f"assumed {ASSUMED_CLOCK / 1e9} GHz ({type(error).__name__})", ASSUMED_CLOCK


def tile_tasks(batch: CrystalBatch, repeats: int) -> list[Task]:
    """Forward and backward with each choice of tile height and warps; the default comes first."""
    config = ModelConfig()
    default = Tiles.fitting(config.head_num, config.head_dim, config.value_pe_dist_real)
    kernels = cache(lambda: Kernels(batch, config))
    shapes = TILE_SHAPES if batch.device.type == "cuda" else []

    def other(height: int, warps: int) -> Tiles:
        return replace(default, rows=height, warps=warps, forward_warps=warps)

    def timed(tiles: Callable[[], Tiles]) -> Row:
        passes = kernels()
        choose(tiles())
        try:
            return {
                "forward_us": kernel_us(passes.forward, repeats, batch.device),
                "backward_us": kernel_us(passes.backward, repeats, batch.device),
            }
        except OutOfResources as error:  # no fault: these tiles are too large for this GPU
            return {"refused": str(error)}
        finally:
            choose(default)

    first = Task(f"{default.rows} rows, {default.warps} warps (default)", partial(timed, lambda: default))
    others = [Task(f"{shape[0]} rows, {shape[1]} warps", partial(timed, partial(other, *shape))) for shape in shapes]
    return [first, *others]
