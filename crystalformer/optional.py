"""Libraries that are used where they are there: numba and triton."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec


def problem(name: str) -> str | None:
    """Why the library ``name`` cannot be used, in words that follow its name; None where it is loaded now."""
    if sys.modules.get(name) is not None:  # asked first: torch.compile before 2.13 does not trace find_spec
        return None
    return "is not installed" if find_spec(name) is None else _broken(name)


@cache
def _broken(name: str) -> str | None:
    try:
        import_module(name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # as where NumPy is too new for numba
        return f"cannot be loaded ({' '.join(str(error).split()):.200})"
    return None
