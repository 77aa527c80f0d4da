"""Logging that knows which worker speaks, and the one place that writes a command's answer."""

from __future__ import annotations

import logging
import sys

PACKAGES = ("cluster", "crystalformer", "data_pipeline", "tune")
"""Ours; modules log through ``logging.getLogger(__name__)``, and other libraries' loggers are left alone."""

_HANDLER_NAME = "crystalformer"


def setup_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send our packages' messages to stderr, each line with its rank; ranks above 0 only from WARNING on.

    Calling it again replaces what the last call set.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s", "%H:%M:%S")
    )
    for package in PACKAGES:
        logger = logging.getLogger(package)
        for old in [h for h in logger.handlers if h.get_name() == _HANDLER_NAME]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
        logger.propagate = False


def say(text: str = "") -> None:
    """Write a line of a command's answer to stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
