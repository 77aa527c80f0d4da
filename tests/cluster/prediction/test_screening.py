"""Very many structures, made few here: the same answers through Ray Data, and going on after a stop."""

import csv
import json
import os
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

import cluster  # noqa: F401 - sets Ray's environment
from cluster.cli import main
from cluster.errors import UserError
from cluster.prediction import inputs, screening
from cluster.prediction.predict import Ensemble
from data_pipeline.crystal import Crystal
from tests.cluster.local_ray import local_ray
from tests.cluster.trained import structures, write_model


@pytest.fixture(scope="module")
def ray_here():
    with local_ray(2):
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory, elastic):
    """Words of a command: a model, a table, and files of which some cannot be read."""
    folder = tmp_path_factory.mktemp("screening")
    write_model(folder / "a", seed=1)
    write_model(folder / "b", seed=2)
    files = folder / "files"
    files.mkdir()
    for number, structure in enumerate(structures()):
        (files / f"{number}.cif").write_text(structure.to(fmt="cif"))
    (files / "1-bad.cif").write_text("data_x\nloop_\n")
    (files / "9-bad.cif").write_text("data_x\nloop_\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield ["a,b", "files", str(elastic.split_path("test"))]


def test_ids_are_shown_and_not_obeyed(tmp_path, capsys):
    job = screening.Screening(
        models=(), pieces=(inputs.Piece(paths=("x",)),), output=tmp_path / "o.csv", device="cpu"
    )
    job.parts.mkdir()
    hostile = "m\x1b[2J\nerror: forged"
    said = {"id": [hostile, "b"], "where": [hostile, "b"], "problem": [None, hostile], "warning": ["", ""]}
    pq.write_table(pa.table(said), job.parts / "00000000-0000000000-2-last.parquet")
    assert screening._merge(job, ["id", "warning"]) == [1, 1]
    assert capsys.readouterr().err == "b: m\\x1b[2J\\nerror: forged\n"
    with job.output.open(newline="") as file:
        assert list(csv.reader(file)) == [["id", "warning"], [hostile, ""]]


@pytest.fixture
def many(monkeypatch):
    """Ten structures are many, and eight rows a piece."""
    monkeypatch.setattr(inputs, "STREAM_FROM", 10)
    monkeypatch.setattr(inputs, "ROWS_A_PIECE", 8)
    monkeypatch.setattr(inputs, "FILES_A_PIECE", 3)


@pytest.fixture
def streamed(monkeypatch):
    """Files of records of a kilobyte are large, and the test fails where nothing went through Ray Data."""
    ran, run = [], screening._run
    monkeypatch.setattr(inputs, "COUNTED_BYTES", 1000)
    monkeypatch.setattr(screening, "_run", lambda *given: ran.append(given) or run(*given))
    yield
    assert ran, "predicted in this process"


def table_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def test_the_answers_of_a_command_that_was_stopped_and_goes_on_are_those_of_few_structures(
    given, ray_here, tmp_path, monkeypatch, capsys
):
    """What was done before the stop is not done again: numbers put into a shard of it come through."""
    here, out, parts = tmp_path / "here.csv", tmp_path / "streamed.csv", tmp_path / "streamed.csv.parts"
    assert main(["predict", *given, "--output", str(here)]) == 1
    told = capsys.readouterr().err
    command = ["predict", *given, "--output", str(out)]
    monkeypatch.setattr(inputs, "STREAM_FROM", 10)
    monkeypatch.setattr(inputs, "ROWS_A_PIECE", 8)
    monkeypatch.setattr(inputs, "FILES_A_PIECE", 3)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(screening, "_merge", killed)
        assert main(command) == 130
    shards = sorted(parts.glob("*.parquet"))
    files, table = -(-6 // 3), -(-118 // 8)
    assert len(shards) == files + table and not out.exists()
    for path in shards[6:]:
        path.unlink()
    (parts / "00000007-0000000000-8-last.partial").write_bytes(b"half")
    pq.write_table(pq.read_table(shards[2]), parts / "00000008-0000000000-8-more.parquet")
    marked = pq.read_table(shards[4])
    place = marked.column_names.index("shear [log10(GPa)]")
    pq.write_table(marked.set_column(place, marked.column_names[place], pa.array([9.5] * len(marked))), shards[4])

    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1
    assert capsys.readouterr().err == told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.csv", "streamed.csv"]
    (header, few), (same, rows) = table_of(here), table_of(out)
    assert header == same and len(rows) == 4 + 118
    assert [[row[0], row[1], row[-1]] for row in rows] == [[row[0], row[1], row[-1]] for row in few]
    numbers, expected = (np.array([row[2:6] for row in table], dtype=float) for table in (rows, few))
    shear, known = header.index("shear [log10(GPa)]") - 2, slice(4 + 16, 4 + 24)
    assert (numbers[known, shear] == 9.5).all()
    expected[known, shear] = 9.5
    np.testing.assert_allclose(numbers, expected, rtol=2e-6, atol=1e-6)


def test_records_of_a_json_file_are_many_too(given, many, ray_here, tmp_path, monkeypatch, capsys):
    cscl = json.loads(structures()[2].to(fmt="json"))
    source = tmp_path / "many.jsonl"
    source.write_text("\n".join(json.dumps({"id": f"s{i}", "structure": cscl}) for i in range(12)))
    assert main(["predict", given[0], str(source), "--output", str(tmp_path / "here.csv")]) == 0
    monkeypatch.setattr(inputs, "COUNTED_BYTES", 1000)
    assert main(["predict", given[0], str(source)]) == 2
    assert "--output is needed for 12 structures" in capsys.readouterr().err
    assert main(["predict", given[0], str(source), "--output", str(tmp_path / "streamed.parquet")]) == 0
    (header, few), rows = table_of(tmp_path / "here.csv"), pq.read_table(tmp_path / "streamed.parquet")
    assert rows.column_names == header
    assert rows.column("id").to_pylist() == [row[0] for row in few] == [f"s{i}" for i in range(12)]
    np.testing.assert_allclose(rows.column(2).to_numpy(), [float(row[2]) for row in few], rtol=2e-6)


def test_no_row_is_lost_where_ray_cuts_blocks(given, ray_here, streamed, tmp_path, monkeypatch):
    """As it does with those of more than 192 MiB: into halves alike, which had one name, and into others."""
    monkeypatch.setattr(inputs, "STREAM_FROM", 10)
    source = tmp_path / "many.jsonl"
    cells = [json.loads(cell.to(fmt="json")) for cell in structures()[:3]]
    source.write_text("\n".join(json.dumps({"id": f"s{i}", "structure": cells[i % 3]}) for i in range(150)))
    out = tmp_path / "out.csv"
    shards, merge = [], screening._merge
    monkeypatch.setattr(
        screening, "_merge", lambda job, *given: shards.append(screening._shards(job)) or merge(job, *given)
    )
    for kilobytes in (10, 30):
        monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", kilobytes * 1024)
        assert main(["predict", given[0], str(source), "--output", str(out)]) == 0
        assert len(shards.pop()[0]) > 1, "not cut"
        assert [row[0] for row in table_of(out)[1]] == [f"s{i}" for i in range(150)]


def test_a_gpu_is_looked_for_in_the_cluster(given, many, ray_here, tmp_path, capsys):
    """The head that the command runs on may have none."""
    assert main(["predict", given[0], given[2], "--device", "cuda", "--output", str(tmp_path / "a.csv")]) == 2
    assert "device is cuda, but the cluster has no GPU" in capsys.readouterr().err


def test_a_block_of_unreadable_structures_only(given, many, streamed, ray_here, tmp_path, capsys):
    source = tmp_path / "bad.jsonl"
    good = {"structure": json.loads(structures()[2].to(fmt="json"))}
    source.write_text("\n".join(json.dumps(record) for record in [{"structure": "no"}] * 8 + [good] * 3))
    out = tmp_path / "out.csv"
    assert main(["predict", given[0], str(source), str(tmp_path / "missing.parquet"), "--output", str(out)]) == 1
    told = capsys.readouterr().err
    assert "missing.parquet" in told and "9 of" in told
    assert len(table_of(out)[1]) == 3


def test_what_has_no_finite_prediction_is_warned_of_as_among_few(given, tmp_path, monkeypatch):
    predict_batch = Ensemble.predict_batch

    def broken(self, batch):
        mean, spread = predict_batch(self, batch)
        mean[1, 0] = np.nan
        return mean, spread

    monkeypatch.setattr(Ensemble, "predict_batch", broken)
    models = Ensemble(given[0].split(","), torch.device("cpu"))
    found = list(inputs.find_structures(["files"]))
    place = {"number": [0] * len(found), "row": range(len(found)), "last": [False] * (len(found) - 1) + [True]}
    block = screening._listed(found, place, models.seen, models.neighborhoods)
    screening._Predict(given[0].split(","), tmp_path, "cpu", None, torch.get_num_threads())(block)
    (shard,) = tmp_path.glob("*.parquet")
    rows = pq.read_table(shard).to_pylist()
    few = [one.warning for one in models.predict(one for one in found if one.problem is None)]
    assert [row["warning"] for row in rows if row["problem"] is None] == few
    assert few == ["", "no finite prediction", "", "never seen in training: Cu Zn Au"]
    assert [row["warning"] for row in rows if row["problem"] is not None] == [None, None]


def test_names_that_are_not_utf_8_come_into_shards(given, tmp_path):
    """They would stop the job, and each that goes on from it."""
    files, parts = tmp_path / "files", tmp_path / "parts"
    files.mkdir()
    parts.mkdir()
    for name in (b"\xff.cif", b"\xff-bad.cif"):
        text = structures()[0].to(fmt="cif") if b"bad" not in name else "data_x\n"
        (files / os.fsdecode(name)).write_text(text)
    models = Ensemble(given[0].split(","), torch.device("cpu"))
    pieces = inputs.plan_pieces([str(files)])
    work = pa.Table.from_pylist([{"number": i, "piece": json.dumps(asdict(one))} for i, one in enumerate(pieces)])
    predict = screening._Predict(given[0].split(","), parts, "cpu", None, torch.get_num_threads())
    for block in screening._prepare(work, seen=models.seen, neighborhoods=models.neighborhoods, here=str(tmp_path)):
        predict(block)
    rows = [row for path in sorted(parts.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [(row["id"], row["problem"] is None) for row in rows] == [
        (f"{files}/\\udcff-bad.cif", False),
        (f"{files}/\\udcff.cif", True),
    ]


def test_large_cells_are_handed_on_a_few_at_once():
    """256 cells of 10,000 atoms would be 16 GB of shells."""
    cell = Crystal(positions=np.zeros((3000, 3)), atomic_numbers=np.ones(3000, np.int64), lattice=np.eye(3))
    found = iter([inputs.Found(id=str(i), where="", crystal=cell) for i in range(5)])
    assert [len(screening._next_from(found, ".")) for _ in range(4)] == [2, 2, 1, 0]


def test_shards_of_other_inputs_are_refused(given, many, tmp_path, capsys):
    out = tmp_path / "out.csv"
    (tmp_path / "out.csv.parts").mkdir()
    (tmp_path / "out.csv.parts" / "plan.json").write_text('{"digest": "other"}')
    command = ["predict", given[0], given[2], "--output", str(out)]
    assert main(command) == 2
    assert "go on with --resume, or delete it" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 2
    assert "belongs to other inputs or another model" in capsys.readouterr().err


def test_shards_and_plans_that_a_loss_of_power_left_empty(tmp_path):
    """A piece with such a shard is predicted again; whose shards there are only the plan tells."""
    pieces = tuple(inputs.Piece(paths=(name,)) for name in "xyz")
    job = screening.Screening(models=(), pieces=pieces, output=tmp_path / "o.csv", device="cpu")
    plan = screening._plan(job, ["id"])
    screening._take_over(job, plan, resume=False)
    rows = pa.table({"id": ["a", "b"]})
    for number in range(3):
        pq.write_table(rows, job.parts / f"0000000{number}-0000000000-2-more.parquet")
        pq.write_table(rows, job.parts / f"0000000{number}-0000000002-2-last.parquet")
    (job.parts / "00000000-0000000000-2-more.parquet").write_bytes(b"")
    pq.write_table(rows[:1], job.parts / "00000002-0000000002-2-last.parquet")
    screening._take_over(job, plan, resume=True)
    assert screening._unfinished(job) == {0, 2}
    assert {path.name[:8] for path in job.parts.glob("*.parquet")} == {"00000001"}
    (job.parts / "plan.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"plan.json is damaged: delete .*o\.csv\.parts, and all is predicted again"):
        screening._take_over(job, plan, resume=True)


def test_where_all_shards_are_there_the_output_is_all_that_is_left(tmp_path):
    job = screening.Screening(
        models=(), pieces=(inputs.Piece(paths=("x",)),), output=tmp_path / "o.csv", device="cpu"
    )
    screening._take_over(job, screening._plan(job, ["id"]), resume=False)
    shard = pa.table({"id": ["a"], "where": ["a"], "problem": pa.array([None], pa.string())})
    pq.write_table(shard, job.parts / "00000000-0000000000-1-last.parquet")
    with screening.claimed(job.output), pytest.raises(UserError, match="another command is writing"):
        screening.predict_many(job, None, ["id"], lambda *_: None, resume=True)
    assert screening.predict_many(job, None, ["id"], lambda *_: None, resume=True) == [1, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["o.csv"]


def test_many_structures_need_a_file(given, many, capsys):
    assert main(["predict", given[0], given[2]]) == 2
    assert "--output is needed for 118 structures" in capsys.readouterr().err
