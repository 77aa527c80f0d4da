"""Preparing data sets: what is written, what is reused, what is refused."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline import prepare
from data_pipeline.datasets import find_dataset
from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo, SourceKind, SplitRecipe, SplitSizes
from data_pipeline.prepare import prepare_dataset, prepare_from
from data_pipeline.prepared import load_prepared
from data_pipeline.schema import check_schema
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.sources.raw import Record, raw_tables
from data_pipeline.splits import make_split
from data_pipeline.table import StructureTable
from tests.data_pipeline.samples import HARDNESS, caesium_chloride, crystal, mixed_rock_salt, rock_salt

INFO = DatasetInfo(
    name="mine",
    kind=SourceKind.OWN,
    targets=(HARDNESS,),
    source="tests",
    citation="none",
    licence="none",
    recipe=SplitRecipe(ratios=(0.6, 0.2, 0.2)),
)


class ListSource:
    """A source of given records."""

    targets = (HARDNESS,)
    seconds_per_row = 1e-4

    def __init__(self, records, every_target=False, tag="a"):
        self.records = records
        self.every_target = every_target
        self.tag = tag
        self.reads = 0

    def fingerprint(self):
        return self.tag

    def tables(self):
        self.reads += 1
        return raw_tables(self.records, self.targets, rows=7)


def records(n, **changes):
    kinds = [rock_salt, mixed_rock_salt, caesium_chloride]
    made = [
        Record(file="f.csv", row=i, material_id=f"m{i}", crystal=kinds[i % 3](4.5 + 0.01 * i), targets=(float(i),))
        for i in range(n)
    ]
    for row, change in changes.items():
        i = int(row[1:])
        made[i] = replace(made[i], **change)
    return made


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_embedded_set(tmp_path):
    done = prepare_dataset("elastic_tensor_2015", tmp_path)
    assert (done.sizes.train, done.sizes.val, done.sizes.test, done.reused) == (944, 118, 118, False)
    source = pq.read_table(FOLDER / "elastic_tensor_2015.parquet")
    split = make_split(len(source), SplitRecipe())
    ids = source["material_id"].to_pylist()
    for name in ("train", "val", "test"):
        schema = pq.read_schema(done.split_path(name) / "part-00000.parquet")
        check_schema(schema, name)
        assert schema.field("shear").metadata[b"unit"] == b"log10(GPa)"
        table = StructureTable.open(done.split_path(name), ["shear", "bulk"])
        assert table.material_ids() == [ids[i] for i in sorted(getattr(split, name))]
    shear = np.array([source["shear"][i].as_py() for i in split.train])
    assert done.statistics["shear"].mean == pytest.approx(shear.mean(), rel=1e-13)
    assert done.statistics["shear"].std == pytest.approx(shear.std(), rel=1e-13)
    raw = json.loads((done.path / "dataset.json").read_text())
    assert raw["rejected"] == {"count": 0, "reasons": {}, "rows": []}
    assert raw["rows"] == {"read": 1181, "usable": 1181, "in_no_split": 1, "outside_the_set": {}}
    assert raw["licence"].startswith("CC BY 4.0") and "Sci. Data 2" in raw["citation"]
    assert {"Nb", "O"} <= set(done.elements)


def test_second_run_reuses_and_a_change_does_not(tmp_path):
    source = ListSource(records(20))
    first = prepare_from(source, INFO, tmp_path)
    again = prepare_from(source, INFO, tmp_path)
    assert not first.reused and again.reused and source.reads == 1
    assert replace(again, reused=False) == first == replace(load_prepared(tmp_path, "mine"), reused=False)
    reseeded = replace(INFO, recipe=replace(INFO.recipe, seed=5))
    assert not prepare_from(source, reseeded, tmp_path).reused
    assert not prepare_from(ListSource(records(20), tag="b"), reseeded, tmp_path).reused
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.lock", "mine"]


def test_what_is_returned_is_what_was_made_though_another_command_waits(tmp_path, monkeypatch):
    locked, reseeded = prepare.locked, replace(INFO, recipe=replace(INFO.recipe, seed=5))

    @contextmanager
    def awaited(path):
        with locked(path):
            yield
        monkeypatch.setattr(prepare, "locked", locked)
        prepare_from(ListSource(records(20)), reseeded, tmp_path)

    monkeypatch.setattr(prepare, "locked", awaited)
    made = prepare_from(ListSource(records(20)), INFO, tmp_path)
    assert made.fingerprint == prepare.fingerprint(ListSource([]), INFO)
    assert load_prepared(tmp_path, "mine").fingerprint == prepare.fingerprint(ListSource([]), reseeded)


def test_bad_rows_are_counted_and_leave_the_others_in_their_splits(tmp_path):
    clean = prepare_from(ListSource(records(30)), INFO, tmp_path / "a")
    close = crystal(np.eye(3) * 4, [[0, 0, 0], [0.01, 0, 0]], [1, 1])
    bad = records(
        30,
        r3={"crystal": close},
        r4={"crystal": None, "kind": "cif", "text": "not a cif"},
        r8={"material_id": "m7"},
        r9={"crystal": caesium_chloride(z=104)},
    )
    done = prepare_from(ListSource(bad), INFO, tmp_path / "b")
    assert [(row.file, row.row, row.material_id, row.reason.split(":")[0]) for row in done.rejected] == [
        ("f.csv", 3, "m3", "overlapping atoms"),
        ("f.csv", 4, "m4", "unreadable structure"),
        ("f.csv", 8, "m7", "duplicate id"),
        ("f.csv", 9, "m9", "unknown element"),
    ]
    raw = json.loads((done.path / "dataset.json").read_text())["rejected"]
    assert raw["count"] == 4 and raw["reasons"]["duplicate id"] == 1
    gone = {"m3", "m4", "m8", "m9"}
    for name in ("train", "val", "test"):
        before = StructureTable.open(clean.split_path(name)).material_ids()
        assert StructureTable.open(done.split_path(name)).material_ids() == [i for i in before if i not in gone]


def test_rows_without_targets(tmp_path):
    some = records(20, r2={"targets": (None,)}, r5={"targets": (), "problem": "bad target: 'x' is not a number"})
    own = prepare_from(ListSource(some), INFO, tmp_path / "own")
    assert [row.reason for row in own.rejected] == [
        "missing target: hardness",
        "bad target: 'x' is not a number",
    ]
    published = prepare_from(ListSource(some, every_target=True), INFO, tmp_path / "published")
    assert [row.row for row in published.rejected] == [5]
    raw = json.loads((published.path / "dataset.json").read_text())
    assert raw["rows"]["outside_the_set"] == {"missing target: hardness": 1}


def damage(folder, what):
    if what == "description":
        (folder / "dataset.json").write_text("")
    elif what == "no text":
        (folder / "dataset.json").write_bytes(b"\xff\xfe{}")
    elif what == "split":
        shutil.rmtree(folder / "test")
    elif what == "file":
        (folder / "val" / "part-00000.parquet").write_bytes(b"PAR1")
    else:
        rows = pq.read_table(folder / "train" / "part-00000.parquet")
        pq.write_table(rows.slice(1), folder / "train" / "part-00000.parquet")


@pytest.mark.parametrize("what", ["description", "no text", "split", "file", "rows"])
def test_what_was_damaged_is_made_again(what, tmp_path):
    source = ListSource(records(20))
    first = prepare_from(source, INFO, tmp_path)
    whole = files(first.path)
    damage(first.path, what)
    again = prepare_from(source, INFO, tmp_path)
    assert not again.reused and files(again.path) == whole
    assert prepare_from(source, INFO, tmp_path).reused


def test_only_what_was_staged_is_gone_on_with(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_pipeline.prepare.DatasetWriter.add", full)
    with pytest.raises(DataError) as caught:
        prepare_from(ListSource(records(20)), INFO, tmp_path, executor="process")
    assert str(caught.value) == "data set mine: [Errno 28] No space left on device"
    monkeypatch.setattr("data_pipeline.prepare.with_ray", lambda store, progress: full())
    with pytest.raises(DataError, match="No space left on device; started again, it goes on from there"):
        prepare_from(ListSource(records(20)), INFO, tmp_path, executor="ray")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_half_written_is_left_whatever_goes_wrong(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error("on the way")

    monkeypatch.setattr("data_pipeline.prepare._statistics", fail)
    with pytest.raises(error, match="on the way"):
        prepare_from(ListSource(records(20)), INFO, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.lock"]


def test_a_source_that_cannot_be_read_any_more(tmp_path, monkeypatch):
    source = ListSource(records(20))

    def unreadable():
        raise PermissionError(13, "Permission denied", "b.csv")

    monkeypatch.setattr(source, "fingerprint", unreadable)
    with pytest.raises(DataError, match="b.csv: cannot be read: Permission denied"):
        prepare_from(source, INFO, tmp_path)


def test_strict_makes_bad_rows_fatal_also_when_prepared_before(tmp_path):
    source = ListSource(records(20, r2={"crystal": caesium_chloride(z=104)}))
    with pytest.raises(DataError, match=r"1 rows rejected, and --strict.*f.csv row 2 m2: unknown element"):
        prepare_from(source, INFO, tmp_path, strict=True)
    assert not (tmp_path / "mine").exists()
    prepare_from(source, INFO, tmp_path)
    with pytest.raises(DataError, match="--strict"):
        prepare_from(source, INFO, tmp_path, strict=True)


@pytest.mark.parametrize(
    ("made", "info", "message"),
    [
        ([], INFO, "holds no rows"),
        (
            records(3, r0={"targets": (None,)}, r1={"targets": (None,)}, r2={"targets": (None,)}),
            INFO,
            "none of the 3",
        ),
        (records(4), INFO, "each split needs at least 1 row"),
        (
            [replace(r, crystal=caesium_chloride(z=110)) for r in records(20)],
            INFO,
            "left without rows .*; the first: f.csv row 0 m0: unkn",
        ),
        (records(20), replace(INFO, expected=SplitSizes(train=13, val=4, test=4)), "are published"),
        (records(20), replace(INFO, name="../x"), "letters, digits"),
        ([replace(r, split="trian") for r in records(20)], INFO, "split is named 'trian'"),
    ],
)
def test_sets_that_cannot_be_made(made, info, message, tmp_path):
    with pytest.raises(DataError, match=message):
        prepare_from(ListSource(made), info, tmp_path)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name", ["lattice", "problem", "part", "hardness"])
def test_target_names_that_are_taken(name, tmp_path):
    source = ListSource(records(20))
    source.targets = (HARDNESS, replace(HARDNESS, name=name))
    with pytest.raises(DataError, match=f"target '{name}': the name stands twice, or"):
        prepare_from(source, INFO, tmp_path)


def test_a_data_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        prepare_from(ListSource(records(20)), INFO, tmp_path / "file" / "data")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys, where even root makes no file")
def test_a_data_dir_that_cannot_be_written_to():
    words = [sys.executable, "-m", "cluster", "prepare", "elastic_tensor_2015", "--data_dir", "/sys"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: /sys: cannot be written to: .elastic_tensor_2015.lock: ")


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / ".mine.lock").mkdir()
    with pytest.raises(DataError, match=r"cannot be written to: \.mine\.lock: Is a directory"):
        prepare_from(ListSource(records(20)), INFO, tmp_path)


def test_what_failed_or_died_before_leaves_nothing_behind(tmp_path):
    (tmp_path / ".mine.0123456789ab.partial").mkdir(parents=True)
    (tmp_path / ".mine.0123456789ab.staging").mkdir()
    (tmp_path / ".mine.old").mkdir()
    with pytest.raises(DataError, match="at least 1 row"):
        prepare_from(ListSource(records(4)), INFO, tmp_path, executor="ray")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.lock"]


def test_what_belongs_to_another_data_set_is_left_alone(tmp_path):
    """A name may go on with a dot; the other set may be in the making just now."""
    others = [f".mine.{rest}" for rest in ("v2.0123456789ab.staging", "v2.0123456789ab.partial", "v2.old", "backup")]
    others += [".mine2.0123456789ab.staging", ".mineXold"]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / ".mine.ba9876543210.staging").mkdir()
    prepare_from(ListSource(records(20)), INFO, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, ".mine.lock", "mine"])


def test_long_work_goes_to_ray_short_work_does_not(tmp_path, monkeypatch):
    went = []
    monkeypatch.setattr(
        prepare, "with_ray", lambda store, progress: went.append(1) or prepare.in_process(store, progress)
    )
    prepare_from(ListSource(records(20)), INFO, tmp_path / "short")
    assert not went
    slow = ListSource(records(20))
    slow.seconds_per_row = prepare.RAY_FROM_SECONDS / 15
    done = prepare_from(slow, INFO, tmp_path / "long")
    assert went and done.sizes.train == 12


def test_a_source_may_prescribe_the_split(tmp_path):
    made = [replace(r, split=("train", "test", "val")[i % 3]) for i, r in enumerate(records(12))]
    done = prepare_from(ListSource(made), INFO, tmp_path)
    assert StructureTable.open(done.split_path("test")).material_ids() == ["m1", "m4", "m7", "m10"]


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="not a prepared data set"):
        prepare_from(ListSource(records(20)), INFO, tmp_path)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_null_targets_are_kept_and_not_in_the_statistics(tmp_path):
    second = replace(HARDNESS, name="gap")
    made = [replace(r, targets=(float(r.row), None if r.row % 2 else 1.0)) for r in records(20)]
    source = ListSource(made)
    source.targets = (HARDNESS, second)
    done = prepare_from(source, replace(INFO, targets=(HARDNESS, second)), tmp_path)
    assert done.rejected == ()
    assert (done.statistics["gap"].mean, done.statistics["gap"].std) == (1.0, 0.0)
    table = StructureTable.open(done.split_path("train"), ["gap"])
    assert table.num_dropped > 0 and table.num_rows + table.num_dropped == done.sizes.train
    assert math.isfinite(done.statistics["hardness"].mean)


def test_ray_data_and_restart_give_the_same_bytes(tmp_path):
    """Through Ray Data, stopped half-way and resumed, the files are those of a single process."""
    made = records(60, r3={"crystal": caesium_chloride(z=104)}, r9={"crystal": None, "kind": "cif", "text": "x"})
    plain = prepare_from(ListSource(made), INFO, tmp_path / "a", executor="process")
    finished, read = {}, []

    def identities():
        return {file.name: file.stat().st_ino for file in (tmp_path / "b").glob(".mine.*.staging/done-*.parquet")}

    def stop(what, *_):
        read.append(what)
        if what == "structures":
            raise KeyboardInterrupt

    source = ListSource(made)
    with pytest.raises(KeyboardInterrupt):
        prepare_from(source, INFO, tmp_path / "b", executor="ray", progress=stop)
    before = identities()
    assert before
    assert set(read) == {"records read", "structures"}
    seen = []

    def watch(*call):
        seen.append(call)
        finished.update(identities())

    done = prepare_from(source, INFO, tmp_path / "b", executor="ray", progress=watch)
    assert finished.items() >= before.items() and len(finished) == 9
    assert source.reads == 1
    assert {what for what, *_ in seen} == {"structures"}, "read once"
    assert seen[0][1] > 7 * (len(before) - 1) and seen[-1] == ("structures", 60, 60)
    assert files(done.path) == files(plain.path)


def test_small_registered_sets_do_not_start_ray(tmp_path, monkeypatch):
    def started(*_):
        raise AssertionError("Ray is started")

    monkeypatch.setattr(prepare, "with_ray", started)
    prepare_dataset(find_dataset("dielectric_2017"), tmp_path)
