"""Crystals for the tests: random ones, real ones, and other ways to write the same crystal down."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from crystalformer import CrystalBatch
from tests.crystalformer import golden

EMBEDDED = Path(__file__).parents[2] / "data_pipeline" / "embedded"


@dataclass(frozen=True)
class Crystal:
    """positions (n, 3) Å, numbers (n,), lattice (3, 3) rows Å."""

    positions: np.ndarray
    numbers: np.ndarray
    lattice: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)


def batch_of(*crystals: Crystal) -> CrystalBatch:
    return CrystalBatch.from_arrays(
        np.concatenate([c.positions for c in crystals]),
        np.concatenate([c.numbers for c in crystals]),
        np.stack([c.lattice for c in crystals]),
        [len(c) for c in crystals],
    )


@cache
def golden_crystals() -> tuple[Crystal, ...]:
    """The five real crystals of the golden vectors: 8, 6, 2, 4 and 2 atoms."""
    return tuple(Crystal(*arrays) for arrays in golden.load("real_k16").crystals())


def golden_structures() -> list:
    """The same as pymatgen's Structures."""
    from pymatgen.core import Lattice, Structure

    return [
        Structure(Lattice(c.lattice), c.numbers, c.positions, coords_are_cartesian=True) for c in golden_crystals()
    ]


@cache
def embedded_crystals() -> tuple[Crystal, ...]:
    """Extremes of an embedded data set: fewest and most atoms, flattest, longest and most skewed cells."""
    import pyarrow.parquet as pq

    rows = pq.read_table(EMBEDDED / "elastic_tensor_2015.parquet").select(["positions", "atomic_numbers", "lattice"])
    crystals = [
        Crystal(np.array(row["positions"]), np.array(row["atomic_numbers"]), np.array(row["lattice"]).reshape(3, 3))
        for row in rows.to_pylist()
    ]
    measures = (
        len,
        lambda c: -len(c),
        lambda c: heights(c.lattice).min(),
        lambda c: -heights(c.lattice).max(),
        lambda c: np.prod(heights(c.lattice) / np.linalg.norm(c.lattice, axis=1)),
    )
    return tuple(min(crystals, key=measure) for measure in measures)


def heights(lattice: np.ndarray) -> np.ndarray:
    """(3,) distances between opposite faces, Å."""
    areas = np.linalg.norm(np.cross(np.roll(lattice, -1, 0), np.roll(lattice, -2, 0)), axis=1)
    return abs(np.linalg.det(lattice)) / areas


def random_crystal(n: int, seed: int, volume: float = 15.0, skew: float = 0.6) -> Crystal:
    """n atoms at random in a random skewed cell of ``volume`` Å³ an atom; half of them outside the cell."""
    rng = np.random.default_rng(seed)
    lattice = np.eye(3) + rng.uniform(-skew, skew, (3, 3))
    while abs(np.linalg.det(lattice)) < 0.2:
        lattice = np.eye(3) + rng.uniform(-skew, skew, (3, 3))
    lattice *= (n * volume / abs(np.linalg.det(lattice))) ** (1 / 3)
    positions = rng.uniform(-1, 1, (n, 3)) @ lattice
    return Crystal(positions, rng.integers(1, 99, n), lattice)


def rotated(crystal: Crystal) -> Crystal:
    """Turned about a skewed axis."""
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)
    return replace(crystal, positions=crystal.positions @ rotation, lattice=crystal.lattice @ rotation)


def translated(crystal: Crystal) -> Crystal:
    """Moved by a fraction of the cell."""
    return replace(crystal, positions=crystal.positions + np.array([0.37, -0.81, 0.13]) @ crystal.lattice)


def reordered(crystal: Crystal) -> Crystal:
    """Its atoms in another order."""
    order = np.random.default_rng(5).permutation(len(crystal))
    order = order if (order != np.arange(len(order))).any() else order[::-1]
    return replace(crystal, positions=crystal.positions[order], numbers=crystal.numbers[order])


def unwrapped(crystal: Crystal) -> Crystal:
    """Each atom in another cell."""
    cells = np.random.default_rng(7).integers(-3, 4, (len(crystal), 3))
    return replace(crystal, positions=crystal.positions + cells @ crystal.lattice)


def sheared(crystal: Crystal) -> Crystal:
    """Other vectors of the same lattice: an integer matrix of determinant 1 that makes a long skewed cell."""
    return replace(crystal, lattice=np.array([[1, 2, 0], [0, 1, -1], [1, 2, 1]]) @ crystal.lattice)


def mirrored(crystal: Crystal) -> Crystal:
    """Its mirror image: distances are all that counts."""
    mirror = np.diag([1.0, 1.0, -1.0])
    return replace(crystal, positions=crystal.positions @ mirror, lattice=crystal.lattice @ mirror)


def supercell(crystal: Crystal, *repeats: int) -> Crystal:
    """``repeats`` cells along each lattice vector in one."""
    cells = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), -1).reshape(-1, 1, 3)
    positions = (crystal.positions + cells @ crystal.lattice).reshape(-1, 3)
    lattice = np.array(repeats)[:, None] * crystal.lattice
    return Crystal(positions, np.tile(crystal.numbers, len(cells)), lattice)


REWRITTEN = {
    "rotated": rotated,
    "translated": translated,
    "reordered": reordered,
    "unwrapped": unwrapped,
    "other lattice vectors": sheared,
    "mirrored": mirrored,
    "1x1x12 supercell": lambda c: supercell(c, 1, 1, 12),
    "2x1x1 supercell": lambda c: supercell(c, 2, 1, 1),
    "2x3x1 supercell": lambda c: supercell(c, 2, 3, 1),
    "all of it": lambda c: rotated(translated(reordered(unwrapped(sheared(supercell(c, 1, 2, 1)))))),
}
"""Other ways to write a crystal down; none may change a prediction."""
