"""Joining the Ray that RAY_ADDRESS names, or starting one of this process."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import DataError

VARIABLE = "RAY_ADDRESS"

ANSWER_SECONDS = 10.0
"""For the machine of RAY_ADDRESS to take a connection. Ray itself tries for a quarter of an hour."""

_HOST_PORT = re.compile(r"(?:ray://)?(?P<host>[^\s/:]+|\[[^\s/\]]+\]):(?P<port>\d{1,5})")


def join_or_start(joined: Mapping[str, Any] | None = None, **options: Any) -> None:  # noqa: ANN401 - ray.init's
    """``ray.init`` with the options, and with those of ``joined`` where RAY_ADDRESS names a Ray.

    DataError where RAY_ADDRESS is no address or nothing answers there.
    """
    import ray

    address = os.environ.get(VARIABLE)
    if not address:
        # Without an address Ray would join whatever cluster was last started on this machine, even one that is gone.
        ray.init(address="local", include_dashboard=False, **options)
        return
    _require_answer(address)
    try:
        ray.init(address=address, **dict(joined or {}), **options)
    except ConnectionError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{VARIABLE} {address!r}: no Ray answers there: {reason:.200}") from error


def _require_answer(address: str) -> None:
    if address in ("auto", "local"):
        return
    parts = _HOST_PORT.fullmatch(address)
    if parts is None:
        raise DataError(f"{VARIABLE} must be host:port, ray://host:port, auto or local, got {address!r}")
    try:
        with socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), timeout=ANSWER_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise DataError(f"{VARIABLE} {address!r}: no Ray answers there: {error}") from error
