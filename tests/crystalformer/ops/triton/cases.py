"""Operands of small crystals and the oracle's answer, for the interpreter's and the GPU's tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.ops import RadialBasis, reference
from crystalformer.ops.triton import attend

RHO_MIN = 0.5
CUTOFF_SIGMAS = 6.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Crystals of ``sizes`` atoms; heads, features a head, radial bases; spacing: cell volume an atom is its cube."""

    name: str
    sizes: tuple[int, ...]
    heads: int = 2
    features: int = 4
    bases: int = 16
    weight_heads: int = 0
    scale: float = 0.9
    spacing: float = 2.4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(name="one-atom", sizes=(1,)),
    Case(name="mixed-batch", sizes=(1, 5, 2, 9)),
    Case(name="tile-minus-one", sizes=(15,), spacing=4.0, scale=0.6),
    Case(name="tile", sizes=(16,), spacing=4.0, scale=0.6),
    Case(name="tile-plus-one", sizes=(17,), spacing=4.0, scale=0.6),
    Case(name="no-radial", sizes=(3, 4), bases=0),
    Case(name="headless", sizes=(3, 4), weight_heads=1),
    Case(name="two-groups", sizes=(2, 3), heads=4, features=64),
    Case(name="padded", sizes=(2, 3), heads=3, features=5, bases=48),
    Case(name="group-padded", sizes=(2,), heads=5, features=48),
    Case(name="radial-chunks", sizes=(3,), bases=96),
    Case(name="default-model", sizes=(2, 4), heads=8, features=16, bases=64),
    Case(name="many-heads", sizes=(2,), heads=20, features=2),
    Case(name="bfloat16", sizes=(3, 4), features=16, dtype=torch.bfloat16),
    Case(name="float16", sizes=(3, 4), features=16, dtype=torch.float16),
]

LARGE = Case(name="200-atoms", sizes=(200,), heads=1, scale=0.45, spacing=2.6)


def make_batch(case: Case, seed: int = 0) -> CrystalBatch:
    """Random crystals, no two atoms closer than is likely by chance; cells are skewed."""
    random = np.random.default_rng(seed)
    cells = [
        (np.eye(3) + 0.25 * random.uniform(-1, 1, (3, 3))) * case.spacing * size ** (1 / 3) for size in case.sizes
    ]
    positions = [random.random((size, 3)) @ cell for size, cell in zip(case.sizes, cells, strict=True)]
    return CrystalBatch.from_arrays(
        np.concatenate(positions), np.ones(sum(case.sizes)), np.stack(cells), np.array(case.sizes)
    )


def make_operands(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, rho, weight (where the case has one) and dy, float64 numbers that the case's dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    n, shape = sum(case.sizes), (sum(case.sizes), case.heads, case.features)
    operands = {name: torch.randn(shape, generator=generator) for name in ("q", "k", "v")}
    operands["rho"] = RHO_MIN + 1.5 * torch.rand((n, case.heads), generator=generator)
    if case.bases:
        weight_shape = (case.weight_heads or case.heads, case.features, case.bases)
        operands["weight"] = torch.randn(weight_shape, generator=generator) * case.bases**-0.5
    operands["dy"] = torch.randn(shape, generator=generator)
    return {name: value.to(case.dtype).double() for name, value in operands.items()}


def radial_of(case: Case) -> RadialBasis | None:
    """The basis of the model: r_max of 10 scales."""
    r_max = 10 * case.scale
    return RadialBasis(count=case.bases, r_max=r_max, width=r_max / case.bases) if case.bases else None


def oracle(case: Case) -> dict[str, Tensor]:
    """y and the gradients of every operand in float64."""
    batch, operands = make_batch(case), make_operands(case)
    dy = operands.pop("dy")
    leaves = {name: value.requires_grad_() for name, value in operands.items()}
    y = reference.attend_real(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["rho"],
        batch.positions,
        batch.lattice,
        list(case.sizes),
        scale=case.scale,
        rho_min=RHO_MIN,
        radial=radial_of(case),
        weight=leaves.get("weight"),
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def kernels(case: Case, device: str) -> dict[str, Tensor]:
    """The same through the production launcher on ``device``, as float64 on the CPU."""
    batch, operands = make_batch(case).to(device), make_operands(case)
    operands = {name: value.to(device, case.dtype) for name, value in operands.items()}
    dy = operands.pop("dy")
    leaves = {name: value.requires_grad_() for name, value in operands.items()}
    shells = batch.shells(CUTOFF_SIGMAS * case.scale / RHO_MIN**0.5)
    y = attend(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["rho"],
        shells,
        scale=case.scale,
        cutoff_sigmas=CUTOFF_SIGMAS,
        radial=radial_of(case),
        weight=leaves.get("weight"),
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: value.cpu().double() for name, value in found.items()}


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each result, in units of its largest number (a lone atom's dq and dk are 0)."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(0.1))
        for name in expected
    }


def tolerance(case: Case) -> float:
    """Relative; 6 sigmas of truncation and float32 sums, or one rounding of results in 16 bits."""
    return {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(case.dtype, 5e-6)
