"""Checkpoints that do not hold up the steps: taken at once, written by a thread, registered when that has ended."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow import ArrowException

from cluster.errors import RunFailed
from cluster.worker.checkpoint import Outcome, TrainState, write_checkpoint, write_outcome
from cluster.worker.collective import all_reduce
from cluster.worker.host import Host
from cluster.worker.machine import Place

PREFIX = "checkpoint-"

NOT_WRITTEN = "a checkpoint could not be written"
"""How RunFailed begins where it could not be: through Ray Train its text alone reaches who follows the run."""


class Saver:
    """One checkpoint at a time. Every worker makes every call, and at the same step; the first one writes."""

    def __init__(self, host: Host, place: Place, settings: Mapping[str, Any]) -> None:
        """``settings`` of the run are kept in each checkpoint for whoever reads it."""
        self._host, self._place, self._settings = host, place, settings
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[ray.train.Checkpoint] | None = None
        self._metrics: dict[str, Any] | None = None

    @property
    def written(self) -> bool:
        """Whether the first worker, which alone is asked, has a checkpoint ready to be registered."""
        return self._writing is not None and self._writing.done()

    def begin(self, state: TrainState, outcome: Outcome | None = None) -> None:
        """Begin to write ``state``, which nobody may change any more; one begun before is registered first.

        RunFailed as of ``register``.
        """
        self.register()
        self._metrics = {"epoch": state.position.epoch - 1, "finished": outcome is not None}
        if self._place.rank == 0:
            self._writing = self._threads.submit(self._write, state, outcome)

    def register(self) -> None:
        """Wait until the checkpoint is written and tell the host; nothing where none was begun.

        RunFailed, on every worker, where it could not be written: the ones before it stay.
        """
        if self._metrics is None:
            return
        metrics, self._metrics = self._metrics, None
        writing, self._writing = self._writing, None
        checkpoint, problem = None, ""
        try:
            checkpoint = None if writing is None else writing.result()
        except (OSError, ArrowException) as error:
            problem = _one_line(error)
        failed = torch.tensor(float(bool(problem)), device=self._place.device)
        if float(all_reduce(failed)) > 0:
            raise RunFailed(f"{NOT_WRITTEN}: {problem}; those before it stay, see --resume")
        self._host.keep(metrics, checkpoint)

    def close(self) -> None:
        """Wait until what was begun is written: who takes the run up finds it, and nothing appears after this."""
        self._threads.shutdown()

    def _write(self, state: TrainState, outcome: Outcome | None) -> ray.train.Checkpoint:
        folder = Path(tempfile.mkdtemp(prefix="crystalformer-checkpoint-"))
        try:
            if outcome is not None:
                write_outcome(folder, outcome)
            write_checkpoint(folder, state, self._settings)
            return self._host.store(folder, f"{PREFIX}{state.position.step:08d}-{secrets.token_hex(3)}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    place = getattr(error, "filename", None)
    return f"{place}: {text}" if place else text
