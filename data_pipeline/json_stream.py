"""Records out of a JSON file of any size, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
_SPACE = " \t\r\n"
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

    def peek(self, skip: str = _SPACE) -> str:
        """The next character not in ``skip``, not consumed; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in skip:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> None:
        """Consume the character that peek returned."""
        self._at += 1

    def value(self) -> Any:  # noqa: ANN401 - any JSON value
        """Decode the next value. Raises ValueError where there is none."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._more():
                    raise
                continue
            self._at = end
            return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the text read so far may just end too early. Otherwise a large file would be read for nothing."""
        return error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _CUT

    def _more(self) -> bool:
        if self._ended:
            return False
        piece = self._stream.read(CHUNK)
        self._ended = not piece
        self._text = self._text[self._at :] + piece
        self._at = 0
        return not self._ended


def iter_records(stream: TextIO) -> Iterator[dict[str, Any] | str]:
    """The records of a JSON array, of JSON lines, or of one object whose values are records by id.

    A record of the last kind gets its key as ``material_id`` unless it has one. A string is the problem of a record
    that is no object. Raises ValueError on what is not JSON, saying where.
    """
    window = _Window(stream)
    first = window.peek(_SPACE + "\ufeff")
    if first == "[":
        window.take()
        yield from _array(window)
    elif first == "{":
        yield from _objects(window)
    else:
        raise ValueError("neither a JSON array nor JSON objects")


def _array(window: _Window) -> Iterator[dict[str, Any] | str]:
    number = 0
    while (following := window.peek(_SPACE + ",")) != "]":
        if not following:
            raise ValueError(f"the JSON array ends within or after record {number}")
        yield _record(window.value())
        number += 1


def _objects(window: _Window) -> Iterator[dict[str, Any] | str]:
    first = window.value()
    if (
        window.peek() == ""
        and first
        and all(isinstance(value, dict) for value in first.values())
        and not ({"atoms", "structure", "final_structure"} & first.keys())
    ):
        for key, value in first.items():
            yield {"material_id": key, **value}
        return
    yield first
    while window.peek():
        yield _record(window.value())


def _record(value: object) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"unreadable record: {type(value).__name__}, not an object"
