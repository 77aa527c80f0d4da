"""One layer's attention, forward and backward, from the operator's layout to lanes and back, dealt to threads.

Legend of shapes: operands.py. Every atom's rows are summed by one thread, and the gradient of W over parts of fixed
size: results do not depend on the threads.
"""

from __future__ import annotations

import numpy as np

from crystalformer.ops.numba.fork import claim, fork
from crystalformer.ops.numba.kernels import backward_keys, backward_queries, forward
from crystalformer.ops.numba.lanes import from_lanes, to_lanes, weight_from_lanes, weight_to_lanes
from crystalformer.ops.numba.memory import LINE, from_a_line_on
from crystalformer.ops.numba.operands import (
    Features,
    Gradients,
    Kept,
    Outer,
    Rows,
    Sizes,
    Team,
    kept_in,
    reach,
)
from crystalformer.ops.numba.pairs import ByKey, Floats, IntArray, Plan, sort_by_key
from crystalformer.ops.numba.radial import backward_weight
from crystalformer.ops.numba.simd import LANES, add, compiled, load, store

F = np.float32
CHUNK = 16
"""Atoms that a thread takes at a time."""


@compiled
def forward_pass(
    plan: Plan, outer: Outer, sizes: Sizes, radial: Features, team: Team, cutoff_sigmas: float, memory: Floats
) -> None:
    """Fill y, and the memory with what the backward needs."""
    kept = kept_in(memory, sizes)
    _lay_out(plan.order, outer, sizes, kept)
    rows = reach(plan, kept.c, outer.heads, cutoff_sigmas)
    counter = np.zeros(1, np.int64)
    arguments = counter, outer, rows, sizes, radial, kept
    fork(_forward_chunks, team.parallel, _threads(team, rows), arguments)


@compiled
def backward_pass(
    plan: Plan, outer: Outer, sizes: Sizes, radial: Features, team: Team, cutoff_sigmas: float, memory: Floats
) -> None:
    """Fill the gradients of all but y, whose own is given, from what the forward left in the memory."""
    kept, order, heads = kept_in(memory, sizes), plan.order, outer.heads
    rows = reach(plan, kept.c, heads, cutoff_sigmas)
    by_key = sort_by_key(plan, rows.pairs, sizes.groups)
    count = 2 * sizes.groups * len(by_key.slot) * LANES
    pairs = from_a_line_on(np.empty(count + LINE, F), count)
    grads, threads = gradients_of(len(outer.weight) > 0, sizes, pairs), _threads(team, rows)
    first, second = np.zeros(1, np.int64), np.zeros(1, np.int64)
    fork(_query_parts, team.parallel, threads, (first, outer, rows, by_key, sizes, radial, kept, grads))
    fork(_key_chunks, team.parallel, threads, (second, outer, rows, sizes, by_key, kept, grads))
    if len(outer.weight):
        sum_parts(grads.dweight, len(kept.weight))
        weight_from_lanes(grads.dweight, heads, sizes.features, outer.bases, sizes.bases, outer.weight)
    from_lanes(grads.dc, order, heads, 1, 0, sizes.atoms, outer.c)


@compiled
def _lay_out(order: IntArray, outer: Outer, sizes: Sizes, kept: Kept) -> None:
    """Fill q, k, v, weight and c of what is kept."""
    atoms, heads, features = sizes.atoms, outer.heads, sizes.features
    to_lanes(outer.q, order, heads, features, 0, atoms, kept.q)
    to_lanes(outer.k, order, heads, features, 0, atoms, kept.k)
    to_lanes(outer.v, order, heads, features, 0, atoms, kept.v)
    if len(outer.weight):
        weight_to_lanes(outer.weight, outer.weight_step, heads, features, outer.bases, sizes.bases, kept.weight)
    to_lanes(outer.c, order, heads, 1, 0, atoms, kept.c)


@compiled
def _threads(team: Team, rows: Rows) -> int:
    """How many are worth waking for the shells in reach."""
    shells: int = rows.used.sum()
    return min(team.threads, max(1, shells // team.shells))


@compiled
def own_features(radial: Features, rows: Rows, sizes: Sizes) -> Features:
    """The features kept with the batch or, where none are kept, a thread's own memory for an atom's."""
    if len(radial.made) or sizes.window == 0:
        return radial
    most = 1
    for i in range(len(rows.plan.start)):
        most = max(most, rows.used[i])
    return Features(np.empty(most * sizes.window, F), np.empty(most, np.int32), radial.made)


@compiled
def _forward_chunks(counter: IntArray, outer: Outer, rows: Rows, sizes: Sizes, radial: Features, kept: Kept) -> None:
    """One thread's share of y."""
    own, order, heads, features = own_features(radial, rows, sizes), rows.plan.order, outer.heads, sizes.features
    first = claim(counter) * CHUNK
    while first < sizes.atoms:
        last = min(first + CHUNK, sizes.atoms)
        forward(rows, sizes, own, first, last, kept)
        from_lanes(kept.y, order, heads, features, first, last, outer.y)
        first = claim(counter) * CHUNK


@compiled
def _query_parts(
    counter: IntArray,
    outer: Outer,
    rows: Rows,
    by_key: ByKey,
    sizes: Sizes,
    radial: Features,
    kept: Kept,
    grads: Gradients,
) -> None:
    """One thread's share of dq, the pairs' gradients and the parts of dweight."""
    own, order, heads, features = own_features(radial, rows, sizes), rows.plan.order, outer.heads, sizes.features
    first = claim(counter) * sizes.part
    while first < sizes.atoms:
        last = min(first + sizes.part, sizes.atoms)
        to_lanes(outer.y, order, heads, features, first, last, grads.dy)
        backward_queries(rows, by_key, sizes, own, first, last, kept, grads)
        if len(grads.dweight):
            backward_weight(sizes, first, last, grads.dy, kept.sums, grads.dweight)
        from_lanes(grads.dq, order, heads, features, first, last, outer.q)
        first = claim(counter) * sizes.part


@compiled
def _key_chunks(
    counter: IntArray,
    outer: Outer,
    rows: Rows,
    sizes: Sizes,
    by_key: ByKey,
    kept: Kept,
    grads: Gradients,
) -> None:
    """One thread's share of dk and dv, when every pair's gradients are there."""
    order, heads, features = rows.plan.order, outer.heads, sizes.features
    first = claim(counter) * CHUNK
    while first < sizes.atoms:
        last = min(first + CHUNK, sizes.atoms)
        backward_keys(by_key, rows, sizes, first, last, kept, grads)
        from_lanes(grads.dk, order, heads, features, first, last, outer.k)
        from_lanes(grads.dv, order, heads, features, first, last, outer.v)
        first = claim(counter) * CHUNK


@compiled
def gradients_of(weighted: bool, sizes: Sizes, pairs: Floats) -> Gradients:  # noqa: FBT001
    """Memory for what the backward reads and writes beside that of the pairs, with parts of dweight or without."""
    lanes, parts = sizes.groups * sizes.atoms * LANES, -(-sizes.atoms // sizes.part)
    row, weight = lanes * sizes.features, sizes.groups * LANES * sizes.features * sizes.bases if weighted else 0
    dy, dq, dk, dv = np.empty(row, F), np.empty(row, F), np.empty(row, F), np.empty(row, F)
    return Gradients(dy, dq, dk, dv, np.empty(lanes, F), pairs, np.empty(parts * weight, F))


@compiled
def sum_parts(values: Floats, size: int) -> None:
    """Leave the sum over all parts of that size in the first."""
    for part in range(size, len(values), size):
        for x in range(0, size, LANES):
            store(values, x, add(load(values, x), load(values, part + x)))
