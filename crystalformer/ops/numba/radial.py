"""The W b term: Gaussians of the shells' distances, summed with the softmax weights, W applied after the sum.

Only ``window`` of the K Gaussians are not zero at a distance: the others are left out, below 1e-9 each. Sums over
shells are of two bases at once, heads and bases in turn in one wide vector. Legend of shapes: operands.py.
"""

from __future__ import annotations

import numpy as np

from crystalformer.ops.numba.operands import Features, Rows, Sizes
from crystalformer.ops.numba.pairs import Floats, IntArray
from crystalformer.ops.numba.simd import (
    LANES,
    WIDE,
    add,
    compiled,
    evens,
    exp,
    fma,
    halves,
    inlined,
    interleaved,
    load,
    load_pairs,
    load_twice,
    load_wide,
    mul,
    odds,
    ramp,
    splat,
    splat_wide,
    store,
)

F = np.float32
_ZERO, _HALF = F(0.0), F(0.5)


@compiled
def _first_base(distance: float, per: float, sizes: Sizes) -> int:
    """Where the window of a distance (Å) begins: even, and growing with it. per: 1/spacing in 1/Å."""
    base = int(distance * per - 0.5 * (sizes.window - 1)) & -2
    return min(max(base, 0), sizes.bases - sizes.window)


@compiled
def bases_of(rows: Rows, sizes: Sizes, i: int) -> int:
    """The base from which the features of all shells that atom i uses are 0."""
    if sizes.window == 0 or rows.used[i] == 0:
        return 0
    farthest = rows.plan.distance[rows.plan.start[i] + rows.used[i] - 1]
    return _first_base(farthest, 1.0 / sizes.spacing, sizes) + sizes.window


@compiled
def _radial(rows: Rows, sizes: Sizes, i: int, first: int, last: int, radial: Features, at: int) -> None:
    """Make the features of atom i's shells first..last-1, from row at + first on."""
    window, spacing = sizes.window, sizes.spacing / sizes.width
    per, of_width = 1.0 / sizes.spacing, 1.0 / sizes.width
    step = mul(ramp(), splat_wide(F(-spacing)))
    for t in range(first, last):
        distance = rows.plan.distance[rows.plan.start[i] + t]
        base = _first_base(distance, per, sizes)
        radial.begin[at + t] = base
        for x in range(0, window, WIDE):
            offset = add(step, splat_wide(F(distance * of_width - (base + x + 1) * spacing)))
            store(radial.b, (at + t) * window + x, exp(mul(mul(offset, offset), splat_wide(-_HALF))))


@compiled
def features_of(rows: Rows, sizes: Sizes, radial: Features, i: int) -> int:
    """Make the features of the shells that atom i uses, and say where the row of the first is."""
    at, made, used = 0, 0, rows.used[i]
    if sizes.window == 0 or used == 0:
        return 0
    if len(radial.made):
        at, made = rows.plan.start[i], radial.made[i]
    if made < used:
        _radial(rows, sizes, i, made, used, radial, at)
        if len(radial.made):
            radial.made[i] = used
    return at


@inlined
def _run_end(radial: Features, at: int, first: int, used: int) -> int:
    """The shell after the last of those that follow shell ``first`` with its window."""
    last = first + 1
    while last < used and radial.begin[at + last] == radial.begin[at + first]:
        last += 1
    return last


@compiled
def sum_features(radial: Features, at: int, used: int, window: int, p_row: Floats, sums: Floats, bases: int) -> None:
    """sums (K, 8), two bases in turn: the features of the first ``used`` shells, each times its p.

    p_row (used, 16): every p twice in succession. Shells are sorted, so those whose window is the same follow one
    another.
    """
    for x in range(0, bases * LANES, WIDE):
        store(sums, x, splat_wide(_ZERO))
    first = 0
    while first < used:
        begin, last = radial.begin[at + first], _run_end(radial, at, first, used)
        for x in range(0, window, WIDE):
            s = (begin + x) * LANES
            s0, s1 = load_wide(sums, s), load_wide(sums, s + 16)
            s2, s3 = load_wide(sums, s + 32), load_wide(sums, s + 48)
            s4, s5 = load_wide(sums, s + 64), load_wide(sums, s + 80)
            s6, s7 = load_wide(sums, s + 96), load_wide(sums, s + 112)
            for t in range(first, last):
                p, f = load_wide(p_row, t * WIDE), (at + t) * window + x
                s0, s1 = fma(load_pairs(radial.b, f), p, s0), fma(load_pairs(radial.b, f + 2), p, s1)
                s2, s3 = fma(load_pairs(radial.b, f + 4), p, s2), fma(load_pairs(radial.b, f + 6), p, s3)
                s4, s5 = fma(load_pairs(radial.b, f + 8), p, s4), fma(load_pairs(radial.b, f + 10), p, s5)
                s6, s7 = fma(load_pairs(radial.b, f + 12), p, s6), fma(load_pairs(radial.b, f + 14), p, s7)
            store(sums, s, s0)
            store(sums, s + 16, s1)
            store(sums, s + 32, s2)
            store(sums, s + 48, s3)
            store(sums, s + 64, s4)
            store(sums, s + 80, s5)
            store(sums, s + 96, s6)
            store(sums, s + 112, s7)
        first = last


@compiled
def project(
    sums: Floats, bases: IntArray, weight: Floats, group: int, sizes: Sizes, y: Floats, first: int, last: int
) -> None:
    """Add to the rows of y of atoms first..last-1 W times their radial sums; bases: of each atom from ``first`` on.

    Four atoms at a time, as W does not fit a core's first cache beside the rest.
    """
    features, start = sizes.features * LANES, group * sizes.bases * sizes.features * LANES
    whole, radial, most = sizes.features // 4 * 4 * LANES, sizes.bases * LANES, group * sizes.atoms + last - 1
    for i in range(group * sizes.atoms + first, most + 1, 4):
        i1, i2, i3 = min(i + 1, most), min(i + 2, most), min(i + 3, most)
        reached = bases[i - most + last - 1 - first : i - most + last + 3 - first].max()
        for d in range(0, whole, 2 * WIDE):
            r0, r1, r2, r3 = i * features + d, i1 * features + d, i2 * features + d, i3 * features + d
            y0, z0, y1, z1 = load_wide(y, r0), load_wide(y, r0 + WIDE), load_wide(y, r1), load_wide(y, r1 + WIDE)
            y2, z2, y3, z3 = load_wide(y, r2), load_wide(y, r2 + WIDE), load_wide(y, r3), load_wide(y, r3 + WIDE)
            for x in range(reached):
                w, s = start + x * features + d, x * LANES
                w0, w1 = load_wide(weight, w), load_wide(weight, w + WIDE)
                s0, s1 = load_twice(sums, i * radial + s), load_twice(sums, i1 * radial + s)
                s2, s3 = load_twice(sums, i2 * radial + s), load_twice(sums, i3 * radial + s)
                y0, z0, y1, z1 = fma(s0, w0, y0), fma(s0, w1, z0), fma(s1, w0, y1), fma(s1, w1, z1)
                y2, z2, y3, z3 = fma(s2, w0, y2), fma(s2, w1, z2), fma(s3, w0, y3), fma(s3, w1, z3)
            store(y, r0, y0)
            store(y, r0 + WIDE, z0)
            store(y, r1, y1)
            store(y, r1 + WIDE, z1)
            store(y, r2, y2)
            store(y, r2 + WIDE, z2)
            store(y, r3, y3)
            store(y, r3 + WIDE, z3)
        for atom in range(i, i3 + 1):
            for d in range(whole, features, LANES):
                total = load(y, atom * features + d)
                for x in range(reached):
                    s, w = load(sums, atom * radial + x * LANES), load(weight, start + x * features + d)
                    total = fma(s, w, total)
                store(y, atom * features + d, total)


@compiled
def project_back(
    dy: Floats, bases: IntArray, weight: Floats, group: int, sizes: Sizes, dsums: Floats, first: int, last: int
) -> None:
    """Fill dsums (atoms, K, 8), two bases in turn: gradients of atoms first..last-1's radial sums, as ``project``."""
    features, start = sizes.features * LANES, group * sizes.bases * sizes.features * LANES
    whole, radial, most = sizes.features // 2 * 2 * LANES, sizes.bases * LANES, group * sizes.atoms + last - 1
    for i in range(group * sizes.atoms + first, most + 1, 4):
        i1, i2, i3 = min(i + 1, most), min(i + 2, most), min(i + 3, most)
        at = i - most + last - 1 - first
        reached = bases[at : at + 4].max()
        for x in range(0, reached, 2):
            a0, a1, a2, a3 = splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO)
            b0, b1, b2, b3 = splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO)
            for d in range(0, whole, WIDE):
                w = start + x * features + d
                even, odd = load_wide(weight, w), load_wide(weight, w + features)
                d0, d1 = load_wide(dy, i * features + d), load_wide(dy, i1 * features + d)
                d2, d3 = load_wide(dy, i2 * features + d), load_wide(dy, i3 * features + d)
                a0, a1, a2, a3 = fma(d0, even, a0), fma(d1, even, a1), fma(d2, even, a2), fma(d3, even, a3)
                b0, b1, b2, b3 = fma(d0, odd, b0), fma(d1, odd, b1), fma(d2, odd, b2), fma(d3, odd, b3)
            to = at * radial + x * LANES
            store(dsums, to, interleaved(halves(a0), halves(b0)))
            store(dsums, to + (i1 - i) * radial, interleaved(halves(a1), halves(b1)))
            store(dsums, to + (i2 - i) * radial, interleaved(halves(a2), halves(b2)))
            store(dsums, to + (i3 - i) * radial, interleaved(halves(a3), halves(b3)))
            for atom in range(i, i3 + 1) if whole < features else range(0):
                w, d = start + x * features + whole, atom * features + whole
                own = to + (atom - i) * radial
                part = interleaved(mul(load(dy, d), load(weight, w)), mul(load(dy, d), load(weight, w + features)))
                store(dsums, own, add(load_wide(dsums, own), part))


@inlined
def product(a: Floats, at: int, b: Floats, row: int, features: int) -> Floats:
    """For eight heads the sum over all features of a row of ``a`` times one of ``b``; features: 8 D."""
    whole = features // WIDE * WIDE
    total = splat_wide(_ZERO)
    for d in range(0, whole, WIDE):
        total = fma(load_wide(a, at + d), load_wide(b, row + d), total)
    result: Floats = halves(total)
    for d in range(whole, features, LANES):
        result = fma(load(a, at + d), load(b, row + d), result)
    return result


@compiled
def times_features(radial: Features, at: int, used: int, window: int, dsums: Floats, of: int, dp_row: Floats) -> None:
    """dp_row (used, 8): the sum of each shell's features times the gradients of their sums.

    Those are in dsums from ``of`` on, two bases in turn.
    """
    first = 0
    while first < used:
        begin, last = radial.begin[at + first], _run_end(radial, at, first, used)
        for x in range(0, window, WIDE):
            d = of + (begin + x) * LANES
            d0, d1 = load_wide(dsums, d), load_wide(dsums, d + 16)
            d2, d3 = load_wide(dsums, d + 32), load_wide(dsums, d + 48)
            d4, d5 = load_wide(dsums, d + 64), load_wide(dsums, d + 80)
            d6, d7 = load_wide(dsums, d + 96), load_wide(dsums, d + 112)
            for t in range(first, last):
                f = (at + t) * window + x
                even, odd = mul(load_pairs(radial.b, f), d0), mul(load_pairs(radial.b, f + 2), d1)
                even, odd = fma(load_pairs(radial.b, f + 4), d2, even), fma(load_pairs(radial.b, f + 6), d3, odd)
                even, odd = fma(load_pairs(radial.b, f + 8), d4, even), fma(load_pairs(radial.b, f + 10), d5, odd)
                even, odd = fma(load_pairs(radial.b, f + 12), d6, even), fma(load_pairs(radial.b, f + 14), d7, odd)
                both = add(even, odd)
                total = add(evens(both), odds(both))
                store(dp_row, t * LANES, total if x == 0 else add(total, load(dp_row, t * LANES)))
        first = last


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
            for x in range(0, sizes.bases, 2):
                for d in range(0, whole, 2 * WIDE):
                    s0, s1, t0, t1 = splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO)
                    for i in range(atoms + begin, atoms + end):
                        s, y = i * radial + x * LANES, i * features + d
                        even, odd = load_twice(sums, s), load_twice(sums, s + LANES)
                        y0, y1 = load_wide(dy, y), load_wide(dy, y + WIDE)
                        s0, s1 = fma(even, y0, s0), fma(even, y1, s1)
                        t0, t1 = fma(odd, y0, t0), fma(odd, y1, t1)
                    w = out + x * features + d
                    store(dweight, w, s0)
                    store(dweight, w + WIDE, s1)
                    store(dweight, w + features, t0)
                    store(dweight, w + features + WIDE, t1)
                for d in range(whole, features, LANES):
                    for base in range(x, x + 2):
                        total = splat(_ZERO)
                        for i in range(atoms + begin, atoms + end):
                            total = fma(load(sums, i * radial + base * LANES), load(dy, i * features + d), total)
                        store(dweight, out + base * features + d, total)
