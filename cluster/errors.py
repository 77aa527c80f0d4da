"""What the user got wrong, apart from what we got wrong."""

from __future__ import annotations

import re

_LOGIN = re.compile(r"://(?:[^\s/?#:]*:\S*|[^\s/?#]*)@")
"""User and password of a URL. A slash does not end the password, though it should not stand there: secrets of object
stores hold slashes, and people paste them as they are."""


class UserError(ValueError):
    """A mistake of the user's; its text is one line naming the file, field, value and what is allowed.

    The command line prints it as ``error: ...`` and ends with status 2, without a traceback.
    """


def without_credentials(text: str) -> str:
    """``text`` with ``***`` for user and password of every URL in it; rather too much of it than too little."""
    return _LOGIN.sub("://***@", text)


def in_a_line(error: BaseException) -> str:
    """Its kind and the last line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "errors.pydantic.dev" in lines[-1]:  # as of DeepSpeed's settings: key, problem, address of a manual
        lines = [": ".join(lines[-3:-1])]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


class Incomplete(Exception):  # what could be done was done
    """Done but for some of the inputs, each of which has been told; the command line prints how many."""

    exit_status = 1


class RunFailed(Exception):  # named as what became of the run
    """A run that ended without its result, for a reason outside the command: divergence, a full disk, lost workers.

    Its text is one line; the command line prints it as ``error: ...`` and ends with status 1.
    """

    exit_status = 1
