"""predict as a user meets it: files, folders and tables in; a table, CSV, JSONL or Parquet out."""

import csv
import gzip
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow.fs import FileSystem, copy_files

from cluster.cli import main
from cluster.prediction import predict
from cluster.prediction.inputs import Found, find_structures
from cluster.prediction.predict import Ensemble, crystal_work
from cluster.prediction.seen import Seen, seen_in
from crystalformer import load_model
from data_pipeline.elements import number_of
from data_pipeline.formats.parse import from_pymatgen
from data_pipeline.table import StructureTable
from tests.cluster.s3 import s3_server
from tests.cluster.trained import structures, write_model

HEADER = ["id", "formula", "shear [log10(GPa)]", "bulk [GPa]", "warning"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and the same four structures as files of three formats."""
    path = tmp_path_factory.mktemp("predict")
    write_model(path / "a", seed=1)
    write_model(path / "b", seed=2)
    files = path / "files"
    files.mkdir()
    primitive, cubic, cscl, alloy = structures()
    (files / "1.cif").write_text(primitive.to(fmt="cif"))
    (files / "2-POSCAR").write_text(cubic.to(fmt="poscar"))
    (files / "3.json").write_text(cscl.to(fmt="json"))
    (files / "4.cif").write_text(alloy.to(fmt="cif"))
    (files / "notes.txt").write_text("not a structure")
    return path


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def rows_of(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def numbers(rows, first=2, last=4):
    return np.array([[float(cell) for cell in row[first:last]] for row in rows])


def test_a_folder_of_files_gives_the_numbers_of_the_library(tmp_path):
    out = tmp_path / "new" / "out.csv"
    assert main(["predict", "a", "files", "--output", str(out)]) == 0
    header, *rows = rows_of(out)
    assert header == HEADER
    assert [row[0] for row in rows] == ["files/1.cif", "files/2-POSCAR", "files/3.json", "files/4.cif"]
    assert [row[1] for row in rows] == ["NaCl", "NaCl", "CsCl", "Zn1Cu0.5Au0.5"]
    assert [row[-1] for row in rows] == ["", "", "", "never seen in training: Cu Zn Au"]
    expected = load_model("a").predict([structures()[i] for i in (0, 0, 2, 3)])
    np.testing.assert_allclose(numbers(rows), expected, rtol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]


def test_every_format_holds_the_same(tmp_path):
    files = [tmp_path / f"out{suffix}" for suffix in (".csv", ".jsonl", ".parquet")]
    for file in files:
        assert main(["predict", "a", "files", "--output", str(file)]) == 0
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert lines == pq.read_table(files[2]).to_pylist()
    assert list(lines[0]) == rows_of(files[0])[0] == HEADER
    found = [[line[name] for name in HEADER[2:4]] for line in lines]
    np.testing.assert_allclose(numbers(rows_of(files[0])[1:]), found, rtol=1e-7)


def test_order_is_that_of_the_input_and_the_batch_size_does_not_matter(tmp_path):
    names = ["files/3.json", "files", "files/1.cif"]
    results = []
    for size in ("1", "4", "64"):
        out = tmp_path / f"{size}.csv"
        assert main(["predict", "a", *names, "--output", str(out), "--batch-size", size]) == 0
        results.append(rows_of(out)[1:])
    assert [row[0][6] for row in results[0]] == list("312341")
    for other in results[1:]:
        assert [row[:2] for row in other] == [row[:2] for row in results[0]]
        np.testing.assert_allclose(numbers(other), numbers(results[0]), rtol=1e-6, atol=1e-6)


def test_a_structure_table(elastic, tmp_path):
    folder = elastic.split_path("test")
    out = tmp_path / "out.csv"
    assert main(["predict", "a", str(folder), str(next(folder.glob("*.parquet"))), "--output", str(out)]) == 0
    rows = rows_of(out)[1:]
    table = StructureTable.open(folder)
    assert [row[0] for row in rows] == table.material_ids() * 2
    half = len(rows) // 2
    np.testing.assert_allclose(numbers(rows[:half]), numbers(rows[half:]), rtol=1e-6)


def test_what_cannot_be_read_is_told_and_the_others_are_predicted(tmp_path, capsys):
    (tmp_path / "bad.cif").write_text("data_x\nloop_\n")
    (tmp_path / "close.vasp").write_text("x\n1\n1 0 0\n0 1 0\n0 0 1\nNa Cl\n1 1\ndirect\n0 0 0\n0.1 0 0\n")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    unread = ("bad.cif", "close.vasp", "bad.parquet", "empty", "none.cif", "none.xyz", "x" * 300)
    bad = [str(tmp_path / name) for name in unread]
    assert main(["predict", "a", *bad, "files/1.cif", "files/notes.txt"]) == 1
    answer = capsys.readouterr()
    lines = answer.err.splitlines()
    assert lines[-1] == "8 of 9 structures could not be read"
    assert [line.split(": ")[0] for line in lines[:-1]] == [*bad, "files/notes.txt"]
    assert "unreadable structure" in lines[0]
    assert "overlapping atoms" in lines[1]
    assert "not a Parquet file" in lines[2]
    assert "holds no structure file" in lines[3]
    assert "No such file" in lines[4] and "No such file" in lines[5]
    assert "File name too long" in lines[6]
    header, row = answer.out.splitlines()
    assert header.split("  ")[0] == "id" and row.startswith("files/1.cif  NaCl")
    assert "warning" not in header


def test_where_nothing_can_be_read_that_is_the_error(tmp_path, capsys):
    """As where a name is mistyped: no empty table, and not the exit status of one that is nearly whole."""
    out = tmp_path / "out.csv"
    for more in ([], ["--output", str(out)]):
        assert main(["predict", "a", "slat.cif", *more]) == 2
        assert capsys.readouterr() == ("", "error: slat.cif: No such file or directory\n")
    assert main(["predict", "a", "slat.cif", "files/notes.txt", "--output", str(out)]) == 2
    answer = capsys.readouterr()
    first, second, last = answer.err.splitlines()
    assert answer.out == "" and second.startswith("files/notes.txt: ")
    assert first == "slat.cif: No such file or directory"
    assert last == f"error: none of 2 structures could be read; {first}"
    assert not out.exists()


def test_what_a_job_is_to_leave_lies_where_it_lasts(folder, tmp_path, monkeypatch):
    """A job's own folder is a copy that Ray deletes; what lies in the copy is found there, the rest at home."""
    monkeypatch.setenv("CRYSTALFORMER_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "1.cif").write_bytes((folder / "files" / "1.cif").read_bytes())
    assert main(["predict", "a,b", "brought", "files/4.cif", "--output", "of-a-job.csv"]) == 0
    assert [row[0] for row in rows_of(folder / "of-a-job.csv")[1:]] == ["brought/1.cif", str(folder / "files/4.cif")]
    assert main(["convert", "a", "of-a-job.ckpt", "--to-reference"]) == 0
    assert (folder / "of-a-job.ckpt").is_file()
    assert main(["info", "a"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brought"]


def test_several_models_give_mean_and_spread(tmp_path):
    outs = {}
    for models in ("a", "b", "a,b"):
        outs[models] = tmp_path / f"{models}.csv"
        assert main(["predict", models, "files", "--output", str(outs[models])]) == 0
    header, *rows = rows_of(outs["a,b"])
    units = ["shear [log10(GPa)]", "shear spread [log10(GPa)]", "bulk [GPa]", "bulk spread [GPa]"]
    assert header == ["id", "formula", *units, "warning"]
    both = np.stack([numbers(rows_of(outs[model])[1:]) for model in ("a", "b")])
    found = numbers(rows, 2, 6)
    np.testing.assert_allclose(found[:, ::2], both.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1::2], both.std(0, ddof=1), rtol=1e-4, atol=1e-7)


def as_jarvis(structure) -> dict:
    return {
        "lattice_mat": structure.lattice.matrix.tolist(),
        "coords": structure.frac_coords.tolist(),
        "elements": [site.specie.symbol for site in structure],
        "cartesian": False,
    }


def test_json_of_every_shape_and_a_bad_record(tmp_path, capsys):
    primitive, cubic, cscl, _ = structures()
    records = [
        {"jid": "J-1", "atoms": as_jarvis(primitive), "gap": 5.0},
        {"id": "bad", "structure": {"lattice": {}}},
        {**cubic.as_dict(), "material_id": "bare"},
        {"cif": cscl.to(fmt="cif")},
        {"id": "none", "gap": 1.0},
    ]
    (tmp_path / "list.json").write_text(json.dumps(records))
    with gzip.open(tmp_path / "by-id.json.gz", "wt") as file:
        json.dump({"x": as_jarvis(cscl), "y": cubic.as_dict()}, file)
    (tmp_path / "lines.jsonl").write_text("\n".join([json.dumps(as_jarvis(primitive)), "{"]))
    (tmp_path / "one.json").write_text(json.dumps(as_jarvis(cscl)))
    (tmp_path / "no.json").write_text("[1")
    out = tmp_path / "out.csv"
    names = ["list.json", "by-id.json.gz", "lines.jsonl", "one.json", "no.json"]
    assert main(["predict", "a", *(str(tmp_path / name) for name in names), "--output", str(out)]) == 1
    rows = rows_of(out)[1:]
    lines, one = str(tmp_path / "lines.jsonl"), str(tmp_path / "one.json")
    assert [row[0] for row in rows] == ["J-1", "bare", f"{tmp_path}/list.json-3", "x", "y", f"{lines}-0", one]
    expected = load_model("a").predict([structures()[i] for i in (0, 0, 2, 2, 0, 0, 2)])
    np.testing.assert_allclose(numbers(rows), expected, rtol=1e-5)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"{tmp_path}/list.json record 1 bad: unreadable structure: pymatgen dictionary")
    assert told[1].startswith(f"{tmp_path}/list.json record 4 none: empty structure")
    assert told[2].startswith(f"{lines} record 1: unreadable record")
    assert told[3].startswith(f"{tmp_path}/no.json: cannot be read: the JSON array ends within")
    assert told[4] == "4 of 11 structures could not be read"


def test_crystals_outside_what_was_seen_are_warned_of(tmp_path):
    seen = {"cell_sizes": [2, 8], "number_densities": [0.04, 0.05]}
    model = write_model(tmp_path / "model")
    card = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**card, "ranges": seen}))
    primitive, _, cscl, alloy = structures()
    large = primitive * (3, 3, 1)
    large.replace(0, "Cs")
    for number, structure in enumerate([primitive, cscl, alloy, large]):
        (tmp_path / f"{number}.cif").write_text(structure.to(fmt="cif"))
    out = tmp_path / "out.csv"
    assert main(["predict", str(model), *(f"{tmp_path}/{i}.cif" for i in range(4)), "--output", str(out)]) == 0
    assert [row[-1] for row in rows_of(out)[1:]] == [
        "",
        "density 0.0286 atoms/Å³, 0.0400 to 0.0500 in training",
        "never seen in training: Cu Zn Au; density 0.0779 atoms/Å³, 0.0400 to 0.0500 in training",
        "18 atoms in the cell, 2 to 8 in training",
    ]
    both = tmp_path / "both.csv"
    assert main(["predict", f"{model},a", f"{tmp_path}/3.cif", "--output", str(both)]) == 0
    assert rows_of(both)[1][-1] == ""


def test_the_ranges_are_those_of_the_table(elastic):
    table = StructureTable.open(elastic.split_path("train"), ["shear"])
    elements, ranges = seen_in(table)
    crystals = [found.crystal for found in find_structures([str(elastic.split_path("train"))])]
    density = [len(c.atomic_numbers) / abs(np.linalg.det(c.lattice)) for c in crystals]
    assert ranges.cell_sizes == (min(table.sizes), max(table.sizes))
    assert ranges.number_densities == pytest.approx((min(density), max(density)))
    assert set(elements) <= set(elastic.elements) and len(elements) > 50
    seen = Seen(elements=frozenset(map(number_of, elements)), ranges=ranges)
    assert not any(seen.warning(crystal) for crystal in crystals)


def test_batches_are_cut_by_work(elastic, monkeypatch):
    found = list(find_structures([str(elastic.split_path("test"))]))
    models = Ensemble(["a"], torch.device("cpu"))
    whole = [prediction.values for prediction in models.predict(found)]
    sizes = []
    original = models.predict_batch
    monkeypatch.setattr(predict, "WORK_AT_ONCE", 20_000)
    monkeypatch.setattr(models, "predict_batch", lambda batch: sizes.append(batch.num_crystals) or original(batch))
    cut = [prediction.values for prediction in models.predict(found)]
    work = [crystal_work(one.crystal, models.neighborhoods[0].radius) for one in found]
    ends = np.cumsum(sizes)
    for start, end in zip([0, *ends], ends, strict=False):
        assert end - start == 1 or sum(work[start:end]) <= 20_000
    assert 5 < len(sizes) < len(found) and ends[-1] == len(found)
    np.testing.assert_allclose(cut, whole, rtol=1e-6, atol=1e-6)


def test_warnings_are_silenced_in_the_thread_that_reads_alone(tmp_path, monkeypatch):
    """What a reader warns of is why a file is refused, and another thread that silences warnings would lose it."""
    write_model(tmp_path)
    threads = set()

    def told(function):
        def inner(*args):
            threads.add(threading.get_ident())
            return function(*args)

        return inner

    monkeypatch.setattr(predict, "formula", told(predict.formula))
    crystals = [Found(id=str(i), where="", crystal=from_pymatgen(one)) for i, one in enumerate(structures())]
    found = (told(lambda one: one)(one) for one in crystals)
    answers = list(Ensemble([str(tmp_path)], torch.device("cpu")).predict(found, 1))
    assert [one.formula for one in answers] == [one.composition.reduced_formula for one in structures()]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_one_structure_needs_neither_ray_nor_a_compiler():
    code = (
        "import sys; from cluster.cli import main; assert main(['predict', 'a', 'files/1.cif']) == 0; "
        "print([name for name in ('ray', 'pandas', 'torch._dynamo', 'sympy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_models_in_an_object_store(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path / "log") as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        store = FileSystem.from_uri("s3://bucket")[0]
        copy_files("a", "bucket/run/model", destination_filesystem=store)
        assert main(["predict", "s3://bucket/run/model,a", "files/1.cif"]) == 0
        assert "NaCl" in capsys.readouterr().out
        assert main(["info", "s3://bucket/run/model"]) == 0
        assert capsys.readouterr().out.startswith("model      s3://bucket/run/model\n")
        assert main(["predict", "s3://bucket/run", "files/1.cif"]) == 2
        assert "did you mean s3://bucket/run/model?" in capsys.readouterr().err
        out = tmp_path / "theirs.ckpt"
        assert main(["convert", "s3://bucket/run", str(out), "--to-reference"]) == 0 and out.is_file()


MISTAKES = [
    (["nowhere", "files"], "nowhere is not a model folder"),
    ([".", "files"], ". is not a model folder"),
    (["a,", "files"], "MODEL must be folders joined by commas"),
    (["a"], "required: INPUT"),
    (["a", "files", "--output", "x.txt"], "output must end in .csv, .jsonl, .parquet, got 'x.txt'"),
    (["a", "files", "--output", "s3://b/x.csv"], "output must be a path"),
    (["a", "files", "--output", "s3://key:se/cret@b/x.csv"], "there are several, got 's3://***@b/x.csv'"),
    (["s3://key:se/cret@b/m,", "files"], "MODEL must be folders joined by commas, got 's3://***@b/m,'"),
    (["a", "files", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
    (["a", "files", "--device", "tpu"], "invalid choice: 'tpu'"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(words, message, capsys):
    assert main(["predict", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"elements": 5}, "config.json: provenance's elements must be a list of symbols, got 5"),
        ({"elements": "NaCl"}, "config.json: provenance's elements must be a list of symbols, got 'NaCl'"),
        ({"elements": ["Na", 17]}, "config.json: provenance's elements must be a list of symbols, got ['Na', 17]"),
        ({"elements": ["Na", "Xx"]}, "config.json: provenance's elements: unknown element 'Xx'"),
        ({"dataset": ["a"]}, "config.json: provenance's dataset must be a text, got ['a']"),
    ],
    ids=str,
)
def test_a_card_of_another_shape_is_one_line(said, message, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    card = json.loads((model / "config.json").read_text())
    card["provenance"] |= said
    (model / "config.json").write_text(json.dumps(card))
    assert main(["predict", str(model), "files"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {model}") and error.endswith(f"{message}\n") and error.count("\n") == 1


def test_what_files_say_is_shown_and_not_obeyed(tmp_path, capsys):
    hostile = "m1\x1b[2J\x1b]0;owned\x07\nerror: forged line"
    shown = r"m1\x1b[2J\x1b]0;owned\x07\nerror: forged line"
    good = {"id": hostile, "structure": json.loads(structures()[2].to(fmt="json"))}
    (tmp_path / "all.json").write_text(json.dumps([good, {"id": hostile}, {"id": "b"}]))
    assert main(["predict", "a", str(tmp_path / "all.json")]) == 1
    told = capsys.readouterr()
    problem = f"{tmp_path}/all.json record 1 {shown}: empty structure"
    assert told.err.startswith(problem) and told.err.count("\n") == 3
    assert told.out.split("\n")[1].startswith(f"{shown}  CsCl ") and told.out.count("\n") == 2
    assert (told.out + told.err).replace("\n", "").isprintable()
    assert main(["predict", "a", str(tmp_path / "all.json"), "--output", str(tmp_path / "o.csv")]) == 1
    assert rows_of(tmp_path / "o.csv")[1][0] == hostile
    (tmp_path / "one.json").write_text(json.dumps({"id": "m\x1b[2J"}))
    capsys.readouterr()
    assert main(["predict", "a", str(tmp_path / "one.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/one.json") and error[:-1].isprintable()


def test_a_card_is_shown_and_not_obeyed(tmp_path, capsys):
    model = write_model(tmp_path / "model", dataset="x\x1b[2J\nseen       all", note={"\x07": ["\r"]})
    assert main(["info", str(model)]) == 0
    text = capsys.readouterr().out
    assert "origin     dataset: x\\x1b[2J\\nseen       all\n" in text and "origin     note: \\x07 \\r\n" in text
    assert text.replace("\n", "").isprintable()
    card = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**card, "format_version": "\x1b"}))
    assert main(["info", str(model)]) == 2
    assert main(["predict", "a\x1b[2J", "files"]) == 2
    error = capsys.readouterr().err
    assert r"error: a\x1b[2J is not a model folder" in error and error.replace("\n", "").isprintable()
    assert main(["info", "s3://key:se/cret@bucket/model", "--plot"]) == 2
    assert "--plot draws data sets, and s3://***@bucket/model is a model folder" in capsys.readouterr().err


def test_models_of_other_targets_do_not_mix(tmp_path, capsys):
    other = write_model(tmp_path / "other")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"bulk"', '"hardness"'))
    assert main(["predict", f"a,{other}", "files"]) == 2
    assert "predicts shear [log10(GPa)], hardness [GPa], but a shear" in capsys.readouterr().err


def test_a_run_folder_leads_to_its_model(tmp_path, capsys):
    write_model(tmp_path / "run" / "model")
    assert main(["predict", str(tmp_path / "run"), "files"]) == 2
    assert f"did you mean {tmp_path / 'run' / 'model'}?" in capsys.readouterr().err


def test_info_of_a_model(tmp_path, capsys):
    model = write_model(tmp_path / "model", dataset="elastic_tensor_2015", val_mae={"shear": 0.25})
    assert main(["info", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", str(model)]
    assert "target     shear [log10(GPa)] = output * 0.5 + 1.25" in lines
    assert "setting    scale_real 0.9" in lines and "setting    embedding_dim 32" in lines
    assert "origin     elements: Na Cl Cs" in lines and "origin     val_mae: shear 0.25" in lines
    assert not any(line.startswith("seen ") for line in lines)
    card = json.loads((model / "config.json").read_text())
    ranges = {"cell_sizes": [2, 8], "number_densities": [0.02, 0.125]}
    (model / "config.json").write_text(json.dumps({**card, "ranges": ranges}))
    assert main(["info", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "seen       cells of 2 to 8 atoms" in lines and "seen       densities of 0.0200 to 0.1250 atoms/Å³" in lines
    )
    assert main(["info", str(model), "--plot"]) == 2
    assert "--plot draws data sets" in capsys.readouterr().err
    (model / "config.json").unlink()
    assert main(["info", str(model)]) == 2
    assert "is not a model folder: it has no config.json" in capsys.readouterr().err
