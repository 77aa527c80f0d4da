"""A trial in its process: cut off and taken up again it gives the numbers it would have given; its time is kept."""

import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.data.feed import TargetScaling
from cluster.data.tables import TablesOnDisk, open_split
from cluster.errors import RunFailed
from cluster.settings.config import TrainConfig
from data_pipeline.prepared import load_prepared
from data_pipeline.table import StructureTable
from tests.cluster.processes import Workers
from tune.book import kept_errors
from tune.failures import of_every_trial, told
from tune.library import TRIAL_SPLITS, TrialData
from tune.worker import OneWorker, TimeLimit, TrialHost, score_of


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    workers = Workers(1, str(tmp_path_factory.mktemp("meeting")))
    yield workers
    workers.close()


def begin(settings, folder, *, seconds=600.0):
    config = TrainConfig.from_flat({"epochs": 6, **settings, "swa_epochs": 0, "checkpoint_every": 2})
    dataset = load_prepared(Path(config.data.data_dir), "salts")
    radius = config.model.neighbor_radius
    opened = {
        split: open_split(dataset, split, config.data.target, config.model.neighborhood) for split in TRIAL_SPLITS
    }
    targets = StructureTable.from_arrow(opened["train"].structures, config.data.target).targets()
    data = TrialData(
        tables={
            split: TablesOnDisk(structures=tables.files[0], shells=tables.files[1], limit=2**30)
            for split, tables in opened.items()
        },
        radius=radius,
        scaling=TargetScaling.fit(targets, "scale_bias"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    return OneWorker(config, data, folder, 1, lambda: time.monotonic() > deadline)


def numbers(rows):
    return [(row["epoch"], row["train_loss"], row["val_mae"]["gap"]) for row in rows]


def rows_of(run):
    return [*run.history, *itertools.takewhile(lambda row: row is not None, iter(lambda: next_row(run), object()))]


def next_row(run):
    try:
        return next(run)
    except StopIteration:
        return None


def cut_off_and_whole(place, settings, folder):
    """Rows of an uninterrupted trial; of one left after its fifth epoch: rows before, checkpoints, rows kept, all."""
    whole = numbers(rows_of(begin(settings, folder / "whole")))
    first = begin(settings, folder / "cut")
    before = numbers(itertools.islice(iter(lambda: next_row(first), None), 5))
    first.close()
    stored = [path.name for path in sorted((folder / "cut").glob("checkpoint-*"))]
    again = begin(settings, folder / "cut")
    taken_up = numbers(again.history)
    return whole, before, stored, taken_up, numbers(rows_of(again))


def test_a_trial_goes_on_from_its_checkpoint_exactly(process, settings, tmp_path):
    ((whole, before, stored, taken_up, again),) = process.run(cut_off_and_whole, settings, tmp_path)
    assert [row[0] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert before == whole[:5]
    assert 1 <= len(stored) <= 2  # the one before goes when the new one is registered, a step or so later
    assert len(taken_up) == 4  # closing waits for the thread that writes the checkpoint after the fourth epoch
    assert taken_up == whole[: len(taken_up)]
    assert again == whole
    assert np.isfinite([row[2] for row in whole]).all()


def damaged_and_taken_up(place, settings, folder):
    """Rows of a trial that was left; how many were taken up of its damaged checkpoint; all rows."""
    first = begin({**settings, "epochs": 3}, folder)
    rows = numbers(rows_of(first))
    first.close()
    for file in folder.glob("checkpoint-*/moments.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    again = begin({**settings, "epochs": 3}, folder)
    return rows, len(again.history), numbers(rows_of(again))


def test_a_trial_whose_checkpoint_is_damaged_is_begun_anew(process, settings, tmp_path):
    ((rows, taken_up, again),) = process.run(damaged_and_taken_up, settings, tmp_path)
    assert len(rows) == 3 and taken_up == 0 and again == rows


def judged_and_kept(place, settings, folder):
    """Of a trial of two targets: the values and the errors by epoch, by target, and what the run itself keeps."""
    settings = {**settings, "target": ["gap", "edge"], "epochs": 15, "lr": 5e-3}
    run = begin(settings, folder)
    rows, worker = rows_of(run), run._worker
    scores = [score_of(row, settings["target"], worker._job.scaling) for row in rows]
    errors = {target: [row["val_mae"][target] for row in rows] for target in settings["target"]}
    worker.run()  # the end, as workers of Ray Train come to it
    (checkpoint,) = folder.glob("checkpoint-*")
    assert f"-{rows[-1]['step']:08d}-" in checkpoint.name
    return {target: kept_errors(errors[target], scores) for target in errors}, errors, worker._best


def test_a_trial_ends_without_a_test_and_is_judged_by_the_weights_it_keeps(process, settings, tmp_path):
    ((values, errors, best),) = process.run(judged_and_kept, settings, tmp_path)
    for target in ("gap", "edge"):
        assert len(values[target]) == 15
        assert values[target][-1] == best.mae[target] == errors[target][best.epoch - 1]
        assert values[target][best.epoch - 2] != values[target][-1]
    assert values["edge"][-1] > min(errors["edge"])


def without_a_folder(place, settings, folder):
    """What a trial raises whose folder is not there any more when a checkpoint is due."""
    run = begin(settings, folder)
    next_row(run)
    shutil.rmtree(folder)
    with pytest.raises(RunFailed) as caught:
        rows_of(run)
    return of_every_trial(caught.value), told(caught.value)


def test_a_checkpoint_that_cannot_be_written_is_no_doing_of_the_trial(process, settings, tmp_path):
    ((every, text),) = process.run(without_a_folder, settings, tmp_path / "gone")
    assert every
    assert text.startswith(f"a checkpoint could not be written: {tmp_path}/gone/") and "No such file" in text


def late(place, settings, folder):
    run = begin(settings, folder, seconds=-1.0)
    return next_row(run)


def test_a_trial_whose_time_is_up_stops(process, settings, tmp_path):
    assert process.run(late, settings, tmp_path / "late") == [None]


def test_the_time_of_several_workers_is_counted_from_when_they_begin():
    times = iter([100.0, 105.0, 109.9, 110.0])
    limit = TimeLimit(10.0, lambda: next(times))  # made long before
    assert [limit.up() for _ in range(4)] == [False, False, False, True]


def test_the_newest_checkpoint_is_the_one_that_is_kept(tmp_path):
    host = TrialHost(tmp_path, lambda: False)
    assert host.checkpoints() == []
    for step in (7, 14, 21):
        source = tmp_path / f"source-{step}"
        source.mkdir()
        (source / "state.json").write_text(str(step))
        host.keep({}, host.store(source, f"checkpoint-{step:08d}-abc"))
    (kept,) = host.checkpoints()
    assert (Path(kept.path) / "state.json").read_text() == "21"
    assert not host.stopping()
    assert TrialHost(tmp_path, lambda: True).stopping()
