"""Progress of a run: a bar on a terminal, a plain line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from cluster.run.report import with_unit
from data_pipeline.text import printable, printable_lines

STEP_LINE_SECONDS = 60.0
"""Elsewhere than on a terminal, a long epoch says where it is this often."""

WIDE_TERMINAL = 115
"""Columns from which a bar's numbers carry their units and full names."""


class OptionalBar:
    """A context manager around a bar, ``_bar``, that is there on a terminal only."""

    _bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class Progress(OptionalBar):
    """Shows metrics rows as they come. Use as a context manager; epochs count from 1."""

    def __init__(
        self,
        epochs: int,
        units: Mapping[str, str],
        *,
        done_epochs: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show ``epochs`` epochs, of which a resumed run has ``done_epochs`` behind it.

        ``units`` gives the unit of each target; ``stream`` is stdout where None; ``clock`` counts seconds.
        """
        self._epochs = epochs
        self._units = units
        self._first = done_epochs
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._start = clock()
        self._last_line = self._start
        self._wide = True
        if self._stream.isatty():
            console = Console(file=self._stream)
            self._wide = console.width >= WIDE_TERMINAL
            self._bar = RichProgress(
                TextColumn("epoch {task.fields[epoch]}/{task.total}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=24 if self._wide else 10),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True), markup=False),
                console=console,
            )
            self._task = self._bar.add_task(
                "", total=epochs, completed=done_epochs, epoch=done_epochs, text="starting"
            )

    def __enter__(self) -> Self:
        self._start = self._last_line = self._clock()
        return super().__enter__()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the metrics row of an epoch that has ended; numbers that are missing or None are passed over."""
        epoch = int(row["epoch"])
        self._show(epoch, epoch, "  ".join([*self._numbers(row), self._left(row)]))
        if seconds := row.get("seconds_of"):
            parts = "  ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
            self.note(f"epoch {epoch} took  {parts}")

    def step(self, epoch: int, done_steps: int, total_steps: int) -> None:
        """Show how far epoch ``epoch``, under way, has come."""
        completed = epoch - 1 + done_steps / max(total_steps, 1)
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, epoch=epoch)
        elif self._clock() - self._last_line >= STEP_LINE_SECONDS:
            self._show(epoch, completed, f"step {done_steps}/{total_steps}")

    def note(self, text: str) -> None:
        """Show a line that stays, above the bar where there is one."""
        text = printable_lines(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def _show(self, epoch: int, completed: float, text: str) -> None:
        text = printable(text)  # units are written as the user's table has them
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, epoch=epoch, text=text)
        else:
            self._write(f"epoch {epoch}/{self._epochs}  {text}")

    def _write(self, text: str) -> None:
        self._last_line = self._clock()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _numbers(self, row: Mapping[str, Any]) -> list[str]:
        texts = []
        if row.get("train_loss") is not None:
            texts.append(f"loss {row['train_loss']:.4f}")
        for name, value in (row.get("val_mae") or {}).items():
            if value is not None:
                shown = with_unit(value, self._units.get(name, ""))
                texts.append(f"val_mae {name} {shown}" if self._wide else f"val {name} {value:.4f}")
        if row.get("structures_per_s") is not None:
            texts.append(f"{row['structures_per_s']:.0f}{' structures/s' if self._wide else '/s'}")
        return texts

    def _left(self, row: Mapping[str, Any]) -> str:
        """Time left at the mean pace of the run's epochs, which leaves out the start; else since this began."""
        epoch = int(row["epoch"])
        if row.get("seconds") is not None:
            pace = float(row["seconds"]) / max(epoch, 1)
        else:
            pace = (self._clock() - self._start) / max(epoch - self._first, 1)
        return f"{timedelta(seconds=round(pace * max(self._epochs - epoch, 0)))} left"


@contextmanager
def counting(
    stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function of (what is counted, done, total) that shows it.

    On a terminal a bar; elsewhere a line as each thing begins to be counted and every STEP_LINE_SECONDS after.
    """
    stream = stream if stream is not None else sys.stdout
    if not stream.isatty():
        yield _counting_lines(stream, clock)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with RichProgress(*columns, console=Console(file=stream), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def _counting_lines(stream: TextIO, clock: Callable[[], float]) -> Callable[[str, int, int], None]:
    last: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = clock()
        if what not in last or now - last[what] >= STEP_LINE_SECONDS:
            last[what] = now
            stream.write(f"{what} {done}/{total}\n")
            stream.flush()

    return show
