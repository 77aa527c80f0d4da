"""Memory of a process and of all that it started, as the kernel counts it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")


def family(root: int | None = None) -> list[int]:
    """The process ``root`` (this one where None) and all below it."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            children.setdefault(int(after_name[1]), []).append(int(folder.name))
    found = [os.getpid() if root is None else root]
    for process in found:
        found += children.get(process, [])
    return found


def pss_mb(processes: list[int] | None = None) -> float:
    """Proportional set size: every page counted once, however many of the processes share it."""
    total = 0
    for process in family() if processes is None else processes:
        try:
            text = (PROC / str(process) / "smaps_rollup").read_text()
        except OSError:
            continue
        total += int(text.split("Pss:")[1].split()[0]) if "Pss:" in text else 0
    return total / 1024


def resident_mb() -> float:
    """Of this process: its own memory, mapped files and shared memory. Quicker to ask for than the shares."""
    status = (PROC / "self" / "status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Peak:
    """Within, the largest sum of this process's and its descendants' memory, sampled: ``mb``."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.mb = 0.0
        self._seconds, self._done = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.mb = max(self.mb, pss_mb())

    def _watch(self) -> None:
        while not self._done.wait(self._seconds):
            self.mb = max(self.mb, pss_mb())
