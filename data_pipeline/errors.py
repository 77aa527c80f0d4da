"""The one error a user of the data pipeline can cause."""

from __future__ import annotations


class DataError(ValueError):
    """A mistake in what the user gave, or in data that came from outside.

    Its text is one line that names the file, row, field, value and what is allowed; the command line prints it as
    ``error: ...`` and ends with status 2.
    """
