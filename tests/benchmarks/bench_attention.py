"""The attention operator alone, forward and backward, at the default model's sizes.

    python -m tests.benchmarks.bench_attention [--device cpu|cuda] [--repeats N]

A row a backend and batch size: milliseconds of one layer's attention with its plan made (the first layer makes it for
all), the images in its lists and, on the CPU, how many times faster than the dense oracle doing the
authors' work (every pair times 5³ images) it is in the same run; beside it the layer's matrix products at the
machine's rate for a large one. Reciprocal space is shown beside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from crystalformer import CrystalBatch, ModelConfig
from crystalformer.ops import RadialBasis, attention, periodic_attention, reference
from tests.benchmarks.crystals import batch, crystals
from tests.benchmarks.measure import Row, environment, product_rate, report, timing
from tests.benchmarks.operations import attention_operations
from tests.benchmarks.options import Parser, device, positive

ORACLE_BOX = 2
"""Images -2..2 along each lattice vector: the authors' least."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the rows, print them and return them."""
    parser = Parser("attention", "Periodic attention: forward and backward of one layer")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=positive, default=25)
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
    """Forward and backward of one attention layer with random operands."""
    config, device = ModelConfig(), members.device
    generator = torch.Generator().manual_seed(0)
    shape = (members.num_atoms, config.head_num, config.head_dim)

    def leaf(values: Tensor) -> Tensor:
        return values.to(device).requires_grad_()

    q, k, v = (leaf(torch.randn(shape, generator=generator)) for _ in range(3))
    rho = leaf(layer_rho(members).cpu())
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


def layer_rho(members: CrystalBatch) -> Tensor:
    """(N, H) as at the start of a training, near 1."""
    heads = ModelConfig().head_num
    return 1.0 + 0.1 * torch.rand(members.num_atoms, heads, generator=torch.Generator().manual_seed(1))


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
    return row


def _against_oracle(count: int, repeats: int) -> list[Row]:
    ours, plain = (_row(backend, count, "cpu", repeats) for backend in ("numba", "torch"))
    members, config = batch(crystals(count)), ModelConfig()
    work = attention_operations(members, layer_rho(members), config.layer_scale_real(0), config)
    ours["gflop"], ours["roofline_ms"] = work / 1e9, 1e3 * work / product_rate("cpu")
    ours["of_roofline"] = ours["ms"] / ours["roofline_ms"]
    dense = _row("reference", count, "cpu", 1, warmup=0)
    ours["times_faster"] = dense["ms"] / ours["ms"]
    if torch.get_num_threads() == 1:
        ours["times_faster_cpu"] = dense["cpu_ms"] / ours["cpu_ms"]
    return [ours, plain, dense, _row("torch", count, "cpu", repeats, "reci")]


if __name__ == "__main__":
    main()
