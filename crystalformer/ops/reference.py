"""The oracle: periodic attention as the equations say it, dense, one crystal after another.

Every pair, every image in a box and every head are spelt out, so it is slow and takes memory of
atoms² x images x heads; all fast paths are tested against it, and the golden vectors hold it to the authors.
It shares no geometry code with the fast paths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crystalformer.ops.radial import RadialBasis

CONVERGED_SIGMAS = 8.0
"""Radius of the box in units of the widest Gaussian's sigma: exp(-8²/2) = 1e-14, converged in float64."""


def attend_real(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    positions: Tensor,
    lattice: Tensor,
    sizes: list[int],
    *,
    scale: float,
    rho_min: float,
    radial: RadialBasis | None = None,
    weight: Tensor | None = None,
    box: int | None = None,
) -> Tensor:
    """Real-space attention (model.md, section 1). Shapes and units as in ``ops.periodic_attention``.

    ``box``: sum images -box..box along each lattice vector (the authors' way); None: a box that holds
    CONVERGED_SIGMAS of the widest Gaussian that ``rho_min`` admits.
    """
    ends = torch.tensor(sizes).cumsum(0).tolist()
    outputs = []
    for crystal, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        atoms = slice(end - size, end)
        distance = _image_distances(
            positions[atoms], lattice[crystal], CONVERGED_SIGMAS * scale / math.sqrt(rho_min), box
        ).to(q)
        outputs.append(_attend_crystal(q[atoms], k[atoms], v[atoms], rho[atoms], distance, scale, radial, weight))
    return torch.cat(outputs)


def attend_reciprocal(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    positions: Tensor,
    lattice: Tensor,
    sizes: list[int],
    *,
    scale: float,
    rho_min: float,
) -> Tensor:
    """Reciprocal-space attention (model.md, section 2), every wave vector within CONVERGED_SIGMAS."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    outputs = []
    for crystal, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        atoms = slice(end - size, end)
        waves = _waves(lattice[crystal], CONVERGED_SIGMAS / (scale * math.sqrt(rho_min)))
        phase = ((positions[atoms][None] - positions[atoms][:, None]) @ waves.T).cos().to(q)
        damping = (-0.5 * scale**2 * rho[atoms][..., None] * waves.square().sum(-1).to(q)).exp()
        phi = torch.einsum("ijw,ihw->hij", phase, damping)
        score = torch.einsum("ihd,jhd->hij", q[atoms], k[atoms]) / math.sqrt(q.shape[-1])
        attention = (score + phi.clamp(min=1e-6).log()).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", attention, v[atoms]))
    return torch.cat(outputs)


def _waves(lattice: Tensor, radius: float) -> Tensor:
    """(W, 3) all wave vectors up to ``radius`` (1/Å), 0 among them."""
    reciprocal = 2.0 * math.pi * torch.linalg.inv(lattice).T
    reach = torch.ceil(radius * lattice.norm(dim=1) / (2.0 * math.pi)).to(torch.int64).tolist()
    waves = torch.cartesian_prod(*(torch.arange(-m, m + 1).to(lattice) for m in reach)) @ reciprocal
    inside: Tensor = waves[waves.norm(dim=1) <= radius]
    return inside


def _image_distances(positions: Tensor, lattice: Tensor, radius: float, box: int | None) -> Tensor:
    """(n, n, T) distance of atom i to the image of atom j in each of T cells, Å."""
    fractional = positions @ torch.linalg.inv(lattice)
    wrapped = (fractional - fractional.floor()) @ lattice
    if box is None:
        heights = 1.0 / torch.linalg.inv(lattice).norm(dim=0)
        reach = (torch.ceil(radius / heights).to(torch.int64) + 1).tolist()
    else:
        reach = [box, box, box]
    cells = torch.cartesian_prod(*(torch.arange(-m, m + 1).to(lattice) for m in reach))
    separation = wrapped[None, :, None, :] + (cells @ lattice)[None, None] - wrapped[:, None, None, :]
    distance: Tensor = separation.square().sum(-1).sqrt()
    return distance


def _attend_crystal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    distance: Tensor,
    scale: float,
    radial: RadialBasis | None,
    weight: Tensor | None,
) -> Tensor:
    """One crystal of n atoms: (n, H, D) from q, k, v (n, H, D), rho (n, H) and distance (n, n, T)."""
    n, heads, features = q.shape
    score = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(features)
    spread = distance.square() / (2.0 * scale**2)
    logit = score[..., None] - rho.T[:, :, None, None] * spread
    attention = logit.reshape(heads, n, -1).softmax(-1).reshape(logit.shape)
    output = torch.einsum("hijt,jhd->ihd", attention, v)
    if radial is None or weight is None:
        return output
    basis = radial(distance)
    edge_values = [  # head by head: (n, n, T, D) at a time
        torch.einsum("ijt,ijtd->id", attention[h], torch.einsum("dk,ijtk->ijtd", weight[h % len(weight)], basis))
        for h in range(heads)
    ]
    return output + torch.stack(edge_values, dim=1)
