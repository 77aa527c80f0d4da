"""prepare and info as a user meets them, on real small files of the user's own. Nothing here starts Ray."""

import csv
import gzip
import json
import re
from functools import cache

import pytest
from pymatgen.core import Lattice, Structure

from cluster.cli import main
from cluster.commands.train import find_data
from cluster.data.tables import SPLITS, open_split
from cluster.settings.config import TrainConfig
from crystalformer.config import Neighborhood
from data_pipeline.errors import DataError
from data_pipeline.prepared import load_prepared
from data_pipeline.table import StructureTable
from tests.cluster.test_cli import failure

N = 20


HOSTILE = "\x1b[2J\nerror: forged"
"""Clears a terminal, and looks like a line of ours."""


@cache
def structure(i: int) -> Structure:
    return Structure(Lattice.cubic(3.9 + 0.02 * i), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def jarvis_atoms(s: Structure) -> dict:
    return {
        "lattice_mat": s.lattice.matrix.tolist(),
        "coords": s.frac_coords.tolist(),
        "elements": [site.specie.symbol for site in s],
        "cartesian": False,
    }


def cif_folder(path):
    path.mkdir()
    for i in range(N):
        (path / f"s{i}.cif").write_text(structure(i).to(fmt="cif"))
    (path / "id_prop.csv").write_text("".join(f"s{i},{0.5 * i}\n" for i in range(N)))
    return path


def csv_file(path):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["material_id", "gap", "label", "cif"])
        writer.writeheader()
        for i in range(N):
            writer.writerow({"material_id": f"s{i}", "gap": 0.5 * i, "label": "x", "cif": structure(i).to(fmt="cif")})
    return path


def json_gz_file(path, bad=()):
    rows = [{"jid": f"s{i}", "gap": 0.5 * i, "n": i, "atoms": jarvis_atoms(structure(i))} for i in range(N)]
    for i in bad:
        rows[i]["atoms"]["lattice_mat"] = [[0, 0, 0]] * 3
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return path


SOURCES = {
    "folder": (cif_folder, "cifs", "target"),
    "csv": (csv_file, "data.csv", "gap"),
    "json": (json_gz_file, "data.json.gz", "gap"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_own_structures_are_prepared_described_and_found_by_train(kind, tmp_path, capsys):
    write, file, target = SOURCES[kind]
    data = str(tmp_path / "data")
    words = ["--source", str(write(tmp_path / file)), "--name", "mine", "--data-dir", data]
    assert main(["prepare", *words, "--split", "0.5,0.2,0.3", "--strict"]) == 0
    answer = capsys.readouterr().out
    assert "mine: 10 train, 4 val, 6 test; targets " in answer
    assert "no row was rejected" in answer
    command = re.search(r"crystalformer train (.*)", answer).group(1).split()
    assert command == ["--dataset", "mine", "--target", target, "--data_dir", data]

    assert main(re.search(r"crystalformer (info .*)", answer).group(1).split()) == 0
    text = capsys.readouterr().out
    assert text.startswith("mine: 10 train, 4 val, 6 test\n")
    assert f"{target} [" in text and "Cs 20" in text

    config = find_data(TrainConfig.from_flat({"dataset": "mine", "target": target, "data_dir": data}))
    assert (config.data.dataset, config.data.target) == ("mine", (target,))
    prepared = load_prepared(tmp_path / "data", "mine")
    tables = {split: open_split(prepared, split, (target,), Neighborhood(6.0)) for split in SPLITS}
    assert [len(table.structures) for table in tables.values()] == [10, 4, 6]


def test_the_default_folder_needs_no_word_in_the_commands_that_follow(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    csv_file(tmp_path / "data.csv")
    words = ["prepare", "--source", "data.csv", "--name", "mine"]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("train --dataset mine --target gap\n")
    assert main([*words, "--data_dir", "other place"]) == 0
    assert capsys.readouterr().out.endswith("train --dataset mine --target gap --data_dir 'other place'\n")


def test_split_seed_and_targets_reach_the_data(tmp_path, capsys):
    source = json_gz_file(tmp_path / "data.json.gz")
    orders = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        words = ["--source", str(source), "--name", name, "--seed", seed, "--targets", "gap, n"]
        assert main(["prepare", *words, "--data_dir", str(tmp_path)]) == 0
        assert "targets gap, n\n" in capsys.readouterr().out
        tables = open_split(load_prepared(tmp_path, name), "train", ("gap", "n"), Neighborhood(5.0))
        orders[name] = tables.structures.column("material_id").to_pylist()
    assert orders["a"] == orders["b"] != orders["c"]
    assert main(["prepare", *words[:4], "--name", "d", "--targets", "n", "--data_dir", str(tmp_path)]) == 0
    assert load_prepared(tmp_path, "d").target_names == ("n",)


def test_a_source_with_splits_of_its_own_says_that_they_are_used(tmp_path, capsys):
    source = json_gz_file(tmp_path / "data.json.gz")
    rows = json.loads(gzip.decompress(source.read_bytes()))
    for i, row in enumerate(rows):
        row["split"] = ("train", "train", "val", "test")[i % 4]
    source.write_bytes(gzip.compress(json.dumps(rows).encode()))
    words = ["prepare", "--source", str(source), "--name", "mine", "--data_dir", str(tmp_path)]
    assert main([*words, "--split", "0.5,0.2,0.3"]) == 0
    text = capsys.readouterr().out
    assert "mine: 10 train, 5 val, 5 test" in text
    assert "splits    the source's own: its column or files name them, not --split and --seed\n" in text


def test_rejected_rows_are_summarized_and_strict_refuses_them(tmp_path, capsys):
    source = json_gz_file(tmp_path / "data.json.gz", bad=(3, 4))
    words = ["prepare", "--source", str(source), "--name", "mine", "--data_dir", str(tmp_path)]
    assert main([*words, "--strict"]) == 2
    assert "2 rows rejected, and --strict is given" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "2 rows rejected: 2 " in text
    assert "data.json.gz row 3 s3: " in text
    assert main(["info", "mine", "--data_dir", str(tmp_path)]) == 0
    assert "data.json.gz row 4 s4: " in capsys.readouterr().out


def test_ids_units_and_names_are_shown_and_not_obeyed(tmp_path, capsys):
    rows = [
        {"jid": f"s{i}{HOSTILE}", "gap [\x1b\nok]": 0.5 * i, "atoms": jarvis_atoms(structure(i))} for i in range(N)
    ]
    rows[3]["atoms"]["lattice_mat"] = [[0, 0, 0]] * 3
    source = tmp_path / "data\x07.json"
    source.write_text(json.dumps(rows))
    words = ["prepare", "--source", str(source), "--name", "mine", "--data_dir", str(tmp_path)]
    row = r"data\x07.json row 3 s3\x1b[2J\nerror: forged: volume"
    assert main([*words, "--strict"]) == 2
    error = capsys.readouterr().err
    assert row in error and error.count("\n") == 1 and error[:-1].isprintable()
    for command in (words, ["info", "mine", "--data_dir", str(tmp_path)]):
        assert main(command) == 0
        lines = capsys.readouterr().out.split("\n")
        assert any(line.startswith(f"  {row}") for line in lines)
        assert any(r"gap [\x1b\nok]" in line for line in lines)
        assert all(line.isprintable() for line in lines)
    names = [name for split in SPLITS for name in StructureTable.open(tmp_path / "mine" / split).material_ids()]
    assert sorted(names) == sorted(f"s{i}{HOSTILE}" for i in range(N) if i != 3)


def test_the_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    csv_file(tmp_path / "data.csv")
    assert main(["prepare", "--source", "data.csv", "--name", "mine"]) == 0
    assert main(["info", "mine", "--plot"]) == 0
    assert main(["info", "mine", "--plot", "other.png"]) == 0
    text = capsys.readouterr().out
    for name in ("mine.png", "other.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"plot      {name}\n" in text


MISTAKES = [
    (["prepare", "--source", "x"], "--source 'x' needs --name"),
    (["prepare", "mine", "--source", "x", "--name", "y"], "give DATASET or --source, not both: got 'mine'"),
    (["prepare", "--name", "y"], "give DATASET, or --source PATH and --name NAME"),
    (["prepare", "flla_2015", "--name", "y"], "--name goes with --source, not with the data set 'flla_2015'"),
    (["prepare", "flla_2015", "--split", "0.5,0.2,0.3"], "--split goes with --source"),
    (["prepare", "flla_2015", "--seed", "0"], "--seed goes with --source"),
    (["prepare", "--source", "x", "--name", "y", "--split", "half"], "--split must be three numbers"),
    (["prepare", "--source", "x", "--name", "y", "--split", "0.5,0.5"], "split (0.5, 0.5): give train, val and test"),
    (["prepare", "--source", "x", "--name", "y", "--split", "0.8,0.2,0.2"], "a sum of at most 1"),
    (["prepare", "--source", "x", "--name", "y", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["prepare", "--source", "x", "--name", "y", "--targets", "a,,b"], "--targets must be column names"),
    (["prepare", "--source", "x", "--name", "../y"], "data set name '../y': use letters"),
    (["prepare", "--source", "x", "--name", "flla_2015"], "is that of a registered set"),
    (["prepare", "--source", "x", "--name", "y"], "x: not found; --source takes a folder of CIF"),
    (["info", "--plot"], "--plot needs DATASET"),
    (["info", "flla_2015", "--plot"], "data set 'flla_2015' is not prepared"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    csv_file(tmp_path / "data.csv")
    assert main(["prepare", "--source", "data.csv", "--name", "mine"]) == 0
    for name in ("no/such/folder.png", "picture.xyz"):
        assert main(["info", "mine", "--plot", name]) == 2
        assert f"error: --plot {name}: " in capsys.readouterr().err


def test_pickles_need_their_flag(tmp_path, capsys):
    for split in SPLITS:
        (tmp_path / "set" / split / "raw").mkdir(parents=True)
        (tmp_path / "set" / split / "raw" / "raw_data.pkl").write_bytes(b"\x80\x04]\x94.")
    words = ["prepare", "--source", str(tmp_path / "set"), "--name", "y", "--data_dir", str(tmp_path)]
    assert "--allow-pickle" in failure(capsys, *words)
    assert "--allow-pickle" not in failure(capsys, *words, "--allow-pickle")


def test_own_sets_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="neither registered nor prepared"):
        find_data(TrainConfig.from_flat({"dataset": "mine", "target": "gap", "data_dir": str(tmp_path)}))
