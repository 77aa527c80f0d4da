"""Records out of a JSON file of any size, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
LIMIT = 1 << 30
"""Characters of a JSON value: a small compressed file may hold any number of them."""
UNREADABLE = "\ufffd"
"""What stands for bytes that are no UTF-8, where a file is opened with errors="replace"."""
NO_TEXT = "holds bytes that are not UTF-8, the encoding of text that is read"
_SPACE = " \t\r\n"
_STRUCTURES = frozenset({"atoms", "structure", "final_structure"})
_OF_A_RECORD = _STRUCTURES | {"cif", "poscar", "lattice", "sites"}
"""Fields by which an object is one record, or one structure, whatever lists it has beside them."""
_CUT = 64
"""Characters from the end within which an error may come from a word, a number or an escape cut in two."""


class _Window:
    """A text stream read piece by piece, decoded value by value."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self.readable = True

    def peek(self, skip: str = _SPACE) -> str:
        """The next character not in ``skip``, not consumed; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in skip:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(CHUNK):
                return ""

    def take(self) -> None:
        """Consume the character that peek returned."""
        self._at += 1

    def value(self) -> Any:  # noqa: ANN401 - any JSON value
        """Decode the next value. Raises ValueError where there is none.

        ``readable`` then says whether all of its bytes were text.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Twice as much at every attempt: decoding a long value costs no more than twice its length.
                if not self._may_be_cut(error) or not self._more(max(CHUNK, len(self._text) - self._at)):
                    raise
                continue
            self.readable = self._text.find(UNREADABLE, self._at, end) < 0
            self._at = end
            return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the text read so far may just end too early. Otherwise a large file would be read for nothing."""
        return error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _CUT

    def record(self) -> dict[str, Any] | str:
        """The next value, or what is wrong with it as a record."""
        value = self.value()
        if not self.readable:
            return f"unreadable record: {NO_TEXT}"
        return _checked(value)

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        if len(self._text) - self._at > LIMIT:
            raise ValueError(f"it holds a JSON value of more than {LIMIT} characters")
        piece = self._stream.read(size)
        self._ended = not piece
        self._text = self._text[self._at :] + piece
        self._at = 0
        return not self._ended


def iter_records(stream: TextIO) -> Iterator[dict[str, Any] | str]:
    """The records of JSON arrays, of JSON lines, or of one object that holds records.

    That is an object of records by id, which get their key as ``material_id`` unless they have one; one with a sole
    list of objects, as {"data": [..], "meta": ..}; or a table as pandas writes it: by columns, or as "split".
    A string is the problem of a record that is no object or not UTF-8. Raises ValueError on what is not JSON, saying
    where.
    """
    window = _Window(stream)
    first = window.peek(_SPACE + "\ufeff")
    if first == "[":
        yield from _arrays(window)
    elif first == "{":
        yield from _objects(window)
    elif first == UNREADABLE:
        raise ValueError(f"it {NO_TEXT}")
    else:
        raise ValueError("neither a JSON array nor JSON objects")


def _arrays(window: _Window) -> Iterator[dict[str, Any] | str]:
    """The records of an array, and of those that were appended to it."""
    number = 0
    while following := window.peek():
        if following != "[":
            raise ValueError(f"there is text behind the JSON array, after record {number - 1}")
        window.take()
        while (following := window.peek(_SPACE + ",")) != "]":
            if not following:
                raise ValueError(f"the JSON array ends within or after record {number}")
            yield window.record()
            number += 1
        window.take()


def _objects(window: _Window) -> Iterator[dict[str, Any] | str]:
    first = window.record()
    if window.peek() == "":
        if isinstance(first, str):
            raise ValueError(f"it {NO_TEXT}")
        yield from _of_object(first)
        return
    yield first
    while window.peek():
        yield window.record()


def _of_object(whole: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
    """The records of a sole object, which may be one itself."""
    columns, rows = whole.get("columns"), whole.get("data")
    if isinstance(columns, list) and isinstance(rows, list):
        yield from (_of_row(columns, row) for row in rows)
    elif (listed := _sole_list(whole)) is not None:
        yield from (_checked(value) for value in listed)
    elif not whole or not all(isinstance(value, dict) for value in whole.values()):
        yield whole
    elif _is_table(whole):
        for index in next(iter(whole.values())):
            yield {heading: column[index] for heading, column in whole.items()}
    elif _STRUCTURES & whole.keys():
        yield whole
    else:
        yield from ({"material_id": key, **value} for key, value in whole.items())


def _sole_list(whole: dict[str, Any]) -> list[Any] | None:
    """The one list of objects in an object that is no record itself; None where there is none, or several."""
    if _OF_A_RECORD & {key.strip().lower() for key in whole}:
        return None
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 else None


def _checked(value: object) -> dict[str, Any] | str:
    """A value as a record, or what is wrong with it."""
    return value if isinstance(value, dict) else f"unreadable record: {type(value).__name__}, not an object"


def _of_row(columns: list[Any], row: object) -> dict[str, Any] | str:
    if not isinstance(row, list) or len(row) != len(columns):
        return f"unreadable record: a row of other fields than the {len(columns)} columns"
    return dict(zip(map(str, columns), row, strict=True))


def _is_table(columns: dict[str, dict[str, Any]]) -> bool:
    """Whether these are the columns of a table whose rows are numbered, as pandas' to_json writes them."""
    rows = next(iter(columns.values())).keys()
    return len(rows) > 0 and all(row.isdecimal() for row in rows) and all(c.keys() == rows for c in columns.values())
