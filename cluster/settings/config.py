"""TrainConfig: everything that makes a run, each default once, with one flat name for flag, YAML key and field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.files import dump_yaml, read_yaml, write_text
from cluster.settings.fields import FieldSpec, Required, coerce, specs_of
from cluster.settings.sections import DataConfig, OptimConfig, RunConfig, ScaleConfig, made_name
from cluster.settings.workers import WorkerRange
from crystalformer.config import ModelConfig, require

CONFIG_FILE = "config.yaml"
"""Of a run folder: every setting."""

ALIASES = {
    "target_set": "dataset",
    "targets": "target",
    "n_epochs": "epochs",
    "save_path": "storage_path",
    "experiment_name": "run_name",
}
"""The authors' spellings, accepted as flags and YAML keys."""

DERIVED = ("num_targets",)
"""Fields that follow from others and are nobody's to set."""

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "scale": ScaleConfig,
    "run": RunConfig,
}


@cache
def flat_fields() -> Mapping[str, FieldSpec]:
    """Every setting a user has, by flat name, section after section."""
    return {spec.name: spec for section in SECTIONS for spec in section_fields(section)}


def section_fields(section: str) -> tuple[FieldSpec, ...]:
    """The settings of one of ``SECTIONS`` that a user has."""
    return tuple(spec for spec in specs_of(SECTIONS[section]) if spec.name not in DERIVED)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All of a training run. ``model.num_targets`` always follows from ``data.target``."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", replace(self.model, num_targets=len(self.data.target)))
        parts = self.scale.num_workers.most * self.optim.gradient_accumulation
        require(
            self.data.batch_size >= parts,
            "batch_size",
            self.data.batch_size,
            f"at least num_workers * gradient_accumulation = {parts}: a crystal for each part of each worker",
        )
        backend, elsewhere = self.scale.backend, {"triton": "cpu", "numba": "cuda"}
        require(
            self.scale.device != elsewhere.get(backend, ""),
            "backend",
            backend,
            f"auto, torch or reference where device is {self.scale.device}",
        )
        require(
            backend not in elsewhere or self.model.domain == "real",
            "backend",
            backend,
            f"auto, torch or reference where domain is {self.model.domain}: it has no reciprocal space",
        )

    def to_flat(self) -> dict[str, Any]:
        """Every setting under its flat name, as plain values (tuples as lists)."""
        flat: dict[str, Any] = {}
        for section in SECTIONS:
            flat |= self.section_values(section)
        return flat

    def section_values(self, section: str) -> dict[str, Any]:
        """The settings of one of ``SECTIONS``, as plain values."""
        values = {spec.name: getattr(getattr(self, section), spec.name) for spec in section_fields(section)}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config of flat settings, defaults elsewhere; aliases are understood.

        Raises ValueError for an unknown or missing setting, a wrong type or a value out of range.
        """
        given = canonical_names(values)
        sections: dict[str, Any] = {}
        for section, config_type in SECTIONS.items():
            specs = section_fields(section)
            for spec in specs:
                if spec.default is Required and spec.name not in given:
                    raise ValueError(f"{spec.name} must be given: {spec.help}")
            known = {spec.name: coerce(spec, given[spec.name]) for spec in specs if spec.name in given}
            sections[section] = config_type(**known)
        return cls(**sections)

    def resolved(self, *, dataset: str, target: tuple[str, ...], now: datetime) -> TrainConfig:
        """This config with the data set and target names that were found, and a run_name if it had none."""
        made = made_name(target, dataset, now)
        return replace(
            self,
            data=replace(self.data, dataset=dataset, target=target),
            run=replace(self.run, run_name=self.run.run_name or made),
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 - any setting's value
    """The value as YAML and JSON have it."""
    if isinstance(value, WorkerRange):
        return value.plain
    return list(value) if isinstance(value, tuple) else value


def canonical_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` under our names instead of the authors'.

    Raises ValueError for an unknown name (with the closest known one) and for a setting given under both names.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name in DERIVED:
            raise ValueError(f"{name} cannot be set: it follows from target")
        if name not in flat_fields():
            raise ValueError(f"unknown setting {key!r}{suggestion(str(key), [*flat_fields(), *ALIASES])}")
        if name in result:
            raise ValueError(f"{name} is given twice, also as {next(a for a, n in ALIASES.items() if n == name)}")
        result[name] = value
    return result


def suggestion(wrong: str, known: list[str]) -> str:
    """``; did you mean ...?`` with the closest of the known names, or nothing where none is close."""
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def load_flat(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file under our names, each of the right type; ranges are judged by ``from_flat``.

    Raises UserError naming the file, the setting, the value and what is allowed.
    """
    content = read_yaml(path)
    try:
        return {name: coerce(flat_fields()[name], value) for name, value in canonical_names(content).items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_yaml(path: str | Path) -> TrainConfig:
    """The config of a YAML file of flat settings, such as a run's config.yaml. Raises UserError as ``load_flat``."""
    values = load_flat(path)
    try:
        return TrainConfig.from_flat(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def save_yaml(path: str | Path, config: TrainConfig) -> None:
    """Write every setting to ``path``, so that ``load_yaml`` gives the same run.

    ``resume`` and ``auto_resume`` are left out: they say how a command was called, not what the run is.
    """
    blocks = []
    calling = ("resume", "auto_resume")
    for section in SECTIONS:
        values = {name: value for name, value in config.section_values(section).items() if name not in calling}
        blocks.append(f"# {section}\n" + dump_yaml(values))
    write_text(path, "\n".join(blocks))
