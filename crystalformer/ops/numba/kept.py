"""What is kept on disk of compiled functions, and what tells one version of it from another."""

from __future__ import annotations

import functools
import hashlib
import logging
import pickle
from pathlib import Path

from llvmlite import binding
from numba.core import config
from numba.core.caching import IndexDataCacheFile

_log = logging.getLogger(__name__)


class Kept(IndexDataCacheFile):
    """A function's files: made anew where a power cut has damaged them, left out where there is no room for them."""

    def load(self, key: object) -> object:
        """What was kept under ``key``; None where there is nothing, or what is there cannot be read."""
        try:
            found: object = super().load(key)
        except Exception as error:  # noqa: BLE001 - pickles cut short raise errors of every kind
            _log.info("kept code cannot be read and is compiled again: %s", error)
            return None
        return found

    def save(self, key: object, data: object) -> None:
        """Keep ``data``, in place of all versions where their index is damaged."""
        try:
            try:
                super().save(key, data)
            except (EOFError, ValueError, pickle.UnpicklingError):
                self.flush()
                super().save(key, data)
        except OSError as error:
            _log.info("compiled code is not kept: %s", error)


@functools.cache
def stamp_of_code() -> str:
    """What this package's files hold and what processor they are compiled for, as one number."""
    processor = (
        config.CPU_NAME or binding.get_host_cpu_name(),
        config.CPU_FEATURES or binding.get_host_cpu_features().flatten(),
    )
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join([repr(processor).encode(), *(file.read_bytes() for file in files)])).hexdigest()
