"""The attention operator alone, forward and backward, at the default model's sizes.

    python -m tests.benchmarks.bench_attention [--device cpu|cuda] [--repeats N]

A row a backend and batch size: milliseconds of one layer's attention with its plan made (the first layer makes it for
all), the images in its lists and, on the CPU, how many times faster than the dense oracle doing the
authors' work (every pair times 5³ images) it is in the same run; beside it the layer's matrix products at the
machine's rate for a large one. Reciprocal space is shown beside.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from crystalformer import CrystalBatch, ModelConfig
from crystalformer.ops import RadialBasis, attention, blocks, periodic_attention, reference
from tests.benchmarks.crystals import batch, crystals
from tests.benchmarks.measure import Row, environment, product_rate, report, timing

ORACLE_BOX = 2
"""Images -2..2 along each lattice vector: the authors' least."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the rows, print them and return them."""
    parser = argparse.ArgumentParser(description="Periodic attention: forward and backward of one layer")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args(arguments)
    return run(device=options.device, repeats=options.repeats)


def run(*, device: str = "cpu", repeats: int = 25) -> dict[str, Any]:
    """The rows by backend and batch size; prints a table and JSON."""
    every = torch.get_num_threads()
    rows: list[Row] = []
    if device == "cuda":
        rows += [_row(name, n, device, repeats) for name in ("torch", "triton") for n in (32, 64, 128)]
    else:
        for threads in sorted({1, every}):
            torch.set_num_threads(threads)
            for count in (32, 64):
                rows += _against_oracle(count, repeats)
        torch.set_num_threads(every)
    return report(rows, environment(device))


def layer(members: CrystalBatch, backend: str, domain: attention.Domain = "real") -> Callable[[], None]:
    """Forward and backward of one attention layer with random operands; rho as at the start of a training, near 1."""
    config, device = ModelConfig(), members.device
    generator = torch.Generator().manual_seed(0)
    shape = (members.num_atoms, config.head_num, config.head_dim)

    def leaf(values: Tensor) -> Tensor:
        return values.to(device).requires_grad_()

    q, k, v = (leaf(torch.randn(shape, generator=generator)) for _ in range(3))
    rho = leaf(1.0 + 0.1 * torch.rand(shape[:2], generator=generator))
    radial = weight = None
    if domain == "real":
        count, r_max = config.value_pe_dist_real, config.radial_max(0)
        radial = RadialBasis(count=count, r_max=r_max, width=config.value_pe_width_scale * r_max / count)
        weight = leaf(0.1 * torch.randn(shape[1], shape[2], count, generator=generator))
    scale, lower = (
        (config.layer_scale_real(0), config.gauss_lb_real)
        if domain == "real"
        else (config.layer_scale_reci(0), config.gauss_lb_reci)
    )
    oracle = functools.partial(reference.attend_real, box=ORACLE_BOX)

    def call() -> None:
        for operand in (q, k, v, rho, weight):
            if operand is not None:
                operand.grad = None
        with mock.patch.object(attention.reference, "attend_real", oracle):
            y = periodic_attention(
                q,
                k,
                v,
                rho,
                members,
                scale=scale,
                rho_min=lower,
                radial=radial,
                weight=weight,
                cutoff_sigmas=config.cutoff_sigmas,
                domain=domain,
                backend=backend,
            )
            y.sum().backward()

    return call


def _row(
    backend: str, count: int, device: str, repeats: int, domain: attention.Domain = "real", warmup: int = 3
) -> Row:
    members = batch(crystals(count))
    members = members if device == "cpu" else members.to(device)
    result = timing(layer(members, backend, domain), repeats, device, warmup)
    row: Row = {
        "domain": domain,
        "backend": backend,
        "crystals": count,
        "atoms": members.num_atoms,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "ms": 1e3 * result.wall,
        "cpu_ms": 1e3 * result.cpu,
        "raw": result.raw,
    }
    if domain == "real":
        images = float(members.shells(ModelConfig().neighbor_radius).count.sum())
        row["images_an_atom"] = images / members.num_atoms
    if domain == "real" and backend == "torch":
        row["gflop"] = operations(members) / 1e9
    return row


def operations(members: CrystalBatch) -> float:
    """Floating-point operations of a layer's matrix products, forward and backward, with its plan's tables.

    For each shell row, H·K for the radial sums and as many for their gradient; for each pair of a block, seven
    products over H·D; W applied once an atom, its gradient and the sums' gradient.
    """
    config, total = ModelConfig(), 0.0
    handle = attention.block_plan(members, config.neighbor_radius, torch.empty(0))
    for block in blocks.PLANS.plan(handle).blocks:
        if block.tables is None:
            raise RuntimeError("operations are counted after a layer has run")
        total += 4.0 * block.queries * block.tables.rows.capacity * config.head_num * config.value_pe_dist_real
        total += 14.0 * block.queries * block.tables.num_keys * config.model_dim
    return total + 6.0 * members.num_atoms * config.model_dim * config.value_pe_dist_real


def _against_oracle(count: int, repeats: int) -> list[Row]:
    ours = _row("torch", count, "cpu", repeats)
    rate = product_rate("cpu")
    ours["roofline_ms"] = 1e3 * ours["gflop"] * 1e9 / rate
    ours["of_roofline"] = ours["ms"] / ours["roofline_ms"]
    dense = _row("reference", count, "cpu", 1, warmup=0)
    ours["times_faster"] = dense["ms"] / ours["ms"]
    if torch.get_num_threads() == 1:
        ours["times_faster_cpu"] = dense["cpu_ms"] / ours["cpu_ms"]
    return [ours, dense, _row("torch", count, "cpu", repeats, "reci")]


if __name__ == "__main__":
    main()
