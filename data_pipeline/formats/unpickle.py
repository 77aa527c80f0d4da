"""Reading pickles without running what a stranger put into them.

A pickle names the functions it wants called. Here every name is looked up in a list, and the list holds data classes
of pymatgen, numpy's arrays and plain containers, nothing else: no name outside it is even imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

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
    "numpy": frozenset({"ndarray", "dtype", *_NUMPY_SCALARS.split()}),
    "numpy.dtypes": frozenset({"Float64DType", "Int64DType", "BoolDType"}),
    **{
        f"numpy.{core}.{module}": names
        for core in ("core", "_core")
        for module, names in (
            ("multiarray", frozenset({"_reconstruct", "scalar"})),
            ("numeric", frozenset({"_frombuffer"})),
        )
    },
    "monty.json": frozenset({"MSONable"}),
    "monty.collections": frozenset({"frozendict", "AttrDict"}),
    "pymatgen.core.structure": frozenset({"Structure", "IStructure"}),
    "pymatgen.core.sites": frozenset({"Site", "PeriodicSite"}),
    "pymatgen.core.lattice": frozenset({"Lattice"}),
    "pymatgen.core.composition": frozenset({"Composition"}),
    "pymatgen.core.periodic_table": frozenset({"Element", "Species", "Specie", "DummySpecies", "DummySpecie"}),
    "pymatgen.core.units": frozenset({"FloatWithUnit", "ArrayWithUnit", "Unit"}),
    "pymatgen.electronic_structure.core": frozenset({"Spin", "Magmom"}),
}
"""The names a pickle may use, by module."""


class _Restricted(pickle.Unpickler):
    """An unpickler that knows the names of ALLOWED only."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - whatever class the pickle names
        if name not in ALLOWED.get(module, frozenset()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not on the list of harmless classes")
        return super().find_class(module, name)


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
