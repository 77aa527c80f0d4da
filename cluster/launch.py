"""A run on Ray Train: workers started, watched, told to stop; the driver's side of loop.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import TrainConfig
from cluster.deepspeed_config import overlay_of
from cluster.errors import RunFailed, UserError
from cluster.feed import TargetScaling
from cluster.fine_tuning import load_initial
from cluster.interrupts import Interrupts, RunStopped
from cluster.loop import Job, run_worker
from cluster.monitor import Message, Monitor
from cluster.progress import Progress
from cluster.report import MetricsLog, read_metrics
from cluster.session import autoscaled, require_told
from cluster.storage import RunStore
from cluster.tables import SharedTables, SplitTables, TablesOnDisk, share

POLL_SECONDS = 0.25

AnyTables = SplitTables | SharedTables | TablesOnDisk


def launch(
    config: TrainConfig,
    store: RunStore,
    tables: Mapping[str, AnyTables],
    scaling: TargetScaling,
    units: dict[str, str],
    follow: Callable[[list[Message]], bool] = lambda _: True,
    track: Callable[[Message], None] = lambda _: None,
) -> ray.train.Checkpoint:
    """Train to the end and give the final checkpoint.

    ``follow`` is asked several times a second, with the metrics rows that have come in since; once it says False the
    workers stop at their next step, with a checkpoint. ``track`` is given each row as it is written. RunStopped where
    a signal ended the run before, RunFailed where it cannot go on.
    """
    monitor = _monitor()
    trainer = _trainer(config, store, tables, scaling, monitor)
    with Recorder(store, config, units, track) as recorder, Interrupts() as interrupts:
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
    if recorder.failure:
        raise RunFailed(recorder.failure)
    result = fit.result()
    if result.checkpoint is None:
        raise RuntimeError(f"training ended without a checkpoint in {store.location}")
    finished = bool((result.metrics or {}).get("finished"))
    if not finished and interrupts.received is not None:
        name = config.run.run_name
        raise RunStopped(f"stopped; go on with the same command and --run_name {name} --resume", interrupts.received)
    return result.checkpoint


def _monitor() -> Any:  # noqa: ANN401 - a Ray actor handle
    """The Monitor, on the driver's node: it must not be lost with another one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # made by ray.remote


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
        """What fit returned. RunFailed says in a line why it failed; its cause tells all."""
        if self._error is not None:
            raise RunFailed(f"training failed: {_reason(self._error)}; --debug tells more") from self._error
        return self._result


def _reason(error: Exception) -> str:
    """The first worker's error, or the controller's, without its traceback."""
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.items()), None) if failures else None
    if first is not None:
        rank, error = first
        return f"worker {rank}: {_last_line(error)}"
    return _last_line(getattr(error, "controller_failure", error))


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def _trainer(
    config: TrainConfig,
    store: RunStore,
    tables: Mapping[str, AnyTables],
    scaling: TargetScaling,
    monitor: Any,  # noqa: ANN401 - a Ray actor handle
) -> TorchTrainer:
    threads, resources, gpu = worker_resources(config)
    workers = config.scale.num_workers
    job = Job(
        config=config.to_flat(),
        tables={split: share(table, config.data.memory_limit_mb) for split, table in tables.items()},
        radius=config.model.neighbor_radius,
        scaling=scaling,
        threads=threads,
        monitor=monitor,
        initial=load_initial(config),
        overlay=overlay_of(config),
    )
    return TorchTrainer(
        run_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.fewest, workers.most) if workers.elastic else workers.most,
            use_gpu=gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.scale.elastic_seconds,
        ),
        run_config=ray.train.RunConfig(
            **store.ray_storage,
            failure_config=ray.train.FailureConfig(max_failures=config.scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.scale.keep_checkpoints),
        ),
    )


def worker_resources(config: TrainConfig) -> tuple[int, dict[str, float], bool]:
    """torch threads of a worker, what Ray reserves for it, and whether it has a GPU. UserError for too few GPUs."""
    total, scale = ray.cluster_resources(), config.scale
    gpus, workers = total.get("GPU", 0.0), scale.num_workers
    if autoscaled():
        require_told(device=scale.device, cpus_per_worker=scale.cpus_per_worker)
    elif scale.device == "cuda" and gpus < workers.fewest:
        raise UserError(f"device cuda: {workers} workers need a GPU each, the cluster has {gpus:g}")
    gpu = scale.device == "cuda" or (scale.device == "auto" and gpus >= workers.fewest)
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    even = min(total.get("CPU", 1.0) / workers.most, max(nodes))
    cpus = scale.cpus_per_worker or (float(int(even)) if even >= 1 else even)
    threads = scale.threads_per_worker or max(1, int(cpus))
    return threads, {"CPU": cpus} | ({"GPU": 1.0} if gpu else {}), gpu


class Recorder:
    """Rows and notes of the workers: into metrics.jsonl and TensorBoard, and onto the terminal."""

    def __init__(
        self, store: RunStore, config: TrainConfig, units: dict[str, str], track: Callable[[Message], None]
    ) -> None:
        """Go on after the epochs that are in metrics.jsonl already, where the run is resumed."""
        self._store, self._track = store, track
        self._push_failed = False
        self.failure = ""
        """Why the run cannot go on, where a worker said so."""
        done = read_metrics(store.folder)[-1:] if config.run.resume else []
        done_epochs = done[0]["epoch"] if done else 0
        self._progress = Progress(config.optim.epochs, units, done_epochs=done_epochs)
        self._log = MetricsLog(store.folder, done_epochs + 1 if config.run.resume else None)
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
        self.push()
        return [message["row"] for message in messages if message["kind"] == "row"]

    def push(self) -> None:
        """Send what is new to an object store. One that does not answer is told of once, and the run goes on."""
        try:
            self._store.push()
            self._push_failed = False
        except UserError as error:
            if not self._push_failed:
                self.note(f"warning: the run folder is behind, sending is tried again: {error}")
            self._push_failed = True

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._progress.note(text)

    def _record(self, message: Message) -> None:
        if message["kind"] == "row":
            self._row(message["row"])
        elif message["kind"] == "history":
            self._catch_up(message["rows"])
        elif message["kind"] == "failed":
            self.failure = message["text"]
        elif message["kind"] == "step":
            self._progress.step(message["epoch"], message["done"], message["total"])
        else:
            self.note(message["text"])

    def _catch_up(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a checkpoint that a driver before this one could not write any more."""
        for row in rows:
            if row["epoch"] > self._last:
                self._log.append(row)
                self._track(row)
                self._last = row["epoch"]

    def _row(self, row: dict[str, Any]) -> None:
        if row["epoch"] <= self._last:  # workers went back to a checkpoint: its epochs are run again
            self._log.close()
            self._log = MetricsLog(self._store.folder, row["epoch"])
        self._last = row["epoch"]
        self._log.append(row)
        self._track(row)
        self._progress.update(row)
