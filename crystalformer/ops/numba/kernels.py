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

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crystalformer.ops.numba.pairs import FloatArray, Int32Array, IntArray
from crystalformer.ops.numba.simd import (
    LANES,
    add,
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

Floats = npt.NDArray[np.float32]
F = np.float32
_ZERO, _HALF, _ONE = F(0.0), F(0.5), F(1.0)
_LEAST = F(-1e30)


class Rows(NamedTuple):
    """PairPlan's arrays of those names; used (N,): shells that an atom uses; offset (N+1,): used pairs before it."""

    ptr: IntArray
    distance: FloatArray
    count: IntArray
    pair: Int32Array
    pair_ptr: IntArray
    key: Int32Array
    nearest: Int32Array
    used: IntArray
    offset: IntArray


class Sizes(NamedTuple):
    """G, N, D and K; window: a multiple of 8, 0 without radial bases; spacing and width of the Gaussians, Å."""

    groups: int
    atoms: int
    features: int
    bases: int
    window: int
    spacing: float
    width: float


@compiled
def reach(
    ptr: IntArray, distance: FloatArray, pair_ptr: IntArray, nearest: Int32Array, radius: Floats, used: IntArray,
    offset: IntArray,
) -> None:  # fmt: skip
    """Fill used and offset of Rows: every atom i stops at its radius[i], Å."""
    offset[0] = 0
    for i in range(len(radius)):
        used[i] = np.searchsorted(distance[ptr[i] : ptr[i + 1]], radius[i], side="right")
        offset[i + 1] = offset[i] + np.searchsorted(nearest[pair_ptr[i] : pair_ptr[i + 1]], used[i], side="left")


@compiled
def _most(rows: Rows, first: int, last: int) -> tuple[int, int]:
    """The most shells and the most pairs that an atom of first..last-1 uses."""
    shells, pairs = 1, 1
    for i in range(first, last):
        shells, pairs = max(shells, rows.used[i]), max(pairs, rows.offset[i + 1] - rows.offset[i])
    return shells, pairs


@compiled
def _radial(rows: Rows, sizes: Sizes, i: int, used: int, b: Floats, begin: IntArray) -> None:
    """b (used, window): the Gaussians ``begin`` (used,) and following at the distances of atom i's shells."""
    window, spacing = sizes.window, sizes.spacing
    step = mul(ramp(), splat(F(-spacing / sizes.width)))
    for t in range(used):
        distance = rows.distance[rows.ptr[i] + t]
        base = min(max(int(distance / spacing - 0.5 * (window + 1)), 0), sizes.bases - window)
        begin[t] = base
        for x in range(0, window, LANES):
            offset = add(step, splat(F((distance - (base + x + 1) * spacing) / sizes.width)))
            store(b, t * window + x, exp(mul(mul(offset, offset), splat(-_HALF))))


@compiled
def _scores(a: Floats, at: int, b: Floats, keys: Int32Array, pairs: int, base: int, features: int, out: Floats) -> None:
    """out (pairs, 8): products of the row of ``a`` at ``at`` with those of ``b`` that ``keys`` name, from row ``base``."""
    for pair in range(pairs):
        row = (base + keys[pair]) * features * LANES
        even, odd = splat(_ZERO), splat(_ZERO)
        for d in range(0, (features - 1) * LANES, 2 * LANES):
            even = fma(load(a, at + d), load(b, row + d), even)
            odd = fma(load(a, at + d + LANES), load(b, row + d + LANES), odd)
        if features % 2:
            d = (features - 1) * LANES
            even = fma(load(a, at + d), load(b, row + d), even)
        store(out, pair * LANES, add(even, odd))


@compiled
def _clear(out: Floats, at: int, rows: int) -> None:
    """Set ``rows`` vectors to zero."""
    for x in range(at, at + rows * LANES, LANES):
        store(out, x, splat(_ZERO))


@compiled
def _gather(factor: Floats, at: int, rows: Floats, keys: Int32Array, pairs: int, base: int, features: int, out: Floats, to: int) -> None:  # noqa: E501
    """Add to the row of ``out`` at ``to``: rows of ``rows`` that ``keys`` name, each times its factor."""
    for pair in range(pairs):
        f = load(factor, at + pair * LANES)
        row = (base + keys[pair]) * features * LANES
        for d in range(0, features * LANES, LANES):
            store(out, to + d, fma(f, load(rows, row + d), load(out, to + d)))


@compiled
def forward(
    rows: Rows, sizes: Sizes, first: int, last: int, q: Floats, k: Floats, v: Floats, c: Floats, weight: Floats,
    y: Floats, lse: Floats, sums: Floats,
) -> None:  # fmt: skip
    """Fill y, its log-sum-exp and the weighted radial features of atoms first..last-1; q is scaled by 1/sqrt(D)."""
    window, features, bases = sizes.window, sizes.features, sizes.bases
    most, most_pairs = _most(rows, first, last)
    b, begin = np.empty(most * window, F), np.empty(most, np.int64)
    score, p_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.offset[i + 1] - rows.offset[i]
        start, keys = rows.ptr[i], rows.key[rows.pair_ptr[i] : rows.pair_ptr[i] + pairs]
        if window:
            _radial(rows, sizes, i, used, b, begin)
        for group in range(sizes.groups):
            atom = group * sizes.atoms + i
            row, radial = atom * features * LANES, atom * bases * LANES
            precision = load(c, atom * LANES)
            _scores(q, row, k, keys, pairs, group * sizes.atoms, features, score)
            shift = splat(_LEAST)
            for pair in range(pairs):
                distance = rows.distance[start + rows.nearest[rows.pair_ptr[i] + pair]]
                exponent = fma(precision, splat(F(-distance * distance)), load(score, pair * LANES))
                shift = larger(exponent, shift)
            _clear(p_pair, 0, pairs)
            _clear(sums, radial, bases)
            total = splat(_ZERO)
            for t in range(used):
                distance, pair = rows.distance[start + t], rows.pair[start + t] * LANES
                exponent = sub(fma(precision, splat(F(-distance * distance)), load(score, pair)), shift)
                p = mul(exp(exponent), splat(F(rows.count[start + t])))
                total = add(total, p)
                store(p_pair, pair, add(load(p_pair, pair), p))
                if window:
                    _add_features(b, t * window, window, p, sums, radial + begin[t] * LANES)
            _clear(y, row, features)
            _gather(p_pair, 0, v, keys, pairs, group * sizes.atoms, features, y, row)
            _project(sums, radial, weight, group, sizes, y, row)
            _finish(total, shift, sums, radial, bases, y, row, features, lse, atom * LANES)


@compiled
def _add_features(b: Floats, at: int, window: int, p: Floats, sums: Floats, to: int) -> None:
    """Add p times each of ``window`` features to the sums at ``to``."""
    for x in range(0, window, 4):
        s = to + x * LANES
        store(sums, s, fma(splat(b[at + x]), p, load(sums, s)))
        store(sums, s + 8, fma(splat(b[at + x + 1]), p, load(sums, s + 8)))
        store(sums, s + 16, fma(splat(b[at + x + 2]), p, load(sums, s + 16)))
        store(sums, s + 24, fma(splat(b[at + x + 3]), p, load(sums, s + 24)))


@compiled
def _project(sums: Floats, radial: int, weight: Floats, group: int, sizes: Sizes, y: Floats, row: int) -> None:
    """Add W times the radial sums to the row of y."""
    features = sizes.features * LANES
    for x in range(sizes.bases):
        s = load(sums, radial + x * LANES)
        w = (group * sizes.bases + x) * features
        for d in range(0, features, LANES):
            store(y, row + d, fma(s, load(weight, w + d), load(y, row + d)))


@compiled
def _finish(
    total: Floats, shift: Floats, sums: Floats, radial: int, bases: int, y: Floats, row: int, features: int,
    lse: Floats, at: int,
) -> None:  # fmt: skip
    """Divide by the softmax's total, and write the log-sum-exp."""
    one = div(splat(_ONE), total)
    for x in range(radial, radial + bases * LANES, LANES):
        store(sums, x, mul(load(sums, x), one))
    for x in range(row, row + features * LANES, LANES):
        store(y, x, mul(load(y, x), one))
    store(lse, at, total)
    for lane in range(at, at + LANES):
        lse[lane] = np.log(lse[lane])
    store(lse, at, add(load(lse, at), shift))


@compiled
def backward_queries(
    rows: Rows, sizes: Sizes, first: int, last: int, q: Floats, k: Floats, v: Floats, c: Floats, weight: Floats,
    y: Floats, lse: Floats, sums: Floats, dy: Floats, dq: Floats, dc: Floats, dweight: Floats, p_pair: Floats,
    ds_pair: Floats, part: int,
) -> None:  # fmt: skip
    """Fill dq and dc of atoms first..last-1, and their pairs' softmax weights and score gradients.

    dweight (parts, G, K, D, 8) holds zeros; every ``part`` atoms have one of its parts to themselves.
    """
    window, features, bases = sizes.window, sizes.features, sizes.bases
    most, most_pairs = _most(rows, first, last)
    b, begin = np.empty(most * window, F), np.empty(most, np.int64)
    score, dp_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    dsums = np.empty(bases * LANES, F)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.offset[i + 1] - rows.offset[i]
        start, keys = rows.ptr[i], rows.key[rows.pair_ptr[i] : rows.pair_ptr[i] + pairs]
        if window:
            _radial(rows, sizes, i, used, b, begin)
        for group in range(sizes.groups):
            atom, base = group * sizes.atoms + i, (group * rows.offset[-1] + rows.offset[i]) * LANES
            row = atom * features * LANES
            precision = load(c, atom * LANES)
            _scores(q, row, k, keys, pairs, group * sizes.atoms, features, score)
            _scores(dy, row, v, keys, pairs, group * sizes.atoms, features, dp_pair)
            _center(score, dp_pair, pairs, load(lse, atom * LANES), dy, y, row, features)
            own = (i // part) * sizes.groups
            _project_back(dy, row, weight, sums, atom * bases * LANES, group, own, sizes, dsums, dweight)
            _clear(p_pair, base, pairs)
            _clear(ds_pair, base, pairs)
            dprecision = splat(_ZERO)
            for t in range(used):
                distance, pair = rows.distance[start + t], rows.pair[start + t] * LANES
                squared = splat(F(-distance * distance))
                p = mul(exp(fma(precision, squared, load(score, pair))), splat(F(rows.count[start + t])))
                dp = load(dp_pair, pair)
                if window:
                    dp = _times_features(b, t * window, window, dsums, begin[t] * LANES, dp)
                ds = mul(p, dp)
                store(p_pair, base + pair, add(load(p_pair, base + pair), p))
                store(ds_pair, base + pair, add(load(ds_pair, base + pair), ds))
                dprecision = fma(ds, squared, dprecision)
            store(dc, atom * LANES, dprecision)
            _clear(dq, row, features)
            _gather(ds_pair, base, k, keys, pairs, group * sizes.atoms, features, dq, row)


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
def _project_back(
    dy: Floats, row: int, weight: Floats, sums: Floats, radial: int, group: int, own: int, sizes: Sizes,
    dsums: Floats, dweight: Floats,
) -> None:  # fmt: skip
    """dsums (K, 8): gradient of an atom's radial sums; its part of W's gradient is added to dweight from group ``own`` on."""
    features, shift = sizes.features * LANES, own * sizes.bases * sizes.features * LANES
    for x in range(sizes.bases):
        s, w = load(sums, radial + x * LANES), (group * sizes.bases + x) * features
        gradient = splat(_ZERO)
        for d in range(0, features, LANES):
            out = load(dy, row + d)
            gradient = fma(out, load(weight, w + d), gradient)
            store(dweight, shift + w + d, fma(out, s, load(dweight, shift + w + d)))
        store(dsums, x * LANES, gradient)


@compiled
def _times_features(b: Floats, at: int, window: int, dsums: Floats, begin: int, start: Floats) -> Floats:
    """start plus the sum of ``window`` features times the vectors of dsums from ``begin`` on."""
    s0, s1, s2, s3 = start, splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for x in range(0, window, 4):
        s = begin + x * LANES
        s0 = fma(splat(b[at + x]), load(dsums, s), s0)
        s1 = fma(splat(b[at + x + 1]), load(dsums, s + 8), s1)
        s2 = fma(splat(b[at + x + 2]), load(dsums, s + 16), s2)
        s3 = fma(splat(b[at + x + 3]), load(dsums, s + 24), s3)
    return add(add(s0, s1), add(s2, s3))


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
                p, ds = load(p_pair, pair), load(ds_pair, pair)
                for d in range(0, features * LANES, LANES):
                    store(dk, row + d, fma(ds, load(q, other + d), load(dk, row + d)))
                    store(dv, row + d, fma(p, load(dy, other + d), load(dv, row + d)))
