"""Own structures whose records, or names of files, are no text."""

import json
import os

import pytest

from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from tests.data_pipeline.test_own import N, make, record, usable_rows

NO_UTF8 = os.fsdecode(b"\xff")


def test_half_a_character_costs_its_row_only(tmp_path):
    made = [record(i, "dict") for i in range(N)]
    made[4]["material_id"] = made[6]["cif"] = "\ud83d"
    (tmp_path / "a.json").write_text(json.dumps(made))
    done = prepare_source(OwnData(path=tmp_path / "a.json", name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    reason = "unreadable record: holds half a character (a lone surrogate)"
    assert [(row.row, row.material_id, row.reason) for row in done.rejected] == [
        (4, "\\ud83d", reason),
        (6, "s6", reason),
    ]


@pytest.mark.parametrize("kind", ["json", "parquet", "table", "cifs"])
def test_names_of_files_and_folders_that_are_no_text_are_escaped(kind, tmp_path):
    if kind == "table":
        made = prepare_source(OwnData(path=make("json", tmp_path), name="table"), tmp_path)
        path = made.path / "train" / "part-00000.parquet"
    else:
        path = make(kind, tmp_path)
    if kind == "cifs":
        (path / "s1.cif").unlink()
    path = path.rename(tmp_path / f"{NO_UTF8}{path.suffix}")
    if kind == "json":
        path.write_text(json.dumps([*json.loads(path.read_text()), {"gap": "x", "material_id": "last"}]))
    own = OwnData(path=path, name="mine", targets=("gap",), split=(0.4, 0.3, 0.3))
    done = prepare_source(own, tmp_path / "data")
    assert done.source == f"\\udcff{path.suffix}" and prepare_source(own, tmp_path / "data").reused
    expected = {
        "json": [("\\udcff.json", "bad target: gap: 'x' is not a number")],
        "cifs": [("id_prop.csv", "missing file: 's1' is not in \\udcff")],
    }
    assert [(row.file, row.reason) for row in done.rejected] == expected.get(kind, [])


def test_a_data_dir_whose_name_is_no_text_is_one_line(tmp_path):
    with pytest.raises(DataError, match="its name is not UTF-8"):
        prepare_source(OwnData(path=make("json", tmp_path), name="mine"), tmp_path / NO_UTF8)
    assert not (tmp_path / NO_UTF8).exists()


def test_bytes_that_are_no_text_cost_their_rows_only(tmp_path):
    path = make("csv", tmp_path)
    path.write_bytes(path.read_bytes().replace(b"s3,1.5,text", b"s3,1.5,\xe9").replace(b"s5,2.5", b"s\xe95,2.5"))
    done = prepare_source(OwnData(path=path, name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert [row.row for row in done.rejected] == [3, 5] and usable_rows(done) == N - 2
    assert {row.reason for row in done.rejected} == {
        "unreadable record: holds bytes that are not UTF-8, the encoding of text that is read"
    }
    path.write_bytes(b"gap \xb0," + path.read_bytes())
    with pytest.raises(DataError, match=r"data\.csv: cannot be read: its heading holds bytes that are not UTF-8"):
        prepare_source(OwnData(path=path, name="other"), tmp_path / "data")
