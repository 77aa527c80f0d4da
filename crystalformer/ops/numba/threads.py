"""The threads that share the atoms of a batch: PyTorch's own where they are of GNU's OpenMP, else ours.

Idle threads of OpenMP wait for their next work by spinning, and others would have to share the cores with them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import torch

from crystalformer.ops.numba.operands import Team

SHELLS_A_THREAD = 2_048
"""Fewer are not worth waking a thread for."""

_THREAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

_forked = False


def team() -> Team:
    """As many threads as PyTorch has been told to use; one in a forked process."""
    threads = 1 if _forked else torch.get_num_threads()
    return Team(parallel() if threads > 1 else 0, threads, SHELLS_A_THREAD)


@functools.cache
def parallel() -> int:
    """Address of what runs code in several threads: GOMP_parallel, or what does the same with threads of ours."""
    return open_mp() or helpers()


def open_mp() -> int:
    """Of the OpenMP that PyTorch has loaded, or 0 where it is not GNU's."""
    package = Path(torch.__file__).parent
    for path in chain(package.glob("lib/libgomp*.so*"), package.parent.glob("torch.libs/libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):  # there, but not what this process runs
            continue
    return 0


@functools.cache
def helpers() -> int:
    """Of threads of ours, started when they are wanted."""
    made = ctypes.cast(_CALL, ctypes.c_void_p).value
    if made is None:
        raise RuntimeError("ctypes gave a function without an address")
    return made


class _Helper:
    """A thread that does one piece of work after another."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._serve, name="crystalformer-attention", daemon=True).start()

    def give(self, work: Callable[[], None]) -> None:
        """Begin with the work."""
        self._given.put(work)

    def wait(self) -> None:
        """Wait for its end."""
        self._ended.get()

    def _serve(self) -> None:
        while True:
            self._given.get()()
            self._ended.put(None)


_all: list[_Helper] = []
_busy = threading.Lock()


def _run(entry: int, data: int, threads: int, _: int) -> None:
    """GOMP_parallel with our threads. One caller at a time has them; another's own thread does all of its work."""
    work = _THREAD(entry)
    if not _busy.acquire(blocking=False):
        work(data)
        return
    try:
        while len(_all) < threads - 1:
            _all.append(_Helper())
        for helper in _all[: threads - 1]:
            helper.give(lambda: work(data))
        work(data)
        for helper in _all[: threads - 1]:
            helper.wait()
    finally:
        _busy.release()


_CALL = _PARALLEL(_run)


def _forget() -> None:
    """A forked process has none of its parent's threads, and OpenMP would wait for them."""
    global _forked  # noqa: PLW0603
    _forked = True


os.register_at_fork(after_in_child=_forget)
