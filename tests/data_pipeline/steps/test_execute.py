"""How raw tables are dealt to tasks, and that finished ones are those they should be."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from data_pipeline.sources.raw import ROWS_PER_TABLE
from data_pipeline.steps import execute
from data_pipeline.steps.execute import dealt, in_process, process_parts, with_ray
from data_pipeline.steps.store import RawStore
from tests.data_pipeline.test_prepare import ListSource, records


@pytest.mark.parametrize(("parts", "cores"), [(0, 2), (1, 1), (9, 2), (94, 2), (94, 64), (1000, 4), (5, 0)])
def test_every_part_is_dealt_once_and_the_last_tasks_are_small(parts, cores):
    tasks = list(dealt(range(parts), cores))
    assert [part for task in tasks for part in task] == list(range(parts))
    sizes = [len(task) for task in tasks]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= 16 for size in sizes) and sizes[-max(1, cores) :] == [1] * min(max(1, cores), parts)


def staged(folder):
    store = RawStore(folder)
    store.fill(ListSource(records(16)), stage_from=1)
    return store


def test_a_finished_part_that_is_another_is_an_error(tmp_path):
    import pyarrow as pa

    store = staged(tmp_path / "s")
    parts = list(range(len(store.parts)))
    assert process_parts(pa.table({"part": parts, "path": list(map(str, store.parts))}))["part"].to_pylist() == parts
    shutil.copy(tmp_path / "s" / "done-00001.parquet", tmp_path / "s" / "done-00000.parquet")
    with pytest.raises(RuntimeError, match="not the 7 rows of part 0"):
        next(with_ray(store, lambda *_: None))  # all parts are finished: no Ray is needed


def test_a_finished_part_that_a_loss_of_power_left_empty_is_made_again(tmp_path, monkeypatch):
    import pyarrow as pa

    store, made = staged(tmp_path / "s"), []

    def work(store, missing, _cores):
        for part in missing:
            made.append(part)
            process_parts(pa.table({"part": [part], "path": [str(store.parts[part])]}))
            yield part

    monkeypatch.setattr(execute, "_finished_parts", work)
    monkeypatch.setattr(execute, "_ray", lambda: nullcontext(SimpleNamespace(cluster_resources=dict)))
    first = list(with_ray(store, lambda *_: None))
    (tmp_path / "s" / "done-00001.parquet").write_bytes(b"")
    seen = []
    again = list(with_ray(store, lambda *call: seen.append(call)))
    assert made == [0, 1, 2, 1] and seen == [("structures", 16, 16)]
    assert all(a.equals(b) for a, b in zip(first, again, strict=True))


def test_a_part_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    import pyarrow as pa

    from data_pipeline.steps import store as module

    store = staged(tmp_path / "s")

    def breaks(table, where, **_):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.pq, "write_table", breaks)
    (problem,) = process_parts(pa.table({"part": [0], "path": [str(store.parts[0])]}))["problem"].to_pylist()
    assert problem.startswith("disk full (on ")
    assert not list((tmp_path / "s").glob("done-*"))


def test_in_this_process_reports_progress(tmp_path):
    store = RawStore(tmp_path / "s")
    store.fill(ListSource(records(16)), stage_from=1 << 60)
    seen = []
    tables = list(in_process(store, lambda *call: seen.append(call)))
    assert [len(table) for table in tables] == [7, 7, 2]
    assert seen == [("structures", 7, 16), ("structures", 14, 16), ("structures", 16, 16)]
    assert ROWS_PER_TABLE > 16 and not store.staged and not (tmp_path / "s").exists()
