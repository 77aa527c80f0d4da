"""An encoder block (layers.EncoderBlock) in compiled passes: its products beside its attention, dealt to threads.

A thread takes the atoms of a chunk through all that needs no other atom. Atoms are in the order of the plan. Results
do not depend on the threads. Legend of shapes: operands.py, and

    F = H·D features of an atom, M hidden ones of the feed-forward network; both are multiples of 16
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crystalformer.ops.numba.fork import claim, fork
from crystalformer.ops.numba.kernels import forward
from crystalformer.ops.numba.lanes import from_lanes, to_lanes, weight_to_lanes
from crystalformer.ops.numba.operands import Features, Kept, Rows, Sizes, Team, reach
from crystalformer.ops.numba.pairs import Floats, IntArray, Plan
from crystalformer.ops.numba.passes import own_features
from crystalformer.ops.numba.products import matrix, multiply, pack, packed, packed_size
from crystalformer.ops.numba.rho import Rho, rho_of
from crystalformer.ops.numba.simd import (
    LANES,
    WIDE,
    add,
    compiled,
    either,
    fma,
    larger,
    load,
    load_wide,
    mul,
    splat,
    splat_wide,
    store,
)

F = np.float32
CHUNK = 24
"""Atoms that a thread takes at a time: four tiles of a product."""

PACKED_ROWS = 32
"""Of a weight that a thread packs at a time."""


class Parameters(NamedTuple):
    """A block's, or their gradients, flat: weights (out, in) and biases of its linear layers, omega (H, D).

    radial: W (H or 1, D, K), or nothing.
    """

    query: Floats
    query_bias: Floats
    key: Floats
    key_bias: Floats
    value: Floats
    value_bias: Floats
    out: Floats
    out_bias: Floats
    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats
    direction: Floats
    radial: Floats


class Constants(NamedTuple):
    """s and t, where s = 0 says that there are none yet; precision: 1/(2 scale_real²) in 1/Å²; cutoff in sigmas."""

    scale: float
    shift: float
    precision: float
    cutoff_sigmas: float


class Block(NamedTuple):
    """A block's parameters and what its forward is given and fills.

    heads, features, hidden, bases: H, F, M, K. weight_step: between heads of the radial weight, 0 where they share it.
    x and x2 (N, F): the features before and behind it, which may be one array. y, x1 (N, F): what out_proj and the
    feed-forward network are given; inner (N, M): what its second layer is given. argument (G, N, 8): of rho, value.
    """

    heads: int
    features: int
    hidden: int
    bases: int
    weight_step: int
    sizes: Sizes
    parameters: Parameters
    constants: Constants
    rho: Rho
    radial: Features
    kept: Kept
    x: Floats
    x2: Floats
    y: Floats
    x1: Floats
    inner: Floats
    argument: Floats
    value: Floats


class Packed(NamedTuple):
    """The weights of the linear layers as ``products.pack`` leaves them, and where each begins."""

    values: Floats
    query: int
    key: int
    value: int
    out: int
    first: int
    second: int


@either
def packed_length(features: int, hidden: int) -> int:
    """Numbers of all packed weights of a block."""
    return 4 * packed_size(features, features) + packed_size(hidden, features) + packed_size(features, hidden)


@compiled
def _packed_in(values: Floats, block: Block) -> Packed:
    """The packed weights in one piece of memory."""
    f, square = block.features, packed_size(block.features, block.features)
    return Packed(values, 0, square, 2 * square, 3 * square, 4 * square, 4 * square + packed_size(block.hidden, f))


@compiled
def omega_of(block: Block) -> Floats:
    """omega in lanes (G, D, 8)."""
    omega = np.zeros(block.sizes.groups * block.sizes.features * LANES, F)
    to_lanes(block.parameters.direction, np.zeros(1, np.int64), block.heads, block.sizes.features, 0, 1, omega)
    return omega


@compiled
def forward_block(block: Block, plan: Plan, packs: Floats, team: Team) -> None:
    """Fill what the block's forward fills; packs: memory for its packed weights."""
    packed_weights, threads, kept = _packed_in(packs, block), threads_for(team, block.sizes.atoms), block.kept
    first, second, third = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    fork(_pack_parts, team.parallel, threads, (first, block, packed_weights))
    fork(_project_chunks, team.parallel, threads, (second, block, packed_weights, omega_of(block)))
    if block.bases:
        weight, features = block.parameters.radial, block.sizes.features
        weight_to_lanes(
            weight, block.weight_step, block.heads, features, block.bases, block.sizes.bases, kept.weight
        )
    rows = reach(plan, kept.c, block.heads, block.constants.cutoff_sigmas)
    fork(_attend_chunks, team.parallel, threads, (third, block, rows, packed_weights))


@compiled
def threads_for(team: Team, atoms: int) -> int:
    """At most one for each chunk."""
    return min(team.threads, -(-atoms // CHUNK))


@compiled
def _pack_parts(counter: IntArray, block: Block, packs: Packed) -> None:
    """One thread's share of the packed weights."""
    f, m, w = block.features, block.hidden, block.parameters
    jobs = (
        (w.first, m, f, packs.first),
        (w.second, f, m, packs.second),
        (w.query, f, f, packs.query),
        (w.key, f, f, packs.key),
        (w.value, f, f, packs.value),
        (w.out, f, f, packs.out),
    )
    part, before = claim(counter), 0
    for weight, rows, depth, at in jobs:
        parts = -(-rows // PACKED_ROWS)
        while part < before + parts:
            first = (part - before) * PACKED_ROWS
            pack(weight, depth, first, min(first + PACKED_ROWS, rows), packs.values, at)
            part = claim(counter)
        before += parts


@compiled
def _project_chunks(counter: IntArray, block: Block, packs: Packed, omega: Floats) -> None:
    """One thread's share of q, k, v and c of what is kept, argument and value."""
    f, atoms, heads, w, kept = block.features, block.sizes.atoms, block.heads, block.parameters, block.kept
    row, place = np.empty(CHUNK * f, F), np.arange(atoms) % CHUNK
    jobs = (
        (packs.query, w.query_bias, kept.q),
        (packs.key, w.key_bias, kept.k),
        (packs.value, w.value_bias, kept.v),
    )
    first = claim(counter) * CHUNK
    while first < atoms:
        last = min(first + CHUNK, atoms)
        x, out, shape = matrix(block.x, first * f, f), matrix(row, 0, f), (last - first, f, f)
        for weight, bias, lanes in jobs:
            _repeat(bias, row, 0, last - first)
            multiply(x, packed(packs.values, weight, f), out, shape, True)
            to_lanes(row, place, heads, block.sizes.features, first, last, lanes)
        _precisions(block, omega, first, last)
        first = claim(counter) * CHUNK


@compiled
def _precisions(block: Block, omega: Floats, first: int, last: int) -> None:
    """s (omega q + t) of atoms first..last-1, its rho, and c."""
    atoms, size, constants, q = block.sizes.atoms, block.sizes.features * LANES, block.constants, block.kept.q
    scale, shift = F(constants.scale or 1.0), F(constants.shift if constants.scale else 0.0)
    for group in range(block.sizes.groups):
        for atom in range(group * atoms + first, group * atoms + last):
            a = splat(shift)
            for d in range(0, size, LANES):
                a = fma(load(q, atom * size + d), load(omega, group * size + d), a)
            store(block.argument, atom * LANES, mul(a, splat(scale)))
            for lane in range(atom * LANES, (atom + 1) * LANES):
                block.value[lane] = rho_of(block.argument[lane], block.rho)
                block.kept.c[lane] = block.value[lane] * constants.precision


@compiled
def _attend_chunks(counter: IntArray, block: Block, rows: Rows, packs: Packed) -> None:
    """One thread's share of the other arrays."""
    own, f, m, kept = own_features(block.radial, rows, block.sizes), block.features, block.hidden, block.kept
    w, atoms, order = block.parameters, block.sizes.atoms, rows.plan.order
    first = claim(counter) * CHUNK
    while first < atoms:
        last = min(first + CHUNK, atoms)
        count, at = last - first, first * f
        forward(rows, block.sizes, own, first, last, kept)
        from_lanes(kept.y, order, block.heads, block.sizes.features, first, last, block.y)
        y, x1, inner = matrix(block.y, at, f), matrix(block.x1, at, f), matrix(block.inner, first * m, m)
        _plus(block.x, w.out_bias, block.x1, at, count)
        multiply(y, packed(packs.values, packs.out, f), x1, (count, f, f), True)
        _repeat(w.first_bias, block.inner, first * m, count)
        multiply(x1, packed(packs.values, packs.first, f), inner, (count, m, f), True)
        _cut(block.inner, first * m, last * m)
        _plus(block.x1, w.second_bias, block.x2, at, count)
        multiply(inner, packed(packs.values, packs.second, m), matrix(block.x2, at, f), (count, f, m), True)
        first = claim(counter) * CHUNK


@compiled
def _repeat(bias: Floats, out: Floats, at: int, rows: int) -> None:
    """Fill so many rows of ``out`` with a bias."""
    for to in range(at, at + rows * len(bias), len(bias)):
        for i in range(0, len(bias), WIDE):
            store(out, to + i, load_wide(bias, i))


@compiled
def _plus(values: Floats, bias: Floats, out: Floats, at: int, rows: int) -> None:
    """Fill so many rows of ``out`` with those of the values plus a bias."""
    for to in range(at, at + rows * len(bias), len(bias)):
        for i in range(0, len(bias), WIDE):
            store(out, to + i, add(load_wide(values, to + i), load_wide(bias, i)))


@compiled
def _cut(values: Floats, first: int, last: int) -> None:
    """relu, which leaves what is not a number."""
    for i in range(first, last, WIDE):
        store(values, i, larger(splat_wide(F(0.0)), load_wide(values, i)))
