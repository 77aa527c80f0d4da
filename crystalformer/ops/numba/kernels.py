"""The compiled loops of real-space attention: forward, backward by query, backward by key.

An atom's shells are sorted by distance and it stops where its own Gaussians end. Every output has one order of
summation, however the atoms are dealt to threads. Legend of shapes: operands.py.
"""

from __future__ import annotations

import numpy as np

from crystalformer.ops.numba.operands import Features, Gradients, Kept, Rows, Sizes, most_used
from crystalformer.ops.numba.pairs import ByKey, Floats, Int32Array
from crystalformer.ops.numba.radial import (
    bases_of,
    features_of,
    product,
    project,
    project_back,
    sum_features,
    times_features,
)
from crystalformer.ops.numba.simd import (
    LANES,
    WIDE,
    WIDE_REGISTERS,
    add,
    broadcast,
    compiled,
    div,
    doubled,
    evens,
    exp,
    fma,
    former,
    inlined,
    joined,
    larger,
    latter,
    load,
    load_twice,
    load_wide,
    mul,
    odds,
    settle,
    splat,
    splat_wide,
    store,
    stream,
    sub,
)

F = np.float32
_ZERO, _ONE = F(0.0), F(1.0)
_LEAST = F(-1e30)


@compiled
def forward(rows: Rows, sizes: Sizes, radial: Features, first: int, last: int, kept: Kept) -> None:
    """Fill y, its log-sum-exp and the weighted radial features of atoms first..last-1."""
    window, features = sizes.window, sizes.features
    most, most_pairs = most_used(rows, first, last)
    score, p_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    p_row, radial_sums = np.empty((most + 1) * WIDE, F), np.empty(sizes.bases * LANES, F)
    reached = np.zeros(last - first, np.int64)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.pairs[i]
        start, keys = rows.plan.start[i], rows.plan.key[rows.plan.pair_ptr[i] : rows.plan.pair_ptr[i] + pairs]
        at, bases = features_of(rows, sizes, radial, i), bases_of(rows, sizes, i)
        reached[i - first] = bases
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
            total = splat(_ZERO)
            for t in range(0, used, 2):
                p, after = _weights(rows, start + t, start + used, precision, score, shift)
                first_pair, second_pair = _pair(rows, start + t), _pair(rows, min(start + t + 1, start + used - 1))
                total = add(total, add(p, after))
                store(p_pair, first_pair, add(load(p_pair, first_pair), p))
                store(p_pair, second_pair, add(load(p_pair, second_pair), after))
                store(p_row, t * WIDE, doubled(p))
                store(p_row, (t + 1) * WIDE, doubled(after))
            if window:
                sum_features(radial, at, used, window, p_row, radial_sums, bases)
                _divide(radial_sums, div(splat(_ONE), total), bases, kept.sums, sums)
                _clear(kept.sums, sums + bases * LANES, sizes.bases - bases)
            _gather(p_pair, LANES, kept.v, keys, group, sizes, kept.y, row)
            _finish(total, shift, kept, row, features, atom * LANES)
    if window:
        for group in range(sizes.groups):
            project(kept.sums, reached, kept.weight, group, sizes, kept.y, first, last)


@inlined
def _pair(rows: Rows, shell: int) -> int:
    """Where a shell's pair begins among those of its atom."""
    begin: int = rows.plan.pair[shell] * LANES
    return begin


@inlined
def _weights(
    rows: Rows, shell: int, end: int, precision: Floats, score: Floats, shift: Floats
) -> tuple[Floats, Floats]:
    """Softmax weights, not yet divided, of a shell and the one after it; of that zeros where it is the ``end``."""
    second = min(shell + 1, end - 1)
    a = fma(precision, broadcast(rows.plan.farness, shell), load(score, _pair(rows, shell)))
    b = fma(precision, broadcast(rows.plan.farness, second), load(score, _pair(rows, second)))
    both = exp(joined(sub(a, shift), sub(b, shift)))
    images = rows.plan.images[second] if shell + 1 < end else _ZERO
    return mul(former(both), broadcast(rows.plan.images, shell)), mul(latter(both), splat(images))


@compiled
def _divide(values: Floats, one: Floats, bases: int, out: Floats, to: int) -> None:
    """Radial sums (bases, 8) over the softmax's total: from two bases in turn to one after the other."""
    for x in range(0, bases * LANES, WIDE):
        both = load_wide(values, x)
        store(out, to + x, mul(evens(both), one))
        store(out, to + x + LANES, mul(odds(both), one))


@compiled
def _finish(total: Floats, shift: Floats, kept: Kept, row: int, features: int, at: int) -> None:
    """Divide y by the softmax's total, and write the log-sum-exp."""
    one = div(splat(_ONE), total)
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
    features, first = sizes.features * LANES, group * sizes.atoms
    for pair in range(len(keys)):
        row = (first + keys[pair]) * features
        store(out, pair * LANES, mul(product(a, at, b, row, features), splat(scale)))


@compiled
def _gather(
    factor: Floats, step: int, rows: Floats, keys: Int32Array, group: int, sizes: Sizes, out: Floats, to: int
) -> None:
    """Row of ``out`` at ``to``: the sum of the keys' ``rows``, each times its factor, which are ``step`` apart."""
    features, first = sizes.features * LANES, group * sizes.atoms
    most = features // (8 * WIDE) * 8 * WIDE if WIDE_REGISTERS else 0
    whole = features // (4 * WIDE) * 4 * WIDE
    for d in range(0, most, 8 * WIDE):
        s0, s1, s2, s3 = splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO)
        s4, s5, s6, s7 = splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO)
        for pair in range(len(keys)):
            f, row = load_twice(factor, pair * step), (first + keys[pair]) * features + d
            s0, s1 = fma(f, load_wide(rows, row), s0), fma(f, load_wide(rows, row + 16), s1)
            s2, s3 = fma(f, load_wide(rows, row + 32), s2), fma(f, load_wide(rows, row + 48), s3)
            s4, s5 = fma(f, load_wide(rows, row + 64), s4), fma(f, load_wide(rows, row + 80), s5)
            s6, s7 = fma(f, load_wide(rows, row + 96), s6), fma(f, load_wide(rows, row + 112), s7)
        store(out, to + d, s0)
        store(out, to + d + 16, s1)
        store(out, to + d + 32, s2)
        store(out, to + d + 48, s3)
        store(out, to + d + 64, s4)
        store(out, to + d + 80, s5)
        store(out, to + d + 96, s6)
        store(out, to + d + 112, s7)
    for d in range(most, whole, 4 * WIDE):
        s0, s1, s2, s3 = splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO), splat_wide(_ZERO)
        for pair in range(len(keys)):
            f, row = load_twice(factor, pair * step), (first + keys[pair]) * features + d
            s0, s1 = fma(f, load_wide(rows, row), s0), fma(f, load_wide(rows, row + 16), s1)
            s2, s3 = fma(f, load_wide(rows, row + 32), s2), fma(f, load_wide(rows, row + 48), s3)
        store(out, to + d, s0)
        store(out, to + d + 16, s1)
        store(out, to + d + 32, s2)
        store(out, to + d + 48, s3)
    for d in range(whole, features, LANES):
        total = splat(_ZERO)
        for pair in range(len(keys)):
            row = (first + keys[pair]) * features + d
            total = fma(load(factor, pair * step), load(rows, row), total)
        store(out, to + d, total)


@compiled
def _clear(out: Floats, at: int, rows: int) -> None:
    """Set ``rows`` vectors to zero."""
    for x in range(at, at + rows * LANES, LANES):
        store(out, x, splat(_ZERO))


@compiled
def backward_queries(
    rows: Rows, by_key: ByKey, sizes: Sizes, radial: Features, first: int, last: int, kept: Kept, grads: Gradients
) -> None:
    """Fill dq and dc of atoms first..last-1, and their pairs."""
    window, features = sizes.window, sizes.features
    most, most_pairs = most_used(rows, first, last)
    score, dp_pair = np.empty(most_pairs * LANES, F), np.empty(most_pairs * LANES, F)
    own, scale = np.empty(most_pairs * 2 * LANES if by_key.far else 0, F), splat(sizes.scale)
    dp_row, reached = np.empty(most * LANES, F), np.zeros(last - first, np.int64)
    dsums = np.empty(sizes.groups * (last - first) * sizes.bases * LANES, F)
    for i in range(first, last):
        reached[i - first] = bases_of(rows, sizes, i)
    one_group = (last - first) * sizes.bases * LANES
    if window:
        for group in range(sizes.groups):
            gradients = dsums[group * one_group : (group + 1) * one_group]
            project_back(grads.dy, reached, kept.weight, group, sizes, gradients, first, last)
    for i in range(first, last):
        used, pairs = rows.used[i], rows.pairs[i]
        start, keys = rows.plan.start[i], rows.plan.key[rows.plan.pair_ptr[i] : rows.plan.pair_ptr[i] + pairs]
        at = features_of(rows, sizes, radial, i)
        for group in range(sizes.groups):
            atom = group * sizes.atoms + i
            row = atom * features * LANES
            precision = load(kept.c, atom * LANES)
            _scores(kept.q, row, kept.k, keys, group, sizes, sizes.scale, score)
            _scores(grads.dy, row, kept.v, keys, group, sizes, _ONE, dp_pair)
            _center(score, dp_pair, pairs, load(kept.lse, atom * LANES), grads.dy, kept.y, row, features)
            if window:
                of = group * one_group + (i - first) * sizes.bases * LANES
                times_features(radial, at, used, window, dsums, of, dp_row)
            pair_gradients = _room(by_key, grads, group, i, own)
            _clear(pair_gradients, 0, 2 * pairs)
            dprecision = splat(_ZERO)
            for t in range(0, used, 2):
                p, after = _weights(rows, start + t, start + used, precision, score, splat(_ZERO))
                for shell, weight in ((start + t, p), (min(start + t + 1, start + used - 1), after)):
                    dp = load(dp_pair, _pair(rows, shell))
                    if window:
                        dp = add(dp, load(dp_row, (shell - start) * LANES))
                    ds, pair = mul(weight, dp), 2 * _pair(rows, shell)
                    store(pair_gradients, pair, add(load(pair_gradients, pair), weight))
                    store(pair_gradients, pair + LANES, fma(ds, scale, load(pair_gradients, pair + LANES)))
                    dprecision = fma(ds, broadcast(rows.plan.farness, shell), dprecision)
            store(grads.dc, atom * LANES, dprecision)
            _gather(pair_gradients[LANES:], 2 * LANES, kept.k, keys, group, sizes, grads.dq, row)
            _put(own, by_key, group, i, pairs, grads.pairs)
    settle()


@inlined
def _room(by_key: ByKey, grads: Gradients, group: int, i: int, own: Floats) -> Floats:
    """Where the gradients of atom i's pairs are summed: where they stay or, where that is far, in ``own`` memory."""
    if by_key.far:
        return own
    begin = 2 * (group * len(by_key.slot) + by_key.first[i]) * LANES
    return grads.pairs[begin:]


@compiled
def _put(own: Floats, by_key: ByKey, group: int, i: int, pairs: int, out: Floats) -> None:
    """Write atom i's pairs to slots that are far, past the caches: they would not stay there until they are read."""
    if by_key.far:
        first, before = by_key.first[i], group * len(by_key.slot)
        for pair in range(pairs):
            slot = before + by_key.slot_of[first + pair]
            stream(out, 2 * slot * LANES, load_wide(own, 2 * pair * LANES))


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
    features, most = sizes.features * LANES, 1
    for j in range(first, last):
        most = max(most, by_key.ptr[j + 1] - by_key.ptr[j])
    own, slots, queries = np.empty(most * 2 * LANES, F), np.empty(most, np.int32), np.empty(most, np.int32)
    for j in range(first, last):
        count = _pairs_of(by_key, rows, j, slots, queries)
        for group in range(sizes.groups):
            before, row = group * len(by_key.slot), (group * sizes.atoms + j) * features
            for x in range(count):
                store(own, 2 * x * LANES, load_wide(grads.pairs, 2 * (before + slots[x]) * LANES))
            _gather(own, 2 * LANES, grads.dy, queries[:count], group, sizes, grads.dv, row)
            _gather(own[LANES:], 2 * LANES, kept.q, queries[:count], group, sizes, grads.dk, row)


@compiled
def _pairs_of(by_key: ByKey, rows: Rows, j: int, slots: Int32Array, queries: Int32Array) -> int:
    """Fill slots and i of the pairs in reach whose key is j, and say how many there are."""
    count = 0
    for x in range(by_key.ptr[j], by_key.ptr[j + 1]):
        slots[count], queries[count] = by_key.slot[x], by_key.query[x]
        count += int(by_key.rank[x] < rows.pairs[by_key.query[x]])  # no branch: nobody could foretell it
    return count
