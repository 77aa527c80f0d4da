"""Structures of data_pipeline as CrystalBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.data.shells import ShellTable
from cluster.data.tables import SplitTables
from crystalformer.batch import CrystalBatch, Disorder, moved
from data_pipeline.table import PackedStructures, StructureTable

if TYPE_CHECKING:
    from data_pipeline.crystal import Crystal

IntArray = npt.NDArray[np.int64]

TOUCHED_A_CRYSTAL = 2**19
"""Bytes that the kernel may map for a crystal beside its own: up to 64 KB around each of its eight pieces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetScaling:
    """normalized = (value - bias) / scale, one number of each a target (model.md, section 4)."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]

    @classmethod
    def fit(cls, values: npt.NDArray[np.float64], mode: str) -> TargetScaling:
        """Mean and population std of the train split's values (n, T), as far as ``normalize_targets`` says.

        A target of one value everywhere keeps the scale 1.
        """
        targets = values.shape[1]
        scale = values.std(0) if "scale" in mode else np.ones(targets)
        bias = values.mean(0) if "bias" in mode else np.zeros(targets)
        spread = np.ptp(values, axis=0) > 0  # the std of equal values is not always exactly 0
        return cls(scale=tuple(np.where(spread, scale, 1.0).tolist()), bias=tuple(bias.tolist()))

    def normalize(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(n, T) values in units to normalized ones."""
        normalized: npt.NDArray[np.float64] = (values - np.array(self.bias)) / np.array(self.scale)
        return normalized

    def restore(self, outputs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(n, T) normalized values to values in units."""
        values: npt.NDArray[np.float64] = outputs * np.array(self.scale) + np.array(self.bias)
        return values


class Feed:
    """One split, ready to be asked for batches."""

    def __init__(self, tables: SplitTables, targets: tuple[str, ...], radius: float, scaling: TargetScaling) -> None:
        """``tables``: the split's structures and their shells within ``radius`` (Å)."""
        self._tables = tables
        self._structures = StructureTable.from_arrow(tables.structures, targets)
        self._shells = ShellTable(tables.shells, radius)
        self._stored = self._structures.stored_rows
        self._normalized = scaling.normalize(self._structures.targets()).astype(np.float32)
        self._crystal_bytes = TOUCHED_A_CRYSTAL + tables.num_bytes // max(len(tables.structures), 1)
        self._touched = 0
        self.costs: IntArray = self._shells.costs if self._stored is None else self._shells.costs[self._stored]
        """(rows,) work of each crystal: its shells and atoms, or its pairs of atoms where no layer needs shells."""
        if radius == 0:
            self.costs = self._structures.sizes**2
        tables.release()

    @property
    def shells(self) -> IntArray:
        """(rows,) shells of each crystal."""
        return self._shells.shells if self._stored is None else self._shells.shells[self._stored]

    @property
    def num_rows(self) -> int:
        """Crystals of the split that have every target."""
        return self._structures.num_rows

    @property
    def num_targets(self) -> int:
        """Properties learnt at once."""
        return int(self._normalized.shape[1])

    def batch(self, rows: IntArray, device: torch.device) -> tuple[CrystalBatch, Tensor]:
        """The crystals of ``rows`` in that order and their normalized targets (B, T) float32, on ``device``."""
        self._make_room(len(rows))
        packed = self._structures.gather(rows)
        batch = batch_of_packed(packed)
        stored = rows if self._stored is None else self._stored[rows]
        self._shells.attach(batch, stored)
        targets = torch.from_numpy(self._normalized[rows])
        return batch.to(device), moved(targets, device)

    def _make_room(self, crystals: int) -> None:
        """Let go of pages of a split on disk before more than its limit could be held."""
        self._touched += crystals * self._crystal_bytes
        if self._touched > self._tables.limit and self._tables.maps:
            self._tables.release()
            self._touched = crystals * self._crystal_bytes


def batch_of_packed(packed: PackedStructures) -> CrystalBatch:
    """Rows of a validated structure table as a batch; nothing is checked again."""
    disorder = None
    if packed.disorder is not None:
        disorder = Disorder(
            atom=torch.from_numpy(packed.disorder.site),
            atomic_number=torch.from_numpy(packed.disorder.atomic_number),
            occupancy=torch.from_numpy(packed.disorder.occupancy),
        )
    return CrystalBatch(
        positions=torch.from_numpy(packed.positions),
        atomic_numbers=torch.from_numpy(packed.atomic_numbers),
        lattice=torch.from_numpy(packed.lattice),
        sizes=torch.from_numpy(packed.sizes),
        disorder=disorder,
    )


def batch_of_crystals(crystals: Sequence[Crystal]) -> CrystalBatch:
    """Checked crystals, one after another."""
    sizes = [len(crystal.atomic_numbers) for crystal in crystals]
    starts = np.cumsum(sizes) - sizes
    mixed = [(s, c.disorder) for s, c in zip(starts, crystals, strict=True) if c.disorder is not None]
    disorder = None
    if mixed:
        disorder = Disorder(
            atom=torch.from_numpy(np.concatenate([d.site + start for start, d in mixed])),
            atomic_number=torch.from_numpy(np.concatenate([d.atomic_number for _, d in mixed])),
            occupancy=torch.from_numpy(np.concatenate([d.occupancy for _, d in mixed])),
        )
    return CrystalBatch.from_arrays(
        np.concatenate([crystal.positions for crystal in crystals]),
        np.concatenate([crystal.atomic_numbers for crystal in crystals]),
        np.stack([crystal.lattice for crystal in crystals]),
        sizes,
        disorder,
    )
