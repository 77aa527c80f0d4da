"""Where the Arrow files of a split are kept, and that all splits of a run are of one preparation."""

import os
import shutil
from dataclasses import replace

import pytest

from cluster.data import shells
from cluster.data.shells import cached_table
from cluster.data.tables import TablesOnDisk, open_split, share
from cluster.errors import UserError
from cluster.log import setup_logging
from crystalformer.config import Neighborhood
from data_pipeline import table
from data_pipeline.errors import DataError
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.prepare import prepare_dataset
from data_pipeline.prepared import load_prepared
from tests.data_pipeline.test_own import make

RADIUS = 4.0
AROUND = Neighborhood(RADIUS)


@pytest.fixture
def prepared(tmp_path):
    """Prepares 12 crystals as the data set "mine", split by a seed."""
    source = make("csv", tmp_path)
    return lambda seed: prepare_source(OwnData(path=source, name="mine", seed=seed), tmp_path / "data")


def test_read_only_data_are_mapped_from_the_users_cache(tmp_path, monkeypatch, capsys):
    """Told by os.access alone, since a test may run as root, whom no mode keeps out."""
    prepared = prepare_dataset("dielectric_2017", tmp_path / "data")
    expected = open_split(prepared, "val", ("n",), AROUND)
    locked = replace(prepared, path=(tmp_path / "data").rename(tmp_path / "locked") / prepared.name)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = sorted(locked.path.rglob("*"))
    setup_logging()
    beside, made = (open_split(locked, split, ("n",), AROUND) for split in ("val", "test"))
    assert beside.structures.equals(expected.structures) and beside.shells.equals(expected.shells)
    assert beside.files[1].parent == locked.path / "shells", "what lies there is used"
    cache = tmp_path / "caches" / "crystalformer" / prepared.fingerprint[:16]
    assert [file.parent for file in made.files] == [cache / "shells"] * 2 and all(f.is_file() for f in made.files)
    assert len(made.shells) == 105 and sorted(locked.path.rglob("*")) == before
    said = f"warning: {locked.path} is read-only: structures and neighbour lists are mapped from {cache}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("module", "constant"), [("shells", "FORMAT"), ("tables", "STRUCTURES_FORMAT")])
def test_files_of_an_earlier_version_in_read_only_data_are_made_again_elsewhere(
    module, constant, prepared, tmp_path, monkeypatch
):
    data = prepared(1)
    with monkeypatch.context() as earlier:
        earlier.setattr(f"cluster.data.{module}.{constant}", "0")
        expected = open_split(data, "val", ["gap"], AROUND)
    before = {file: file.read_bytes() for file in (data.path / "shells").iterdir()}
    monkeypatch.setattr(os, "access", lambda path, _mode: data.path not in (path, path.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    made = open_split(data, "val", ["gap"], AROUND)
    elsewhere = ["shells" if file.parent == data.path / "shells" else "cache" for file in made.files]
    assert elsewhere == (["shells", "cache"] if module == "shells" else ["cache", "shells"])
    assert all(file.is_file() for file in made.files) and made.shells.equals(expected.shells)
    assert {file: file.read_bytes() for file in (data.path / "shells").iterdir()} == before


def test_splits_of_two_preparations_never_meet_in_a_run(prepared):
    """A crystal of the one's test split may be in the other's training split."""
    first = prepared(1)
    open_split(first, "train", ["gap"], AROUND)
    prepared(2)
    with pytest.raises(DataError, match=r"val/part-00000\.parquet: data set 'mine' was prepared anew while .*again$"):
        open_split(first, "val", ["gap"], AROUND)


@pytest.mark.parametrize("then", ["replaced", "gone"])
def test_a_split_that_is_replaced_once_it_was_checked_is_not_read(then, prepared, monkeypatch):
    first, check = prepared(1), table.checked_files

    def overtaken(*words, **more):
        files = check(*words, **more)
        if then == "replaced":
            prepared(2)
        else:  # as between the two steps of replacing a folder
            shutil.rmtree(first.path)
        return files

    monkeypatch.setattr(table, "checked_files", overtaken)
    with pytest.raises(DataError, match="data set 'mine' was prepared anew"):
        list(table.read_pieces(first.split_path("val"), fingerprint=first.fingerprint))


def test_a_copied_data_set_is_the_same_preparation(prepared, tmp_path):
    first = prepared(1)
    shutil.copytree(first.path, tmp_path / "data" / "copy")
    copy = load_prepared(tmp_path / "data", "copy")
    expected = open_split(first, "val", ["gap"], AROUND)
    assert open_split(copy, "val", ["gap"], AROUND).structures.equals(expected.structures)


def test_a_worker_that_starts_again_maps_the_rows_that_the_run_began_with(prepared, monkeypatch):
    tables = open_split(prepared(1), "train", ["gap"], AROUND)
    monkeypatch.setattr("cluster.data.tables.BYTES_A_MB", 1)
    shared = share(tables, 1)
    assert isinstance(shared, TablesOnDisk)
    assert shared.fetch().structures["material_id"].equals(tables.structures["material_id"])
    open_split(prepared(2), "train", ["gap"], AROUND)
    with pytest.raises(UserError, match="of other rows than this run began with: its data were prepared anew"):
        shared.fetch()


def test_files_that_name_no_data_are_mapped_as_they_are(prepared):
    tables = open_split(prepared(1), "val", ["gap"], AROUND)
    shared = TablesOnDisk(structures=tables.files[0], shells=tables.files[1], limit=1, data="mine")
    for file, rows in zip(tables.files, (tables.structures, tables.shells), strict=True):
        shells.write_table(file, rows.schema.remove_metadata(), [rows], {})
    assert shared.fetch().shells.equals(tables.shells)


def test_what_another_run_puts_in_the_place_of_a_file_is_not_taken_for_it(prepared, tmp_path, monkeypatch):
    rows = open_split(prepared(1), "val", ["gap"], AROUND).structures
    write = shells.write_table

    def overtaken(path, schema, pieces, identity):
        write(path, schema, pieces, identity)
        write(path, schema, [rows], {"data": "other"})

    monkeypatch.setattr(shells, "write_table", overtaken)
    with pytest.raises(UserError, match="replaced by the file of another run"):
        cached_table(tmp_path / "a.arrow", {"data": "mine"}, rows.schema, [rows])
