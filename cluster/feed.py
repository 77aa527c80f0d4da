"""Table rows to model input: the only bridge between data_pipeline and crystalformer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.shells import ShellTable
from cluster.tables import SplitTables
from crystalformer.batch import CrystalBatch, Disorder
from data_pipeline.table import PackedStructures, StructureTable

IntArray = npt.NDArray[np.int64]


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
        self._structures = StructureTable.from_arrow(tables.structures, targets)
        self._shells = ShellTable(tables.shells, radius)
        self._normalized = scaling.normalize(self._structures.targets())

    @property
    def num_rows(self) -> int:
        """Crystals of the split."""
        return self._structures.num_rows

    @property
    def num_targets(self) -> int:
        """Properties learnt at once."""
        return int(self._normalized.shape[1])

    @property
    def costs(self) -> IntArray:
        """(rows,) work of each crystal."""
        return self._shells.costs

    def batch(self, rows: IntArray, device: torch.device) -> tuple[CrystalBatch, Tensor]:
        """The crystals of ``rows`` in that order and their normalized targets (B, T) float32, on ``device``."""
        packed = self._structures.gather(rows)
        batch = to_batch(packed)
        batch.attach_shells(self._shells.pack(rows, packed.sizes))
        targets = torch.from_numpy(self._normalized[rows].astype(np.float32))
        return batch.to(device), targets.to(device)


def to_batch(packed: PackedStructures) -> CrystalBatch:
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
