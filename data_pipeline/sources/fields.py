"""From a record of named fields, as CSV, JSON, Parquet and pickles give them, to a raw record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.crystal import Crystal
from data_pipeline.errors import DataError
from data_pipeline.formats.parse import from_jarvis, from_pymatgen, from_pymatgen_dict
from data_pipeline.info import TargetInfo
from data_pipeline.sources.headings import names_and_units
from data_pipeline.sources.named_splits import COLUMN, is_split_column, named_split
from data_pipeline.sources.raw import Record
from data_pipeline.validate import is_number, parse_target

NAME_FIELD = "name"
"""An id where there is no other, though many rows may be called NaCl."""
ID_FIELDS = ("material_id", "id", "jid", "mp_id", "mpid", "file_id", "task_id", NAME_FIELD)
TEXT_FIELDS = {"cif": "cif", "poscar": "poscar"}
STRUCTURE_FIELDS = ("structure", "final_structure", "atoms", *TEXT_FIELDS)
_KNOWN = frozenset({*ID_FIELDS, *STRUCTURE_FIELDS})
_NO_TARGETS = frozenset(
    {"", "index", "idx", "unnamed:_0", "__index_level_0__", COLUMN, *ID_FIELDS, *STRUCTURE_FIELDS}
)
_CIF_ITEM = "_cell_length_a"
"""In every CIF of a structure, and in no JSON of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a record stands: file, row from 0, the split its file belongs to if any."""

    file: str
    row: int
    split: str | None = None


def to_record(fields: Mapping[str, Any], targets: Sequence[TargetInfo], place: Place) -> Record:
    """A raw record; whatever is wrong with the fields becomes its problem.

    Without targets the record is one to predict, which belongs to no split whatever its field ``split`` says.
    """
    known = _known(fields)
    own_id, is_name = _id_of(known) or (f"{place.file}-{place.row}", False)
    record = Record(file=place.file, row=place.row, split=place.split, material_id=own_id, id_is_name=is_name)
    try:
        split = _split(fields, place) if targets else place.split
        values = [_target(fields, target) for target in targets]
        kind, text = _text(known)
        crystal = None if kind is not None else _structure(known)
    except ValueError as error:
        return replace(record, problem=" ".join(str(error).split()))
    return replace(record, crystal=crystal, kind=kind, text=text, targets=values, split=split)


def fold(heading: object) -> str:
    """A heading as ids and structures are known by: "Material ID" and "material-id" are both material_id."""
    return str(heading).strip().lower().replace(" ", "_").replace("-", "_")


def find_id(fields: Mapping[str, Any]) -> tuple[str, bool] | None:
    """The id in a record, and whether it is but a name; None where there is none."""
    return _id_of(_known(fields))


def _id_of(known: Mapping[str, Any]) -> tuple[str, bool] | None:
    name = next((name for name in ID_FIELDS if name in known), None)
    return None if name is None else (str(known[name]), name == NAME_FIELD)


def holds_text(fields: Mapping[str, Any]) -> bool:
    """Whether a record gives its structure as text still to be parsed."""
    return _text(_known(fields))[0] is not None


def targets_from_headings(headings: Sequence[str], where: str) -> tuple[TargetInfo, ...]:
    """The targets of columns, in order; headings.py says what of a heading is the name and what the unit."""
    return tuple(
        TargetInfo(name=name, unit=unit, description=f"column {heading!r} of {where}", column=heading)
        for heading, (name, unit) in zip(headings, names_and_units(headings), strict=True)
    )


def find_targets(
    known: Sequence[TargetInfo], wanted: Sequence[str], where: str, there: Iterable[str]
) -> tuple[TargetInfo, ...]:
    """The ``wanted`` ones of the ``known`` targets, by name or heading.

    A heading with commas may come in pieces, as a list joined by commas was split: they are put together again.
    Raises DataError where one is not known, telling what is ``there``.
    """
    by_name = {target.name: target for target in known} | {_folded(target.column): target for target in known}
    chosen, start = [], 0
    while start < len(wanted):
        ends = range(len(wanted), start, -1)
        whole = ((end, by_name.get(_folded(",".join(wanted[start:end])))) for end in ends)
        end, target = next(((end, target) for end, target in whole if target is not None), (start, None))
        if target is None:
            raise DataError(f"{where}: no column {wanted[start]!r}; it has {', '.join(there) or 'no fields'}")
        chosen.append(target)
        start = end
    return tuple(chosen)


def choose_targets(sample: Iterable[Mapping[str, Any]], wanted: Sequence[str], where: str) -> tuple[TargetInfo, ...]:
    """The targets of a source, from its first records.

    wanted: their names or headings. Without any: every field whose first value that is not missing is a number, ids
    and structures apart. Raises DataError where a wanted one, or any at all, is not there.
    """
    verdict: dict[str, bool | None] = {}
    for fields in sample:
        for heading, value in fields.items():
            if verdict.setdefault(heading, None) is None:
                verdict[heading] = is_number(value)
    known = targets_from_headings([h for h in verdict if fold(h) not in _NO_TARGETS], where)
    if wanted:
        return find_targets(known, wanted, where, verdict)
    chosen = tuple(target for target in known if verdict[target.column])
    if not chosen:
        raise DataError(f"{where}: no column of numbers to predict; it has {', '.join(verdict) or 'no fields'}")
    return chosen


def _folded(heading: str) -> str:
    """A heading without the spaces that a list joined by commas loses."""
    return ",".join(piece.strip() for piece in heading.split(","))


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ids and structures among the fields that are filled, by their own name; one spelled exactly comes first."""
    found: dict[str, Any] = {}
    for heading, value in fields.items():
        name = fold(heading)
        if name in _KNOWN and value is not None and value != "" and (name == heading or name not in found):
            found[name] = value
    return found


def _split(fields: Mapping[str, Any], place: Place) -> str | None:
    value = next((value for name, value in fields.items() if is_split_column(name)), None)
    return named_split(value, place.split)


def _target(fields: Mapping[str, Any], target: TargetInfo) -> float | None:
    try:
        return parse_target(fields.get(target.column))
    except ValueError as error:
        raise ValueError(f"bad target: {target.column}: {error}") from error


def _text(known: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The kind and text of a structure given as text."""
    for name in (*TEXT_FIELDS, *STRUCTURE_FIELDS):
        value = known.get(name)
        if isinstance(value, str) and value.strip() and (name in TEXT_FIELDS or _CIF_ITEM in value):
            return TEXT_FIELDS.get(name, "cif"), value
    return None, None


def _structure(fields: Mapping[str, Any]) -> Crystal:
    name = next((name for name in STRUCTURE_FIELDS if name in fields), None)
    if name is None:
        raise ValueError(f"empty structure: none of the fields {', '.join(STRUCTURE_FIELDS)} is filled")
    value = fields[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"unreadable structure: field {name!r} is not JSON, nor a CIF: {error}") from error
    if isinstance(value, Mapping):
        return from_jarvis(value) if "lattice_mat" in value else from_pymatgen_dict(value)
    if hasattr(value, "lattice") and hasattr(value, "species_and_occu"):
        return from_pymatgen(value)
    raise ValueError(f"unreadable structure: field {name!r} is {type(value).__name__}")
