"""What the driver makes of the messages of workers."""

import pytest

from cluster.launch import Recorder
from cluster.report import read_metrics
from cluster.storage import RunStore
from tests.cluster.small import small_config

ROW = {"epoch": 1, "step": 8, "lr": 1e-3, "train_loss": 0.5, "val_mae": {"shear": 0.2}, "structures_per_s": 9.0}


@pytest.fixture
def recorder(tmp_path, capsys):
    """Made after capsys, whose output it then writes to."""
    (tmp_path / "run").mkdir()
    with Recorder(RunStore(str(tmp_path), "run"), small_config(), {"shear": ""}, lambda _: None) as recorder:
        yield recorder


def test_each_kind_of_message_is_taken_up(recorder, tmp_path, capsys):
    messages = [
        {"kind": "begun"},
        {"kind": "step", "epoch": 1, "done": 1, "total": 8},
        {"kind": "row", "row": ROW | {"seconds": 1.0}},
        {"kind": "history", "rows": [ROW, ROW | {"epoch": 2}]},
        {"kind": "note", "text": "resuming"},
        {"kind": "failed", "text": "the disk is full"},
    ]
    for message in messages:
        recorder._record(message)
    assert recorder.begun and recorder.failure == "the disk is full"
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    output = capsys.readouterr()
    assert "resuming" in output.out + output.err


def test_an_unknown_kind_is_refused(recorder):
    with pytest.raises(ValueError, match="unknown kind 'rwo'"):
        recorder._record({"kind": "rwo", "text": ""})
