"""What a pickle may call to make numpy's arrays: stand-ins for numpy's functions, which trust what they are given.

With those, a few bytes of a pickle become an array of Python objects at addresses of the writer's choice. Here an
array is of plain numbers or text made of its bytes, or of objects that the pickle holds one by one.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CODE = re.compile(r"[<>|=]?([biuf][1248]|f16|c8|c16|c32|[SU][0-9]{1,6}|O8?)")
_MOST = 1 << 31
"""Elements of an array at most."""


class Ndarray:
    """In place of ``numpy.ndarray``, which pickles name as the kind of array to make: not to be called."""

    def __init__(self, *_: object) -> None:
        raise pickle.UnpicklingError("it makes an array in a way that numpy's pickles do not")


def make_dtype(code: str, *_: object) -> np.dtype[Any]:
    """``numpy.dtype`` of plain numbers, text or objects; a new one, as numpy's own are one for all."""
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise pickle.UnpicklingError(f"its array is of the kind {code!r:.40}, not of numbers, text or objects")
    return np.dtype(code, False, True)  # noqa: FBT003 - align, copy: numpy's names them only in some versions


def make_empty(kind: object, *_: object) -> NDArray[Any]:
    """``numpy.core.multiarray._reconstruct``: the array that ``check_array`` finds filled next."""
    if kind is not Ndarray:
        raise pickle.UnpicklingError("it asks for a kind of array other than numpy.ndarray")
    return np.ndarray.__new__(np.ndarray, (0,), np.int8)


def make_scalar(dtype: np.dtype[Any], raw: bytes | str) -> Any:  # noqa: ANN401 - one of numpy's numbers
    """``numpy.core.multiarray.scalar``: a number from its bytes."""
    return make_array(raw, dtype, (1,), "C")[0]


def make_array(
    raw: bytes | bytearray | str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: str,
    axes: tuple[int, ...] | None = None,
) -> NDArray[Any]:
    """``numpy.core.numeric._frombuffer``: an array of numbers or text from its bytes; axes: those of order "K"."""
    content = raw.encode("latin1") if isinstance(raw, str) else raw
    _check(shape, dtype, content)
    if dtype.hasobject:
        raise pickle.UnpicklingError("its array of objects is made of bytes")
    array = np.frombuffer(content, dtype)
    return array.reshape(shape, order="F" if order == "F" else "C").transpose(axes or range(len(shape)))


def check_array(state: object) -> None:
    """Raises UnpicklingError unless an array is filled as numpy fills it: (1, shape, dtype, order, content)."""
    if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
        raise pickle.UnpicklingError("its array is in a form that numpy does not write")
    _, shape, dtype, _, raw = state
    _check(shape, dtype, raw.encode("latin1") if isinstance(raw, str) else raw)


def check_dtype(dtype: np.dtype[Any], state: object) -> None:
    """Raises UnpicklingError unless the state says what the dtype is already, but for the order of bytes."""
    own: Any = dtype.__reduce__()[2]
    plain = isinstance(state, tuple) and all(type(part) in (int, str, type(None)) for part in state)
    if not plain or state[1:2] not in (("<",), (">",), ("|",), ("=",)) or state[2:] != own[2:]:  # type: ignore[index]
        raise pickle.UnpicklingError("its array is of a kind put together by hand")


def _check(shape: object, dtype: object, content: object) -> None:
    """Raises UnpicklingError unless the content fills the shape, and is listed where it is of objects."""
    if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("its array has no kind or no shape")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(max(n, 1) for n in shape) > _MOST:
        raise pickle.UnpicklingError(f"its array has the shape {shape!r:.60}")
    size = math.prod(shape)
    if dtype.hasobject:
        filled = type(content) is list and len(content) == size
    else:
        filled = isinstance(content, bytes | bytearray) and len(content) == size * dtype.itemsize
    if not filled:
        raise pickle.UnpicklingError(f"its array of the shape {shape!r:.60} is not filled by its content")


_FUNCTIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "multiarray": {"_reconstruct": make_empty, "scalar": make_scalar},
    "numeric": {"_frombuffer": make_array},
}

STAND_INS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): Ndarray,
    ("numpy", "dtype"): make_dtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, functions in _FUNCTIONS.items()
        for name, function in functions.items()
    },
}
"""What a pickle gets for numpy's names, by module and name."""
