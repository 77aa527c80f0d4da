"""Doing something as another user of the machine, whom root alone can become."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")


def as_nobody(folder: Path, act: Callable[[], object]) -> int:
    """0 where ``act`` came to its end in a process of nobody's, who may write in ``folder``."""
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.stat().st_mode & 0o001:
            break
        parent.chmod(parent.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - told, in a process that ends here
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
