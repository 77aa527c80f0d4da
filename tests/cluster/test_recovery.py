"""Runs that lose a worker, their driver or a checkpoint end with the numbers of a run that lost nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.report import read_metrics
from tests.cluster.small import SMALL

EPOCHS = 20
SETTINGS = {**SMALL, "epochs": EPOCHS, "batch_size": 64, "checkpoint_every": 2, "threads_per_worker": 1}
TIMEOUT = 240


class Run:
    """A ``crystalformer train`` process with a local Ray of its own."""

    def __init__(self, folder: Path, name: str, **settings) -> None:
        self.folder = folder / name
        words = ["train", "--target", "shear", "--run_name", name, "--storage_path", str(folder)]
        words += ["--data_dir", str(folder / "data")]
        for key, value in {**SETTINGS, **settings}.items():
            listed = value if isinstance(value, list) else [value]
            words += [f"--{key}"] if value is True else [f"--{key}", *map(str, listed)]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def wait_for(self, epoch: int) -> None:
        """Until the row of ``epoch`` is written."""
        deadline = time.monotonic() + TIMEOUT
        while not any(row["epoch"] >= epoch for row in read_metrics(self.folder)):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"no epoch {epoch} within {TIMEOUT} s"
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """The training workers that this run started."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())]

    def end(self) -> str:
        """Wait for the end; what was printed."""
        return self.process.communicate(timeout=TIMEOUT)[0]


def numbers(folder: Path) -> list[tuple[int, int, float, float]]:
    """Epoch, step, loss and validation error of each row."""
    return [(r["epoch"], r["step"], r["train_loss"], r["val_mae"]["shear"]) for r in read_metrics(folder)]


def errors(folder: Path) -> dict:
    """Test errors of both sets of weights."""
    results = json.loads((folder / "results.json").read_text())
    return {"best": results["test_mae"]["shear"], "average": results["test_mae_swa"]["shear"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nothing happens to."""
    run = Run(folder, "whole")
    text = run.end()
    assert run.process.returncode == 0, text
    return run.folder


def test_a_killed_worker_is_replaced(folder, whole):
    run = Run(folder, "worker")
    run.wait_for(3)
    (worker,) = run.workers()
    worker.kill()
    text = run.end()
    assert run.process.returncode == 0, text
    assert "resuming after step" in text
    assert numbers(run.folder) == numbers(whole)
    assert errors(run.folder) == errors(whole)


def test_a_killed_driver_and_a_damaged_checkpoint(folder, whole):
    run = Run(folder, "driver")
    run.wait_for(5)
    workers = run.workers()
    run.process.kill()
    run.process.wait()
    psutil.wait_procs(workers, timeout=TIMEOUT)  # they train on, and write checkpoints, until they notice
    # What Ray has registered: a folder written in the last moment may lie beside, of which it knows nothing.
    known = json.loads((run.folder / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    older, newest = (run.folder / result["checkpoint_dir_name"] for result in known[-2:])
    file = newest / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    position = json.loads((older / "state.json").read_text())["position"]
    assert position["epoch"] > 1
    again = Run(folder, "driver", resume=True, num_workers=2, zero_stage=2)
    text = again.end()
    assert again.process.returncode == 0, text
    assert "warning: checkpoint passed over" in text and "weights.safetensors" in text
    assert f"resuming after step {position['step']}, in epoch {position['epoch']}" in text
    for mine, theirs in zip(numbers(run.folder), numbers(whole), strict=True):
        # Sums in another order: 1e-7 at first, which twenty epochs of training amplify (2.7e-4 was seen).
        assert mine == pytest.approx(theirs, rel=2e-3)
    assert errors(run.folder) == pytest.approx(errors(whole), rel=5e-3)


def test_sigterm_writes_a_checkpoint_in_mid_epoch(folder, whole):
    run = Run(folder, "stopped", checkpoint_every=100)
    run.wait_for(2)
    run.process.send_signal(signal.SIGTERM)
    text = run.end()
    assert run.process.returncode == 128 + signal.SIGTERM, text
    assert "--run_name stopped --resume" in text.splitlines()[-1]
    again = Run(folder, "stopped", checkpoint_every=100, resume=True)
    text = again.end()
    assert again.process.returncode == 0, text
    assert numbers(run.folder) == numbers(whole)
    assert errors(run.folder) == errors(whole)


def test_a_finished_run_is_left_as_it_is(folder, whole):
    before = numbers(whole), errors(whole)
    run = Run(folder, "whole", resume=True)
    text = run.end()
    assert run.process.returncode == 0, text
    assert (numbers(whole), errors(whole)) == before


def test_a_resumed_run_may_not_change_what_it_computes(folder, whole):
    run = Run(folder, "whole", resume=True, lr=0.001)
    text = run.end()
    assert run.process.returncode == 2
    assert text.strip() == "error: lr is 0.001 but the run to resume was started with 0.0005"
