"""Which raw rows count, which split each belongs to, and which are left out before their structure is looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.info import SplitRecipe
from data_pipeline.splits import SPLITS, UNUSED, make_split
from data_pipeline.steps.store import null_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """codes (rows,) int8: the split of every raw row, -1 for none. problems: what is wrong with a row, by its number.

    outside counts rows that do not belong to the set at all: published sets hold only rows that have every target.
    ids: new ids of rows that have but a name and share it, by row. usable: rows dealt. own_splits: the source named
    the splits, the recipe was not asked. ends: ids of the first and last row of train, val and test, in the recipe's
    order.
    """

    codes: NDArray[np.int8]
    problems: dict[int, str]
    ids: dict[int, str]
    outside: dict[str, int]
    usable: int
    own_splits: bool
    ends: tuple[tuple[str, str], ...]


def assign_splits(index: pa.Table, targets: Sequence[str], recipe: SplitRecipe, *, every_target: bool) -> Assignment:
    """Deal the rows that have their targets to splits.

    They go where the source says, or else where the recipe does. A row found later to have a bad structure leaves its
    split without moving any other row. Raises DataError where no row is usable, the recipe asks for more, or the
    source says it of a part of the rows only.
    """
    n = len(index)
    problems = {i: p for i, p in enumerate(index.column("problem").to_pylist()) if p is not None}
    has = ~np.stack([null_mask(index.column(name)) for name in targets], axis=1)
    healthy = np.ones(n, dtype=np.bool_)
    healthy[list(problems)] = False
    usable = healthy & (has.all(axis=1) if every_target else has.any(axis=1))
    outside: Counter[str] = Counter()
    for i in np.flatnonzero(healthy & ~usable).tolist():
        absent = [name for name, there in zip(targets, has[i], strict=True) if not there]
        if every_target:
            outside[f"missing target: {', '.join(absent)}"] += 1
        else:
            problems[i] = f"missing target: {', '.join(absent)}"
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise DataError(f"none of the {n} rows can be used: {_all_reasons(index, problems) or dict(outside)}")
    codes = np.full(n, UNUSED, dtype=np.int8)
    new_ids = _ids_from_names(index.take(pa.array(rows)), rows)
    names = with_ids(index, new_ids).column("material_id").take(pa.array(rows)).to_pylist()
    ends = []
    prescribed = _prescribed(index, rows)
    for code, members in enumerate(_members(prescribed, recipe, len(rows))):
        codes[rows[members]] = code
        ends.append((names[members[0]], names[members[-1]]) if len(members) else ("", ""))
    problems |= _duplicates(index, names, rows)
    return Assignment(
        codes=codes,
        problems=problems,
        ids=new_ids,
        outside=dict(outside),
        usable=len(rows),
        own_splits=prescribed is not None,
        ends=tuple(ends),
    )


def with_ids(table: pa.Table, ids: Mapping[int, str], start: int = 0) -> pa.Table:
    """``table``, whose first row has the number ``start``, with the material_id that ``ids`` has for a row."""
    changed = [row for row in range(start, start + len(table)) if row in ids] if ids else []
    if not changed:
        return table
    names = table.column("material_id").to_pylist()
    for row in changed:
        names[row - start] = ids[row]
    place = table.schema.get_field_index("material_id")
    return table.set_column(place, table.schema.field(place), pa.array(names, pa.string()))


def first_reasons(reasons: Iterable[str]) -> str:
    """The commonest rules that rows broke, "12 x overlapping atoms, 3 x missing target"."""
    counts = count_rules(reasons)
    return ", ".join(f"{count} x {rule}" for rule, count in list(counts.items())[:5])


def place_of(index: pa.Table, row: int) -> str:
    """Where a raw row stands, "file.csv row 17"."""
    return f"{index.column('source_file')[row].as_py()} row {index.column('source_row')[row].as_py()}"


def count_rules(reasons: Iterable[str]) -> dict[str, int]:
    """How often each rule (the words before the colon) was broken, commonest first."""
    counts = Counter(reason.split(":", 1)[0] for reason in reasons)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _prescribed(index: pa.Table, rows: NDArray[np.int64]) -> list[str] | None:
    """The splits that the source names for ``rows``; None where it names none. Raises DataError for gaps."""
    named: list[str | None] = index.column("split").take(pa.array(rows)).to_pylist()
    without = [row for row, split in zip(rows.tolist(), named, strict=True) if split is None]
    if len(without) == len(named):
        return None
    if without:
        raise DataError(
            f"{len(without)} of {len(named)} usable rows have no split, though the others do; the first is "
            f"{place_of(index, without[0])} {index.column('material_id')[without[0]].as_py()}: "
            f"name the split of all rows ({', '.join(SPLITS)}) or of none"
        )
    splits = [split for split in named if split is not None]
    wrong = next((split for split in splits if split not in SPLITS), None)
    if wrong is not None:
        raise DataError(f"a split is named {wrong!r}; allowed are {', '.join(SPLITS)}")
    return splits


def _members(prescribed: list[str] | None, recipe: SplitRecipe, count: int) -> list[NDArray[np.int64]]:
    """For train, val and test, numbers of the ``count`` usable rows, in the order of the source or of the recipe."""
    if prescribed is None:
        split = make_split(count, recipe)
        return [np.array(part, dtype=np.int64) for part in (split.train, split.val, split.test)]
    members = [np.flatnonzero([name == split for name in prescribed]) for split in SPLITS]
    if not all(len(part) for part in members):
        sizes = ", ".join(f"{len(part)} {split}" for part, split in zip(members, SPLITS, strict=True))
        raise DataError(f"the source names the splits of its rows, {sizes}; each split needs at least 1 row")
    return members


def _ids_from_names(usable: pa.Table, rows: NDArray[np.int64]) -> dict[int, str]:
    """Ids for the usable rows that have but a name that another has too: "NaCl" of row 17 becomes "NaCl-17"."""
    names: list[str] = usable.column("material_id").to_pylist()
    by_name: list[bool] = usable.column("id_is_name").to_pylist()
    counts, taken, ids = Counter(names), set(names), {}
    places = zip(rows.tolist(), usable.column("source_row").to_pylist(), names, by_name, strict=True)
    for row, source_row, name, is_name in places:
        if is_name and counts[name] > 1:
            new = f"{name}-{source_row}"
            while new in taken:  # of another file, or somebody's own id
                new = f"{new}-{row}"
            taken.add(new)
            ids[row] = new
    return ids


def _all_reasons(index: pa.Table, problems: Mapping[int, str]) -> str:
    """The rules that rows broke, and the first of the rows; "" without any."""
    if not problems:
        return ""
    first = min(problems)
    name = index.column("material_id")[first].as_py()
    return f"{first_reasons(problems.values())}; the first: {place_of(index, first)} {name}: {problems[first]}"


def _duplicates(index: pa.Table, names: Sequence[str], rows: NDArray[np.int64]) -> dict[int, str]:
    """Every usable row whose material_id an earlier usable one has."""
    first: dict[str, int] = {}
    found: dict[int, str] = {}
    for row, name in zip(rows.tolist(), names, strict=True):
        earlier = first.setdefault(name, row)
        if earlier != row:
            found[row] = f"duplicate id: {name!r} is {place_of(index, earlier)} already"
    return found
