"""The sections of a TrainConfig beside the model: data, optimization, scaling and the run itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cluster.settings.fields import coerce, specs_of
from cluster.settings.workers import WorkerRange
from crystalformer.config import Backend, about, require

LossFunction = Literal["L1", "MSE", "Smooth_L1"]
Optimizer = Literal["adamw", "adam"]
Schedule = Literal["inverse_sqrt_nowarmup", "const"]
TargetNormalization = Literal["scale_bias", "bias", "scale", "no"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]

_NAME_LETTERS = 200
"""File systems have 255 for a name, and files beside a run's folder have longer ones."""

_MADE_LETTERS = 80
"""Of the targets, and of the data set, in a name that is made."""

_PLAIN_NAME = re.compile(rf"\w[\w.+=,@-]{{0,{_NAME_LETTERS - 1}}}", re.ASCII)
_NO_PLAIN_LETTER = re.compile(r"[^\w.+=,@-]", re.ASCII)
_PLAIN_RULE = f"letters, digits and _ . + = , @ -, {_NAME_LETTERS} at most, beginning with a letter, digit or _"


def _coerce_fields(config: Any) -> None:  # noqa: ANN401 - any of the sections
    """Give every field the type its annotation promises, or raise ValueError."""
    config_type: type = type(config)
    for spec in specs_of(config_type):
        object.__setattr__(config, spec.name, coerce(spec, getattr(config, spec.name)))


def _require_at_least(config: object, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= minimum, name, value, f"at least {minimum}")


def made_name(targets: Sequence[str], dataset: str, now: datetime) -> str:
    """A name for a run made of what its targets are called, which may hold any letters and be many."""
    names = ("+".join(targets), dataset)
    parts = [name if len(name) <= _MADE_LETTERS else f"{name[:_MADE_LETTERS]}..." for name in names]
    return _NO_PLAIN_LETTER.sub("_", f"{'-'.join(parts)}-{now:%Y%m%d-%H%M%S}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What to learn from. Wrong values raise ValueError."""

    target: tuple[str, ...] = field(metadata=about("property to learn; several: learnt at once, e.g. shear,bulk"))
    dataset: str | None = field(
        default=None, metadata=about("data set by name; none: the embedded set that has the target")
    )
    data_dir: str = field(default="data", metadata=about("folder of prepared data sets"))
    batch_size: int = field(default=128, metadata=about("global batch, over all workers", "crystals"))
    memory_limit_mb: int = field(
        default=4096,
        metadata=about(
            "a split whose structures and neighbour lists exceed this is read from disk batch by batch", "MB"
        ),
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
        require(
            len(self.target) > 0 and all(self.target) and len(set(self.target)) == len(self.target),
            "target",
            ",".join(self.target),
            "one or more different property names, such as shear or shear,bulk",
        )
        if self.dataset is not None:
            require(bool(_PLAIN_NAME.fullmatch(self.dataset)), "dataset", self.dataset, f"a name: {_PLAIN_RULE}")
        require(bool(self.data_dir), "data_dir", self.data_dir, "the path of a folder")
        _require_at_least(self, 1, "batch_size", "memory_limit_mb")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The training recipe; defaults are the paper's. Wrong values raise ValueError."""

    epochs: int = field(default=100, metadata=about("passes over the training split", "epochs"))
    loss_func: LossFunction = field(
        default="L1", metadata=about("loss on normalized targets, summed over the targets")
    )
    optimizer: Optimizer = field(default="adamw", metadata=about("adamw decouples the weight decay, adam does not"))
    lr: float = field(default=5e-4, metadata=about("learning rate at the first step"))
    adam_betas: tuple[float, ...] = field(
        default=(0.9, 0.98), metadata=about("decay of the optimizer's two running means; two numbers from 0 below 1")
    )
    weight_decay: float = field(default=1e-5, metadata=about("weight decay on all but biases"))
    clip_norm: float = field(default=1.0, metadata=about("largest global norm of the gradient; 0 for no clipping"))
    lr_sch: Schedule = field(
        default="inverse_sqrt_nowarmup",
        metadata=about("learning rate: lr*sqrt(T/(T+step)) with T = sch_params, or lr"),
    )
    sch_params: tuple[float, ...] = field(
        default=(4000.0,), metadata=about("T of inverse_sqrt_nowarmup; const ignores it", "steps")
    )
    swa_epochs: int = field(
        default=50,
        metadata=about(
            "final epochs whose weights are averaged, at a constant learning rate; half the run if it is no longer "
            "than this; 0: none",
            "epochs",
        ),
    )
    normalize_targets: TargetNormalization = field(
        default="scale_bias",
        metadata=about("divide by the training std (scale), subtract the training mean (bias), both or neither"),
    )
    gradient_accumulation: int = field(
        default=1, metadata=about("micro-batches per global batch, to save memory; the step is unchanged")
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
        _require_at_least(self, 1, "epochs", "gradient_accumulation")
        _require_at_least(self, 0, "weight_decay", "clip_norm", "swa_epochs")
        require(self.lr > 0, "lr", self.lr, "greater than 0")
        betas = self.adam_betas
        require(
            len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            "adam_betas",
            list(betas),
            "two numbers from 0 to below 1",
        )
        periods = self.sch_params
        require(
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
        metadata=about("training processes, one a GPU where there are GPUs; 1-4: as many of them as the cluster has"),
    )
    zero_stage: int = field(
        default=0,
        metadata=about("DeepSpeed ZeRO stage, 0-3: shard optimizer state (1), gradients too (2), weights too (3)"),
    )
    precision: Precision = field(default="fp32", metadata=about("arithmetic of the model"))
    device: Device = field(default="auto", metadata=about("where workers compute; auto: on GPUs where there are any"))
    deepspeed: str | None = field(
        default=None, metadata=about("JSON file of DeepSpeed settings to lay over the ones made from these options")
    )
    wall_clock_breakdown: bool = field(
        default=False,
        metadata=about("tell where the time of each epoch goes: data, forward, backward, update, validation"),
    )
    cpus_per_worker: float | None = field(
        default=None, metadata=about("CPUs that Ray reserves for a worker; none: chosen from the cluster", "CPUs")
    )
    threads_per_worker: int | None = field(
        default=None,
        metadata=about("torch threads of a worker; none: the machine's CPUs shared evenly", "threads"),
    )
    backend: Backend = field(default="auto", metadata=about("implementation of the attention"))
    wait_minutes: float = field(
        default=0.0,
        metadata=about("how long to wait for nodes that the workers need and that may still come; 0: refuse", "min"),
    )
    elastic_seconds: float = field(
        default=30.0,
        metadata=about("how often a run with a range of workers looks whether the cluster has room for more", "s"),
    )
    max_failures: int = field(
        default=3, metadata=about("failures of workers or nodes to recover from before giving up")
    )
    checkpoint_every: int = field(default=10, metadata=about("epochs between checkpoints", "epochs"))
    checkpoint_minutes: float = field(
        default=10.0,
        metadata=about("longest time between checkpoints, within an epoch too: what a failure costs at most", "min"),
    )
    keep_checkpoints: int = field(default=2, metadata=about("newest checkpoints to keep"))

    def __post_init__(self) -> None:
        _coerce_fields(self)
        _require_at_least(self, 1, "checkpoint_every", "keep_checkpoints", "threads_per_worker")
        _require_at_least(self, 0, "max_failures")
        require(0 <= self.zero_stage <= 3, "zero_stage", self.zero_stage, "0, 1, 2 or 3")
        require(self.wait_minutes >= 0, "wait_minutes", self.wait_minutes, "at least 0")
        seconds = self.elastic_seconds
        require(seconds > 0, "elastic_seconds", seconds, "greater than 0")
        minutes = self.checkpoint_minutes
        require(minutes > 0, "checkpoint_minutes", minutes, "greater than 0")
        cpus = self.cpus_per_worker
        require(cpus is None or cpus > 0, "cpus_per_worker", cpus, "greater than 0, or none")
        require(self.deepspeed != "", "deepspeed", self.deepspeed, "the path of a JSON file, or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how it draws its random numbers. Wrong values raise ValueError."""

    run_name: str | None = field(
        default=None, metadata=about("folder of the run in storage_path; none: made of target, dataset and time")
    )
    storage_path: str = field(
        default="runs", metadata=about("folder of runs; also s3://... and the like, shared by all nodes")
    )
    resume: bool = field(default=False, metadata=about("continue run_name from its last checkpoint"))
    auto_resume: bool = field(
        default=False,
        metadata=about("resume where there is a run of that run_name, else start it; for what repeats one command"),
    )
    init_from: str | None = field(
        default=None,
        metadata=about("model or run folder whose architecture and weights to start from, also s3://..."),
    )
    seed: int = field(default=123, metadata=about("seed of initial weights and shuffling, below 2^32"))
    deterministic: bool = field(
        default=True, metadata=about("the same numbers in every repetition, on the same machine")
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
        if self.run_name is not None:
            parts = self.run_name.split("/")
            require(
                all(_PLAIN_NAME.fullmatch(part) for part in parts),
                "run_name",
                self.run_name,
                f"a folder name or several joined by /, each of {_PLAIN_RULE}",
            )
        require(bool(self.storage_path), "storage_path", self.storage_path, "the path of a folder")
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        require(
            not self.resume or self.run_name is not None,
            "run_name",
            self.run_name,
            "given where resume is true: the run to go on with",
        )
        require(
            not self.auto_resume or self.run_name is not None,
            "run_name",
            self.run_name,
            "given where auto_resume is true: every repetition has to find the same run",
        )
        both = self.auto_resume and self.resume
        require(not both, "auto_resume", self.auto_resume, "false where resume is true")
