"""The W b term: Gaussians of the shells' distances, summed with the softmax weights, W applied after the sum.

Only ``window`` of the K Gaussians are not zero at a distance: the others are left out, below 1e-9 each. Legend of
shapes: operands.py.
"""

from __future__ import annotations

import numpy as np

from crystalformer.ops.numba.operands import Features, Rows, Sizes
from crystalformer.ops.numba.pairs import Floats, Int32Array
from crystalformer.ops.numba.simd import LANES, add, broadcast, compiled, exp, fma, load, mul, ramp, splat, store

F = np.float32
_ZERO, _HALF = F(0.0), F(0.5)


@compiled
def _radial(rows: Rows, sizes: Sizes, i: int, first: int, last: int, b: Floats, begin: Int32Array, at: int) -> None:
    """b: the Gaussians from ``begin`` on at the distances of atom i's shells first..last-1; from row at + first on.

    ``begin`` is a multiple of eight and grows with the distance.
    """
    window, spacing = sizes.window, sizes.spacing
    step = mul(ramp(), splat(F(-spacing / sizes.width)))
    for t in range(first, last):
        distance = rows.plan.distance[rows.plan.start[i] + t]
        base = int(distance / spacing - 0.5 * (window - LANES + 1)) // LANES * LANES
        base = min(max(base, 0), sizes.bases - window)
        begin[at + t] = base
        for x in range(0, window, LANES):
            offset = add(step, splat(F((distance - (base + x + 1) * spacing) / sizes.width)))
            store(b, (at + t) * window + x, exp(mul(mul(offset, offset), splat(-_HALF))))


@compiled
def features_of(rows: Rows, sizes: Sizes, radial: Features, i: int) -> tuple[int, int]:
    """Make the features of the shells that atom i uses: the row of the first, and the bases from which all are 0."""
    at, made, used = 0, 0, rows.used[i]
    if sizes.window == 0 or used == 0:
        return 0, 0
    if len(radial.made):
        at, made = rows.plan.start[i], radial.made[i]
    if made < used:
        _radial(rows, sizes, i, made, used, radial.b, radial.begin, at)
        if len(radial.made):
            radial.made[i] = used
    return at, radial.begin[at + used - 1] + sizes.window


@compiled
def sum_features(
    radial: Features, at: int, used: int, window: int, p_row: Floats, sums: Floats, to: int, bases: int
) -> None:
    """The first ``bases`` sums: each is over the shells in whose window it is, a run of them as they are sorted."""
    first, last = 0, 0
    for x in range(0, bases, LANES):
        while first < used and radial.begin[at + first] + window <= x:
            first += 1
        while last < used and radial.begin[at + last] <= x:
            last += 1
        s0, s1, s2, s3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        s4, s5, s6, s7 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        for t in range(first, last):
            p, f = load(p_row, t * LANES), (at + t) * window + x - radial.begin[at + t]
            s0, s1 = fma(broadcast(radial.b, f), p, s0), fma(broadcast(radial.b, f + 1), p, s1)
            s2, s3 = fma(broadcast(radial.b, f + 2), p, s2), fma(broadcast(radial.b, f + 3), p, s3)
            s4, s5 = fma(broadcast(radial.b, f + 4), p, s4), fma(broadcast(radial.b, f + 5), p, s5)
            s6, s7 = fma(broadcast(radial.b, f + 6), p, s6), fma(broadcast(radial.b, f + 7), p, s7)
        s = to + x * LANES
        store(sums, s, s0)
        store(sums, s + 8, s1)
        store(sums, s + 16, s2)
        store(sums, s + 24, s3)
        store(sums, s + 32, s4)
        store(sums, s + 40, s5)
        store(sums, s + 48, s6)
        store(sums, s + 56, s7)


@compiled
def project(sums: Floats, at: int, bases: int, weight: Floats, group: int, sizes: Sizes, y: Floats, row: int) -> None:
    """Add W times the first ``bases`` radial sums to the row of y."""
    features, start = sizes.features * LANES, group * sizes.bases * sizes.features * LANES
    whole = sizes.features // 4 * 4 * LANES
    for d in range(0, whole, 4 * LANES):
        y0, y1, y2, y3 = load(y, row + d), load(y, row + d + 8), load(y, row + d + 16), load(y, row + d + 24)
        for x in range(bases):
            s, w = load(sums, at + x * LANES), start + x * features + d
            y0, y1 = fma(s, load(weight, w), y0), fma(s, load(weight, w + 8), y1)
            y2, y3 = fma(s, load(weight, w + 16), y2), fma(s, load(weight, w + 24), y3)
        store(y, row + d, y0)
        store(y, row + d + 8, y1)
        store(y, row + d + 16, y2)
        store(y, row + d + 24, y3)
    for d in range(whole, features, LANES):
        for x in range(bases):
            w = load(weight, start + x * features + d)
            store(y, row + d, fma(load(sums, at + x * LANES), w, load(y, row + d)))


@compiled
def project_back(dy: Floats, row: int, weight: Floats, bases: int, group: int, sizes: Sizes, dsums: Floats) -> None:
    """dsums (K, 8): gradient of the first ``bases`` radial sums of the atom whose row of dy it is."""
    features, start = sizes.features * LANES, group * sizes.bases * sizes.features * LANES
    whole = sizes.features // 2 * 2 * LANES
    for x in range(bases):
        even, odd, w = splat(_ZERO), splat(_ZERO), start + x * features
        for d in range(0, whole, 2 * LANES):
            even = fma(load(dy, row + d), load(weight, w + d), even)
            odd = fma(load(dy, row + d + LANES), load(weight, w + d + LANES), odd)
        for d in range(whole, features, LANES):
            even = fma(load(dy, row + d), load(weight, w + d), even)
        store(dsums, x * LANES, add(even, odd))


@compiled
def times_features(radial: Features, at: int, used: int, window: int, dsums: Floats, dp_row: Floats) -> None:
    """dp_row (used, 8): the sum of each shell's features times the gradients of their sums; four shells at a time."""
    t = 0
    while t < used:
        begin, b = radial.begin[at + t] * LANES, (at + t) * window
        s0, s1, s2, s3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        if t + 4 <= used and radial.begin[at + t + 3] == radial.begin[at + t]:
            for x in range(window):
                d = load(dsums, begin + x * LANES)
                s0, s1 = fma(broadcast(radial.b, b + x), d, s0), fma(broadcast(radial.b, b + window + x), d, s1)
                third, fourth = b + 2 * window + x, b + 3 * window + x
                s2, s3 = fma(broadcast(radial.b, third), d, s2), fma(broadcast(radial.b, fourth), d, s3)
            store(dp_row, t * LANES, s0)
            store(dp_row, t * LANES + 8, s1)
            store(dp_row, t * LANES + 16, s2)
            store(dp_row, t * LANES + 24, s3)
            t += 4
        else:
            for x in range(0, window, 4):
                s0 = fma(broadcast(radial.b, b + x), load(dsums, begin + x * LANES), s0)
                s1 = fma(broadcast(radial.b, b + x + 1), load(dsums, begin + x * LANES + 8), s1)
                s2 = fma(broadcast(radial.b, b + x + 2), load(dsums, begin + x * LANES + 16), s2)
                s3 = fma(broadcast(radial.b, b + x + 3), load(dsums, begin + x * LANES + 24), s3)
            store(dp_row, t * LANES, add(add(s0, s1), add(s2, s3)))
            t += 1


@compiled
def backward_weight(sizes: Sizes, first: int, last: int, dy: Floats, sums: Floats, dweight: Floats) -> None:
    """Fill the parts of dweight that atoms first..last-1 make."""
    part = sizes.part
    features, radial = sizes.features * LANES, sizes.bases * LANES
    whole = sizes.features // 4 * 4 * LANES
    for begin in range(first, last, part):
        end = min(begin + part, last)
        for group in range(sizes.groups):
            atoms, out = group * sizes.atoms, ((begin // part) * sizes.groups + group) * sizes.bases * features
            for x in range(sizes.bases):
                for d in range(0, whole, 4 * LANES):
                    s0, s1, s2, s3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
                    for i in range(atoms + begin, atoms + end):
                        s, y = load(sums, i * radial + x * LANES), i * features + d
                        s0, s1 = fma(s, load(dy, y), s0), fma(s, load(dy, y + 8), s1)
                        s2, s3 = fma(s, load(dy, y + 16), s2), fma(s, load(dy, y + 24), s3)
                    w = out + x * features + d
                    store(dweight, w, s0)
                    store(dweight, w + 8, s1)
                    store(dweight, w + 16, s2)
                    store(dweight, w + 24, s3)
                for d in range(whole, features, LANES):
                    s0 = splat(_ZERO)
                    for i in range(atoms + begin, atoms + end):
                        s0 = fma(load(sums, i * radial + x * LANES), load(dy, i * features + d), s0)
                    store(dweight, out + x * features + d, s0)
