"""Distinct atoms (crystalformer/equivalence.py, which says what they are), compiled, crystal by crystal.

Legend: equivalence.py's. Atoms of a crystal, and its classes, are counted from 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from crystalformer.equivalence import DistinctAtoms, Rows
from crystalformer.ops.numba.pairs import FloatArray, IntArray
from crystalformer.ops.numba.simd import compiled


class Seen(NamedTuple):
    """What each atom of a crystal sees: rows ptr[i]:ptr[i + 1] by class, then distance.

    squared: mean of the squared distances, Å². For k classes in place of atoms likewise.
    """

    ptr: IntArray
    neighbor: IntArray
    squared: FloatArray
    images: IntArray


@compiled
def distinct_classes(sizes: IntArray, kinds: IntArray, rows: Rows, near: float, gap: float) -> DistinctAtoms:
    """``equivalence.distinct_atoms``; near and gap (Å): its NEAR and EQUIVALENT_GAP."""
    atoms, shells = len(kinds), len(rows.neighbor)
    found_sizes, atom, multiplicity = np.empty_like(sizes), np.empty(atoms, np.int64), np.empty(atoms, np.int64)
    out = Rows(
        np.zeros(atoms + 1, np.int64), np.empty(shells, np.int64), np.empty(shells), np.empty(shells, np.int64)
    )
    first, found = 0, 0
    for crystal in range(len(sizes)):
        size = sizes[crystal]
        here = slice(rows.ptr[first], rows.ptr[first + size])
        own = Rows(
            rows.ptr[first : first + size + 1] - rows.ptr[first],
            rows.neighbor[here] - first,
            rows.distance[here],
            rows.images[here],
        )
        classes, times, merged = _of_crystal(kinds[first : first + size], own, near, gap)
        for i in range(size - 1, -1, -1):
            atom[found + classes[i]] = first + i
        for i in range(len(times)):
            multiplicity[found + i] = times[i]
        _put(merged, found, out)
        found_sizes[crystal] = len(times)
        found, first = found + len(times), first + size
    end = out.ptr[found]
    kept = Rows(
        out.ptr[: found + 1].copy(), out.neighbor[:end].copy(), out.distance[:end].copy(), out.images[:end].copy()
    )
    return DistinctAtoms(found_sizes, atom[:found].copy(), multiplicity[:found].copy(), kept)


@compiled
def _put(rows: Rows, found: int, out: Rows) -> None:
    """Append a crystal's rows to those of the ``found`` atoms before it."""
    at = out.ptr[found]
    for i in range(len(rows.ptr)):
        out.ptr[found + i] = at + rows.ptr[i]
    here = slice(at, at + len(rows.neighbor))
    out.neighbor[here] = rows.neighbor + found
    out.distance[here] = rows.distance
    out.images[here] = rows.images


@compiled
def _of_crystal(kinds: IntArray, rows: Rows, near: float, gap: float) -> tuple[IntArray, IntArray, Rows]:
    """Class of each atom (m,), atoms of each class (k,), and the rows of the classes."""
    size, farthest = len(kinds), rows.distance.max()
    classes = _numbered(kinds)
    k, _ = _stable(classes, rows, near * farthest, gap)
    if k < size:
        k, seen = _stable(classes, rows, farthest, gap)
        if k < size:
            times = np.zeros(k, np.int64)
            for i in range(size):
                times[classes[i]] += 1
            averaged = _averaged(classes, times, seen)
            if _made_symmetric(times, averaged):
                return classes, times, _by_distance(averaged)
    return np.arange(size), np.ones(size, np.int64), rows


@compiled
def _numbered(kinds: IntArray) -> IntArray:
    """(m,) one number for each kind, in order of their first atoms."""
    classes, known = np.empty(len(kinds), np.int64), np.empty(len(kinds), np.int64)
    found = 0
    for i in range(len(kinds)):
        number = 0
        while number < found and known[number] != kinds[i]:
            number += 1
        if number == found:
            known[found] = kinds[i]
            found += 1
        classes[i] = number
    return classes


@compiled
def _stable(classes: IntArray, rows: Rows, reach: float, gap: float) -> tuple[int, Seen]:
    """Refine the classes, in place, until all atoms of one see the same within ``reach``.

    Gives their number, and what each atom sees.
    """
    found = classes.max() + 1
    while True:
        seen = _seen(classes, found, rows, reach, gap)
        finer = _refined(classes, found, seen, gap)
        if finer == found:
            return found, seen
        found = finer


@compiled
def _seen(classes: IntArray, k: int, rows: Rows, reach: float, gap: float) -> Seen:
    ptr, neighbor, distance, count = rows
    size = len(classes)
    out_ptr, out_neighbor = np.zeros(size + 1, np.int64), np.empty(len(neighbor), np.int64)
    squared, images = np.empty(len(neighbor)), np.empty(len(neighbor), np.int64)
    begin, order = np.empty(k + 1, np.int64), np.empty(len(neighbor), np.int64)
    at = 0
    for i in range(size):
        start, end = ptr[i], ptr[i]
        begin[:] = 0
        while end < ptr[i + 1] and distance[end] <= reach:
            begin[classes[neighbor[end]] + 1] += 1
            end += 1
        for c in range(k):
            begin[c + 1] += begin[c]
        for row in range(start, end):
            c = classes[neighbor[row]]
            order[begin[c]] = row
            begin[c] += 1
        last_class, last_distance = -1, 0.0
        for x in range(end - start):
            row = order[x]
            c, d, times = classes[neighbor[row]], distance[row], count[row]
            if c != last_class or d - last_distance > gap:
                out_neighbor[at], squared[at], images[at] = c, 0.0, 0
                at += 1
            squared[at - 1] += times * d * d
            images[at - 1] += times
            last_class, last_distance = c, d
        out_ptr[i + 1] = at
    for x in range(at):
        squared[x] /= images[x]
    return Seen(out_ptr, out_neighbor[:at], squared[:at], images[:at])


@compiled
def _refined(classes: IntArray, k: int, seen: Seen, gap: float) -> int:
    """Divide the classes, in place, into those whose atoms see the same; how many there are."""
    size = len(classes)
    first, following, of_class = np.empty(size, np.int64), np.full(size, -1, np.int64), np.full(k, -1, np.int64)
    found = 0
    for i in range(size):
        number, last = of_class[classes[i]], -1
        while number >= 0 and not _alike(seen, i, first[number], gap):
            number, last = following[number], number
        if number < 0:
            number = found
            first[found] = i
            if last >= 0:
                following[last] = found
            else:
                of_class[classes[i]] = found
            found += 1
        classes[i] = number
    return found


@compiled
def _alike(seen: Seen, i: int, j: int, gap: float) -> bool:
    """Whether two atoms see as many of the same classes at the same distances."""
    rows, other = seen.ptr[i], seen.ptr[j]
    length = seen.ptr[i + 1] - rows
    if seen.ptr[j + 1] - other != length:
        return False
    for x in range(length):
        if seen.neighbor[rows + x] != seen.neighbor[other + x] or seen.images[rows + x] != seen.images[other + x]:
            return False
        if abs(math.sqrt(seen.squared[rows + x]) - math.sqrt(seen.squared[other + x])) > gap:
            return False
    return True


@compiled
def _averaged(classes: IntArray, times: IntArray, seen: Seen) -> Seen:
    """What each class sees: the mean of the squared distances of its atoms."""
    k = len(times)
    first, ptr = np.full(k, -1, np.int64), np.zeros(k + 1, np.int64)
    for i in range(len(classes)):
        if first[classes[i]] < 0:
            first[classes[i]] = i
    for c in range(k):
        ptr[c + 1] = ptr[c] + seen.ptr[first[c] + 1] - seen.ptr[first[c]]
    neighbor, count, squared = np.empty(ptr[k], np.int64), np.empty(ptr[k], np.int64), np.zeros(ptr[k])
    for i in range(len(classes)):
        c = classes[i]
        for x in range(ptr[c + 1] - ptr[c]):
            row, to = seen.ptr[i] + x, ptr[c] + x
            neighbor[to], count[to] = seen.neighbor[row], seen.images[row]
            squared[to] += seen.squared[row] / times[c]
    return Seen(ptr, neighbor, squared, count)


@compiled
def _made_symmetric(times: IntArray, seen: Seen) -> bool:
    """Give (j, i) the distances of (i, j) with i < j; False where they are not as many images both ways."""
    k = len(times)
    cursor = seen.ptr[:k].copy()
    for i in range(k):
        for row in range(seen.ptr[i], seen.ptr[i + 1]):
            j = seen.neighbor[row]
            if j > i:
                back = cursor[j]
                if back == seen.ptr[j + 1] or seen.neighbor[back] != i:
                    return False
                if seen.images[back] * times[j] != seen.images[row] * times[i]:
                    return False
                seen.squared[back] = seen.squared[row]
                cursor[j] = back + 1
    for j in range(k):
        if cursor[j] < seen.ptr[j + 1] and seen.neighbor[cursor[j]] < j:
            return False
    return True


@compiled
def _by_distance(seen: Seen) -> Rows:
    """Rows of each class, nearest first, then by class."""
    neighbor, distance = np.empty_like(seen.neighbor), np.empty_like(seen.squared)
    count = np.empty_like(seen.images)
    for i in range(len(seen.ptr) - 1):
        first = seen.ptr[i]
        order = np.argsort(seen.squared[first : seen.ptr[i + 1]], kind="mergesort")
        for place in range(len(order)):  # as slices, numba would compile a message for 2 s
            to, row = first + place, first + order[place]
            neighbor[to], distance[to], count[to] = seen.neighbor[row], np.sqrt(seen.squared[row]), seen.images[row]
    return Rows(seen.ptr, neighbor, distance, count)
