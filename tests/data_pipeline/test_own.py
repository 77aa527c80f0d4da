"""Everybody's own structures, in every layout that is read."""

import csv
import functools
import gzip
import json
import math
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure

from data_pipeline.crystal import structure_columns
from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.schema import STRUCTURE_COLUMNS, VERSION_KEY, structure_schema
from data_pipeline.table import StructureTable
from tests.data_pipeline.samples import HARDNESS, mixed_rock_salt

N = 12
LINES = [f"s{i}" for i in range(N)]


@functools.cache
def structure(i):
    if i % 4 == 3:
        return Structure(Lattice.cubic(4 + 0.1 * i), [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    rock_salt = Structure(
        Lattice.cubic(5 + 0.1 * i), ["Na"] * 4, [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    )
    for site in list(rock_salt):
        rock_salt.append("Cl", site.frac_coords + 0.5)
    return rock_salt


def jarvis_atoms(s):
    return {
        "lattice_mat": s.lattice.matrix.tolist(),
        "coords": s.frac_coords.tolist(),
        "elements": [site.specie.symbol for site in s],
        "cartesian": False,
    }


def record(i, form):
    fields = {"material_id": f"s{i}", "gap": 0.5 * i, "comment": "text", "n": None if i == 5 else i}
    s = structure(i)
    if form == "cif":
        return {**fields, "cif": s.to(fmt="cif")}
    if form == "atoms":
        return {**fields, "atoms": jarvis_atoms(structure(0) if i % 4 == 3 else s)}
    if form == "object":
        return {**fields, "structure": s}
    return {**fields, "structure": s.as_dict()}


def write_folder(path, ending):
    path.mkdir()
    for i in range(N):
        if ending == ".cif":
            (path / f"s{i}.cif").write_text(structure(i).to(fmt="cif"))
        else:
            (path / f"s{i}{ending}").write_text(structure(0 if i % 4 == 3 else i).to(fmt="poscar"))
    heading = "id,gap (eV)\n" if ending == ".cif" else ""
    lines = [f"s{i}{'' if i % 2 else ending},{0.5 * i}\n" for i in range(N)]
    (path / "id_prop.csv").write_text(heading + "".join(lines))


def make(kind, folder):
    records = {"parquet": "dict", "json": "dict", "json.gz": "atoms", "jsonl": "dict", "csv": "cif"}
    if kind in ("cifs", "poscars"):
        path = folder / kind
        write_folder(path, ".cif" if kind == "cifs" else ".vasp")
    elif kind == "authors":
        path = folder / "authors"
        for split, rows in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, N))):
            (path / split / "raw").mkdir(parents=True)
            content = pickle.dumps([record(i, "object") for i in rows])
            (path / split / "raw" / "raw_data.pkl").write_bytes(content)
    else:
        path = folder / f"data.{kind}"
        made = [record(i, records[kind]) for i in range(N)]
        if kind == "csv":
            with path.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, made[0])
                writer.writeheader()
                writer.writerows(made)
        elif kind == "parquet":
            text = [{**r, "structure": json.dumps(r["structure"])} for r in made]
            pq.write_table(pa.Table.from_pylist(text), path)
        elif kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, made)))
        else:
            content = json.dumps(made).encode()
            path.write_bytes(gzip.compress(content) if kind == "json.gz" else content)
    return path


@pytest.mark.parametrize("kind", ["cifs", "poscars", "csv", "json", "json.gz", "jsonl", "parquet", "authors"])
def test_every_layout(kind, tmp_path):
    own = OwnData(path=make(kind, tmp_path), name="mine", split=(0.5, 0.25, 0.25), allow_pickle=kind == "authors")
    done = prepare_source(own, tmp_path / "data")
    assert done.rejected == ()
    assert (done.sizes.train, done.sizes.val, done.sizes.test) == ((8, 2, 2) if kind == "authors" else (6, 3, 3))
    target = "target" if kind == "poscars" else "gap"
    found = {}
    for split in ("train", "val", "test"):
        table = StructureTable.open(done.split_path(split), [target])
        for row, name in enumerate(table.material_ids()):
            found[name.removesuffix(".cif").removesuffix(".vasp")] = (
                table.targets(np.array([row]))[0, 0],
                table.gather(np.array([row])),
            )
    assert sorted(found) == sorted(LINES)
    for i in range(N):
        value, packed = found[f"s{i}"]
        assert value == 0.5 * i
        expected = structure(0 if kind in ("poscars", "json.gz") and i % 4 == 3 else i)
        assert packed.sizes.tolist() == [2]
        assert abs(np.linalg.det(packed.lattice[0])) == pytest.approx(expected.volume * 2 / len(expected), rel=1e-6)
        assert (packed.disorder is None) == expected.is_ordered
        if packed.disorder is not None:
            assert sorted(packed.disorder.atomic_number.tolist()) == [11, 19]
    if kind == "cifs":
        assert done.targets[0].unit == "eV"
    elif kind != "poscars":
        assert done.target_names == ("gap", "n")
    assert prepare_source(own, tmp_path / "data").reused


def test_structure_table_round_trip_and_wrong_version(tmp_path):
    values = [float(i) for i in range(N - 2)] + [float("nan"), float("inf")]
    columns = [
        pa.array(LINES),
        *structure_columns([mixed_rock_salt(5 + 0.1 * i) for i in range(N)]),
        pa.array(values),
    ]
    schema = structure_schema([HARDNESS])
    table = pa.Table.from_arrays(columns, schema=schema)
    (tmp_path / "t").mkdir()
    pq.write_table(table.slice(0, 5), tmp_path / "t" / "a.parquet")
    pq.write_table(table.slice(5), tmp_path / "t" / "b.parquet")
    done = prepare_source(OwnData(path=tmp_path / "t", name="mine"), tmp_path / "data")
    assert done.targets[0].unit == "GPa" and done.sizes.train == 8
    assert [(row.file, row.row, row.reason) for row in done.rejected] == [
        ("b.parquet", 5, "missing target: hardness"),
        ("b.parquet", 6, "bad target: hardness: inf is not between -3e+38 and 3e+38"),
    ]
    pq.write_table(table.replace_schema_metadata({VERSION_KEY: b"0"}), tmp_path / "old.parquet")
    with pytest.raises(DataError, match="schema version 0"):
        prepare_source(OwnData(path=tmp_path / "old.parquet", name="old"), tmp_path / "data")


def test_a_structure_table_with_a_missing_id(tmp_path):
    schema = structure_schema([HARDNESS])
    columns = [
        pa.array([None, *LINES[1:]]),
        *structure_columns([mixed_rock_salt()] * N),
        pa.array(np.arange(float(N))),
    ]
    nullable = pa.schema([schema.field(0).with_nullable(nullable=True), *list(schema)[1:]], schema.metadata)
    pq.write_table(pa.Table.from_arrays(columns, schema=nullable), tmp_path / "t.parquet")
    done = prepare_source(OwnData(path=tmp_path / "t.parquet", name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert [(row.row, row.reason) for row in done.rejected] == [(0, "unreadable record: no material_id")]


def test_bad_rows_of_every_kind_are_listed(tmp_path):
    path = tmp_path / "cifs"
    write_folder(path, ".cif")
    (path / "s1.cif").write_text("no cif at all")
    (path / "s2.cif").unlink()
    text = (path / "id_prop.csv").read_text().replace("s4.cif,2.0", "s4.cif,abc").replace("s6.cif,3.0", "s6.cif,inf")
    text += "s7,1.0,2.0\ns8.cif,4.0\n../cifs/s9,1.0\n"
    (path / "id_prop.csv").write_text(text)
    done = prepare_source(OwnData(path=path, name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    reasons = [(row.file, row.row, row.material_id, row.reason.split(":")[0]) for row in done.rejected]
    assert reasons == [
        ("s1.cif", 0, "s1", "unreadable structure"),
        ("id_prop.csv", 3, "s2.cif", "missing file"),
        ("id_prop.csv", 5, "s4.cif", "bad target"),
        ("id_prop.csv", 7, "s6.cif", "bad target"),
        ("id_prop.csv", 13, "s7", "unreadable record"),
        ("s8.cif", 0, "s8.cif", "duplicate id"),
        ("id_prop.csv", 15, "../cifs/s9", "missing file"),
    ]
    with pytest.raises(DataError, match="7 rows rejected"):
        prepare_source(OwnData(path=path, name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data", strict=True)


def test_broken_records_do_not_stop_a_csv_or_json_lines(tmp_path):
    path = make("csv", tmp_path)
    with path.open("a") as stream:
        stream.write("only,three,fields\n")
    done = prepare_source(OwnData(path=path, name="a", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert [row.reason for row in done.rejected] == ["unreadable record: 3 fields, but the heading has 5"]
    path = make("jsonl", tmp_path)
    path.write_text(path.read_text() + '\n{"material_id": "x", \n[1]\n{"material_id": "y", "gap": 1.0}\n')
    done = prepare_source(OwnData(path=path, name="b", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert [row.reason.split(":")[0] for row in done.rejected] == [
        "unreadable record",
        "unreadable record",
        "empty structure",
    ]


def test_targets_can_be_named(tmp_path):
    path = make("json", tmp_path)
    done = prepare_source(OwnData(path=path, name="mine", targets=("n",), split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert done.target_names == ("n",)
    assert [row.reason for row in done.rejected] == ["missing target: n"]
    for wanted in ("gapp", "comments"):
        with pytest.raises(DataError, match="no column"):
            prepare_source(OwnData(path=path, name="mine", targets=(wanted,)), tmp_path / "data")


def test_editing_a_structure_prepares_again(tmp_path):
    write_folder(tmp_path / "f", ".cif")
    own = OwnData(path=tmp_path / "f", name="mine", split=(0.5, 0.2, 0.2))
    prepare_source(own, tmp_path / "data")
    (tmp_path / "f" / "s3.cif").write_text(structure(2).to(fmt="cif"))
    assert not prepare_source(own, tmp_path / "data").reused


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: OwnData(path=p, name="a b"), "letters, digits"),
        (lambda p: OwnData(path=p, name="elastic_tensor_2015"), "that of a registered set"),
        (lambda p: OwnData(path=p, name="x", split=(0.8, 0.3, 0.1)), "ratios"),
        (lambda p: OwnData(path=p / "nowhere", name="x"), "not found; --source takes"),
        (lambda p: OwnData(path=p / "empty", name="x"), "nothing to read in it"),
        (lambda p: OwnData(path=p / "notes.txt", name="x"), "unknown kind of file"),
        (lambda p: OwnData(path=p / "a.pkl", name="x"), "--allow-pickle"),
        (lambda p: OwnData(path=p / "a.pkl", name="x", allow_pickle=True), "it asks for os.system|posix.system"),
        (lambda p: OwnData(path=p / "a.parquet", name="x"), "not a Parquet file"),
        (lambda p: OwnData(path=p / "a.csv", name="x"), "no column of numbers"),
        (lambda p: OwnData(path=p / "a.json", name="x"), "cannot be read: neither a JSON array"),
        (lambda p: OwnData(path=p / "half", name="x"), "val/raw/raw_data.pkl: not found, though"),
        (lambda p: OwnData(path=p / "props", name="x"), "no line of it holds"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(prepare, message, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "train" / "raw").mkdir(parents=True)
    (tmp_path / "half" / "train" / "raw" / "raw_data.pkl").write_bytes(pickle.dumps([]))
    (tmp_path / "props").mkdir()
    (tmp_path / "props" / "id_prop.csv").write_text("\n")
    for name, content in {"notes.txt": b"x", "a.parquet": b"x", "a.csv": b"id,cif\n1,x\n", "a.json": b"x"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=message) as caught:
        prepare_source(prepare(tmp_path), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it-ran").exists()


def usable_rows(done):
    return json.loads((done.path / "dataset.json").read_text())["rows"]["usable"]


def test_broken_files_are_rejected_rows_and_the_others_are_used(tmp_path):
    folder = tmp_path / "several"
    folder.mkdir()
    text = [json.dumps([{**record(i, "dict"), "material_id": f"{part}{i}"} for i in range(N)]) for part in "abcd"]
    (folder / "a.json").write_text(text[0][100:])
    (folder / "b.json").write_text(text[1])
    (folder / "c.json").write_text(text[2][: text[2].index('"c5"')])
    (folder / "d.json.gz").write_bytes(gzip.compress(text[3].encode())[:200])
    own = OwnData(path=folder, name="mine", split=(0.5, 0.25, 0.25))
    done = prepare_source(own, tmp_path / "data")
    assert [(row.file, row.row, row.reason.split(":")[0]) for row in done.rejected] == [
        ("a.json", 0, "unreadable file"),
        ("c.json", 5, "unreadable file"),
        ("d.json.gz", 0, "unreadable file"),
    ]
    assert done.rejected[1].reason.startswith("unreadable file: broken off after 5 records: ")
    assert usable_rows(done) == N + 5
    with pytest.raises(DataError, match="3 rows rejected, and --strict"):
        prepare_source(own, tmp_path / "other", strict=True)


@pytest.mark.parametrize("ours", [True, False])
def test_a_broken_parquet_file_beside_good_ones(ours, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    if ours:
        names = [name for name, _ in STRUCTURE_COLUMNS]
        columns = dict(zip(names, structure_columns([mixed_rock_salt()] * 9), strict=True))
        for name in "abc":
            ids = pa.array([f"{name}{i}" for i in range(9)])
            made = {"material_id": ids, **columns, "hardness": pa.array(np.arange(9.0))}
            schema = structure_schema([HARDNESS])
            pq.write_table(
                pa.table([made[field.name] for field in schema], schema=schema), folder / f"{name}.parquet"
            )
    else:
        for name in "abc":
            rows = [{**record(i, "dict"), "material_id": f"{name}{i}"} for i in range(9)]
            text = [{**row, "structure": json.dumps(row["structure"])} for row in rows]
            pq.write_table(pa.Table.from_pylist(text), folder / f"{name}.parquet")
    for name in "ac":
        whole = (folder / f"{name}.parquet").read_bytes()
        (folder / f"{name}.parquet").write_bytes(whole[: len(whole) // 2])
    done = prepare_source(OwnData(path=folder, name="mine", split=(0.5, 0.25, 0.25)), tmp_path / "data")
    assert [(row.file, row.reason.split(":")[0]) for row in done.rejected] == [
        ("a.parquet", "unreadable file"),
        ("c.parquet", "unreadable file"),
    ]
    assert usable_rows(done) == 9


@pytest.mark.parametrize("kind", ["json", "cifs"])
def test_a_huge_number_that_stands_for_a_missing_target_costs_its_row_only(kind, tmp_path):
    path = make(kind, tmp_path)
    if kind == "json":
        made = [record(i, "dict") for i in range(N)]
        made[0]["gap"] = made[7]["gap"] = 1e300
        made[3]["gap"] = -3e38
        path.write_text(json.dumps(made))
    else:
        index = path / "id_prop.csv"
        lines = [line.partition(",")[0] for line in index.read_text().splitlines()[1:]]
        values = {0: "1e300", 7: "1e300", 3: "-3e38"}
        index.write_text("id,gap (eV)\n" + "".join(f"{s},{values.get(i, i)}\n" for i, s in enumerate(lines)))
    own = OwnData(path=path, name="mine", targets=("gap",), split=(0.5, 0.2, 0.3))
    done = prepare_source(own, tmp_path / "data")
    column, value = ("gap", "1e+300") if kind == "json" else ("gap (eV)", "'1e300'")
    reason = f"bad target: {column}: {value} is not between -3e+38 and 3e+38"
    assert [row.reason for row in done.rejected] == [reason] * 2
    assert usable_rows(done) == N - 2
    assert all(math.isfinite(value) for value in (done.statistics["gap"].mean, done.statistics["gap"].std))


def test_numbers_of_every_wrong_kind_are_one_rule_each(tmp_path):
    """A reason begins with its rule, or nobody can count it; a number too long for a float must not end the run."""
    made = [record(i, "dict") for i in range(N)]
    made[1]["gap"] = 10**400
    made[2]["structure"] = {**made[2]["structure"], "lattice": {"matrix": [["x", 0, 0], [0, 4, 0], [0, 0, 4]]}}
    made[4]["structure"] = {**made[4]["structure"], "lattice": {"matrix": [[10**400, 0, 0], [0, 4, 0], [0, 0, 4]]}}
    made[6] = {
        "material_id": "s6",
        "gap": 1.0,
        "n": 1,
        "atoms": {**jarvis_atoms(structure(0)), "coords": [[10**400] * 3] * 8},
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*made, 7]))
    done = prepare_source(OwnData(path=path, name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert {row.row: row.reason.split(":")[0] for row in done.rejected} == {
        1: "bad target",
        2: "unreadable structure",
        4: "unreadable structure",
        6: "unreadable structure",
        12: "unreadable record",
    }


def test_a_csv_file_cut_within_a_structure(tmp_path):
    """Half a CIF file is one of fewer atoms."""
    path = make("csv", tmp_path)
    path.write_text(path.read_text().rstrip().removesuffix('"').rstrip().rpartition("\n")[0] + "\n")
    done = prepare_source(OwnData(path=path, name="mine", split=(0.5, 0.2, 0.2)), tmp_path / "data")
    assert [(row.row, row.reason) for row in done.rejected] == [
        (N - 1, "unreadable record: the file ends within quotes")
    ]
