"""The threads that share the atoms of a batch: PyTorch's own, where they are of GNU's OpenMP; elsewhere there is one.

Idle threads of OpenMP wait for their next work by spinning, and threads of ours would have to share the cores with
them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from itertools import chain
from pathlib import Path

import torch

from crystalformer.ops.numba.operands import Team

SHELLS_A_THREAD = 2_048
"""Fewer are not worth waking a thread for."""

_forked = False


def team() -> Team:
    """As many threads as PyTorch has been told to use; one in a forked process and where ``parallel`` is 0."""
    threads = 1 if _forked else torch.get_num_threads()
    address = parallel() if threads > 1 else 0
    return Team(address, threads if address else 1, SHELLS_A_THREAD)


@functools.cache
def parallel() -> int:
    """Address of GOMP_parallel in the OpenMP that PyTorch has loaded, or 0 where that is not GNU's (macOS)."""
    package = Path(torch.__file__).parent
    for path in chain(package.glob("lib/libgomp*.so*"), package.parent.glob("torch.libs/libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):  # there, but not what this process runs
            continue
    return 0


def _forget() -> None:
    """A forked process has none of its parent's threads, and OpenMP would wait for them."""
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_forget)
