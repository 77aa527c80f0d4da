"""Threads that share the atoms of a batch; the kernels run without Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np
import torch

from crystalformer.ops.numba.pairs import IntArray

SHELLS_A_THREAD = 16_384
"""Fewer are not worth waking a thread for: it takes a tenth of a millisecond, in which they are done."""

Work = Callable[[int, int], None]


class _Helper:
    """A thread that does one piece of work after another."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        threading.Thread(target=self._serve, name="crystalformer-attention", daemon=True).start()

    def give(self, work: Callable[[], None]) -> None:
        """Begin with the work."""
        self._given.put(work)

    def wait(self) -> None:
        """Wait for it; raises what it raised."""
        error = self._ended.get()
        if error is not None:
            raise error

    def _serve(self) -> None:
        while True:
            work = self._given.get()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                self._ended.put(error)
            else:
                self._ended.put(None)


_helpers: list[_Helper] = []
_busy = threading.Lock()


def bounds(used: IntArray, step: int = 1) -> list[int]:
    """Where to cut atoms that use so many shells (N,) for torch's threads: 0, …, N, at multiples of step."""
    n, before = len(used), np.cumsum(used)
    threads = min(torch.get_num_threads(), max(1, int(before[-1]) // SHELLS_A_THREAD))
    if threads == 1:
        return [0, n]
    cuts = np.searchsorted(before, before[-1] * np.arange(1, threads) / threads)
    return [0, *sorted({int(cut) // step * step for cut in cuts} - {0}), n]


def share(work: Work, cuts: Sequence[int]) -> None:
    """Call ``work(first, last)`` for all neighbouring cuts, the first here and the others in threads.

    One caller at a time has the threads; another does all of its work itself.
    """
    if len(cuts) == 2 or not _busy.acquire(blocking=False):  # noqa: PLR2004 - the ends alone
        work(cuts[0], cuts[-1])
        return
    try:
        while len(_helpers) < len(cuts) - 2:
            _helpers.append(_Helper())
        helpers = _helpers[: len(cuts) - 2]
        for helper, first, last in zip(helpers, cuts[1:-1], cuts[2:], strict=True):
            helper.give(lambda first=first, last=last: work(first, last))  # type: ignore[misc]
        try:
            work(cuts[0], cuts[1])
        finally:
            for helper in helpers:
                helper.wait()
    finally:
        _busy.release()


def _forget() -> None:
    """A forked process has none of its parent's threads, and its lock may be held by one of them."""
    global _busy  # noqa: PLW0603
    _helpers.clear()
    _busy = threading.Lock()


os.register_at_fork(after_in_child=_forget)
