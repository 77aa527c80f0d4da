"""From a registered name, or a path of the user's, to the source that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.download import Progress
from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo, SourceKind
from data_pipeline.sources.base import Source
from data_pipeline.sources.embedded import EmbeddedSource
from data_pipeline.sources.folder import INDEX, FolderSource
from data_pipeline.sources.records import PICKLE, SUFFIXES, RecordSource
from data_pipeline.sources.remote import RemoteSource
from data_pipeline.sources.structures import StructureTableSource, are_structure_tables
from data_pipeline.splits import SPLITS
from data_pipeline.unpickle import check_pickle

RAW_PICKLE = "raw/raw_data.pkl"
"""Where the authors' programs leave the records of a split."""
RECORDS = tuple(suffix for suffix in SUFFIXES if suffix != PICKLE)
_KINDS = (
    f"a folder of CIF or POSCAR files with {INDEX}, a file {', '.join(SUFFIXES)}, a folder of such files, "
    f"or a folder with {{train,val,test}}/{RAW_PICKLE}"
)


def open_registered(info: DatasetInfo, data_dir: Path, progress: Progress, *, allow_pickle: bool) -> Source:
    """The source of a registered data set; reads nothing yet. Raises DataError for the user's own sets."""
    if info.kind is SourceKind.EMBEDDED:
        return EmbeddedSource(info)
    if info.kind is SourceKind.OWN:
        raise DataError(f"data set {info.name} is the user's own: prepare it from its source with --source")
    return RemoteSource(info, data_dir, progress, allow_pickle=allow_pickle)


def open_path(path: Path, targets: Sequence[str], *, allow_pickle: bool) -> Source:
    """The source at a path of the user's, by what lies there. Raises DataError where that is nothing known."""
    if path.is_file():
        return _open_file(path, targets, allow_pickle=allow_pickle)
    if not path.is_dir():
        raise DataError(f"{path}: not found; --source takes {_KINDS}")
    if (path / INDEX).is_file():
        return FolderSource(path, targets)
    raw = {path / split / RAW_PICKLE: split for split in SPLITS}
    there = [file for file in raw if file.is_file()]
    if there:
        if len(there) < len(raw):
            missing = next(file for file in raw if file not in there)
            raise DataError(f"{missing}: not found, though {there[0]} is there")
        check_pickle(str(path), allow_pickle=allow_pickle)
        return RecordSource(raw, targets)
    if parquet := sorted(file for file in path.glob("*.parquet") if file.is_file()):
        return _open_parquet(parquet, targets)
    if records := sorted(file for file in path.iterdir() if file.name.endswith(RECORDS) and file.is_file()):
        return RecordSource(dict.fromkeys(records), targets)
    raise DataError(f"{path}: nothing to read in it; --source takes {_KINDS}")


def _open_file(path: Path, targets: Sequence[str], *, allow_pickle: bool) -> Source:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file; --source takes {_KINDS}")
    if path.suffix == PICKLE:
        check_pickle(str(path), allow_pickle=allow_pickle)
    if path.suffix == ".parquet":
        return _open_parquet([path], targets)
    return RecordSource({path: None}, targets)


def _open_parquet(files: Sequence[Path], targets: Sequence[str]) -> Source:
    if are_structure_tables(files):
        return StructureTableSource(files, targets)
    return RecordSource(dict.fromkeys(files), targets)
