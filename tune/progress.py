"""What a search says while it runs: a line for every trial that ends, a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from cluster.run.progress import OptionalBar
from cluster.run.report import with_unit
from data_pipeline.text import printable
from tune.book import TrialRecord, best
from tune.folder import Search
from tune.space import Settings


def shown_settings(settings: Settings) -> str:
    """``scale_real 1.4  gauss_lb_real 0.5``."""
    return "  ".join(f"{name} {shown_value(value)}" for name, value in settings.items())


def shown_value(value: object) -> str:
    """A setting as people read it: four digits of a number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class SearchProgress(OptionalBar):
    """Shows trials as they end. Use as a context manager."""

    def __init__(self, plan: Search, unit: str, stream: TextIO | None = None) -> None:
        self._plan, self._unit = plan, unit
        self._stream = stream if stream is not None else sys.stdout
        self._start = time.monotonic()
        self._done = 0
        if self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("trials"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("", total=plan.options.num_trials, text="starting")

    def begin(self, done: int, at_once: int) -> None:
        """The search begins, or goes on after ``done`` trials."""
        self._done = done
        plan, options = self._plan, self._plan.options
        self.note(
            f"search of {plan.objective} on {plan.config.data.dataset}: {options.num_trials} trials of up to "
            f"{options.epochs} epochs, {at_once} at once{f', {done} done before' if done else ''}; {plan.folder}"
        )

    def ended(self, trial: TrialRecord, trials: Sequence[TrialRecord]) -> None:
        """A trial has ended; ``trials`` are all of the study."""
        self._done += 1
        value = "no value" if trial.value is None else f"val MAE {with_unit(trial.value, self._unit)}"
        seconds = "" if trial.seconds is None else f"  {trial.seconds:.0f} s"
        text = f"trial {trial.number}  {value}  {trial.state}, epoch {trial.epochs}{seconds}  "
        self.note(text + shown_settings(trial.settings) + (f"  ({trial.reason})" if trial.reason else ""))
        leader = best(trials)
        if self._bar is not None:
            shown = (
                "" if leader is None else f"best {with_unit(leader.value or 0.0, self._unit)}, trial {leader.number}"
            )
            self._bar.update(self._task, completed=self._done, text=printable(shown))

    def data(self, requests: int, found: int) -> None:
        """How often neighbour lists had to be found."""
        self.note(
            f"neighbour lists found for {found} of {requests} trials, the others used lists that were there; "
            f"{timedelta(seconds=round(time.monotonic() - self._start))}"
        )

    def note(self, text: str) -> None:
        """Show a line that stays."""
        text = printable(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()
