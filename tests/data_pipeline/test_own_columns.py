"""Columns of the user's own tables that say more than structures and numbers: splits, and headings of every kind."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.crystal import structure_columns
from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.schema import structure_schema
from data_pipeline.table import StructureTable
from tests.data_pipeline.samples import HARDNESS, mixed_rock_salt
from tests.data_pipeline.test_own import jarvis_atoms, structure, write_folder

N = 12
HELD_OUT = {"test": ["s1", "s5", "s10"], "val": ["s2", "s7"]}
WORDS = {"train": ["train", "Training"], "val": ["valid", "dev"], "test": ["test", "TESTING"]}


def word(i):
    split = next((split for split, ids in HELD_OUT.items() if f"s{i}" in ids), "train")
    return WORDS[split][i % 2]


def rows(column="split"):
    return [
        {"id": f"s{i}", "gap (eV)": float(i), column: word(i), "atoms": json.dumps(jarvis_atoms(structure(0)))}
        for i in range(N)
    ]


def write(kind, path, made):
    if kind == "csv":
        lines = [[json.dumps(value) for value in row.values()] for row in made]
        quoted = [
            ",".join('"' + json.loads(v).replace('"', '""') + '"' if v[0] == '"' else v for v in r) for r in lines
        ]
        path.write_text("\n".join([",".join(f'"{name}"' for name in made[0]), *quoted]) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(made))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, made)))
    else:
        pq.write_table(pa.Table.from_pylist(made), path)


def ids(done, split):
    return [name.removesuffix(".cif") for name in StructureTable.open(done.split_path(split)).material_ids()]


def check_held_out(done):
    assert done.rejected == ()
    assert {split: ids(done, split) for split in HELD_OUT} == HELD_OUT
    split = json.loads((done.path / "dataset.json").read_text())["split"]
    assert split["rule"].startswith("as the source names them") and set(split) == {"rule"}


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_rows_held_out_by_the_user_are_not_trained_on(kind, tmp_path):
    write(kind, tmp_path / f"d.{kind}", rows("Split" if kind == "csv" else "split"))
    done = prepare_source(OwnData(path=tmp_path / f"d.{kind}", name="mine"), tmp_path / "data")
    check_held_out(done)
    assert done.target_names == ("gap",)


def test_a_folder_with_a_column_of_splits(tmp_path):
    write_folder(tmp_path / "f", ".cif")
    (tmp_path / "f" / "id_prop.csv").write_text(
        "id,gap (eV),split,n\n" + "".join(f"s{i},{i},{word(i)},{i + 1}\n" for i in range(N))
    )
    done = prepare_source(OwnData(path=tmp_path / "f", name="mine"), tmp_path / "data")
    check_held_out(done)
    assert [(t.name, t.unit) for t in done.targets] == [("gap", "eV"), ("n", "")]
    table = StructureTable.open(done.split_path("test"), ["gap", "n"])
    assert table.targets().tolist() == [[1, 2], [5, 6], [10, 11]]


def test_a_structure_table_with_a_column_of_splits(tmp_path):
    schema = structure_schema([HARDNESS])
    columns = [pa.array([f"s{i}" for i in range(N)]), *structure_columns([mixed_rock_salt()] * N)]
    table = pa.Table.from_arrays([*columns, pa.array([float(i) for i in range(N)])], schema=schema)
    splits = [word(i) for i in range(N)]
    pq.write_table(table.append_column("split", pa.array(splits)), tmp_path / "t.parquet")
    check_held_out(prepare_source(OwnData(path=tmp_path / "t.parquet", name="mine"), tmp_path / "data"))
    pq.write_table(table.append_column("split", pa.array(["?", *splits[1:]])), tmp_path / "u.parquet")
    done = prepare_source(OwnData(path=tmp_path / "u.parquet", name="other"), tmp_path / "data")
    assert [(row.row, row.reason.split(";")[0]) for row in done.rejected] == [(0, "unknown split: '?'")]


def test_splits_that_cannot_be_used(tmp_path):
    made = rows()
    made[3]["split"] = "holdout"
    write("json", tmp_path / "a.json", made)
    done = prepare_source(OwnData(path=tmp_path / "a.json", name="mine"), tmp_path / "data")
    assert [(row.row, row.reason.split(":")[0]) for row in done.rejected] == [(3, "unknown split")]
    made[3]["split"] = ""
    write("json", tmp_path / "a.json", made)
    with pytest.raises(
        DataError, match="1 of 12 usable rows have no split, though the others do; the first is a.json"
    ):
        prepare_source(OwnData(path=tmp_path / "a.json", name="mine"), tmp_path / "data")


def test_without_names_in_the_column_the_recipe_decides(tmp_path):
    write("json", tmp_path / "a.json", [{**row, "split": None} for row in rows()])
    done = prepare_source(OwnData(path=tmp_path / "a.json", name="mine", split=(0.5, 0.25, 0.25)), tmp_path / "data")
    assert (done.sizes.train, done.sizes.val, done.sizes.test) == (6, 3, 3)
    split = json.loads((done.path / "dataset.json").read_text())["split"]
    assert "shuffled" in split["rule"] and split["seed"] == 123


@pytest.mark.parametrize("executor", ["process", "ray"])
def test_rows_that_share_a_name_are_all_used(executor, tmp_path):
    made = [{"name": ["NaCl", "KCl", "MgO"][i % 3], **row} for i, row in enumerate(rows("note"))]
    for row in made:
        del row["id"]
    made[5]["name"], made[7]["name"] = "alone", "bad"
    made[7]["atoms"] = ""
    write("jsonl", tmp_path / "a.jsonl", made)
    own = OwnData(path=tmp_path / "a.jsonl", name="mine", split=(0.5, 0.25, 0.25))
    done = prepare_source(own, tmp_path / "data", executor=executor)
    assert [(row.row, row.material_id, row.reason.split(":")[0]) for row in done.rejected] == [
        (7, "bad", "empty structure")
    ]
    found = {}
    for split in ("train", "val", "test"):
        table = StructureTable.open(done.split_path(split), ["gap"])
        found |= dict(zip(table.material_ids(), table.targets()[:, 0].tolist(), strict=True))
    names = {i: row["name"] if i == 5 else f"{row['name']}-{i}" for i, row in enumerate(made) if i != 7}
    assert len(found) == 5 + 2 + 2
    assert found.items() <= {name: float(i) for i, name in names.items()}.items()


def headed(*headings):
    return [
        {**dict.fromkeys(headings, float(i)), **{k: row[k] for k in ("id", "atoms")}} for i, row in enumerate(rows())
    ]


def test_headings_of_published_tables(tmp_path):
    write("csv", tmp_path / "a.csv", headed("log10(K_VRH)", "log10(G_VRH)", "gap (eV)", "gap (Ha)", "Band gap, eV"))
    own = OwnData(path=tmp_path / "a.csv", name="mine", split=(0.5, 0.25, 0.25))
    done = prepare_source(own, tmp_path / "data")
    assert [(target.name, target.unit) for target in done.targets] == [
        ("log10_K_VRH", ""),
        ("log10_G_VRH", ""),
        ("gap_eV", "eV"),
        ("gap_Ha", "Ha"),
        ("Band_gap", "eV"),
    ]


@pytest.mark.parametrize("wanted", ["Band gap, eV,log10(K_VRH)", "Band_gap,log10_K_VRH"])
@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_the_command_takes_headings_and_names(kind, wanted, tmp_path):
    if kind == "csv":
        write("csv", tmp_path / "own", headed("log10(K_VRH)", "Band gap, eV"))
        (tmp_path / "own").rename(tmp_path / "own.csv")
    else:
        write_folder(tmp_path / "own", ".cif")
        lines = "".join(f"s{i},{i},{i}\n" for i in range(N))
        (tmp_path / "own" / "id_prop.csv").write_text(f'id,log10(K_VRH),"Band gap, eV"\n{lines}')
    source = tmp_path / ("own.csv" if kind == "csv" else "own")
    words = ["prepare", "--source", source, "--name", "mine", "--split", "0.5,0.25,0.25", "--targets", wanted]
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *map(str, words), "--data_dir", str(tmp_path / "data")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "targets Band_gap [eV], log10_K_VRH" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("heading", "message"),
    [
        ("id,split", "no column is a target"),
        ("id,gap,gap", "two columns have one heading; the first line is id, gap"),
    ],
)
def test_headings_of_a_folder_that_cannot_be_used(heading, message, tmp_path):
    write_folder(tmp_path / "f", ".cif")
    (tmp_path / "f" / "id_prop.csv").write_text(heading + "\n" + "s1,1,1\n")
    with pytest.raises(DataError, match=message):
        prepare_source(OwnData(path=tmp_path / "f", name="mine"), tmp_path / "data")
