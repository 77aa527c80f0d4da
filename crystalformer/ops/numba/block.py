"""An encoder block (layers.EncoderBlock) in compiled passes: its products beside its attention, dealt to threads.

A thread takes the atoms of a chunk through all that needs no other atom. Atoms are in the order of the plan. Results
do not depend on the threads. Legend of shapes: operands.py, and

    F = H·D features of an atom, M hidden ones of the feed-forward network; both are multiples of 16
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from crystalformer.ops.numba.fork import claim, fork
from crystalformer.ops.numba.kernels import forward
from crystalformer.ops.numba.lanes import from_lanes, to_lanes, weight_to_lanes
from crystalformer.ops.numba.operands import Features, Kept, Rows, Sizes, Team, reach
from crystalformer.ops.numba.pairs import Floats, IntArray, Plan
from crystalformer.ops.numba.passes import own_features
from crystalformer.ops.numba.products import add_product, matrix, pack, packed, packed_size
from crystalformer.ops.numba.rho import Rho, rho_of
from crystalformer.ops.numba.simd import (
    LANES,
    WIDE,
    Typed,
    add,
    compiled,
    either,
    fma,
    inlined,
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


QUERY, KEY, VALUE, OUT, FIRST, SECOND = range(0, 12, 2)
DIRECTION, RADIAL, PARAMETERS = 12, 13, 14
"""Places of a block's parameters in a list of their addresses: of a linear layer's weight (out, in), its bias behind
it, omega (H, D), W (H or 1, D, K); and how many there are.
"""


class Constants(NamedTuple):
    """s and t, where s = 0 says that there are none yet; precision: 1/(2 scale_real²) in 1/Å²; cutoff in sigmas."""

    scale: float
    shift: float
    precision: float
    cutoff_sigmas: float


class Block(NamedTuple):
    """A block's parameters and what its forward is given and fills.

    heads, features, hidden, bases: H, F, M, K. weight_step: between heads of W, 0 where they share it.
    parameters (14,): addresses of float32 arrays; a tuple of them would take most of the compiler's time.
    x and x2 (N, F): the features before and behind it, which may be one array. y, x1 (N, F): what out_proj and the
    feed-forward network are given; inner (N, M): what its second layer is given. argument (G, N, 8): of rho, value.
    """

    heads: int
    features: int
    hidden: int
    bases: int
    weight_step: int
    sizes: Sizes
    parameters: IntArray
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


@inlined
def _packed_in(values: Floats, block: Block) -> Packed:
    """The packed weights in one piece of memory."""
    f, square = block.features, packed_size(block.features, block.features)
    return Packed(values, 0, square, 2 * square, 3 * square, 4 * square, 4 * square + packed_size(block.hidden, f))


@inlined
def omega_of(block: Block) -> Floats:
    """omega in lanes (G, D, 8)."""
    omega = np.zeros(block.sizes.groups * block.sizes.features * LANES, F)
    direction = floats_at(block.parameters[DIRECTION], block.features)
    to_lanes(direction, np.zeros(1, np.int64), block.heads, block.sizes.features, 0, 1, omega)
    return omega


@inlined
def forward_block(block: Block, plan: Plan, packs: Floats, team: Team) -> None:
    """Fill what the block's forward fills; packs: memory for its packed weights."""
    packed_weights, threads, kept = _packed_in(packs, block), threads_for(team, block.sizes.atoms), block.kept
    first, second, third = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    fork(_pack_parts, team.parallel, threads, (first, block, packed_weights))
    fork(_project_chunks, team.parallel, threads, (second, block, packed_weights, omega_of(block)))
    if block.bases:
        heads, features, bases = block.heads, block.sizes.features, block.bases
        weight = floats_at(block.parameters[RADIAL], features * bases * (heads if block.weight_step else 1))
        weight_to_lanes(weight, block.weight_step, heads, features, bases, block.sizes.bases, kept.weight)
    rows = reach(plan, kept.c, block.heads, block.constants.cutoff_sigmas)
    fork(_attend_chunks, team.parallel, threads, (third, block, rows, packed_weights))


@intrinsic
def pointer(typing: Any, address: Any) -> Typed:  # noqa: ANN401
    """An address as a pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), code


@inlined
def floats_at(address: int, count: int) -> Floats:
    """So many float32 from there on."""
    found: Floats = carray(pointer(address), (count,), F)
    return found


@inlined
def threads_for(team: Team, atoms: int) -> int:
    """At most one for each chunk."""
    return min(team.threads, -(-atoms // CHUNK))


@compiled
def _pack_parts(counter: IntArray, block: Block, packs: Packed) -> None:
    """One thread's share of the packed weights."""
    f, m = block.features, block.hidden
    jobs = (
        (FIRST, m, f, packs.first),
        (SECOND, f, m, packs.second),
        (QUERY, f, f, packs.query),
        (KEY, f, f, packs.key),
        (VALUE, f, f, packs.value),
        (OUT, f, f, packs.out),
    )
    part, before = claim(counter), 0
    for which, rows, depth, at in jobs:
        weight, parts = floats_at(block.parameters[which], rows * depth), -(-rows // PACKED_ROWS)
        while part < before + parts:
            first = (part - before) * PACKED_ROWS
            pack(weight, depth, first, min(first + PACKED_ROWS, rows), packs.values, at)
            part = claim(counter)
        before += parts


@inlined
def places_in_chunks(atoms: int, chunk: int) -> IntArray:
    """(N,): each atom's place in its chunk."""
    places = np.empty(atoms, np.int64)
    for atom in range(atoms):
        places[atom] = atom % chunk
    return places


@compiled
def _project_chunks(counter: IntArray, block: Block, packs: Packed, omega: Floats) -> None:
    """One thread's share of q, k, v and c of what is kept, argument and value."""
    f, atoms, heads, kept = block.features, block.sizes.atoms, block.heads, block.kept
    row, place = np.empty(CHUNK * f, F), places_in_chunks(atoms, CHUNK)
    first = claim(counter) * CHUNK
    while first < atoms:
        last = min(first + CHUNK, atoms)
        x, out, shape = matrix(block.x, first * f, f), matrix(row, 0, f), (last - first, f, f)
        for which, weight, lanes in (
            (QUERY, packs.query, kept.q),
            (KEY, packs.key, kept.k),
            (VALUE, packs.value, kept.v),
        ):
            _repeat(floats_at(block.parameters[which + 1], f), row, 0, last - first)
            add_product(x, packed(packs.values, weight, f), out, shape)
            to_lanes(row, place, heads, block.sizes.features, first, last, lanes)
        _precisions(block, omega, first, last)
        first = claim(counter) * CHUNK


@inlined
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
    atoms, order = block.sizes.atoms, rows.plan.order
    out_bias, second_bias = floats_at(block.parameters[OUT + 1], f), floats_at(block.parameters[SECOND + 1], f)
    first_bias = floats_at(block.parameters[FIRST + 1], m)
    first = claim(counter) * CHUNK
    while first < atoms:
        last = min(first + CHUNK, atoms)
        count, at = last - first, first * f
        forward(rows, block.sizes, own, first, last, kept)
        from_lanes(kept.y, order, block.heads, block.sizes.features, first, last, block.y)
        y, x1, inner = matrix(block.y, at, f), matrix(block.x1, at, f), matrix(block.inner, first * m, m)
        _plus(block.x, out_bias, block.x1, at, count)
        add_product(y, packed(packs.values, packs.out, f), x1, (count, f, f))
        _repeat(first_bias, block.inner, first * m, count)
        add_product(x1, packed(packs.values, packs.first, f), inner, (count, m, f))
        _cut(block.inner, first * m, last * m)
        _plus(block.x1, second_bias, block.x2, at, count)
        add_product(inner, packed(packs.values, packs.second, m), matrix(block.x2, at, f), (count, f, m))
        first = claim(counter) * CHUNK


@inlined
def _repeat(bias: Floats, out: Floats, at: int, rows: int) -> None:
    """Fill so many rows of ``out`` with a bias."""
    for to in range(at, at + rows * len(bias), len(bias)):
        for i in range(0, len(bias), WIDE):
            store(out, to + i, load_wide(bias, i))


@inlined
def _plus(values: Floats, bias: Floats, out: Floats, at: int, rows: int) -> None:
    """Fill so many rows of ``out`` with those of the values plus a bias."""
    for to in range(at, at + rows * len(bias), len(bias)):
        for i in range(0, len(bias), WIDE):
            store(out, to + i, add(load_wide(values, to + i), load_wide(bias, i)))


@inlined
def _cut(values: Floats, first: int, last: int) -> None:
    """relu, which leaves what is not a number."""
    for i in range(first, last, WIDE):
        store(values, i, larger(splat_wide(F(0.0)), load_wide(values, i)))
