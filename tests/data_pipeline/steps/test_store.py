"""Raw rows in memory while few, staged and taken up again when many."""

import os

import pyarrow as pa
import pytest

from data_pipeline.steps.store import RawStore, is_staged, null_mask, written_whole
from tests.data_pipeline.test_prepare import ListSource, records


def test_staged_rows_are_those_in_memory(tmp_path):
    memory, staged = RawStore(tmp_path / "a"), RawStore(tmp_path / "b")
    memory.fill(ListSource(records(20)), stage_from=1000)
    staged.fill(ListSource(records(20)), stage_from=8)
    assert (memory.staged, staged.staged, memory.num_rows, staged.num_rows) == (False, True, 20, 20)
    for a, b in zip(memory.tables(), staged.tables(), strict=True):
        assert a.equals(b)
    assert memory.index(["hardness"]).equals(staged.index(["hardness"]))
    assert memory.index(["hardness"])["source_row"].to_pylist() == list(range(20))


def test_a_complete_staging_is_not_read_again_an_incomplete_one_is(tmp_path):
    source = ListSource(records(20))
    RawStore(tmp_path).fill(source, stage_from=1)
    again = RawStore(tmp_path)
    again.fill(source, stage_from=1)
    assert source.reads == 1 and again.num_rows == 20 and len(list(again.tables())) == 3
    (tmp_path / "raw.json").unlink()
    RawStore(tmp_path).fill(source, stage_from=1)
    assert source.reads == 2


@pytest.mark.parametrize("damaged", ["raw.json", "raw-00001.parquet"])
def test_what_a_loss_of_power_left_empty_is_read_again(damaged, tmp_path):
    source = ListSource(records(20))
    RawStore(tmp_path).fill(source, stage_from=1)
    (tmp_path / damaged).write_bytes(b"")
    again = RawStore(tmp_path)
    again.fill(source, stage_from=1)
    assert source.reads == 2 and again.rows == [7, 7, 6] and is_staged(tmp_path)
    assert [len(table) for table in again.tables()] == again.rows


def test_a_part_of_fewer_rows_is_read_again(tmp_path):
    source = ListSource(records(20))
    RawStore(tmp_path).fill(source, stage_from=1)
    (tmp_path / "raw-00002.parquet").replace(tmp_path / "raw-00001.parquet")
    again = RawStore(tmp_path)
    again.fill(source, stage_from=1)
    assert source.reads == 2 and [len(table) for table in again.tables()] == [7, 7, 6]


def test_a_file_has_its_name_once_it_is_on_the_disk(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "a.json", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(path.exists()) or fsync(handle))
    with written_whole(path) as partial:
        partial.write_text("{}")
    assert synced == [False] and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_null_and_nan_are_missing():
    column = pa.chunked_array([pa.array([1.0, None, float("nan"), float("inf")])])
    assert null_mask(column).tolist() == [False, True, True, False]
