"""The shells of one crystal (crystalformer/neighbors.py) by trying every image that may be near, compiled.

Legend: n atoms, S shells.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from crystalformer.ops.numba.pairs import FloatArray, IntArray
from crystalformer.ops.numba.simd import compiled

Numbers = TypeVar("Numbers", FloatArray, IntArray)


@compiled
def dense_shells(
    positions: FloatArray, lattice: FloatArray, inverse: FloatArray, reach: IntArray, radius: float, gap: float
) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
    """ptr (n+1,), neighbor, distance and count (S,) of neighbors.Shells.

    positions (n, 3) and lattice (3, 3) in Å; inverse: of the lattice; reach (3,): translations along each of its
    vectors that can bring a nearest image within the radius; gap: Å, from which images of a pair are two shells.
    """
    n, near = len(positions), np.empty(np.prod(2 * reach + 1))
    first, number = np.zeros((n, n), np.int64), np.zeros((n, n), np.int64)
    distance, count, total = np.empty(256 * n), np.empty(256 * n, np.int64), 0
    for i in range(n):
        for j in range(i, n):
            found = _near_images(positions[j] - positions[i], lattice, inverse, reach, radius * radius, near)
            near[:found].sort()
            if total + found > len(distance):
                distance, count = _longer(distance, found), _longer(count, found)
            shells = _merge(near, found, gap, distance, count, total)
            first[i, j] = first[j, i] = total
            number[i, j] = number[j, i] = shells
            total += shells
    return _by_atom(first, number, distance, count)


@compiled
def _near_images(
    between: FloatArray, lattice: FloatArray, inverse: FloatArray, reach: IntArray, limit: float, near: FloatArray
) -> int:
    """Fill ``near`` with the squared distances up to the limit of images ``between`` (3,) and a translation apart."""
    nearest = np.zeros(3)
    for c in range(3):
        part = between[0] * inverse[0, c] + between[1] * inverse[1, c] + between[2] * inverse[2, c]
        part -= np.rint(part)
        for x in range(3):
            nearest[x] += part * lattice[c, x]
    found = 0
    for a in range(-reach[0], reach[0] + 1):
        for b in range(-reach[1], reach[1] + 1):
            x = nearest[0] + a * lattice[0, 0] + b * lattice[1, 0]
            y = nearest[1] + a * lattice[0, 1] + b * lattice[1, 1]
            z = nearest[2] + a * lattice[0, 2] + b * lattice[1, 2]
            for c in range(-reach[2], reach[2] + 1):
                dx, dy, dz = x + c * lattice[2, 0], y + c * lattice[2, 1], z + c * lattice[2, 2]
                squared = dx * dx + dy * dy + dz * dz
                near[found] = squared
                found += squared <= limit
    return found


@compiled
def _merge(near: FloatArray, found: int, gap: float, distance: FloatArray, count: IntArray, at: int) -> int:
    """Write the shells of sorted squared distances from ``at`` on: root mean squares and numbers of images."""
    shells, image = 0, 0
    while image < found:
        total, images, last = 0.0, 0, math.sqrt(near[image])
        while image < found and math.sqrt(near[image]) - last <= gap:
            last = math.sqrt(near[image])
            total, images, image = total + near[image], images + 1, image + 1
        distance[at + shells], count[at + shells] = math.sqrt(total / images), images
        shells += 1
    return shells


@compiled
def _by_atom(
    first: IntArray, number: IntArray, distance: FloatArray, count: IntArray
) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
    """Every atom's shells, nearest first and then by neighbour, from those of pairs (n, n)."""
    n, ptr = len(first), np.zeros(len(first) + 1, np.int64)
    for i in range(n):
        ptr[i + 1] = ptr[i] + number[i].sum()
    neighbor, sorted_count = np.empty(ptr[n], np.int64), np.empty(ptr[n], np.int64)
    sorted_distance, row = np.empty(ptr[n]), np.empty(ptr[n], np.int64)
    for i in range(n):
        at = ptr[i]
        for j in range(n):
            for shell in range(first[i, j], first[i, j] + number[i, j]):
                row[at], neighbor[at], sorted_distance[at] = shell, j, distance[shell]
                at += 1
        order = np.argsort(sorted_distance[ptr[i] : at], kind="mergesort")
        rows, neighbors = row[ptr[i] : at][order], neighbor[ptr[i] : at][order]
        for x in range(len(order)):
            to = ptr[i] + x
            neighbor[to], sorted_distance[to], sorted_count[to] = neighbors[x], distance[rows[x]], count[rows[x]]
    return ptr, neighbor, sorted_distance, sorted_count


@compiled
def _longer(values: Numbers, by: int) -> Numbers:
    """Twice as long and by so many longer, beginning with the same values."""
    out = np.empty(2 * len(values) + by, values.dtype)
    for i in range(len(values)):  # to assign a slice, numba would compile its error's message for 2 s
        out[i] = values[i]
    return out
