"""The files of a run folder, read back by their own formats."""

import csv
import json
import math
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import UserError
from cluster.run.report import (
    MetricsLog,
    RunResult,
    collect_versions,
    git_commit,
    json_ready,
    labelled,
    read_metrics,
    scalars_of,
    seconds_before,
    with_unit,
    write_predictions,
    write_results,
)

RESULT = RunResult(
    run_dir="runs/a",
    dataset="elastic_tensor_2015",
    targets=("shear",),
    units={"shear": "log10(GPa)"},
    seed=1,
    epochs=2,
    num_parameters=853517,
    world_size=1,
    zero_stage=0,
    device="cpu",
    train_size=944,
    val_size=118,
    test_size=118,
    best_epoch=2,
    val_mae={"shear": 0.1},
    test_mae={"shear": 0.2},
    test_mae_swa={},
    wall_seconds=1.5,
    structures_per_second=100.0,
    peak_memory_mb=500.0,
    versions={"torch": "2"},
    git_commit=None,
)

CONTRACT = """
dataset targets units seed epochs num_parameters world_size zero_stage device train_size val_size test_size best_epoch
val_mae test_mae test_mae_swa wall_seconds structures_per_second peak_memory_mb versions git_commit
""".split()


def row_of(epoch, **more):
    return {"epoch": epoch, "step": 7 * epoch, "lr": 5e-4, "train_loss": 0.5, "val_mae": {"shear": 0.1}, **more}


def test_results_hold_what_is_promised(tmp_path):
    path = write_results(tmp_path, RESULT)
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    assert path.name == "results.json"
    assert sorted(content) == sorted(CONTRACT)
    assert list(content) == sorted(content)
    assert (content["targets"], content["test_mae"], content["git_commit"]) == (["shear"], {"shear": 0.2}, None)


def test_results_are_json_whatever_the_numbers(tmp_path):
    odd = replace(RESULT, val_mae={"shear": math.nan}, test_mae={"shear": np.float32(0.5)}, wall_seconds=math.inf)
    content = json.loads(write_results(tmp_path, odd).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (content["val_mae"], content["test_mae"], content["wall_seconds"]) == (
        {"shear": None},
        {"shear": 0.5},
        None,
    )


def test_json_ready_of_arrays():
    assert json_ready({"a": np.array([1.0, np.nan]), 2: (np.int64(3), True, "x")}) == {
        "a": [1.0, None],
        "2": [3, True, "x"],
    }


def test_rows_are_on_disk_as_they_come_and_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log.append(row_of(1))
        assert read_metrics(tmp_path) == [row_of(1)]
        log.append(row_of(2, train_loss=math.nan))
    assert [row["train_loss"] for row in read_metrics(tmp_path)] == [0.5, None]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["lr", "step", "train_loss", "val_mae/shear"]
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("val_mae/shear")] == [(1, 0.1), (2, 0.1)]
    assert [e.step for e in events.Scalars("train_loss")] == [1]


def test_resuming_drops_the_rows_to_be_run_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        for epoch in (1, 2, 3):
            log.append(row_of(epoch))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"epoch": 4, "st')
    with MetricsLog(tmp_path, resume_from_epoch=3) as log:
        assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 2]
        log.append(row_of(3, train_loss=0.25))
    assert [(row["epoch"], row["train_loss"]) for row in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    with MetricsLog(tmp_path):
        assert read_metrics(tmp_path) == []


def test_metrics_that_are_not_ours_are_refused(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\noops\n{"epoch": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1 must be a JSON object, got list"):
        read_metrics(tmp_path)


def test_scalars_are_flat_and_finite():
    row = row_of(1, note="text", best=None, seconds=np.float64(2), extra={"a": math.inf, "b": 1})
    assert dict(scalars_of(row)) == {
        "step": 7.0,
        "lr": 5e-4,
        "train_loss": 0.5,
        "val_mae/shear": 0.1,
        "seconds": 2.0,
        "extra/b": 1.0,
    }


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_predictions_of_one_target(tmp_path):
    truth, prediction = np.array([[1.0], [2.0]]), np.array([[1.25], [np.float32(0.1)]])
    table = read_csv(write_predictions(tmp_path, ["mp-1", 'a,"b'], ["shear"], truth, prediction))
    assert table == [["material_id", "target", "prediction"], ["mp-1", "1", "1.25"], ['a,"b', "2", "0.1"]]


def test_predictions_of_several_targets(tmp_path):
    truth, prediction = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    table = read_csv(write_predictions(tmp_path, ["mp-1"], ["shear", "bulk"], truth, prediction))
    assert table[0] == ["material_id", "target_shear", "prediction_shear", "target_bulk", "prediction_bulk"]
    assert table[1] == ["mp-1", "1", "3", "2", "4"]


@pytest.mark.parametrize(("truth", "prediction"), [((2, 1), (2, 2)), ((1, 1), (2, 1)), ((2,), (2,))])
def test_predictions_must_fit_their_names(tmp_path, truth, prediction):
    with pytest.raises(ValueError, match=r"truth and prediction must be \(2, 1\)"):
        write_predictions(tmp_path, ["a", "b"], ["shear"], np.zeros(truth), np.zeros(prediction))
    assert not list(tmp_path.iterdir())


def test_units_are_shown_but_for_pure_numbers():
    assert [labelled("x", unit) for unit in ("eV", "1", "")] == ["x [eV]", "x", "x"]
    assert [with_unit(0.12345, unit) for unit in ("eV", "1", "")] == ["0.1235 eV", "0.1235", "0.1235"]


def test_versions_name_what_is_installed():
    versions = collect_versions()
    assert versions["numpy"] == np.__version__
    assert {"python", "torch", "ray"} <= set(versions)


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_commit_of_a_checkout_only(tmp_path):
    assert git_commit(tmp_path) is None
    git(tmp_path, "init")
    assert git_commit(tmp_path) is None
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-m", "a")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == head
    (tmp_path / "new.txt").write_text("untracked", encoding="utf-8")
    assert git_commit(tmp_path) == head
    (tmp_path / "a.txt").write_text("b", encoding="utf-8")
    assert git_commit(tmp_path) == f"{head}+dirty"
    (tmp_path / "sub").mkdir()
    assert git_commit(tmp_path / "sub") is None


@pytest.mark.parametrize("last", ['{"epoch": 2, "val_mae": {"Härte'.encode()[:-4], b"oops\n", b'{"epoch": 2, "st'])
def test_a_last_row_that_was_cut_is_passed_over(tmp_path, last):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1, "seconds": 2.5}\n' + last)
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1]
    assert seconds_before(tmp_path) == 2.5


def test_a_run_without_rows_has_taken_no_time(tmp_path):
    assert seconds_before(tmp_path) == 0.0
