"""Ray Train's list of a run's checkpoints, mended before a run is resumed.

Ray Train writes it anew in its place at every checkpoint: a power loss, a kill or a full disk in that moment leaves
half of it or nothing, and then Ray Train refuses the run, as it does where a folder of the list is gone. The folders
say all that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
from pyarrow.fs import FileSelector, FileType, LocalFileSystem
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as SNAPSHOT

# Ray's own description of the file, of this very version: nothing else says what it can read back.
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState as State
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _TrainingResultState as Entry

from cluster.files import write_text
from cluster.worker.checkpoint import CheckpointError, read_checkpoint, read_outcome
from cluster.worker.saving import PREFIX


def mend_snapshot(storage: Mapping[str, Any]) -> str:
    """Write the list anew from the checkpoints that are whole, where Ray Train would refuse it or has none.

    ``storage`` is a RunStore's ``ray_storage``. Gives a line on what was wrong and what was done, nothing where all
    is well. OSError where the place cannot be read or written.
    """
    files = storage.get("storage_filesystem") or LocalFileSystem()
    run = f"{storage['storage_path']}/{storage['name']}"
    folders = _folders(files, run)
    problem = _problem(files, run, folders)
    if problem is None:
        return ""
    whole = list(_whole(files, run, folders))
    if not problem and not whole:
        return ""  # stopped before its first checkpoint
    text: str = _snapshot_of(whole).model_dump_json()
    if isinstance(files, LocalFileSystem):
        write_text(Path(run) / SNAPSHOT, text)
    else:
        with files.open_output_stream(f"{run}/{SNAPSHOT}") as stream:  # an object appears when it is closed
            stream.write(text.encode())
    done = f"it is written anew from {len(whole)} that {'is' if len(whole) == 1 else 'are'} whole"
    if not whole:
        done = "none is whole, so the run starts from its beginning"
    return f"warning: Ray Train's list of checkpoints {problem or 'is missing'}; {done}"


def _folders(files: Any, run: str) -> list[str]:  # noqa: ANN401 - pyarrow's file system
    """Names of the checkpoints' folders, whole or not."""
    found = files.get_file_info(FileSelector(run, allow_not_found=True))
    folders = [info.base_name for info in found if info.type == FileType.Directory]
    return sorted(name for name in folders if name.startswith(PREFIX))


def _problem(files: Any, run: str, folders: list[str]) -> str | None:  # noqa: ANN401 - pyarrow's file system
    """What Ray Train would refuse the list for; None for nothing, and an empty text where there is no list."""
    try:
        with files.open_input_stream(f"{run}/{SNAPSHOT}") as stream:
            state = State.model_validate(json.loads(stream.read().decode()))
    except FileNotFoundError:
        return ""
    except ValueError:  # no UTF-8, no JSON, or not what Ray writes
        return "cannot be read"
    listed = [entry.checkpoint_dir_name for entry in state.checkpoint_results]
    gone = [name for name in listed if name not in folders]
    if gone:
        return f"has {', '.join(gone)}, which {'is' if len(gone) == 1 else 'are'} gone"
    pointed = [*state.pending_training_results, *filter(None, [state.latest_checkpoint_result])]
    agrees = len(listed) == len(state.checkpoint_report_indices) and all(
        entry.checkpoint_dir_name in listed for entry in pointed
    )
    return None if agrees else "contradicts itself"


def _whole(files: Any, run: str, folders: list[str]) -> Iterator[Entry]:  # noqa: ANN401 - pyarrow's file system
    """Ray's entries of the folders that hold a whole checkpoint, the newest last."""
    found = []
    for name in folders:
        try:
            with ray.train.Checkpoint(f"{run}/{name}", filesystem=files).as_directory() as folder:
                position, outcome = read_checkpoint(Path(folder)).position, read_outcome(Path(folder))
        except CheckpointError:
            continue
        order = (position.step, position.epoch, outcome is not None, name)
        metrics = {"epoch": position.epoch - 1, "finished": outcome is not None}  # as Saver reports them
        found.append((order, Entry(checkpoint_dir_name=name, metrics=metrics)))
    for _, entry in sorted(found, key=lambda pair: pair[0]):
        yield entry


def _snapshot_of(entries: list[Entry]) -> State:
    return State(
        checkpoint_results=entries,
        checkpoint_report_indices=list(range(len(entries))),
        latest_checkpoint_result=entries[-1] if entries else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(entries),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
