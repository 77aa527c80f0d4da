"""``periodic_attention``: the one public operator, with its backends chosen by name."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.ops import reference, torch_backend
from crystalformer.ops.blocks import BlockPlan, make_plan
from crystalformer.ops.radial import RadialBasis

Backend = Literal["auto", "torch", "reference"]


def periodic_attention(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    batch: CrystalBatch,
    *,
    scale: float,
    rho_min: float,
    radial: RadialBasis | None = None,
    weight: Tensor | None = None,
    cutoff_sigmas: float = 6.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of every atom to all atoms of its infinite crystal (model.md, section 1; paper eq. 4 to 9).

    y_i = sum_{j,m} w_ij(m) (v_j + W b(d_ij(m))) / sum_{j,m} w_ij(m),
    w_ij(m) = exp(q_i k_j / sqrt(D) - rho_i d_ij(m)² / (2 scale²)).

    q, k, v (N, H, D): projections of the packed atoms of ``batch``, q not yet divided by sqrt(D).
    rho (N, H): at least ``rho_min`` > 0. scale: Å. radial and weight (H or 1, D, K): the W b term, or None for none.
    cutoff_sigmas: an atom's sum ends at this many widths of its own widest Gaussian.
    backend: "reference" (the dense oracle), "torch", or "auto" (torch).
    Returns (N, H, D). Raises ValueError for an unknown backend or shapes that do not fit.
    """
    _check(q, rho, batch, radial, weight, backend)
    if backend == "reference":
        return reference.attend_real(
            q,
            k,
            v,
            rho,
            batch.positions,
            batch.lattice,
            batch.sizes.tolist(),
            scale=scale,
            rho_min=rho_min,
            radial=radial,
            weight=weight,
        )
    plan = block_plan(batch, cutoff_sigmas * scale / math.sqrt(rho_min), q)
    return torch_backend.attend(
        q, k, v, rho, plan, scale=scale, cutoff_sigmas=cutoff_sigmas, radial=radial, weight=weight
    )


def block_plan(batch: CrystalBatch, radius: float, like: Tensor) -> BlockPlan:
    """The torch backend's plan for shells within ``radius`` (Å), made once a batch and dtype."""
    shells = batch.shells(radius)
    key = ("blocks", like.dtype)
    if key not in shells.cache:
        shells.cache[key] = make_plan(shells, batch.sizes, like.dtype)
    plan: BlockPlan = shells.cache[key]
    return plan


def _check(
    q: Tensor, rho: Tensor, batch: CrystalBatch, radial: RadialBasis | None, weight: Tensor | None, backend: str
) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    n, heads, features = q.shape
    if n != batch.num_atoms:
        raise ValueError(f"q must have a row for each of the {batch.num_atoms} atoms, got {n}")
    if tuple(rho.shape) != (n, heads):
        raise ValueError(f"rho must have the shape {(n, heads)}, got {tuple(rho.shape)}")
    if (radial is None) != (weight is None):
        raise ValueError("radial and weight must be given together")
    if radial is not None and weight is not None and tuple(weight.shape[1:]) != (features, radial.count):
        expected = f"(H or 1, {features}, {radial.count})"
        raise ValueError(f"weight must have the shape {expected}, got {tuple(weight.shape)}")
