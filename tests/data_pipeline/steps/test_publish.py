"""A finished data set takes its place and nobody else's."""

import errno
import os
import pickle
import shlex
import shutil

import pyarrow.parquet as pq
import pytest

from cluster.data.tables import open_split
from crystalformer.config import Neighborhood
from data_pipeline.datasets import find_dataset, resolve
from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.prepared import is_prepared
from data_pipeline.steps import publish
from data_pipeline.table import StructureTable
from tests.data_pipeline.test_own import make, record

SPLITS = ("train", "val", "test")


@pytest.fixture
def data(tmp_path):
    """A data folder with a set in the authors' layout, and what their programs leave beside its pickles."""
    shutil.move(make("authors", tmp_path), tmp_path / "data" / "theirs")
    (tmp_path / "data" / "theirs" / "train" / "processed").mkdir()
    (tmp_path / "data" / "theirs" / "train" / "processed" / "data.pt").write_bytes(b"x")
    return tmp_path / "data"


def own(data, **changes):
    return OwnData(path=data / "theirs", name="theirs", allow_pickle=True, **changes)


def theirs(data):
    """Every file that is not ours, as it is."""
    files = [path for path in (data / "theirs").rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.suffix in (".pkl", ".pt", ".txt")}


def test_the_authors_layout_is_prepared_under_its_own_name(data):
    before = theirs(data)
    assert len(before) == 4
    done = prepare_source(own(data), data)
    assert (done.sizes.train, done.sizes.val, done.sizes.test) == (8, 2, 2)
    assert StructureTable.open(done.split_path("val")).material_ids() == ["s8", "s9"]
    assert resolve("theirs", ["gap"], data).prepared and prepare_source(own(data), data).reused
    assert theirs(data) == before and sorted(p.name for p in data.iterdir()) == [".theirs.lock", "theirs"]


def test_preparing_it_again_replaces_our_files_alone(data):
    prepare_source(own(data), data)
    raw = data / "theirs" / "val" / "raw" / "raw_data.pkl"
    raw.write_bytes(pickle.dumps([record(8, "object")]))
    (data / "theirs" / "thesis.txt").write_text("x")
    before = theirs(data)
    done = prepare_source(own(data, targets=("gap",)), data)
    assert not done.reused and done.sizes.val == 1 and done.target_names == ("gap",)
    assert StructureTable.open(done.split_path("val")).material_ids() == ["s8"]
    assert theirs(data) == before


def prepared(tmp_path, **changes):
    """Structures of somebody's own, prepared as "mine"; what is in the folder of the set."""
    source = tmp_path / "source.csv"
    if not source.exists():
        source = make("csv", tmp_path)
    done = prepare_source(OwnData(path=source, name="mine", **changes), tmp_path / "data")
    return done, {path.relative_to(done.path).as_posix() for path in done.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "kept",
    [
        "notes/analysis.md",
        "train_extra/part-00000.parquet",
        "thesis.txt",
        "shells/mine.arrow",
        "shells/train-structures.arrow.bak",
    ],
)
def test_what_lies_beside_the_splits_is_kept(kept, tmp_path):
    done, ours = prepared(tmp_path)
    file = done.path / kept
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    again, found = prepared(tmp_path, seed=7)
    assert not again.reused and file.read_text() == "x" and found == {*ours, kept}
    assert prepared(tmp_path, seed=7)[0].reused


@pytest.mark.parametrize("more", [(), ("notes.txt",)])
def test_what_was_found_of_other_data_is_not_kept(more, tmp_path):
    done, ours = prepared(tmp_path)
    for split in SPLITS:
        open_split(done, split, ["gap"], Neighborhood(4.5))
    (done.path / "shells" / ".val-9.0000.arrow.x1").mkdir()  # left by a writer that was killed
    assert {"shells/train-structures.arrow", "shells/val-4.5000.arrow"} < prepared(tmp_path)[1]
    for name in more:
        (done.path / name).write_text("x")
    _, found = prepared(tmp_path, seed=7)
    assert found == {*ours, *more}
    assert (done.path / "shells").exists() == bool(more)


def test_a_link_to_another_disk_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(tmp_path / "disk")
    for seed in (1, 2, 3):
        done, _ = prepared(tmp_path, seed=seed)
        assert not done.reused and (tmp_path / "disk" / "dataset.json").is_file()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".mine.lock", "mine"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moves", range(4))
def test_a_process_that_is_stopped_on_the_way_leaves_no_half_data_set(moves, again, data, monkeypatch):
    if again:
        prepare_source(own(data), data)
    before, move, done = theirs(data), publish._move, []

    def stop(*words):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(words)
        move(*words)

    monkeypatch.setattr(publish, "_move", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_source(own(data, targets=("gap",)), data)
    assert len(done) == moves and not is_prepared(data, "theirs") and theirs(data) == before
    monkeypatch.setattr(publish, "_move", move)
    made = prepare_source(own(data, targets=("gap",)), data)
    assert made.sizes.train == 8 and theirs(data) == before
    assert prepare_source(own(data, targets=("gap",)), data).reused


@pytest.mark.parametrize("folder", ["link", "empty link", "notes"])
@pytest.mark.parametrize("moves", range(4))
def test_where_it_was_stopped_it_is_started_again(moves, folder, tmp_path, monkeypatch):
    """Nothing but our own marker tells then that the folder, in which no description is left, is ours."""
    if "link" in folder:
        (tmp_path / "disk").mkdir()
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "mine").symlink_to(tmp_path / "disk")
    if folder != "empty link":
        prepared(tmp_path)
    if folder == "notes":
        (tmp_path / "data" / "mine" / "notes.txt").write_text("x")
    move, done = publish._move, []

    def full(file, to):
        if len(done) == moves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))
        done.append(to)
        move(file, to)

    monkeypatch.setattr(publish, "_move", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepared(tmp_path, seed=2)
    assert not is_prepared(tmp_path / "data", "mine")
    monkeypatch.setattr(publish, "_move", move)
    again, found = prepared(tmp_path, seed=3)
    assert again.sizes.train == 9 and prepared(tmp_path, seed=3)[0].reused
    parts = {f"{split}/part-00000.parquet" for split in SPLITS}
    assert found == {"dataset.json", *parts, *(["notes.txt"] if folder == "notes" else [])}
    assert (tmp_path / "data" / "mine").is_symlink() == ("link" in folder)


def test_tables_of_somebody_else_are_neither_replaced_nor_read(data):
    table = data / "theirs" / "val" / "part-00000.parquet"
    source = prepare_source(OwnData(path=data / "theirs", name="other", allow_pickle=True), data)
    rows = pq.read_table(source.split_path("val")).replace_schema_metadata(None)
    for name in ("part-00000.parquet", "mine.parquet"):
        table = table.with_name(name)
        pq.write_table(rows, table)
        content = table.read_bytes()
        with pytest.raises(DataError, match=rf"val/{name}: is not of a prepared data set, but would be read"):
            prepare_source(own(data), data)
        assert table.read_bytes() == content
        table.unlink()


@pytest.mark.parametrize(
    "ask", [lambda data: resolve("theirs", ["gap"], data), lambda data: find_dataset("theirs", data)]
)
def test_where_it_is_not_prepared_yet_the_command_is_named(ask, data, capsys):
    from cluster.cli import main

    with pytest.raises(DataError, match=r"data set 'theirs'.*; .*train/raw/raw_data\.pkl is there: `") as caught:
        ask(data)
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[0] == "crystalformer" and main(command[1:]) == 0
    assert "theirs: 8 train, 2 val, 2 test" in capsys.readouterr().out
