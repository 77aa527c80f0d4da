"""How the torch backend walks a batch: blocks of query atoms, each with its keys and its padded shells.

A block is a run of whole small crystals or a compact part of one large crystal. Inside it everything is dense: every
query atom has the same number of shell rows, padded with rows that weigh nothing. Crystals are put in order of their
shells an atom, so padding stays small. Rows are sorted by distance and a block's tables hold only as many of them as
its own Gaussians have asked for so far; a layer with wider ones makes them grow.

Pairs and shells meet in two ways. Atoms of small crystals have a column for each atom of their crystal (pairs.py,
PairColumns); atoms of large ones look their pair up (PairLookup).

Legend: A query atoms and J keys of a block, M shell rows an atom; others as in batch.py. Plan order: the atoms as the
blocks walk them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch, PackedShells, lasting
from crystalformer.ops.handles import Handles
from crystalformer.ops.pairs import BlockRows, PairColumns, PairLookup
from crystalformer.ops.radial import RadialBasis

QUERIES = 64
"""Atoms a block aims at: (A x M x H) floats then stay in the second-level cache."""

COLUMNS = 16
"""Largest crystal whose atoms get a column each."""

UNION_FROM = 256
"""Parts of crystals with more atoms than this read only the union of their neighbours as keys."""

UNION_QUERIES = 32
"""Atoms of such a part: the fewer, the smaller their union of neighbours and the tables of pairs."""

ROW_STEP = 16
"""Row counts are multiples of this: aligned matrix products, and few rebuilds of a block's tables."""

HEADROOM = 8
"""Tables get 1/8 more rows than asked for: the layers' widest Gaussians differ by a few percent, their rows by its
cube, and a table that is too short is made again."""

FEATURE_LIMIT = 2**28
"""Radial features (numbers) kept for all layers; larger batches compute them again, block by block."""

_ATOM_STRIDE = 1e4
"""Å. Added to the distances of one atom after another, it makes the whole list one sorted column."""

_GROWING = threading.Lock()
"""Held by the thread that makes a block's tables or features."""

PLANS: Handles[BlockPlan] = Handles()

IntArray = npt.NDArray[np.int64]


@dataclass(kw_only=True, slots=True)
class Block:
    """A queries from ``start`` in plan order, of whole crystals (``columns``) or of one crystal; at most M=``limit``.

    tables: the rows asked for so far, and the radial features of those rows.
    """

    start: int
    queries: int
    crystal: slice
    columns: bool
    limit: int
    tables: PairColumns | PairLookup | None = None
    features: dict[RadialBasis, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class BlockPlan:
    """The blocks of a batch and the list they draw from.

    neighbor, distance, count (S,): of the list (PackedShells); the list itself keeps the plan, so the plan must not
    keep the list, or neither would go with the batch. order (N,): plan position -> atom; inverse (N,) the other way.
    first, size (N,): where the atom's crystal starts in plan order and its atoms. row_start, row_count (N,): an
    atom's rows of the list, in plan order. column (S,): float64, sorted: distance + 1e4 Å times the atom.
    """

    neighbor: Tensor
    distance: Tensor
    count: Tensor
    dtype: torch.dtype
    order: Tensor
    inverse: Tensor
    first: Tensor
    size: Tensor
    row_start: Tensor
    row_count: Tensor
    column: Tensor
    blocks: tuple[Block, ...]
    workspace: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def reached(self, radius: Tensor) -> Tensor:
        """(N,) shells of every atom within its ``radius`` (N,), plan order, Å; at least the atom itself."""
        reach = self.order.double() * _ATOM_STRIDE + radius.to(self.column)
        ends = torch.searchsorted(self.column, reach, right=True)
        return (ends - self.row_start).clamp_min_(1)

    def rows_of_blocks(self, reached: Tensor) -> list[int]:
        """Rows of each block in which every atom has all shells that it has ``reached`` (N,), and a few more."""
        needed = reached.tolist()
        return [
            min(block.limit, _round_up(max(needed[block.start : block.start + block.queries])))
            for block in self.blocks
        ]

    @lasting
    def tables(self, block: Block, rows: int) -> PairColumns | PairLookup:
        """The block's tables with at least ``rows`` rows."""
        with _GROWING:
            return self._grown(block, rows)

    def _grown(self, block: Block, rows: int) -> PairColumns | PairLookup:
        if block.tables is None or block.tables.rows.capacity < rows:
            atoms = slice(block.start, block.start + block.queries)
            padded = self._pad(atoms, min(block.limit, _round_up(rows + rows // HEADROOM)))
            if block.columns:
                block.tables = PairColumns.build(padded, block.crystal, self.first[atoms], self.size[atoms])
            else:
                block.tables = PairLookup.build(padded, block.crystal, UNION_FROM)
            block.features.clear()
        return block.tables

    @lasting
    def features(self, block: Block, radial: RadialBasis, rows: int) -> Tensor:
        """(A, rows, K) radial features of the first rows, kept over layers where they fit."""
        with _GROWING:
            return self._kept_features(block, radial, rows)

    def _kept_features(self, block: Block, radial: RadialBasis, rows: int) -> Tensor:
        if block.tables is None:
            raise RuntimeError("the block's tables must be made before its features")
        distance = block.tables.rows.distance
        if len(self.order) * distance.shape[1] * radial.count > FEATURE_LIMIT:
            return radial(distance[:, :rows])
        if radial not in block.features:
            block.features[radial] = radial(distance)
        return block.features[radial][:, :rows]

    def _pad(self, atoms: slice, capacity: int) -> BlockRows:
        """The first ``capacity`` shells of some atoms; ``neighbor`` in plan order."""
        position = torch.arange(capacity, device=self.order.device)
        inside = position < self.row_count[atoms, None]
        source = torch.where(inside, self.row_start[atoms, None] + position, 0)
        return BlockRows.of(
            self.inverse[self.neighbor[source]],
            self.distance[source].to(self.dtype),
            self.count[source].to(self.dtype),
            inside,
        )

    @lasting
    def buffer(self, name: str, size: int) -> Tensor:
        """(size,) numbers reused over blocks and layers: memory fresh from the system costs a page fault a page.

        Each thread has its own: several may predict the same batch.
        """
        mine = (threading.get_ident(), name)
        known = self.workspace.get(mine)
        if known is None or len(known) < size:
            known = torch.empty(size, dtype=self.dtype, device=self.order.device)
            self.workspace[mine] = known
        return known[:size]


@lasting
def make_plan(batch: CrystalBatch, shells: PackedShells, dtype: torch.dtype) -> BlockPlan:
    """The plan of a batch; tables in ``dtype`` on the batch's device."""
    sizes, ptr = batch.sizes.cpu().numpy(), shells.ptr.cpu().numpy()
    counts = np.diff(ptr)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.lexsort((np.maximum.reduceat(counts, starts), sizes > COLUMNS))
    order = np.concatenate([np.arange(starts[c], starts[c] + sizes[c]) for c in rank])
    ordered = sizes[rank]
    first = np.concatenate([[0], np.cumsum(ordered)[:-1]])
    for start, size in zip(first, ordered, strict=True):
        if size > UNION_FROM:
            atoms = order[start : start + size]
            order[start : start + size] = atoms[_compact(batch, atoms)]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))

    def tensor(values: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(batch.device)

    atom_of_row = torch.repeat_interleave(
        torch.arange(len(counts), device=batch.device), tensor(counts), output_size=len(shells.distance)
    )
    return BlockPlan(
        neighbor=shells.neighbor,
        distance=shells.distance,
        count=shells.count,
        dtype=dtype,
        order=tensor(order),
        inverse=tensor(inverse),
        first=tensor(np.repeat(first, ordered)),
        size=tensor(np.repeat(ordered, ordered)),
        row_start=tensor(ptr[order]),
        row_count=tensor(counts[order]),
        column=shells.distance.double() + atom_of_row.double() * _ATOM_STRIDE,
        blocks=_cut(ordered.tolist(), counts[order]),
    )


def _round_up(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


def _cut(sizes: list[int], counts: IntArray) -> tuple[Block, ...]:
    """Runs of whole small crystals up to QUERIES atoms; a larger crystal is cut into parts."""
    bounds, columns, start = [0], [], 0
    crystals = []
    for size in sizes:
        if size > COLUMNS:
            part = UNION_QUERIES if size > UNION_FROM else QUERIES
            cuts = [*range(start + part, start + size, part), start + size]
            bounds += cuts
            columns += [False] * len(cuts)
            crystals += [slice(start, start + size)] * len(cuts)
        elif columns and columns[-1] and start + size - bounds[-2] <= QUERIES:
            bounds[-1] = start + size
        else:
            bounds.append(start + size)
            columns.append(True)
            crystals.append(slice(start, start + size))
        start += size
    return tuple(
        Block(
            start=first,
            queries=last - first,
            crystal=slice(first, last) if small else crystal,
            columns=small,
            limit=_round_up(int(counts[first:last].max())),
        )
        for (first, last), small, crystal in zip(pairwise(bounds), columns, crystals, strict=True)
    )


def _compact(batch: CrystalBatch, atoms: IntArray) -> IntArray:
    """An order of a large crystal's atoms in which runs of UNION_QUERIES atoms lie close together in space."""
    lattice = batch.lattice[int(batch.crystal[int(atoms[0])])].cpu().numpy()
    fractional = batch.positions[torch.from_numpy(atoms).to(batch.device)].cpu().numpy() @ np.linalg.inv(lattice)
    positions = (fractional - np.floor(fractional)) @ lattice
    parts = [np.arange(len(atoms))]
    while max(len(part) for part in parts) > UNION_QUERIES:
        parts = [piece for part in parts for piece in _halves(positions, part)]
    return np.concatenate(parts)


def _halves(positions: npt.NDArray[np.float64], part: IntArray) -> list[IntArray]:
    """A part cut across its longest side, the first piece a multiple of UNION_QUERIES atoms."""
    if len(part) <= UNION_QUERIES:
        return [part]
    side = int(np.ptp(positions[part], axis=0).argmax())
    middle = -(-len(part) // (2 * UNION_QUERIES)) * UNION_QUERIES
    ranked = part[positions[part, side].argsort(kind="stable")]
    return [ranked[:middle], ranked[middle:]]
