"""The shell list as the kernels read it, derived once from PackedShells and kept in its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crystalformer.batch import PackedShells, lasting
from crystalformer.ops.triton.tiles import TILE_ROWS

NO_DISTANCE = 1e4
"""Å, of rows that fill up: beyond every reach, and its square is finite in float32."""

NO_PARTNER = 2**31 - 1
"""Of rows that fill up: past every atom's end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The shells, atom by atom and nearest first, as S rows: each atom's are filled up to a multiple of TILE_ROWS[0].

    start (N+1,) int64; neighbor, partner (S,) int32; distance (S,) Å and log_count (S,) base 2, float32.
    partner: where the row (i, j, d) is found the other way round, as (j, i, d). The list is symmetric, so dk and dv
    are sums over j's own rows of what i's row at ``partner`` holds.
    Filling rows have neighbor 0, NO_DISTANCE, NO_PARTNER and log_count -inf. S is an upper bound that needs no number
    from the GPU; a tile may read up to TILE_ROWS[-1] rows past the last atom's.
    """

    start: Tensor
    neighbor: Tensor
    partner: Tensor
    distance: Tensor
    log_count: Tensor


def rows_of(shells: PackedShells) -> Rows:
    """The rows of a list, on its device: no copy to the host and nothing that waits for the GPU."""
    if "triton" not in shells.cache:
        shells.cache["triton"] = _derive(shells)
    rows: Rows = shells.cache["triton"]
    return rows


@lasting
def _derive(shells: PackedShells) -> Rows:
    size, atoms = len(shells.neighbor), len(shells.ptr) - 1
    least = TILE_ROWS[0]
    total = size + (least - 1) * atoms + TILE_ROWS[-1]
    if total >= NO_PARTNER:
        raise ValueError(f"triton backend: the shell list must have fewer than 2**31 rows, got {total}")
    counts = shells.ptr.diff()
    atom = torch.repeat_interleave(torch.arange(atoms, device=counts.device), counts, output_size=size)
    start = torch.nn.functional.pad(((counts + (least - 1)) // least * least).cumsum(0), (1, 0))
    shift = start[:-1] - shells.ptr[:-1]
    # Rows are gathered, not scattered: where PyTorch is told to be deterministic, a scatter sorts first.
    row = torch.arange(total, device=counts.device)
    owner = (torch.searchsorted(start, row, right=True) - 1).clamp_max(atoms - 1)
    source = row - shift[owner]
    inside = source < shells.ptr[1:][owner]
    source = torch.where(inside, source, 0)

    def spread(values: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
        return torch.where(inside, values.to(dtype)[source], fill)

    return Rows(
        start=start,
        neighbor=spread(shells.neighbor, 0, torch.int32),
        partner=spread(_partner(atom, shells.neighbor) + shift[shells.neighbor], NO_PARTNER, torch.int32),
        distance=spread(shells.distance, NO_DISTANCE, torch.float32),
        log_count=spread(shells.count.to(torch.float32).log2(), float("-inf"), torch.float32),
    )


def _partner(atom: Tensor, neighbor: Tensor) -> Tensor:
    """(S,) row of (j, i, d) for every row (i, j, d): two stable sorts, since every pair's rows are in order of d."""
    by_neighbor = neighbor.to(torch.int32).sort(stable=True).indices  # order of (j, i, d)
    by_atom = by_neighbor[atom[by_neighbor].to(torch.int32).sort(stable=True).indices]  # order of (i, j, d)
    return by_neighbor[by_atom.argsort()]
