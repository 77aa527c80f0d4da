"""A training run from a checked config to a finished run folder."""

from __future__ import annotations

import json
import time

from cluster.data.dataset import dataset_of, require_batch, require_rows, units_of
from cluster.data.feed import TargetScaling
from cluster.data.tables import SPLITS, open_split
from cluster.driver.launch import launch
from cluster.driver.run_folder import (
    OVERLAY_FILE,
    RunData,
    check_data,
    claimed,
    open_run,
    read_final,
    read_finished,
    run_result,
    settle_resume,
    withdraw,
    write_run,
)
from cluster.errors import RunFailed, UserError
from cluster.files import write_text
from cluster.run.progress import counting
from cluster.run.report import RunResult, seconds_before, wall_seconds
from cluster.run.storage import RunStore
from cluster.run.tracking import Tracker
from cluster.session import ray_session
from cluster.settings.config import CONFIG_FILE, TrainConfig, save_yaml
from cluster.settings.deepspeed_config import overlay_of
from cluster.settings.reach import check_reach
from cluster.worker.checkpoint import CheckpointError
from data_pipeline.errors import DataError
from data_pipeline.table import StructureTable


def train(config: TrainConfig) -> RunResult:
    """Prepare the data if needed, train, test, and write the run folder.

    ``config`` is resolved (``TrainConfig.resolved``). UserError or DataError for what the user can mend.
    """
    start = time.monotonic()
    with RunStore(config.run.storage_path, str(config.run.run_name)) as store:
        try:
            with claimed(config, store):
                return _claimed_run(config, store, start)
        except CheckpointError as error:
            raise RunFailed(f"{error}; see --resume") from error
        except OSError as error:
            raise RunFailed(f"{error.filename or store.location}: {error.strerror or error}; see --resume") from error


def _claimed_run(config: TrainConfig, store: RunStore, start: float) -> RunResult:
    """The run in a folder that no other process writes; one that is refused at its start leaves its name free."""
    config = settle_resume(config, store)
    open_run(config, store)
    try:
        return _train(config, store, start)
    except (UserError, DataError):
        if not config.run.resume:
            withdraw(store)
        raise


def _train(config: TrainConfig, store: RunStore, start: float) -> RunResult:
    check_reach(config.model)
    dataset = dataset_of(config)
    check_data(config, store, dataset)
    around = config.model.neighborhood
    with counting() as progress:
        tables = {split: open_split(dataset, split, config.data.target, around, progress) for split in SPLITS}
    structures = {name: StructureTable.from_arrow(t.structures, config.data.target) for name, t in tables.items()}
    for split, table in structures.items():
        require_rows(table, dataset, split, config.data.target)
    require_batch(config.data.batch_size, structures["train"].num_rows)
    scaling = TargetScaling.fit(structures["train"].targets(), config.optim.normalize_targets)
    save_yaml(store.folder / CONFIG_FILE, config)
    overlay = overlay_of(config)
    if overlay is not None:
        write_text(store.folder / OVERLAY_FILE, json.dumps(overlay, indent=1) + "\n")
    store.push(now=True)
    data = RunData(
        dataset=dataset, structures=structures, units=units_of(dataset, config.data.target), scaling=scaling
    )
    with Tracker(config, store.folder) as tracker:
        found, took = read_finished(config, store), wall_seconds(store.folder)
        before = seconds_before(store.folder) if config.run.resume else 0.0
        if found is None:
            with ray_session():
                final = launch(config, store, tables, scaling, data.units, track=tracker.row, overlay=overlay)
                found = read_final(final)
        state, outcome = found
        seconds = before + time.monotonic() - start if took is None else took
        result = run_result(config, store, data, state, outcome, seconds)
        write_run(store.folder, config, data, outcome, result)
        tracker.result(result)
    return result
