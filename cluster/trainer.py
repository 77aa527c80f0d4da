"""The driver of a run: from a checked config to a finished run folder, through Ray Train."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.checkpoint import AVERAGE, BEST, Outcome, TrainState, read_checkpoint, read_outcome
from cluster.config import TrainConfig, load_yaml, save_yaml
from cluster.errors import UserError
from cluster.feed import TargetScaling
from cluster.log import say
from cluster.loop import Job, averaged_epochs, run_worker
from cluster.monitor import Message, Monitor, Watcher
from cluster.progress import Progress, counting
from cluster.report import (
    RESULTS_FILE,
    MetricsLog,
    RunResult,
    collect_versions,
    git_commit,
    read_metrics,
    write_predictions,
    write_results,
)
from cluster.session import ray_session
from cluster.tables import SPLITS, SplitTables, open_split, share
from crystalformer.artifact import ModelCard, TargetScale, save_model
from data_pipeline.datasets import resolve
from data_pipeline.prepare import prepare_dataset
from data_pipeline.prepared import PreparedDataset
from data_pipeline.table import StructureTable

CONFIG_FILE = "config.yaml"
MODEL_FOLDERS = {BEST: "model", AVERAGE: "model-swa"}

MAY_CHANGE = frozenset(
    {
        "resume",
        "storage_path",
        "data_dir",
        "num_workers",
        "zero_stage",
        "device",
        "cpus_per_worker",
        "threads_per_worker",
        "backend",
        "max_failures",
        "checkpoint_every",
        "keep_checkpoints",
        "deepspeed",
        "gradient_accumulation",
    }
)
"""Settings a resumed run may be given anew: where and on what it runs, not what it computes."""


def train(config: TrainConfig) -> RunResult:
    """Prepare the data if needed, train, test, and write the run folder.

    ``config`` is resolved (``TrainConfig.resolved``). UserError or DataError for what the user can mend.
    """
    start = time.monotonic()
    run_dir = _open_run(config)
    dataset = _prepared(config)
    radius = config.model.neighbor_radius
    tables = {split: open_split(dataset, split, config.data.target, radius) for split in SPLITS}
    structures = {name: StructureTable.from_arrow(t.structures, config.data.target) for name, t in tables.items()}
    _check_sizes(config, structures)
    scaling = TargetScaling.fit(structures["train"].targets(), config.optim.normalize_targets)
    save_yaml(run_dir / CONFIG_FILE, config)
    units = {target.name: target.unit for target in dataset.targets if target.name in config.data.target}
    with ray_session():
        final = _fit(config, run_dir, tables, scaling, units)
    state, outcome = _read_final(final)
    result = _result(config, run_dir, structures, units, state, outcome, time.monotonic() - start)
    _write_run(run_dir, config, dataset, structures["test"], scaling, outcome, result)
    return result


def _open_run(config: TrainConfig) -> Path:
    """The run's folder, made or found. UserError: its name is taken, nothing to resume, or no place to write."""
    if "://" in config.run.storage_path:
        raise UserError(f"storage_path must be a folder that all nodes share, got {config.run.storage_path!r}")
    run_dir = Path(config.run.storage_path).resolve() / str(config.run.run_name)
    there = (run_dir / CONFIG_FILE).is_file()
    if there and not config.run.resume:
        raise UserError(f"run_name {config.run.run_name!r} exists in {run_dir.parent}; give another, or --resume")
    if config.run.resume:
        if not there:
            raise UserError(f"run_name {config.run.run_name!r} cannot be resumed: {run_dir} holds no {CONFIG_FILE}")
        _check_same(config, load_yaml(run_dir / CONFIG_FILE))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"storage_path {config.run.storage_path!r} cannot be written: {error.strerror}") from error
    return run_dir


def _check_same(config: TrainConfig, saved: TrainConfig) -> None:
    """UserError names the first setting that a resumed run may not change."""
    was = saved.to_flat()
    for name, value in config.to_flat().items():
        if name not in MAY_CHANGE and was[name] != value:
            raise UserError(f"{name} is {value!r} but the run to resume was started with {was[name]!r}")


def _prepared(config: TrainConfig) -> PreparedDataset:
    data_dir = Path(config.data.data_dir).resolve()
    found = resolve(config.data.dataset, config.data.target, data_dir)
    with counting() as progress:
        dataset = prepare_dataset(found.info, data_dir, progress=progress)
    if dataset.rejected and not dataset.reused:
        say(f"{dataset.name}: {len(dataset.rejected)} rows rejected, listed in {dataset.path / 'dataset.json'}")
    return dataset


def _check_sizes(config: TrainConfig, structures: dict[str, StructureTable]) -> None:
    for split, table in structures.items():
        if table.num_rows == 0:
            wanted = ", ".join(config.data.target)
            raise UserError(f"dataset {config.data.dataset!r} has no {split} row with {wanted}")
    rows = structures["train"].num_rows
    if config.data.batch_size > rows:
        raise UserError(f"batch_size must be at most the {rows} training crystals, got {config.data.batch_size}")


def _fit(
    config: TrainConfig, run_dir: Path, tables: dict[str, SplitTables], scaling: TargetScaling, units: dict[str, str]
) -> Path:
    """Run Ray Train to the end; the folder of the final checkpoint."""
    threads, resources, gpu = _worker_resources(config)
    monitor = Monitor.remote()  # type: ignore[attr-defined]  # made by ray.remote
    job = Job(
        config=config.to_flat(),
        tables={split: share(table) for split, table in tables.items()},
        radius=config.model.neighbor_radius,
        scaling=scaling,
        threads=threads,
        monitor=monitor,
    )
    trainer = TorchTrainer(
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
    done = len(read_metrics(run_dir)) if config.run.resume else 0
    with Recorder(run_dir, config, units, done) as recorder:
        watcher = Watcher(monitor, recorder.handle)
        watcher.start()
        try:
            result = trainer.fit()
        finally:
            watcher.finish()
    if result.checkpoint is None:
        raise RuntimeError(f"training ended without a checkpoint in {run_dir}")
    return Path(result.checkpoint.path)


def _worker_resources(config: TrainConfig) -> tuple[int, dict[str, float], bool]:
    """torch threads of a worker, what Ray reserves for it, and whether it has a GPU."""
    total = ray.cluster_resources()
    scale = config.scale
    gpu = scale.device == "cuda" or (scale.device == "auto" and total.get("GPU", 0) >= scale.num_workers)
    gpus = total.get("GPU", 0.0)
    if scale.device == "cuda" and gpus < scale.num_workers:
        raise UserError(f"device cuda: {scale.num_workers} workers need a GPU each, the cluster has {gpus:g}")
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    share_of_cpus = min(total.get("CPU", 1.0) / scale.num_workers, max(nodes))
    cpus = scale.cpus_per_worker or (max(1.0, float(int(share_of_cpus))) if share_of_cpus >= 1 else share_of_cpus)
    threads = scale.threads_per_worker or max(1, int(cpus))
    resources = {"CPU": cpus} | ({"GPU": 1.0} if gpu else {})
    return threads, resources, gpu


class Recorder:
    """Rows and notes of the workers: into metrics.jsonl and TensorBoard, and onto the terminal."""

    def __init__(self, run_dir: Path, config: TrainConfig, units: dict[str, str], done_epochs: int) -> None:
        self._run_dir, self._resume = run_dir, config.run.resume
        self._progress = Progress(config.optim.epochs, units, done_epochs=done_epochs)
        self._log = MetricsLog(run_dir, done_epochs + 1 if config.run.resume else None)
        self._last = done_epochs

    def __enter__(self) -> Recorder:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:  # noqa: ANN401 - the three details of an exception
        self._log.close()
        self._progress.__exit__(*details)

    def handle(self, message: Message) -> None:
        """Take in one message."""
        if message["kind"] == "row":
            self._row(message["row"])
        elif message["kind"] == "step":
            self._progress.step(message["epoch"], message["done"], message["total"])
        else:
            self._progress.note(message["text"])

    def _row(self, row: dict[str, Any]) -> None:
        if row["epoch"] <= self._last:  # workers went back to a checkpoint: its epochs are run again
            self._log.close()
            self._log = MetricsLog(self._run_dir, row["epoch"])
        self._last = row["epoch"]
        self._log.append(row)
        self._progress.update(row)


def _read_final(folder: Path) -> tuple[TrainState, Outcome]:
    outcome = read_outcome(folder)
    if outcome is None:
        raise RuntimeError(f"training stopped before its end; its last checkpoint is {folder}")
    return read_checkpoint(folder), outcome


def _result(
    config: TrainConfig,
    run_dir: Path,
    structures: dict[str, StructureTable],
    units: dict[str, str],
    state: TrainState,
    outcome: Outcome,
    seconds: float,
) -> RunResult:
    if state.best is None:
        raise RuntimeError(f"the final checkpoint in {run_dir} names no best epoch")
    truth = outcome.predictions["truth"].numpy()
    errors = {
        name: dict(zip(config.data.target, np.abs(values.numpy() - truth).mean(0).tolist(), strict=True))
        for name, values in outcome.predictions.items()
    }
    facts = outcome.facts
    return RunResult(
        run_dir=str(run_dir),
        dataset=str(config.data.dataset),
        targets=config.data.target,
        units=units,
        seed=config.run.seed,
        epochs=config.optim.epochs,
        num_parameters=facts["num_parameters"],
        world_size=facts["world_size"],
        zero_stage=config.scale.zero_stage,
        device=facts["device"],
        train_size=structures["train"].num_rows,
        val_size=structures["val"].num_rows,
        test_size=structures["test"].num_rows,
        best_epoch=state.best.epoch,
        val_mae=state.best.mae,
        test_mae=errors[BEST],
        test_mae_swa=errors.get(AVERAGE, {}),
        wall_seconds=seconds,
        structures_per_second=_throughput(read_metrics(run_dir)),
        peak_memory_mb=facts["peak_memory_mb"],
        versions=collect_versions(),
        git_commit=git_commit(),
    )


def _throughput(rows: list[dict[str, Any]]) -> float:
    """Median structures a second over the epochs; the first, which warms up, counts only where it is alone."""
    rates = [row["structures_per_s"] for row in rows]
    return float(np.median(rates[1:] or rates))


def _write_run(
    run_dir: Path,
    config: TrainConfig,
    dataset: PreparedDataset,
    test: StructureTable,
    scaling: TargetScaling,
    outcome: Outcome,
    result: RunResult,
) -> None:
    from cluster.plots import plot_curves, plot_parity  # matplotlib is slow to import

    card = _model_card(config, dataset, scaling, result)
    for name, weights in outcome.models.items():
        errors = result.test_mae if name == BEST else result.test_mae_swa
        save_model(
            run_dir / MODEL_FOLDERS[name],
            replace(card, provenance={**card.provenance, "weights": name, "test_mae": dict(errors)}),
            weights,
        )
    truth, prediction = outcome.predictions["truth"].numpy(), outcome.predictions[BEST].numpy()
    write_predictions(run_dir, test.material_ids(), config.data.target, truth, prediction)
    plot_parity(run_dir / "parity.png", config.data.target, result.units, truth, prediction)
    averaged = averaged_epochs(config)
    plot_curves(
        run_dir / "curves.png",
        read_metrics(run_dir),
        result.units,
        swa_from=config.optim.epochs - averaged + 1 if averaged else None,
    )
    write_results(run_dir, result)


def _model_card(
    config: TrainConfig, dataset: PreparedDataset, scaling: TargetScaling, result: RunResult
) -> ModelCard:
    targets = zip(config.data.target, scaling.scale, scaling.bias, strict=True)
    return ModelCard(
        model=config.model,
        targets=tuple(
            TargetScale(name=name, unit=result.units[name], scale=scale, bias=bias) for name, scale, bias in targets
        ),
        provenance={
            "dataset": dataset.name,
            "dataset_fingerprint": dataset.fingerprint,
            "train_size": result.train_size,
            "elements": list(dataset.elements),
            "seed": result.seed,
            "epochs": result.epochs,
            "val_mae": dict(result.val_mae),
            "versions": dict(result.versions),
            "git_commit": result.git_commit,
        },
    )


__all__ = ["CONFIG_FILE", "RESULTS_FILE", "train"]
