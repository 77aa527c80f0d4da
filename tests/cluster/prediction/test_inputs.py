"""What predict finds in files: blocks of CIFs, compressed files, and damage that stays with the file it is in."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.prediction import inputs
from cluster.prediction.inputs import find_structures, plan_pieces, read_piece
from data_pipeline.crystal import structure_columns
from data_pipeline.formats.parse import from_pymatgen
from data_pipeline.prepare import prepare_dataset
from data_pipeline.schema import STRUCTURE_COLUMNS, structure_schema
from tests.cluster.trained import structures, write_model


def found(*paths):
    return list(find_structures([str(path) for path in paths]))


def named(text, name):
    head, _, rest = text.partition("\ndata_")
    return f"{head}\ndata_{name}\n{rest.partition(chr(10))[2]}"


def test_every_data_block_is_a_structure(tmp_path):
    primitive, _, cscl, _ = structures()
    blocks = [named(one.to(fmt="cif"), name) for one, name in ((primitive, "a"), (cscl, "b"), (primitive, "b"))]
    path = tmp_path / "two.cif"
    path.write_text("\ndata_global\n_publ_section_title x\n".join(["", *blocks, "data_bad\n_atom_site_label x\n"]))
    answers = found(path)
    assert [one.id for one in answers] == [f"{path}#a", f"{path}#b-1", f"{path}#b-2", f"{path}#bad"]
    assert [one.where for one in answers] == [one.id for one in answers]
    assert [one.problem is None for one in answers] == [True, True, True, False]
    assert [sorted(one.crystal.atomic_numbers.tolist()) for one in answers[:3]] == [[11, 17], [17, 55], [11, 17]]
    path.write_text(f"data_global\n_publ_section_title x\n{blocks[0]}")
    assert [(one.id, one.problem) for one in found(path)] == [(str(path), None)]


def test_compressed_files_are_taken_by_the_name_within(tmp_path):
    primitive = structures()[0]
    texts = {"cif": primitive.to(fmt="cif"), "poscar": primitive.to(fmt="poscar"), "json": primitive.to(fmt="json")}
    files = {
        "1-POSCAR.gz": gzip.compress(texts["poscar"].encode()),
        "2-CONTCAR.relax2.gz": gzip.compress(texts["poscar"].encode("utf-8-sig")),
        "3.cif.bz2": bz2.compress(texts["cif"].encode("utf-8-sig")),
        "4.CIF.xz": lzma.compress(texts["cif"].encode()),
        "5.json.bz2": bz2.compress(texts["json"].encode()),
        "6.vasp": texts["poscar"].encode("utf-8-sig"),
        "7.mcif": texts["cif"].encode(),
        "8.xsf.gz": gzip.compress(primitive.to(fmt="xsf").encode()),
        "9.txt.gz": b"no structure",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    answers = found(tmp_path)
    assert [(one.id, one.problem) for one in answers] == [(str(tmp_path / name), None) for name in list(files)[:-1]]
    assert {tuple(sorted(one.crystal.atomic_numbers.tolist())) for one in answers} == {(11, 17)}


def test_what_is_damaged_is_a_line_and_the_others_are_predicted(tmp_path, capsys):
    good = tmp_path / "good.cif"
    good.write_text(structures()[0].to(fmt="cif"))
    packed = bytearray(gzip.compress(b'[{"id": "a"}]' * 100))
    packed[10:40] = b"\xff" * 30  # no kind of deflated block begins so
    deep = {"id": "x", "structure": "[" * 100_000}
    files = {
        "a.json.gz": bytes(packed),
        "b.cif.gz": bytes(packed),
        "c.json": b"[" * 100_000,
        "d.json": json.dumps(deep).encode(),
        "e.xsf.xz": b"x",
        "f.vasp": b"GaAs\n1.0\n0 2.8 2.8\n2.8 0 2.8\n2.8 2.8 0\n1 1\nDirect\n0 0 0\n0.25 0.25 0.25\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "o.csv"
    model = str(write_model(tmp_path / "model"))
    names = [str(tmp_path / name) for name in files]
    assert main(["predict", model, *names[:3], str(good), *names[3:], "--output", str(out)]) == 1
    assert len(out.read_text().splitlines()) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == "6 of 7 structures could not be read"
    assert [line.split(": ")[0] for line in lines] == [*names[:3], f"{names[3]} x", *names[4:]]
    assert "Error -3 while decompressing" in lines[0] and "cannot be decompressed" in lines[1]
    assert "too deep to be a structure" in lines[2] and "recursion" in lines[3]
    assert "the POSCAR names none (VASP 4 form)" in lines[5]


def test_a_table_damaged_in_a_page_is_read_up_to_it(tmp_path):
    crystal, rows = from_pymatgen(structures()[0]), 3000
    schema = structure_schema([])
    names = [name for name in schema.names if name != "material_id"]
    columns = dict(zip(names, structure_columns([crystal] * rows), strict=True))
    columns["material_id"] = pa.array([f"m{i:05}" for i in range(rows)])
    path = tmp_path / "x.parquet"
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    pq.write_table(table, path, data_page_size=4096, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size * 3 // 4
    content[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(content)
    pieces = plan_pieces([str(path)])
    assert [piece.count for piece in pieces] == [1024, 1024, 952]
    answers = [list(read_piece(piece)) for piece in pieces]
    assert len(answers[0]) == 1024 and all(one.problem is None for one in answers[0])
    broken = [one for some in answers for one in some if one.problem is not None]
    assert broken and all(one.problem.startswith("unreadable file: ") for one in broken)
    assert all(one.where.endswith(" to 2999") or one.where.endswith(" to 2047") for one in broken)


def test_nulls_in_a_table_cost_their_rows(tmp_path):
    crystal = from_pymatgen(structures()[0])
    rows = pa.table(structure_columns([crystal] * 3), names=[name for name, _ in STRUCTURE_COLUMNS]).to_pylist()
    ids = ["a", None, "c"]
    rows[2]["disorder"] = [{"site": None, "atomic_number": 1, "occupancy": 1.0}]
    rows = [{"material_id": name, **row} for name, row in zip(ids, rows, strict=True)]
    path = tmp_path / "x.parquet"
    plain = structure_schema([])
    schema = pa.schema([field.with_nullable(True) for field in plain], metadata=plain.metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    answers = found(path)
    assert [one.id for one in answers] == ["a", f"{path}-1", "c"]
    assert [one.problem for one in answers[:2]] == [None, None] and answers[2].problem.startswith("wrong occupancies")


@pytest.mark.parametrize(
    "name", ["none.cif", "none.cif.gz", "none.xsf", "none.xsf.gz", "none.json", "POSCAR-none.bz2"]
)
def test_a_file_that_is_not_there(name, tmp_path):
    (one,) = found(tmp_path / name)
    assert one.id == str(tmp_path / name) and ("No such file" in one.problem or "not found" in one.problem)


def test_large_json_files_are_counted_record_by_record(tmp_path, monkeypatch):
    """Else 200,000 records in one file would pass for one structure, and wait in memory until all are predicted."""
    monkeypatch.setattr(inputs, "COUNTED_BYTES", 4000)
    one = json.loads(structures()[0].to(fmt="json"))
    lines = "\n".join(json.dumps({"id": f"s{i}", "structure": one}) for i in range(30))
    contents = {
        "1.cif": structures()[0].to(fmt="cif").encode(),
        "2.jsonl": lines.encode(),
        "3.json": json.dumps([{"structure": one}] * 7).encode(),
        "4.json": json.dumps(one).encode(),
        "5.jsonl.gz": gzip.compress(lines.encode(), compresslevel=0),
        "6.json": b"[" + b" " * 5000 + b'{"structure": ',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pieces = plan_pieces([str(tmp_path)])
    assert [(len(piece.paths), piece.count) for piece in pieces] == [(1, 1), (1, 30), (1, 7), (1, 1), (1, 30), (1, 1)]
    answers = [list(read_piece(piece)) for piece in pieces]
    assert [len(some) for some in answers] == [1, 30, 7, 1, 30, 1]
    assert [one.problem for some in answers[:-1] for one in some] == [None] * 69
    assert answers[-1][0].problem is not None


def test_a_folder_of_tables_and_files_is_read_whole(tmp_path):
    primitive = structures()[0]
    schema = structure_schema([])
    columns = [pa.array(["m0", "m1"]), *structure_columns([from_pymatgen(primitive)] * 2)]
    for name in ("a.parquet", "b.PARQUET"):
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), tmp_path / name)
    (tmp_path / "a.cif").write_text(primitive.to(fmt="cif"))
    (tmp_path / "POSCAR").write_text(primitive.to(fmt="poscar"))
    answers = found(tmp_path)
    assert [one.problem for one in answers] == [None] * 6
    assert [one.id for one in answers] == ["m0", "m1", "m0", "m1", str(tmp_path / "POSCAR"), str(tmp_path / "a.cif")]


def test_records_of_a_csv_file(tmp_path):
    path = tmp_path / "x.CSV"
    text = structures()[0].to(fmt="cif").replace('"', '""')
    path.write_text(f'ID,CIF\nm0,"{text}"\nm1,nonsense\n')
    one, other = found(path)
    assert (one.id, one.problem) == ("m0", None) and sorted(one.crystal.atomic_numbers.tolist()) == [11, 17]
    assert other.where == f"{path} record 1 m1" and other.problem.startswith("unreadable structure: ")


def test_a_prepared_data_set_is_told_by_its_splits(tmp_path):
    prepared = prepare_dataset("dielectric_2017", tmp_path)
    (one,) = found(prepared.path)
    assert one.problem == f"is a prepared data set; name a split in it, as {prepared.path / 'test'}"


def test_names_that_are_no_text_are_answered_with_escapes(tmp_path, elastic, monkeypatch, capsys):
    """Bytes that are not UTF-8 in names of files, half a character in an id: nothing else is lost by them."""
    monkeypatch.chdir(tmp_path)
    model, cscl = write_model(tmp_path / "m"), structures()[2]
    Path(os.fsdecode(b"a\xe9.cif")).write_text(cscl.to(fmt="cif"))
    Path("b.json").write_text(json.dumps([{"id": "x\ud800", "structure": json.loads(cscl.to(fmt="json"))}]))
    table = os.fsdecode(b"c\xe9.parquet")
    shutil.copy(next(elastic.split_path("test").glob("*.parquet")), table)
    named = [r"a\udce9.cif", r"x\ud800"]
    words = ["predict", str(model), os.fsdecode(b"a\xe9.cif"), "b.json"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in named)
    for out in ("o.csv", "o.jsonl", "o.parquet"):
        assert main([*words, table, "--output", out]) == 0
    assert pq.read_table("o.parquet").column("id").to_pylist()[:2] == named
    assert len(Path("o.csv").read_text().splitlines()) == len(Path("o.jsonl").read_text().splitlines()) + 1 == 121
    assert main([*words, "--output", os.fsdecode(b"o\xe9.csv")]) == 2
    assert capsys.readouterr().err == "error: output must have a name in UTF-8, got 'o\\\\udce9.csv'\n"
