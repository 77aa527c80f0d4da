"""Whether the symmetry with which pymatgen read a CIF is the one that the CIF states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.composition import Amounts, fills
from data_pipeline.crystal import Floats

NOT_FOUND = ("Defaulting to P1", "No magnetic symmetry detected")
BY_SYMBOL = "Spacegroup from"
"""Parts of pymatgen's warnings that say where the symmetry came from."""

METRIC_TOLERANCE = 0.01
"""Of a lattice's metric, within which symmetry derived from a symbol must leave it as it is."""

_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz", "_space_group_symop_magn_operation")
_SYMBOLS = (
    *("_symmetry_space_group_name_h-m", "_symmetry_space_group_name_h_m", "_space_group_name_h-m_alt"),
    *("_symmetry_space_group_name_hall", "_space_group_name_hall", "_space_group_magn.name_bns"),
)
_NUMBERS = ("_space_group_it_number", "_symmetry_int_tables_number")
_NOTHING = frozenset({"", "?", "."})


def symmetry_problem(
    said: Sequence[str],
    rotations: Floats,
    data: Mapping[str, Any],
    lattice: Floats,
    formula: Amounts | None,
    found: Amounts,
) -> str | None:
    """Why the sites may have been repeated by another symmetry than the CIF's; None where it is the CIF's.

    Operations that the CIF lists are taken as they are, P 1 and x,y,z too. Those that pymatgen derives from a symbol
    or number must leave the lattice as it is; a number whose symbol pymatgen does not know must have one setting
    only; a group of two origins needs a formula, which tells them apart; and the cell must hold formula times Z where
    the CIF states both. Where pymatgen found no symmetry it takes P 1; that is accepted only where the sites are
    formula times Z, hence all atoms of the cell.

    said: pymatgen's warnings. rotations: (operations, 3, 3) of fractional coordinates, as it used them. data: the
    items of the CIF. lattice: (3, 3) rows. found: the atoms of the cell that was read.
    """
    stated = _Stated(data)
    if any(part in warning for warning in said for part in NOT_FOUND):
        if _agree(formula, stated.units, found):
            return None
        return (
            f"{stated.symmetry}{' is not known' if stated.symbol or stated.number else ''}, and formula and Z "
            "(_chemical_formula_sum, _cell_formula_units_Z) do not say that the sites are the whole cell"
        )
    by_symbol = any(BY_SYMBOL in warning for warning in said)
    if stated.operations and not by_symbol:
        return broken_operation(rotations)
    if stated.symbol and not by_symbol and _settings(stated.number) != 1:
        return f"{stated.symmetry}, and group number {stated.number} has several settings"
    if not _keep_metric(rotations, lattice):
        return f"{stated.symmetry} does not fit the cell's lengths and angles: another setting is meant"
    if _has_origins(stated) and (formula is None or (len(formula) == 1 and stated.units is None)):
        return f"{stated.symmetry} has two origins, and no operations or composition tell which is meant"
    if formula is not None and stated.units is not None and not fills(formula, stated.units, found):
        return (
            f"{stated.symmetry} gives other atoms than Z = {stated.units:g} formula units: another setting is meant"
        )
    return None


class _Stated:
    """What a CIF says of symmetry, empty where nothing.

    operations: whether it lists any. symbol, number: of the group. units: Z. symmetry: all of that in words.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        text = {key.lower().rstrip("_"): value for key, value in data.items() if key[:6] in ("_symme", "_space")}
        self.operations = any(key.startswith(_OPERATIONS) for key in text)
        self.symbol = _first(text, _SYMBOLS)
        self.number = _first(text, _NUMBERS)
        self.units = _positive(data.get("_cell_formula_units_Z"))
        self.symmetry = f"the symmetry {self.symbol!r:.60}" if self.symbol else "the file states no symmetry"
        if self.number and not self.symbol:
            self.symmetry = f"group number {self.number}"


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the items that is filled."""
    values = (value.strip() for name in names if isinstance(value := text.get(name), str))
    return next((value for value in values if value not in _NOTHING), "")


def _positive(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, str) else 0.0
    except ValueError:
        return None
    return number if number > 0 else None


def _agree(formula: Amounts | None, units: float | None, found: Amounts) -> bool:
    return formula is not None and units is not None and fills(formula, units, found)


def broken_operation(rotations: Floats) -> str | None:
    """Which of the listed operations, (n, 3, 3), moves no lattice onto itself: pymatgen reads "?" as all to 0."""
    wrong = np.flatnonzero(np.abs(np.abs(np.linalg.det(rotations)) - 1) > 1e-6)
    return f"symmetry operation {wrong[0] + 1} of those listed is none" if len(wrong) else None


def _keep_metric(rotations: Floats, lattice: Floats) -> bool:
    """Whether the rotations, of fractional coordinates, leave the lattice's lengths and angles as they are."""
    metric = lattice @ lattice.T
    moved = np.einsum("nji,jk,nkl->nil", rotations, metric, rotations)
    scale = np.sqrt(np.outer(np.diag(metric), np.diag(metric)))
    return bool((np.abs(moved - metric) <= METRIC_TOLERANCE * scale).all())


def _settings(number: str) -> int:
    """How many settings, origins among them, a group of this number has; 0 where there is no such group."""
    return sum(one == number for one, _ in _groups())


def _has_origins(stated: _Stated) -> bool:
    """Whether the group stated has two origins, and its symbol or number leaves open which is meant."""
    symbol = stated.symbol.replace(" ", "").replace("_", "")
    names = [
        name for number, name in _groups() if (name.split(":")[0] == symbol if symbol else number == stated.number)
    ]
    return any(name.endswith(":1") for name in names) and any(name.endswith(":2") for name in names)


@lru_cache(maxsize=1)
def _groups() -> list[tuple[str, str]]:
    """Number and symbol, without spaces, of every setting in the International Tables, from pymatgen's list."""
    from pymatgen.io import cif

    listed = json.loads((Path(cif.__file__).parents[1] / "symmetry" / "symm_ops.json").read_text(encoding="utf-8"))
    names = ((str(group["number"]), str(group["universal_h_m"])) for group in listed)
    return [(number, name.replace(" ", "")) for number, name in names if "(" not in name]
