"""Atoms that see the same crystal are computed once.

In real space an atom's features depend on which atoms it sees at which distances, and on their features alone
(model.md, section 1). So atoms that begin alike and see, class by class, as many atoms at the same distances have the
same features after every layer: exactly, whatever the weights. The classes here are the coarsest with that property
(colour refinement; a crystal's symmetry makes them, no space group is looked for). One atom of each class stands for
all of them: its shells hold the images of whole classes, pooling counts it as often as it stands in the cell, and the
gradients are those of the whole crystal.

Legend: B crystals, N atoms and S shells of all of them (batch.py), R distinct atoms, T shells of those; m atoms of
one crystal, k classes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crystalformer.config import MAX_ATOMIC_NUMBER
from crystalformer.optional import problem

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NOTHING: IntArray = np.zeros(0, dtype=np.int64)

EQUIVALENT_GAP = 1e-4
"""Å. Atoms are alike where no distance differs by more. A class has the root mean square of its atoms' distances, and
their deviations add up to zero in every layer, so the error is of second order."""

NEAR = 0.37
"""Atoms are told apart by what lies within this part of a list first: a twentieth of it, and mostly enough. No two
distances of a lattice have this ratio, so that rounding does not put one of them in or out."""


class Rows(NamedTuple):
    """Shells atom by atom, nearest first, as neighbors.Shells has them.

    ptr (N+1,); neighbor (S,): atom of all the crystals' atoms; distance (S,): Å; images (S,): of the shell.
    """

    ptr: IntArray
    neighbor: IntArray
    distance: FloatArray
    images: IntArray


class DistinctAtoms(NamedTuple):
    """One atom of each class, in the order of the crystals' atoms.

    sizes (B,): distinct atoms of each crystal. atom (R,): of the crystals' atoms, the first of its class.
    multiplicity (R,): atoms of the class. rows: their shells, in which a neighbour is a class, as a number below R.
    """

    sizes: IntArray
    atom: IntArray
    multiplicity: IntArray
    rows: Rows


class _Seen(NamedTuple):
    """What each of some atoms sees: rows of (atom, class, distance, images), by atom, then class, then distance."""

    atom: IntArray
    neighbor: IntArray
    distance: FloatArray
    images: IntArray


def kinds(
    atomic_numbers: IntArray,
    site: IntArray = NOTHING,
    number: IntArray = NOTHING,
    occupancy: FloatArray | IntArray = NOTHING,
) -> IntArray:
    """(N,) a number for each element and each mixture of species among atoms (N,).

    site (X,): atom of each species of a disordered site; number (X,): its atomic number; occupancy (X,).
    """
    found = atomic_numbers.astype(np.int64)
    mixtures: dict[int, list[tuple[int, float]]] = {}
    for atom, z, part in zip(site.tolist(), number.tolist(), occupancy.tolist(), strict=True):
        mixtures.setdefault(atom, []).append((z, part))
    known: dict[tuple[tuple[int, float], ...], int] = {}
    for atom, parts in mixtures.items():
        whole = len(parts) == 1 and parts[0][1] == 1.0
        other = MAX_ATOMIC_NUMBER + 1 + len(known)
        found[atom] = parts[0][0] if whole else known.setdefault(tuple(sorted(parts)), other)
    return found


def distinct_atoms(sizes: IntArray, kinds: IntArray, rows: Rows) -> DistinctAtoms:
    """The distinct atoms of crystals of ``sizes`` (B,) atoms, which begin alike where their ``kinds`` (N,) are equal.

    ``rows``: the shells of all atoms, whose relation is symmetric. A crystal without two atoms alike keeps its own.
    """
    ptr, neighbor, images = (np.ascontiguousarray(n, dtype=np.int64) for n in (rows.ptr, rows.neighbor, rows.images))
    listed = Rows(ptr, neighbor, np.ascontiguousarray(rows.distance, dtype=np.float64), images)
    compiled = _compiled()
    if compiled is None:
        return by_numpy(sizes, kinds, listed)
    return compiled(sizes, kinds, listed, NEAR, EQUIVALENT_GAP)


@cache
def _compiled() -> Callable[..., DistinctAtoms] | None:
    """The same as compiled code, ten times faster; None where there is no numba to compile it."""
    if problem("numba") is not None:
        return None
    from crystalformer.ops.numba.classes import distinct_classes

    return distinct_classes


def by_numpy(sizes: IntArray, kinds: IntArray, rows: Rows) -> DistinctAtoms:
    """``distinct_atoms`` without numba."""
    bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    parts = [_of_crystal(kinds[a:b], _cut(rows, a, b)) for a, b in pairwise(bounds)]
    found_sizes = np.array([len(times) for _, times, _ in parts])
    found = np.concatenate([[0], np.cumsum(found_sizes)]).tolist()
    ends = np.concatenate([[0], np.cumsum([len(part.neighbor) for _, _, part in parts])]).tolist()
    ptr = [part.ptr[:-1] + end for end, (_, _, part) in zip(ends, parts, strict=False)]
    return DistinctAtoms(
        sizes=found_sizes,
        atom=np.concatenate([a + atom for a, (atom, _, _) in zip(bounds, parts, strict=False)]),
        multiplicity=np.concatenate([times for _, times, _ in parts]),
        rows=Rows(
            np.concatenate([*ptr, ends[-1:]]),
            np.concatenate([part.neighbor + first for first, (_, _, part) in zip(found, parts, strict=False)]),
            np.concatenate([part.distance for _, _, part in parts]),
            np.concatenate([part.images for _, _, part in parts]),
        ),
    )


def _cut(rows: Rows, first: int, last: int) -> Rows:
    """The shells of the atoms first..last-1 of one crystal, counted from 0."""
    here = slice(rows.ptr[first], rows.ptr[last])
    ptr = rows.ptr[first : last + 1] - rows.ptr[first]
    return Rows(ptr, rows.neighbor[here] - first, rows.distance[here], rows.images[here])


def _of_crystal(kinds: IntArray, rows: Rows) -> tuple[IntArray, IntArray, Rows]:
    """Atom (k,) and multiplicity (k,) of the classes of one crystal's atoms (m,), and their rows."""
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    near, _ = _stable(np.argsort(np.argsort(first))[inverse], _nearest(rows))
    classes, seen = _stable(near, rows)
    atom, times = np.unique(classes, return_index=True)[1], np.bincount(classes)
    if len(atom) < len(kinds):
        averaged = _averaged(classes, seen)
        symmetric = _symmetric(averaged, times)
        if _same(averaged, symmetric):
            return atom, times, _by_distance(symmetric)
    # None are alike; or distances apart by about EQUIVALENT_GAP were joined one way and not the other.
    return np.arange(len(kinds)), np.ones(len(kinds), dtype=np.int64), rows


def _nearest(rows: Rows) -> Rows:
    near = rows.distance <= NEAR * rows.distance.max(initial=0.0)
    before = np.concatenate([[0], np.cumsum(near)])
    return Rows(before[rows.ptr], rows.neighbor[near], rows.distance[near], rows.images[near])


def _stable(classes: IntArray, rows: Rows) -> tuple[IntArray, _Seen]:
    """The classes refined until all atoms of a class see the same, and what each atom sees."""
    while True:
        seen = _seen(classes, rows)
        finer = _refined(classes, seen)
        if finer.max() == classes.max():
            return classes, seen
        classes = finer


def _seen(classes: IntArray, rows: Rows) -> _Seen:
    """What each atom sees of each class: shells closer to one another than EQUIVALENT_GAP are one."""
    atom = np.repeat(np.arange(len(classes)), np.diff(rows.ptr))
    neighbor = classes[rows.neighbor]
    order = np.argsort(atom * (int(classes.max()) + 1) + neighbor, kind="stable")
    atom, neighbor, distance, count = atom[order], neighbor[order], rows.distance[order], rows.images[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(atom) != 0) | (np.diff(neighbor) != 0) | (np.diff(distance) > EQUIVALENT_GAP)
    start = np.flatnonzero(new)
    images = np.add.reduceat(count, start)
    squared = np.add.reduceat(count * np.square(distance, dtype=np.float64), start) / images
    return _Seen(atom[start], neighbor[start], np.sqrt(squared), images)


def _refined(classes: IntArray, seen: _Seen) -> IntArray:
    """Classes of atoms of one class that see the same, numbered in order of their first atoms."""
    ends = np.searchsorted(seen.atom, np.arange(len(classes) + 1))
    finer = np.empty_like(classes)
    known: dict[tuple[int, bytes, bytes], list[tuple[int, FloatArray]]] = {}
    found = 0
    for i, own in enumerate(classes.tolist()):
        part = slice(ends[i], ends[i + 1])
        distance = seen.distance[part]
        alike = known.setdefault((own, seen.neighbor[part].tobytes(), seen.images[part].tobytes()), [])
        for number, other in alike:
            if np.abs(distance - other).max(initial=0.0) <= EQUIVALENT_GAP:
                finer[i] = number
                break
        else:
            alike.append((found, distance))
            finer[i] = found
            found += 1
    return finer


def _averaged(classes: IntArray, seen: _Seen) -> _Seen:
    """What each class sees: the root mean square of its atoms' distances."""
    starts = np.searchsorted(seen.atom, np.arange(len(classes)))
    lengths = np.bincount(seen.atom, minlength=len(classes))
    first = np.unique(classes, return_index=True)[1]
    class_starts = np.cumsum(lengths[first]) - lengths[first]
    place = np.arange(len(seen.atom)) + np.repeat(class_starts[classes] - starts, lengths)
    own = np.repeat(np.arange(len(first)), lengths[first])
    squared = np.bincount(place, np.square(seen.distance)) / np.bincount(classes)[own]
    taken = np.repeat(starts[first] - class_starts, lengths[first]) + np.arange(len(own))
    return _Seen(own, seen.neighbor[taken], np.sqrt(squared), seen.images[taken])


def _symmetric(seen: _Seen, multiplicity: IntArray) -> _Seen:
    """The same with (j, i) in place of what j itself sees of i < j: the same distances to the last bit."""
    half = seen.atom <= seen.neighbor
    i, j, distance, count = seen.atom[half], seen.neighbor[half], seen.distance[half], seen.images[half]
    other = i != j
    back = count[other] * multiplicity[i[other]] // multiplicity[j[other]]
    return _Seen(
        np.concatenate([i, j[other]]),
        np.concatenate([j, i[other]]),
        np.concatenate([distance, distance[other]]),
        np.concatenate([count, back]),
    )


def _same(seen: _Seen, other: _Seen) -> bool:
    """Whether both say the same, ``other`` in any order, but for rounding of distances."""
    order = np.lexsort((other.distance, other.neighbor, other.atom))
    mine, theirs = ((s.atom, s.neighbor, s.images) for s in (seen, other))
    return all(np.array_equal(a, b[order]) for a, b in zip(mine, theirs, strict=True))


def _by_distance(seen: _Seen) -> Rows:
    order = np.lexsort((seen.neighbor, seen.distance, seen.atom))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(seen.atom))])
    return Rows(ptr, seen.neighbor[order], seen.distance[order], seen.images[order])
