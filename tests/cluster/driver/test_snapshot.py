"""Ray Train's list of checkpoints, damaged in every way, and what Ray Train takes up of it once it is mended.

That a whole run goes on from a list that was written anew is in test_recovery.py.
"""

import json
import shutil

import pyarrow.fs
import pytest
import torch
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from cluster.driver.snapshot import SNAPSHOT, mend_snapshot
from cluster.run.storage import RunStore, send_folder
from cluster.worker.checkpoint import BEST, Outcome, Position, TrainState, write_checkpoint, write_outcome
from tests.cluster.s3 import s3_server


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def checkpoint(folder, name: str, step: int, *, epoch: int = 1, finished: bool = False) -> None:
    """A small one, whole."""
    path, tensors = folder / f"checkpoint-{name}", {"a": torch.ones(2)}
    path.mkdir()
    if finished:
        write_outcome(path, Outcome(facts={}, models={BEST: tensors}, predictions={BEST: torch.ones(1)}))
    write_checkpoint(path, TrainState(position=Position(epoch=epoch, step=step), weights=tensors), {})


def mend(folder) -> str:
    return mend_snapshot({"storage_path": str(folder.parent), "name": folder.name})


def taken_up(folder) -> list[tuple[str, dict]]:
    """What Ray Train makes of the folder: name and metrics of its checkpoints, the newest last."""
    storage = StorageContext(str(folder.parent), folder.name)
    manager = CheckpointManager(CheckpointConfig(num_to_keep=9), storage)
    results = manager.best_checkpoint_results
    found = [(result.checkpoint.path.rpartition("-")[2], result.metrics) for result in results]
    if found:
        assert manager.latest_checkpoint_result.checkpoint.path.endswith(found[-1][0])
    else:
        assert manager.latest_checkpoint_result is None
    return found


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "bytes": lambda text: "\0" * len(text),
    "another": lambda text: "[]",
    "fields": lambda text: '{"ray_version": "2.60.0"}',
    "latest": lambda text: json.dumps(json.loads(text) | {"checkpoint_results": [], "checkpoint_report_indices": []}),
    "indices": lambda text: json.dumps(json.loads(text) | {"checkpoint_report_indices": []}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_list_is_written_anew(folder, damage):
    checkpoint(folder, "b", 5)
    checkpoint(folder, "a", 10, epoch=2)
    assert mend(folder) == (
        "warning: Ray Train's list of checkpoints is missing; it is written anew from 2 that are whole"
    )
    good = (folder / SNAPSHOT).read_text()
    expected = [("b", {"epoch": 0, "finished": False}), ("a", {"epoch": 1, "finished": False})]
    assert taken_up(folder) == expected
    assert mend(folder) == ""
    (folder / SNAPSHOT).write_text(DAMAGES[damage](good))
    with pytest.raises(Exception):  # noqa: B017 - of several kinds, but Ray does refuse it
        taken_up(folder)
    assert mend(folder).endswith("; it is written anew from 2 that are whole")
    assert (folder / SNAPSHOT).read_text() == good
    assert taken_up(folder) == expected


def test_a_list_that_is_well_is_left_alone(folder):
    checkpoint(folder, "a", 5)
    mend(folder)
    before = (folder / SNAPSHOT).stat().st_mtime_ns
    checkpoint(folder, "orphan", 6)  # written in the last moment, and Ray Train does not know of it
    assert mend(folder) == ""
    assert (folder / SNAPSHOT).stat().st_mtime_ns == before


def test_a_folder_that_is_gone(folder):
    for step, name in enumerate("abc"):
        checkpoint(folder, name, step)
    mend(folder)
    shutil.rmtree(folder / "checkpoint-b")
    expected = "checkpoints has checkpoint-b, which is gone; it is written anew from 2 that are whole"
    assert mend(folder) == f"warning: Ray Train's list of {expected}"
    assert [name for name, _ in taken_up(folder)] == ["a", "c"]


def test_the_newest_is_the_one_that_is_furthest(folder):
    checkpoint(folder, "z", 5, epoch=1)
    checkpoint(folder, "y", 5, epoch=2)  # after the validation
    checkpoint(folder, "x", 5, epoch=2, finished=True)
    mend(folder)
    assert [name for name, _ in taken_up(folder)] == ["z", "y", "x"]
    assert taken_up(folder)[-1][1] == {"epoch": 1, "finished": True}


def test_checkpoints_that_are_not_whole_are_left_out(folder):
    for step, name in enumerate("abcd"):
        checkpoint(folder, name, step)
    (folder / "checkpoint-b" / "state.json").unlink()
    (folder / "checkpoint-c" / "weights.safetensors").write_bytes(b"")
    (folder / "checkpoint-file").touch()
    mend(folder)
    assert [name for name, _ in taken_up(folder)] == ["a", "d"]


def test_none_is_whole(folder):
    assert mend(folder) == "" and not (folder / SNAPSHOT).exists()
    (folder / SNAPSHOT).touch()
    checkpoint(folder, "a", 5)
    (folder / "checkpoint-a" / "state.json").unlink()
    assert mend(folder) == (
        "warning: Ray Train's list of checkpoints cannot be read; none is whole, so the run starts from its beginning"
    )
    assert taken_up(folder) == []


def test_in_a_bucket(folder, tmp_path, monkeypatch):
    with s3_server(tmp_path / "log") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = RunStore("s3://bucket/runs", "run")
        files: pyarrow.fs.FileSystem = store.ray_storage["storage_filesystem"]
        assert mend_snapshot(store.ray_storage) == ""
        for step, name in enumerate("ab"):
            checkpoint(folder, name, step)
            send_folder(folder / f"checkpoint-{name}", files, f"bucket/runs/run/checkpoint-{name}")
        with files.open_output_stream(f"bucket/runs/run/{SNAPSHOT}"):
            pass
        assert mend_snapshot(store.ray_storage).endswith("cannot be read; it is written anew from 2 that are whole")
        assert mend_snapshot(store.ray_storage) == ""
        with files.open_input_stream(f"bucket/runs/run/{SNAPSHOT}") as stream:
            assert json.loads(stream.read())["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint-b"
        shutil.rmtree(store.folder)
