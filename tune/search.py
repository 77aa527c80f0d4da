"""A search from its checked settings to its report: Ray Tune runs the trials, the book (book.py) says which."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.study import Study
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import RunFailed, UserError
from cluster.interrupts import Interrupts, RunStopped
from cluster.session import ray_session
from cluster.settings.config import TrainConfig
from cluster.settings.deepspeed_config import overlay_of
from cluster.settings.reach import MAX_WAVE_RADIUS
from data_pipeline.prepared import PreparedDataset
from tune.book import Book, TrialRecord, exhausted, records
from tune.capacity import awaited_capacity
from tune.data import SearchData, search_data
from tune.fit import TUNE_FOLDER, Fit
from tune.folder import TRIALS_FOLDER, Search, begin, has_begun, locked, refuse_taken
from tune.library import Library
from tune.progress import SearchProgress
from tune.report import write_best, write_report, write_trials
from tune.space import SEARCHABLE
from tune.study import Purpose, is_own_file, open_storage, open_study, reason_of, refuse_known, shown_url
from tune.worker import PARTIAL, TrialSetup

POLL_SECONDS = 0.25
STOP_SECONDS = 8.0
"""Before the end trials get this long to write checkpoints and stop; what is in a longer step is killed then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search has found."""

    folder: Path
    trials: list[TrialRecord]
    """Of the whole study, by number."""
    unit: str
    finished: bool
    """Whether all trials of the search have ended, or all there can be."""


def search(plan: Search, *, patient: bool = False) -> SearchResult:
    """Run the trials that are missing and write the report. ``patient``: as of ``locked``.

    UserError or DataError for what the user can mend; RunFailed where the search cannot go on, as on a full disk;
    RunStopped where a signal ended it before.
    """
    with locked(plan.folder, patient=patient), _telling(plan):
        if not plan.config.run.resume:
            refuse_taken(plan)
        data = search_data(plan.config, plan.space)
        unit = data.units[plan.objective]
        with ExitStack() as stack:
            if not plan.config.run.resume:
                # What is refused must be refused before the search has begun, or its name could not be used again.
                stack.enter_context(ray_session())
                awaited_capacity(plan)
            study = _study(plan, data)
            if not plan.config.run.resume:
                begin(plan)
            signal_number = _run(plan, data, study, stack)
            # Before Ray is left, which may end a process that still waits for it.
            trials = records(study, plan.space)
            write_report(plan, study, trials, unit)
            own = [trial for trial in trials if trial.search == plan.name and trial.ended]
            _drop_checkpoints(plan, own)
        cut_off = any(trial.search == plan.name and not trial.ended for trial in trials)
        finished = len(own) >= plan.options.num_trials or (exhausted(study, plan.space) and not cut_off)
    if signal_number is not None:
        done = f"{len(own)} of {plan.options.num_trials} trials"
        raise RunStopped(f"stopped after {done}; go on with --run_name {plan.name} --resume", signal_number)
    return SearchResult(folder=plan.folder, trials=trials, unit=unit, finished=finished)


@contextmanager
def _telling(plan: Search) -> Iterator[None]:
    """Within, a study's database or a disk that fails is told of in a line: UserError, RunFailed."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        failed = f"storage {shown_url(plan.url)} failed: {reason_of(error, plan.url)}"
        raise UserError(f"{failed}{_hint(plan)}") from error
    except BrokenPipeError:  # no disk: whoever read what is printed has left
        raise
    except OSError as error:
        place = error.filename2 or error.filename or plan.folder
        raise RunFailed(f"{place}: {error.strerror or error}{_hint(plan)}") from error


def _hint(plan: Search) -> str:
    return f"; go on with --run_name {plan.name} --resume" if has_begun(plan) else ""


def _drop_checkpoints(plan: Search, ended: Sequence[TrialRecord]) -> None:
    """Nobody goes on with a trial that has ended."""
    for trial in ended:
        folder = plan.folder / TRIALS_FOLDER / f"{trial.number:04d}"
        for path in (*folder.glob("*checkpoint*"), *folder.glob(f"{PARTIAL}*")):
            shutil.rmtree(path, ignore_errors=True)


def _study(plan: Search, data: SearchData) -> Study:
    """The study, with the settings as given to be tried first."""
    flat = plan.config.to_flat()
    fixed = [name for name in (*SEARCHABLE, "seed") if name not in plan.space.rules()]
    purpose = Purpose(
        dataset=f"{data.dataset.name} {data.dataset.fingerprint[:12]}",
        targets=plan.config.data.target,
        objective=plan.objective,
        unit=data.units[plan.objective],
        epochs=plan.options.epochs,
        space=plan.space.rules(),
        fixed={name: flat[name] for name in fixed},
        grace_epochs=plan.options.grace_epochs,
        reduction=plan.options.reduction,
    )
    resume = plan.config.run.resume
    # A study of its own without a search.yaml is that of a search that was killed between the two.
    sharing = resume or plan.options.study_name is not None or is_own_file(plan.url, plan.folder)
    study = open_study(open_storage(plan.url), plan.study_name, plan.options, purpose, sharing=sharing)
    if not resume:
        refuse_known(study, plan.name)
    chosen = plan.space.given(flat)
    if plan.options.try_given and chosen is not None:
        study.enqueue_trial(chosen, skip_if_exists=True)
    return study


def _run(plan: Search, data: SearchData, study: Study, stack: ExitStack) -> int | None:
    """Run what is missing, on a Ray that ``stack`` leaves. The number of the signal that ended it before, or None."""
    units = data.units
    progress = SearchProgress(plan, units[plan.objective])

    def refuse(config: TrainConfig) -> str | None:
        radius, wave_radius = config.model.neighbor_radius, config.model.wave_radius
        if radius > plan.options.max_radius:
            return (
                f"not run: its neighbours reach {radius:.1f} Å, farther than max_radius {plan.options.max_radius:g}"
            )
        if wave_radius > MAX_WAVE_RADIUS:
            return f"not run: its wave vectors reach {wave_radius:.1f} 1/Å, farther than {MAX_WAVE_RADIUS:g}"
        if config.data.batch_size > data.rows:
            return f"not run: batch_size {config.data.batch_size} is more than the {data.rows} training crystals"
        return None

    def ended(trial: TrialRecord) -> None:
        trials = records(study, plan.space)
        write_trials(plan, trials, units[plan.objective])
        write_best(plan, trials)
        progress.ended(trial, trials)

    base = plan.config.to_flat() | {"swa_epochs": 0, "resume": False, "auto_resume": False}
    base["checkpoint_minutes"] = plan.options.checkpoint_minutes
    alone = is_own_file(plan.url, plan.folder)
    book = Book(study, plan.space, base, plan.name, plan.options.num_trials, refuse, ended, alone=alone)
    if book.over:
        return None
    stack.enter_context(ray_session())
    capacity = awaited_capacity(plan)
    progress.begin(book.ended_trials, capacity.trials)
    library = _library(plan, data.dataset)
    setup = TrialSetup(
        base=base | dict(capacity.config) | {"storage_path": str(plan.root)},
        objective=plan.objective,
        library=library,
        threads=capacity.threads,
        seconds=60 * plan.options.trial_minutes if plan.options.trial_minutes else 1e18,
        units=units,
        overlay=overlay_of(plan.config),
    )
    with progress, Interrupts() as interrupts:
        _watch(Fit(plan, book, setup, capacity.resources, capacity.trials), plan, book, interrupts, progress)
    with suppress(RayError):  # the library is gone, as is its count; every trial has ended nevertheless
        progress.data(*ray.get(library.counts.remote()))
    return interrupts.received


def _watch(fit: Fit, plan: Search, book: Book, interrupts: Interrupts, progress: SearchProgress) -> None:
    """Wait for the end; on a signal, or where the book was closed, a little for trials to write checkpoints."""
    fit.start()
    stop_by = None
    try:
        while fit.is_alive() and (stop_by is None or time.monotonic() < stop_by):
            fit.join(POLL_SECONDS)
            if interrupts.received is not None and not book.closed:
                progress.note("stopping: trials under way can be resumed; once more to stop at once")
                book.close()
            if book.closed and stop_by is None:
                stop_by = time.monotonic() + STOP_SECONDS
    finally:
        book.close()
        fit.end()
    if book.problem is not None:
        raise book.problem
    fit.check()
    shutil.rmtree(plan.folder / TUNE_FOLDER, ignore_errors=True)


def _library(plan: Search, dataset: PreparedDataset) -> Any:  # noqa: ANN401 - a Ray actor handle
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Library.options(scheduling_strategy=here).remote(  # type: ignore[attr-defined]  # made by ray.remote
        dataset, plan.config.data.target, plan.config.model.neighbor_radius, plan.config.data.memory_limit_mb
    )
