"""Text as files and tables can hold it."""

from __future__ import annotations


def readable(text: str) -> str:
    """``text`` with a backslash escape for every half of a character, which cannot be written in UTF-8.

    Names of files and folders have one for each byte that is not UTF-8, as "\\udcff"; JSON may escape one, as
    "\\ud83d". Any other text is returned as it is.
    """
    return text.encode(errors="backslashreplace").decode()
