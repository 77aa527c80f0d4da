"""Between pairs and shells inside a block: scores of pairs to exponents of shells, and sums of shells back to pairs.

PairColumns makes both a matrix product. With a column for each atom of the query's crystal and three more, a shell is
the row [is j, d², log count, 1], and its exponent is that row times [scores, -c, 1, -shift]; the transposed product
of weights gives their sums by pair, their sum times d² and their total at once. PairLookup gathers and scatters, for
crystals with so many atoms that the columns would be mostly zeros.

Legend: A query atoms, J keys of the block, M shell rows an atom, m <= M of them in use, H heads,
C = (atoms of the largest crystal) + 3 columns. All sums run in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_DISTANCE = 1e4
"""Å. Radial features vanish there."""

PADDING_LOG = -1e4
"""log count of a padded row: its weight is 0 (radial.vanishing_exp_)."""

_EXTRA = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRows:
    """Padded shells of A atoms, (A, M) each: neighbor (plan order), distance Å, squared Å², log_count."""

    neighbor: Tensor
    distance: Tensor
    squared: Tensor
    log_count: Tensor
    inside: Tensor

    @classmethod
    def of(cls, neighbor: Tensor, distance: Tensor, count: Tensor, inside: Tensor) -> BlockRows:
        """From values (A, M) that mean something where ``inside``; padded rows have d² = 0 and weigh nothing."""
        return cls(
            neighbor=neighbor,
            distance=torch.where(inside, distance, PADDING_DISTANCE),
            squared=torch.where(inside, distance, 0.0).square_(),
            log_count=torch.where(inside, count.log(), PADDING_LOG),
            inside=inside,
        )

    @property
    def capacity(self) -> int:
        """M."""
        return self.distance.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSums:
    """What ``collapse`` gives: pairs (H, A, J) sums by pair; squared (H, A) sums of value times d²; total (H, A)."""

    pairs: Tensor
    squared: Tensor
    total: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairColumns:
    """Whole small crystals: the keys are the queries.

    columns (A, C, M): the shells' rows above. nearest (A, C-3): d² of a pair's first shell.
    source, target (A, C-3): the key of a column; where a crystal has fewer atoms, any and a spare last one.
    depth: as PairLookup's; columns are summed already.
    """

    rows: BlockRows
    keys: slice | Tensor
    columns: Tensor
    nearest: Tensor
    source: Tensor
    target: Tensor
    depth: int = 1

    @classmethod
    def build(cls, rows: BlockRows, keys: slice, first: Tensor, size: Tensor) -> PairColumns:
        """keys: the block's atoms; first (A,): where an atom's crystal starts in plan order; size (A,): its atoms."""
        queries, width = len(first), int(size.max())
        column = torch.arange(width, device=first.device)
        local = torch.where(rows.inside, rows.neighbor - first[:, None], 0)
        columns = rows.distance.new_zeros(queries, width + _EXTRA, rows.capacity)
        columns.scatter_(1, local.unsqueeze(1), rows.inside.unsqueeze(1).to(columns))
        columns[:, width] = rows.squared
        columns[:, width + 1] = rows.log_count
        columns[:, width + 2] = 1.0
        far = PADDING_DISTANCE**2
        nearest = rows.squared.new_full((queries, width), far)
        nearest.scatter_reduce_(1, local, torch.where(rows.inside, rows.squared, far), "amin")
        key = first[:, None] - keys.start + column
        return cls(
            rows=rows,
            keys=keys,
            columns=columns,
            nearest=nearest,
            source=key.clamp(max=queries - 1),
            target=torch.where(column < size[:, None], key, queries),
        )

    def exponent(self, scores: Tensor, c: Tensor, shift: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
        """(A, H, m) scores - c d² + log count - shift in the memory of ``out`` (A·H·m,), and the shift (H, A).

        scores (H, A, J); c (H, A) in 1/Å². Without a shift, the largest exponent of any pair's first shell.
        """
        table = self._table(scores)
        width = self.nearest.shape[1]
        if shift is None:
            shift = torch.addcmul(table[..., :width], c.unsqueeze(-1), self.nearest, value=-1.0).amax(-1)
        table[..., width] = c.neg()
        table[..., width + 1] = 1.0
        table[..., width + 2] = shift.neg()
        return self._to_shells(table, out), shift

    def spread(self, scores: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        """(A, H, m) scores of the shells' pairs minus ``inner`` (H, A), in the memory of ``out`` (A·H·m,)."""
        table = self._table(scores)
        table[..., -3:-1] = 0.0
        table[..., -1] = inner.neg()
        return self._to_shells(table, out)

    @property
    def num_keys(self) -> int:
        """J."""
        return len(self.source)

    def collapse(self, values: Tensor, out: Tensor) -> PairSums:
        """Sums of the shells' values (A, H, m); pairs in the memory of ``out`` (H·A·(J+1),) or more."""
        queries, heads, m = values.shape
        sums = torch.bmm(values, self.columns[..., :m].transpose(1, 2)).transpose(0, 1)
        width = self.nearest.shape[1]
        pairs = out[: heads * queries * (queries + 1)].zero_().view(heads, queries, -1)
        pairs.scatter_(2, self.target.expand(heads, -1, -1), sums[..., :width])
        return PairSums(pairs=pairs[..., :queries], squared=sums[..., width], total=sums[..., width + 2])

    def _table(self, scores: Tensor) -> Tensor:
        heads, queries, width = len(scores), *self.source.shape
        table = scores.new_empty(heads, queries, width + _EXTRA)
        table[..., :width] = scores.gather(2, self.source.expand(heads, -1, -1))
        return table

    def _to_shells(self, table: Tensor, out: Tensor) -> Tensor:
        heads, queries, _ = table.shape
        result = out.view(queries, heads, -1)
        return torch.bmm(table.transpose(0, 1), self.columns[..., : result.shape[2]], out=result)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLookup:
    """A part of one large crystal. keys: its atoms or the neighbours among them; pair (A, M): a shell's key.

    slot (A, M): where a shell is put to be summed: its key plus (J+1) times the number of shells of its pair before
    it; J where there is none. depth: the most shells of a pair. No two shells meet in a slot, so a pair's sum has one
    order on every device, GPUs included.
    """

    rows: BlockRows
    keys: slice | Tensor
    pair: Tensor
    slot: Tensor
    depth: int

    @classmethod
    def build(cls, rows: BlockRows, crystal: slice, union_from: int) -> PairLookup:
        """crystal: its atoms in plan order; from more than ``union_from`` of them only neighbours become keys."""
        local = torch.where(rows.inside, rows.neighbor - crystal.start, 0)
        n = crystal.stop - crystal.start
        if n <= union_from:
            return cls._of(rows, crystal, local, n)
        used = torch.zeros(n, dtype=torch.bool, device=local.device)
        used[local.flatten()] = True
        rank = used.cumsum(0) - 1
        keys = used.nonzero().squeeze(1)
        return cls._of(rows, keys + crystal.start, rank[local], len(keys))

    @classmethod
    def _of(cls, rows: BlockRows, keys: slice | Tensor, pair: Tensor, num_keys: int) -> PairLookup:
        slot, depth = _slots(torch.where(rows.inside, pair, num_keys), num_keys)
        return cls(rows=rows, keys=keys, pair=pair, slot=slot, depth=depth)

    def exponent(self, scores: Tensor, c: Tensor, shift: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
        """As PairColumns; without a shift, the largest exponent."""
        result = self._to_shells(scores, out)
        m = result.shape[2]
        result.addcmul_(c.unsqueeze(-1), self.rows.squared[:, :m], value=-1.0).add_(self.rows.log_count[:, :m])
        if shift is None:
            shift = result.amax(-1)
        return result.sub_(shift.unsqueeze(-1)).transpose(0, 1), shift

    def spread(self, scores: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        """As PairColumns."""
        return self._to_shells(scores, out).sub_(inner.unsqueeze(-1)).transpose(0, 1)

    @property
    def num_keys(self) -> int:
        """J."""
        return self.keys.stop - self.keys.start if isinstance(self.keys, slice) else len(self.keys)

    def collapse(self, values: Tensor, out: Tensor) -> PairSums:
        """As PairColumns; ``out`` (H·A·(J+1)·depth,) or more."""
        queries, heads, m = values.shape
        slots = (self.num_keys + 1) * self.depth
        pairs = out[: heads * queries * slots].zero_().view(heads, queries, -1)
        pairs.scatter_(2, self.slot[:, :m].expand(heads, -1, -1), values.transpose(0, 1))
        if self.depth > 1:
            pairs = pairs.view(heads, queries, self.depth, -1).sum(2)
        squared = torch.bmm(values, self.rows.squared[:, :m].unsqueeze(-1)).squeeze(-1)
        return PairSums(pairs=pairs[..., : self.num_keys], squared=squared.T, total=values.sum(-1).T)

    def _to_shells(self, scores: Tensor, out: Tensor) -> Tensor:
        heads, queries = scores.shape[:2]
        result = out.view(heads, queries, -1)
        index = self.pair[:, : result.shape[2]].expand(heads, -1, -1)
        return torch.gather(scores, 2, index, out=result)


def _slots(key: Tensor, num_keys: int) -> tuple[Tensor, int]:
    """Slots (A, M) and depth (see PairLookup) of shells' keys (A, M), which are ``num_keys`` for padding."""
    counts = key.new_zeros(len(key), num_keys + 1).scatter_add_(1, key, torch.ones_like(key))
    depth = int(counts[:, :num_keys].max())
    if depth <= 1:
        return key, 1
    ordered, order = key.sort(dim=1, stable=True)
    position = torch.arange(key.shape[1], device=key.device).expand_as(key)
    begins = torch.ones_like(key, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    before = position - torch.where(begins, position, 0).cummax(1).values
    rank = torch.empty_like(key).scatter_(1, order, before)
    return torch.where(key < num_keys, key + (num_keys + 1) * rank, num_keys), depth
