"""What the driver makes of the messages of workers."""

import pytest

from cluster.driver.recorder import Recorder
from cluster.run.report import read_metrics
from cluster.run.storage import RunStore
from tests.cluster.small import small_config

ROW = {"epoch": 1, "step": 8, "lr": 1e-3, "train_loss": 0.5, "val_mae": {"shear": 0.2}, "structures_per_s": 9.0}


def recorder(folder) -> Recorder:
    (folder / "run").mkdir()
    return Recorder(RunStore(str(folder), "run"), small_config(), {"shear": ""}, lambda _: None)


def test_each_kind_of_message_is_taken_up(tmp_path, capsys):
    messages = [
        {"kind": "begun"},
        {"kind": "step", "epoch": 1, "done": 1, "total": 8},
        {"kind": "row", "row": ROW | {"seconds": 1.0}},
        {"kind": "history", "rows": [ROW, ROW | {"epoch": 2}]},
        {"kind": "note", "text": "resuming"},
        {"kind": "failed", "text": "the disk is full"},
    ]
    with recorder(tmp_path) as driver:
        for message in messages:
            driver._record(message)
    assert driver.begun and driver.failure == "the disk is full"
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert "resuming" in capsys.readouterr().out


def test_an_unknown_kind_is_refused(tmp_path):
    with recorder(tmp_path) as driver, pytest.raises(ValueError, match="unknown kind 'rwo'"):
        driver._record({"kind": "rwo", "text": ""})
