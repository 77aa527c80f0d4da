"""Folders of structure files with id_prop.csv: which file a line means, and which lines are left out."""

import os
import unicodedata

import pytest

from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.table import StructureTable
from tests.data_pipeline.test_own import structure

N = 12


def folder(path, lines, name="m{}.cif".format):
    """Structures called by ``name``, and an id_prop.csv of these lines."""
    for i in range(N):
        file = path / name(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(structure(i).to(fmt="cif"))
    (path / "id_prop.csv").write_text(lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines))
    return path


def prepared(path, **more):
    own = OwnData(path=path, name="mine", split=(0.5, 0.25, 0.25), **more)
    return prepare_source(own, path.parent / "data")


def ids(done):
    return sorted(i for s in ("train", "val", "test") for i in StructureTable.open(done.split_path(s)).material_ids())


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("./m{}.cif", "m{}.cif"),
        (".\\m{}.cif", "m{}.cif"),
        ("cif/m{}.cif", "cif/m{}.cif"),
        ("cif\\m{}", "cif/m{}.cif"),
        ("m{}", "m{}.CIF"),
        ("m{}.CIF", "m{}.cif"),
        ("m{}", "m{}.mcif"),
        ("Eskolaït{}", unicodedata.normalize("NFD", "Eskolaït") + "{}.cif"),
    ],
)
def test_names_in_many_spellings(listed, file, tmp_path):
    done = prepared(folder(tmp_path / "f", [f"{listed.format(i)},{i}" for i in range(N)], file.format))
    assert done.rejected == () and ids(done) == sorted(listed.format(i) for i in range(N))


def test_a_name_spelled_exactly_comes_first(tmp_path):
    path = folder(tmp_path / "f", [f"m{i}.CIF,{i}" for i in range(N)], "m{}.CIF".format)
    (path / "m3.cif").write_text("no cif")
    assert prepared(path).rejected == ()


@pytest.mark.parametrize("name", ["../f/m0.cif", "cif/../m0.cif", "/m0.cif", "{}/m0.cif", "..\\f\\m0.cif"])
def test_the_folder_is_never_left(name, tmp_path):
    listed = name.format(tmp_path / "f")
    done = prepared(folder(tmp_path / "f", [f"{listed},0", *(f"m{i},{i}" for i in range(1, N))]))
    assert [(row.row, row.reason.split(":")[0]) for row in done.rejected] == [(0, "missing file")]


@pytest.mark.parametrize("value", ["-", "#N/A", "1.2 eV"])
def test_a_first_line_that_names_a_file_is_no_heading(value, tmp_path):
    done = prepared(folder(tmp_path / "f", [f"m0,{value}", *(f"m{i},{i}" for i in range(1, N))]))
    assert [(row.file, row.row, row.material_id) for row in done.rejected] == [("id_prop.csv", 0, "m0")]
    assert done.rejected[0].reason.startswith("bad target: ") and done.target_names == ("target",)


def test_blank_lines_do_not_move_rows(tmp_path):
    lines = ["id,y", "", "", "m0,0", "", "m0x,1", *(f"m{i},{i}" for i in range(1, N))]
    assert [(row.row, row.material_id) for row in prepared(folder(tmp_path / "f", lines)).rejected] == [(5, "m0x")]


def test_one_file_under_two_names_is_used_once(tmp_path):
    path = folder(tmp_path / "f", [*(f"m{i},{i}" for i in range(N)), "m3.cif,4", "./m5.cif,5", "m6,6"])
    assert [(row.file, row.row, row.reason) for row in prepared(path).rejected] == [
        ("id_prop.csv", 12, "duplicate file: m3.cif is listed as 'm3' already"),
        ("id_prop.csv", 13, "duplicate file: m5.cif is listed as 'm5' already"),
        ("m6.cif", 0, "duplicate id: 'm6' is m6.cif row 0 already"),
    ]


@pytest.mark.parametrize("ending", [".json", ".xyz", ".extxyz", ".JSON.gz"])
def test_files_of_another_kind_are_no_poscar(ending, tmp_path):
    path = folder(tmp_path / "f", [f"o{ending},1", *(f"m{i},{i}" for i in range(N))])
    (path / f"o{ending}").write_bytes(b"2")
    (row,) = prepared(path).rejected
    assert row.reason == f"unreadable structure: o{ending} is neither a CIF nor a POSCAR file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m0;1\nm1;2\n", "separated by semicolons, not by commas; the first line is 'm0;1'"),
        ("m0;0,5\nm1;1,5\n", "separated by semicolons, not by commas"),
        ("m0\t1\nm1\t2\n", "separated by tabs, not by commas"),
        ("m0 1\nm1 2\n", "no line of it holds the name of a file and a target, separated by a comma"),
    ],
)
def test_other_separators_are_told(text, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        prepared(folder(tmp_path / "f", text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_a_rejected_row(tmp_path, monkeypatch):
    path = folder(tmp_path / "f", [f"m{i},{i}" for i in range(N)])
    if os.geteuid() == 0:  # whom no mode keeps out
        (path / "m3.cif").unlink()
        (path / "m3.cif").symlink_to("m3.cif")
        monkeypatch.setattr("pathlib.Path.is_file", lambda path: os.path.lexists(path) and not path.is_dir())
    else:
        (path / "m3.cif").chmod(0)
    (row,) = prepared(path).rejected
    assert row.material_id == "m3" and row.reason.startswith("unreadable structure: ")
