"""Measuring in processes of their own: however one of them ends, what it had found stays, and the rest goes on.

A process does tasks one after another and says on its stdout, a line of JSON each, which tasks it has, which of
them it begins and which row that gave. ``run_tasks`` follows it: where it dies in a task, or its GPU can no longer be
used, a row says so and another process begins with the next task. Needs Python alone: the process that follows never
touches a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import IO, Any, NamedTuple, TextIO

Row = dict[str, Any]

SPOILED = 3
"""Exit status of a process that has said what went wrong and leaves the next tasks to another one."""

LAST_WORDS = 60
"""Lines of a dead process's stderr that its row keeps."""

LOOK_SECONDS = 0.2
"""How often a silent process is looked at: a compiler's workers may keep its stdout open when it is gone."""


class Task(NamedTuple):
    """One thing to measure; ``run`` gives its row."""

    name: str
    run: Callable[[], Row]


def summary_of(error: BaseException) -> str:
    """Type and text of an error, of a long text its beginning and end: a compiler's message ends with the reason."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if len(lines) > 8:
        lines = [*lines[:4], "...", *lines[-4:]]
    return "\n".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:]])[:2000]


def own_output() -> TextIO:
    """This process's stdout, for rows alone: what libraries print there goes to stderr from now on."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return kept


def serve(tasks: Sequence[Task], first: int, out: TextIO, sound: Callable[[], bool]) -> int:
    """Do the tasks from number ``first`` on and write their rows to ``out``; returns the exit status.

    An error of a task is its row. ``sound`` then says whether this process can go on: after an illegal memory access
    every further call to the GPU fails.
    """
    _say(out, {"tasks": [task.name for task in tasks]})
    for number, task in enumerate(tasks[first:], first):
        _say(out, {"task": number})
        try:
            _say(out, {"row": {"what": task.name, **task.run()}})
        except Exception as error:  # noqa: BLE001 - whatever one task raises, the others are to be measured
            _say(out, {"row": {"what": task.name, "passed": False, "error": summary_of(error)}})
            if not sound():
                return SPOILED
    _say(out, {"done": True})
    return 0


def _say(out: TextIO, message: Row) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def run_tasks(command: Callable[[int, float], list[str]], limit: float) -> Generator[Row, None, None]:
    """Rows of a process's tasks as they are found; a row of its own, with passed False, for each that it died in.

    command(first, seconds): what to run for the tasks from number ``first`` on, in the ``seconds`` that are left.
    limit: seconds for all tasks, after which the process is killed.
    """
    end, first = time.monotonic() + limit, 0
    names: list[str] = []
    while True:
        follower = _Follower(command(first, end - time.monotonic()), first, names, end)
        try:
            yield from follower.rows()
            ending = follower.ending(limit)
        finally:
            follower.stop()
        if ending is not None:
            yield ending
        if not follower.leaves_tasks:
            return
        first, names = follower.task + 1, follower.names


class _Follower:
    """One process, from its start to its end."""

    def __init__(self, command: list[str], first: int, names: list[str], end: float) -> None:
        """Start it with the task ``first``. names: the tasks, as far as known. end: its last moment (monotonic)."""
        self.task, self.names = -1, names
        self._first, self._end = first, end
        self._told = self._done = self._timed_out = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        # A group, so that the processes it starts end with it; not a session, so that it ends with its terminal's.
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._stderr, process_group=0)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def rows(self) -> Iterator[Row]:
        """The rows as they come, until it ends or its time is up."""
        while (line := self._next_line()) is not None:
            try:
                message = json.loads(line)
            except ValueError:  # cut off by a sudden end, or not from us
                sys.stderr.write(line.decode(errors="replace"))
                continue
            if "row" in message:
                self._told = True
                yield message["row"]
            elif "task" in message:
                self.task, self._told = message["task"], False
            self.names = message.get("tasks", self.names)
            self._done = message.get("done", False)

    def _next_line(self) -> bytes | None:
        """The next line; None at the end of them or of the time."""
        while True:
            ended, left = self._process.poll() is not None, self._end - time.monotonic()
            try:
                return self._lines.get(timeout=min(LOOK_SECONDS, max(0.0, left)))
            except queue.Empty:
                if ended:
                    return None
                if left <= 0:
                    self._timed_out = True
                    return None

    def ending(self, limit: float) -> Row | None:
        """A row for an end before its time, with the last words of stderr; None for a proper one."""
        if not self._timed_out:
            try:
                status = self._process.wait(max(0.0, self._end - time.monotonic()))
            except subprocess.TimeoutExpired:  # it has closed its stdout and hangs
                self._timed_out = True
        if self._timed_out:
            self._abort()
            left = {"left_out": self.names[max(self._first, self.task + 1) :]}
            why = f"stopped: the section's {limit:.0f} s were over"
        elif (status == 0 and self._done) or (status == SPOILED and self._told):
            return None
        else:
            left = {}
            why = f"ended with status {status}" if status >= 0 else f"ended by {signal.strsignal(-status)}"
        words = self._last_words()
        if words and not self._timed_out:  # an error's text is the last line of its traceback
            why += f": {words.splitlines()[-1][:200]}"
        return {"what": self._name, "passed": False, "error": why, **left, "stderr": words}

    @property
    def leaves_tasks(self) -> bool:
        """Whether another process is to go on: this one died in a task, or after the error of one."""
        return not self._done and not self._timed_out and self.task >= self._first

    @property
    def _name(self) -> str:
        return self.names[self.task] if 0 <= self.task < len(self.names) else "start"

    def _abort(self) -> None:
        """Have it say where it is (python -X faulthandler) before it is killed."""
        self._process.send_signal(signal.SIGABRT)
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"{self._name}: no answer to SIGABRT\n")

    def _last_words(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2**16))
        return "\n".join(self._stderr.read().decode(errors="replace").splitlines()[-LAST_WORDS:])

    def stop(self) -> None:
        """Kill what is left of it and of the processes that it started."""
        with contextlib.suppress(ProcessLookupError):  # all of them had ended
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:  # a driver may hold it; the other sections need not wait for that
            sys.stderr.write(f"{self._name}: process {self._process.pid} could not be killed\n")
        self._stderr.close()
