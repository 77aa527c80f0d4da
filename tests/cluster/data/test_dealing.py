"""Batches and who works on them: seed, epoch and costs alone decide; what cost-balanced dealing gains."""

import numpy as np
import pytest

from cluster.data.dealing import deal, global_batches, micro_batches, permutation
from cluster.data.shells import ShellTable
from cluster.data.tables import open_split
from cluster.settings.config import TrainConfig


def random_costs(rows: int) -> np.ndarray:
    return np.random.default_rng(3).lognormal(6, 1.5, rows).astype(np.int64)


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    first = permutation(1000, 5, 1)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, permutation(1000, 5, 1))
    assert not np.array_equal(first, permutation(1000, 5, 2))
    assert not np.array_equal(first, permutation(1000, 6, 1))


def test_seed_and_epoch_do_not_mix():
    """Were they added, seed 5 would see in epoch 2 what seed 6 sees in epoch 1."""
    assert not np.array_equal(permutation(100, 5, 2), permutation(100, 6, 1))


@pytest.mark.parametrize(
    ("rows", "size", "count"), [(100, 32, 3), (96, 32, 3), (95, 32, 2), (31, 32, 0), (32, 32, 1)]
)
def test_the_last_partial_batch_is_dropped(rows, size, count):
    batches = global_batches(rows, size, 1, 1)
    assert [len(batch) for batch in batches] == [size] * count
    seen = np.concatenate([*batches, []])
    assert len(set(seen)) == len(seen) == count * size
    assert np.array_equal(seen, permutation(rows, 1, 1)[: count * size])


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("at_least", [1, 4])
def test_every_row_is_dealt_once(parts, at_least):
    rows = permutation(500, 1, 1)[:64]
    costs = random_costs(64)
    dealt = deal(rows, costs, parts, at_least=at_least)
    assert len(dealt) == parts
    assert min(len(part) for part in dealt) >= at_least
    assert sorted(np.concatenate(dealt)) == sorted(rows)
    cost_of = dict(zip(rows.tolist(), costs.tolist(), strict=True))
    for part in dealt:
        assert [cost_of[row] for row in part.tolist()] == sorted(cost_of[row] for row in part.tolist())


def test_the_batch_is_the_same_whatever_the_workers():
    batch = permutation(500, 1, 1)[:64]
    costs = random_costs(500)
    for accumulation in (1, 3):
        alone = [np.sort(part[0]) for part in micro_batches(batch, costs, 1, accumulation)]
        assert sorted(np.concatenate(alone)) == sorted(batch)
        for workers in (2, 3, 8):
            shared = micro_batches(batch, costs, workers, accumulation)
            assert [len(part) for part in shared] == [workers] * accumulation
            for part, expected in zip(shared, alone, strict=True):
                assert np.array_equal(np.sort(np.concatenate(part)), expected)


@pytest.mark.parametrize(("workers", "accumulation"), [(2, 2), (4, 1), (1, 4), (2, 1)])
def test_one_huge_crystal_leaves_no_part_empty(workers, accumulation):
    costs = np.array([10**9, 1, 1, 1])
    parts = micro_batches(np.arange(4), costs, workers, accumulation)
    assert min(len(rows) for part in parts for rows in part) >= 1
    assert sorted(row for part in parts for rows in part for row in rows.tolist()) == [0, 1, 2, 3]


def test_crystals_without_cost_are_spread_too():
    assert [len(part) for part in deal(np.arange(8), np.zeros(8, dtype=np.int64), 4)] == [2, 2, 2, 2]


def test_fewer_rows_than_parts_leave_some_empty():
    assert sorted(len(part) for part in deal(np.arange(2), np.array([3, 5]), 4)) == [0, 0, 1, 1]


def test_costs_are_even_over_8_workers(elastic):
    """S3: the busiest worker's work over the mean, at a batch of 256 real crystals; rows in turn are far worse.

    A batch whose largest crystal alone is more than an eighth of the work cannot be dealt evenly, by whatever way.
    """
    around = TrainConfig.from_flat({"target": ["shear"]}).model.neighborhood
    costs = ShellTable(open_split(elastic, "train", ("shear",), around).shells, around.radius).costs

    def imbalance(parts, at_best):
        return max(costs[part].sum() for part in parts) / at_best

    batches = [batch for epoch in range(1, 6) for batch in global_batches(len(costs), 256, 123, epoch)]
    means = [costs[batch].sum() / 8 for batch in batches]
    dealt = [deal(batch, costs[batch], 8) for batch in batches]
    assert np.mean([imbalance(parts, mean) for parts, mean in zip(dealt, means, strict=True)]) <= 1.05
    for batch, parts, mean in zip(batches, dealt, means, strict=True):
        assert imbalance(parts, max(mean, costs[batch].max())) <= 1.05
    in_turn = [[batch[worker::8] for worker in range(8)] for batch in batches]
    assert np.mean([imbalance(parts, mean) for parts, mean in zip(in_turn, means, strict=True)]) > 1.2
