"""Logging that knows which worker speaks, and the one place that writes a command's answer."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

from data_pipeline.text import printable_lines

PACKAGES = ("cluster", "crystalformer", "data_pipeline", "tune")
"""Ours; modules log through ``logging.getLogger(__name__)``, and other libraries' loggers are left alone."""

_STDERR, _TOLD = "crystalformer", "crystalformer told"
"""Names of our handlers."""


def escape_what_stdout_lacks() -> None:
    """Have stdout show as an escape what its encoding lacks, as stderr does: an Å where the locale is ASCII's."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def setup_logging(*, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send our packages' messages to stderr: a worker's with its rank, ranks above 0 only from WARNING on.

    Without a rank, of a command: plain lines. Calling it again replaces what the last call set.
    """
    handler = _Stderr()
    of_worker = f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"
    handler.setFormatter(_Plain() if rank is None else logging.Formatter(of_worker, "%H:%M:%S"))
    _replace(_STDERR, handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(max(level, logging.WARNING) if rank else level)


def tell_warnings(tell: Callable[[str], None] | None) -> None:
    """Hand warnings of our packages to ``tell`` as well, or to nobody any more."""
    _replace(_TOLD, None if tell is None else _Told(tell))


class _Plain(logging.Formatter):
    """``warning: message``; information without a word before it."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


class _Stderr(logging.Handler):
    """To whatever is stderr at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(printable_lines(self.format(record)) + "\n")


class _Told(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(_Plain())
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(self.format(record))


def _replace(name: str, handler: logging.Handler | None) -> None:
    """Let ``handler``, or none, be the one of that name in each of our packages' loggers."""
    if handler is not None:
        handler.set_name(name)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        for old in [h for h in logger.handlers if h.get_name() == name]:
            logger.removeHandler(old)
        if handler is not None:
            logger.addHandler(handler)


def say(text: str = "") -> None:
    """Write a line of a command's answer, or several, to stdout, at once; what cannot be seen in them as escapes."""
    sys.stdout.write(printable_lines(text) + "\n")
    sys.stdout.flush()
