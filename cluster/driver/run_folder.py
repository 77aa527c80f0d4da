"""The run folder: opened at the start, filled at the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray.train import Checkpoint

from cluster import lock
from cluster.data.feed import TargetScaling
from cluster.errors import UserError
from cluster.files import write_text
from cluster.prediction.seen import seen_in
from cluster.run.report import (
    METRICS_FILE,
    RESULTS_FILE,
    RunResult,
    collect_versions,
    git_commit,
    read_metrics,
    write_predictions,
    write_results,
)
from cluster.run.resumed import not_there
from cluster.run.storage import RunStore, is_remote
from cluster.run.tracking import RUN_FILE
from cluster.settings.config import CONFIG_FILE, TrainConfig, load_yaml
from cluster.worker.checkpoint import (
    AVERAGE,
    BEST,
    CheckpointError,
    Outcome,
    TrainState,
    read_checkpoint,
    read_outcome,
)
from cluster.worker.saving import PREFIX
from crystalformer.artifact import ModelCard, TargetScale, save_model
from data_pipeline.prepared import PreparedDataset
from data_pipeline.table import StructureTable

DATA_FILE = "data.json"
"""What the run was trained on: name and fingerprint of the prepared data."""

OVERLAY_FILE = "deepspeed.json"
"""A copy of the user's DeepSpeed file, so that the run folder is enough to repeat the run."""

LOCK_FILE = ".lock"

MODEL_FOLDERS = {BEST: "model", AVERAGE: "model-swa"}

MAY_CHANGE = frozenset(
    {
        "resume",
        "auto_resume",
        "storage_path",
        "data_dir",
        "memory_limit_mb",
        "num_workers",
        "zero_stage",
        "device",
        "wall_clock_breakdown",
        "cpus_per_worker",
        "threads_per_worker",
        "backend",
        "max_failures",
        "wait_minutes",
        "elastic_seconds",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
        "deepspeed",
        "gradient_accumulation",
    }
)
"""Settings a resumed run may be given anew: where and on what it runs, not what it computes."""


def settle_resume(config: TrainConfig, store: RunStore) -> TrainConfig:
    """The config with ``auto_resume`` turned into ``resume``: true where the run is there already."""
    if not config.run.auto_resume:
        return config
    return replace(config, run=replace(config.run, resume=store.holds(CONFIG_FILE), auto_resume=False))


def with_free_name(config: TrainConfig) -> TrainConfig:
    """The config with a folder of its own, made here: runs begun in the same second get -2, -3, ... to their names.

    Only for a name that nobody chose. On an object store nothing is made, and the name stays.
    """
    name, storage = str(config.run.run_name), config.run.storage_path
    if is_remote(storage):
        return config
    for number in itertools.count(1):
        free = name if number == 1 else f"{name}-{number}"
        try:
            Path(storage).mkdir(parents=True, exist_ok=True)
        except OSError:  # open_run says what is wrong with the place
            return config
        try:
            (Path(storage) / free).mkdir()
        except FileExistsError:
            continue
        except OSError:
            return config
        return replace(config, run=replace(config.run, run_name=free))
    raise AssertionError("itertools.count has no end")


@contextmanager
def claimed(config: TrainConfig, store: RunStore) -> Iterator[None]:
    """Within, no other process writes this run; one that dies lets go. UserError where another one does.

    A run that goes on by itself (auto_resume) waits for the file server to notice that its last process is gone. An
    object store has no locks.
    """
    if store.filesystem is not None or (config.run.resume and not store.folder.is_dir()):
        yield
        return
    with ExitStack() as stack:
        try:
            with suppress(OSError):  # of a place that cannot be written open_run tells
                stack.enter_context(lock.claimed(store.folder / LOCK_FILE, patient=config.run.auto_resume))
        except lock.InUseError as error:
            name, parent = config.run.run_name, config.run.storage_path
            raise UserError(f"run_name {name!r} in {parent} is being written by another process") from error
        yield


def open_run(config: TrainConfig, store: RunStore) -> None:
    """Make or find the run's folder. UserError: its name is taken, nothing to resume, no place or space to write."""
    there = store.holds(CONFIG_FILE)
    name, parent = config.run.run_name, config.run.storage_path
    if there and not config.run.resume:
        raise UserError(f"run_name {name!r} exists in {parent}; give another, or --resume")
    if config.run.resume:
        if not there:
            raise not_there(str(name), store)
        store.pull(CONFIG_FILE, DATA_FILE, METRICS_FILE, RUN_FILE, RESULTS_FILE)
        _check_same(config, load_yaml(store.folder / CONFIG_FILE))
    store.check_writable()


def withdraw(store: RunStore) -> None:
    """Take back what the start of a run has written that was refused, so that its name is free for the next try."""
    if store.holds(METRICS_FILE) or any(store.folder.glob(f"{PREFIX}*")):
        return  # it has begun
    store.delete(CONFIG_FILE, OVERLAY_FILE, DATA_FILE, RUN_FILE, LOCK_FILE)


def check_data(config: TrainConfig, store: RunStore, dataset: PreparedDataset) -> None:
    """Note what the run is trained on; UserError where a run to be resumed was begun with other rows.

    Other rows would be dealt otherwise: what is tested now may have been trained on before.
    """
    known = {"dataset": dataset.name, "fingerprint": dataset.fingerprint}
    file = store.folder / DATA_FILE
    if config.run.resume and file.is_file():
        was = json.loads(file.read_text(encoding="utf-8"))
        if was != known:
            raise UserError(
                f"data set {dataset.name} was prepared anew since run {config.run.run_name!r} began "
                f"({str(was.get('fingerprint'))[:12]} is now {dataset.fingerprint[:12]}): start a new run"
            )
    write_text(file, json.dumps(known, indent=1) + "\n")


def _check_same(config: TrainConfig, saved: TrainConfig) -> None:
    """UserError names the first setting that a resumed run may not change."""
    was = saved.to_flat()
    # Batch norm sees the parts that gradients are accumulated over, so their number decides the result then.
    fixed = {"gradient_accumulation"} if "bn" in (config.model.norm_type, config.model.pre_pooling_op[2:4]) else set()
    for name, value in config.to_flat().items():
        if (name not in MAY_CHANGE or name in fixed) and was[name] != value:
            raise UserError(f"{name} is {value!r} but the run to resume was started with {was[name]!r}")


def read_final(checkpoint: Checkpoint) -> tuple[TrainState, Outcome]:
    """Where a finished run stands, and what it found."""
    with checkpoint.as_directory() as folder:
        outcome = read_outcome(Path(folder))
        if outcome is None:
            raise RuntimeError(f"training stopped before its end; its last checkpoint is {checkpoint.path}")
        return read_checkpoint(Path(folder)), outcome


def read_finished(config: TrainConfig, store: RunStore) -> tuple[TrainState, Outcome] | None:
    """What a resumed run has found already; None where there is something left to do, or to look for with Ray."""
    rows = read_metrics(store.folder) if config.run.resume and store.filesystem is None else []
    newest = max(store.folder.glob(f"{PREFIX}*"), default=None)
    if newest is None or not rows or rows[-1]["epoch"] < config.optim.epochs:
        return None
    try:
        outcome = read_outcome(newest)
        return None if outcome is None else (read_checkpoint(newest), outcome)
    except CheckpointError:  # the workers go on from an earlier one
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run learns from: the data set, its rows that have every target, units and normalization of these."""

    dataset: PreparedDataset
    structures: Mapping[str, StructureTable]
    """By split."""
    units: dict[str, str]
    """By target."""
    scaling: TargetScaling


def run_result(
    config: TrainConfig, store: RunStore, data: RunData, state: TrainState, outcome: Outcome, seconds: float
) -> RunResult:
    """What a finished run reports; errors are in the targets' units.

    state: where it ended. outcome: its predictions are (n, T) of the test split, in units. seconds: from start to
    end. RuntimeError where no epoch was the best.
    """
    if state.best is None:
        raise RuntimeError(f"the final checkpoint in {store.location} names no best epoch")
    truth = data.structures["test"].targets()
    errors = {
        name: dict(zip(config.data.target, np.abs(values.numpy() - truth).mean(0).tolist(), strict=True))
        for name, values in outcome.predictions.items()
    }
    facts = outcome.facts
    return RunResult(
        run_dir=store.location,
        dataset=str(config.data.dataset),
        targets=config.data.target,
        units=data.units,
        seed=config.run.seed,
        epochs=config.optim.epochs,
        num_parameters=facts["num_parameters"],
        world_size=facts["world_size"],
        zero_stage=config.scale.zero_stage,
        device=facts["device"],
        train_size=data.structures["train"].num_rows,
        val_size=data.structures["val"].num_rows,
        test_size=data.structures["test"].num_rows,
        best_epoch=state.best.epoch,
        val_mae=state.best.mae,
        test_mae=errors[BEST],
        test_mae_swa=errors.get(AVERAGE, {}),
        wall_seconds=seconds,
        structures_per_second=_throughput(read_metrics(store.folder)),
        peak_memory_mb=facts["peak_memory_mb"],
        versions=collect_versions(),
        git_commit=git_commit(),
    )


def _throughput(rows: list[dict[str, Any]]) -> float:
    """Median structures a second over the epochs; the first, which warms up, counts only where it is alone."""
    rates = [row["structures_per_s"] for row in rows]
    return float(np.median(rates[1:] or rates))


def write_run(run_dir: Path, config: TrainConfig, data: RunData, outcome: Outcome, result: RunResult) -> None:
    """Fill the run folder: model folders, predictions (n, T) of the test split in units, pictures, results.

    results.json is the last, so that a run which has it is whole. OSError where a file cannot be written.
    """
    from cluster.prediction.plots import plot_curves, plot_parity  # matplotlib is slow to import

    card = _model_card(config, data, result)
    for name, weights in outcome.models.items():
        # The averaged weights are not validated.
        errors = {"val_mae": result.val_mae, "test_mae": result.test_mae} if name == BEST else {}
        errors = errors or {"test_mae": result.test_mae_swa}
        said = {"weights": name, **{kind: dict(by_target) for kind, by_target in errors.items()}}
        save_model(run_dir / MODEL_FOLDERS[name], replace(card, provenance={**card.provenance, **said}), weights)
    truth, prediction = data.structures["test"].targets(), outcome.predictions[BEST].numpy()
    write_predictions(run_dir, data.structures["test"].material_ids(), config.data.target, truth, prediction)
    plot_parity(run_dir / "parity.png", config.data.target, result.units, truth, prediction)
    averaged = config.optim.averaged_epochs
    plot_curves(
        run_dir / "curves.png",
        read_metrics(run_dir),
        result.units,
        swa_from=config.optim.epochs - averaged + 1 if averaged else None,
    )
    write_results(run_dir, result)


def _model_card(config: TrainConfig, data: RunData, result: RunResult) -> ModelCard:
    elements, ranges = seen_in(data.structures["train"])
    targets = zip(config.data.target, data.scaling.scale, data.scaling.bias, strict=True)
    return ModelCard(
        model=config.model,
        targets=tuple(
            TargetScale(name=name, unit=result.units[name], scale=scale, bias=bias) for name, scale, bias in targets
        ),
        provenance={
            "dataset": data.dataset.name,
            "dataset_fingerprint": data.dataset.fingerprint,
            "train_size": result.train_size,
            "elements": list(elements),
            **({} if config.run.init_from is None else {"init_from": config.run.init_from}),
            "seed": result.seed,
            "epochs": result.epochs,
            "versions": dict(result.versions),
            "git_commit": result.git_commit,
        },
        ranges=ranges,
    )
