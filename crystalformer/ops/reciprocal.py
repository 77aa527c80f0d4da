"""Reciprocal-space attention in plain PyTorch (model.md, section 2): structure factors, one matrix product a head.

Phi_ij = sum_k w_ik cos(k (p_j - p_i)) = sum_k [w_ik cos k p_i, w_ik sin k p_i] · [cos k p_j, sin k p_j], so nothing
with the dimensions pairs x vectors exists. k and -k give the same term: one of each pair is kept, with the factor 2.
Crystals of like size are padded to one shape and go through the same products.

Legend: G crystals of a group padded to n atoms each, Q queries of a chunk, W wave vectors; others as in batch.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch, lasting, moved
from crystalformer.ops.handles import Handles
from crystalformer.ops.radial import vanishing_exp_

CLAMP = 1e-6
"""Phi is at least this much (the authors' value): its logarithm must exist."""

CHUNK = 2**22
"""Weights w (numbers) made at once: bounds the memory of large cells to some tens of megabytes."""

PADDING_WASTE = 1.3
"""A group takes in the next crystal while the padded work stays below this multiple of the real work."""


PLANS: Handles[WavePlan] = Handles()


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveGroup:
    """G crystals padded to n atoms and W wave vectors.

    atoms (G, n) index of the packed atoms, 0 where padded; target (G, n) the same, but N where padded: a spare row
    that results are put into and that nobody reads, as to look for the others would make a GPU's host wait;
    real (G, n) whether it is an atom;
    phases (G, n, 2W) cos and sin of k·p; squared (G, W) |k|² in 1/Å²; factor (G, W): 2, 1 for k = 0, 0 where padded.
    """

    atoms: Tensor
    target: Tensor
    real: Tensor
    phases: Tensor
    squared: Tensor
    factor: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class WavePlan:
    """The groups of a batch."""

    groups: tuple[WaveGroup, ...]


def wave_vectors(lattice: Tensor, radius: float) -> Tensor:
    """(W, 3) float64 wave vectors of the lattice (3, 3) up to ``radius`` (1/Å): one of each pair k, -k; 0 first."""
    volume = abs(float(torch.linalg.det(lattice)))
    if not volume > 0:
        raise ValueError(f"a cell must have a volume, got {volume} Å³")
    reciprocal = 2.0 * math.pi * torch.linalg.inv(lattice).T
    reach = torch.floor(radius * lattice.norm(dim=1) / (2.0 * math.pi)).to(torch.int64).tolist()
    ranges = [torch.arange(reach[0] + 1), *(torch.arange(-m, m + 1) for m in reach[1:])]
    grid = torch.cartesian_prod(*ranges)
    first, second, third = grid.unbind(1)
    half = (first > 0) | ((first == 0) & ((second > 0) | ((second == 0) & (third > 0))))
    waves = grid[half].to(reciprocal) @ reciprocal
    waves = waves[waves.square().sum(1) <= radius * radius]
    return torch.cat([waves.new_zeros(1, 3), waves])


@lasting
def wave_plan(batch: CrystalBatch, radius: float, dtype: torch.dtype) -> WavePlan:
    """The plan for the wave vectors within ``radius`` (1/Å) of every crystal of the batch."""
    lattice, positions = batch.lattice.cpu(), batch.positions.cpu()
    waves = [wave_vectors(cell, radius) for cell in lattice]
    sizes = batch.sizes.tolist()
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    order = sorted(range(len(sizes)), key=lambda c: (sizes[c], len(waves[c])))
    groups = []
    for members in _grouped(order, [size * size * len(w) for size, w in zip(sizes, waves, strict=True)]):
        n, width = max(sizes[c] for c in members), max(len(waves[c]) for c in members)
        atoms = torch.zeros(len(members), n, dtype=torch.int64)
        real = torch.zeros(len(members), n, dtype=torch.bool)
        phases = torch.zeros(len(members), n, 2 * width, dtype=dtype)
        squared = torch.zeros(len(members), width, dtype=dtype)
        factor = torch.zeros(len(members), width, dtype=dtype)
        for row, c in enumerate(members):
            count, size = len(waves[c]), sizes[c]
            atoms[row, :size] = torch.arange(starts[c], starts[c] + size)
            real[row, :size] = True
            angle = positions[starts[c] : starts[c] + size] @ waves[c].T
            phases[row, :size, :count] = angle.cos().to(dtype)
            phases[row, :size, width : width + count] = angle.sin().to(dtype)
            squared[row, :count] = waves[c].square().sum(1).to(dtype)
            factor[row, :count] = 2.0
            factor[row, 0] = 1.0
        made = {"atoms": atoms, "real": real, "phases": phases, "squared": squared, "factor": factor}
        made["target"] = torch.where(real, atoms, batch.num_atoms)
        groups.append(WaveGroup(**{name: moved(tensor, batch.device) for name, tensor in made.items()}))
    return WavePlan(groups=tuple(groups))


def _grouped(order: list[int], work: list[int]) -> list[list[int]]:
    """``order`` cut into runs whose padded work (members times the largest) stays near the sum of their own."""
    groups: list[list[int]] = []
    for crystal in order:
        if groups:
            members = [*groups[-1], crystal]
            if len(members) * max(work[c] for c in members) <= PADDING_WASTE * sum(work[c] for c in members):
                groups[-1] = members
                continue
        groups.append([crystal])
    return groups


def forward(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, plan: WavePlan, scale: float) -> Tensor:
    """y (N, H, D) from q (scaled by 1/sqrt(D)), k, v (N, H, D) and rho (N, H); scale in Å."""
    y = _with_spare(v)
    for group in plan.groups:
        keys, values = _take(k, group), _take(v, group)
        for part in _chunks(group, q.shape[1]):
            attention, _, _ = _attention(_take(q, group, part), keys, _take(rho, group, part), group, part, scale)
            result = torch.einsum("ghij,gjhd->gihd", attention, values)
            _put(y, result, group, part)
    return y[:-1]


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, plan: WavePlan, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rho; arguments as in ``forward``, which is done again chunk by chunk."""
    dq, dk, dv, drho = (_with_spare(operand) for operand in (q, k, v, rho))
    for group in plan.groups:
        keys, values = _take(k, group), _take(v, group)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for part in _chunks(group, q.shape[1]):
            queries, precision = _take(q, group, part), _take(rho, group, part)
            gradient = _take(dy, group, part) * group.real[:, part, None, None].to(dy)
            attention, phi, weights = _attention(queries, keys, precision, group, part, scale)
            dvalues += torch.einsum("ghij,gihd->gjhd", attention, gradient)
            dlogit = torch.einsum("gihd,gjhd->ghij", gradient, values)
            dlogit = (dlogit - (dlogit * attention).sum(-1, keepdim=True)) * attention
            _put(dq, torch.einsum("ghij,gjhd->gihd", dlogit, keys), group, part)
            dkeys += torch.einsum("ghij,gihd->gjhd", dlogit, queries)
            dphi = torch.where(phi > CLAMP, dlogit / phi.clamp(min=CLAMP), 0.0)
            _put(drho, _precision_gradient(dphi, weights, group, part, scale), group, part)
        _put(dk, dkeys, group)
        _put(dv, dvalues, group)
    return dq[:-1], dk[:-1], dv[:-1], drho[:-1]


def _attention(
    q: Tensor, k: Tensor, rho: Tensor, group: WaveGroup, part: slice, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (G, H, Q, n), Phi (G, H, Q, n) and the weights w (G, H, Q, W) of a chunk of queries."""
    crystals, queries, heads = rho.shape
    exponent = rho.permute(0, 2, 1).unsqueeze(-1) * (-0.5 * scale**2 * group.squared[:, None, None, :])
    weights = vanishing_exp_(exponent).mul_(group.factor[:, None, None, :])
    cosine, sine = group.phases[:, None, part].chunk(2, -1)
    left = torch.cat([weights * cosine, weights * sine], -1).view(crystals, heads * queries, -1)
    phi = torch.bmm(left, group.phases.transpose(1, 2)).view(crystals, heads, queries, -1)
    logit = torch.einsum("gihd,gjhd->ghij", q, k) + phi.clamp(min=CLAMP).log()
    return logit.masked_fill_(~group.real[:, None, None, :], -math.inf).softmax(-1), phi, weights


def _precision_gradient(dphi: Tensor, weights: Tensor, group: WaveGroup, part: slice, scale: float) -> Tensor:
    """(G, Q, H): drho = sum_k -½ scale² |k|² w_ik (sum_j dphi_ij cos(k (p_j - p_i)))."""
    crystals, heads, queries, n = dphi.shape
    right = torch.bmm(dphi.reshape(crystals, heads * queries, n), group.phases).view(crystals, heads, queries, -1)
    cosine, sine = (right * group.phases[:, None, part]).chunk(2, -1)
    damped = weights * (-0.5 * scale**2 * group.squared[:, None, None, :])
    return ((cosine + sine) * damped).sum(-1).permute(0, 2, 1)


def _chunks(group: WaveGroup, heads: int) -> list[slice]:
    crystals, n = group.atoms.shape
    step = max(1, CHUNK // (crystals * heads * group.squared.shape[1]))
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def _take(values: Tensor, group: WaveGroup, part: slice = slice(None)) -> Tensor:
    return values[group.atoms[:, part]]


def _with_spare(like: Tensor) -> Tensor:
    """(N + 1, ...) for results like ``like`` (N, ...)."""
    return like.new_empty(len(like) + 1, *like.shape[1:])


def _put(results: Tensor, values: Tensor, group: WaveGroup, part: slice = slice(None)) -> None:
    """``values`` (G, Q, ...) into the rows of ``results`` (N + 1, ...)."""
    results.index_copy_(0, group.target[:, part].flatten(), values.flatten(0, 1))
