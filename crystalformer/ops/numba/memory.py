"""Memory of the passes. Large pieces are used again: the system clears each one that it hands out.

Of a large cell's step that is a twentieth, and a fifth where the machine has little memory free.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

from crystalformer.ops.numba.pairs import Floats
from crystalformer.ops.numba.simd import either

F = np.float32
LINE = 16
"""Numbers in a line of the cache."""

LARGE = 2**22
"""Numbers from which a piece is used again; the allocator keeps smaller ones by itself."""

MOST_FREE = 2
"""Pieces kept that nobody uses: what a step's forward leaves for its backward, and what that needs beside."""


class Pieces:
    """Memory in pieces; the ``MOST_FREE`` largest that are not used any more are kept."""

    def __init__(self) -> None:
        self._free: list[Floats] = []
        self._lock = threading.RLock()  # the collector may give a piece back while this thread takes one

    def take(self, count: int) -> Floats:
        """So many float32, of any value, from the beginning of a line on.

        A large piece comes back when the array and all views of it are gone.
        """
        if count < LARGE:
            return from_a_line_on(np.empty(count + LINE, F), count)
        whole = self._kept(count + LINE)
        if whole is None:
            whole = np.empty(count + LINE, F)  # NumPy asks for large pages where an array is large
        piece = _Piece(from_a_line_on(whole, count))
        weakref.finalize(piece, self._give_back, whole).atexit = False
        return np.asarray(piece)

    def _kept(self, count: int) -> Floats | None:
        """The smallest free piece of ``count`` numbers and more. Where there is none those that there are go."""
        with self._lock:
            taken = next((whole for whole in self._free if len(whole) >= count), None)
            if taken is None:
                self._free = []  # a run's batches differ little: too small for this one, they will be for others
            # By itself, not by its place: the collector may have added another piece since.
            self._free = [whole for whole in self._free if whole is not taken]
            return taken

    def _give_back(self, whole: Floats) -> None:
        with self._lock:
            self._free = sorted([*self._free, whole], key=len)[-MOST_FREE:]


class _Piece:
    """An array's memory, as the base of the one that is handed out: what keeps that are all its views."""

    def __init__(self, array: Floats) -> None:
        self.__array_interface__ = array.__array_interface__


@either
def from_a_line_on(whole: Floats, count: int) -> Floats:
    """``count`` of the numbers, from the first beginning of a line on; there are LINE more of them."""
    begin: int = -whole.ctypes.data // 4 % LINE
    return whole[begin : begin + count]


PIECES = Pieces()
