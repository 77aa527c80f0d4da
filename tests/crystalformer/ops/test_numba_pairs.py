"""The pairs of a plan as keys walk them, and where their gradients lie."""

import numpy as np
import pytest

from crystalformer.ops.numba.kernels import _put
from crystalformer.ops.numba.pairs import FAR, TOGETHER, PairPlan, sort_by_key
from crystalformer.ops.numba.simd import LANES, compiled
from tests.crystalformer.crystals import batch_of, random_crystal, supercell

CRYSTALS = {
    "small": lambda: [random_crystal(n, seed=n) for n in (1, 5, 2)],
    "some parts": lambda: [random_crystal(n, seed=n) for n in (70, 1, 33, 40)],
    "one of its own order": lambda: [supercell(random_crystal(40, seed=4), 4, 2, 2)],
}


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize(("share", "groups"), [(1.0, 1), (0.4, 1), (0.7, FAR)])
def test_every_pair_in_reach_is_at_its_key_once_and_where_there_are_many_beside_others_of_it(name, share, groups):
    plan = PairPlan.of(batch_of(*CRYSTALS[name]()).unmerged(4.0).shells(4.0)).arrays
    atoms, all_pairs = len(plan.order), np.diff(plan.pair_ptr)
    pairs = np.random.default_rng(0).binomial(all_pairs, share)
    by_key = sort_by_key(plan, pairs, groups)
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
    assert by_key.far == (groups == FAR)
    expected = np.lexsort((query, key, query // TOGETHER)) if by_key.far else np.arange(len(key))
    np.testing.assert_array_equal(by_slot, expected)


@compiled
def put(own, by_key, out):
    _put(own, by_key, 1, 2, len(own) // (2 * LANES), out)


@pytest.mark.parametrize("far", [True, False])
def test_pairs_that_are_far_come_to_their_slots(far):
    plan = PairPlan.of(batch_of(random_crystal(90, seed=1)).unmerged(4.0).shells(4.0)).arrays
    pairs = np.diff(plan.pair_ptr)
    by_key = sort_by_key(plan, pairs, FAR if far else 1)
    whole = np.zeros((2 * len(plan.key) + 1) * 2 * LANES, np.float32)
    out = whole[-whole.ctypes.data // 4 % 16 :][: 2 * len(plan.key) * 2 * LANES]
    own = np.random.default_rng(0).normal(size=(pairs[2], 2 * LANES)).astype(np.float32)
    put(own.ravel(), by_key, out)
    expected = np.zeros((2 * len(plan.key), 2 * LANES), np.float32)
    if far:
        expected[len(plan.key) + by_key.slot_of[pairs[:2].sum() :][: pairs[2]]] = own
    np.testing.assert_array_equal(out.reshape(expected.shape), expected)
