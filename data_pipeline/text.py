"""Text as files and tables can hold it, and as a terminal can show it."""

from __future__ import annotations

import unicodedata

_LINE_ENDS = ("Zl", "Zp")


def readable(text: str) -> str:
    """``text`` with a backslash escape for every half of a character, which cannot be written in UTF-8.

    Names of files and folders have one for each byte that is not UTF-8, as "\\udcff"; JSON may escape one, as
    "\\ud83d". Any other text is returned as it is.
    """
    return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """``text`` with a backslash escape for every character that is not seen but may be obeyed, line breaks included.

    Ids and names in other people's files may hold what clears a terminal, or a line that looks like ours.
    """
    if text.isprintable():
        return text
    return "".join(char.encode("unicode_escape").decode() if _obeyed(char) else char for char in text)


def _obeyed(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] == "C" or category in _LINE_ENDS


def printable_lines(text: str) -> str:
    """Each line of ``text`` as ``printable`` has it."""
    return "\n".join(map(printable, text.split("\n")))
