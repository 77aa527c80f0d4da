"""Periodic images within a radius: exact, per crystal, sorted by distance, equal distances merged.

Legend: n atoms of one crystal, S shells (rows of the list). A *shell* of the ordered pair (i, j) holds all images of
atom j at one distance from atom i. Attention sees an image through its distance alone (model.md, section 1), so the
images of a shell share one row and its ``count``; symmetric crystals need several times fewer rows that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SHELL_GAP = 2e-5
"""Å. Images of a pair closer in distance than this are one shell at their root mean square distance, so the error is
of second order: below 1e-8 of a weight, under float32's rounding."""

_CHUNK = 2_000_000
"""Distances evaluated at once: bounds the memory of the search to some tens of megabytes."""


@dataclass(frozen=True, slots=True)
class Shells:
    """The shells around every atom of one crystal, atom by atom, nearest first.

    ptr (n+1,): rows of atom i are ``ptr[i]:ptr[i+1]``. neighbor (S,): atom j within the crystal.
    distance (S,): Å. count (S,): images in the shell. The relation is symmetric: (i, j, d, c) implies (j, i, d, c).
    """

    ptr: IntArray
    neighbor: IntArray
    distance: FloatArray
    count: IntArray

    @property
    def num_images(self) -> int:
        """Images in all shells: the work a dense sum over the same radius would do."""
        return int(self.count.sum())


def find_shells(positions: FloatArray, lattice: FloatArray, radius: float) -> Shells:
    """All images of all atoms within ``radius`` (Å, inclusive) of each atom, itself at distance 0 among them.

    positions (n, 3) Cartesian Å, inside the cell or not; lattice (3, 3) rows Å. Raises ValueError for a cell without
    volume or a radius that is not positive.
    """
    if not radius > 0:
        raise ValueError(f"radius must be greater than 0 Å, got {radius!r}")
    volume = abs(float(np.linalg.det(lattice)))
    if not volume > 0:
        raise ValueError(f"lattice must span a volume, got {lattice.tolist()!r}")
    n = len(positions)
    first, second = np.triu_indices(n)
    pair_rows = [
        _images_of_pairs(positions, lattice, radius, first[part], second[part])
        for part in _parts(len(first), _images_a_pair(lattice, radius))
    ]
    i, j, distance = (np.concatenate(column) for column in zip(*pair_rows, strict=True))
    return _merge(n, i, j, distance)


def _heights(lattice: FloatArray) -> FloatArray:
    """(3,) distances between the cell's opposite faces, Å: 1 / |reciprocal rows|."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0))


def _translations(lattice: FloatArray, radius: float) -> FloatArray:
    """(T, 3) integer translations that can bring a nearest image back within ``radius``."""
    reach = np.floor(radius / _heights(lattice) + 0.5).astype(int)
    return np.array(list(product(*(range(-m, m + 1) for m in reach))), dtype=np.float64)


def _images_a_pair(lattice: FloatArray, radius: float) -> int:
    return int(np.prod(2 * np.floor(radius / _heights(lattice) + 0.5) + 1))


def _parts(count: int, images: int) -> list[slice]:
    step = max(1, _CHUNK // images)
    return [slice(start, start + step) for start in range(0, count, step)]


def _images_of_pairs(
    positions: FloatArray, lattice: FloatArray, radius: float, i: IntArray, j: IntArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """Both directions of the given unordered pairs: (i, j, distance) of every image within the radius."""
    fractional = (positions[j] - positions[i]) @ np.linalg.inv(lattice)
    nearest = (fractional - np.round(fractional)) @ lattice
    shifts = _translations(lattice, radius) @ lattice
    squared = np.square(nearest[:, None, :] + shifts[None, :, :]).sum(-1)
    pair, image = np.nonzero(squared <= radius * radius)
    distance = np.sqrt(squared[pair, image])
    i, j = i[pair], j[pair]
    other = i != j
    return (
        np.concatenate([i, j[other]]),
        np.concatenate([j, i[other]]),
        np.concatenate([distance, distance[other]]),
    )


def _merge(n: int, i: IntArray, j: IntArray, distance: FloatArray) -> Shells:
    """Join each pair's images that lie within SHELL_GAP of one another, then sort every atom's shells by distance."""
    order = np.lexsort((distance, j, i))
    i, j, distance = i[order], j[order], distance[order]
    new = np.ones(len(i), dtype=bool)
    new[1:] = (np.diff(i) != 0) | (np.diff(j) != 0) | (np.diff(distance) > SHELL_GAP)
    start = np.flatnonzero(new)
    count = np.diff(np.append(start, len(i)))
    merged = np.sqrt(np.add.reduceat(np.square(distance), start) / count)
    i, j = i[start], j[start]
    order = np.lexsort((j, merged, i))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=n))])
    return Shells(ptr=ptr, neighbor=j[order], distance=merged[order], count=count[order])
