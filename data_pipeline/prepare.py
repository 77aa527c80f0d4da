"""Prepare a data set: read its source, parse, validate, reduce to primitive cells, split, write.

Nothing is done where data_dir/<name>/dataset.json carries the fingerprint of what would be made. Small sets are
worked on in this process, because starting Ray and Ray Data costs more than they do; see RAY_FROM_SECONDS.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.datasets import check_name, find_dataset
from data_pipeline.elements import symbol_of
from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo, SplitRecipe
from data_pipeline.lock import locked
from data_pipeline.prepared import FILE_NAME, PreparedDataset, RejectedRow, is_prepared, load_prepared
from data_pipeline.schema import FIXED_COLUMNS, SCHEMA_VERSION
from data_pipeline.sources.base import Source
from data_pipeline.sources.opening import open_registered
from data_pipeline.sources.raw import EXTRA_FIELDS
from data_pipeline.splits import SPLITS
from data_pipeline.steps.assign import Assignment, assign_splits, count_rules, first_reasons, with_ids
from data_pipeline.steps.execute import Progress, in_process, with_ray
from data_pipeline.steps.publish import NAME_KEY, check_target, publish
from data_pipeline.steps.reduce import SYMPREC
from data_pipeline.steps.store import PART_FIELD, RawStore, is_staged
from data_pipeline.steps.work import WORK_VERSION
from data_pipeline.steps.write import DatasetWriter
from data_pipeline.table import FINGERPRINT_KEY
from data_pipeline.text import printable, readable

Executor = Literal["auto", "process", "ray"]

RAY_FROM_SECONDS = 25.0
"""Estimated seconds of one core above which prepare uses Ray Data: about 170,000 rows of arrays or 16,000 CIF files.

Measured on 2 cores (bench data --rows "" --cif_rows N): Ray's start and end cost about 10 s, after which both cores
work; 24,000 CIF texts took one process 38.6 s and Ray Data 30.6 s. More cores repay the start sooner.
"""


def prepare_dataset(
    dataset: str | DatasetInfo,
    data_dir: Path,
    *,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    executor: Executor = "auto",
) -> PreparedDataset:
    """Make data_dir/<name>/{train,val,test}/*.parquet and dataset.json, or reuse them if they are there already.

    strict: a single rejected row is an error. allow_pickle: read the sets that are published as pickles (Matformer's
    elastic ones), through an unpickler that admits plain data only; not needed once they are prepared. progress:
    called with what is done, rows done, rows in all. executor: "process" and "ray" force one way to work; the files
    are the same bytes either way. Raises DataError.
    """
    info = find_dataset(dataset, data_dir) if isinstance(dataset, str) else dataset
    source = open_registered(info, data_dir, progress or _silent, allow_pickle=allow_pickle)
    return prepare_from(source, info, data_dir, strict=strict, progress=progress, executor=executor)


def prepare_from(
    source: Source,
    info: DatasetInfo,
    data_dir: Path,
    *,
    strict: bool = False,
    progress: Progress | None = None,
    executor: Executor = "auto",
) -> PreparedDataset:
    """prepare_dataset from an opened source; ``info`` names the set and its recipe."""
    check_name(info.name)
    if readable(str(data_dir)) != str(data_dir):
        raise DataError(f"{data_dir}: its name is not UTF-8, and Parquet files are written under no such name")
    try:
        wanted = fingerprint(source, info)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    ready = _ready(data_dir, info.name, wanted, strict=strict)
    if ready is not None:
        return ready
    _check_targets(source)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{data_dir}: cannot be made: {error.strerror}") from error
    with locked(data_dir / f".{info.name}.lock"):
        ready = _ready(data_dir, info.name, wanted, strict=strict)
        if ready is not None:
            return ready
        job = _Job(info=info, source=source, data_dir=data_dir, fingerprint=wanted)
        try:
            check_target(job.target)
            job.run(progress or _silent, executor, strict=strict)
        except OSError as error:
            goes_on = "; started again, it goes on from there" if is_staged(job.staging) else ""
            raise DataError(f"data set {info.name}: {error}{goes_on}") from error
        return replace(load_prepared(data_dir, info.name), reused=False)  # before another command prepares it anew


def _ready(data_dir: Path, name: str, wanted: str, *, strict: bool) -> PreparedDataset | None:
    """The prepared data set if it is the wanted one, and whole: a damaged one is made again."""
    if not is_prepared(data_dir, name):
        return None
    try:
        ready = load_prepared(data_dir, name)
    except DataError:
        return None
    if ready.fingerprint != wanted or not _is_whole(ready):
        return None
    _check_strict(ready.rejected, name, strict=strict)
    return ready


def _is_whole(ready: PreparedDataset) -> bool:
    """Whether the files of every split hold as many rows as dataset.json says."""
    try:
        return all(
            sum(pq.read_metadata(file).num_rows for file in ready.split_path(split).glob("*.parquet"))
            == getattr(ready.sizes, split)
            for split in SPLITS
        )
    except (OSError, pa.ArrowInvalid):
        return False


def fingerprint(source: Source, info: DatasetInfo) -> str:
    """A digest of everything that decides the files: the source, the recipe, and the versions of schema and work."""
    parts = {
        "source": source.fingerprint(),
        "targets": [[t.name, t.unit, t.description] for t in source.targets],
        "recipe": asdict(info.recipe),
        "schema": SCHEMA_VERSION,
        "work": WORK_VERSION,
        "symprec": SYMPREC,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One preparation: where it reads and where it writes."""

    info: DatasetInfo
    source: Source
    data_dir: Path
    fingerprint: str

    @property
    def target(self) -> Path:
        return self.data_dir / self.info.name

    @property
    def staging(self) -> Path:
        return self.data_dir / f".{self.info.name}.{self.fingerprint[:12]}.staging"

    @property
    def partial(self) -> Path:
        return self.data_dir / f".{self.info.name}.{self.fingerprint[:12]}.partial"

    def run(self, progress: Progress, executor: Executor, *, strict: bool) -> None:
        """Read, work, write, publish. What an earlier run left is used if it is of the same fingerprint."""
        # Not every .NAME.*: a data set NAME.v2 has its own, and may be in the making.
        own = re.compile(rf"\.{re.escape(self.info.name)}\.([0-9a-f]{{12}}\.(staging|partial)|old)")
        for left in self.data_dir.iterdir():
            if own.fullmatch(left.name) and left.is_dir() and left != self.staging:
                shutil.rmtree(left)
        try:
            publish(self._make(progress, executor, strict=strict), self.target)
        except DataError:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise
        finally:  # what is staged is gone on with, what is half written is not
            shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.staging, ignore_errors=True)

    def _make(self, progress: Progress, executor: Executor, *, strict: bool) -> Path:
        """The finished data set, still under a hidden name."""
        store = RawStore(self.staging)
        store.fill(self.source, self._stage_from(executor), progress)
        if not store.num_rows:
            raise DataError(f"data set {self.info.name}: its source holds no rows")
        names = [target.name for target in self.source.targets]
        index = store.index(names)
        plan = assign_splits(index, names, self.info.recipe, every_target=self.source.every_target)
        index = with_ids(index, plan.ids)
        _check_strict(_rejected(plan.problems, index), self.info.name, strict=strict)
        if self.info.ends and plan.ends != self.info.ends:
            raise DataError(
                f"data set {self.info.name}: the splits begin and end with {plan.ends}, the published ones with "
                f"{self.info.ends}: the source holds other rows than the published ones"
            )
        out = self.partial
        # Closed at once if writing fails, so that a Ray started for it ends too.
        with closing(with_ray(store, progress) if store.staged else in_process(store, progress)) as processed:
            description = self._write(out, processed, plan, index, strict=strict)
        (out / FILE_NAME).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return out

    def _stage_from(self, executor: Executor) -> int:
        """Rows from which the source is staged for Ray."""
        if executor == "ray":
            return 1
        return math.ceil(RAY_FROM_SECONDS / self.source.seconds_per_row) if executor == "auto" else 1 << 62

    def _write(
        self, out: Path, processed: Iterator[pa.Table], plan: Assignment, index: pa.Table, *, strict: bool
    ) -> dict[str, Any]:
        problems = dict(plan.problems)
        start = 0
        metadata = {NAME_KEY: self.info.name, FINGERPRINT_KEY: self.fingerprint}
        with DatasetWriter(out, self.source.targets, metadata) as writer:
            for table in processed:
                found = enumerate(table.column("problem").to_pylist(), start=start)
                problems = {i: p for i, p in found if p is not None} | problems
                codes = plan.codes[start : start + len(table)].copy()
                codes[[i - start for i in problems if start <= i < start + len(table)]] = -1
                writer.add(with_ids(table, plan.ids, start), codes)
                start += len(table)
        rejected = _rejected(problems, index)
        _check_strict(rejected, self.info.name, strict=strict)
        self._check_sizes(writer, rejected)
        return self._describe(writer, plan, rejected, start)

    def _check_sizes(self, writer: DatasetWriter, rejected: list[RejectedRow]) -> None:
        sizes = [writer.splits[name].rows for name in SPLITS]
        if min(sizes) < 1:
            reasons = first_reasons([row.reason for row in rejected])
            raise DataError(
                f"data set {self.info.name}: a split is left without rows {sizes}; "
                f"rejected: {reasons}; the first: {_told(rejected[0])}"
            )
        expected = self.info.expected
        if expected is None:
            return
        published = [expected.train, expected.val, expected.test]
        if sum(sizes) + len(rejected) < sum(published) or any(a > b for a, b in zip(sizes, published, strict=True)):
            raise DataError(
                f"data set {self.info.name}: splits of {sizes} rows and {len(rejected)} rejected ones, but "
                f"{published} are published: the source holds other rows than the published ones"
            )

    def _describe(
        self, writer: DatasetWriter, plan: Assignment, rejected: list[RejectedRow], read: int
    ) -> dict[str, Any]:
        values = writer.train_values
        atoms = np.concatenate(writer.atoms)
        sizes = {name: writer.splits[name].rows for name in SPLITS}
        return {
            "name": self.info.name,
            "fingerprint": self.fingerprint,
            "schema_version": SCHEMA_VERSION,
            "sizes": sizes,
            "targets": {
                target.name: {
                    "unit": target.unit,
                    "description": target.description,
                    **_statistics(values[:, i], target.name),
                }
                for i, target in enumerate(self.source.targets)
            },
            "elements": [symbol_of(int(z)) for z in np.flatnonzero(writer.elements) if z > 0],
            "atoms_per_cell": {
                "mean": round(float(atoms.mean()), 3),
                "min": int(atoms.min()),
                "max": int(atoms.max()),
            },
            "cells": f"primitive; translations found within {SYMPREC} Å",
            "source": self.info.source,
            "citation": self.info.citation,
            "licence": self.info.licence,
            "split": _split_rule(plan, self.info.recipe),
            "rows": {
                "read": read,
                "usable": plan.usable,
                "in_no_split": int(read - sum(sizes.values()) - len(rejected) - sum(plan.outside.values())),
                "outside_the_set": plan.outside,
            },
            "rejected": {
                "count": len(rejected),
                "reasons": count_rules([row.reason for row in rejected]),
                "rows": [asdict(row) for row in rejected],
            },
        }


def _split_rule(plan: Assignment, recipe: SplitRecipe) -> dict[str, Any]:
    """How the rows came into their splits."""
    leaves = "a row rejected for its structure leaves its split"
    if plan.own_splits:
        return {
            "rule": f"as the source names them, by a column or by files; no ratios and no seed were used; {leaves}"
        }
    rule = (
        "indices of the usable rows shuffled by Python's random; train the first, test the last, "
        f"val those before test; {leaves}"
    )
    return {"rule": rule, **asdict(recipe)}


def _statistics(values: np.ndarray[Any, np.dtype[np.float64]], name: str) -> dict[str, float | int]:
    """Statistics of one target over the training rows that have it; sums are exact, so machines agree."""
    present = [value for value in values.tolist() if not math.isnan(value)]
    if not present:
        raise DataError(f"target {name}: no training row has it")
    mean = math.fsum(present) / len(present)
    variance = math.fsum((value - mean) ** 2 for value in present) / len(present)
    return {
        "train_rows": len(present),
        "train_mean": mean,
        "train_std": math.sqrt(variance),
        "train_min": min(present),
        "train_max": max(present),
    }


def _rejected(problems: dict[int, str], index: pa.Table) -> list[RejectedRow]:
    """The rows left out for a reason, in the source's order."""
    chosen = sorted(problems)
    columns = index.select(["source_file", "source_row", "material_id"]).take(pa.array(chosen, pa.int64()))
    return [
        RejectedRow(
            file=row["source_file"], row=row["source_row"], material_id=row["material_id"] or "", reason=problems[i]
        )
        for i, row in zip(chosen, columns.to_pylist(), strict=True)
    ]


def _check_targets(source: Source) -> None:
    """Targets become columns beside the fixed ones. Raises DataError where a name is taken."""
    taken = {field.name for field in (*EXTRA_FIELDS, PART_FIELD)} | {name for name, _ in FIXED_COLUMNS}
    for target in source.targets:
        if target.name in taken:
            raise DataError(f"target {target.name!r}: the name stands twice, or is that of a column of every table")
        taken.add(target.name)


def _check_strict(rejected: Sequence[RejectedRow], name: str, *, strict: bool) -> None:
    if strict and rejected:
        raise DataError(
            f"data set {name}: {len(rejected)} rows rejected, and --strict is given; the first: {_told(rejected[0])}"
        )


def _told(row: RejectedRow) -> str:
    return printable(f"{row.file} row {row.row} {row.material_id}: {row.reason}")


def _silent(_what: str, _done: int, _total: int) -> None:
    """Progress nobody looks at."""
