"""What the kernels are handed, and how far each atom reaches.

Eight heads go side by side in one vector, so no sum ever runs across a vector and any number of features, of radial
bases and of heads (filled up with zeros) will do. All arrays are flat; legend of their shapes:

    G groups of eight heads · N atoms · S shells · P pairs in reach · D features a head
    K radial bases, filled up to a multiple of sixteen
    q, k, v, y, dy … (G, N, D, 8) · c, lse, dc (G, N, 8) · sums (G, N, K, 8) · weight (G, K, D, 8)
    pairs (G, P, 2, 8) · dweight: as weight, once for every ``part`` atoms

c: 1/(2 sigma²) of each atom's Gaussians in 1/Å².
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from crystalformer.ops.numba.pairs import FloatArray, Floats, Int32Array, IntArray, Plan
from crystalformer.ops.numba.simd import LANES, compiled


class Rows(NamedTuple):
    """The plan as far as the atoms reach: used (N,) and pairs (N,) of an atom: its first shells and pairs."""

    plan: Plan
    used: IntArray
    pairs: IntArray


class Features(NamedTuple):
    """Radial features: b (S, window), and the window's first, begin (S,); of the first made (N,) shells of an atom.

    Kept for all layers; or, in a large batch, of one atom at a time and without ``made``.
    """

    b: Floats
    begin: Int32Array
    made: IntArray


class Kept(NamedTuple):
    """What the forward keeps for the backward, in the shapes above."""

    q: Floats
    k: Floats
    v: Floats
    c: Floats
    weight: Floats
    y: Floats
    lse: Floats
    sums: Floats


class Gradients(NamedTuple):
    """What the backward reads and writes; pairs: softmax weights and, beside each, gradients of scores.

    Each pair is in the slot that pairs.ByKey has for it.
    """

    dy: Floats
    dq: Floats
    dk: Floats
    dv: Floats
    dc: Floats
    pairs: Floats
    dweight: Floats


class Outer(NamedTuple):
    """The operator's own operands, or in the backward their gradients, flat.

    q, k, v, y (N, H, D); c (N, H); weight (H or 1, D, K), heads ``weight_step`` apart, or nothing; bases: K.
    """

    heads: int
    bases: int
    weight_step: int
    q: Floats
    k: Floats
    v: Floats
    c: Floats
    y: Floats
    weight: Floats


class Team(NamedTuple):
    """Threads to use: ``parallel`` as fork.py takes it, the most of them, and the fewest shells for each."""

    parallel: int
    threads: int
    shells: int


class Sizes(NamedTuple):
    """G, N, D and K; window: a multiple of 16, 0 without radial bases; spacing and width of the Gaussians, Å.

    scale: of q k, 1/sqrt(D). part: atoms whose gradients of weight are summed together. lengths: of Kept's
    arrays.
    """

    groups: int
    atoms: int
    features: int
    bases: int
    window: int
    spacing: float
    width: float
    scale: np.float32
    part: int
    lengths: tuple[int, ...]


@compiled
def kept_in(memory: Floats, sizes: Sizes) -> Kept:
    """The arrays in one piece of memory."""
    l0, l1, l2, l3, l4, l5, l6, l7 = sizes.lengths
    rest = memory
    q, rest = rest[:l0], rest[l0:]
    k, rest = rest[:l1], rest[l1:]
    v, rest = rest[:l2], rest[l2:]
    c, rest = rest[:l3], rest[l3:]
    weight, rest = rest[:l4], rest[l4:]
    y, rest = rest[:l5], rest[l5:]
    lse, rest = rest[:l6], rest[l6:]
    return Kept(q, k, v, c, weight, y, lse, rest[:l7])


@compiled
def _up_to(values: FloatArray | Int32Array, first: int, last: int, limit: float) -> int:
    """How many of the sorted values first..last-1 are not above the limit."""
    low, high = first, last
    while low < high:
        middle = (low + high) // 2
        if values[middle] <= limit:
            low = middle + 1
        else:
            high = middle
    return low - first


@compiled
def reach(plan: Plan, c: Floats, heads: int, cutoff_sigmas: float) -> Rows:
    """The plan as far as the atoms reach: every one stops at so many widths of its own widest Gaussian."""
    atoms = len(plan.order)
    used, pairs = np.empty(atoms, np.int64), np.empty(atoms, np.int64)
    for i in range(atoms):
        widest = c[i * LANES]
        for head in range(1, heads):
            widest = min(widest, c[(head // LANES * atoms + i) * LANES + head % LANES])
        radius = cutoff_sigmas / math.sqrt(2.0 * widest)
        first, last = plan.start[i], plan.stop[i]
        # At least the atom itself, also where the radius is not a number: the result then is none either.
        used[i] = max(_up_to(plan.distance, first, last, radius), min(1, last - first))
        pairs[i] = _up_to(plan.nearest, plan.pair_ptr[i], plan.pair_ptr[i + 1], used[i] - 1)
    return Rows(plan, used, pairs)


@compiled
def most_used(rows: Rows, first: int, last: int) -> tuple[int, int]:
    """The most shells and the most pairs that an atom of first..last-1 uses."""
    shells, pairs = 1, 1
    for i in range(first, last):
        shells, pairs = max(shells, rows.used[i]), max(pairs, rows.pairs[i])
    return shells, pairs
