"""Which pairs of atoms meet in a batch's shells: a score q_i k_j is the same for all shells of its pair.

Legend: N atoms, S shells, E pairs (i, j) with a shell. Atoms are in plan order, in which neighbours are close, pairs
in the order of i and then of their nearest shells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crystalformer.batch import PackedShells
from crystalformer.ops.handles import Handles
from crystalformer.ops.numba.simd import compiled

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

NEAR = 256
"""Atoms between neighbours in a batch's own order from which the plan makes another: more leave the cache."""

CLUSTER = 32
"""An atom and up to so many of its nearest follow one another then."""

FAR = 2**19
"""Pairs of eight heads whose gradients, a line each, are in no cache any more when their keys read them."""

TOGETHER = 64
"""Atoms whose pairs then lie in the order of their keys: a key finds several side by side, not a page for each."""


class Plan(NamedTuple):
    """Shells and their pairs, as the kernels read them.

    order (N,): the batch's atom at each place of the plan. start, stop (N,): its shells. distance (S,) Å: of the
    shells (batch.PackedShells). farness (S,): minus the squared distance, Å². images (S,): of the shell. pair (S,):
    the shell's pair among those of its atom.
    pair_ptr (N+1,): where an atom's pairs begin. key (E,): j. nearest (E,): the pair's first shell among those of its
    atom.
    """

    order: IntArray
    start: IntArray
    stop: IntArray
    distance: FloatArray
    farness: Floats
    images: Floats
    pair: Int32Array
    pair_ptr: IntArray
    key: Int32Array
    nearest: Int32Array


class ByKey(NamedTuple):
    """Pairs, P of them, in the order of j, then of i, and where their gradients lie, from i to j.

    Of each atom i the first ones are there: first (N+1,) says how many come before. ptr (N+1,): where the pairs of a
    key begin. query (P,): i. rank (P,): the pair's place among those of i. slot (P,): where its gradients lie;
    slot_of (P,): the same in the order of i. far: whether they are more than FAR, which lie TOGETHER, and not in the
    order of i.
    """

    first: IntArray
    ptr: IntArray
    query: Int32Array
    rank: Int32Array
    slot: Int32Array
    slot_of: Int32Array
    far: bool


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class PairPlan:
    """A batch's plan, and what is kept with it.

    placed: the plan for arrays whose atoms are in its order already; itself where that is the batch's.
    features: of each radial basis (count, spacing and width in Å), as operands.Features keeps them.
    """

    arrays: Plan
    placed: Plan
    features: dict[tuple[int, float, float], tuple[Floats, Int32Array, IntArray]] = field(default_factory=dict)

    @classmethod
    def of(cls, shells: PackedShells) -> PairPlan:
        """From the shells of a batch on the CPU."""
        ptr, neighbor = shells.ptr.numpy(), shells.neighbor.numpy()
        # Tables keep both in half the space; kernels for either would be compiled twice.
        distance = shells.distance.numpy().astype(np.float64, copy=False)
        count = shells.count.numpy().astype(np.int64, copy=False)
        order = places = np.arange(len(ptr) - 1)
        if _spread(ptr, neighbor) > NEAR:
            order = np.empty_like(places)
            _cluster(ptr, neighbor, order)
        start, stop = ptr[:-1][order], ptr[1:][order]
        pair, pair_ptr = np.empty(len(neighbor), np.int32), np.zeros(len(ptr), np.int64)
        key, nearest = (np.empty(len(neighbor), np.int32) for _ in range(2))
        farness, images = (np.empty(len(neighbor), np.float32) for _ in range(2))
        plan = Plan(order, start, stop, distance, farness, images, pair, pair_ptr, key, nearest)
        found = _join(plan, neighbor, count)
        arrays = plan._replace(key=key[:found].copy(), nearest=nearest[:found].copy())
        return cls(arrays=arrays, placed=arrays if order is places else arrays._replace(order=places))


PLANS: Handles[PairPlan] = Handles()


@compiled
def _spread(ptr: IntArray, neighbor: IntArray) -> int:
    """The most places between an atom and a neighbour."""
    most = 0
    for i in range(len(ptr) - 1):
        for shell in range(ptr[i], ptr[i + 1]):
            most = max(most, abs(neighbor[shell] - i))
    return most


@compiled
def _cluster(ptr: IntArray, neighbor: IntArray, order: IntArray) -> None:
    """Fill the order: an atom, its nearest that have no place yet, then the nearest one left of the last of them."""
    atoms = len(ptr) - 1
    placed = np.zeros(atoms, np.bool_)
    count, next_free = 0, 0
    seed = 0
    while count < atoms:
        placed[seed], order[count] = True, seed
        count, last = count + 1, seed
        limit = count + CLUSTER
        for shell in range(ptr[seed], ptr[seed + 1]):
            j = neighbor[shell]
            if not placed[j] and count < limit:
                placed[j], order[count], last = True, j, j
                count += 1
        seed = -1
        for shell in range(ptr[last], ptr[last + 1]):
            if seed < 0 and not placed[neighbor[shell]]:
                seed = neighbor[shell]
        while seed < 0 and next_free < atoms:
            if not placed[next_free]:
                seed = next_free
            next_free += 1


@compiled
def _join(plan: Plan, neighbor: IntArray, count: IntArray) -> int:
    """Fill the plan's arrays from farness on, and say how many pairs there are.

    neighbor, count (S,): each shell's atom j, as the batch counts, and its images.
    """
    atoms = len(plan.order)
    place, seen = np.empty(atoms, np.int64), np.full(atoms, -1, np.int64)
    for i in range(atoms):
        place[plan.order[i]] = i
    found = 0
    for i in range(atoms):
        first = found
        for shell in range(plan.start[i], plan.stop[i]):
            j = place[neighbor[shell]]
            if seen[j] < first:
                seen[j] = found
                plan.key[found], plan.nearest[found] = j, shell - plan.start[i]
                found += 1
            plan.pair[shell] = seen[j] - first
            plan.farness[shell] = -(plan.distance[shell] ** 2)
            plan.images[shell] = count[shell]
        plan.pair_ptr[i + 1] = found
    return found


@compiled
def sort_by_key(plan: Plan, pairs: IntArray, groups: int) -> ByKey:
    """The lists of the first ``pairs`` (N,) of each atom, for so many groups of eight heads."""
    atoms = len(plan.order)
    first, ptr = np.zeros(atoms + 1, np.int64), np.zeros(atoms + 1, np.int64)
    for i in range(atoms):
        first[i + 1] = first[i] + pairs[i]
        for pair in range(plan.pair_ptr[i], plan.pair_ptr[i] + pairs[i]):
            ptr[plan.key[pair] + 1] += 1
    for j in range(atoms):
        ptr[j + 1] += ptr[j]
    found = first[-1]
    query, rank = np.empty(found, np.int32), np.empty(found, np.int32)
    slot, slot_of = np.empty(found, np.int32), np.empty(found, np.int32)
    filled = ptr[:-1].copy()
    for i in range(atoms):
        for place in range(pairs[i]):
            j = plan.key[plan.pair_ptr[i] + place]
            query[filled[j]], rank[filled[j]] = i, place
            filled[j] += 1
    far = groups * found > FAR
    free = first[:-1:TOGETHER].copy()
    for x in range(found):
        own, part = first[query[x]] + rank[x], query[x] // TOGETHER
        slot[x] = free[part] if far else own
        slot_of[own] = slot[x]
        free[part] += 1
    return ByKey(first, ptr, query, rank, slot, slot_of, far)
