"""The structure table: one row a crystal. This is the only place where its columns, shapes and units are defined.

=================  ==========================================  ====================================================
column             type                                        meaning
=================  ==========================================  ====================================================
material_id        string                                      unique in a data set
atomic_numbers     list<int16>, n items                        1..98 a site; 0 marks a disordered site
positions          list<fixed_size_list<double, 3>>, n items   Cartesian coordinates of the sites, Å
lattice            fixed_size_list<double, 9>                  the three lattice vectors, one after another, Å
disorder           list<struct<site: int32,                    null for an ordered crystal; else every species of
                   atomic_number: int16, occupancy: double>>   every disordered site: index of the site in the
                                                               crystal, atomic number 1..98, occupancy in (0, 1]
one a target       double, nullable                            unit and description in the field's metadata
=================  ==========================================  ====================================================

The schema's metadata holds ``crystalformer.schema_version`` and whatever the writer adds. Ray and Parquet rename the
child field of a list from ``item`` to ``element`` and may drop metadata of nested fields; neither is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.info import TargetInfo

SCHEMA_VERSION = 1
VERSION_KEY = b"crystalformer.schema_version"

POSITIONS_TYPE = pa.list_(pa.list_(pa.float64(), 3))
NUMBERS_TYPE = pa.list_(pa.int16())
LATTICE_TYPE = pa.list_(pa.float64(), 9)
DISORDER_TYPE = pa.list_(
    pa.struct([("site", pa.int32()), ("atomic_number", pa.int16()), ("occupancy", pa.float64())])
)
STRUCTURE_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("atomic_numbers", NUMBERS_TYPE),
    ("positions", POSITIONS_TYPE),
    ("lattice", LATTICE_TYPE),
    ("disorder", DISORDER_TYPE),
)
FIXED_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (("material_id", pa.string()), *STRUCTURE_COLUMNS)
UNITS = {"positions": "Å", "lattice": "Å", "disorder": "occupancy in (0, 1]"}


def structure_schema(targets: Sequence[TargetInfo], metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """The schema of a table with ``targets``; ``metadata`` is added to the version's."""
    fields = [
        pa.field(name, kind, nullable=name == "disorder", metadata={"unit": UNITS[name]} if name in UNITS else None)
        for name, kind in FIXED_COLUMNS
    ]
    fields += [
        pa.field(t.name, pa.float64(), nullable=True, metadata={"unit": t.unit, "description": t.description})
        for t in targets
    ]
    extra = {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode(), **extra})


def check_schema(schema: pa.Schema, where: str) -> None:
    """Refuse what is not a structure table of this version; ``where`` names the file in the message.

    Raises DataError: no or another version, a missing column, a column of another type.
    """
    version = (schema.metadata or {}).get(VERSION_KEY)
    if version is None:
        raise DataError(
            f"{where}: not a structure table: its schema metadata lacks {VERSION_KEY.decode()} "
            f"(write one with `crystalformer prepare --source`)"
        )
    if version != str(SCHEMA_VERSION).encode():
        raise DataError(
            f"{where}: structure table of schema version {version.decode(errors='replace')}, "
            f"but this program reads version {SCHEMA_VERSION}; prepare the data set again"
        )
    check_columns(schema, where)


def check_columns(schema: pa.Schema, where: str, targets: Sequence[str] = ()) -> None:
    """Refuse a table that lacks a fixed column or one of ``targets``, or has one of another type.

    Tables that went through Ray have lost the version, so it is not asked for here. Raises DataError.
    """
    wanted = [*FIXED_COLUMNS, *((name, pa.float64()) for name in targets)]
    for name, kind in wanted:
        index = schema.get_field_index(name)
        if index < 0:
            raise DataError(f"{where}: column {name!r} is missing; the table has {', '.join(schema.names)}")
        if not _same_type(schema.field(index).type, kind):
            raise DataError(f"{where}: column {name!r} has type {schema.field(index).type}, not {kind}")


def target_fields(schema: pa.Schema) -> tuple[TargetInfo, ...]:
    """The targets a table's schema declares: its columns of type double that are not fixed ones."""
    fixed = {name for name, _ in FIXED_COLUMNS}
    return tuple(
        TargetInfo(
            name=field.name,
            unit=(field.metadata or {}).get(b"unit", b"").decode(),
            description=(field.metadata or {}).get(b"description", b"").decode(),
        )
        for field in schema
        if field.name not in fixed and field.type == pa.float64()
    )


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether two types agree but for the names and nullability of list items."""
    if pa.types.is_fixed_size_list(wanted):
        return (
            pa.types.is_fixed_size_list(found)
            and found.list_size == wanted.list_size
            and _same_type(found.value_type, wanted.value_type)
        )
    if pa.types.is_list(wanted):
        return pa.types.is_list(found) and _same_type(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        return (
            pa.types.is_struct(found)
            and [field.name for field in found] == [field.name for field in wanted]
            and all(_same_type(a.type, b.type) for a, b in zip(found, wanted, strict=True))
        )
    return bool(found == wanted)
