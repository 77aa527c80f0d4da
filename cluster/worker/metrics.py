"""What a live run tells Prometheus, through the metrics endpoint of each Ray node."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from ray.util.metrics import Counter, Gauge

from cluster.worker.machine import Place

_GAUGES = {
    "epoch": ("crystalformer_epoch", "Epochs that have ended"),
    "step": ("crystalformer_step", "Optimizer steps taken"),
    "train_loss": ("crystalformer_train_loss", "Mean loss of the last epoch, on normalized targets"),
    "lr": ("crystalformer_learning_rate", "Learning rate of the last step"),
    "grad_norm": ("crystalformer_gradient_norm", "Global norm of the last gradient before clipping"),
    "structures_per_s": ("crystalformer_structures_per_second", "Training throughput over all workers"),
    "data_wait_s": ("crystalformer_data_wait_seconds", "Time the last epoch's steps waited for data"),
}
"""Row key -> name and meaning; Ray puts ``ray_`` before the name."""

VALIDATION = ("crystalformer_validation_mae", "Validation MAE of the last epoch, in the target's unit")
STEP_SECONDS = ("crystalformer_step_seconds", "Duration of the last step")
GPU_MEMORY = ("crystalformer_gpu_memory_bytes", "Memory allocated on the worker's GPU")
DIVERGENCES = ("crystalformer_divergences", "Times the run ended because its loss was no finite number")
STARTS = ("crystalformer_worker_starts", "Times the workers were started; more than once means a failure")

REPEAT_SECONDS = 5.0
"""Ray's agent drops a gauge that was not set again within 20 s: an epoch, and a step that hangs, may take longer."""


class RunMetrics:
    """Gauges of one worker, labelled by run, targets and rank."""

    def __init__(self, run: str, targets: tuple[str, ...], place: Place) -> None:
        """``run`` and ``targets`` name what is trained."""
        labels = {"run": run, "targets": _ascii("+".join(targets)), "rank": str(place.rank)}
        self._device = place.device
        self._gauges = {key: _gauge(name, text, labels) for key, (name, text) in _GAUGES.items()}
        self._validation = {t: _gauge(*VALIDATION, {**labels, "target": _ascii(t)}) for t in targets}
        self._step_seconds = _gauge(*STEP_SECONDS, labels)
        self._memory = _gauge(*GPU_MEMORY, labels)
        Counter(*STARTS, tag_keys=tuple(labels)).inc(1, tags=labels)
        self._divergences = Counter(*DIVERGENCES, tag_keys=tuple(labels))
        self._labels = labels
        self._last: dict[Gauge, float] = {}
        self._closed = threading.Event()
        self._repeating: threading.Thread | None = None

    def step(self, step: int, seconds: float) -> None:
        """``step`` steps are taken, the last one in ``seconds``."""
        self._set(self._gauges["step"], step)
        self._set(self._step_seconds, seconds)
        if self._device.type == "cuda":
            self._set(self._memory, torch.cuda.memory_allocated(self._device))

    def diverged(self) -> None:
        """The loss is no finite number; the run ends."""
        self._divergences.inc(1, tags=self._labels)

    def row(self, row: Mapping[str, Any]) -> None:
        """An epoch has ended; ``row`` as in metrics.jsonl. Of all workers the first alone is asked."""
        for key, gauge in self._gauges.items():
            if row.get(key) is not None:
                self._set(gauge, float(row[key]))
        for target, value in row["val_mae"].items():
            self._set(self._validation[target], value)

    def close(self) -> None:
        """The worker has ended: its gauges are no longer told."""
        self._closed.set()

    def _set(self, gauge: Gauge, value: float) -> None:
        self._last[gauge] = value
        gauge.set(value)
        if self._repeating is None:
            self._repeating = threading.Thread(target=self._repeat, name="metrics", daemon=True)
            self._repeating.start()

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_SECONDS):
            for gauge, value in list(self._last.items()):
                gauge.set(value)


def _ascii(name: str) -> str:
    """Ray takes no other letters in a label."""
    return name.encode("ascii", "backslashreplace").decode()


def _gauge(name: str, text: str, labels: Mapping[str, str]) -> Gauge:
    gauge = Gauge(name, text, tag_keys=tuple(labels))
    gauge.set_default_tags(dict(labels))
    return gauge
