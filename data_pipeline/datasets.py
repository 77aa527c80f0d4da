"""Data sets by name: what a user may ask for, answered without reading a structure and without starting anything."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.authors_layout import raw_pickles
from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo, SourceKind, TargetInfo
from data_pipeline.prepared import is_prepared, load_prepared
from data_pipeline.registry import DATASETS

__all__ = ["DatasetInfo", "ResolvedDataset", "TargetInfo", "check_name", "embedded_names", "find_dataset", "resolve"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedDataset:
    """A data set and the targets asked of it. prepared: data_dir/<name>/dataset.json is there already."""

    info: DatasetInfo
    targets: tuple[TargetInfo, ...]
    prepared: bool

    @property
    def name(self) -> str:
        """Canonical name of the data set, which is also its folder under data_dir."""
        return self.info.name

    @property
    def target_names(self) -> tuple[str, ...]:
        """Canonical names of the targets, in the order asked for."""
        return tuple(target.name for target in self.targets)


def embedded_names() -> tuple[str, ...]:
    """Names of the sets that ship with the package."""
    return tuple(info.name for info in DATASETS if info.kind is SourceKind.EMBEDDED)


def find_dataset(name: str, data_dir: Path | None = None) -> DatasetInfo:
    """The registered set called ``name`` (or having it as an alias).

    Raises DataError with the closest names, or what to do with the authors' files of one under ``data_dir``.
    """
    for info in DATASETS:
        if name == info.name or name in info.aliases:
            return info
    if data_dir is not None:
        _check_raw(name, data_dir, f"unknown data set {name!r}")
    raise DataError(f"unknown data set {name!r}; {_suggest(name, [info.name for info in DATASETS])}")


def resolve(dataset: str | None, targets: Sequence[str], data_dir: Path) -> ResolvedDataset:
    """The data set and canonical targets a user means; cheap, so that it can be asked before Ray starts.

    dataset None: the one embedded set that has all targets. A name is that of a registered set or of one prepared
    under data_dir. Raises DataError where the set or a target is unknown, ambiguous, or named twice.
    """
    if not targets:
        raise DataError("no target given; " + _embedded_targets())
    info = _only_embedded(targets) if dataset is None else _by_name(dataset, data_dir)
    found = tuple(_target_of(info, name) for name in targets)
    twice = [target.name for i, target in enumerate(found) if target in found[:i]]
    if twice:
        raise DataError(f"target {twice[0]!r} is named twice")
    return ResolvedDataset(info=info, targets=found, prepared=is_prepared(data_dir, info.name))


def check_name(name: str) -> str:
    """``name`` if it can be a data set's own name, that is a folder's. Raises DataError."""
    if not _NAME.match(name):
        raise DataError(f"data set name {name!r}: use letters, digits and . _ + -, beginning with a letter or digit")
    return name


def _by_name(name: str, data_dir: Path) -> DatasetInfo:
    known = [info.name for info in DATASETS]
    for info in DATASETS:
        if name == info.name or name in info.aliases:
            return info
    if _NAME.match(name) and is_prepared(data_dir, name):
        ready = load_prepared(data_dir, name)
        return DatasetInfo(
            name=ready.name,
            kind=SourceKind.OWN,
            targets=ready.targets,
            source=ready.source,
            citation=ready.citation,
            licence=ready.licence,
        )
    neither = f"data set {name!r} is neither registered nor prepared under {data_dir}"
    _check_raw(name, data_dir, neither)
    own = sorted(p.parent.name for p in data_dir.glob("[!.]*/dataset.json")) if data_dir.is_dir() else []
    raise DataError(
        f"{neither}; {_suggest(name, sorted({*known, *own}))} "
        f"(own data: `crystalformer prepare --source PATH --name NAME`)"
    )


def _check_raw(name: str, data_dir: Path, problem: str) -> None:
    """Raises DataError, the problem and its remedy, where the authors' programs left a data set of this name."""
    if _NAME.match(name) and (raw := raw_pickles(data_dir / name)):
        words = ["--source", str(data_dir / name), "--name", name, "--data_dir", str(data_dir), "--allow_pickle"]
        raise DataError(f"{problem}; {next(iter(raw))} is there: `crystalformer prepare {shlex.join(words)}`")


def _only_embedded(targets: Sequence[str]) -> DatasetInfo:
    embedded = [info for info in DATASETS if info.kind is SourceKind.EMBEDDED]
    having = [info for info in embedded if all(info.find_target(name) for name in targets)]
    if len(having) == 1:
        return having[0]
    if having:
        names = ", ".join(info.name for info in having)
        raise DataError(f"targets {', '.join(targets)} are in several data sets: {names}; choose one with --dataset")
    unknown = next((t for t in targets if not any(info.find_target(t) for info in embedded)), None)
    if unknown is None:
        raise DataError(f"no single embedded data set has all of {', '.join(targets)}; {_embedded_targets()}")
    elsewhere = [info.name for info in DATASETS if info.find_target(unknown)]
    hint = f"; over the network: --dataset {' or '.join(elsewhere)}" if elsewhere else ""
    raise DataError(f"unknown target {unknown!r}; {_embedded_targets()}{hint}")


def _target_of(info: DatasetInfo, name: str) -> TargetInfo:
    target = info.find_target(name)
    if target is None:
        raise DataError(f"data set {info.name} has no target {name!r}; it has {', '.join(info.target_names)}")
    return target


def _embedded_targets() -> str:
    sets = [info for info in DATASETS if info.kind is SourceKind.EMBEDDED]
    return "the embedded data sets have " + ", ".join(f"{', '.join(i.target_names)} ({i.name})" for i in sets)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
