"""Where the time of a step goes, on request: measuring it on a GPU means waiting for the GPU at every part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Breakdown:
    """Seconds by part of the work (data, forward, backward, update, validation) since they were last taken."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._enabled = enabled
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, time counts for ``name``; costs nothing where no breakdown was asked for."""
        if not self._enabled:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def take(self) -> dict[str, float]:
        """The seconds so far, which start again at nothing."""
        taken, self._seconds = self._seconds, {}
        return taken

    def _now(self) -> float:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()
