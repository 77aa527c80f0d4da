"""Rows that come back from Ray Data are put into the parts they belong to, or it is an error."""

import pyarrow as pa
import pytest

from data_pipeline.execute import _regroup, in_process
from data_pipeline.raw import ROWS_PER_TABLE
from data_pipeline.store import RawStore
from tests.data_pipeline.test_prepare import ListSource, records


def block(*parts):
    return pa.table({"part": pa.array(parts, pa.int32()), "x": pa.array(range(len(parts)), pa.int64())})


def test_blocks_of_any_size_become_parts():
    rows = [3, 2, 4]
    blocks = [block(0, 0), block(0, 2, 2), pa.table({}), block(2), block(2)]
    found = {part: table["part"].to_pylist() for part, table in _regroup(blocks, [0, 2], rows)}
    assert found == {0: [0, 0, 0], 2: [2, 2, 2, 2]}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([block(1, 1), block(0, 0)], "part 0 out of order"),
        ([block(0, 0), block(1)], "other rows than it was given"),
        ([block(0, 0), block(1, 1, 1)], "other rows than it was given"),
    ],
)
def test_lost_or_shuffled_rows_are_an_error(blocks, message):
    with pytest.raises(RuntimeError, match=message):
        list(_regroup(blocks, [0, 1], [2, 2]))


def test_in_this_process_reports_progress(tmp_path):
    store = RawStore(tmp_path / "s")
    store.fill(ListSource(records(16)), stage_from=1 << 60)
    seen = []
    tables = list(in_process(store, lambda *call: seen.append(call)))
    assert [len(table) for table in tables] == [7, 7, 2]
    assert seen == [("structures", 7, 16), ("structures", 14, 16), ("structures", 16, 16)]
    assert ROWS_PER_TABLE > 16 and not store.staged and not (tmp_path / "s").exists()
