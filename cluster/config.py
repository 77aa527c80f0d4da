"""TrainConfig: everything that makes a run, each default once, with one flat name for flag, YAML key and field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from cluster.fields import FieldSpec, Required, coerce, specs_of
from cluster.files import dump_yaml, read_yaml, write_text
from cluster.workers import WorkerRange
from crystalformer.config import ModelConfig

LossFunction = Literal["L1", "MSE", "Smooth_L1"]
Optimizer = Literal["adamw", "adam"]
Schedule = Literal["inverse_sqrt_nowarmup", "const"]
TargetNormalization = Literal["scale_bias", "bias", "scale", "no"]
CONFIG_FILE = "config.yaml"
"""Of a run folder: every setting."""

Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
Backend = Literal["auto", "torch", "numba", "triton", "reference"]

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

_PLAIN_NAME = re.compile(r"\w[\w.+=,@-]*", re.ASCII)
_NO_PLAIN_LETTER = re.compile(r"[^\w.+=,@-]", re.ASCII)
_PLAIN_RULE = "letters, digits and _ . + = , @ -, beginning with a letter, digit or _"


def _meta(text: str, unit: str = "") -> dict[str, str]:
    return {"help": text, "unit": unit}


def _require(condition: bool, name: str, value: object, allowed: str) -> None:  # noqa: FBT001 - a predicate
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _coerce_fields(config: Any) -> None:  # noqa: ANN401 - any of the sections
    """Give every field the type its annotation promises, or raise ValueError."""
    config_type: type = type(config)
    for spec in specs_of(config_type):
        object.__setattr__(config, spec.name, coerce(spec, getattr(config, spec.name)))


def _require_at_least(config: object, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= minimum, name, value, f"at least {minimum}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to learn from. Wrong values raise ValueError."""

    target: tuple[str, ...] = field(metadata=_meta("property to learn; several: learnt at once, e.g. shear,bulk"))
    dataset: str | None = field(
        default=None, metadata=_meta("data set by name; none: the embedded set that has the target")
    )
    data_dir: str = field(default="data", metadata=_meta("folder of prepared data sets"))
    batch_size: int = field(default=128, metadata=_meta("global batch, over all workers", "crystals"))
    memory_limit_mb: int = field(
        default=4096,
        metadata=_meta(
            "a split whose structures and neighbour lists exceed this is read from disk batch by batch", "MB"
        ),
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
        _require(
            len(self.target) > 0 and all(self.target) and len(set(self.target)) == len(self.target),
            "target",
            ",".join(self.target),
            "one or more different property names, such as shear or shear,bulk",
        )
        if self.dataset is not None:
            _require(bool(_PLAIN_NAME.fullmatch(self.dataset)), "dataset", self.dataset, f"a name: {_PLAIN_RULE}")
        _require(bool(self.data_dir), "data_dir", self.data_dir, "the path of a folder")
        _require_at_least(self, 1, "batch_size", "memory_limit_mb")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The training recipe; defaults are the paper's. Wrong values raise ValueError."""

    epochs: int = field(default=100, metadata=_meta("passes over the training split", "epochs"))
    loss_func: LossFunction = field(
        default="L1", metadata=_meta("loss on normalized targets, summed over the targets")
    )
    optimizer: Optimizer = field(default="adamw", metadata=_meta("adamw decouples the weight decay, adam does not"))
    lr: float = field(default=5e-4, metadata=_meta("learning rate at the first step"))
    adam_betas: tuple[float, ...] = field(
        default=(0.9, 0.98), metadata=_meta("decay of the optimizer's two running means; two numbers from 0 below 1")
    )
    weight_decay: float = field(default=1e-5, metadata=_meta("weight decay on all but biases"))
    clip_norm: float = field(default=1.0, metadata=_meta("largest global norm of the gradient; 0 for no clipping"))
    lr_sch: Schedule = field(
        default="inverse_sqrt_nowarmup",
        metadata=_meta("learning rate: lr*sqrt(T/(T+step)) with T = sch_params, or lr"),
    )
    sch_params: tuple[float, ...] = field(
        default=(4000.0,), metadata=_meta("T of inverse_sqrt_nowarmup; const ignores it", "steps")
    )
    swa_epochs: int = field(
        default=50,
        metadata=_meta(
            "final epochs whose weights are averaged, at a constant learning rate; half the run if it is no longer "
            "than this; 0: none",
            "epochs",
        ),
    )
    normalize_targets: TargetNormalization = field(
        default="scale_bias",
        metadata=_meta("divide by the training std (scale), subtract the training mean (bias), both or neither"),
    )
    gradient_accumulation: int = field(
        default=1, metadata=_meta("micro-batches per global batch, to save memory; the step is unchanged")
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
        _require_at_least(self, 1, "epochs", "gradient_accumulation")
        _require_at_least(self, 0, "weight_decay", "clip_norm", "swa_epochs")
        _require(self.lr > 0, "lr", self.lr, "greater than 0")
        betas = self.adam_betas
        _require(
            len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            "adam_betas",
            list(betas),
            "two numbers from 0 to below 1",
        )
        periods = self.sch_params
        _require(
            self.lr_sch == "const" or (len(periods) == 1 and periods[0] > 0),
            "sch_params",
            list(periods),
            "one number greater than 0 (steps)",
        )

    @property
    def averaged_epochs(self) -> int:
        """How many of the last epochs average weights: swa_epochs, or half of a run that is no longer than that."""
        return self.swa_epochs if self.swa_epochs < self.epochs else self.epochs // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """On what to train, and how to live through failures. Wrong values raise ValueError."""

    num_workers: WorkerRange = field(
        default=WorkerRange(1, 1),
        metadata=_meta("training processes, one a GPU where there are GPUs; 1-4: as many of them as the cluster has"),
    )
    zero_stage: int = field(
        default=0,
        metadata=_meta("DeepSpeed ZeRO stage, 0-3: shard optimizer state (1), gradients too (2), weights too (3)"),
    )
    precision: Precision = field(default="fp32", metadata=_meta("arithmetic of the model"))
    device: Device = field(default="auto", metadata=_meta("where workers compute; auto: on GPUs where there are any"))
    deepspeed: str | None = field(
        default=None, metadata=_meta("JSON file of DeepSpeed settings to lay over the ones made from these options")
    )
    wall_clock_breakdown: bool = field(
        default=False,
        metadata=_meta("tell where the time of each epoch goes: data, forward, backward, update, validation"),
    )
    cpus_per_worker: float | None = field(
        default=None, metadata=_meta("CPUs that Ray reserves for a worker; none: chosen from the cluster", "CPUs")
    )
    threads_per_worker: int | None = field(
        default=None,
        metadata=_meta("torch threads of a worker; none: the machine's CPUs shared evenly", "threads"),
    )
    backend: Backend = field(default="auto", metadata=_meta("implementation of the attention"))
    elastic_seconds: float = field(
        default=30.0,
        metadata=_meta("how often a run with a range of workers looks whether the cluster has room for more", "s"),
    )
    max_failures: int = field(
        default=3, metadata=_meta("failures of workers or nodes to recover from before giving up")
    )
    checkpoint_every: int = field(default=10, metadata=_meta("epochs between checkpoints", "epochs"))
    checkpoint_minutes: float = field(
        default=10.0,
        metadata=_meta("longest time between checkpoints, within an epoch too: what a failure costs at most", "min"),
    )
    keep_checkpoints: int = field(default=2, metadata=_meta("newest checkpoints to keep"))

    def __post_init__(self) -> None:
        _coerce_fields(self)
        _require_at_least(self, 1, "checkpoint_every", "keep_checkpoints", "threads_per_worker")
        _require_at_least(self, 0, "max_failures")
        _require(0 <= self.zero_stage <= 3, "zero_stage", self.zero_stage, "0, 1, 2 or 3")
        seconds = self.elastic_seconds
        _require(seconds > 0, "elastic_seconds", seconds, "greater than 0")
        minutes = self.checkpoint_minutes
        _require(minutes > 0, "checkpoint_minutes", minutes, "greater than 0")
        cpus = self.cpus_per_worker
        _require(cpus is None or cpus > 0, "cpus_per_worker", cpus, "greater than 0, or none")
        _require(self.deepspeed != "", "deepspeed", self.deepspeed, "the path of a JSON file, or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how it draws its random numbers. Wrong values raise ValueError."""

    run_name: str | None = field(
        default=None, metadata=_meta("folder of the run in storage_path; none: made of target, dataset and time")
    )
    storage_path: str = field(
        default="runs", metadata=_meta("folder of runs; also s3://... and the like, shared by all nodes")
    )
    resume: bool = field(
        default=False, metadata=_meta("continue run_name from its last checkpoint")
    )
    auto_resume: bool = field(
        default=False,
        metadata=_meta("resume where there is a run of that run_name, else start it; for what repeats one command"),
    )
    init_from: str | None = field(
        default=None,
        metadata=_meta("model or run folder whose architecture and weights to start from, also s3://..."),
    )
    seed: int = field(default=123, metadata=_meta("seed of initial weights and shuffling, below 2^32"))
    deterministic: bool = field(
        default=True, metadata=_meta("the same numbers in every repetition, on the same machine")
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
        if self.run_name is not None:
            parts = self.run_name.split("/")
            _require(
                all(_PLAIN_NAME.fullmatch(part) for part in parts),
                "run_name",
                self.run_name,
                f"a folder name or several joined by /, each of {_PLAIN_RULE}",
            )
        _require(bool(self.storage_path), "storage_path", self.storage_path, "the path of a folder")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        _require(
            not self.resume or self.run_name is not None,
            "run_name",
            self.run_name,
            "given where resume is true: the run to go on with",
        )
        _require(
            not self.auto_resume or self.run_name is not None,
            "run_name",
            self.run_name,
            "given where auto_resume is true: every repetition has to find the same run",
        )
        both = self.auto_resume and self.resume
        _require(not both, "auto_resume", self.auto_resume, "false where resume is true")


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
        _require(
            self.data.batch_size >= parts,
            "batch_size",
            self.data.batch_size,
            f"at least num_workers * gradient_accumulation = {parts}: a crystal for each part of each worker",
        )
        backend, elsewhere = self.scale.backend, {"triton": "cpu", "numba": "cuda"}
        _require(
            self.scale.device != elsewhere.get(backend, ""),
            "backend",
            backend,
            f"auto, torch or reference where device is {self.scale.device}",
        )
        _require(
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
        made = plain_name(f"{'+'.join(target)}-{dataset}-{now:%Y%m%d-%H%M%S}")
        return replace(
            self,
            data=replace(self.data, dataset=dataset, target=target),
            run=replace(self.run, run_name=self.run.run_name or made),
        )


def plain_name(text: str) -> str:
    """A name for a run made of what its targets are called, which may hold any letters."""
    return _NO_PLAIN_LETTER.sub("_", text)


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
