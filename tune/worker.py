"""A trial where it runs: the Worker of ``crystalformer train`` in a process that outlives the trial.

Starting a process that has torch and DeepSpeed loaded takes many times longer than starting a trial in one, so one
actor works off trial after trial. A trial of several workers is a Ray Train run of its own instead.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray import tune as ray_tune
from ray.exceptions import RayError

from cluster.data.feed import TargetScaling
from cluster.files import settle
from cluster.run.report import METRICS_FILE, json_ready, read_metrics
from cluster.run.storage import RunStore
from cluster.settings.config import CONFIG_FILE, TrainConfig, save_yaml
from cluster.worker.checkpoint import CheckpointError, read_checkpoint
from cluster.worker.loop import Job, Worker
from cluster.worker.machine import Place
from cluster.worker.monitor import Message
from cluster.worker.process import prepare_process
from cluster.worker.saving import PREFIX
from tune.failures import of_every_trial, told, without_data
from tune.folder import TRIALS_FOLDER
from tune.library import TrialData

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 20.0
"""Workers of a trial that is stopped get this long to end by themselves."""

PARTIAL = ".partial-"
"""How the name of a checkpoint begins that is being written; what a killed process leaves of one is of no use."""

WISH_SECONDS = 2.0
"""For the library's answer, which takes a millisecond or two."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSetup:
    """What all trials of a search share."""

    base: Mapping[str, Any]
    """Settings that are not searched, flat."""
    objective: str
    """Target whose validation MAE is reported."""
    library: Any
    """The Library actor."""
    threads: int
    """torch threads of a worker."""
    seconds: float
    """Time for a trial."""
    units: Mapping[str, str]
    overlay: Mapping[str, Any] | None
    """DeepSpeed's settings of the user's file, which only the driver's machine may have."""


class TrialHost:
    """What the worker of a one-worker trial lives in (cluster/worker/host.py): a folder, and an end to come."""

    def __init__(self, folder: Path, stopping: Callable[[], bool]) -> None:
        self._folder, self._stopping = folder, stopping

    def checkpoints(self) -> Sequence[ray.train.Checkpoint]:
        """The one that is kept, if any."""
        return [ray.train.Checkpoint.from_directory(str(path)) for path in self._stored()]

    def drop_damaged(self) -> None:
        """Drop what cannot be read: the trial is begun anew, where a run of ``train`` leaves that to its user."""
        for path in self._stored():
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                _log.warning("a trial's checkpoint is passed over: %s", error)
                shutil.rmtree(path)

    def _stored(self) -> list[Path]:
        return sorted(self._folder.glob(f"{PREFIX}*"), reverse=True)

    def store(self, folder: Path, name: str) -> ray.train.Checkpoint:
        """Copy into the trial's folder; it appears there when it is whole."""
        partial = Path(tempfile.mkdtemp(dir=self._folder, prefix=PARTIAL))
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        settle(partial)  # the one before it is dropped next
        partial.rename(self._folder / name)
        return ray.train.Checkpoint.from_directory(str(self._folder / name))

    def keep(self, metrics: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Drop the checkpoints before this one."""
        if checkpoint is not None:
            for path in self._stored():
                if str(path) != checkpoint.path:
                    shutil.rmtree(path)

    def send(self, message: Message) -> None:
        """Nobody listens: rows are taken from the worker itself."""

    def flush(self) -> None:
        """Nothing was sent."""

    def stopping(self) -> bool:
        """Whether the trial's time is up, or the search ends."""
        return self._stopping()

    def saving(self) -> bool:
        """Nobody wishes for a checkpoint of a trial that goes on."""
        return False


class OneWorker:
    """A run in this process."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrialData,
        folder: Path,
        threads: int,
        stopping: Callable[[], bool],
        overlay: Mapping[str, Any] | None = None,
    ) -> None:
        """``stopping``: whether to write a checkpoint and end; asked about once a second."""
        device = torch.device("cuda" if config.scale.device != "cpu" and torch.cuda.is_available() else "cpu")
        _join_alone(device)
        prepare_process(config, threads, device)
        job = Job(
            config=config.to_flat(),
            tables=data.tables,
            radius=data.radius,
            scaling=data.scaling,
            threads=threads,
            monitor=None,
            overlay=overlay,
        )
        self._leaving = False
        host = TrialHost(folder, lambda: self._leaving or stopping())
        host.drop_damaged()
        worker = Worker(config, job, Place(rank=0, world_size=1, device=device), host)
        self.history: list[Row] = list(worker.rows)
        """Rows of the epochs before the checkpoint it was resumed from."""
        self._worker, self._epochs = worker, worker.epochs()

    def __next__(self) -> Row:
        return next(self._epochs)

    def leave(self) -> None:
        """Write a checkpoint, at the next step at which a worker looks whether to stop: within about a second."""
        self._leaving = True
        for _ in self._epochs:
            pass

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._worker.close()
        del self._worker, self._epochs
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _join_alone(device: torch.device) -> None:
    """The process group of one that DeepSpeed wants, once a process."""
    if dist.is_initialized():
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    meeting = Path(tempfile.mkdtemp(prefix="crystalformer-trial-")) / "meet"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{meeting}", rank=0, world_size=1
    )


class TimeLimit:
    """Whether a time is up that is counted from when it is first asked for."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._end: float | None = None

    def up(self) -> bool:
        """Whether it is."""
        now = self._clock()
        if self._end is None:
            self._end = now + self._seconds
        return now >= self._end


class Wish:
    """Whether the search ends: the library knows."""

    def __init__(self, library: Any) -> None:  # noqa: ANN401 - a Ray actor handle
        self._library = library
        self._asked: Any = None

    def heard(self) -> bool:
        """Whether it does, by the answer to the last question: no step waits for a new one."""
        if self._asked is None:
            self._asked = self._library.ending.remote()
        if not ray.wait([self._asked], timeout=0)[0]:
            return False
        answer, self._asked = self._asked, None
        return self._answered(answer)

    def now(self) -> bool:
        """Whether it does, as of now."""
        return self._answered(self._library.ending.remote())

    def _answered(self, answer: Any) -> bool:  # noqa: ANN401 - Ray's reference
        try:
            return bool(ray.get(answer, timeout=WISH_SECONDS))
        except RayError:  # the library is gone; the next trial, which needs it, will say so
            return False


class ManyWorkers:
    """A Ray Train run of several workers, followed from this process."""

    def __init__(self, config: TrainConfig, data: TrialData, folder: Path, shared: TrialSetup) -> None:
        """The trial's seconds are counted from when its workers begin."""
        from cluster.driver.launch import launch

        self._rows: queue.Queue[Row | Exception | None] = queue.Queue()
        self._closing = threading.Event()
        self._limit, self._wish = TimeLimit(shared.seconds), Wish(shared.library)
        config = replace(config, run=replace(config.run, resume=(folder / METRICS_FILE).is_file()))
        self.history: list[Row] = list(read_metrics(folder))

        def fit() -> None:
            units, overlay = dict(shared.units), shared.overlay
            try:
                with RunStore(str(folder.parent), folder.name) as store:
                    launch(config, store, data.tables, data.scaling, units, self._follow, overlay=overlay)
                self._rows.put(None)
            except Exception as error:  # noqa: BLE001 - raised again where the next row is asked for
                self._rows.put(error)

        self._thread = threading.Thread(target=fit, daemon=True, name="trial")
        self._thread.start()

    def _follow(self, rows: Sequence[Row]) -> bool:
        for row in rows:
            self._rows.put(row)
        # Asked for the first time when workers begin: until then they waited for their place, and started.
        up = self._limit.up()
        return not (up or self._closing.is_set() or self._wish.heard())

    def __next__(self) -> Row:
        row = self._rows.get()
        if row is None:
            raise StopIteration
        if isinstance(row, Exception):
            raise row
        return row

    def leave(self) -> None:
        """Nothing: workers that are stopped write a checkpoint."""

    def close(self) -> None:
        """Have the workers stop, and wait for them a little."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)


def score_of(row: Row, targets: Sequence[str], scaling: TargetScaling) -> float:
    """What a run chooses its best epoch by (cluster/worker/evaluation.py): the mean normalized error of all targets.

    For one target it is the error as it is, in the same order.
    """
    if len(targets) == 1:
        return float(row["val_mae"][targets[0]])
    errors = [row["val_mae"][target] / scale for target, scale in zip(targets, scaling.scale, strict=True)]
    return float(sum(errors) / len(errors))


class Trial(ray_tune.Trainable):
    """Ray Tune's side of a trial: a step is an epoch."""

    def setup(self, config: dict[str, Any], shared: TrialSetup) -> None:
        """Remember what is to be run; the run begins with the first step, so that its errors are the trial's."""
        self._shared = shared
        self._rows: OneWorker | ManyWorkers | None = None
        self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._number, self._settings = int(config["number"]), dict(config["settings"])
        base = self._shared.base
        self._settings["run_name"] = f"{base['run_name']}/{TRIALS_FOLDER}/{self._number:04d}"
        self._folder = Path(base["storage_path"]) / self._settings["run_name"]
        self._errors: list[float] = []
        self._scores: list[float] = []
        self._over = False

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on with another trial in this process."""
        self._close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One epoch. Whatever goes wrong with this trial is its result, and the process goes on to the next.

        What would go wrong with any other is no result: the search is told to end.
        """
        try:
            return self._epoch()
        except Exception as error:  # noqa: BLE001 - a trial that fails is recorded, the search goes on
            self._close()
            return self._result(ended="stuck" if of_every_trial(error) else "failed", reason=told(error))

    def _epoch(self) -> dict[str, Any]:
        if self._rows is None:
            self._rows = self._run()
            for row in self._rows.history:
                self._take(row)
        try:
            row = next(self._rows)
        except StopIteration:
            minutes, done = self._shared.seconds / 60, len(self._errors)
            if done >= self._config.optim.epochs:  # cut off after its last checkpoint, before it was recorded
                return self._result(ended="complete")
            return self._result(ended="stopped", reason=f"its {minutes:g} minutes were up after {done} epochs")
        self._take(row)
        for target, error in row["val_mae"].items():
            if not math.isfinite(error):
                of = f" of {target}" if len(row["val_mae"]) > 1 else ""
                reason = f"diverged: validation MAE{of} is {error} in epoch {row['epoch']}"
                return self._result(ended="failed", reason=reason)
        return self._result(ended="complete" if row["epoch"] >= self._config.optim.epochs else "")

    def _run(self) -> OneWorker | ManyWorkers:
        self._config = config = TrainConfig.from_flat(dict(self._shared.base) | self._settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        save_yaml(self._folder / CONFIG_FILE, config)
        try:
            return self._begun(config)
        except RayError as error:  # of the library or of what it has shared
            raise without_data(error) from error

    def _begun(self, config: TrainConfig) -> OneWorker | ManyWorkers:
        shared = self._shared
        data: TrialData = ray.get(
            shared.library.data.remote(config.model.neighborhood, config.optim.normalize_targets)
        )
        self._scaling = data.scaling
        if config.scale.num_workers.most > 1:
            return ManyWorkers(config, data, self._folder, shared)
        (self._folder / METRICS_FILE).unlink(missing_ok=True)
        deadline, wish = time.monotonic() + shared.seconds, Wish(shared.library)

        def stopping() -> bool:
            return time.monotonic() > deadline or wish.heard()

        return OneWorker(config, data, self._folder, shared.threads, stopping, shared.overlay)

    def _take(self, row: Row) -> None:
        # Workers that were started again repeat the epochs since their last checkpoint.
        self._errors[row["epoch"] - 1 :] = [float(row["val_mae"][self._shared.objective])]
        self._scores[row["epoch"] - 1 :] = [score_of(row, self._config.data.target, self._scaling)]
        if self._config.scale.num_workers.most == 1:  # launch writes it elsewhere
            with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(json_ready(row)) + "\n")

    def _result(self, *, ended: str, reason: str = "") -> dict[str, Any]:
        self._over = bool(ended)
        return {
            "number": self._number,
            "errors": list(self._errors),
            "scores": list(self._scores),
            "ended": ended,
            "reason": reason,
            "process": f"{socket.gethostname()} {os.getpid()}",
            "done": self._over,
        }

    def _close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def cleanup(self) -> None:
        """The process ends. Where the search does, a trial that is to be gone on with writes a checkpoint before."""
        if self._rows is not None and not self._over and Wish(self._shared.library).now():
            with suppress(Exception):  # what is not written is done again
                self._rows.leave()
        self._close()
