"""The work on a batch: parse, validate, reduce. A pure function from table to table, run here or by Ray Data."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from data_pipeline.crystal import EMPTY, Crystal, read_crystals, structure_columns
from data_pipeline.formats.parse import parse_structure
from data_pipeline.schema import STRUCTURE_COLUMNS
from data_pipeline.steps.reduce import ReductionError, primitive_cell
from data_pipeline.validate import structure_problem

WORK_VERSION = 4
"""Part of every fingerprint: raised whenever the same source would give another result.

2: splits that the source names are used; names of targets; rows of one name are told apart.
3: structures that may be read as others are refused; files named after splits are those; left-handed lattices, CIFs'
default occupancies, ids and structures under other spellings are read; ratios are taken as they are written.
4: targets, lattices and coordinates beyond any that can be meant are refused.
"""


def process_batch(raw: pa.Table) -> pa.Table:
    """Raw table to the same rows with parsed, checked, primitive structures.

    A row that fails gets its ``problem`` and an empty structure; it stays, so that rows keep their places.
    """
    problems: list[str | None] = raw.column("problem").to_pylist()
    crystals = _parsed(raw, problems)
    for i, crystal in enumerate(crystals):
        if problems[i] is None:
            problems[i], crystals[i] = _finish(crystal)
        if problems[i] is not None:
            crystals[i] = EMPTY
    table = raw.drop_columns(["kind", "text"])
    table = _replace(table, "problem", pa.array(problems, pa.string()))
    for (name, _), column in zip(STRUCTURE_COLUMNS, structure_columns(crystals), strict=True):
        table = _replace(table, name, column)
    return table


def _parsed(raw: pa.Table, problems: list[str | None]) -> list[Crystal]:
    """The crystal of every row; a text that cannot be parsed leaves its problem."""
    crystals = read_crystals(raw)
    kinds: Sequence[str | None] = raw.column("kind").to_pylist()
    if not any(kinds):
        return crystals
    for i, (kind, text) in enumerate(zip(kinds, raw.column("text").to_pylist(), strict=True)):
        if kind is not None and problems[i] is None:
            try:
                crystals[i] = parse_structure(kind, text)
            except ValueError as error:
                problems[i] = str(error)
    return crystals


def _finish(crystal: Crystal) -> tuple[str | None, Crystal]:
    problem = structure_problem(crystal)
    if problem is not None:
        return problem, EMPTY
    try:
        return None, primitive_cell(crystal)
    except ReductionError as error:
        return str(error), EMPTY


def _replace(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), column)
