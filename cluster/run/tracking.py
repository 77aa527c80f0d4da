"""MLflow, where MLFLOW_TRACKING_URI is set: a run's settings, its curve and its results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.errors import UserError, without_credentials
from cluster.interrupts import RunStopped
from cluster.log import say
from cluster.run.report import RESULTS_FILE, RunResult, scalars_of
from cluster.settings.config import TrainConfig

VARIABLE = "MLFLOW_TRACKING_URI"
RUN_FILE = "mlflow-run-id"
"""In the run folder, so that a resumed run goes on in the same MLflow run."""

KEPT = ("config.yaml", RESULTS_FILE, "parity.png", "curves.png")
"""Files of the run folder that are kept as artifacts."""

EXPERIMENT = "crystalformer"
"""The experiment, where MLFLOW_EXPERIMENT_NAME names no other."""


class Tracker:
    """One MLflow run, or nothing where MLflow is not asked for. A server that fails later is told of, not died of."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        """Begin or take up the MLflow run. UserError where MLflow is asked for and cannot be used."""
        self._folder = folder
        self._client: Any = None
        self._run_id = ""
        if not os.environ.get(VARIABLE):
            return
        try:
            import mlflow
        except ImportError as error:
            raise UserError(f"{VARIABLE} is set but MLflow is not installed: pip install mlflow-skinny") from error
        try:
            self._begin(mlflow.MlflowClient(), config, folder / RUN_FILE)
        except Exception as error:
            raise UserError(f"{VARIABLE}: {_first_line(error)}") from error

    def _begin(self, client: Any, config: TrainConfig, file: Path) -> None:  # noqa: ANN401 - MLflow's client
        if file.is_file():
            self._run_id = client.get_run(file.read_text(encoding="utf-8").strip()).info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            experiment = client.get_experiment_by_name(name)
            number = client.create_experiment(name) if experiment is None else experiment.experiment_id
            self._run_id = client.create_run(number, run_name=config.run.run_name).info.run_id
            for setting, value in config.to_flat().items():
                client.log_param(self._run_id, setting, value)
            file.write_text(self._run_id + "\n", encoding="utf-8")
        self._client = client

    def row(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch."""
        epoch = int(row["epoch"])
        for name, value in scalars_of(row):
            self._do("log_metric", name, value, step=epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in KEPT:
            if (self._folder / name).is_file():
                self._do("log_artifact", str(self._folder / name))
        stopped = isinstance(error, RunStopped)
        self._do("set_terminated", "FINISHED" if error is None else "KILLED" if stopped else "FAILED")

    def result(self, result: RunResult) -> None:
        """Log the test errors."""
        for name, errors in (("test_mae", result.test_mae), ("test_mae_swa", result.test_mae_swa)):
            for target, value in errors.items():
                self._do("log_metric", f"{name}/{target}", value)

    def _do(self, method: str, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - MLflow's
        """Call the client; after its first failure it is left alone."""
        if self._client is None:
            return
        try:
            getattr(self._client, method)(self._run_id, *arguments, **named)
        except Exception as error:  # noqa: BLE001 - whatever a server's client raises; training goes on
            say(f"warning: MLflow logging stopped: {_first_line(error)}")
            self._client = None


def _first_line(error: Exception) -> str:
    """Of what it says; MLflow repeats the server's address, which may hold a password."""
    return without_credentials((str(error).splitlines() or [type(error).__name__])[0])
