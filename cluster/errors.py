"""What the user got wrong, apart from what we got wrong."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's; its text is one line naming the file, field, value and what is allowed.

    The command line prints it as ``error: ...`` and ends with status 2, without a traceback.
    """
