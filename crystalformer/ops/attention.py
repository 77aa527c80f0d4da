"""``periodic_attention``: the one public operator, with its backends chosen by name."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.config import CUTOFF_SIGMAS, Backend
from crystalformer.ops import blocks, reciprocal, reference, torch_backend
from crystalformer.ops.radial import RadialBasis
from crystalformer.ops.reciprocal import wave_plan
from crystalformer.optional import problem

Domain = Literal["real", "reci"]

_log = logging.getLogger(__name__)
_KERNELS = {"cpu": "numba", "cuda": "triton"}
"""Compiled kernels by the type of device that they run on."""

_WHERE = {"triton": " (it has wheels for Linux only)"}

_announced: set[tuple[torch.device, str | None]] = set()


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
    cutoff_sigmas: float = CUTOFF_SIGMAS,
    domain: Domain = "real",
    backend: str = "auto",
) -> Tensor:
    """Attention of every atom to all atoms of its infinite crystal (model.md, sections 1 and 2; paper eq. 4 to 9).

    domain "real": y_i = sum_{j,m} w_ij(m) (v_j + W b(d_ij(m))) / sum_{j,m} w_ij(m),
    w_ij(m) = exp(q_i k_j / sqrt(D) - rho_i d_ij(m)² / (2 scale²)).
    domain "reci": y_i = softmax_j(q_i k_j / sqrt(D) + log max(Phi_ij, 1e-6)) v_j over the unit cell,
    Phi_ij = sum_k exp(-½ rho_i scale² |k|²) cos(k (p_j - p_i)) over the reciprocal lattice; no W b term.

    q, k, v (N, H, D): projections of the packed atoms of ``batch``, q not yet divided by sqrt(D).
    batch: distinct atoms alone (``CrystalBatch.distinct``) will do in the real domain, but not for "reference".
    rho (N, H): at least ``rho_min`` > 0. scale: Å. radial and weight (H or 1, D, K): the W b term, or None for none.
    cutoff_sigmas: an atom's sum ends at this many widths of its own widest Gaussian (reci: of the widest admitted).
    backend: "reference" (the dense oracle), "torch", "numba" (real domain, CPU, all but float64), "triton" (real
    domain, GPU, all but float64), or "auto": numba on the CPU and triton on a GPU for what they take, else torch;
    it is logged, as a warning where a GPU's kernels are passed over in the real domain.
    Returns (N, H, D). Raises ValueError for an unknown backend or domain, shapes that do not fit, or operands that
    the named backend does not take.
    """
    _check(q, k, v, rho, batch, radial, weight)
    if domain == "reci" and weight is not None:
        raise ValueError("the reciprocal domain has no W b term: radial and weight must be None")
    chosen = chosen_backend(backend, domain, q, radial)
    if batch.multiplicity is not None and (domain == "reci" or chosen == "reference"):
        raise ValueError("batch must hold all atoms of its crystals here, not the distinct ones alone")
    if domain == "reci":
        return _reciprocal(q, k, v, rho, batch, scale, rho_min, cutoff_sigmas, chosen)
    if chosen in _KERNELS.values():
        shells = batch.shells(cutoff_sigmas * scale / math.sqrt(rho_min))
        y: Tensor = _kernels(chosen).attend(
            q, k, v, rho, shells, scale=scale, cutoff_sigmas=cutoff_sigmas, radial=radial, weight=weight
        )
        return y
    if chosen == "reference":
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


def check_backend(backend: str, domain: str) -> None:
    """ValueError where there is no such backend or domain, or the backend does not have the domain."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if domain not in get_args(Domain):
        raise ValueError(f"domain must be one of {', '.join(get_args(Domain))}, got {domain!r}")
    if domain == "reci" and backend in _KERNELS.values():
        raise ValueError(f"the {backend} backend has no reciprocal domain; auto uses it for the real one alone")


def chosen_backend(backend: str, domain: str, like: Tensor, radial: RadialBasis | None) -> str:
    """The backend for operands like ``like`` (..., H, D); ValueError where the named one does not take them."""
    check_backend(backend, domain)
    if backend in ("torch", "reference"):
        return backend
    name = _KERNELS.get(like.device.type, "torch") if backend == "auto" else backend
    if name == "torch" or domain == "reci":
        return "torch"
    reason = _refusal(name, like, 0 if radial is None else radial.count)
    if backend != "auto" and reason is not None:
        raise ValueError(reason)
    if backend == "auto" and not torch.compiler.is_compiling():
        _announce(name, like.device, reason)
    return name if reason is None else "torch"


def _kernels(name: str) -> Any:  # noqa: ANN401 - a package with attend and refusal
    """The package of compiled kernels of that name, imported when they are wanted."""
    if name == "numba":
        from crystalformer.ops import numba

        return numba
    from crystalformer.ops import triton

    return triton


def _refusal(name: str, like: Tensor, bases: int) -> str | None:
    """Why the kernels of that name do not take operands like ``like`` (..., H, D), or None where they do."""
    if (why := problem(name)) is not None:
        return f"{name} backend: {name} {why}" + _WHERE.get(name, "")
    reason: str | None = _kernels(name).refusal(
        like.device, like.dtype, int(like.shape[-2]), int(like.shape[-1]), bases
    )
    return reason


def _announce(name: str, device: torch.device, reason: str | None) -> None:
    """Say once what "auto" is, and aloud where a GPU does without its kernels."""
    if (device, reason) in _announced:
        return
    _announced.add((device, reason))
    level = logging.WARNING if reason is not None and device.type == "cuda" else logging.INFO
    _log.log(level, "attention on %s: %s", device, name if reason is None else f"torch ({reason})")


def _reciprocal(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    batch: CrystalBatch,
    scale: float,
    rho_min: float,
    cutoff_sigmas: float,
    backend: str,
) -> Tensor:
    if backend == "reference":
        sizes = batch.sizes.tolist()
        return reference.attend_reciprocal(
            q, k, v, rho, batch.positions, batch.lattice, sizes, scale=scale, rho_min=rho_min
        )
    plan = reciprocal_plan(batch, cutoff_sigmas / (scale * math.sqrt(rho_min)), q)
    return torch_backend.attend_reciprocal(q, k, v, rho, plan, scale)


def prepare(
    batch: CrystalBatch,
    like: Tensor,
    *,
    scale: float,
    rho_min: float,
    radial: RadialBasis | None = None,
    cutoff_sigmas: float = CUTOFF_SIGMAS,
    domain: Domain = "real",
    backend: str = "auto",
) -> None:
    """Make what ``periodic_attention`` with these arguments keeps with the batch.

    like (H, D): of the operands' dtype and device. The operator does so itself on first use; a compiled graph cannot.
    Raises ValueError for what the operator would refuse.
    """
    chosen = chosen_backend(backend, domain, like, radial)
    if chosen == "reference":
        return
    if domain == "reci":
        reciprocal_plan(batch, cutoff_sigmas / (scale * math.sqrt(rho_min)), like)
        return
    radius = cutoff_sigmas * scale / math.sqrt(rho_min)
    if chosen == "torch":
        block_plan(batch, radius, like)
    else:
        _kernels(chosen).plan(batch.shells(radius))


def reciprocal_plan(batch: CrystalBatch, radius: float, like: Tensor) -> Tensor:
    """Handle of the torch backend's plan for wave vectors within ``radius`` (1/Å), made once a batch and dtype."""
    dtype = torch_backend.compute_dtype(like.dtype)
    key = ("waves", radius, dtype)
    if key not in batch.cache:
        batch.cache[key] = reciprocal.PLANS.give(wave_plan(batch, radius, dtype))
    handle: Tensor = batch.cache[key]
    return handle


def block_plan(batch: CrystalBatch, radius: float, like: Tensor) -> Tensor:
    """Handle of the torch backend's plan for shells within ``radius`` (Å), made once a batch and dtype."""
    shells = batch.shells(radius)
    dtype = torch_backend.compute_dtype(like.dtype)
    key = ("blocks", dtype)
    if key not in shells.cache:
        shells.cache[key] = blocks.PLANS.give(blocks.make_plan(batch, shells, dtype))
    handle: Tensor = shells.cache[key]
    return handle


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    batch: CrystalBatch,
    radial: RadialBasis | None,
    weight: Tensor | None,
) -> None:
    n, heads, features = q.shape
    if n != batch.num_atoms:
        raise ValueError(f"q must have a row for each of the {batch.num_atoms} atoms, got {n}")
    for name, value, shape in (("k", k, q.shape), ("v", v, q.shape), ("rho", rho, q.shape[:2])):
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
    if (radial is None) != (weight is None):
        raise ValueError("radial and weight must be given together")
    if radial is not None and weight is not None:
        expected = (len(weight) if len(weight) in (1, heads) else heads, features, radial.count)
        if tuple(weight.shape) != expected:
            allowed = f"({heads} or 1, {features}, {radial.count})"
            raise ValueError(f"weight must have the shape {allowed}, got {tuple(weight.shape)}")
