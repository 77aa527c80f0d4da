"""From a registered name, or a path of the user's, to the source that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.authors_layout import RAW_PICKLE, raw_pickles
from data_pipeline.download import Progress
from data_pipeline.errors import DataError
from data_pipeline.formats.compressed import ENDINGS
from data_pipeline.formats.unpickle import check_pickle
from data_pipeline.info import DatasetInfo, SourceKind
from data_pipeline.prepared import is_prepared
from data_pipeline.sources.base import Source
from data_pipeline.sources.embedded import EmbeddedSource
from data_pipeline.sources.folder import INDEX, FolderSource
from data_pipeline.sources.named_splits import splits_of_files
from data_pipeline.sources.records import RecordSource, is_pickle, is_records
from data_pipeline.sources.remote import RemoteSource
from data_pipeline.sources.structures import StructureTableSource, are_structure_tables
from data_pipeline.splits import SPLITS

_KINDS = (
    f"a folder of CIF or POSCAR files with {INDEX}, a file .csv, .json or .jsonl ({', '.join(ENDINGS)} too), "
    f".parquet or .pkl, a folder of such files, "
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
    raw = raw_pickles(path)
    if raw:  # a prepared data set may lie beside them
        missing = next((split for split in SPLITS if split not in raw.values()), None)
        if missing is not None:
            raise DataError(f"{path / missing / RAW_PICKLE}: not found, though {next(iter(raw))} is there")
        check_pickle(str(path), allow_pickle=allow_pickle)
        return RecordSource(raw, targets)
    if is_prepared(path.parent, path.name) and (path / SPLITS[0]).is_dir():
        raise DataError(f"{path}: is a prepared data set, not a source; train on it with --dataset {path.name}")
    return _open_files(_files_of_one_kind(path), targets)


def _open_file(path: Path, targets: Sequence[str], *, allow_pickle: bool) -> Source:
    if not is_records(path):
        raise DataError(f"{path}: unknown kind of file; --source takes {_KINDS}")
    if is_pickle(path):
        check_pickle(str(path), allow_pickle=allow_pickle)
    return _open_files({path: None}, targets)


def _open_files(files: Mapping[Path, str | None], targets: Sequence[str]) -> Source:
    if _is_parquet(next(iter(files))) and are_structure_tables(list(files)):
        return StructureTableSource(files, targets)
    return RecordSource(files, targets)


def _files_of_one_kind(folder: Path) -> dict[Path, str | None]:
    """The files of records in a folder, in order, each with the split it is named after if any.

    Raises DataError where there are none, and for mixtures of kinds: which of them are the data is not ours to guess.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_records(file))
    if not files:
        raise DataError(f"{folder}: nothing to read in it; --source takes {_KINDS}")
    pickled = next((file for file in files if is_pickle(file)), None)
    if pickled is not None:
        raise DataError(f"{pickled}: a pickle is read only where it is given itself; give it, or take it away")
    other = next((file for file in files if _is_parquet(file) != _is_parquet(files[0])), None)
    if other is not None:
        raise DataError(f"{folder}: {files[0].name} and {other.name} are of two kinds; give one, or take one away")
    return splits_of_files(files)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"
