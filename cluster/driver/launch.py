"""A run on Ray Train: workers started, watched, told to stop; the driver's side of loop.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.data.feed import TargetScaling
from cluster.data.tables import SharedTables, SplitTables, TablesOnDisk, share
from cluster.driver.fit import Fit
from cluster.driver.recorder import Recorder
from cluster.driver.room import (
    WorkerResources,
    alive_nodes,
    awaited,
    described,
    grows,
    share_of,
    worker_share,
    workers_that_fit,
)
from cluster.driver.scaling import policy_of
from cluster.driver.snapshot import mend_snapshot
from cluster.driver.waiting import Waiting
from cluster.errors import RunFailed, UserError
from cluster.interrupts import Interrupts, RunStopped
from cluster.run.storage import RunStore
from cluster.session import autoscaled, own_session, require_told
from cluster.settings.config import TrainConfig
from cluster.worker.fine_tuning import load_initial
from cluster.worker.loop import Job
from cluster.worker.monitor import Message, Monitor
from cluster.worker.process import run_worker
from cluster.worker.process_group import Joined, process_group

_log = logging.getLogger(__name__)

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
    overlay: Mapping[str, Any] | None = None,
) -> ray.train.Checkpoint:
    """Train to the end and give the final checkpoint.

    Once a worker has begun, ``follow`` is asked several times a second, with the metrics rows that are new then;
    where it says False the workers stop at their next step, with a checkpoint. ``track`` is given each row as it is
    written. ``overlay``: DeepSpeed's settings of the user's file, which this process may not see.
    RunStopped where a signal ended the run before, RunFailed where it cannot go on.
    """
    monitor, reserved = _monitor(), awaited_resources(config)
    mended = mend_snapshot(store.ray_storage) if config.run.resume else ""
    job = Job(
        config=config.to_flat(),
        tables={},
        radius=config.model.neighbor_radius,
        scaling=scaling,
        threads=reserved.threads,
        monitor=monitor,
        initial=load_initial(config, units),
        overlay=overlay,
    )
    with Recorder(store, config, units, track) as recorder, Interrupts() as interrupts:
        if mended:
            recorder.note(mended)
        waiting = Waiting(config.scale.num_workers, reserved.resources, recorder.note)
        fit = Fit(
            lambda: _trainer(config, store, replace(job, tables=_shared(config, tables)), reserved),
            with_tasks=any(isinstance(table, SplitTables) for table in tables.values()),
        )
        told = False
        try:
            while fit.under_way(POLL_SECONDS):
                rows = recorder.take(monitor)
                enough = recorder.begun and not follow(rows)
                waiting.look()
                if interrupts.received is not None and (waiting.told or not recorder.begun):
                    raise _stopped(config, " while no worker was at work", interrupts.received)
                if interrupts.received is not None and not told:
                    recorder.note("stopping: a checkpoint is written at the next step; once more to stop at once")
                if (interrupts.received is not None or enough) and not told:
                    monitor.stop.remote()
                    told = True
        except BaseException:
            fit.end()
            raise
        follow(recorder.take(monitor))
    if recorder.failure:
        raise RunFailed(recorder.failure)
    result = fit.result()
    if result.checkpoint is None:
        raise RuntimeError(f"training ended without a checkpoint in {store.location}")
    finished = bool((result.metrics or {}).get("finished"))
    if not finished and interrupts.received is not None:
        raise _stopped(config, "", interrupts.received)
    return result.checkpoint


def _stopped(config: TrainConfig, when: str, signal_number: int) -> RunStopped:
    name = config.run.run_name
    return RunStopped(f"stopped{when}; go on with the same command and --run_name {name} --resume", signal_number)


def _work(given: Mapping[str, Any]) -> None:
    """Entry point of a Ray Train worker: run_worker, and word to the driver that it begins."""
    job: Job = ray.get(given["job"])
    job.monitor.send.remote({"kind": "begun"})
    with process_group(given["backend"]):
        run_worker(job)


def _monitor() -> Any:  # noqa: ANN401 - a Ray actor handle
    """The Monitor, on the driver's node: it must not be lost with another one."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # made by ray.remote


def _shared(config: TrainConfig, tables: Mapping[str, AnyTables]) -> dict[str, SharedTables | TablesOnDisk]:
    return {split: share(table, config.data.memory_limit_mb) for split, table in tables.items()}


def _trainer(config: TrainConfig, store: RunStore, job: Job, reserved: WorkerResources) -> TorchTrainer:
    workers, backend = config.scale.num_workers, "nccl" if reserved.gpu else "gloo"
    return _Trainer(
        job.monitor,
        train_loop_per_worker=_work,
        # By reference: Ray Train's controller would load all that a job is made of.
        train_loop_config={"job": ray.put(job), "backend": backend},
        torch_config=Joined(backend=backend),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.fewest, workers.most) if workers.elastic else workers.most,
            use_gpu=reserved.gpu,
            resources_per_worker=reserved.resources,
            elastic_resize_monitor_interval_s=config.scale.elastic_seconds,
        ),
        run_config=ray.train.RunConfig(
            **store.ray_storage,
            failure_config=ray.train.FailureConfig(max_failures=config.scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.scale.keep_checkpoints),
        ),
    )


class _Trainer(TorchTrainer):
    """Without the processes that Ray Train starts beside a run for no use of ours, a second of start-up each."""

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's, but for the one that deals out datasets, as none is given: workers get their tables with the job.

        On a Ray of this process alone no one has to clean up after a controller that died, either.
        """
        unused = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if own_session() else set())
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in unused]

    def __init__(self, monitor: Any, **given: Any) -> None:  # noqa: ANN401 - Ray's
        self._monitor = monitor
        super().__init__(**given)

    def _initialize_and_run_controller(self, **given: Any) -> Any:  # noqa: ANN401 - Ray's
        policy = policy_of(given["scaling_policy"], self._monitor, own_session=own_session())
        return super()._initialize_and_run_controller(**given | {"scaling_policy": policy})


def awaited_resources(config: TrainConfig) -> WorkerResources:
    """``worker_resources``, waiting up to ``wait_minutes`` for nodes: after a cluster's head they come one by one."""
    found = awaited(lambda: worker_resources(config), config.scale.wait_minutes)
    _tell_of_idle_gpus(config, found)
    return found


def _tell_of_idle_gpus(config: TrainConfig, found: WorkerResources) -> None:
    """Warn where device auto leaves GPUs alone, as they do not suffice for all workers."""
    gpus = sum(node.gpus for node in alive_nodes())
    if config.scale.device == "auto" and gpus and not found.gpu:
        workers = config.scale.num_workers
        _log.warning("%s workers train on CPUs: they need a GPU each, the cluster has %g", workers, gpus)


def worker_resources(config: TrainConfig) -> WorkerResources:
    """What a worker has. UserError where the cluster has no room for all, on nodes that are there or may come."""
    scale, nodes = config.scale, alive_nodes()
    gpus, workers = sum(node.gpus for node in nodes), scale.num_workers
    if autoscaled():
        require_told(device=scale.device, cpus_per_worker=scale.cpus_per_worker)
    elif scale.device == "cuda" and gpus < workers.fewest and not grows():
        raise UserError(f"device cuda: {workers} workers need a GPU each, the cluster has {gpus:g}")
    share = worker_share(scale, nodes)
    if scale.cpus_per_worker is not None:
        room = workers_that_fit(nodes, share.cpus, gpu=share.gpu)
        if room < workers.fewest and not grows():
            each = share_of(share.cpus, gpu=share.gpu)
            raise UserError(
                f"cpus_per_worker {share.cpus:g}: there is room for {room} of {workers} workers of {each} each "
                f"on the cluster's {described(nodes)}"
            )
    elif not share.cpus:
        kind = "a CPU and a GPU" if share.gpu else "a CPU"
        raise UserError(f"num_workers {workers}: they need {kind} each, the cluster has {described(nodes)}")
    return share
