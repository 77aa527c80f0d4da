"""A checkpoint: a folder of safetensors and one state.json that vouches for them by SHA-256.

It is canonical: whole tensors by parameter name, so any number of workers at any ZeRO stage can go on from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

Tensors = dict[str, Tensor]

FORMAT_VERSION = 1
STATE = "state.json"
OUTCOME = "outcome.json"
PREDICTIONS = "predictions.safetensors"

BEST = "best"
AVERAGE = "average"
"""The two sets of weights a finished run offers."""


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, altered or of another version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands. Epochs count from 1; ``batch`` batches of epoch ``epoch`` are done."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    """Sum of this epoch's batch losses so far, over all workers."""
    seconds: float = 0.0
    """Training time so far, restarts left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best validation so far: score is the mean normalized MAE, mae by target in its unit."""

    epoch: int
    score: float
    mae: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """All that a run needs to go on exactly."""

    position: Position
    weights: Tensors
    moments: Tensors = field(default_factory=dict)
    optimizer_step: int = 0
    average: Tensors = field(default_factory=dict)
    average_count: int = 0
    best: Best | None = None
    best_weights: Tensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished run adds to its last checkpoint.

    ``models``: full weights by BEST and AVERAGE. ``predictions``: (n, T) in units under the same names, and "truth".
    """

    facts: Mapping[str, Any]
    models: Mapping[str, Tensors]
    predictions: Tensors


_TENSORS = ("weights", "moments", "average", "best_weights")


def write_checkpoint(folder: Path, state: TrainState, settings: Mapping[str, Any]) -> None:
    """Write ``state`` into ``folder``; state.json comes last, so a folder without it is no checkpoint.

    ``settings`` are the run's, kept for whoever reads the folder.
    """
    digests = {}
    for name in _TENSORS:
        content = save({key: value.contiguous() for key, value in getattr(state, name).items()})
        (folder / f"{name}.safetensors").write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    record = {
        "format_version": FORMAT_VERSION,
        "position": asdict(state.position),
        "optimizer_step": state.optimizer_step,
        "average_count": state.average_count,
        "best": None if state.best is None else asdict(state.best),
        "sha256": digests,
        "settings": dict(settings),
    }
    partial = folder / f".{STATE}.partial"
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(folder / STATE)


def read_checkpoint(folder: Path) -> TrainState:
    """The state in ``folder``. CheckpointError says which file is missing, altered or of another version."""
    try:
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {STATE}: its writing was cut short") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged: {error}") from error
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise CheckpointError(f"{folder} has format {version!r}, this code reads {FORMAT_VERSION}")
    tensors = {name: _read_tensors(folder / f"{name}.safetensors", record["sha256"][name]) for name in _TENSORS}
    best = record["best"]
    return TrainState(
        position=Position(**record["position"]),
        optimizer_step=record["optimizer_step"],
        average_count=record["average_count"],
        best=None if best is None else Best(**best),
        **tensors,
    )


def _read_tensors(path: Path, digest: str) -> Tensors:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the one in {STATE}")
    tensors: Tensors = load(content)
    return tensors


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write what a finished run has found into its last checkpoint's folder."""
    for name, weights in outcome.models.items():
        (folder / f"model-{name}.safetensors").write_bytes(save({k: v.contiguous() for k, v in weights.items()}))
    (folder / PREDICTIONS).write_bytes(save({k: v.contiguous() for k, v in outcome.predictions.items()}))
    record = {"facts": dict(outcome.facts), "models": list(outcome.models)}
    (folder / OUTCOME).write_text(json.dumps(record), encoding="utf-8")


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome in a checkpoint's folder; None where the run had not finished."""
    if not (folder / OUTCOME).is_file():
        return None
    record = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    return Outcome(
        facts=record["facts"],
        models={name: load((folder / f"model-{name}.safetensors").read_bytes()) for name in record["models"]},
        predictions=load((folder / PREDICTIONS).read_bytes()),
    )
