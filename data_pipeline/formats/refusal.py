"""Why a structure is refused, though its text could be read."""

from __future__ import annotations

TOO_DEEP = "JSON within JSON, too deep to be a structure"
"""Instead of what Python says of its own recursion."""


class Refusal(ValueError):
    """What was read is, or may be, another crystal than the one that was meant.

    Its text is one line, "rule: details", as the problems of rows are.
    """


def one_line(error: BaseException) -> str:
    """The kind and text of a parser's error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
