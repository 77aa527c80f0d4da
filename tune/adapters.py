"""Ray Tune's three questions, answered by the book: what to try next, what to stop, and when to end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.tune import Stopper
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tune.book import Book
from tune.worker import WISH_SECONDS


class Ending(Stopper):
    """Ends all trials where the search is to end: its book was closed on a signal, or its time is up."""

    def __init__(self, deadline: float | None, book: Book, library: Any) -> None:  # noqa: ANN401 - a Ray actor handle
        self._deadline, self._book, self._library = deadline, book, library

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial by itself: that is the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Whether to end; what is under way is then left to be resumed, from checkpoints that are written now."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._book.close()
        if self._book.closed and self._library is not None:
            with suppress(RayError):  # the library is gone, which may be why the search ends
                ray.get(self._library.end.remote(), timeout=WISH_SECONDS)
            self._library = None
        return self._book.closed


class StudySearcher(Searcher):
    """Ray Tune's way to ask for the next trial."""

    def __init__(self, book: Book) -> None:
        super().__init__(metric="errors", mode="min")
        self._book = book

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config."""
        suggestion = None
        with self._book.watching():
            suggestion = self._book.next()
        if suggestion is None:
            return str(Searcher.FINISHED)
        return {"number": suggestion.number, "settings": suggestion.settings}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: FBT001, FBT002 - Ray Tune's signature
        """Nothing: the scheduler knows more about how it ended."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is saved as it grows."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class StudyScheduler(FIFOScheduler):
    """Ray Tune's way to tell of results, and to hear which trial is to end."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:  # noqa: ANN401
        """An epoch has ended: the trial goes on, or is worse than most were at this epoch."""
        go_on = False
        with self._book.watching():
            self._book.runs_in(result["number"], result["process"])
            go_on = self._book.epochs_done(result["number"], result["errors"], result["scores"])
        return str(TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:  # noqa: ANN401
        """The trial has ended, one way or another."""
        with self._book.watching():
            self._tell(trial.config["number"], result)

    def _tell(self, number: int, result: Mapping[str, Any]) -> None:
        if "errors" in result:
            self._book.runs_in(number, result["process"])
            self._book.epochs_done(number, result["errors"], result["scores"])
        if result.get("ended") == "complete":
            self._book.complete(number)
        elif result.get("ended") == "failed":
            self._book.fail(number, result["reason"])
        elif result.get("ended") == "stuck":
            self._book.give_up(number, result["reason"])
        else:
            self._book.stop(number, result.get("reason", ""))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ANN401
        """Its process died; where more often than it may, the trial has failed.

        Ray Tune asks before a retry too: it has stopped the trial by then, while one that is given up still runs.
        """
        if trial.status == TuneTrial.ERROR:
            return
        with self._book.watching():
            self._book.fail(trial.config["number"], _death(trial))


def _death(trial: TuneTrial) -> str:
    """Why Ray says that a trial's process is gone, in a sentence or two."""
    file = Path(trial.error_file or "")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"its process died: {lines[-1][:300] if lines else 'Ray gives no reason'}"
