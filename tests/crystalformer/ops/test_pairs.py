"""From pairs to shells and back: both ways do what a loop over shells does."""

import pytest
import torch

from crystalformer.ops.blocks import make_plan
from crystalformer.ops.pairs import PairColumns, PairLookup
from tests.crystalformer.crystals import batch_of, random_crystal

HEADS = 3
SMALL = [3, 5, 1, 4]
LARGE = 20


def tables_of(kind: str, rows: int):
    """A block's tables with ``rows`` rows: of several small crystals, a larger one, or the neighbours in it."""
    if kind == "columns":
        batch = batch_of(*(random_crystal(n, seed=n) for n in SMALL))
    else:
        batch = batch_of(random_crystal(LARGE, seed=0, volume=40.0))
    plan = make_plan(batch, batch.shells(5.0), torch.float64)
    (block,) = plan.blocks
    tables = plan.tables(block, block.limit)
    if kind == "union":
        tables = PairLookup.build(tables.rows, block.crystal, union_from=0)
    assert isinstance(tables, PairColumns if kind == "columns" else PairLookup)
    assert rows <= tables.rows.capacity
    return tables


def keys_of(tables) -> list[int]:
    """Plan position of each key."""
    return (
        list(range(tables.keys.start, tables.keys.stop)) if isinstance(tables.keys, slice) else tables.keys.tolist()
    )


def real_rows(tables, rows: int):
    """(a, row, key) of every row that is not padding among the first ``rows``."""
    keys = {position: key for key, position in enumerate(keys_of(tables))}
    for a, row in tables.rows.inside[:, :rows].nonzero().tolist():
        yield a, row, keys[int(tables.rows.neighbor[a, row])]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=["columns", "lookup", "union"])
def kind(request):
    return request.param


@pytest.mark.parametrize("rows", [16, 32])
def test_exponent_is_score_less_distance_plus_log_count(kind, rows):
    tables = tables_of(kind, rows)
    queries, keys = len(tables.rows.distance), len(keys_of(tables))
    scores, c = draw(HEADS, queries, keys), 0.1 + draw(HEADS, queries).abs()
    for shift in (None, draw(HEADS, queries)):
        found, used = tables.exponent(scores, c, shift, torch.empty(queries * HEADS * rows, dtype=torch.float64))
        assert found.shape == (queries, HEADS, rows)
        assert shift is None or torch.equal(used, shift)
        table = tables.rows
        for a, row, key in real_rows(tables, rows):
            expected = scores[:, a, key] - c[:, a] * table.squared[a, row] + table.log_count[a, row] - used[:, a]
            torch.testing.assert_close(found[a, :, row], expected, rtol=1e-12, atol=1e-12)
        padding = ~table.inside[:, :rows]
        assert (found.transpose(1, 2)[padding] < -1000).all()


def test_own_shift_keeps_exponents_near_zero(kind):
    """At most the log of a shell's images above 0, and never below it: sums of exp neither overflow nor vanish."""
    tables = tables_of(kind, 32)
    queries, keys = len(tables.rows.distance), len(keys_of(tables))
    exponent, _ = tables.exponent(
        300 * draw(HEADS, queries, keys),
        0.1 + draw(HEADS, queries).abs(),
        None,
        torch.empty(queries * HEADS * 32, dtype=torch.float64),
    )
    largest = exponent.amax(-1)
    assert (largest <= float(tables.rows.log_count.max()) + 1e-9).all()
    assert (largest >= -1e-9).all()


def test_spread_gives_each_shell_its_pairs_number(kind):
    tables, rows = tables_of(kind, 16), 16
    queries, keys = len(tables.rows.distance), len(keys_of(tables))
    scores, inner = draw(HEADS, queries, keys), draw(HEADS, queries)
    found = tables.spread(scores, inner, torch.empty(queries * HEADS * rows, dtype=torch.float64))
    for a, row, key in real_rows(tables, rows):
        torch.testing.assert_close(found[a, :, row], scores[:, a, key] - inner[:, a], rtol=1e-12, atol=1e-12)


def test_collapse_sums_shells_by_pair_by_square_and_in_all(kind):
    tables, rows = tables_of(kind, 32), 32
    queries, keys = len(tables.rows.distance), len(keys_of(tables))
    values = draw(queries, HEADS, rows) * tables.rows.inside[:, None, :rows]
    pairs, squared = torch.zeros(HEADS, queries, keys).double(), torch.zeros(HEADS, queries).double()
    for a, row, key in real_rows(tables, rows):
        pairs[:, a, key] += values[a, :, row]
        squared[:, a] += values[a, :, row] * tables.rows.squared[a, row]
    buffer = torch.full(
        (HEADS * queries * (keys + 1) * tables.depth,), 7.0
    ).double()  # what a block before left there
    found = tables.collapse(values, buffer)
    torch.testing.assert_close(found.pairs, pairs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.squared, squared, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.total, values.sum(-1).T, rtol=1e-12, atol=1e-12)


def test_shells_of_a_pair_are_put_in_slots_of_their_own():
    """Nothing is added in place, so the order of a sum is the same on every device."""
    tables = tables_of("lookup", 32)
    assert tables.depth > 1
    for slots, inside in zip(tables.slot, tables.rows.inside, strict=True):
        taken = slots[inside]
        assert len(taken.unique()) == len(taken)
        assert (taken % (tables.num_keys + 1) < tables.num_keys).all()
        assert int(taken.max()) < tables.depth * (tables.num_keys + 1)


def test_only_neighbours_are_keys_of_the_union():
    tables = tables_of("union", 16)
    near = set(tables.rows.neighbor[tables.rows.inside].tolist())
    assert set(keys_of(tables)) >= near
    assert tables.num_keys == len(keys_of(tables))
