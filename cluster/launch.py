"""A run on Ray Train: workers started, watched, told to stop; the driver's side of loop.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.config import TrainConfig
from cluster.errors import UserError
from cluster.feed import TargetScaling
from cluster.interrupts import Interrupts, RunStopped
from cluster.loop import Job, run_worker
from cluster.monitor import Message, Monitor
from cluster.progress import Progress
from cluster.report import MetricsLog, read_metrics
from cluster.tables import SharedTables, SplitTables, TablesOnDisk, share

POLL_SECONDS = 0.25

AnyTables = SplitTables | SharedTables | TablesOnDisk


def launch(
    config: TrainConfig,
    run_dir: Path,
    tables: Mapping[str, AnyTables],
    scaling: TargetScaling,
    units: dict[str, str],
    follow: Callable[[list[Message]], bool] = lambda _: True,
) -> Path:
    """Train to the end and give the final checkpoint's folder. RunStopped where a signal ended it before.

    ``follow`` is asked several times a second, with the metrics rows that have come in since; once it says False the
    workers stop at their next step, with a checkpoint.
    """
    monitor = Monitor.remote()  # type: ignore[attr-defined]  # made by ray.remote
    trainer = _trainer(config, run_dir, tables, scaling, monitor)
    done = read_metrics(run_dir)[-1:] if config.run.resume else []
    before = done[0]["epoch"] if done else 0
    with Recorder(run_dir, config, units, before) as recorder, Interrupts() as interrupts:
        fit = _Fit(trainer)
        fit.start()
        told = False
        while fit.is_alive():
            fit.join(POLL_SECONDS)
            enough = not follow(recorder.take(monitor))
            if interrupts.received is not None and not told:
                recorder.note("stopping: a checkpoint is written at the next step; once more to stop at once")
            if (interrupts.received is not None or enough) and not told:
                monitor.stop.remote()
                told = True
        follow(recorder.take(monitor))
    result = fit.result()
    if result.checkpoint is None:
        raise RuntimeError(f"training ended without a checkpoint in {run_dir}")
    finished = bool((result.metrics or {}).get("finished"))
    if not finished and interrupts.received is not None:
        name = config.run.run_name
        raise RunStopped(f"stopped; go on with the same command and --run_name {name} --resume", interrupts.received)
    return Path(result.checkpoint.path)


class _Fit(threading.Thread):
    """TorchTrainer.fit in a thread of its own: Ray then leaves the signals to us."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._trainer = trainer
        self._result: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Fit; whatever comes of it is kept for ``result``."""
        try:
            self._result = self._trainer.fit()
        except Exception as error:  # noqa: BLE001 - raised again by result()
            self._error = error

    def result(self) -> Any:  # noqa: ANN401 - Ray's Result
        """What fit returned, or its error."""
        if self._error is not None:
            raise self._error
        return self._result


def _trainer(
    config: TrainConfig,
    run_dir: Path,
    tables: Mapping[str, AnyTables],
    scaling: TargetScaling,
    monitor: Any,  # noqa: ANN401 - a Ray actor handle
) -> TorchTrainer:
    threads, resources, gpu = worker_resources(config)
    job = Job(
        config=config.to_flat(),
        tables={split: share(table, config.data.memory_limit_mb) for split, table in tables.items()},
        radius=config.model.neighbor_radius,
        scaling=scaling,
        threads=threads,
        monitor=monitor,
    )
    return TorchTrainer(
        run_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scale.num_workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=ray.train.FailureConfig(max_failures=config.scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.scale.keep_checkpoints),
        ),
    )


def worker_resources(config: TrainConfig) -> tuple[int, dict[str, float], bool]:
    """torch threads of a worker, what Ray reserves for it, and whether it has a GPU. UserError for too few GPUs."""
    total, scale = ray.cluster_resources(), config.scale
    gpus = total.get("GPU", 0.0)
    if scale.device == "cuda" and gpus < scale.num_workers:
        raise UserError(f"device cuda: {scale.num_workers} workers need a GPU each, the cluster has {gpus:g}")
    gpu = scale.device == "cuda" or (scale.device == "auto" and gpus >= scale.num_workers)
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    even = min(total.get("CPU", 1.0) / scale.num_workers, max(nodes))
    cpus = scale.cpus_per_worker or (float(int(even)) if even >= 1 else even)
    threads = scale.threads_per_worker or max(1, int(cpus))
    return threads, {"CPU": cpus} | ({"GPU": 1.0} if gpu else {}), gpu


class Recorder:
    """Rows and notes of the workers: into metrics.jsonl and TensorBoard, and onto the terminal."""

    def __init__(self, run_dir: Path, config: TrainConfig, units: dict[str, str], done_epochs: int) -> None:
        """Go on after ``done_epochs`` epochs that are in metrics.jsonl already."""
        self._run_dir = run_dir
        self._progress = Progress(config.optim.epochs, units, done_epochs=done_epochs)
        self._log = MetricsLog(run_dir, done_epochs + 1 if config.run.resume else None)
        self._last = done_epochs

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        self._progress.__exit__(kind, error, trace)

    def take(self, monitor: Any) -> list[Message]:  # noqa: ANN401 - a Ray actor handle
        """Fetch and record what has come in; gives the metrics rows among it."""
        messages: list[Message] = ray.get(monitor.drain.remote())
        for message in messages:
            self._record(message)
        return [message["row"] for message in messages if message["kind"] == "row"]

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._progress.note(text)

    def _record(self, message: Message) -> None:
        if message["kind"] == "row":
            self._row(message["row"])
        elif message["kind"] == "history":
            self._catch_up(message["rows"])
        elif message["kind"] == "step":
            self._progress.step(message["epoch"], message["done"], message["total"])
        else:
            self.note(message["text"])

    def _catch_up(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a checkpoint that a driver before this one could not write any more."""
        for row in rows:
            if row["epoch"] > self._last:
                self._log.append(row)
                self._last = row["epoch"]

    def _row(self, row: dict[str, Any]) -> None:
        if row["epoch"] <= self._last:  # workers went back to a checkpoint: its epochs are run again
            self._log.close()
            self._log = MetricsLog(self._run_dir, row["epoch"])
        self._last = row["epoch"]
        self._log.append(row)
        self._progress.update(row)
