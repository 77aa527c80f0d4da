"""The pairs of a plan as keys walk them, and where their gradients lie."""

import numpy as np
import pytest

from crystalformer.ops.numba.kernels import FAR, _put
from crystalformer.ops.numba.pairs import TOGETHER, PairPlan, sort_by_key
from crystalformer.ops.numba.simd import LANES, compiled
from tests.crystalformer.crystals import batch_of, random_crystal, supercell

CRYSTALS = {
    "small": lambda: [random_crystal(n, seed=n) for n in (1, 5, 2)],
    "some parts": lambda: [random_crystal(n, seed=n) for n in (70, 1, 33, 40)],
    "one of its own order": lambda: [supercell(random_crystal(40, seed=4), 4, 2, 2)],
}


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_every_pair_in_reach_is_at_its_key_once_and_has_a_slot_beside_others_of_that_key(name, share):
    plan = PairPlan.of(batch_of(*CRYSTALS[name]()).unmerged(4.0).shells(4.0)).arrays
    atoms, all_pairs = len(plan.order), np.diff(plan.pair_ptr)
    pairs = np.random.default_rng(0).binomial(all_pairs, share)
    by_key = sort_by_key(plan, pairs)
    query = np.repeat(np.arange(atoms), pairs)
    first = np.append(0, np.cumsum(pairs))
    rank = np.arange(first[-1]) - first[query]
    key = plan.key[plan.pair_ptr[query] + rank]
    order = np.lexsort((query, key))
    np.testing.assert_array_equal(by_key.first, first)
    np.testing.assert_array_equal(by_key.ptr, np.searchsorted(key[order], np.arange(atoms + 1)))
    np.testing.assert_array_equal(by_key.query, query[order])
    np.testing.assert_array_equal(by_key.rank, rank[order])
    np.testing.assert_array_equal(by_key.slot, by_key.slot_of[order])
    by_slot = np.argsort(by_key.slot_of)
    np.testing.assert_array_equal(by_key.slot_of[by_slot], np.arange(len(key)))
    np.testing.assert_array_equal(by_slot, np.lexsort((query, key, query // TOGETHER)))


@compiled
def put(own, slots, first, out):
    _put(own, slots, first, out)


@pytest.mark.parametrize("length", [FAR, 2 * FAR])
def test_pairs_come_to_their_slots_past_the_caches_or_not(length):
    count, first = 300, 1000
    whole = np.zeros(length + 16, np.float32)
    out = whole[-whole.ctypes.data // 4 % 16 :][:length]
    own = np.random.default_rng(0).normal(size=(count, 2 * LANES)).astype(np.float32)
    slots = np.random.default_rng(1).permutation(length // (2 * LANES) - first)[:count].astype(np.int32)
    put(own.ravel(), slots, first, out)
    rows = out.reshape(-1, 2 * LANES)
    np.testing.assert_array_equal(rows[first + slots], own)
    assert np.count_nonzero(rows.any(axis=1)) == count
