"""Reading rows of a structure table as packed arrays."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.crystal import read_crystals, structure_columns
from data_pipeline.errors import DataError
from data_pipeline.schema import structure_schema
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.table import StructureTable, read_table
from tests.data_pipeline.samples import HARDNESS, caesium_chloride, mixed_rock_salt, rock_salt


def make_table(values):
    crystals = [[rock_salt, mixed_rock_salt, caesium_chloride][i % 3](5 + 0.1 * i) for i in range(len(values))]
    columns = [pa.array([f"m{i}" for i in range(len(values))]), *structure_columns(crystals), pa.array(values)]
    return pa.Table.from_arrays(columns, schema=structure_schema([HARDNESS])), crystals


def check_against(packed, crystals):
    assert packed.sizes.tolist() == [len(c.atomic_numbers) for c in crystals]
    assert np.array_equal(packed.positions, np.concatenate([c.positions for c in crystals]))
    assert np.array_equal(packed.atomic_numbers, np.concatenate([c.atomic_numbers for c in crystals]))
    assert np.array_equal(packed.lattice, np.array([c.lattice for c in crystals]))
    assert packed.positions.dtype == packed.lattice.dtype == np.float64
    assert packed.atomic_numbers.dtype == packed.sizes.dtype == np.int64
    sites, start = [], 0
    for c in crystals:
        sites += [] if c.disorder is None else (c.disorder.site + start).tolist()
        start += len(c.atomic_numbers)
    assert ([] if packed.disorder is None else packed.disorder.site.tolist()) == sites


@pytest.mark.parametrize("form", ["whole", "sliced", "chunked"])
def test_gather_any_rows(form):
    whole, crystals = make_table([float(i) for i in range(12)])
    if form == "sliced":
        whole, crystals = whole.slice(3, 7), crystals[3:10]
    if form == "chunked":
        whole, crystals = pa.concat_tables([whole.slice(1, 4), whole.slice(6)]), [*crystals[1:5], *crystals[6:]]
    table = StructureTable.from_arrow(whole, ["hardness"])
    rows = np.array([5, 0, 0, 6, 2])
    check_against(table.gather(rows), [crystals[i] for i in rows])
    assert table.targets(rows)[:, 0].tolist() == [whole["hardness"][int(i)].as_py() for i in rows]
    assert table.material_ids(rows) == [whole["material_id"][int(i)].as_py() for i in rows]
    assert table.sizes.tolist() == [len(c.atomic_numbers) for c in crystals]


def test_no_rows_and_ordered_rows_have_no_disorder():
    table = StructureTable.from_arrow(make_table([0.0] * 6)[0])
    empty = table.gather(np.array([], dtype=np.int64))
    assert empty.positions.shape == (0, 3) and empty.lattice.shape == (0, 3, 3) and len(empty.sizes) == 0
    assert table.gather(np.array([0, 2])).disorder is None
    disorder = table.gather(np.array([0, 1])).disorder
    assert disorder.site.tolist() == np.repeat(np.arange(8, 12), 2).tolist()
    assert disorder.atomic_number.tolist() == [11, 19] * 4 and disorder.occupancy.tolist() == [0.5] * 8


def test_rows_without_the_target_are_dropped_and_counted():
    whole, crystals = make_table([0.0, None, 2.0, float("nan"), 4.0])
    table = StructureTable.from_arrow(whole, ["hardness"])
    assert (table.num_rows, table.num_dropped) == (3, 2)
    assert table.targets()[:, 0].tolist() == [0, 2, 4]
    assert table.material_ids() == ["m0", "m2", "m4"]
    check_against(table.gather(np.array([2, 1])), [crystals[4], crystals[2]])
    assert StructureTable.from_arrow(whole).num_rows == 5
    with pytest.raises(IndexError, match=r"rows must be in 0\.\.2, got 3\.\.3"):
        table.gather(np.array([3]))
    with pytest.raises(IndexError):
        table.targets(np.array([-1]))


def test_arrays_are_views_of_the_arrow_buffers():
    whole, _ = make_table([0.0] * 4)
    table = StructureTable.from_arrow(whole)
    address = whole["positions"].chunk(0).values.values.buffers()[1].address
    assert table._positions.__array_interface__["data"][0] == address


def test_folder_of_shards(tmp_path):
    whole, crystals = make_table([float(i) for i in range(9)])
    pq.write_table(whole.slice(0, 5), tmp_path / "part-00000.parquet")
    pq.write_table(whole.slice(5), tmp_path / "part-00001.parquet")
    table = StructureTable.open(tmp_path, ["hardness"])
    check_against(table.gather(np.arange(9)), crystals)
    assert all(column.num_chunks == 1 for column in read_table(tmp_path).columns)
    with pytest.raises(DataError, match="column 'bulk' is missing"):
        StructureTable.open(tmp_path, ["bulk"])
    (tmp_path / "part-00002.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"part-00002.parquet: not a Parquet file"):
        StructureTable.open(tmp_path)
    with pytest.raises(DataError, match="no Parquet files"):
        StructureTable.open(tmp_path / "nowhere")


def test_unequal_lists_are_refused():
    whole, _ = make_table([0.0, 1.0, 2.0])
    index = whole.schema.get_field_index("positions")
    moved = pa.concat_arrays([whole["positions"].chunk(0).slice(2), whole["positions"].chunk(0).slice(0, 2)])
    with pytest.raises(DataError, match="another number of positions"):
        StructureTable.from_arrow(whole.set_column(index, whole.schema.field(index), moved))


def test_speed_at_batch_128():
    source = pq.read_table(FOLDER / "elastic_tensor_2015.parquet")
    table = StructureTable.from_arrow(source, ["shear"])
    check_against(table.gather(np.arange(200)), read_crystals(source.slice(0, 200)))
    order = np.random.default_rng(0).permutation(table.num_rows)
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        for i in range(0, 1024, 128):
            table.gather(order[i : i + 128])
        best = min(best, time.perf_counter() - start)
    assert 1024 / best > 100_000
