"""When to write a checkpoint within an epoch, and when to stop: the first worker decides, all obey at one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

import torch

from cluster.collective import all_reduce
from cluster.host import Host
from cluster.machine import Place

CHECK_SECONDS = 1.0
"""About this often the workers agree on what to do; it costs one small reduction."""

MOST_STEPS = 1000
"""Steps between two agreements at most."""


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
        self._checked_step = self._next_step = 0

    def saved(self) -> None:
        """Tell that a checkpoint was just written."""
        self._saved_at = self._clock()

    def order(self, step: int) -> Order:
        """What to do after ``step`` steps of the run."""
        if step < self._next_step:
            return Order.GO_ON
        message = torch.zeros(2, dtype=torch.float64, device=self._place.device)
        if self._place.rank == 0:
            message[0], message[1] = float(self._decide()), float(self._next_check(step))
        decided, following = all_reduce(message).tolist()
        self._next_step = int(following)
        return Order(int(decided))

    def _next_check(self, step: int) -> int:
        now = self._clock()
        taken, seconds = max(step - self._checked_step, 1), max(now - self._checked_at, 1e-6)
        self._checked_step, self._checked_at = step, now
        return step + min(MOST_STEPS, max(1, int(taken * CHECK_SECONDS / seconds)))

    def _decide(self) -> Order:
        if self._host.stopping():
            return Order.STOP
        if self._written():
            return Order.REGISTER
        return Order.CHECKPOINT if self._clock() - self._saved_at > self._seconds else Order.GO_ON
