"""Searches that end before their time: killed, told to stop, out of time, or with nowhere to write."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.driver.actors import actors_of
from cluster.errors import RunFailed
from cluster.interrupts import RunStopped
from cluster.worker.checkpoint import read_checkpoint
from tests.tune.searches import saved, trials_of
from tune.search import search

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("address")


def test_a_process_that_dies_is_replaced_once_and_then_costs_its_trial_only(plan):
    made = plan("killed", {"num_trials": 2, "epochs": 300, "concurrent": 1, "trial_retries": 1, "max_radius": 12.0})
    killed, states = [], []

    def kill():
        while not (made.folder / "trials" / "0000" / "metrics.jsonl").exists():
            time.sleep(0.1)
        for _ in range(2):
            while not (first := trials_of(made)[0]).process or first.process in killed:
                time.sleep(0.1)
            killed.append(first.process)
            states.append(first.state)
            os.kill(int(first.process.split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    first, second = search(made).trials
    killer.join(1)
    assert states == ["unfinished", "unfinished"]
    assert first.state == "failed" and first.process == killed[1]
    assert first.reason.startswith("its process died: ") and "no reason" not in first.reason
    assert second.state in ("complete", "stopped early")


def test_a_search_whose_data_are_gone_ends_and_its_trials_do_not_fail(plan, folder):
    made = plan("bereft", {"num_trials": 500, "epochs": 1, "concurrent": 1, "max_radius": 12.0})

    def kill():
        while not (made.folder / "trials" / "0000" / "metrics.jsonl").exists():  # it has had its data
            time.sleep(0.05)
        library = max(actors_of("Library"), key=lambda actor: actor["StartTime"])  # one before may not have gone yet
        assert library["Pid"] > 0  # 0 would be this test and all that runs beside it
        os.kill(library["Pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RunFailed, match="the trials' data cannot be had: .*; go on with --run_name bereft --resume"):
        search(made)
    killer.join()
    before = trials_of(made)
    assert [trial.state for trial in before if trial.state != "stopped early"][-1] == "unfinished"
    assert "failed" not in {trial.state for trial in before}
    result = search(saved(folder, "bereft", num_trials=len(before)))
    assert result.finished and [trial.number for trial in result.trials] == list(range(len(before)))
    assert "failed" not in {trial.state for trial in result.trials}


def test_a_report_that_cannot_be_written_ends_the_search_in_a_line(words, folder, capsys):
    table = folder / "unwritten" / "trials.csv"
    table.mkdir(parents=True)
    options = words("unwritten", num_trials=2, epochs=1, concurrent=1, trial_retries=5)
    assert main(["tune", *options]) == 1
    reason = f"error: {table}: Is a directory; go on with --run_name unwritten --resume\n"
    assert capsys.readouterr().err == reason
    (trial,) = trials_of(saved(folder, "unwritten"))
    assert trial.state == "complete"
    assert main(["tune", *options, "--resume", "--num_trials=1"]) == 1  # there is nothing left but to report
    assert capsys.readouterr().err == reason
    table.rmdir()
    assert main(["tune", *options, "--resume"]) == 0
    first, second = trials_of(saved(folder, "unwritten"))
    assert first == trial and second.state == "complete"


# Killed, told to stop, out of time -------------------------------------------------------------------------------


def wait_for(process, file, count):
    """Until ``count`` trials have been told as ended."""
    for _ in range(1200):
        if file.read_text().count("\ntrial ") >= count:
            return
        assert process.poll() is None, file.read_text()
        time.sleep(0.1)
    raise AssertionError(file.read_text())


@pytest.fixture
def begin(folder, address):
    """``begin(options)``: a search in a process of its own; what it says is in ``log.txt``."""
    started = []

    def make(options):
        command = [sys.executable, "-m", "cluster", "tune", *options]
        with (folder / "log.txt").open("w") as file:
            environment = os.environ | {"RAY_ADDRESS": address}
            started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file))
        return started[-1]

    yield make
    for process in started:
        process.kill()
        process.wait(30)


def under_way(folder, name, count):
    """So many trials that have done an epoch, and the numbers of their processes."""
    while True:
        trials = trials_of(saved(folder, name)) if (folder / name / "search.yaml").is_file() else []
        found = [
            (trial.number, int(trial.process.split()[1])) for trial in trials if trial.process and not trial.ended
        ]
        if len(found) == count:
            return found
        time.sleep(0.1)


def test_a_search_ends_in_order_with_checkpoints_but_of_a_trial_in_a_step_without_end(words, folder, begin):
    process = begin(words("endless", epochs=3000, grace_epochs=1000, checkpoint_every=1000, max_radius=12))
    (endless, held), (other, free) = under_way(folder, "endless", 2)
    os.kill(held, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    text = (folder / "log.txt").read_text()
    assert re.search(r"stopped after \d of 20 trials; go on with --run_name endless --resume$", text.rstrip())
    assert "WARNING" not in text and "Traceback" not in text  # such as of a second Ray, which Ray Tune would begin
    assert not (folder / "endless" / ".ray").exists() and (folder / "endless" / "report.html").exists()
    for process_id in (held, free):
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
    trials = trials_of(saved(folder, "endless"))
    assert {trials[endless].state, trials[other].state} == {"unfinished"}
    stored = folder / "endless" / "trials"
    assert not list((stored / f"{endless:04d}").glob("checkpoint-*"))
    (checkpoint,) = (stored / f"{other:04d}").glob("checkpoint-*")
    assert len(read_checkpoint(checkpoint).rows) >= trials[other].epochs


def test_trials_that_do_not_stop_are_killed_before_ray_tune_would(plan, folder, monkeypatch):
    monkeypatch.setattr("tune.search.STOP_SECONDS", 0.0)
    monkeypatch.setattr("tune.fit.END_SECONDS", 8.0)  # Ray Tune kills after 10
    made = plan("hanging", {"num_trials": 2, "epochs": 3000, "concurrent": 1, "max_radius": 12.0})

    def stop():
        ((_, held),) = under_way(folder, "hanging", 1)
        os.kill(held, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunStopped, match="go on with --run_name hanging --resume"):
        search(made)
    assert "ray-tune-fit" not in {thread.name for thread in threading.enumerate()}


def test_a_search_survives_signals_kills_and_the_end_of_its_time(words, folder, begin):
    log = folder / "log.txt"
    options = words("elastic/long", num_trials=40, epochs=30, grace_epochs=10, max_radius=12)
    process = begin(options)
    wait_for(process, log, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    stopped = r"stopped after \d+ of 40 trials; go on with --run_name elastic/long --resume$"
    assert re.search(stopped, log.read_text().strip())
    ended = [[trial for trial in trials_of(saved(folder, "elastic/long")) if trial.ended]]

    process = begin([*options, "--resume"])
    wait_for(process, log, 2)
    process.kill()
    process.wait(30)
    plan = saved(folder, "elastic/long")
    ended.append([trial for trial in trials_of(plan) if trial.ended])

    begun = len(trials_of(plan))
    result = search(saved(folder, "elastic/long", max_minutes=1e-4))
    assert not result.finished
    assert len(result.trials) <= begun + 2
    ended.append([trial for trial in result.trials if trial.ended])

    result = search(saved(folder, "elastic/long", num_trials=len(result.trials) + 1, max_minutes=None))
    assert result.finished
    assert all(trial.ended for trial in result.trials)
    assert [trial.number for trial in result.trials] == list(range(len(result.trials)))
    assert len({tuple(trial.settings.values()) for trial in result.trials}) == len(result.trials)
    trials = {path.name for path in (folder / "elastic" / "long" / "trials").iterdir()}
    assert trials <= {f"{trial.number:04d}" for trial in result.trials} and "0000" in trials
    assert not (folder / "elastic" / "elastic").exists()
    for before in ended:
        assert before
        assert [result.trials[trial.number] for trial in before] == before
