"""Which files of a user's folder are read, and as which splits: none is left out without a word."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.crystal import structure_columns
from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.schema import structure_schema
from data_pipeline.table import StructureTable
from tests.data_pipeline.samples import HARDNESS, mixed_rock_salt
from tests.data_pipeline.test_own import jarvis_atoms, structure
from tests.data_pipeline.test_own_columns import write

PARTS = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}


def rows(numbers):
    atoms = json.dumps(jarvis_atoms(structure(0)))
    return [{"material_id": f"s{i}", "gap": float(i), "atoms": atoms} for i in numbers]


def table(numbers):
    columns = [pa.array([f"s{i}" for i in numbers]), *structure_columns([mixed_rock_salt()] * len(numbers))]
    return pa.Table.from_arrays(
        [*columns, pa.array([float(i) for i in numbers])], schema=structure_schema([HARDNESS])
    )


def files(folder, kind="csv", names=None):
    folder.mkdir()
    for split, numbers in PARTS.items():
        path = folder / f"{(names or {}).get(split, split)}.{'parquet' if kind == 'table' else kind}"
        pq.write_table(table(numbers), path) if kind == "table" else write(kind, path, rows(numbers))
    return folder


def prepared(path, data_dir):
    return prepare_source(OwnData(path=path, name="mine", split=(0.5, 0.25, 0.25)), data_dir)


def ids(done):
    return {split: StructureTable.open(done.split_path(split)).material_ids() for split in PARTS}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "table"])
def test_files_named_after_splits_are_those_splits(kind, tmp_path):
    done = prepared(files(tmp_path / "f", kind), tmp_path / "data")
    assert ids(done) == {split: [f"s{i}" for i in numbers] for split, numbers in PARTS.items()}
    assert json.loads((done.path / "dataset.json").read_text())["split"]["rule"].startswith("as the source names")


def test_other_words_for_splits_and_shards(tmp_path):
    folder = files(tmp_path / "f", names={"train": "Train-00000-of-00002", "val": "validation", "test": "test_0"})
    write("csv", folder / "train-00001-of-00002.csv", rows([12, 13]))
    assert ids(prepared(folder, tmp_path / "data"))["train"] == [f"s{i}" for i in (*range(8), 12, 13)]


def test_a_bad_row_of_such_a_file_is_named_by_the_file(tmp_path):
    folder = files(tmp_path / "f")
    write("csv", folder / "val.csv", [*rows([8, 9]), {"material_id": "bad", "gap": 1.0, "atoms": ""}])
    assert [(row.file, row.row) for row in prepared(folder, tmp_path / "data").rejected] == [("val.csv", 2)]


@pytest.mark.parametrize("kind", ["csv", "table"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"val": "more"}, r"more.*: belongs to no split, though test\.\w+ beside it does"),
        ({"val": "train-2"}, r"named after a split, but no file beside it is val; name files after all of train"),
    ],
)
def test_some_files_named_after_splits_are_refused(names, message, kind, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        prepared(files(tmp_path / "f", kind, names), tmp_path / "data")
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()


def test_capitals_in_a_name_mean_nothing(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    write("csv", folder / "a.csv", rows(range(6)))
    write("csv", folder / "b.CSV", rows(range(6, 12)))
    assert sum(map(len, ids(prepared(folder, tmp_path / "data")).values())) == 6 + 3 + 3
    alone = tmp_path / "x.CSV"
    write("csv", alone, rows(range(12)))
    assert prepared(alone, tmp_path / "other").sizes.train == 6


def test_kinds_that_are_mixed_are_refused(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    write("csv", folder / "a.csv", rows(range(6)))
    (folder / "z.pkl").write_bytes(b"x")
    with pytest.raises(DataError, match=r"z\.pkl: a pickle is read only where it is given itself"):
        prepared(folder, tmp_path / "data")
    (folder / "z.pkl").unlink()
    write("parquet", folder / "b.parquet", rows(range(6, 12)))
    with pytest.raises(DataError, match=r"f: a\.csv and b\.parquet are of two kinds"):
        prepared(folder, tmp_path / "data")


def test_a_prepared_data_set_is_no_source(tmp_path):
    write("csv", tmp_path / "a.csv", rows(range(12)))
    done = prepared(tmp_path / "a.csv", tmp_path / "data")
    with pytest.raises(
        DataError, match="mine: is a prepared data set, not a source; train on it with --dataset mine"
    ):
        prepare_source(OwnData(path=done.path, name="again"), tmp_path / "data")
