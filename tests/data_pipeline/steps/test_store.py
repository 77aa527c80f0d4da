"""Raw rows in memory while few, staged and taken up again when many."""

import pyarrow as pa

from data_pipeline.steps.store import RawStore, null_mask
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


def test_null_and_nan_are_missing():
    column = pa.chunked_array([pa.array([1.0, None, float("nan"), float("inf")])])
    assert null_mask(column).tolist() == [False, True, True, False]
