"""Shells kept beside the data: the same as found afresh, read without copying, replaced when out of date.

So are the structures that lie beside them.
"""

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.data import shells as module
from cluster.data import tables
from cluster.data.feed import batch_of_packed
from cluster.data.shells import ATOM_SHELLS, SCHEMA, ShellTable, cached_shells
from cluster.data.tables import cached_structures
from crystalformer.batch import PackedShells
from crystalformer.config import Neighborhood
from crystalformer.neighbors import find_shells
from data_pipeline.schema import VERSION_KEY
from data_pipeline.table import StructureTable, read_table

RADIUS = 5.0
AROUND = Neighborhood(RADIUS, distinct=False)


@pytest.fixture(scope="module")
def rows_on_disk(elastic):
    return read_table(elastic.split_path("test"))


@pytest.fixture(scope="module")
def structures(rows_on_disk):
    return StructureTable.from_arrow(rows_on_disk)


@pytest.fixture(scope="module")
def few(rows_on_disk):
    """4 crystals, and 4 others."""
    return StructureTable.from_arrow(rows_on_disk.slice(0, 4)), StructureTable.from_arrow(rows_on_disk.slice(4, 4))


@pytest.fixture(scope="module")
def table(structures, tmp_path_factory):
    return cached_shells(tmp_path_factory.mktemp("shells"), "test", structures, AROUND, "abc")


def found_afresh(structures, rows) -> PackedShells:
    crystals = [structures.gather(np.array([row])) for row in rows]
    found = [find_shells(c.positions, c.lattice[0], RADIUS) for c in crystals]
    return PackedShells.pack(found, [int(c.sizes[0]) for c in crystals], RADIUS)


@pytest.mark.parametrize("rows", [[0], [5, 3, 8, 3], list(range(40, 10, -1))])
def test_packed_shells_are_those_found_afresh(structures, table, rows):
    rows = np.array(rows)
    packed = ShellTable(table, RADIUS).pack(rows)
    expected = found_afresh(structures, rows)
    assert packed.radius == RADIUS
    assert torch.equal(packed.ptr, expected.ptr)
    assert torch.equal(packed.neighbor, expected.neighbor)
    assert torch.equal(packed.count.long(), expected.count)
    assert packed.distance.dtype == torch.float32
    assert torch.equal(packed.distance, expected.distance.float())


@pytest.mark.parametrize("rows", [[0], [5, 3, 8, 3], list(range(40, 10, -1))])
def test_a_batch_gets_the_distinct_atoms_that_it_would_find(structures, few, tmp_path, rows):
    table = cached_shells(tmp_path, "test", structures, Neighborhood(RADIUS), "abc")
    rows = np.array(rows)
    batch, afresh = (batch_of_packed(structures.gather(rows)) for _ in range(2))
    ShellTable(table, RADIUS).attach(batch, rows)
    found, expected = batch.distinct(RADIUS), afresh.distinct(RADIUS)
    assert found.num_atoms < batch.num_atoms
    for name in ("positions", "atomic_numbers", "lattice", "sizes"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.multiplicity.long(), expected.multiplicity)
    mine, theirs = found.shells(RADIUS), expected.shells(RADIUS)
    assert torch.equal(mine.ptr, theirs.ptr) and torch.equal(mine.neighbor, theirs.neighbor)
    assert torch.equal(mine.count.long(), theirs.count)
    assert torch.equal(mine.distance, theirs.distance.float())


def test_costs_are_shells_and_atoms(structures, table):
    costs = ShellTable(table, RADIUS).costs
    assert len(costs) == structures.num_rows
    found = found_afresh(structures, [7])
    assert costs[7] == len(found.neighbor) + ATOM_SHELLS * (len(found.ptr) - 1)


def test_a_sliced_or_split_table_gives_the_same(structures, table):
    rows = np.array([4, 2])
    expected = ShellTable(table, RADIUS).pack(rows)
    in_two = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    assert torch.equal(ShellTable(in_two, RADIUS).pack(rows).distance, expected.distance)
    assert torch.equal(ShellTable(table.slice(2), RADIUS).pack(rows - 2).neighbor, expected.neighbor)


def test_more_rows_than_a_chunk_are_still_read_without_copying(structures, table, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 50)
    pieces = cached_shells(tmp_path, "test", structures, AROUND, "abc")
    assert structures.num_rows > 2 * 50
    assert {name: pieces.column(name).num_chunks for name in SCHEMA.names} == dict.fromkeys(SCHEMA.names, 1)
    assert pieces.equals(table)
    before = pa.total_allocated_bytes()
    shells = ShellTable(pieces, RADIUS)
    assert pa.total_allocated_bytes() == before
    atoms = len(pieces.column("rows_an_atom").chunk(0).values)
    assert shells.costs.sum() == len(pieces.column("neighbor").chunk(0).values) + ATOM_SHELLS * atoms


# Kept on disk ---------------------------------------------------------------------------------------------------


def test_shells_are_found_once_and_mapped(structures, table, tmp_path, monkeypatch):
    first = cached_shells(tmp_path, "test", structures, AROUND, "abc")
    assert first.equals(table)
    monkeypatch.setattr(module, "find_shells", None)  # finding again would raise
    before = pa.total_allocated_bytes()
    again = cached_shells(tmp_path, "test", structures, AROUND, "abc")
    assert again.equals(table)
    assert pa.total_allocated_bytes() - before < 0.01 * again.nbytes
    assert [file.name for file in (tmp_path / "shells").iterdir()] == ["test-5.0000-all.arrow"]


def test_radii_and_splits_have_their_own_files(few, tmp_path):
    for split, around in (
        ("test", AROUND),
        ("test", Neighborhood(5.0)),
        ("test", Neighborhood(4.0)),
        ("val", AROUND),
    ):
        cached_shells(tmp_path, split, few[0], around, "abc")
    names = {file.name for file in (tmp_path / "shells").iterdir()}
    assert names == {"test-5.0000-all.arrow", "test-5.0000.arrow", "test-4.0000.arrow", "val-5.0000-all.arrow"}


@pytest.mark.parametrize("change", ["fingerprint", "rows", "format"])
def test_shells_of_other_data_are_replaced(few, rows_on_disk, tmp_path, monkeypatch, change):
    """Each alone; other rows are as many, but where their number is what changes."""
    other = StructureTable.from_arrow(rows_on_disk.slice(4, 3)) if change == "rows" else few[1]
    old = cached_shells(tmp_path, "test", few[0], AROUND, "abc")
    expected = cached_shells(tmp_path / "elsewhere", "test", other, AROUND, "abc")
    if change == "format":
        monkeypatch.setattr(module, "FORMAT", "0")
    fingerprint = "def" if change == "fingerprint" else "abc"
    new = cached_shells(tmp_path, "test", other, AROUND, fingerprint)
    assert new.equals(expected)
    assert not new.equals(old)
    assert cached_shells(tmp_path, "test", other, AROUND, fingerprint).equals(expected)


@pytest.mark.parametrize("change", ["fingerprint", "format"])
def test_structures_of_other_data_are_replaced(elastic, rows_on_disk, tmp_path, monkeypatch, change):
    """The Arrow file beside them is; it is read as it stands while both are the same."""
    dataset = replace(elastic, path=tmp_path)
    bare = rows_on_disk.replace_schema_metadata(None)  # files that name no preparation may be of any
    bare = bare.replace_schema_metadata({VERSION_KEY: rows_on_disk.schema.metadata[VERSION_KEY]})
    old, new = bare.slice(0, 4), bare.slice(4, 4)

    def found():
        return cached_structures(dataset, "test", ()).column("material_id")

    file = dataset.split_path("test") / "0.parquet"
    file.parent.mkdir()
    pq.write_table(old, file)
    assert found() == old.column("material_id")
    pq.write_table(new, file)
    assert found() == old.column("material_id")
    if change == "format":
        monkeypatch.setattr(tables, "STRUCTURES_FORMAT", "0")
    else:
        dataset = replace(dataset, fingerprint="def")
    assert found() == new.column("material_id")


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage"])
def test_a_damaged_file_is_replaced(few, tmp_path, damage):
    expected = cached_shells(tmp_path / "elsewhere", "test", few[0], AROUND, "abc")
    cached_shells(tmp_path, "test", few[0], AROUND, "abc")
    path = tmp_path / "shells" / "test-5.0000-all.arrow"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbage": os.urandom(500)}[damage])
    assert cached_shells(tmp_path, "test", few[0], AROUND, "abc").equals(expected)
    assert path.read_bytes() == content
