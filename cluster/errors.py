"""What the user got wrong, apart from what we got wrong."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's; its text is one line naming the file, field, value and what is allowed.

    The command line prints it as ``error: ...`` and ends with status 2, without a traceback.
    """


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
