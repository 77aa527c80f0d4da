"""Sources made of records with named fields: CSV, JSON, JSON lines, Parquet, and pickles of lists of records."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.formats.compressed import DAMAGED, ENDINGS, inner_name, open_bytes
from data_pipeline.formats.json_stream import NO_TEXT, UNREADABLE, iter_records
from data_pipeline.formats.refusal import TOO_DEEP
from data_pipeline.formats.unpickle import read_pickle
from data_pipeline.info import TargetInfo
from data_pipeline.sources.base import ARRAY_SECONDS, TEXT_SECONDS, files_digest
from data_pipeline.sources.fields import Place, choose_targets, holds_text, to_record
from data_pipeline.sources.raw import ROWS_PER_TABLE, TEXTS_PER_TABLE, Record, raw_tables
from data_pipeline.text import readable

SAMPLE = 100
"""Records looked at to tell which fields are targets."""
PICKLE = ".pkl"
_TEXTS = (".csv", ".json", ".jsonl")
SUFFIXES = (*_TEXTS, *(f"{suffix}{packed}" for suffix in _TEXTS for packed in ENDINGS), ".parquet", PICKLE)
LINE_LIMIT = 1 << 28
"""Characters of a line, or of a field of a CSV file: a small compressed file may hold any number of them."""
_BROKEN = "unreadable record: "


class RecordSource:
    """Files of records: one, several, or one a split. A broken one is a rejected row; the others are used."""

    every_target = False

    def __init__(self, files: Mapping[Path, str | None], wanted: Sequence[str] = ()) -> None:
        """files: the split of each file, None where the recipe decides. Raises DataError without targets."""
        self.files = dict(files)
        first, sample = _sample(list(self.files))
        self.targets: tuple[TargetInfo, ...] = choose_targets(sample, wanted, readable(first.name))
        as_text = any(map(holds_text, sample[:1]))
        self.seconds_per_row = TEXT_SECONDS if as_text else ARRAY_SECONDS
        self._rows_per_table = TEXTS_PER_TABLE if as_text else ROWS_PER_TABLE

    def fingerprint(self) -> str:
        """Digest of the files."""
        return files_digest(self.files)

    def tables(self) -> Iterator[pa.Table]:
        """The records in the order of the files."""
        return raw_tables(self._records(), self.targets, self._rows_per_table)

    def _records(self) -> Iterator[Record]:
        names = Counter(path.name for path in self.files)
        for path, split in self.files.items():
            name = readable(path.name if names[path.name] == 1 else f"{split}/{path.name}")
            for row, fields in enumerate(_to_the_end(path)):
                place = Place(file=name, row=row, split=split)
                if isinstance(fields, str):
                    yield Record(file=name, row=row, material_id="", problem=fields, split=split)
                else:
                    yield to_record(fields, self.targets, place)


def is_records(path: Path) -> bool:
    """Whether a file is one of records, by its name, in which capitals mean nothing."""
    return path.name.lower().endswith(SUFFIXES)


def is_pickle(path: Path) -> bool:
    """Whether the file's name says that it is a pickle."""
    return path.suffix.lower() == PICKLE


def _sample(files: Sequence[Path]) -> tuple[Path, list[Mapping[str, Any]]]:
    """The first file that has records, and its first ones. Raises DataError where none has any and one is broken."""
    broken: DataError | None = None
    for path in files:
        sample: list[Mapping[str, Any]] = []
        try:
            sample.extend(fields for fields in islice(iter_fields(path), SAMPLE) if isinstance(fields, Mapping))
        except DataError as error:
            if is_pickle(path):
                raise
            broken = broken or error
        if sample:
            return path, sample
    if broken is not None:
        raise broken
    return files[0], []


def _to_the_end(path: Path) -> Iterator[Mapping[str, Any] | str]:
    """``iter_fields``, but what cannot be read of a file is one problem behind the records before it.

    Not of a pickle, which is read as a whole or refused.
    """
    number = 0
    try:
        for fields in iter_fields(path):
            yield fields
            number += 1
    except DataError as error:
        if is_pickle(path):
            raise
        reason = str(error).removeprefix(f"{path}: ").removeprefix("cannot be read: ")
        yield (
            f"unreadable file: broken off after {number} records: {reason}"
            if number
            else f"unreadable file: {reason}"
        )


def iter_fields(path: Path) -> Iterator[Mapping[str, Any] | str]:
    """The records of a file by field name; a string is the problem of a record that cannot be read.

    CSV and JSON may be compressed. Raises DataError where the file as a whole cannot be read.
    """
    name = inner_name(path)
    try:
        if name.endswith(".csv"):
            yield from _csv(path)
        elif name.endswith(".jsonl"):
            with _open_text(path) as stream:
                yield from (_json_line(line) for line in _lines(stream) if line.strip())
        elif name.endswith(".json"):
            with _open_text(path) as stream:
                yield from iter_records(stream)
        elif name.endswith(".parquet"):
            with path.open("rb") as file:  # pyarrow opens no path that is not UTF-8
                for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        else:
            yield from _pickle(path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found") from None
    except RecursionError:
        raise DataError(f"{path}: cannot be read: {TOO_DEEP}") from None
    except (ValueError, OSError, csv.Error, *DAMAGED) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split()):.300}") from error


def _open_text(path: Path) -> TextIO:
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="replace")


def _lines(stream: TextIO) -> Iterator[str]:
    """The lines of a file. Raises ValueError behind those before one that is longer than LINE_LIMIT."""
    while line := stream.readline(LINE_LIMIT + 1):
        if len(line) > LINE_LIMIT:
            raise ValueError(f"it holds a line of more than {LINE_LIMIT} characters")
        yield line


def _json_line(line: str) -> Mapping[str, Any] | str:
    if UNREADABLE in line:
        return f"{_BROKEN}{NO_TEXT}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"{_BROKEN}{error}"
    except RecursionError:
        return f"{_BROKEN}{TOO_DEEP}"
    return record if isinstance(record, dict) else f"{_BROKEN}{type(record).__name__}, not an object"


def _csv(path: Path) -> Iterator[Mapping[str, Any] | str]:
    csv.field_size_limit(LINE_LIMIT)
    ended = False

    def lines(stream: TextIO) -> Iterator[str]:
        nonlocal ended
        yield from _lines(stream)
        ended = True

    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="replace", newline="") as stream:
        reader = csv.reader(lines(stream))
        header = next(reader, None)
        if header is None:
            raise ValueError("it is empty")
        if any(UNREADABLE in name for name in header):
            raise ValueError(f"its heading {NO_TEXT}")
        for row in reader:
            if ended:  # the reader asks for a further line only within quotes; half a structure may well parse
                yield f"{_BROKEN}the file ends within quotes"
            elif any(UNREADABLE in field for field in row):
                yield f"{_BROKEN}{NO_TEXT}"
            elif len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            elif row:
                yield f"{_BROKEN}{len(row)} fields, but the heading has {len(header)}"


def _pickle(path: Path) -> Iterator[Mapping[str, Any] | str]:
    content = read_pickle(path)
    if not isinstance(content, list | tuple):
        raise ValueError(f"the pickle holds {type(content).__name__}, not a list of records")
    for record in content:
        yield record if isinstance(record, Mapping) else f"{_BROKEN}{type(record).__name__}, not a dictionary"
