"""SearchConfig: what makes a search beside the settings of its training runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.settings.fields import coerce, specs_of
from crystalformer.config import about, require

MAY_CHANGE = frozenset(
    {
        "num_trials",
        "concurrent",
        "max_minutes",
        "trial_minutes",
        "checkpoint_minutes",
        "trial_retries",
        "full_epochs",
        "storage",
    }
)
"""What a search that goes on may be given anew: how long and on what it runs, not what its trials mean."""


OF_TRIALS = ("epochs", "checkpoint_minutes")
"""Settings of a training run that have another default in a search."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How to search. Wrong values raise ValueError."""

    num_trials: int = field(default=20, metadata=about("trials of this search, failed ones included"))
    epochs: int = field(
        default=10, metadata=about("most epochs of a trial; early stopping ends the worse ones before", "epochs")
    )
    full_epochs: int = field(default=100, metadata=about("epochs of the training that best.yaml describes", "epochs"))
    space: str | None = field(
        default=None,
        metadata=about("YAML file of what to search; none: scale_real, gauss_lb_real and value_pe_dist_real"),
    )
    objective: str | None = field(
        default=None, metadata=about("target whose validation MAE, in its unit, is minimized; none: the first")
    )
    search_seed: int = field(default=1, metadata=about("seed of the suggestions, below 2^31"))
    try_given: bool = field(
        default=True, metadata=about("begin with the settings as given, where they lie in the space")
    )
    grace_epochs: int = field(
        default=2,
        metadata=about("epochs before ASHA may stop a trial; later rungs at grace_epochs * reduction^k"),
    )
    reduction: int = field(default=3, metadata=about("ASHA reduction factor: one trial in this many passes a rung"))
    concurrent: int | None = field(
        default=None, metadata=about("most trials at once; none: as many as the cluster has CPUs or GPUs for")
    )
    max_minutes: float | None = field(
        default=None, metadata=about("time for the search; trials under way then can be resumed", "minutes")
    )
    trial_minutes: float | None = field(
        default=5.0, metadata=about("time for a trial; it counts with the epochs it has done by then", "minutes")
    )
    checkpoint_minutes: float = field(
        default=1.0,
        metadata=about(
            "longest time between checkpoints of a trial: what is lost of it where its process dies", "minutes"
        ),
    )
    max_radius: float = field(
        default=40.0,
        metadata=about("settings whose neighbour lists reach farther are passed over: costs grow with r^3", "Å"),
    )
    trial_retries: int = field(
        default=1, metadata=about("times that a trial whose process or node died is started again")
    )
    study_name: str | None = field(
        default=None, metadata=about("name of Optuna's study, which several searches may share; none: run_name")
    )
    storage: str | None = field(
        default=None,
        metadata=about(
            "URL of the database that holds the study, such as postgresql://USER@HOST/NAME; none: that of "
            "CRYSTALFORMER_STORAGE in the environment, else an SQLite file in the run folder"
        ),
    )

    def __post_init__(self) -> None:
        for spec in specs_of(SearchConfig):
            object.__setattr__(self, spec.name, coerce(spec, getattr(self, spec.name)))
        for name in ("num_trials", "epochs", "full_epochs", "grace_epochs", "concurrent"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.reduction >= 2, "reduction", self.reduction, "at least 2")
        require(self.trial_retries >= 0, "trial_retries", self.trial_retries, "at least 0")
        for name in ("max_minutes", "trial_minutes", "checkpoint_minutes", "max_radius"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "greater than 0")
        require(0 <= self.search_seed < 2**31, "search_seed", self.search_seed, "from 0 to 2^31 - 1")
        for name in ("space", "objective", "study_name"):
            require(getattr(self, name) != "", name, getattr(self, name), "some text, or none")
        require(
            self.storage is None or "://" in self.storage,
            "storage",
            "***" if "@" in str(self.storage) else self.storage,  # it may hold a password
            "a database URL such as postgresql://USER@HOST/NAME or sqlite:////FOLDER/FILE.db",
        )

    def to_flat(self) -> dict[str, Any]:
        """Every setting by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> SearchConfig:
        """The config of settings by name, defaults elsewhere. ValueError for a wrong type or range."""
        return cls(**values)
