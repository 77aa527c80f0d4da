"""Optuna's study: where it is kept, how its suggestions are drawn, and what it was begun for.

The study is the search's only memory: every suggestion, every epoch's value and every reason of a failure is written
there as it comes, so that a search killed at any point goes on from it.
"""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from cluster.errors import UserError, without_credentials
from tune.book import SEARCH
from tune.config import SearchConfig

VARIABLE = "CRYSTALFORMER_STORAGE"
STUDY_FILE = "study.db"
CONNECTIONS = 5
"""To a database in which another search makes Optuna's tables, one by one, before it is given up."""
PURPOSE = "crystalformer"
"""Key of the study's user attribute that says what its values are of."""


def storage_url(config: SearchConfig, run_dir: Path) -> str:
    """Where the study is: --storage, the environment, or a file in the run folder."""
    return config.storage or os.environ.get(VARIABLE) or _own_file(run_dir)


def is_own_file(url: str, run_dir: Path) -> bool:
    """Whether the study lies in the run folder."""
    return url == _own_file(run_dir)


def _own_file(run_dir: Path) -> str:
    """The URL of the study in the run folder; characters of the path that mean something in a URL are escaped."""
    return URL.create("sqlite", database=str(run_dir / STUDY_FILE)).render_as_string()


def shown_url(url: str) -> str:
    """The URL without user, password and options: fit for files and messages. UserError where it is none."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):  # which repeat the URL, and with it the password
        raise UserError("storage must be a database URL such as postgresql://USER@HOST/NAME") from None
    place = f"{parts.host or ''}{f':{parts.port}' if parts.port else ''}"
    return f"{parts.drivername}://{place}/{parts.database or ''}"


def open_storage(url: str) -> RDBStorage:
    """The database with Optuna's tables, made where they are not there. UserError where it cannot be opened."""
    shown = shown_url(url)
    try:
        for _ in range(CONNECTIONS):
            try:
                return _connect(url)
            except DBAPIError as error:
                if not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                    raise
                time.sleep(random.uniform(0.1, 0.5))  # another search makes the tables at the same moment
        return _connect(url)
    except ImportError as error:
        reason = f"its driver is not installed ({_one_line(error, url)})"
    except (SQLAlchemyError, RuntimeError) as error:
        reason = reason_of(error, url)
    raise UserError(f"storage {shown} cannot be opened: {reason}")


def _connect(url: str) -> RDBStorage:
    """A connection that a restarted server has dropped is opened anew."""
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def reason_of(error: Exception, url: str) -> str:
    """Why a storage failed, in the driver's words."""
    cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
    return _one_line(getattr(cause, "orig", None) or cause, url)


def _one_line(error: object, url: str) -> str:
    """The error's first line; a password that it repeats is left out."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    password = make_url(url).password
    return without_credentials(text.replace(str(password), "***") if password else text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Purpose:
    """What the values of a study are of; searches that share it must agree."""

    dataset: str
    targets: tuple[str, ...]
    objective: str
    unit: str
    epochs: int
    space: Mapping[str, Any]
    fixed: Mapping[str, Any]
    """The settings that are not searched but decide a trial's result."""
    grace_epochs: int
    reduction: int
    """Early stopping compares trials at the epochs that these make."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the study."""
        return {
            "dataset": self.dataset,
            "targets": list(self.targets),
            "objective": self.objective,
            "unit": self.unit,
            "epochs": self.epochs,
            "space": {name: dict(rule) for name, rule in self.space.items()},
            "fixed": dict(self.fixed),
            "grace_epochs": self.grace_epochs,
            "reduction": self.reduction,
        }


def open_study(storage: RDBStorage, name: str, config: SearchConfig, purpose: Purpose, *, sharing: bool) -> Study:
    """The study of that name, begun where it is not there.

    UserError where it is there and ``sharing`` is false, or where its values are of something else.
    """
    _quiet_optuna()
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    known = name in {summary.study_name for summary in summaries}
    if known and not sharing:
        raise UserError(f"study_name {name!r} exists in this storage; give another, --study_name {name} or --resume")
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="minimize",
        sampler=SeededTPE(config.search_seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(
            min_resource=config.grace_epochs, reduction_factor=config.reduction
        ),
        load_if_exists=True,
    )
    wanted = purpose.to_dict()
    found = study.user_attrs.get(PURPOSE)
    if found is None:
        study.set_user_attr(PURPOSE, wanted)
        study.set_metric_names([re.sub(r"\W+", "_", f"val_mae_{purpose.objective}")])
    else:
        _check_same(name, found, wanted)
    return study


def _check_same(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        was = found.get(key, value)  # studies of earlier versions do not say everything
        if was == value:
            continue
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            key = next(k for k in [*value, *was] if value.get(k) != was.get(k))
            was, value = was.get(key), value.get(key)
        raise UserError(f"study {name!r} was begun with {key} {was!r}, now it is {value!r}; give another study_name")


def refuse_known(study: Study, run_name: str) -> None:
    """UserError where the study has trials of a search of that name: a new one would take them for its own."""
    if any(trial.user_attrs.get(SEARCH) == run_name for trial in study.get_trials(deepcopy=False)):
        raise UserError(f"run_name {run_name!r} has trials in study {study.study_name!r}; give another")


class SeededTPE(BaseSampler):
    """TPE whose random numbers follow from the seed and the trial's number alone.

    A search that is killed and goes on then draws what it would have drawn, and searches that share a study draw
    different trials with the same seed. Which values TPE prefers depends on the trials that have ended by then.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tpe = TPESampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """A sampler of its own for every trial."""
        self._tpe = TPESampler(seed=(self._seed * 1_000_003 + trial.number) % 2**32)
        self._tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """TPE's."""
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """TPE's."""
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:  # noqa: ANN401 - any parameter's type
        """TPE's."""
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:  # noqa: ANN401
        """TPE's."""
        self._tpe.after_trial(study, trial, state, values)


def _quiet_optuna() -> None:
    """Optuna's notes on every trial, and on features that may change, are not for users."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
