"""Predictions as a table: for people, or in a file of any length."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from cluster import lock
from cluster.errors import UserError
from cluster.run.report import json_ready
from data_pipeline.text import printable, readable

Cell = str | float

FORMATS = (".csv", ".jsonl", ".parquet")
TEXT_COLUMNS = ("id", "formula", "warning")
"""The others hold numbers."""


def check_output(path: Path) -> None:
    """UserError for a file of no known format, or whose name is no text: pyarrow writes none such."""
    if readable(str(path)) != str(path):
        raise UserError(f"output must have a name in UTF-8, got {readable(str(path))!r}")
    if path.suffix not in FORMATS:
        raise UserError(f"output must end in {', '.join(FORMATS)}, got {str(path)!r}")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Within, no other command makes ``output``; UserError where one does, or nothing can be written there."""
    file = output.with_name(f".{output.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.claimed(file, patient=False))
        except lock.InUseError as error:
            raise UserError(f"another command is writing {output}") from error
        except OSError as error:
            raise UserError(f"output {output}: {error.strerror or error}") from error
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()  # while it is held: who takes it next looks whether it is still there


class TableFile:
    """A file of predictions in the format of its suffix, written piece by piece; it appears when it is whole.

    Of two commands that write one, the later one's stays. A context manager. UserError where it cannot be written.
    """

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self._path, self._header = path, list(header)
        self._partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
        self._writer: Any = None
        self._text: Any = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.suffix == ".parquet":
                self._writer = self._parquet_writer()
            else:
                self._text = self._partial.open("w", encoding="utf-8", newline="")
                if self._path.suffix == ".csv":
                    self._writer = csv.writer(self._text, lineterminator="\n")
                    self._writer.writerow(self._header)
        except OSError as error:
            with suppress(OSError):
                self._partial.unlink()
            raise self._failed(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._text is not None:
                self._text.close()
            else:
                self._writer.close()
            if kind is None:
                with self._partial.open("rb+") as file:
                    os.fsync(file.fileno())
                self._partial.replace(self._path)
        except OSError as failure:
            raise self._failed(failure) from failure
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, rows: Sequence[Sequence[Cell]]) -> None:
        """Append rows; numbers have eight digits in CSV and all of them elsewhere."""
        try:
            if self._path.suffix == ".parquet":
                self._add_parquet(rows)
            elif self._path.suffix == ".csv":
                self._writer.writerows([_shown(cell, 8) for cell in cells] for cells in rows)
            else:
                lines = (
                    json.dumps(json_ready(dict(zip(self._header, cells, strict=True))), ensure_ascii=False)
                    for cells in rows
                )
                self._text.writelines(line + "\n" for line in lines)
        except OSError as error:
            raise self._failed(error) from error

    def _parquet_writer(self) -> Any:  # noqa: ANN401 - pyarrow has no types
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = [pa.string() if name in TEXT_COLUMNS else pa.float64() for name in self._header]
        return pq.ParquetWriter(self._partial, pa.schema(list(zip(self._header, kinds, strict=True))))

    def _add_parquet(self, rows: Sequence[Sequence[Cell]]) -> None:
        import pyarrow as pa

        schema = self._writer.schema
        columns = [pa.array([cells[i] for cells in rows], field.type) for i, field in enumerate(schema)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"output {self._path}: {error.strerror or error}")


def as_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned columns for people, numbers with five digits; the warnings only where there are any.

    What cannot be seen in an id is an escape here, though not in a file.
    """
    kept = len(header) if any(cells[-1] for cells in rows) else len(header) - 1
    lines = [[printable(_shown(cell, 5)) for cell in cells[:kept]] for cells in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(kept)]
    padded = ("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _shown(cell: Cell, digits: int) -> str:
    return cell if isinstance(cell, str) else f"{cell:.{digits}g}"
