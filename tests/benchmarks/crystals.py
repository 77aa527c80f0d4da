"""Crystals for the benchmarks that need nothing but numpy: 128 of elastic_tensor_2015, drawn with seed 0.

crystals.npz holds them packed (positions Å, atomic_numbers, lattice rows Å, sizes). It is made again by
``python -m tests.benchmarks.crystals``, which needs pyarrow and the embedded table.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crystalformer import CrystalBatch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FILE = Path(__file__).with_name("crystals.npz")
TABLE = Path(__file__).parents[2] / "data_pipeline" / "embedded" / "elastic_tensor_2015.parquet"
COUNT = 128
JITTER = 0.05
"""Å. Standard deviation by which a supercell's atoms are moved: its images then share no distances."""


class Crystal(NamedTuple):
    """positions (n, 3) Å, atomic_numbers (n,), lattice (3, 3) rows Å."""

    positions: Floats
    atomic_numbers: Ints
    lattice: Floats


def crystals(count: int) -> list[Crystal]:
    """The first ``count`` of the 128."""
    if not 1 <= count <= COUNT:
        raise ValueError(f"count must be between 1 and {COUNT}, got {count}")
    with np.load(FILE) as file:
        ends = np.cumsum(file["sizes"])
        spans = [slice(end - size, end) for size, end in zip(file["sizes"], ends, strict=True)]
        positions, numbers, lattice = file["positions"], file["atomic_numbers"], file["lattice"]
    return [Crystal(positions[s], numbers[s].astype(np.int64), lattice[i]) for i, s in enumerate(spans[:count])]


def batch(members: list[Crystal]) -> CrystalBatch:
    """A batch of crystals."""
    return CrystalBatch.from_arrays(
        np.concatenate([c.positions for c in members]),
        np.concatenate([c.atomic_numbers for c in members]),
        np.stack([c.lattice for c in members]),
        [len(c.positions) for c in members],
    )


def supercell(atoms: int) -> Crystal:
    """A supercell of about ``atoms`` atoms of the first 12-atom crystal, as near to a cube as whole cells allow."""
    cell = next(c for c in crystals(COUNT) if len(c.positions) == 12)
    lengths, repeats = np.linalg.norm(cell.lattice, axis=1), np.ones(3, dtype=int)
    while True:
        longer = repeats + np.eye(3, dtype=int)[int((lengths * repeats).argmin())]
        if 12 * longer.prod() > atoms * 1.05:
            break
        repeats = longer
    shifts = np.stack(np.meshgrid(*(np.arange(r) for r in repeats), indexing="ij"), -1).reshape(-1, 3) @ cell.lattice
    positions = (cell.positions + shifts[:, None]).reshape(-1, 3)
    positions = positions + np.random.default_rng(0).normal(scale=JITTER, size=positions.shape)
    return Crystal(positions, np.tile(cell.atomic_numbers, len(shifts)), cell.lattice * repeats[:, None])


def export() -> None:
    """Write crystals.npz from the embedded table."""
    import pyarrow.parquet as pq

    rows = pq.read_table(TABLE).take(np.random.default_rng(0).permutation(pq.read_metadata(TABLE).num_rows)[:COUNT])
    numbers = rows["atomic_numbers"].to_pylist()
    np.savez_compressed(
        FILE,
        positions=np.concatenate([np.array(p) for p in rows["positions"].to_pylist()]),
        atomic_numbers=np.concatenate(numbers).astype(np.int16),
        lattice=np.array(rows["lattice"].to_pylist()).reshape(-1, 3, 3),
        sizes=np.array([len(n) for n in numbers]),
    )


if __name__ == "__main__":
    export()
