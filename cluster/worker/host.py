"""What a worker lives in: who keeps its checkpoints, hears its messages and may want it to stop.

In a run of ``crystalformer train`` that is Ray Train; a trial of a search offers the same (tune/worker.py), so that
one Worker (loop.py) does the epochs of both.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import yaml

from cluster.errors import UserError
from cluster.run.storage import remove_folder, send_folder
from cluster.settings.config import CONFIG_FILE
from cluster.worker.monitor import Message

SEE_SECONDS = 10.0
"""A network file system may show a new file as late as this."""


class Host(Protocol):
    """All that a worker asks of the world around it."""

    def checkpoints(self) -> Sequence[ray.train.Checkpoint]:
        """The checkpoints kept so far, the newest first."""

    def store(self, folder: Path, name: str) -> ray.train.Checkpoint:
        """Copy the files of ``folder`` to where checkpoints last, in the order they were written.

        The first worker calls it, from any thread. OSError where that fails; nothing of them is left then.
        """

    def keep(self, metrics: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Register a stored checkpoint as the newest. Every worker calls it, the first one with the checkpoint."""

    def send(self, message: Message) -> None:
        """Pass a message on without waiting."""

    def flush(self) -> None:
        """Wait until the messages sent so far have arrived."""

    def stopping(self) -> bool:
        """Whether the worker should write a checkpoint and end; asked about once a second."""

    def saving(self) -> bool:
        """Whether a checkpoint was wished for since this was asked last."""


class RayTrainHost:
    """A worker of Ray Train; messages go through the run's Monitor."""

    def __init__(self, monitor: Any) -> None:  # noqa: ANN401 - a Ray actor handle
        self._monitor = monitor
        self._asked: Any = None
        self._stopping = False
        self._saves: int | None = None
        self._saved: int | None = None
        self._sent: Any = None
        self._storage = ray.train.get_context().get_storage()

    def checkpoints(self) -> Sequence[ray.train.Checkpoint]:
        """Those reported to Ray Train."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return []
        reported = [item.checkpoint for item in ray.train.get_all_reported_checkpoints()]
        return [latest, *(c for c in reversed(reported) if c.path != latest.path)]

    def store(self, folder: Path, name: str) -> ray.train.Checkpoint:
        """Copy into the run's folder, wherever that is."""
        files, target = self._storage.storage_filesystem, f"{self._storage.experiment_fs_path}/{name}"
        try:
            send_folder(folder, files, target)
        except Exception:
            remove_folder(files, target)
            raise
        return ray.train.Checkpoint(target, filesystem=files)

    def keep(self, metrics: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Report to Ray Train; the checkpoint is where it belongs already."""
        ray.train.report(
            dict(metrics), checkpoint=checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD
        )

    def send(self, message: Message) -> None:
        """Leave the message with the Monitor."""
        self._sent = self._monitor.send.remote(message)

    def see_run_folder(self, config: Mapping[str, Any]) -> None:
        """Make sure that this node sees the run's folder, with the settings that the driver wrote there a moment ago.

        UserError where it does not: checkpoints would lie on a disk that nobody else reads.
        """
        files, path = self._storage.storage_filesystem, f"{self._storage.experiment_fs_path}/{CONFIG_FILE}"
        deadline = time.monotonic() + SEE_SECONDS
        while not _holds(files, path, config):
            if time.monotonic() > deadline:
                folder = self._storage.experiment_fs_path
                raise UserError(
                    f"node {socket.gethostname()} does not see the run's files in {folder}; "
                    "give a --storage_path that all nodes share, or an object store (s3://...)"
                )
            time.sleep(0.5)

    def failed(self) -> bool:
        """Whether the run had a failure before that a restart cannot mend."""
        return bool(ray.get(self._monitor.failed.remote()))

    def flush(self) -> None:
        """A caller's messages arrive in order, so the last one is waited for."""
        if self._sent is not None:
            ray.get(self._sent)

    def stopping(self) -> bool:
        """The driver's wish as of a moment ago."""
        self._hear()
        return self._stopping

    def saving(self) -> bool:
        """The same; what was wished for before this worker began is done with."""
        self._hear()
        before, self._saved = self._saved, self._saves
        return before is not None and before != self._saves

    def _hear(self) -> None:
        """The answer to the last question, without waiting for a new one."""
        if self._asked is None:
            self._asked = self._monitor.wishes.remote()
        if ray.wait([self._asked], timeout=0)[0]:
            self._stopping, self._saves = ray.get(self._asked)
            self._asked = None


def _holds(files: Any, path: str, config: Mapping[str, Any]) -> bool:  # noqa: ANN401 - pyarrow's file system
    """Whether the file at ``path`` is of these settings; a run that goes on may say so in one place alone."""
    try:
        with files.open_input_stream(path) as stream:
            found = yaml.safe_load(stream.read())
    except (FileNotFoundError, yaml.YAMLError):  # not there, or not all of it yet
        return False
    return isinstance(found, dict) and all(found.get(name) == config.get(name) for name in ("run_name", "seed"))
