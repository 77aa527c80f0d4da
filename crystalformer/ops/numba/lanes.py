"""Between the operator's layouts and the kernels': eight heads side by side, (N, H, F) to (G, N, F, 8) and back.

All arrays are flat. Lanes without a head are not written: no sum runs across lanes, so what is in them stays there.
"""

from __future__ import annotations

from crystalformer.ops.numba.pairs import Floats, IntArray
from crystalformer.ops.numba.simd import LANES, compiled, transpose


@compiled
def to_lanes(values: Floats, order: IntArray, heads: int, features: int, first: int, last: int, out: Floats) -> None:
    """Fill places first..last-1 of out (G, N, F, 8) from values (N, H, F); order (N,): the atom at each place."""
    atoms = len(order)
    for place in range(first, last):
        at = order[place] * heads * features
        for head in range(0, heads, LANES):
            row = (head // LANES * atoms + place) * features * LANES
            whole = features // LANES * LANES if head + LANES <= heads else 0
            for f in range(0, whole, LANES):
                transpose(values, at + head * features + f, features, out, row + f * LANES, LANES)
            for lane in range(min(LANES, heads - head)):
                for f in range(whole, features):
                    out[row + f * LANES + lane] = values[at + (head + lane) * features + f]


@compiled
def from_lanes(
    values: Floats, order: IntArray, heads: int, features: int, first: int, last: int, out: Floats
) -> None:
    """Fill the rows of out (N, H, F) from places first..last-1 of values (G, N, F, 8)."""
    atoms = len(order)
    for place in range(first, last):
        at = order[place] * heads * features
        for head in range(0, heads, LANES):
            row = (head // LANES * atoms + place) * features * LANES
            whole = features // LANES * LANES if head + LANES <= heads else 0
            for f in range(0, whole, LANES):
                transpose(values, row + f * LANES, LANES, out, at + head * features + f, features)
            for lane in range(min(LANES, heads - head)):
                for f in range(whole, features):
                    out[at + (head + lane) * features + f] = values[row + f * LANES + lane]


@compiled
def weight_to_lanes(
    weight: Floats, step: int, heads: int, features: int, count: int, bases: int, out: Floats
) -> None:
    """Fill out (G, bases, D, 8) from weight (H, D, count), or (1, D, count) with ``step`` 0 instead of D count.

    Bases from ``count`` on are zeros.
    """
    for first in range(0, heads, LANES):
        whole = count // LANES * LANES if first + LANES <= heads else 0
        for d in range(features):
            row = (first // LANES * bases * features + d) * LANES
            for x in range(0, whole, LANES):
                to = row + x * features * LANES
                transpose(weight, first * step + d * count + x, step, out, to, features * LANES)
            for x in range(whole, bases):
                for head in range(first, min(first + LANES, heads)):
                    value = weight[head * step + d * count + x] if x < count else 0.0
                    out[row + x * features * LANES + head - first] = value


@compiled
def weight_from_lanes(values: Floats, heads: int, features: int, count: int, bases: int, out: Floats) -> None:
    """Fill out (H, D, count) from values (G, bases, D, 8)."""
    for first in range(0, heads, LANES):
        whole = count // LANES * LANES if first + LANES <= heads else 0
        for d in range(features):
            row = (first // LANES * bases * features + d) * LANES
            for x in range(0, whole, LANES):
                at, to = row + x * features * LANES, (first * features + d) * count + x
                transpose(values, at, features * LANES, out, to, features * count)
            for x in range(whole, count):
                for head in range(first, min(first + LANES, heads)):
                    out[(head * features + d) * count + x] = values[row + x * features * LANES + head - first]
