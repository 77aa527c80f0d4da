"""``crystalformer train`` as a process of its own, for tests that kill things."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.driver.snapshot import SNAPSHOT
from cluster.run.report import read_metrics
from tests.cluster.small import SMALL

EPOCHS = 20
SETTINGS = {**SMALL, "epochs": EPOCHS, "batch_size": 64, "checkpoint_every": 2, "threads_per_worker": 1}
TIMEOUT = 480


class Run:
    """A ``crystalformer train`` process, with a local Ray of its own or with that of ``address``."""

    def __init__(self, folder: Path, name: str, address: str | None = None, **settings) -> None:
        self.folder = folder / name
        words = ["train", "--target", "shear", "--run_name", name, "--storage_path", str(folder)]
        for key, value in {**SETTINGS, "data_dir": str(folder / "data"), **settings}.items():
            listed = value if isinstance(value, list) else [value]
            words += [f"--{key}"] if value is True else [f"--{key}", *map(str, listed)]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {} if address is None else {"RAY_ADDRESS": address}
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

    def checkpoints(self) -> list[Path]:
        """What Ray Train knows of, the newest last: a folder written in the last moment may lie beside."""
        try:
            known = json.loads((self.folder / SNAPSHOT).read_text())["checkpoint_results"]
        except (FileNotFoundError, json.JSONDecodeError):  # Ray Train writes it in its place, and is at it
            known = []
        return [self.folder / result["checkpoint_dir_name"] for result in known]

    def wait_for_checkpoint(self, at_least: int = 1, epoch: int = 0) -> None:
        """Until Ray Train knows of as many, the first of the last of them from a later epoch than ``epoch``."""
        deadline = time.monotonic() + TIMEOUT
        while not self._has(at_least, epoch):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _has(self, at_least: int, epoch: int) -> bool:
        last = self.checkpoints()[-at_least:]
        try:
            return (
                len(last) == at_least
                and json.loads((last[0] / "state.json").read_text())["position"]["epoch"] > epoch
            )
        except FileNotFoundError:  # one more has come, and the oldest gone
            return False

    def workers(self) -> list[psutil.Process]:
        """The training workers of a run with a Ray of its own."""
        return training_workers(self.process.pid)

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


def training_workers(pid: int) -> list[psutil.Process]:
    """Ray Train's workers among the descendants of a process."""
    return [p for p in psutil.Process(pid).children(recursive=True) if "RayTrainWorker" in command_line(p)]


def command_line(process: psutil.Process) -> str:
    """Its command line; empty where it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
