"""Atoms that see the same crystal are computed once.

In real space an atom's features depend on which atoms it sees at which distances, and on their features alone
(model.md, section 1). So atoms that begin alike and see, class by class, as many atoms at the same distances have the
same features after every layer: exactly, whatever the weights. The classes here are the coarsest with that property
(colour refinement; a crystal's symmetry makes them, no space group is looked for). One atom of each class stands for
all of them: its shells hold the images of whole classes, pooling counts it as often as it stands in the cell, and the
gradients are those of the whole crystal.

Legend: B crystals, N atoms and S shells of all of them (batch.py), R distinct atoms, T shells of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crystalformer.config import MAX_ATOMIC_NUMBER

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NOTHING: IntArray = np.zeros(0, dtype=np.int64)

EQUIVALENT_GAP = 1e-4
"""Å. Atoms are alike where no distance differs by more. A class has the root mean square of its atoms' distances, and
their deviations add up to zero in every layer, so the error is of second order."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Shells atom by atom, as neighbors.Shells has them.

    ptr (N+1,); neighbor (S,): atom of all the crystals' atoms; distance (S,): Å, ascending for each atom; count (S,).
    """

    ptr: IntArray
    neighbor: IntArray
    distance: FloatArray
    count: IntArray


@dataclass(frozen=True, slots=True)
class DistinctAtoms:
    """One atom of each class, in the order of the crystals' atoms.

    sizes (B,): distinct atoms of each crystal. atom (R,): of the crystals' atoms, the first of its class.
    multiplicity (R,): atoms of the class. rows: their shells, in which a neighbour is a class, as a number below R.
    """

    sizes: IntArray
    atom: IntArray
    multiplicity: IntArray
    rows: Rows


@dataclass(frozen=True, slots=True)
class _Seen:
    """What each of some atoms sees: rows of (atom, class, distance, count), by atom, then class, then distance."""

    atom: IntArray
    neighbor: IntArray
    distance: FloatArray
    count: IntArray


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

    ``rows``: the shells of all atoms, whose relation is symmetric.
    """
    crystal = np.repeat(np.arange(len(sizes)), sizes)
    classes, averaged = _classified(_numbered(crystal, kinds), rows)
    differing = _differing(averaged, _symmetric(averaged, np.bincount(classes)))
    if differing:
        # Their distances are apart by about EQUIVALENT_GAP, and were joined one way and not the other.
        odd = np.isin(crystal, crystal[np.isin(classes, differing)])
        alone = np.where(odd, kinds.max() + 1 + np.arange(len(kinds)), kinds)
        classes, averaged = _classified(_numbered(crystal, alone), rows)
    atom = np.unique(classes, return_index=True)[1]
    multiplicity = np.bincount(classes)
    return DistinctAtoms(
        sizes=np.bincount(crystal[atom], minlength=len(sizes)),
        atom=atom,
        multiplicity=multiplicity,
        rows=_by_distance(_symmetric(averaged, multiplicity)),
    )


def _classified(classes: IntArray, rows: Rows) -> tuple[IntArray, _Seen]:
    """The coarsest refinement of the classes whose atoms see the same, and what each of its classes sees."""
    near, _ = _stable(classes, _nearest(rows))
    stable, seen = _stable(near, rows)
    return stable, _averaged(stable, seen)


def _numbered(crystal: IntArray, kinds: IntArray) -> IntArray:
    """(N,) one number for each kind of each crystal, in order of their first atoms."""
    pairs = np.stack([crystal, kinds])
    _, first, inverse = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def _nearest(rows: Rows) -> Rows:
    """The shells within a third of the farthest: few, and mostly enough to tell atoms apart."""
    near = rows.distance <= rows.distance.max() / 3
    before = np.concatenate([[0], np.cumsum(near)])
    return Rows(before[rows.ptr], rows.neighbor[near], rows.distance[near], rows.count[near])


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
    atom, neighbor, distance, count = atom[order], neighbor[order], rows.distance[order], rows.count[order]
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
        alike = known.setdefault((own, seen.neighbor[part].tobytes(), seen.count[part].tobytes()), [])
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
    return _Seen(own, seen.neighbor[taken], np.sqrt(squared), seen.count[taken])


def _symmetric(seen: _Seen, multiplicity: IntArray) -> _Seen:
    """The same with (j, i) in place of what j itself sees of i < j: the same distances to the last bit."""
    half = seen.atom <= seen.neighbor
    i, j, distance, count = seen.atom[half], seen.neighbor[half], seen.distance[half], seen.count[half]
    other = i != j
    back = count[other] * multiplicity[i[other]] // multiplicity[j[other]]
    return _Seen(
        np.concatenate([i, j[other]]),
        np.concatenate([j, i[other]]),
        np.concatenate([distance, distance[other]]),
        np.concatenate([count, back]),
    )


def _differing(seen: _Seen, other: _Seen) -> list[int]:
    """Classes of which ``seen`` and ``other``, in any order, do not say the same but for rounding."""
    order = np.lexsort((other.distance, other.neighbor, other.atom))
    columns = [(seen.neighbor, other.neighbor[order]), (seen.count, other.count[order])]
    if np.array_equal(seen.atom, other.atom[order]) and all(np.array_equal(a, b) for a, b in columns):
        return []
    classes = np.arange(int(seen.atom.max()) + 2)
    a, b = np.searchsorted(seen.atom, classes), np.searchsorted(other.atom[order], classes)
    return [
        c
        for c in classes[:-1].tolist()
        if not all(np.array_equal(x[a[c] : a[c + 1]], y[b[c] : b[c + 1]]) for x, y in columns)
    ]


def _by_distance(seen: _Seen) -> Rows:
    order = np.lexsort((seen.neighbor, seen.distance, seen.atom))
    ptr = np.concatenate([[0], np.cumsum(np.bincount(seen.atom))])
    return Rows(ptr, seen.neighbor[order], seen.distance[order], seen.count[order])
