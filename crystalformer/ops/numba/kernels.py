"""The compiled loops of real-space attention: forward, backward by query, backward by key.

An atom's shells are sorted by distance and it stops where its own Gaussians end. Every output has one order of
summation, however the atoms are dealt to threads. Legend of shapes: operands.py.
"""

from __future__ import annotations

import numpy as np

from crystalformer.ops.numba.operands import ByKey, Features, Gradients, Kept, Rows, Sizes, most_used
from crystalformer.ops.numba.pairs import Floats, Int32Array
from crystalformer.ops.numba.radial import features_of, project, project_back, sum_features, times_features
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
    prefetch,
    splat,
    store,
    sub,
)

F = np.float32
_ZERO, _ONE = F(0.0), F(1.0)
_LEAST = F(-1e30)
_AHEAD = 12
"""Pairs by which memory is asked for ahead of its use: each lies in a page of its own."""


@compiled
def forward(rows: Rows, sizes: Sizes, radial: Features, first: int, last: int, kept: Kept) -> None:
    """Fill y, its log-sum-exp and the weighted radial features of atoms first..last-1."""
    window, features = sizes.window, sizes.features
    most, most_pairs = most_used(rows, first, last)
    score, p_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    p_row = np.empty(most * LANES, F)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.offset[i + 1] - rows.offset[i]
        start, keys = rows.plan.start[i], rows.plan.key[rows.plan.pair_ptr[i] : rows.plan.pair_ptr[i] + pairs]
        at, bases = features_of(rows, sizes, radial, i)
        for group in range(sizes.groups):
            atom = group * sizes.atoms + i
            row, sums = atom * features * LANES, atom * sizes.bases * LANES
            precision = load(kept.c, atom * LANES)
            _scores(kept.q, row, kept.k, keys, group, sizes, sizes.scale, score)
            shift = splat(_LEAST)
            for pair in range(pairs):
                farness = broadcast(rows.plan.farness, start + rows.plan.nearest[rows.plan.pair_ptr[i] + pair])
                exponent = fma(precision, farness, load(score, pair * LANES))
                shift = larger(exponent, shift)
            _clear(p_pair, 0, pairs)
            _clear(kept.sums, sums + bases * LANES, sizes.bases - bases)
            total = splat(_ZERO)
            for t in range(used):
                pair = rows.plan.pair[start + t] * LANES
                exponent = sub(fma(precision, broadcast(rows.plan.farness, start + t), load(score, pair)), shift)
                p = mul(exp(exponent), broadcast(rows.plan.images, start + t))
                total = add(total, p)
                store(p_pair, pair, add(load(p_pair, pair), p))
                store(p_row, t * LANES, p)
            if window:
                sum_features(radial, at, used, window, p_row, kept.sums, sums, bases)
            _gather(p_pair, LANES, kept.v, keys, group, sizes, kept.y, row)
            project(kept.sums, sums, bases, kept.weight, group, sizes, kept.y, row)
            _finish(total, shift, kept, sums, bases, row, features, atom * LANES)


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
def _scores(
    a: Floats, at: int, b: Floats, keys: Int32Array, group: int, sizes: Sizes, scale: np.float32, out: Floats
) -> None:
    """out (pairs, 8): scale times the products of the row of ``a`` at ``at`` with the keys' rows of ``b``."""
    features = sizes.features
    for pair in range(len(keys)):
        row = (group * sizes.atoms + keys[pair]) * features * LANES
        even, odd = splat(_ZERO), splat(_ZERO)
        for d in range(0, (features - 1) * LANES, 2 * LANES):
            even = fma(load(a, at + d), load(b, row + d), even)
            odd = fma(load(a, at + d + LANES), load(b, row + d + LANES), odd)
        if features % 2:
            d = (features - 1) * LANES
            even = fma(load(a, at + d), load(b, row + d), even)
        store(out, pair * LANES, mul(add(even, odd), splat(scale)))


@compiled
def _gather(
    factor: Floats, step: int, rows: Floats, keys: Int32Array, group: int, sizes: Sizes, out: Floats, to: int
) -> None:
    """Row of ``out`` at ``to``: the sum of the keys' ``rows``, each times its factor, which are ``step`` apart."""
    _clear(out, to, sizes.features)
    for pair in range(len(keys)):
        f = load(factor, pair * step)
        row = (group * sizes.atoms + keys[pair]) * sizes.features * LANES
        for d in range(0, sizes.features * LANES, LANES):
            store(out, to + d, fma(f, load(rows, row + d), load(out, to + d)))


@compiled
def _clear(out: Floats, at: int, rows: int) -> None:
    """Set ``rows`` vectors to zero."""
    for x in range(at, at + rows * LANES, LANES):
        store(out, x, splat(_ZERO))


@compiled
def backward_queries(
    rows: Rows, sizes: Sizes, radial: Features, first: int, last: int, kept: Kept, grads: Gradients
) -> None:
    """Fill dq and dc of atoms first..last-1, and their pairs."""
    window, features = sizes.window, sizes.features
    most, most_pairs = most_used(rows, first, last)
    score, dp_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    scale = splat(sizes.scale)
    dp_row, dsums = np.empty(most * LANES, F), np.empty(sizes.bases * LANES, F)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.offset[i + 1] - rows.offset[i]
        start, keys = rows.plan.start[i], rows.plan.key[rows.plan.pair_ptr[i] : rows.plan.pair_ptr[i] + pairs]
        at, bases = features_of(rows, sizes, radial, i)
        for group in range(sizes.groups):
            atom, base = group * sizes.atoms + i, 2 * (group * rows.offset[-1] + rows.offset[i]) * LANES
            row = atom * features * LANES
            precision = load(kept.c, atom * LANES)
            _scores(kept.q, row, kept.k, keys, group, sizes, sizes.scale, score)
            _scores(grads.dy, row, kept.v, keys, group, sizes, _ONE, dp_pair)
            _center(score, dp_pair, pairs, load(kept.lse, atom * LANES), grads.dy, kept.y, row, features)
            project_back(grads.dy, row, kept.weight, bases, group, sizes, dsums)
            if window:
                times_features(radial, at, used, window, dsums, dp_row)
            _clear(grads.pairs, base, 2 * pairs)
            dprecision = splat(_ZERO)
            for t in range(used):
                pair, farness = rows.plan.pair[start + t] * LANES, broadcast(rows.plan.farness, start + t)
                p = mul(exp(fma(precision, farness, load(score, pair))), broadcast(rows.plan.images, start + t))
                dp = load(dp_pair, pair)
                if window:
                    dp = add(dp, load(dp_row, t * LANES))
                ds = mul(p, dp)
                own = base + 2 * pair
                store(grads.pairs, own, add(load(grads.pairs, own), p))
                store(grads.pairs, own + LANES, fma(ds, scale, load(grads.pairs, own + LANES)))
                dprecision = fma(ds, farness, dprecision)
            store(grads.dc, atom * LANES, dprecision)
            _gather(grads.pairs[base + LANES :], 2 * LANES, kept.k, keys, group, sizes, grads.dq, row)


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
def backward_keys(
    by_key: ByKey, rows: Rows, sizes: Sizes, first: int, last: int, kept: Kept, grads: Gradients
) -> None:
    """Fill dk and dv of atoms first..last-1 from the pairs in which they are keys."""
    features = sizes.features
    for j in range(first, last):
        for group in range(sizes.groups):
            row = (group * sizes.atoms + j) * features * LANES
            _clear(grads.dk, row, features)
            _clear(grads.dv, row, features)
            for x in range(by_key.ptr[j], by_key.ptr[j + 1]):
                ahead = by_key.pair[min(x + _AHEAD, len(by_key.pair) - 1)]
                prefetch(grads.pairs, 2 * (group * rows.offset[-1] + ahead) * LANES)
                pair = 2 * (group * rows.offset[-1] + by_key.pair[x]) * LANES
                other = (group * sizes.atoms + by_key.query[x]) * features * LANES
                p, ds = load(grads.pairs, pair), load(grads.pairs, pair + LANES)
                for d in range(0, features * LANES, LANES):
                    store(grads.dk, row + d, fma(ds, load(kept.q, other + d), load(grads.dk, row + d)))
                    store(grads.dv, row + d, fma(p, load(grads.dy, other + d), load(grads.dv, row + d)))
