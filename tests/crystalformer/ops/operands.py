"""Operands of ``periodic_attention`` for the tests, and its result with every gradient."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crystalformer import CrystalBatch
from crystalformer.ops import RadialBasis, periodic_attention

RADIAL = RadialBasis(count=16, r_max=10.0, width=0.7)


@dataclass(frozen=True)
class Operands:
    """q, k, v, dy (N, H, D), rho (N, H), weight (H or 1, D, K) or None; scale in Å."""

    q: Tensor
    k: Tensor
    v: Tensor
    rho: Tensor
    weight: Tensor | None
    dy: Tensor
    scale: float = 1.0
    rho_min: float = 0.5
    radial: RadialBasis | None = None
    domain: str = "real"

    def to(self, dtype: torch.dtype) -> "Operands":
        names = ("q", "k", "v", "rho", "weight", "dy")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t if t is None else t.to(dtype) for name, t in tensors.items()})


def operands(batch: CrystalBatch, *, heads=2, features=4, radial=RADIAL, headed=True, seed=0, **settings) -> Operands:
    """float64, of ordinary size; rho from its bound to four times as much: widths differ by atom and head."""
    draw = torch.Generator().manual_seed(seed)
    shape = (batch.num_atoms, heads, features)
    q, k, v, dy = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(4))
    rho_min = settings.get("rho_min", 0.5)
    rho = rho_min * (1 + 3 * torch.rand(shape[:2], generator=draw, dtype=torch.float64))
    weight = None
    if radial is not None:
        of_weight = (heads if headed else 1, features, radial.count)
        weight = torch.randn(of_weight, generator=draw, dtype=torch.float64) * radial.count**-0.5
    return Operands(q=q, k=k, v=v, rho=rho, weight=weight, dy=dy, radial=radial, **settings)


def attend(batch: CrystalBatch, given: Operands, backend: str, cutoff_sigmas: float = 8.0) -> dict[str, Tensor]:
    """y and the gradients of sum(dy y)."""
    leaves = {name: getattr(given, name) for name in ("q", "k", "v", "rho", "weight")}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items() if t is not None}
    y = periodic_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["rho"],
        batch,
        scale=given.scale,
        rho_min=given.rho_min,
        radial=given.radial,
        weight=leaves.get("weight"),
        cutoff_sigmas=cutoff_sigmas,
        domain=given.domain,
        backend=backend,
    )
    gradients = torch.autograd.grad((y * given.dy).sum(), list(leaves.values()))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest number.

    Operands are of order 1; a gradient that is below 1e-2 everywhere cancels (dq of one atom a cell is 0), and its
    rounding is that of its terms.
    """
    assert set(found) == set(expected)
    return {
        name: float((found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-2))
        for name, value in expected.items()
    }
