"""From table rows to model input, and target values there and back."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.data.feed import Feed, TargetScaling
from cluster.data.tables import open_split
from crystalformer import CrystalBatch, Crystalformer
from data_pipeline.table import FINGERPRINT_KEY, read_table
from tests.cluster.small import SMALL_MODEL, TARGETS

CPU = torch.device("cpu")
PLAIN = TargetScaling(scale=(1.0, 1.0), bias=(0.0, 0.0))


@pytest.fixture(scope="module")
def rows_on_disk(elastic):
    return read_table(elastic.split_path("val"), TARGETS).to_pylist()


@pytest.fixture(scope="module")
def feed(small_tables):
    return Feed(small_tables["val"], TARGETS, SMALL_MODEL.neighbor_radius, PLAIN)


@pytest.mark.parametrize("rows", [[0], [9, 2, 5, 2], list(range(30, 10, -1))])
def test_a_batch_is_the_rows_in_order(feed, rows_on_disk, rows):
    batch, target = feed.batch(np.array(rows), CPU)
    chosen = [rows_on_disk[row] for row in rows]
    expected = CrystalBatch.from_arrays(
        np.concatenate([row["positions"] for row in chosen]),
        np.concatenate([row["atomic_numbers"] for row in chosen]),
        np.array([row["lattice"] for row in chosen]).reshape(-1, 3, 3),
        [len(row["atomic_numbers"]) for row in chosen],
    )
    for name in ("positions", "atomic_numbers", "lattice", "sizes"):
        found, wanted = getattr(batch, name), getattr(expected, name)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted), name
    assert target.dtype == torch.float32
    assert target.tolist() == pytest.approx(np.array([[row["shear"], row["bulk"]] for row in chosen]), rel=1e-6)


def test_the_model_sees_the_same_with_kept_shells(feed):
    """Kept distances are float32: the output differs by rounding alone."""
    torch.manual_seed(1)
    model = Crystalformer(SMALL_MODEL, backend="torch")
    batch, _ = feed.batch(np.arange(20), CPU)
    afresh = CrystalBatch.from_arrays(batch.positions, batch.atomic_numbers, batch.lattice, batch.sizes)
    model.freeze_statistics(batch)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(batch), model(afresh), rtol=1e-5, atol=1e-6)
    kept, found = (one.distinct(SMALL_MODEL.neighbor_radius) for one in (batch, afresh))
    assert kept.shells(SMALL_MODEL.neighbor_radius).distance.dtype == torch.float32
    assert found.shells(SMALL_MODEL.neighbor_radius).distance.dtype == torch.float64


def test_targets_come_normalized_in_the_order_asked_for(small_tables, feed):
    scaling = TargetScaling(scale=(0.5, 2.0), bias=(2.0, 1.0))
    swapped = Feed(small_tables["val"], ("bulk", "shear"), SMALL_MODEL.neighbor_radius, scaling)
    rows = np.array([3, 1])
    raw, found = feed.batch(rows, CPU)[1], swapped.batch(rows, CPU)[1]
    assert torch.allclose(found, (raw[:, [1, 0]] - torch.tensor([2.0, 1.0])) / torch.tensor([0.5, 2.0]), rtol=1e-6)


def test_rows_without_a_target_are_left_out_with_their_shells(elastic, tmp_path, feed):
    """Shells stay with their crystals where a row between them is left out."""
    table = read_table(elastic.split_path("val"), TARGETS)
    values = table.column("shear").to_pylist()
    values[0] = values[4] = None
    holed = table.set_column(table.column_names.index("shear"), table.schema.field("shear"), pa.array(values))
    dataset = _Prepared(elastic, tmp_path, holed)
    tables = open_split(dataset, "val", TARGETS, SMALL_MODEL.neighborhood)
    found = Feed(tables, TARGETS, SMALL_MODEL.neighbor_radius, PLAIN)
    kept = np.array([row for row in range(feed.num_rows) if row not in (0, 4)])
    assert found.num_rows == len(kept)
    assert np.array_equal(found.costs, feed.costs[kept])
    for mine, theirs in zip(found.batch(np.arange(10), CPU), feed.batch(kept[:10], CPU), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
        else:
            assert torch.equal(mine.positions, theirs.positions)
            radius = SMALL_MODEL.neighbor_radius
            lists = [one.distinct(radius).shells(radius) for one in (mine, theirs)]
            assert torch.equal(lists[0].distance, lists[1].distance)


class _Prepared:
    """A prepared data set whose split ``val`` is another table."""

    def __init__(self, original, path, table):
        import pyarrow.parquet as pq

        self.path, self.fingerprint = path, original.fingerprint + "-holed"
        table = table.replace_schema_metadata({**table.schema.metadata, FINGERPRINT_KEY.encode(): self.fingerprint})
        (path / "val").mkdir()
        pq.write_table(table, path / "val" / "part-0.parquet")

    def split_path(self, split):
        return self.path / split


def test_a_model_in_reciprocal_space_needs_no_shells(elastic):
    config = replace(SMALL_MODEL, domain="reci")
    tables = open_split(elastic, "val", TARGETS, config.neighborhood)
    found = Feed(tables, TARGETS, config.neighbor_radius, PLAIN)
    batch, _ = found.batch(np.arange(8), CPU)
    assert config.neighbor_radius == 0
    assert np.array_equal(found.costs[:8], batch.sizes.numpy() ** 2)
    torch.manual_seed(1)
    model = Crystalformer(config, backend="torch")
    model.freeze_statistics(batch)
    afresh = CrystalBatch.from_arrays(batch.positions, batch.atomic_numbers, batch.lattice, batch.sizes)
    assert torch.equal(model(batch), model(afresh))


# Target scaling -------------------------------------------------------------------------------------------------

VALUES = np.array([[1.0, 10.0], [3.0, 10.0], [8.0, 40.0]])
STD, MEAN = VALUES.std(0), VALUES.mean(0)


@pytest.mark.parametrize(
    ("mode", "scale", "bias"),
    [
        ("scale_bias", STD, MEAN),
        ("bias", [1.0, 1.0], MEAN),
        ("scale", STD, [0.0, 0.0]),
        ("no", [1.0, 1.0], [0.0, 0.0]),
    ],
)
def test_scaling_takes_out_what_it_is_told(mode, scale, bias):
    scaling = TargetScaling.fit(VALUES, mode)
    assert scaling.scale == pytest.approx(tuple(scale))
    assert scaling.bias == pytest.approx(tuple(bias))
    normalized = scaling.normalize(VALUES)
    assert normalized == pytest.approx((VALUES - bias) / scale)
    assert scaling.restore(normalized) == pytest.approx(VALUES)


def test_std_is_that_of_the_population():
    assert TargetScaling.fit(np.array([[0.0], [2.0]]), "scale").scale == (1.0,)


@pytest.mark.parametrize("mode", ["scale_bias", "scale"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-300])
def test_a_target_of_one_value_is_not_scaled(mode, value):
    """numpy's std of 0.1, 0.1, ... is 1e-17 rather than 0."""
    constant = np.column_stack([np.full(7, value), np.arange(7.0)])
    scaling = TargetScaling.fit(constant, mode)
    assert scaling.scale == (1.0, 2.0)
    assert np.abs(scaling.normalize(constant)[:, 0]).max() <= abs(value)
