"""The bookkeeping of a search: what to try next, what became of each trial, when a trial is to end.

Everything is written to the study at once. A trial is known by its number in the study; its user attributes hold the
search it belongs to, its epochs and seconds, and the reason where it failed or was cut short.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import RunFailed
from cluster.settings.config import TrainConfig
from tune.space import Settings, Space

SEARCH, REASON, SECONDS, PROCESS = "search", "reason", "seconds", "process"
"""User attributes of a trial: run_name of the search, why it ended early, seconds it took, host and process."""

WORDS = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "waiting",
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """A trial as people see it."""

    number: int
    search: str
    """run_name of the search it belongs to."""
    state: str
    """One of ``WORDS``."""
    value: float | None
    """Validation MAE of the weights that it keeps, in the target's unit; None before the first epoch."""
    epochs: int
    """Done."""
    best_epoch: int | None
    seconds: float | None
    """Of training, start and data."""
    settings: Settings
    """The varied settings."""
    process: str
    """Host and process that ran it last."""
    reason: str
    """Why it failed or was cut short; empty elsewhere."""

    @property
    def ended(self) -> bool:
        """Whether it will not be gone on with."""
        return self.state in [WORDS[state] for state in ENDED]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A trial to run: its number and the varied settings."""

    number: int
    settings: Settings


class Book:
    """Suggests, records and judges. Calls from several threads are taken one after another."""

    def __init__(
        self,
        study: Study,
        space: Space,
        base: Mapping[str, Any],
        search: str,
        limit: int,
        refuse: Callable[[TrainConfig], str | None],
        ended: Callable[[TrialRecord], None],
        *,
        alone: bool = False,
    ) -> None:
        """``base``: the settings that are not varied, flat. ``limit``: trials of this search, in all.

        ``refuse`` gives the reason why a config that is right in itself shall not be run; ``ended`` hears of every
        trial that has ended. ``alone``: no other search uses the study, so that a trial of nobody's is this search's,
        killed in the moment between beginning it and signing it.
        """
        self._study, self._space, self._base = study, space, dict(base)
        self._search, self._limit, self._refuse, self._ended = search, limit, refuse, ended
        self._lock = threading.RLock()
        self._trials: dict[int, Trial] = {}
        self._values: dict[int, list[float]] = {}
        self._started: dict[int, float] = {}
        mine = (search, None) if alone else (search,)
        everything = study.get_trials(deepcopy=False)
        running = [t for t in everything if t.state is TrialState.RUNNING]
        self._to_go_on = [t for t in running if t.user_attrs.get(SEARCH) in mine]
        self._taken = len([t for t in self._own() if t.state in ENDED])
        self.closed = False
        """Nothing is recorded any more: trials under way stay as they are, to be gone on with."""
        self.problem: Exception | None = None
        """Why the search cannot go on: its study or its files cannot be written, or no trial can run."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Ray Tune writes its parts to disk for a way of resuming that is not ours: the copy holds nothing."""
        return _nothing, ()

    def _own(self) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(deepcopy=False) if t.user_attrs.get(SEARCH) == self._search]

    def _frozen(self, number: int) -> FrozenTrial:
        return next(t for t in self._study.get_trials(deepcopy=False) if t.number == number)

    @property
    def ended_trials(self) -> int:
        """Trials of this search that have ended."""
        with self._lock:
            return len([t for t in self._own() if t.state in ENDED])

    @property
    def over(self) -> bool:
        """Whether there is nothing left to run."""
        with self._lock:
            return self.ended_trials >= self._limit or self._nothing_new()

    def _nothing_new(self) -> bool:
        return not self._to_go_on and exhausted(self._study, self._space)

    # Suggesting ------------------------------------------------------------------------------------------------

    def next(self) -> Suggestion | None:
        """The next trial to run: one that was cut off, or a new one; None where the search has all its trials.

        A combination that no run can have is recorded as failed, one that ``refuse`` passes over as stopped early, as
        is one that has been trained before, with the values it had then. Once all have been tried there is no other.
        """
        with self._lock:
            while not self.closed and self._taken < self._limit and not self._nothing_new():
                self._taken += 1
                suggestion = self._take()
                problem = self._problem(suggestion)
                if problem is None:
                    self._started[suggestion.number] = time.monotonic()
                    return suggestion
                state, reason = problem
                self._tell(suggestion.number, state, reason)
            return None

    def _take(self) -> Suggestion:
        if self._to_go_on:
            trial = Trial(self._study, self._to_go_on.pop(0)._trial_id)
        else:
            trial = self._study.ask()
        if trial.user_attrs.get(SEARCH) is None:
            trial.set_user_attr(SEARCH, self._search)
        # Values that the study has already stay; what a killed search had not yet drawn is drawn now.
        settings = self._space.settings(self._space.suggest(trial))
        self._trials[trial.number] = trial
        known = self._frozen(trial.number).intermediate_values
        self._values[trial.number] = [known[step] for step in sorted(known)]
        return Suggestion(number=trial.number, settings=settings)

    def _problem(self, suggestion: Suggestion) -> tuple[TrialState, str] | None:
        try:
            config = TrainConfig.from_flat(self._base | suggestion.settings)
        except ValueError as error:
            return TrialState.FAIL, str(error)
        refused = self._refuse(config) or self._repeated(suggestion.number)
        return None if refused is None else (TrialState.PRUNED, refused)

    def _repeated(self, number: int) -> str | None:
        """Why the trial is not to be run where one of the same settings was; it gets that one's values.

        Without them it would count as bad, and draw the suggestions away from the best settings there are.
        """
        trial = self._frozen(number)
        for other in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            if other.params == trial.params and other.intermediate_values:
                for step in sorted(other.intermediate_values.keys() - trial.intermediate_values.keys()):
                    self._trials[number].report(other.intermediate_values[step], step)
                return f"same settings as trial {other.number}"
        return None

    # Recording -------------------------------------------------------------------------------------------------

    def runs_in(self, number: int, process: str) -> None:
        """Note where the trial runs."""
        with self._lock:
            trial = self._trials.get(number)
            if not self.closed and trial is not None and trial.user_attrs.get(PROCESS) != process:
                trial.set_user_attr(PROCESS, process)

    def epochs_done(self, number: int, errors: Sequence[float], scores: Sequence[float] | None = None) -> bool:
        """Take the validation MAE of every epoch so far; whether the trial should go on.

        ``scores`` say which epoch's weights are kept, none: the errors themselves. The value of an epoch is the error
        of the weights that are kept after it.
        """
        with self._lock:
            if self.closed or number not in self._trials:
                return False
            trial, values = self._trials[number], self._values[number]
            for value in kept_errors(errors, errors if scores is None else scores)[len(values) :]:
                values.append(value)
                trial.report(value, len(values))
            return not trial.should_prune()

    def complete(self, number: int) -> None:
        """The trial has done all its epochs."""
        self._tell(number, TrialState.COMPLETE, "")

    def stop(self, number: int, reason: str = "") -> None:
        """The trial was stopped early: by the comparison with others, or for ``reason``."""
        self._tell(number, TrialState.PRUNED, reason)

    def fail(self, number: int, reason: str) -> None:
        """The trial has failed."""
        self._tell(number, TrialState.FAIL, reason)

    def give_up(self, number: int, reason: str) -> None:
        """The trial cannot go on, nor could any other: the search is to end, and all that is under way stays so."""
        with self._lock:
            if not self.closed:
                hint = f"go on with --run_name {self._search} --resume"
                self.problem = RunFailed(f"trial {number} cannot go on, nor could another: {reason}; {hint}")
                self.closed = True

    def _tell(self, number: int, state: TrialState, reason: str) -> None:
        with self._lock:
            if self.closed or number not in self._trials:
                return
            trial, values = self._trials.pop(number), self._values.pop(number)
            if state is TrialState.COMPLETE and not values:
                state, reason = TrialState.FAIL, "it gave no validation error"
            if reason:
                trial.set_user_attr(REASON, " ".join(reason.split())[:500])
            started = self._started.pop(number, None)
            before = trial.user_attrs.get(SECONDS, 0.0)
            if started is not None:
                trial.set_user_attr(SECONDS, round(before + time.monotonic() - started, 3))
            self._study.tell(trial, values[-1] if state is TrialState.COMPLETE else None, state=state)
            self._ended(record(self._frozen(number), self._space))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, a storage that fails closes the book, as does a file that cannot be written once a trial has ended.

        Ray Tune would hide the reason in a traceback of its own, and try a trial again that is recorded already.
        """
        try:
            yield
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            self.problem, self.closed = self.problem or error, True

    def close(self) -> None:
        """Record nothing more: what is under way can be resumed."""
        with self._lock:
            self.closed = True


def _nothing() -> None:
    """What a Book becomes on disk."""


def exhausted(study: Study, space: Space) -> bool:
    """Whether every combination of the space has been tried, or is being tried."""
    combinations = space.combinations()
    if combinations is None:
        return False
    states = (*ENDED, TrialState.RUNNING)
    tried = {frozenset(trial.params.items()) for trial in study.get_trials(deepcopy=False, states=states)}
    return all(frozenset(combination.items()) in tried for combination in combinations)


def kept_errors(errors: Sequence[float], scores: Sequence[float]) -> list[float]:
    """After each epoch, the error in the epoch of the smallest score so far; ends before the first that is no number.

    That epoch's weights are the ones that a training keeps (cluster/worker/loop.py).
    """
    kept: list[float] = []
    smallest = math.inf
    for error, score in zip(errors, scores, strict=True):
        if not (math.isfinite(error) and math.isfinite(score)):
            break
        kept.append(error if score < smallest else kept[-1])
        smallest = min(smallest, score)
    return kept


def record(trial: FrozenTrial, space: Space) -> TrialRecord:
    """A trial of the study as people see it."""
    values = [value for _, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)]
    return TrialRecord(
        number=trial.number,
        search=str(trial.user_attrs.get(SEARCH, "")),
        state=WORDS[trial.state],
        value=values[-1] if values else None,
        epochs=len(trial.intermediate_values),
        best_epoch=_since(values) if values else None,
        seconds=trial.user_attrs.get(SECONDS),
        settings=space.settings(trial.params),
        process=str(trial.user_attrs.get(PROCESS, "")),
        reason=str(trial.user_attrs.get(REASON, "")),
    )


def _since(values: Sequence[float]) -> int:
    """The epoch since which the value is what it is at the end."""
    unchanged = takewhile(lambda value: value == values[-1], reversed(values))
    return len(values) - len(list(unchanged)) + 1


def records(study: Study, space: Space) -> list[TrialRecord]:
    """All trials of the study, by number."""
    return [record(trial, space) for trial in study.get_trials(deepcopy=False)]


def best(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the smallest value, failed ones left out; None where there is none."""
    good = [trial for trial in trials if trial.value is not None and trial.state != WORDS[TrialState.FAIL]]
    return min(good, key=lambda trial: (trial.value, trial.number), default=None)
