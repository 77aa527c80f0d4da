"""Whole searches through Ray Tune on real structures: what they find and leave, and what may go wrong on the way."""

import csv
import errno
import fcntl
import re
import sqlite3
import sys
import threading
from contextlib import ExitStack

import optuna
import pytest

from cluster import lock
from cluster.cli import main
from cluster.errors import UserError
from cluster.run.report import read_metrics
from cluster.settings.config import load_yaml
from tests.tune.searches import saved, trials_of
from tune.folder import locked
from tune.search import search
from tune.study import open_storage

SPACE = """
scale_real: {log: [0.6, 1.2]}
lr: {choice: [5e-4, 6e-4, 1e25]}
model_dim: {choice: [16, 24]}
head_num: {choice: [2, 3]}
ff_dim: {choice: [32, 48, 100000000000]}
"""
pytestmark = pytest.mark.usefixtures("address")


class Found:
    """A finished search: what was printed, its settings and its trials."""

    def __init__(self, out, plan):
        self.out, self.plan, self.folder = out, plan, plan.folder
        self.trials = trials_of(plan)
        good = [trial for trial in self.trials if trial.state != "failed" and trial.value is not None]
        self.best = min(good, key=lambda trial: trial.value)


@pytest.fixture(scope="module")
def found(words, folder):
    """A search whose space holds settings that diverge, that no memory holds, and that no model can have."""
    (folder / "space.yaml").write_text(SPACE)
    options = {"space": folder / "space.yaml", "num_trials": 10, "search_seed": 18, "epochs": 4, "grace_epochs": 1}
    capture = pytest.MonkeyPatch()
    lines = []
    capture.setattr(sys, "stdout", Capture(lines))
    try:
        assert main(["tune", *words("found", **options)]) == 0
    finally:
        capture.undo()
    return Found("".join(lines), saved(folder, "found"))


class Capture:
    """A stdout that keeps what is written."""

    def __init__(self, lines):
        self._lines = lines

    def write(self, text):
        self._lines.append(text)
        return len(text)

    def flush(self):
        """Nothing is held back."""

    def isatty(self):
        return False


def test_failed_trials_are_recorded_with_their_reason_and_the_search_goes_on(found):
    assert [trial.number for trial in found.trials] == list(range(10))
    failed = [trial for trial in found.trials if trial.state == "failed"]
    diverged = [trial for trial in failed if "diverged" in trial.reason]
    wrong = [trial for trial in failed if "head_num must be a divisor of model_dim=16, got 3" in trial.reason]
    large = [trial for trial in failed if "can't allocate memory" in trial.reason]
    assert diverged and wrong and large and len(diverged) + len(wrong) + len(large) == len(failed)
    assert all(trial.settings["lr"] == 1e25 for trial in diverged)
    assert all(trial.settings["ff_dim"] > 48 for trial in large)
    good = [trial for trial in found.trials if trial not in failed]
    assert {trial.state for trial in good} == {"complete", "stopped early"}
    assert all(trial.epochs == 4 for trial in good if trial.state == "complete")
    assert all(0 < trial.value < 5 and trial.seconds > 0 for trial in good)


def test_trials_go_through_few_processes(found):
    ran = [trial.process for trial in found.trials if trial.process]
    assert len(ran) > 4
    assert 1 <= len(set(ran)) <= 2


def test_what_is_said_at_the_end(found):
    number = found.best.number
    assert re.search(r"^trial 0  val MAE \d\.\d{4} eV  complete, epoch 4", found.out, re.MULTILINE) or re.search(
        r"^trial 0  val MAE \d\.\d{4}  complete, epoch 4", found.out, re.MULTILINE
    )
    table = re.findall(r"^ +(\d+) +(\d\.\d{4})? +\d+ .*(?:complete|stopped early|failed)", found.out, re.MULTILINE)
    assert sorted(int(row[0]) for row in table) == list(range(10))
    assert int(table[0][0]) == number
    assert f"best trial  {number}: validation MAE gap {found.best.value:.4f}" in found.out
    assert f"train it    crystalformer train --config {found.folder}/best.yaml" in found.out
    assert "neighbour lists found for" in found.out


def test_the_files_of_a_search(found):
    with (found.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [trial.state for trial in found.trials]
    assert [row["reason"] for row in rows] == [trial.reason for trial in found.trials]
    values = [float(row["val_mae_gap"]) if row["val_mae_gap"] else None for row in rows]
    assert values == [trial.value for trial in found.trials]
    for name in ("history", "importance", "parallel", "slice"):
        assert (found.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (found.folder / "report.html").read_text()
    assert page.count("Plotly.newPlot(") >= 4
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "diverged" in page
    assert not (found.folder / ".ray").exists()


def test_train_takes_the_best_settings_and_gives_the_same_numbers(found):
    config = load_yaml(found.folder / "best.yaml")
    assert (config.optim.epochs, config.optim.swa_epochs) == (100, 50)
    command = ["train", "--config", str(found.folder / "best.yaml"), "--epochs", "4", "--swa_epochs", "0"]
    assert main(command) == 0
    full = [row["val_mae"]["gap"] for row in read_metrics(found.folder.parent / "found-best")]
    number = found.best.number
    rows = read_metrics(found.folder / "trials" / f"{number:04d}")
    assert [row["val_mae"]["gap"] for row in rows] == full[: len(rows)]
    assert found.best.value == min(full[: len(rows)])
    assert found.best.best_epoch == 1 + full.index(found.best.value)


def test_a_finished_search_only_reports_again_and_its_name_is_taken(found, words, capsys):
    before = (found.folder / "trials.csv").read_text()
    assert main(["tune", "--run_name=found", f"--storage_path={found.folder.parent}", "--resume"]) == 0
    assert "best trial" in capsys.readouterr().out
    assert (found.folder / "trials.csv").read_text() == before
    assert main(["tune", *words("found")]) == 2
    assert "run_name 'found' exists in" in capsys.readouterr().err
    assert main(["tune", *words("found", num_trials=10), "--auto_resume"]) == 0
    assert "best trial" in capsys.readouterr().out
    assert main(["tune", *words("found", epochs=2), "--resume"]) == 2
    assert capsys.readouterr().err == "error: epochs is 2 but the search to resume was started with 4\n"


def test_a_trial_of_two_workers_gives_the_same_value(plan, found, own_file):
    # The minutes, of which the workers' start takes more, are counted from when they begin.
    given, two = {"num_trials": 1, "epochs": 2, "trial_minutes": 0.3}, {"num_workers": 2, "cpus_per_worker": 0.4}
    both = plan("both", given, **two, deepspeed=own_file("both", {"steps_per_print": 1000}))
    (trial,) = search(both).trials
    assert trial.state == "complete", trial.reason
    alone = read_metrics(found.folder / "trials" / "0000")[:2]  # the settings as given, too
    assert trial.value == pytest.approx(min(row["val_mae"]["gap"] for row in alone), rel=1e-4)


def test_a_file_of_deepspeed_settings_is_read_by_the_driver_alone(plan, own_file):
    wrong = {"zero_optimization": {"reduce_bucket_size": "much"}}
    (trial,) = search(plan("overlaid", {"num_trials": 1}, deepspeed=own_file("overlaid", wrong))).trials
    assert trial.state == "failed" and "reduce_bucket_size" in trial.reason


def test_two_processes_cannot_go_on_with_one_search(plan, monkeypatch, capsys):
    made = plan("locked", {})
    with locked(made.folder), pytest.raises(UserError, match="is in use: another process"):
        search(made)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    with ExitStack() as first:
        first.enter_context(locked(made.folder))
        threading.Timer(0.2, first.close).start()
        with locked(made.folder, patient=True):  # what --auto_resume does, for two minutes
            pass
    assert capsys.readouterr().out == ""

    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(made.folder):
        assert f"warning: {made.folder} has no file locks" in capsys.readouterr().out


def test_what_cannot_be_is_told_before_anything_starts(plan, folder):
    for given, others, message in [
        ({"num_trials": 0}, {}, "num_trials must be at least 1, got 0"),
        ({"objective": "shear"}, {}, "objective must be one of the targets gap, got 'shear'"),
        ({"storage": "study.db"}, {}, "storage must be a database URL such as"),
        ({"space": str(folder / "nowhere.yaml")}, {}, "nowhere.yaml: No such file or directory"),
        ({"storage": "postgresql://me:se@cret@host:port/db"}, {}, "storage must be a database URL such as"),
        ({}, {"storage_path": "s3://bucket/runs"}, "storage_path of a search must be a folder that all nodes share"),
        ({}, {"storage_path": "s3://key:se/cret@bucket/runs"}, "that all nodes share, got 's3://***@bucket/runs'"),
        ({}, {"deepspeed": "/nowhere/ds.json"}, "deepspeed: /nowhere/ds.json: No such file or directory"),
        ({}, {"init_from": "runs/a/model"}, "init_from must be none in a search"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            plan("never", given, **others)
    assert not (folder / "never").exists()
    with pytest.raises(UserError, match="run_name 'nowhere' cannot be resumed"):
        saved(folder, "nowhere")


def test_auto_resume_has_the_rules_of_a_run(capsys):
    for words, message in [
        (
            ["--auto_resume"],
            "run_name must be given where auto_resume is true: every repetition has to find the same",
        ),
        (["--auto_resume", "--resume", "--run_name=x"], "auto_resume must be false where resume is true, got True"),
        (["--resume"], "run_name must be given where resume is true"),
    ]:
        assert main(["tune", "--target=gap", *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_refused_search_has_not_begun_and_can_be_corrected(plan, folder):
    database = folder / "shared.db"
    place = {"storage": f"sqlite:///{database}?timeout=0.1", "study_name": "taken"}
    taken = optuna.create_study(study_name="taken", storage=open_storage(place["storage"]))
    taken.ask().set_user_attr("search", "late")
    (folder / "batches.yaml").write_text("batch_size: {choice: [500, 600]}\n")
    for given, others, message in [
        ({}, {"cpus_per_worker": 3}, "a trial of 1 workers does not fit the cluster's 2 CPUs"),
        ({}, {"batch_size": 400}, "batch_size must be at most the 32 training crystals, got 400"),
        ({"space": str(folder / "batches.yaml")}, {}, "batch_size must be at most the 32 training crystals, got 500"),
        (place, {}, "run_name 'late' has trials in study 'taken'; give another"),
        (place, {"lr": 1e-3}, "study 'taken' was begun with lr 0.0005, now it is 0.001"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            search(plan("late", given, **others))
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"^storage sqlite:///\S+ failed: database is locked$"):
        search(plan("late", place | {"study_name": "new"}))
    writer.execute("ROLLBACK")
    assert not (folder / "late" / "search.yaml").exists()
