"""Tables on disk: the same table however it came in pieces, one chunk, readable where it is whole."""

import os
import time

import numpy as np
import pyarrow as pa
import pytest

from cluster.data import spool
from cluster.data.spool import MappedTable, write_table
from cluster.errors import UserError
from data_pipeline.crystal import structure_columns
from data_pipeline.schema import structure_schema
from data_pipeline.table import StructureTable
from tests.data_pipeline.samples import HARDNESS, caesium_chloride, mixed_rock_salt, rock_salt
from tests.users import as_nobody, needs_root

CRYSTALS = [rock_salt(), mixed_rock_salt(), caesium_chloride(), mixed_rock_salt(6.0), rock_salt(6.1)] * 4
VALUES = [None if i % 7 == 3 else 0.5 * i for i in range(len(CRYSTALS))]


@pytest.fixture
def table():
    ids = pa.array([f"crystal-{i}" if i else "é" for i in range(len(CRYSTALS))])
    columns = [ids, *structure_columns(CRYSTALS), pa.array(VALUES, pa.float64())]
    return pa.Table.from_arrays(columns, schema=structure_schema([HARDNESS]))


def cut(table, step):
    return [table.slice(i, step) for i in range(0, len(table), step)]


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_structure_table_in_pieces_is_the_whole(table, tmp_path, step):
    write_table(tmp_path / "sub" / "t.arrow", table.schema, cut(table, step), {"a": "b"})
    found = MappedTable(tmp_path / "sub" / "t.arrow").table
    found.validate(full=True)
    assert all(column.num_chunks == 1 for column in found.columns)
    assert found.schema.metadata == {**table.schema.metadata, b"a": b"b"}
    for name in table.schema.names:
        expected = table.column(name).to_pylist()
        if name == "disorder":
            expected = [row or [] for row in expected]
        elif name == "hardness":
            expected = [np.nan if value is None else value for value in expected]
        np.testing.assert_equal(found.column(name).to_pylist(), expected)
    write_table(tmp_path / "again.arrow", table.schema, [table], {"a": "b"})
    assert (tmp_path / "again.arrow").read_bytes() == (tmp_path / "sub" / "t.arrow").read_bytes()


def test_batches_of_it_are_those_of_the_original(table, tmp_path):
    write_table(tmp_path / "t.arrow", table.schema, cut(table, 4), {})
    here, there = (
        StructureTable.from_arrow(t, ["hardness"]) for t in (table, MappedTable(tmp_path / "t.arrow").table)
    )
    assert here.num_dropped == there.num_dropped == 3
    for rows in (np.array([5, 0, 9]), np.array([0])):
        a, b = here.gather(rows), there.gather(rows)
        for name in ("positions", "atomic_numbers", "lattice", "sizes"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("site", "atomic_number", "occupancy"):
            if a.disorder is not None:
                np.testing.assert_array_equal(getattr(a.disorder, name), getattr(b.disorder, name))
        assert (a.disorder is None) == (b.disorder is None)
        np.testing.assert_array_equal(here.targets(rows), there.targets(rows))


def test_no_rows_are_a_table_too(table, tmp_path):
    write_table(tmp_path / "t.arrow", table.schema, [], {})
    assert MappedTable(tmp_path / "t.arrow").table.num_rows == 0


def test_views_survive_a_release(table, tmp_path):
    write_table(tmp_path / "t.arrow", table.schema, [table], {})
    mapped = MappedTable(tmp_path / "t.arrow")
    view = StructureTable.from_arrow(mapped.table)
    before = view.gather(np.arange(5)).positions
    mapped.release()
    np.testing.assert_array_equal(view.gather(np.arange(5)).positions, before)


def test_files_of_another_kind_or_damaged_do_not_match(table, tmp_path):
    path = tmp_path / "t.arrow"
    assert MappedTable.matching(path, {}) is None
    write_table(path, table.schema, [table], {"a": "1"})
    assert MappedTable.matching(path, {"a": "1"}) is not None
    assert MappedTable.matching(path, {"a": "2"}) is None
    for content in (b"", b"nonsense" * 10, path.read_bytes()[:-200]):
        path.write_bytes(content)
        assert MappedTable.matching(path, {"a": "1"}) is None


def test_nothing_is_left_of_what_fails(table, tmp_path):
    def pieces():
        yield table
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_table(tmp_path / "t.arrow", table.schema, pieces(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_users_to_mend(table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="t.arrow: cannot be written: Not a directory"):
        write_table(tmp_path / "file" / "t.arrow", table.schema, [table], {})
    with pytest.raises(UserError, match="t.arrow: cannot be read on this node: No such file"):
        MappedTable(tmp_path / "t.arrow")
    assert os.listdir(tmp_path) == ["file"]


def test_writers_of_one_file_do_not_disturb_each_other(table, tmp_path):
    """Processes in containers have equal numbers."""
    path = tmp_path / "t.arrow"

    def pieces():
        yield table.slice(0, 5)
        write_table(path, table.schema, [table], {"by": "second"})
        yield table.slice(5)

    write_table(path, table.schema, pieces(), {"by": "first"})
    assert MappedTable(path).table.schema.metadata[b"by"] == b"first"
    assert MappedTable(path).table.num_rows == len(table)
    assert os.listdir(tmp_path) == ["t.arrow"]


def test_what_killed_writers_left_is_swept_after_a_day(table, tmp_path):
    old, young, other = (tmp_path / name for name in (".t.arrow.4711", ".t.arrow.abc", ".u.arrow.4711"))
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "0").write_bytes(b"part")
    long_ago = time.time() - 90_000
    for path in (old / "0", old, other / "0", other):
        os.utime(path, (long_ago, long_ago))
    write_table(tmp_path / "t.arrow", table.schema, [table], {})
    assert sorted(os.listdir(tmp_path)) == [".t.arrow.abc", ".u.arrow.4711", "t.arrow"]


@needs_root
def test_what_another_user_is_writing_is_let_be(tmp_path):
    theirs = tmp_path / ".t.arrow.abc"
    theirs.mkdir(0o700)
    (theirs / "0.data").touch()
    assert as_nobody(tmp_path, lambda: spool._sweep(tmp_path / "t.arrow")) == 0
    assert (theirs / "0.data").exists()
