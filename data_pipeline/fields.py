"""From a record of named fields, as CSV, JSON, Parquet and pickles give them, to a raw record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.crystal import Crystal
from data_pipeline.errors import DataError
from data_pipeline.info import TargetInfo
from data_pipeline.parse import from_jarvis, from_pymatgen, from_pymatgen_dict
from data_pipeline.raw import Record
from data_pipeline.validate import parse_target

ID_FIELDS = ("material_id", "id", "jid", "mp_id", "mpid", "file_id", "task_id", "name")
TEXT_FIELDS = {"cif": "cif", "poscar": "poscar"}
STRUCTURE_FIELDS = ("structure", "final_structure", "atoms", *TEXT_FIELDS)
_NO_TARGETS = frozenset({"", "index", "idx", "unnamed: 0", "split", *ID_FIELDS, *STRUCTURE_FIELDS})
_UNIT = re.compile(r"(?P<name>[^\[(]+?)\s*[\[(](?P<unit>.+)[\])]\s*\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a record stands: file, row from 0, the split its file belongs to if any."""

    file: str
    row: int
    split: str | None = None


def to_record(fields: Mapping[str, Any], targets: Sequence[TargetInfo], place: Place) -> Record:
    """A raw record; whatever is wrong with the fields becomes its problem."""
    key = next((name for name in ID_FIELDS if fields.get(name) not in (None, "")), None)
    material_id = f"{place.file}-{place.row}" if key is None else str(fields[key])
    record = Record(file=place.file, row=place.row, split=place.split, material_id=material_id)
    try:
        values = [_target(fields, target) for target in targets]
        kind, text = _text(fields)
        crystal = None if kind is not None else _structure(fields)
    except ValueError as error:
        return replace(record, problem=" ".join(str(error).split()))
    return replace(record, crystal=crystal, kind=kind, text=text, targets=values)


def target_from_heading(heading: str, where: str) -> TargetInfo:
    """The target of a column; a unit may stand behind its name: "bandgap (eV)", "shear [log10(GPa)]"."""
    found = _UNIT.match(heading)
    name = re.sub(r"\s+", "_", (found["name"] if found else heading).strip())
    unit = found["unit"].strip() if found else ""
    return TargetInfo(name=name, unit=unit, description=f"column {heading!r} of {where}", column=heading)


def choose_targets(sample: Iterable[Mapping[str, Any]], wanted: Sequence[str], where: str) -> tuple[TargetInfo, ...]:
    """The targets of a source, from its first records.

    wanted: their names or headings. Without any: every field whose first value that is not missing is a number, ids
    and structures apart. Raises DataError where a wanted one, or any at all, is not there.
    """
    verdict: dict[str, bool | None] = {}
    for fields in sample:
        for heading, value in fields.items():
            if verdict.setdefault(heading, None) is None:
                verdict[heading] = _is_number(value)
    known = [target_from_heading(h, where) for h in verdict if h.strip().lower() not in _NO_TARGETS]
    if not wanted:
        chosen = tuple(target for target in known if verdict[target.column])
        if not chosen:
            raise DataError(f"{where}: no column of numbers to predict; it has {', '.join(verdict) or 'no fields'}")
        return chosen
    by_name = {name: target for target in known for name in (target.column, target.name)}
    for name in wanted:
        if name not in by_name:
            raise DataError(f"{where}: no column {name!r}; it has {', '.join(verdict) or 'no fields'}")
    return tuple(by_name[name] for name in wanted)


def _is_number(value: object) -> bool | None:
    """Whether a field holds a number; None where it is missing."""
    try:
        return None if parse_target(value) is None else True
    except ValueError:
        return False


def _target(fields: Mapping[str, Any], target: TargetInfo) -> float | None:
    try:
        return parse_target(fields.get(target.column))
    except ValueError as error:
        raise ValueError(f"bad target: {target.column}: {error}") from error


def _text(fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The kind and text of a structure given as text."""
    for name, kind in TEXT_FIELDS.items():
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return kind, value
    return None, None


def _structure(fields: Mapping[str, Any]) -> Crystal:
    name = next((name for name in STRUCTURE_FIELDS if fields.get(name) not in (None, "")), None)
    if name is None:
        raise ValueError(f"empty structure: none of the fields {', '.join(STRUCTURE_FIELDS)} is filled")
    value = fields[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"unreadable structure: field {name!r} is not JSON: {error}") from error
    if isinstance(value, Mapping):
        return from_jarvis(value) if "lattice_mat" in value else from_pymatgen_dict(value)
    if hasattr(value, "lattice") and hasattr(value, "species_and_occu"):
        return from_pymatgen(value)
    raise ValueError(f"unreadable structure: field {name!r} is {type(value).__name__}")
