"""Shards hold the same bytes however the rows arrive."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.schema import structure_schema
from data_pipeline.sources.raw import Record, raw_tables
from data_pipeline.steps import write
from data_pipeline.steps.write import DatasetWriter, SplitWriter
from tests.data_pipeline.samples import HARDNESS, caesium_chloride, mixed_rock_salt
from tests.data_pipeline.test_prepare import files


def table(n):
    rows = [
        Record(file="f", row=i, material_id=f"m{i}", targets=(float(i),), crystal=made(4.5 + 0.01 * i))
        for i, made in zip(range(n), [caesium_chloride, mixed_rock_salt] * n, strict=False)
    ]
    return next(iter(raw_tables(rows, [HARDNESS], rows=n)))


def test_batches_leave_no_trace_and_shards_are_full(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "ROWS_PER_GROUP", 8)
    monkeypatch.setattr(write, "ROWS_PER_FILE", 24)
    whole = table(70)
    for name, cuts in {"once": [0, 70], "ones": range(71), "odd": [0, 3, 30, 31, 69, 70]}.items():
        writer = SplitWriter(tmp_path / name, structure_schema([HARDNESS]))
        for start, stop in zip(cuts, cuts[1:], strict=False):
            writer.add(whole.slice(start, stop - start))
        writer.close()
    made = files(tmp_path / "once")
    assert sorted(made) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert made == files(tmp_path / "ones") == files(tmp_path / "odd")
    parts = [pq.ParquetFile(path).metadata for path in sorted((tmp_path / "once").iterdir())]
    assert [(part.num_rows, part.num_row_groups) for part in parts] == [(24, 3), (24, 3), (22, 3)]
    ids = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "once").iterdir())])["material_id"]
    assert ids.to_pylist() == [f"m{i}" for i in range(70)]


def test_rows_go_to_their_splits_and_are_counted(tmp_path):
    whole = table(10)
    codes = np.array([0, 1, 2, -1, 0, 0, 1, 2, -1, 0], dtype=np.int8)
    with DatasetWriter(tmp_path / "d", [HARDNESS], {"note": "x"}) as writer:
        writer.add(whole.slice(0, 4), codes[:4])
        writer.add(whole.slice(4), codes[4:])
    assert {name: split.rows for name, split in writer.splits.items()} == {"train": 4, "val": 2, "test": 2}
    assert writer.train_values[:, 0].tolist() == [0, 4, 5, 9]
    assert np.flatnonzero(writer.elements).tolist() == [0, 11, 17, 19, 55]
    assert pq.read_schema(tmp_path / "d" / "val" / "part-00000.parquet").metadata[b"crystalformer.split"] == b"val"
    assert int(np.concatenate(writer.atoms).sum()) == 4 * 8 + 4 * 2
