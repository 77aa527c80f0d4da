"""Tables of any length on disk: appended piece by piece, kept as one Arrow record batch, read through a memory map.

One record batch means one chunk a column, so that any row is found by its offset and nothing is joined or copied when
the file is opened. Arrow's own writer needs a record batch whole; here every buffer of it grows in a file of its own,
and the finished buffers are written from their maps, so that no process ever holds more than a piece.
"""

from __future__ import annotations

import glob
import mmap
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError

LEFT_SECONDS = 86_400.0
"""A work folder untouched for so long belongs to nobody: every piece is written to it as it is found."""


def write_table(path: Path, schema: pa.Schema, pieces: Iterable[pa.Table], metadata: Mapping[str, str]) -> None:
    """Write ``pieces``, one after another, to an Arrow file of one record batch; the file appears when it is whole.

    Missing values become NaN, empty lists or zeros. UserError where the disk is full or the folder is read-only.
    """
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        # Not the process's number: pods that share a volume have the same ones.
        with tempfile.TemporaryDirectory(prefix=_prefix(path), dir=path.parent, ignore_cleanup_errors=True) as work:
            _write(path, Path(work), schema, pieces, metadata)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _sweep(path: Path) -> None:
    """Delete what writers of ``path`` that were killed have left, once nothing was written there for a day."""
    for left in path.parent.glob(glob.escape(_prefix(path)) + "*"):
        with suppress(OSError):  # another writer sweeps, is done, or is another user whose files these are
            last = max(file.stat().st_mtime for file in (left, *left.iterdir()))
            if time.time() - last > LEFT_SECONDS:
                shutil.rmtree(left)


def _write(
    path: Path, work: Path, schema: pa.Schema, pieces: Iterable[pa.Table], metadata: Mapping[str, str]
) -> None:
    columns = [_Column(field.type, work / str(i)) for i, field in enumerate(schema)]
    for piece in pieces:
        for name, column in zip(schema.names, columns, strict=True):
            for array in piece.column(name).chunks:
                column.append(array)
    own = {key.encode(): value.encode() for key, value in metadata.items()}
    batch = pa.RecordBatch.from_arrays(
        [column.finish() for column in columns], schema=schema.with_metadata({**(schema.metadata or {}), **own})
    )
    partial = work / "whole.arrow"
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)


class _Column:
    """A column that grows on disk: its values, or its offsets and the columns below it."""

    def __init__(self, kind: pa.DataType, stem: Path) -> None:
        self._kind, self._path, self._rows = kind, stem, 0
        self._file = stem.open("wb")
        self._end = 0
        below = [kind.field(i).type for i in range(kind.num_fields)]
        self._below = [_Column(child, stem.with_name(f"{stem.name}.{i}")) for i, child in enumerate(below)]
        self._text = _Column(pa.uint8(), stem.with_name(f"{stem.name}.text")) if _has_text(kind) else None
        if self._has_offsets:
            self._file.write(np.zeros(1, self._offset_type).tobytes())

    @property
    def _has_offsets(self) -> bool:
        return _has_text(self._kind) or pa.types.is_list(self._kind) or pa.types.is_large_list(self._kind)

    @property
    def _offset_type(self) -> type[np.int32] | type[np.int64]:
        large = pa.types.is_large_list(self._kind) or pa.types.is_large_string(self._kind)
        return np.int64 if large else np.int32

    def append(self, array: pa.Array) -> None:
        """Add the rows of ``array``, a slice or not."""
        self._rows += len(array)
        if self._text is not None:
            self._grow(pc.binary_length(array))
            joined = "".join(value or "" for value in array.to_pylist()).encode()
            self._text.append(pa.array(np.frombuffer(joined, np.uint8)))
        elif self._has_offsets:
            self._grow(pc.list_value_length(array))
            self._below[0].append(array.flatten())
        elif pa.types.is_fixed_size_list(self._kind):
            self._below[0].append(array.flatten())
        elif pa.types.is_struct(self._kind):
            for column, part in zip(self._below, array.flatten(), strict=True):
                column.append(part)
        else:
            missing = float("nan") if pa.types.is_floating(self._kind) else 0
            self._file.write(np.ascontiguousarray(array.fill_null(missing).to_numpy()).data)

    def _grow(self, lengths: pa.Array) -> None:
        offsets = self._end + np.cumsum(lengths.fill_null(0).to_numpy().astype(np.int64))
        self._end = int(offsets[-1]) if len(offsets) else self._end
        if self._end > np.iinfo(self._offset_type).max:
            raise UserError(f"a split holds {self._end} values of type {self._kind}: more than the type can count")
        self._file.write(offsets.astype(self._offset_type).data)

    def finish(self) -> pa.Array:
        """The whole column, mapped."""
        self._file.close()
        own = pa.memory_map(str(self._path)).read_buffer() if self._path.stat().st_size else pa.py_buffer(b"")
        children = [column.finish() for column in self._below]
        if self._text is not None:
            text = self._text.finish().buffers()[1]
            return pa.Array.from_buffers(self._kind, self._rows, [None, own, text], 0)
        bare = pa.types.is_fixed_size_list(self._kind) or pa.types.is_struct(self._kind)
        return pa.Array.from_buffers(self._kind, self._rows, [None] if bare else [None, own], 0, children=children)


def _has_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


class MappedTable:
    """The table of an Arrow file, read from disk as it is touched; ``release`` lets go of what was read.

    The page cache keeps it, for all processes of the node together, as long as nothing else needs the memory.
    """

    def __init__(self, path: Path) -> None:
        """UserError where the file cannot be read here."""
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: cannot be read on this node: {error.strerror or error}") from error
        self.table: pa.Table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()

    @classmethod
    def matching(cls, path: Path, metadata: Mapping[str, str]) -> Self | None:
        """The table of ``path`` if it is there and was written with ``metadata``."""
        if not path.is_file():
            return None
        try:
            mapped = cls(path)
        except (pa.ArrowInvalid, ValueError):
            return None
        found = mapped.table.schema.metadata or {}
        return mapped if all(found.get(k.encode()) == v.encode() for k, v in metadata.items()) else None

    def release(self) -> None:
        """Give up this process's hold of the pages it has read; views stay valid and read them again."""
        self._map.madvise(mmap.MADV_DONTNEED)
