"""What a model saw in training, and how a crystal that is to be predicted differs from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from crystalformer.artifact import ModelCard, TrainRanges
from data_pipeline.composition import amounts_of
from data_pipeline.elements import number_of, symbol_of

if TYPE_CHECKING:
    from data_pipeline.crystal import Crystal
    from data_pipeline.table import StructureTable

_ROWS = 8192
"""Crystals looked at at once."""

_MARGIN = 1e-6
"""Part of a density by which it may lie outside: the same crystal in another cell has another last digit."""


def seen_in(table: StructureTable) -> tuple[tuple[str, ...], TrainRanges]:
    """Symbols of the elements of a table's crystals, by atomic number, and their ranges."""
    numbers: set[int] = set()
    densities = []
    for start in range(0, table.num_rows, _ROWS):
        packed = table.gather(np.arange(start, min(start + _ROWS, table.num_rows)))
        numbers.update(np.unique(packed.atomic_numbers).tolist())
        if packed.disorder is not None:
            numbers.update(np.unique(packed.disorder.atomic_number).tolist())
        densities.append(packed.sizes / np.abs(np.linalg.det(packed.lattice)))
    density = np.concatenate(densities)
    ranges = TrainRanges(
        cell_sizes=(int(table.sizes.min()), int(table.sizes.max())),
        number_densities=(float(density.min()), float(density.max())),
    )
    return tuple(symbol_of(number) for number in sorted(numbers - {0})), ranges


def elements_of(card: ModelCard) -> set[int]:
    """Atomic numbers of what a model was trained on; none where its card does not say. ValueError for no element."""
    return {number_of(symbol) for symbol in card.provenance.get("elements", ())}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What every one of several models saw; None where one of them does not say."""

    elements: frozenset[int] | None
    ranges: TrainRanges | None

    @classmethod
    def by_all(cls, cards: Sequence[ModelCard]) -> Self:
        """The elements and ranges that all the cards share. ValueError where one names no element."""
        elements = [elements_of(card) for card in cards]
        ranges = [card.ranges for card in cards if card.ranges is not None]
        return cls(
            elements=frozenset(set.intersection(*elements)) if all(elements) else None,
            ranges=_common(ranges) if len(ranges) == len(cards) else None,
        )

    def warning(self, crystal: Crystal) -> str:
        """How a crystal in its primitive cell differs from all that was seen; empty where it does not."""
        return "; ".join([*self._new_elements(crystal), *self._outside(crystal)])

    def _new_elements(self, crystal: Crystal) -> list[str]:
        if self.elements is None:
            return []
        new = sorted(set(amounts_of(crystal)) - self.elements)
        return [f"never seen in training: {' '.join(symbol_of(number) for number in new)}"] if new else []

    def _outside(self, crystal: Crystal) -> list[str]:
        if self.ranges is None:
            return []
        found = []
        size = len(crystal.atomic_numbers)
        low, high = self.ranges.cell_sizes
        if not low <= size <= high:
            found.append(f"{size} atoms in the cell, {low} to {high} in training")
        density = size / abs(float(np.linalg.det(crystal.lattice)))
        thin, dense = self.ranges.number_densities
        if not thin * (1 - _MARGIN) <= density <= dense * (1 + _MARGIN):
            found.append(f"density {density:.4f} atoms/Å³, {thin:.4f} to {dense:.4f} in training")
        return found


def _common(ranges: Sequence[TrainRanges]) -> TrainRanges:
    """What lies within all of them."""
    sizes, densities = [r.cell_sizes for r in ranges], [r.number_densities for r in ranges]
    return TrainRanges(
        cell_sizes=(max(low for low, _ in sizes), min(high for _, high in sizes)),
        number_densities=(max(low for low, _ in densities), min(high for _, high in densities)),
    )
