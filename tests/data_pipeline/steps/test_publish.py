"""A finished data set takes its place and nobody else's."""

import pickle
import shlex
import shutil

import pyarrow.parquet as pq
import pytest

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
