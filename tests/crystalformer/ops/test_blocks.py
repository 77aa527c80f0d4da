"""The torch backend's plan: every shell in its place, padding that weighs nothing, tables that grow."""

import math

import pytest
import torch

from crystalformer.ops import RadialBasis, blocks
from crystalformer.ops.blocks import COLUMNS, QUERIES, UNION_FROM, make_plan
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal
from tests.crystalformer.ops.operands import attend, operands

RADIUS = 6.0


def crystals() -> list:
    """On both sides of every limit on size."""
    sizes = [1, 2, COLUMNS - 1, COLUMNS, COLUMNS + 1, QUERIES - 1, QUERIES, QUERIES + 1, 1, 5, 5, 5, 40, 13, 13]
    return [*(random_crystal(n, seed=n + at, skew=0.3) for at, n in enumerate(sizes)), *golden_crystals()]


def plan_of(batch, dtype=torch.float64, radius=RADIUS):
    return make_plan(batch, batch.shells(radius), dtype)


def test_the_plans_order_is_a_permutation_and_its_inverse():
    batch = batch_of(*crystals())
    plan = plan_of(batch)
    assert sorted(plan.order.tolist()) == list(range(batch.num_atoms))
    assert torch.equal(plan.order[plan.inverse], torch.arange(batch.num_atoms))


def test_blocks_follow_one_another_and_hold_whole_small_crystals_or_parts_of_one():
    batch = batch_of(*crystals(), random_crystal(UNION_FROM + 3, seed=0))
    plan = plan_of(batch)
    owner, end = batch.crystal[plan.order], 0
    for block in plan.blocks:
        assert block.start == end
        end += block.queries
        assert 1 <= block.queries <= QUERIES
        keys = owner[block.crystal]
        inside = owner[block.start : end]
        for crystal in inside.unique().tolist():  # every atom finds its whole crystal among the block's
            assert int((keys == crystal).sum()) == int(batch.sizes[crystal])
        if block.columns:
            assert int(batch.sizes[inside.unique()].max()) <= COLUMNS
            assert torch.equal(keys, inside)
        else:
            assert len(inside.unique()) == 1
            assert int(batch.sizes[inside[0]]) > COLUMNS
    assert end == batch.num_atoms


def test_small_crystals_share_blocks():
    batch = batch_of(*[golden_crystals()[2]] * 100)  # 200 atoms
    assert len(plan_of(batch).blocks) == math.ceil(200 / QUERIES)


def test_tables_hold_the_nearest_shells_of_every_atom():
    batch = batch_of(*crystals())
    plan, shells = plan_of(batch), batch.shells(RADIUS)
    for block in plan.blocks:
        rows = plan.tables(block, min(block.limit, 32)).rows
        for a in range(block.queries):
            atom = int(plan.order[block.start + a])
            first, last = shells.ptr[atom : atom + 2].tolist()
            count = min(last - first, rows.capacity)
            source = slice(first, first + count)
            assert int(rows.inside[a].sum()) == count
            assert rows.inside[a, :count].all()
            assert torch.equal(plan.order[rows.neighbor[a, :count]], shells.neighbor[source])
            assert torch.equal(rows.distance[a, :count], shells.distance[source])
            assert torch.equal(rows.squared[a, :count], shells.distance[source].square())
            assert torch.equal(rows.log_count[a, :count], shells.count[source].double().log())


def test_padding_has_no_weight_no_square_and_no_features():
    """A padded row weighs the smallest weight there is; times its squared distance that is still nothing."""
    plan = plan_of(batch_of(random_crystal(2, seed=0, volume=300.0), random_crystal(8, seed=1, volume=6.0)))
    (block,) = plan.blocks
    rows = plan.tables(block, block.limit).rows
    padding = ~rows.inside
    assert int(padding.sum()) > rows.capacity  # there is some
    assert (rows.squared[padding] == 0).all()
    assert (rows.log_count[padding] < -1000).all()
    features = plan.features(block, RadialBasis(count=16, r_max=10.0, width=0.7), rows.capacity)
    assert (features[padding] < 1e-80).all()


@pytest.mark.parametrize("radius", [0.5, 2.7, 4.4, RADIUS])
def test_rows_of_blocks_reach_every_atoms_radius(radius):
    """And no further than a step of rows beyond the atom that needs most."""
    batch = batch_of(*crystals())
    plan, shells = plan_of(batch), batch.shells(RADIUS)
    reach = torch.full((batch.num_atoms,), 0.5)
    reach[::3] = radius
    needed = plan.rows_of_blocks(plan.reached(reach))
    for block, rows in zip(plan.blocks, needed, strict=True):
        most = 0
        for position in range(block.start, block.start + block.queries):
            first, last = shells.ptr[plan.order[position] :][:2].tolist()
            most = max(most, int((shells.distance[first:last] <= reach[position]).sum()))
        assert most <= rows < most + blocks.ROW_STEP


def test_tables_grow_and_features_with_them():
    batch = batch_of(*golden_crystals())
    plan, radial = plan_of(batch, radius=8.0), RadialBasis(count=16, r_max=10.0, width=0.7)
    (block,) = plan.blocks
    small = plan.tables(block, 16)
    few = plan.features(block, radial, 16)
    assert plan.tables(block, 8) is small
    assert few.shape == (22, 16, 16)
    assert small.rows.capacity == 32  # an eighth more than 16, in steps of 16
    large = plan.tables(block, block.limit)
    assert large.rows.capacity >= block.limit > small.rows.capacity
    many = plan.features(block, radial, block.limit)
    assert torch.equal(many[:, :16], few)
    assert torch.equal(many, radial(large.rows.distance)[:, : block.limit])
    assert plan.tables(block, 16) is large


def test_features_too_large_to_keep_are_made_again(monkeypatch):
    crystals = [*golden_crystals(), random_crystal(20, seed=0)]
    given = operands(batch_of(*crystals), scale=0.6)
    kept = attend(batch_of(*crystals), given, "torch")
    monkeypatch.setattr(blocks, "FEATURE_LIMIT", 0)
    made_again = attend(batch_of(*crystals), given, "torch")
    assert all(torch.equal(kept[name], made_again[name]) for name in kept)
    plan, radial = plan_of(batch_of(*crystals)), RadialBasis(count=16, r_max=10.0, width=0.7)
    plan.tables(plan.blocks[0], 16)
    plan.features(plan.blocks[0], radial, 16)
    assert not plan.blocks[0].features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_have_the_dtype_of_the_operands(dtype):
    plan = plan_of(batch_of(*golden_crystals()), dtype)
    rows = plan.tables(plan.blocks[0], 16).rows
    assert rows.distance.dtype == rows.squared.dtype == rows.log_count.dtype == dtype


def test_parts_of_a_large_crystal_read_their_neighbours_only():
    n = 3 * UNION_FROM
    plan = plan_of(batch_of(random_crystal(n, seed=0, skew=0.1)), radius=4.0)  # few of its atoms lie in 4 Å: it is 23
    keys = [plan.tables(block, block.limit).num_keys for block in plan.blocks]
    assert max(keys) < 0.5 * n
    small = plan_of(batch_of(random_crystal(UNION_FROM, seed=0)), radius=4.0)
    assert {small.tables(block, block.limit).num_keys for block in small.blocks} == {UNION_FROM}
