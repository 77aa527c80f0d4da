"""The published sets: JARVIS' zipped JSON files and Matformer's elastic pickles, from figshare."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.download import Progress, download
from data_pipeline.errors import DataError
from data_pipeline.formats.compressed import DAMAGED
from data_pipeline.formats.json_stream import iter_records
from data_pipeline.formats.unpickle import check_pickle, read_pickle
from data_pipeline.info import DatasetInfo, RemoteFile, SourceKind
from data_pipeline.sources.base import ARRAY_SECONDS
from data_pipeline.sources.fields import Place, to_record
from data_pipeline.sources.raw import Record, raw_tables

DOWNLOADS = ".downloads"
"""Folder under data_dir where the files are kept, shared by the sets made from the same one."""


class RemoteSource:
    """A registered set over the network. A row counts only where every target of the set is a finite number."""

    every_target = True
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, info: DatasetInfo, data_dir: Path, progress: Progress, *, allow_pickle: bool) -> None:
        self.info = info
        self._allow_pickle = allow_pickle
        self.targets = info.targets
        self._folder = data_dir / DOWNLOADS
        self._progress = progress

    def fingerprint(self) -> str:
        """Digest of what is registered; the files themselves are checked when they are read."""
        content = {"files": [asdict(file) for file in self.info.files], "id": self.info.id_field}
        content["columns"] = [target.column for target in self.targets]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tables(self) -> Iterator[pa.Table]:
        """Download what is not there yet, and read it. Raises DataError for pickles that are not allowed."""
        if self.info.kind is SourceKind.MATFORMER:
            check_pickle(self.info.name, allow_pickle=self._allow_pickle)
        return raw_tables(self._records(), self.targets)

    def _records(self) -> Iterator[Record]:
        read = _pickled if self.info.kind is SourceKind.MATFORMER else _zipped_json
        for file in self.info.files:
            path = download(file, self._folder, self._progress)
            for row, fields in enumerate(read(path)):
                place = Place(file=file.name, row=row, split=file.split or None)
                yield self._record(fields, file, place)

    def _record(self, fields: object, file: RemoteFile, place: Place) -> Record:
        if not isinstance(fields, Mapping) or fields.get(self.info.id_field) is None:
            problem = f"unreadable record: no field {self.info.id_field!r}"
            return Record(file=file.name, row=place.row, material_id="", split=place.split, problem=problem)
        wanted = {target.column: fields.get(target.column) for target in self.targets}
        material_id = str(fields[self.info.id_field])
        return to_record({**wanted, "atoms": fields.get("atoms"), "material_id": material_id}, self.targets, place)


def _zipped_json(path: Path) -> Iterator[Mapping[str, Any] | str]:
    """The records of the one JSON file in a zip archive, whose checksum is verified while it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".json")]
            if len(names) != 1:
                raise DataError(f"{path}: {len(names)} JSON files in the archive, not 1")
            with io.TextIOWrapper(archive.open(names[0]), encoding="utf-8") as stream:
                yield from iter_records(stream)
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, *DAMAGED) as error:
        # RuntimeError: an encrypted archive; of its kinds, an unknown compression and JSON too deep
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {error}; delete it to download it again") from error


def _pickled(path: Path) -> Iterator[object]:
    content = read_pickle(path)
    if not isinstance(content, list | tuple):
        raise DataError(f"{path}: the pickle holds {type(content).__name__}, not a list of records")
    yield from content
