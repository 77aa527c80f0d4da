"""Reading pickles without running what a stranger put into them.

A pickle names the functions it wants called. Here every name is looked up in a list, and the list holds data classes
of pymatgen, plain containers and numpy's numbers, nothing else: no name outside it is even imported. Arrays are made
by plain_arrays.py. What is to be filled is looked at first: a pickle can alter nothing but its own objects.
"""

from __future__ import annotations

import enum
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.formats.plain_arrays import STAND_INS, check_array, check_dtype

_NUMPY_SCALARS = (
    "bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 str_ longlong ulonglong"
)
_BUILTINS = frozenset("set frozenset list dict tuple bytearray complex int float str bool bytes object".split())
ALLOWED: Mapping[str, frozenset[str]] = {
    "builtins": _BUILTINS,
    "__builtin__": _BUILTINS,
    "copy_reg": frozenset({"_reconstructor"}),
    "collections": frozenset({"OrderedDict", "defaultdict", "deque"}),
    "copyreg": frozenset({"_reconstructor"}),
    "_codecs": frozenset({"encode"}),
    "numpy": frozenset(_NUMPY_SCALARS.split()),
    "monty.json": frozenset({"MSONable"}),
    "monty.collections": frozenset({"frozendict", "AttrDict"}),
    "pymatgen.core.structure": frozenset({"Structure", "IStructure"}),
    "pymatgen.core.sites": frozenset({"Site", "PeriodicSite"}),
    "pymatgen.core.lattice": frozenset({"Lattice"}),
    "pymatgen.core.composition": frozenset({"Composition"}),
    "pymatgen.core.periodic_table": frozenset({"Element", "Species", "Specie", "DummySpecies", "DummySpecie"}),
    "pymatgen.core.units": frozenset({"FloatWithUnit", "Unit"}),
    "pymatgen.electronic_structure.core": frozenset({"Spin", "Magmom"}),
}
"""The names a pickle may use, by module, beside those of STAND_INS."""


class _Restricted(pickle._Unpickler):
    """An unpickler that knows the names of ALLOWED and STAND_INS only, and fills its own objects only.

    Python's own, six times slower than that in C, which does not ask before it fills an object.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.stack: list[Any] = []
        self._admitted: set[type] = set()

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - whatever class the pickle names
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        if name not in ALLOWED.get(module, frozenset()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not on the list of harmless classes")
        found = super().find_class(module, name)
        if isinstance(found, type):
            self._admitted.add(found)
        return found

    def check_build(self) -> None:
        """Raises UnpicklingError where what is to be filled is a class, a function or a constant."""
        filled, state = self.stack[-2:]
        if type(filled) is np.ndarray:
            check_array(state)
        elif isinstance(filled, np.dtype):
            check_dtype(filled, state)
        elif type(filled) not in self._admitted or isinstance(filled, enum.Enum):
            raise pickle.UnpicklingError(f"it would alter {filled!r:.60}, which is not its own")


def _build(unpickler: Any) -> None:  # noqa: ANN401 - a _Restricted, of which Python's own table does not know
    unpickler.check_build()
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


_Restricted.dispatch = {**_Restricted.dispatch, pickle.BUILD[0]: _build}


def read_pickle(path: Path) -> Any:  # noqa: ANN401 - the object in the file
    """The object in a pickle of pymatgen structures, numpy arrays and plain containers. Raises DataError."""
    try:
        with path.open("rb") as stream:
            return _Restricted(stream).load()
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
    except Exception as error:  # a damaged pickle raises errors of every kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the pickle was not read: {reason:.300}") from error


def check_pickle(what: str, *, allow_pickle: bool) -> None:
    """Raises DataError unless pickles are allowed."""
    if not allow_pickle:
        raise DataError(
            f"{what}: its files are pickles, which can carry code; give --allow-pickle to `crystalformer prepare` to "
            f"read them through an unpickler that admits only structures, numbers and plain containers"
        )
