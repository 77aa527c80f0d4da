"""The compiled loops of real-space attention: forward, backward by query, backward by key.

Eight heads go side by side in one vector, so no sum ever runs across a vector and any number of features, of radial bases
and of heads (filled up with zeros) will do. Arrays are flat; legend of their shapes:

    G groups of eight heads · N atoms · D features a head · K radial bases, filled up to a multiple of eight · P used pairs
    q, k, v, y, dy … (G, N, D, 8); c, lse, dc (G, N, 8); sums (G, N, K, 8); weight (G, K, D, 8); p, ds of pairs (G, P, 8)

An atom's shells are sorted by distance and it stops at its own ``radius``. Only ``window`` of the K Gaussians b(d)
are not zero at a distance: the others are left out, below 1e-10 each. Every output has one order of summation,
however the atoms are dealt to threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from crystalformer.ops.numba.pairs import FloatArray, Floats, Int32Array, IntArray
from crystalformer.ops.numba.simd import (
    LANES,
    add,
    broadcast,
    compiled,
    div,
    exp,
    fma,
    larger,
    load,
    mul,
    ramp,
    splat,
    store,
    sub,
)

F = np.float32
_ZERO, _HALF, _ONE = F(0.0), F(0.5), F(1.0)
_LEAST = F(-1e30)


class Rows(NamedTuple):
    """PairPlan's arrays of those names; used (N,): shells that an atom uses; offset (N+1,): used pairs before it."""

    ptr: IntArray
    distance: FloatArray
    farness: Floats
    count: Floats
    pair: Int32Array
    pair_ptr: IntArray
    key: Int32Array
    nearest: Int32Array
    used: IntArray
    offset: IntArray


class Features(NamedTuple):
    """Radial features kept for all layers: b (S, window), begin (S,) as ``_radial`` gives; made (N,): of how many shells.

    Where they are not kept, for an atom at a time and without ``made``.
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


class Sizes(NamedTuple):
    """G, N, D and K; window: a multiple of 8, 0 without radial bases; spacing and width of the Gaussians, Å.

    scale: of q k, 1/sqrt(D).
    """

    groups: int
    atoms: int
    features: int
    bases: int
    window: int
    spacing: float
    width: float
    scale: np.float32


@compiled
def _up_to(values: FloatArray, first: int, last: int, limit: float) -> int:
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
def reach(
    ptr: IntArray, distance: FloatArray, pair_ptr: IntArray, nearest: Int32Array, c: Floats, heads: int,
    cutoff_sigmas: float, used: IntArray, offset: IntArray,
) -> None:  # fmt: skip
    """Fill used and offset of Rows: every atom stops at so many widths of its own widest Gaussian."""
    offset[0] = 0
    atoms = len(used)
    for i in range(atoms):
        widest = c[i * LANES]
        for head in range(1, heads):
            widest = min(widest, c[(head // LANES * atoms + i) * LANES + head % LANES])
        radius = cutoff_sigmas / math.sqrt(2.0 * widest)
        used[i] = _up_to(distance, ptr[i], ptr[i + 1], radius)
        offset[i + 1] = offset[i] + _up_to(nearest, pair_ptr[i], pair_ptr[i + 1], used[i] - 1)


@compiled
def _most(rows: Rows, first: int, last: int) -> tuple[int, int]:
    """The most shells and the most pairs that an atom of first..last-1 uses."""
    shells, pairs = 1, 1
    for i in range(first, last):
        shells, pairs = max(shells, rows.used[i]), max(pairs, rows.offset[i + 1] - rows.offset[i])
    return shells, pairs


@compiled
def _radial(rows: Rows, sizes: Sizes, i: int, first: int, last: int, b: Floats, begin: Int32Array, at: int) -> None:
    """b: Gaussians ``begin`` and following at the distances of atom i's shells first..last-1, from row ``at`` + first.

    ``begin`` is a multiple of eight and grows with the distance.
    """
    window, spacing = sizes.window, sizes.spacing
    step = mul(ramp(), splat(F(-spacing / sizes.width)))
    for t in range(first, last):
        distance = rows.distance[rows.ptr[i] + t]
        base = int(distance / spacing - 0.5 * (window - LANES + 1)) // LANES * LANES
        base = min(max(base, 0), sizes.bases - window)
        begin[at + t] = base
        for x in range(0, window, LANES):
            offset = add(step, splat(F((distance - (base + x + 1) * spacing) / sizes.width)))
            store(b, (at + t) * window + x, exp(mul(mul(offset, offset), splat(-_HALF))))


@compiled
def _features(rows: Rows, sizes: Sizes, radial: Features, i: int) -> tuple[int, int]:
    """See to the features of the shells that atom i uses: the row of the first, and the bases above which all are 0."""
    if sizes.window == 0:
        return 0, 0
    at, made, used = 0, 0, rows.used[i]
    if len(radial.made):
        at, made = rows.ptr[i], radial.made[i]
    if made < used:
        _radial(rows, sizes, i, made, used, radial.b, radial.begin, at)
        if len(radial.made):
            radial.made[i] = used
    return at, radial.begin[at + used - 1] + sizes.window


@compiled
def _scores(a: Floats, at: int, b: Floats, keys: Int32Array, pairs: int, base: int, features: int, scale: np.float32, out: Floats) -> None:
    """out (pairs, 8): scale times the products of the row of ``a`` at ``at`` with rows base + keys of ``b``."""
    for pair in range(pairs):
        row = (base + keys[pair]) * features * LANES
        even, odd = splat(_ZERO), splat(_ZERO)
        for d in range(0, (features - 1) * LANES, 2 * LANES):
            even = fma(load(a, at + d), load(b, row + d), even)
            odd = fma(load(a, at + d + LANES), load(b, row + d + LANES), odd)
        if features % 2:
            d = (features - 1) * LANES
            even = fma(load(a, at + d), load(b, row + d), even)
        store(out, pair * LANES, mul(add(even, odd), splat(scale)))


@compiled
def _clear(out: Floats, at: int, rows: int) -> None:
    """Set ``rows`` vectors to zero."""
    for x in range(at, at + rows * LANES, LANES):
        store(out, x, splat(_ZERO))


@compiled
def _gather(factor: Floats, at: int, rows: Floats, keys: Int32Array, pairs: int, base: int, features: int, scale: np.float32, out: Floats, to: int) -> None:  # noqa: E501
    """Add to the row of ``out`` at ``to``: rows base + keys of ``rows``, each times its factor and scale."""
    for pair in range(pairs):
        f = mul(load(factor, at + pair * LANES), splat(scale))
        row = (base + keys[pair]) * features * LANES
        for d in range(0, features * LANES, LANES):
            store(out, to + d, fma(f, load(rows, row + d), load(out, to + d)))


@compiled
def forward(rows: Rows, sizes: Sizes, radial: Features, first: int, last: int, kept: Kept) -> None:
    """Fill y, its log-sum-exp and the weighted radial features of atoms first..last-1."""
    window, features = sizes.window, sizes.features
    most, most_pairs = _most(rows, first, last)
    score, p_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    p_row = np.empty(most * LANES, F)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.offset[i + 1] - rows.offset[i]
        start, keys = rows.ptr[i], rows.key[rows.pair_ptr[i] : rows.pair_ptr[i] + pairs]
        at, bases = _features(rows, sizes, radial, i)
        for group in range(sizes.groups):
            atom = group * sizes.atoms + i
            row, sums = atom * features * LANES, atom * sizes.bases * LANES
            precision = load(kept.c, atom * LANES)
            _scores(kept.q, row, kept.k, keys, pairs, group * sizes.atoms, features, sizes.scale, score)
            shift = splat(_LEAST)
            for pair in range(pairs):
                farness = broadcast(rows.farness, start + rows.nearest[rows.pair_ptr[i] + pair])
                exponent = fma(precision, farness, load(score, pair * LANES))
                shift = larger(exponent, shift)
            _clear(p_pair, 0, pairs)
            _clear(kept.sums, sums + bases * LANES, sizes.bases - bases)
            total = splat(_ZERO)
            for t in range(used):
                pair = rows.pair[start + t] * LANES
                exponent = sub(fma(precision, broadcast(rows.farness, start + t), load(score, pair)), shift)
                p = mul(exp(exponent), broadcast(rows.count, start + t))
                total = add(total, p)
                store(p_pair, pair, add(load(p_pair, pair), p))
                store(p_row, t * LANES, p)
            if window:
                _sum_features(radial, at, used, window, p_row, kept.sums, sums, bases)
            _clear(kept.y, row, features)
            _gather(p_pair, 0, kept.v, keys, pairs, group * sizes.atoms, features, _ONE, kept.y, row)
            _project(kept.sums, sums, bases, kept.weight, group, sizes, kept.y, row)
            _finish(total, shift, kept, sums, bases, row, features, atom * LANES)


@compiled
def _sum_features(
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
def _project(
    sums: Floats, radial: int, bases: int, weight: Floats, group: int, sizes: Sizes, y: Floats, row: int
) -> None:
    """Add W times the first ``bases`` radial sums to the row of y."""
    features, start = sizes.features * LANES, group * sizes.bases * sizes.features * LANES
    whole = sizes.features // 4 * 4 * LANES
    for d in range(0, whole, 4 * LANES):
        y0, y1, y2, y3 = load(y, row + d), load(y, row + d + 8), load(y, row + d + 16), load(y, row + d + 24)
        for x in range(bases):
            s, w = load(sums, radial + x * LANES), start + x * features + d
            y0, y1 = fma(s, load(weight, w), y0), fma(s, load(weight, w + 8), y1)
            y2, y3 = fma(s, load(weight, w + 16), y2), fma(s, load(weight, w + 24), y3)
        store(y, row + d, y0)
        store(y, row + d + 8, y1)
        store(y, row + d + 16, y2)
        store(y, row + d + 24, y3)
    for d in range(whole, features, LANES):
        for x in range(bases):
            w = load(weight, start + x * features + d)
            store(y, row + d, fma(load(sums, radial + x * LANES), w, load(y, row + d)))


@compiled
def _finish(
    total: Floats, shift: Floats, kept: Kept, sums: int, bases: int, row: int, features: int, at: int
) -> None:
    """Divide y and the radial sums by the softmax's total, and write the log-sum-exp."""
    one = div(splat(_ONE), total)
    for x in range(sums, sums + bases * LANES, LANES):
        store(kept.sums, x, mul(load(kept.sums, x), one))
    for x in range(row, row + features * LANES, LANES):
        store(kept.y, x, mul(load(kept.y, x), one))
    store(kept.lse, at, total)
    for lane in range(at, at + LANES):
        kept.lse[lane] = np.log(kept.lse[lane])
    store(kept.lse, at, add(load(kept.lse, at), shift))


@compiled
def backward_queries(
    rows: Rows, sizes: Sizes, radial: Features, first: int, last: int, kept: Kept, dy: Floats, dq: Floats,
    dc: Floats, p_pair: Floats, ds_pair: Floats,
) -> None:  # fmt: skip
    """Fill dq and dc of atoms first..last-1, and their pairs' softmax weights and score gradients."""
    window, features = sizes.window, sizes.features
    most, most_pairs = _most(rows, first, last)
    score, dp_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    dp_row = np.empty(most * LANES, F)
    dsums = np.empty(sizes.bases * LANES, F)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.offset[i + 1] - rows.offset[i]
        start, keys = rows.ptr[i], rows.key[rows.pair_ptr[i] : rows.pair_ptr[i] + pairs]
        at, bases = _features(rows, sizes, radial, i)
        for group in range(sizes.groups):
            atom, base = group * sizes.atoms + i, (group * rows.offset[-1] + rows.offset[i]) * LANES
            row = atom * features * LANES
            precision = load(kept.c, atom * LANES)
            _scores(kept.q, row, kept.k, keys, pairs, group * sizes.atoms, features, sizes.scale, score)
            _scores(dy, row, kept.v, keys, pairs, group * sizes.atoms, features, _ONE, dp_pair)
            _center(score, dp_pair, pairs, load(kept.lse, atom * LANES), dy, kept.y, row, features)
            _project_back(dy, row, kept.weight, bases, group, sizes, dsums)
            _clear(p_pair, base, pairs)
            _clear(ds_pair, base, pairs)
            if window:
                _times_features(radial, at, used, window, dsums, dp_row)
            dprecision = splat(_ZERO)
            for t in range(used):
                pair, farness = rows.pair[start + t] * LANES, broadcast(rows.farness, start + t)
                p = mul(exp(fma(precision, farness, load(score, pair))), broadcast(rows.count, start + t))
                dp = load(dp_pair, pair)
                if window:
                    dp = add(dp, load(dp_row, t * LANES))
                ds = mul(p, dp)
                store(p_pair, base + pair, add(load(p_pair, base + pair), p))
                store(ds_pair, base + pair, add(load(ds_pair, base + pair), ds))
                dprecision = fma(ds, farness, dprecision)
            store(dc, atom * LANES, dprecision)
            _clear(dq, row, features)
            _gather(ds_pair, base, kept.k, keys, pairs, group * sizes.atoms, features, sizes.scale, dq, row)


@compiled
def _center(
    score: Floats, dp_pair: Floats, pairs: int, lse: Floats, dy: Floats, y: Floats, row: int, features: int
) -> None:
    """Take the log-sum-exp from the scores, and the sum over features of dy y from the pairs' gradients."""
    inner = splat(_ZERO)
    for d in range(row, row + features * LANES, LANES):
        inner = fma(load(dy, d), load(y, d), inner)
    for x in range(0, pairs * LANES, LANES):
        store(score, x, sub(load(score, x), lse))
        store(dp_pair, x, sub(load(dp_pair, x), inner))


@compiled
def _project_back(dy: Floats, row: int, weight: Floats, bases: int, group: int, sizes: Sizes, dsums: Floats) -> None:
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
def backward_weight(sizes: Sizes, first: int, last: int, dy: Floats, sums: Floats, dweight: Floats, part: int) -> None:
    """Fill the parts of dweight (parts, G, K, D, 8) of atoms first..last-1: ``part`` atoms to each."""
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


@compiled
def _times_features(radial: Features, at: int, used: int, window: int, dsums: Floats, dp_row: Floats) -> None:
    """dp_row (used, 8): the sum of each shell's features times the gradients of their sums; four shells at a time."""
    t = 0
    while t < used:
        begin, b = radial.begin[at + t] * LANES, (at + t) * window
        s0, s1, s2, s3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
        if t + 4 <= used and radial.begin[at + t + 3] == radial.begin[at + t]:
            for x in range(window):
                d = load(dsums, begin + x * LANES)
                s0, s1 = fma(broadcast(radial.b, b + x), d, s0), fma(broadcast(radial.b, b + window + x), d, s1)
                s2, s3 = fma(broadcast(radial.b, b + 2 * window + x), d, s2), fma(broadcast(radial.b, b + 3 * window + x), d, s3)
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
def backward_keys(
    by_key_ptr: IntArray, by_key: Int32Array, query: Int32Array, rows: Rows, sizes: Sizes, first: int, last: int,
    q: Floats, dy: Floats, p_pair: Floats, ds_pair: Floats, dk: Floats, dv: Floats,
) -> None:  # fmt: skip
    """Fill dk and dv of atoms first..last-1 from the pairs in which they are keys."""
    features = sizes.features
    for j in range(first, last):
        for group in range(sizes.groups):
            row = (group * sizes.atoms + j) * features * LANES
            _clear(dk, row, features)
            _clear(dv, row, features)
            for x in range(by_key_ptr[j], by_key_ptr[j + 1]):
                i = query[by_key[x]]
                used = rows.offset[i] + by_key[x] - rows.pair_ptr[i]
                if used >= rows.offset[i + 1]:
                    continue
                pair = (group * rows.offset[-1] + used) * LANES
                other = (group * sizes.atoms + i) * features * LANES
                p, ds = load(p_pair, pair), mul(load(ds_pair, pair), splat(sizes.scale))
                for d in range(0, features * LANES, LANES):
                    store(dk, row + d, fma(ds, load(q, other + d), load(dk, row + d)))
                    store(dv, row + d, fma(p, load(dy, other + d), load(dv, row + d)))
