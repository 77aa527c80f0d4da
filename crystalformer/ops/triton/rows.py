"""The shell list as the kernels read it, derived once from PackedShells and kept in its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crystalformer.batch import PackedShells
from crystalformer.ops.triton.tiles import TILE_ROWS

PADDING = TILE_ROWS[-1]
"""Rows of atom 0 at the end of the list: a tile may read past the last atom's rows, which then weigh nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """S rows and PADDING more. start (N+1,) int64; neighbor, partner int32; distance (Å), log_count (base 2) float32.

    partner: where the row (i, j, d) is found the other way round, as (j, i, d). The list is symmetric, so dk and dv
    are sums over j's own rows of what i's row at ``partner`` holds.
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


def _derive(shells: PackedShells) -> Rows:
    size = len(shells.neighbor)
    if size + PADDING >= 2**31:
        raise ValueError(f"triton backend: the shell list must have fewer than 2**31 rows, got {size}")
    return Rows(
        start=shells.ptr.to(torch.int64),
        neighbor=_padded(shells.neighbor, torch.int32),
        partner=_padded(_partner(shells.ptr, shells.neighbor), torch.int32),
        distance=_padded(shells.distance, torch.float32),
        log_count=_padded(shells.count.to(torch.float32).log2(), torch.float32),
    )


def _partner(ptr: Tensor, neighbor: Tensor) -> Tensor:
    """(S,) row of (j, i, d) for every row (i, j, d): two stable sorts, since every pair's rows are in order of d."""
    size = len(neighbor)
    atom = torch.repeat_interleave(
        torch.arange(len(ptr) - 1, device=ptr.device, dtype=torch.int32), ptr.diff(), output_size=size
    )
    by_neighbor = neighbor.to(torch.int32).sort(stable=True).indices  # order of (j, i, d)
    by_atom = by_neighbor[atom[by_neighbor].sort(stable=True).indices]  # order of (i, j, d)
    return torch.empty_like(by_atom).scatter_(0, by_atom, by_neighbor)


def _padded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.pad(values.to(dtype), (0, PADDING))
