"""The gradient of an encoder block in compiled passes. Legend of shapes: block.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crystalformer.ops.numba.block import (
    CHUNK,
    DIRECTION,
    FIRST,
    KEY,
    OUT,
    QUERY,
    RADIAL,
    SECOND,
    VALUE,
    Block,
    floats_at,
    omega_of,
    places_in_chunks,
    threads_for,
)
from crystalformer.ops.numba.fork import claim, fork
from crystalformer.ops.numba.kernels import backward_keys, backward_queries
from crystalformer.ops.numba.lanes import from_lanes, to_lanes, weight_from_lanes
from crystalformer.ops.numba.operands import Gradients, Rows, Sizes, Team
from crystalformer.ops.numba.pairs import ByKey, Floats, IntArray
from crystalformer.ops.numba.passes import gradients_of, own_features, sum_parts
from crystalformer.ops.numba.products import (
    DEPTH,
    add_product,
    matrix,
    room_for,
    set_long_product,
    set_product,
    turned,
)
from crystalformer.ops.numba.radial import backward_weight
from crystalformer.ops.numba.rho import slope_of
from crystalformer.ops.numba.simd import (
    LANES,
    WIDE,
    add,
    compiled,
    fma,
    inlined,
    load,
    load_wide,
    splat,
    splat_wide,
    store,
    where_above,
)

F = np.float32
ROWS = 48
"""Of a weight's gradient that a thread takes at a time: eight tiles, or MANY of them where the features of all atoms,
which are read for each part anew, do not fit into the cache."""

MANY = 4

LONG = 1024
"""Atoms from which parts of both factors are copied: those of fewer are near as they are."""


class Flow(NamedTuple):
    """Gradients of what a block computes: dx2 and dx (N, F) of its features behind and before it, others between.

    As block.Block's; dq, dk, dv (N, F): of what its projections give; pairs: operands.Gradients', of all that may be
    in reach.
    """

    dx2: Floats
    dinner: Floats
    dx1: Floats
    dq: Floats
    dk: Floats
    dv: Floats
    dx: Floats
    pairs: Floats


@inlined
def backward_block(block: Block, rows: Rows, by_key: ByKey, flow: Flow, out: IntArray, team: Team) -> None:
    """Fill dx, and the gradients of the block's parameters; dx2 is given, what is between is overwritten."""
    sizes, kept, omega = block.sizes, block.kept, omega_of(block)
    threads, grads = threads_for(team, sizes.atoms), gradients_of(block.bases > 0, sizes, flow.pairs)
    first, second, third = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    fork(_query_parts, team.parallel, threads, (first, block, rows, by_key, flow, grads, omega))
    fork(_key_chunks, team.parallel, threads, (second, block, rows, by_key, flow, grads))
    fork(_weight_parts, team.parallel, threads, (third, block, flow, out))
    _direction(grads.dc, kept.q, sizes, omega)
    direction = floats_at(out[DIRECTION], block.features)
    from_lanes(omega, np.zeros(1, np.int64), block.heads, sizes.features, 0, 1, direction)
    if block.bases:
        sum_parts(grads.dweight, len(kept.weight))
        _radial_weight(block, grads.dweight, out[RADIAL])


@compiled
def _query_parts(
    counter: IntArray, block: Block, rows: Rows, by_key: ByKey, flow: Flow, grads: Gradients, omega: Floats
) -> None:
    """One thread's share of the feed-forward network's gradients, dq, the pairs' and the parts of dweight."""
    sizes, f, part, kept = block.sizes, block.features, block.sizes.part, block.kept
    own, row, place = (
        own_features(block.radial, rows, sizes),
        np.empty(part * f, F),
        places_in_chunks(sizes.atoms, part),
    )
    first = claim(counter) * part
    while first < sizes.atoms:
        last = min(first + part, sizes.atoms)
        _feed_back(block, flow, first, last, row)
        to_lanes(row, place, block.heads, sizes.features, first, last, grads.dy)
        backward_queries(rows, by_key, sizes, own, first, last, kept, grads)
        if block.bases:
            backward_weight(sizes, first, last, grads.dy, kept.sums, grads.dweight)
        _through_rho(block, grads, omega, first, last)
        from_lanes(grads.dq, rows.plan.order, block.heads, sizes.features, first, last, flow.dq)
        first = claim(counter) * part


@inlined
def _feed_back(block: Block, flow: Flow, first: int, last: int, dy: Floats) -> None:
    """Fill dinner and dx1 of atoms first..last-1, and rows of dy."""
    f, m, count = block.features, block.hidden, last - first
    second, one = floats_at(block.parameters[SECOND], f * m), floats_at(block.parameters[FIRST], f * m)
    out = floats_at(block.parameters[OUT], f * f)
    dx1, dinner = matrix(flow.dx1, first * f, f), matrix(flow.dinner, first * m, m)
    set_product(matrix(flow.dx2, first * f, f), matrix(second, 0, m), dinner, (count, m, f))
    for i in range(first * m, last * m, WIDE):
        store(flow.dinner, i, where_above(load_wide(block.inner, i), load_wide(flow.dinner, i)))
    _copy(flow.dx2, flow.dx1, first * f, last * f)
    add_product(dinner, matrix(one, 0, f), dx1, (count, f, m))
    set_product(dx1, matrix(out, 0, f), matrix(dy, 0, f), (count, f, f))


@inlined
def _copy(values: Floats, out: Floats, first: int, last: int) -> None:
    for i in range(first, last, WIDE):
        store(out, i, load_wide(values, i))


@inlined
def _through_rho(block: Block, grads: Gradients, omega: Floats, first: int, last: int) -> None:
    """Turn dc of atoms first..last-1 into the gradient of omega q, and add what it gives to dq."""
    atoms, size = block.sizes.atoms, block.sizes.features * LANES
    factor = block.constants.precision * (block.constants.scale or 1.0)
    for group in range(block.sizes.groups):
        for atom in range(group * atoms + first, group * atoms + last):
            for lane in range(atom * LANES, (atom + 1) * LANES):
                grads.dc[lane] *= factor * slope_of(block.argument[lane], block.value[lane], block.rho)
            d_product = load(grads.dc, atom * LANES)
            for d in range(0, size, LANES):
                at = atom * size + d
                store(grads.dq, at, fma(d_product, load(omega, group * size + d), load(grads.dq, at)))


@compiled
def _key_chunks(counter: IntArray, block: Block, rows: Rows, by_key: ByKey, flow: Flow, grads: Gradients) -> None:
    """One thread's share of dk, dv and dx, when every pair's gradients are there."""
    sizes, f, order = block.sizes, block.features, rows.plan.order
    first = claim(counter) * CHUNK
    while first < sizes.atoms:
        last = min(first + CHUNK, sizes.atoms)
        backward_keys(by_key, rows, sizes, first, last, block.kept, grads)
        from_lanes(grads.dk, order, block.heads, sizes.features, first, last, flow.dk)
        from_lanes(grads.dv, order, block.heads, sizes.features, first, last, flow.dv)
        _copy(flow.dx1, flow.dx, first * f, last * f)
        shape, dx = (last - first, f, f), matrix(flow.dx, first * f, f)
        for which, values in ((QUERY, flow.dq), (KEY, flow.dk), (VALUE, flow.dv)):
            weight = matrix(floats_at(block.parameters[which], f * f), 0, f)
            add_product(matrix(values, first * f, f), weight, dx, shape)
        first = claim(counter) * CHUNK


@compiled
def _weight_parts(counter: IntArray, block: Block, flow: Flow, out: IntArray) -> None:
    """One thread's share of the gradients of the linear layers."""
    f, m, atoms = block.features, block.hidden, block.sizes.atoms
    size = ROWS if atoms <= DEPTH else MANY * ROWS
    room = np.empty(room_for(size) if atoms >= LONG else 0, F)
    jobs = (
        (FIRST, flow.dinner, m, block.x1, f),
        (SECOND, flow.dx2, f, block.inner, m),
        (QUERY, flow.dq, f, block.x, f),
        (KEY, flow.dk, f, block.x, f),
        (VALUE, flow.dv, f, block.x, f),
        (OUT, flow.dx1, f, block.y, f),
    )
    part, before = claim(counter), 0
    for which, gradient, rows, given, columns in jobs:
        weight, bias, parts = floats_at(out[which], rows * columns), floats_at(out[which + 1], rows), -(-rows // size)
        while part < before + parts:
            first = (part - before) * size
            last = min(first + size, rows)
            a, b = turned(gradient, first, rows), matrix(given, 0, columns)
            c = matrix(weight, first * columns, columns)
            if atoms >= LONG:
                set_long_product(a, b, c, bias[first:last], (last - first, columns, atoms), room)
            else:
                set_product(a, b, c, (last - first, columns, atoms))
                _sum_of_rows(gradient, rows, first, last, bias)
            part = claim(counter)
        before += parts


@inlined
def _radial_weight(block: Block, values: Floats, address: int) -> None:
    """Write the gradient of W there from lanes, over all heads where they share it."""
    heads, features, bases = block.heads, block.sizes.features, block.bases
    one = features * bases
    if block.weight_step:
        weight_from_lanes(values, heads, features, bases, block.sizes.bases, floats_at(address, heads * one))
        return
    by_head, out = np.empty(heads * one, F), floats_at(address, one)
    weight_from_lanes(values, heads, features, bases, block.sizes.bases, by_head)
    for i in range(one):
        out[i] = by_head[i]
        for head in range(1, heads):
            out[i] += by_head[head * one + i]


@inlined
def _sum_of_rows(values: Floats, size: int, first: int, last: int, out: Floats) -> None:
    """Columns first..last-1 of the sum of all rows, which have ``size`` numbers."""
    for column in range(first, last, WIDE):
        total = splat_wide(F(0.0))
        for at in range(column, len(values), size):
            total = add(total, load_wide(values, at))
        store(out, column, total)


@inlined
def _direction(d_product: Floats, q: Floats, sizes: Sizes, out: Floats) -> None:
    """Fill the gradient of omega (G, 1, D, 8) from that of omega q (G, N, 8)."""
    size = sizes.features * LANES
    for group in range(sizes.groups):
        for d in range(0, size, LANES):
            total = splat(F(0.0))
            for atom in range(group * sizes.atoms, (group + 1) * sizes.atoms):
                total = fma(load(d_product, atom * LANES), load(q, atom * size + d), total)
            store(out, group * size + d, total)
