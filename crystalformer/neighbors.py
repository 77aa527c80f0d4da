"""Periodic images within a radius: exact, per crystal, sorted by distance, equal distances merged.

Legend: n atoms of one crystal, S shells (rows of the list). A *shell* of the ordered pair (i, j) holds all images of
atom j at one distance from atom i. Attention sees an image through its distance alone (model.md, section 1), so the
images of a shell share one row and its ``count``; symmetric crystals need several times fewer rows that way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt

from crystalformer.optional import problem

_log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SHELL_GAP = 2e-5
"""Å. Images of a pair closer in distance than this are one shell at their root mean square distance, so the error is
of second order: below 1e-8 of a weight, under float32's rounding."""

_CHUNK = 2_000_000
"""Distances evaluated at once: bounds the memory of the search to some tens of megabytes."""


_DENSE_LIMIT = 2_000_000
"""Pairs times images above which atoms are sorted into cells first."""

_CELLS_A_RADIUS = 2.5
"""Linked cells are at least radius / this thick: thinner ones fit the sphere better and are more in number."""

_CELLS_AN_ATOM = 64
"""Linked cells at most: in a crystal that is nearly empty, or within a small radius, thicker ones serve as well."""


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
    images = _images_a_pair(lattice, radius)
    compiled = _compiled_search()
    if n * n * images > _DENSE_LIMIT:
        found = _images_by_cells(positions, lattice, radius)
    elif compiled is not None:
        arrays = (np.ascontiguousarray(a, dtype=np.float64) for a in (positions, lattice, np.linalg.inv(lattice)))
        return Shells(*compiled(*arrays, _reach(lattice, radius), float(radius), SHELL_GAP))
    else:
        first, second = np.triu_indices(n)
        found = [
            _images_of_pairs(positions, lattice, radius, first[part], second[part])
            for part in _parts(len(first), images)
        ]
    i, j, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    if (_heights(lattice) > 2 * radius).all():
        return _sorted(n, i, j, distance, np.ones(len(i), dtype=np.int64))
    return _merge(n, i, j, distance)


@cache
def _compiled_search() -> Callable[..., tuple[IntArray, IntArray, FloatArray, IntArray]] | None:
    """The search as compiled code, several times faster; None where there is no numba to compile it."""
    why = problem("numba")
    if why is not None:
        _log.warning("neighbours are found by NumPy, several times slower than compiled: numba %s", why)
        return None
    from crystalformer.ops.numba.search import dense_shells

    return dense_shells


def _heights(lattice: FloatArray) -> FloatArray:
    """(3,) distances between the cell's opposite faces, Å: 1 / |reciprocal rows|."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0))


def _reach(lattice: FloatArray, radius: float) -> IntArray:
    """(3,) how many translations along each lattice vector can bring a nearest image back within ``radius``."""
    return np.floor(radius / _heights(lattice) + 0.5).astype(np.int64)


def _translations(lattice: FloatArray, radius: float) -> FloatArray:
    """(T, 3) those translations."""
    return np.array(list(product(*(range(-m, m + 1) for m in _reach(lattice, radius)))), dtype=np.float64)


def _images_a_pair(lattice: FloatArray, radius: float) -> int:
    return int(np.prod(2.0 * _reach(lattice, radius) + 1))


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


def _images_by_cells(
    positions: FloatArray, lattice: FloatArray, radius: float
) -> list[tuple[IntArray, IntArray, FloatArray]]:
    """Both directions of every pair's images within the radius, in time proportional to the atoms (linked cells).

    The crystal is divided into cells along its lattice vectors; every atom meets the atoms of the cells within reach,
    over the boundary as images. One of two opposite cell offsets is visited and its pairs are mirrored.
    """
    cells = np.maximum(1, np.floor(_heights(lattice) * _CELLS_A_RADIUS / radius)).astype(np.int64)
    while cells.prod(dtype=np.float64) > _CELLS_AN_ATOM * len(positions):
        cells[cells.argmax()] = -(-cells.max() // 2)
    reach = np.ceil(radius * cells / _heights(lattice)).astype(int)
    fractional = positions @ np.linalg.inv(lattice)
    fractional -= np.floor(fractional)
    inside = fractional @ lattice
    cell = np.minimum((fractional * cells).astype(np.int64), cells - 1)
    flat = np.ravel_multi_index(tuple(cell.T), tuple(cells))
    members = flat.argsort(kind="stable")
    counts = np.bincount(flat, minlength=int(cells.prod()))
    starts = np.cumsum(counts) - counts
    found = []
    for offset in product(*(range(-m, m + 1) for m in reach)):
        if offset < (0, 0, 0):
            continue
        shift, target = np.divmod(cell + np.array(offset), cells)
        other = np.ravel_multi_index(tuple(target.T), tuple(cells))
        i = np.repeat(np.arange(len(positions)), counts[other])
        within = np.arange(len(i)) - np.repeat(np.cumsum(counts[other]) - counts[other], counts[other])
        j = members[starts[other][i] + within]
        squared = np.square(inside[j] + (shift @ lattice)[i] - inside[i]).sum(-1)
        near = squared <= radius * radius
        i, j, distance = i[near], j[near], np.sqrt(squared[near])
        found.append((i, j, distance))
        if offset != (0, 0, 0):
            found.append((j, i, distance))
    return found


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
    return _sorted(n, i, j, merged, count)


def _sorted(n: int, i: IntArray, j: IntArray, distance: FloatArray, count: IntArray) -> Shells:
    """Rows atom by atom, nearest first, then by neighbour."""
    order = np.lexsort((j, distance, i))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=n))])
    return Shells(ptr=ptr, neighbor=j[order], distance=distance[order], count=count[order])
