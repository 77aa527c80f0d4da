"""How the torch backend walks a batch: blocks of query atoms, each with its keys and its padded shells.

A block is a run of whole small crystals or a part of one large crystal. Inside it, everything is dense: scores are
one (queries x keys) product a head, and every query atom has the same number of shell rows, padded at a distance
where weights vanish. Crystals are put in order of their shells an atom, so padding stays small. Rows are sorted by
distance, so a block stops where its own Gaussians end by taking a shorter slice.

Legend: A query atoms and J keys of a block, M shell rows an atom, R = sum over blocks of A*M; others as in batch.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crystalformer.batch import PackedShells
from crystalformer.ops.radial import RadialBasis

QUERIES = 64
"""Atoms a block aims at: (A x M x H) floats then stay in the second-level cache."""

PADDING_DISTANCE = 1e4
"""Å. Sorts padding behind every real row."""

PADDING_LOG_COUNT = -1e4
"""A padded row's log of images: its weight vanishes. Its squared distance is 0, not 1e8: weights are cut off at 1e-14
in float32 (radial.lowest_exponent), and 1e-14 times 1e8 is no small part of the precision's gradient."""

FEATURE_LIMIT = 2**28
"""Radial features (numbers) kept for all layers; larger batches compute them again, block by block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A queries from ``start`` and J keys from ``key_start`` in the plan's order; shell rows from ``offset``."""

    start: int
    queries: int
    key_start: int
    keys: int
    offset: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """The padded shells of a batch.

    order (N,): permuted position -> atom. distance (R,) Å; log_count (R,) log of the images of a shell;
    pair (R,): a*J + key, the row of the block's (A*J, H) score table.
    """

    order: Tensor
    inverse: Tensor
    blocks: tuple[Block, ...]
    distance: Tensor
    squared: Tensor
    log_count: Tensor
    pair: Tensor
    features: dict[RadialBasis, Tensor]

    def block_distance(self, block: Block) -> Tensor:
        """(A, M) distances of a block, Å."""
        return _rows(self.distance, block)

    def block_features(self, block: Block, rows: int, radial: RadialBasis) -> Tensor:
        """(A, rows, K) radial features of a block's first ``rows`` shells, kept over layers where they fit."""
        if self.distance.numel() * radial.count > FEATURE_LIMIT:
            return radial(_rows(self.distance, block)[:, :rows])
        if radial not in self.features:
            self.features[radial] = radial(self.distance)
        return _rows(self.features[radial], block)[:, :rows]


def _rows(values: Tensor, block: Block) -> Tensor:
    part = values[block.offset : block.offset + block.queries * block.rows]
    return part.view(block.queries, block.rows, *values.shape[1:])


def make_plan(shells: PackedShells, sizes: Tensor, dtype: torch.dtype) -> BlockPlan:
    """The plan of a batch whose crystals have ``sizes`` (B,) atoms; tensors in ``dtype`` on the shells' device."""
    rows_an_atom = shells.ptr.diff()
    order, order_sizes = _order(rows_an_atom, sizes)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = rows_an_atom[order]
    blocks = _cut(order_sizes, counts)
    return _fill(shells, order, inverse, counts, blocks, dtype)


def _order(rows_an_atom: Tensor, sizes: Tensor) -> tuple[Tensor, list[int]]:
    """(N,) atoms with the crystals sorted by their largest row count, and the crystals' sizes in that order."""
    crystal = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    largest = torch.zeros_like(sizes).scatter_reduce_(0, crystal, rows_an_atom, "amax", include_self=True)
    rank = largest.argsort(stable=True)
    position = torch.empty_like(rank)
    position[rank] = torch.arange(len(rank), device=rank.device)
    return position[crystal].argsort(stable=True), sizes[rank].tolist()


def _cut(sizes: list[int], counts: Tensor) -> tuple[Block, ...]:
    """Runs of whole crystals up to QUERIES atoms; a larger crystal is cut into parts that share its keys."""
    spans: list[tuple[int, int, int, int]] = []
    start = 0
    run_start, run = 0, 0
    for size in sizes:
        if run and run + size > QUERIES:
            spans.append((run_start, run, run_start, run))
            run_start, run = start, 0
        if size > QUERIES:
            parts = range(0, size, QUERIES)
            spans.extend((start + p, min(QUERIES, size - p), start, size) for p in parts)
            run_start = start + size
        else:
            run += size
        start += size
    if run:
        spans.append((run_start, run, run_start, run))
    blocks, offset = [], 0
    for first, queries, key_start, keys in spans:
        rows = int(counts[first : first + queries].max())
        blocks.append(Block(start=first, queries=queries, key_start=key_start, keys=keys, offset=offset, rows=rows))
        offset += queries * rows
    return tuple(blocks)


def _fill(
    shells: PackedShells,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    blocks: tuple[Block, ...],
    dtype: torch.dtype,
) -> BlockPlan:
    """Scatter the shells into the blocks' padded rows; ``counts`` (N,) rows of each atom in the plan's order."""
    device = order.device
    table = torch.tensor([[b.start, b.queries, b.key_start, b.keys, b.offset, b.rows] for b in blocks], device=device)
    block_of = torch.repeat_interleave(torch.arange(len(blocks), device=device), table[:, 1])
    first, _, key_first, keys, offset, width = table[block_of].unbind(1)
    local = torch.arange(len(order), device=device) - first
    target_start = offset + local * width
    source_start = shells.ptr[order]
    atom = torch.repeat_interleave(torch.arange(len(order), device=device), counts)
    within = torch.arange(len(atom), device=device) - (counts.cumsum(0) - counts)[atom]
    source, target = source_start[atom] + within, target_start[atom] + within
    total = blocks[-1].offset + blocks[-1].queries * blocks[-1].rows
    distance = torch.full((total,), PADDING_DISTANCE, dtype=dtype, device=device)
    distance[target] = shells.distance[source].to(dtype)
    squared = torch.zeros(total, dtype=dtype, device=device)
    squared[target] = distance[target].square()
    log_count = torch.full((total,), PADDING_LOG_COUNT, dtype=dtype, device=device)
    log_count[target] = shells.count[source].to(dtype).log()
    pair = torch.zeros(total, dtype=torch.int64, device=device)
    pair[target] = (local * keys - key_first)[atom] + inverse[shells.neighbor[source]]
    return BlockPlan(
        order=order,
        inverse=inverse,
        blocks=blocks,
        distance=distance,
        squared=squared,
        log_count=log_count,
        pair=pair,
        features={},
    )
