"""What went wrong with a trial: the doing of its own settings, or what every other trial would meet as well.

The first is a result of the search. The second is none: recorded as such it would cost all trials that are left,
within seconds, so the search ends with the reason instead and can go on from there.
"""

from __future__ import annotations

import errno

from ray.exceptions import RayError, RayTaskError

from cluster.errors import RunFailed, UserError
from cluster.worker.saving import NOT_WRITTEN
from data_pipeline.errors import DataError


class NoTrialCan(Exception):  # no error of this trial
    """What a trial needs is not there, for it or any other; the text says why in a line."""


def without_data(error: RayError) -> Exception:
    """Why a trial did not get its data: NoTrialCan; MemoryError where its own neighbour lists were too large."""
    cause = cause_of(error)
    return cause if isinstance(cause, MemoryError) else NoTrialCan(f"the trials' data cannot be had: {told(cause)}")


def cause_of(error: Exception) -> Exception:
    """What was raised in another process: Ray's error of a task repeats all of that one's traceback."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def of_every_trial(error: Exception) -> bool:
    """Whether others would fail alike. What a user can mend is no trial's own: its settings were checked before."""
    if isinstance(error, OSError):
        return error.errno != errno.ENOMEM
    if isinstance(error, RunFailed):
        return str(error).startswith(NOT_WRITTEN)
    return isinstance(error, NoTrialCan | UserError | DataError)


def told(error: Exception) -> str:
    """The error in a line, as people are told it."""
    if isinstance(error, RunFailed | UserError | DataError | NoTrialCan):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    if isinstance(error, RayError):  # Ray goes on with identities of its own
        text = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"
