"""When to write a checkpoint within an epoch, and when to stop: the first worker decides, all obey at one step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import torch

from cluster.worker.collective import all_reduce
from cluster.worker.host import Host
from cluster.worker.machine import Place

CHECK_SECONDS = 1.0
"""About this often the workers agree on what to do; it costs one small reduction."""

MOST_STEPS = 1000
"""Steps between two agreements at most."""

LEAVING_VARIABLE = "CRYSTALFORMER_LEAVING"
"""Environment variable with the path of a file. Whoever takes a worker's node away (a pod's preStop) makes the file:
the run then writes a checkpoint, and the worker removes the file when it is registered."""


class Order(IntEnum):
    """What all workers do after a step."""

    GO_ON = 0
    CHECKPOINT = 1
    REGISTER = 2
    """A checkpoint begun before is written: make it known."""
    STOP = 3


class Coordinator:
    """Asked after every step; answers the same on every worker."""

    def __init__(
        self,
        host: Host,
        place: Place,
        written: Callable[[], bool],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``written``: whether the first worker has a checkpoint to register. One is due every ``seconds``."""
        self._host, self._place, self._written, self._seconds, self._clock = host, place, written, seconds, clock
        self._checked_at = self._saved_at = clock()
        self._checked_step: int | None = None  # a run that goes on does not begin at step 0
        self._next_step = 0
        self._leaving = Leaving(os.environ.get(LEAVING_VARIABLE))
        self._last = Order.GO_ON

    def saved(self) -> None:
        """Tell that a checkpoint was just written."""
        self._saved_at = self._clock()

    def order(self, step: int) -> Order:
        """What to do after ``step`` steps of the run."""
        if step < self._next_step:
            return Order.GO_ON
        message = torch.zeros(3, dtype=torch.float64, device=self._place.device)
        if self._place.rank == 0:
            message[0], message[1] = float(self._decide()), float(self._next_check(step))
        message[2] = float(self._leaving.told(registered=self._last is Order.REGISTER))
        decided, following, leaving = all_reduce(message).tolist()
        self._next_step = int(following)
        self._last = self._leaving.order(Order(int(decided)), int(leaving))
        return self._last

    def _next_check(self, step: int) -> int:
        now, before = self._clock(), step - 1 if self._checked_step is None else self._checked_step
        taken, seconds = max(step - before, 1), max(now - self._checked_at, 1e-6)
        self._checked_step, self._checked_at = step, now
        return step + min(MOST_STEPS, max(1, int(taken * CHECK_SECONDS / seconds)))

    def _decide(self) -> Order:
        if self._host.stopping():
            return Order.STOP
        if self._written():
            return Order.REGISTER
        due = self._clock() - self._saved_at > self._seconds
        return Order.CHECKPOINT if self._host.saving() or due else Order.GO_ON


class Leaving:
    """A checkpoint for each node that is about to go; what it answers follows from what all workers see."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        self._covered = 0
        self._begun = False

    def told(self, *, registered: bool) -> bool:
        """Whether this worker's node goes; its file is removed once a checkpoint begun since is ``registered``."""
        there = self._path is not None and self._path.exists()
        if there and self._begun and registered and self._path is not None:
            self._path.unlink(missing_ok=True)
            there = False
        self._begun = self._begun and there
        return there

    def order(self, decided: Order, leaving: int) -> Order:
        """``decided``, or a checkpoint where more workers leave than were covered by one."""
        self._covered = min(self._covered, leaving)
        if decided is Order.GO_ON and leaving > self._covered:
            decided = Order.CHECKPOINT
        if decided in (Order.CHECKPOINT, Order.STOP) and leaving:
            self._covered, self._begun = leaving, True
        return decided
