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
    rows: tuple[Mapping[str, Any], ...] = ()
    """The metrics rows of the epochs so far: a driver that died may not have written the last ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished run adds to its last checkpoint.

    ``models``: full weights by BEST and AVERAGE. ``predictions``: (n, T) in units under the same names.
    """

    facts: Mapping[str, Any]
    models: Mapping[str, Tensors]
    predictions: Tensors


_TENSORS = ("weights", "moments", "average", "best_weights")


def write_checkpoint(folder: Path, state: TrainState, settings: Mapping[str, Any]) -> None:
    """Write ``state`` into ``folder``; state.json comes last, so a folder without it is no checkpoint.

    It vouches for every file that lies in the folder then, an outcome's among them, and for itself. ``settings`` are
    the run's, kept for whoever reads the folder.
    """
    for name in _TENSORS:
        (folder / f"{name}.safetensors").write_bytes(_pack(getattr(state, name)))
    record = {
        "format_version": FORMAT_VERSION,
        "position": asdict(state.position),
        "optimizer_step": state.optimizer_step,
        "average_count": state.average_count,
        "best": None if state.best is None else asdict(state.best),
        "rows": [dict(row) for row in state.rows],
        "sha256": {file.name: _digest(file.read_bytes()) for file in sorted(folder.iterdir()) if file.is_file()},
        "settings": dict(settings),
    }
    partial = folder / f".{STATE}.partial"
    partial.write_text(json.dumps(record | {"sha256_of_this": _record_digest(record)}, indent=1), encoding="utf-8")
    partial.replace(folder / STATE)


def read_checkpoint(folder: Path) -> TrainState:
    """The state in ``folder``. CheckpointError says which file is missing, altered or of another version."""
    record = _read_record(folder)
    tensors = {name: load(_read_file(folder, f"{name}.safetensors", record)) for name in _TENSORS}
    best = record["best"]
    return TrainState(
        position=Position(**record["position"]),
        optimizer_step=record["optimizer_step"],
        average_count=record["average_count"],
        best=None if best is None else Best(**best),
        rows=tuple(record["rows"]),
        **tensors,
    )


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write what a finished run has found into its last checkpoint's folder, before the checkpoint itself."""
    for name, weights in outcome.models.items():
        (folder / f"model-{name}.safetensors").write_bytes(_pack(weights))
    (folder / PREDICTIONS).write_bytes(_pack(outcome.predictions))
    record = {"facts": dict(outcome.facts), "models": list(outcome.models)}
    (folder / OUTCOME).write_text(json.dumps(record), encoding="utf-8")


def read_outcome(folder: Path) -> Outcome | None:
    """The outcome in a checkpoint's folder; None where the run had not finished. CheckpointError as above."""
    record = _read_record(folder)
    if OUTCOME not in record["sha256"]:
        return None
    outcome = json.loads(_read_file(folder, OUTCOME, record))
    return Outcome(
        facts=outcome["facts"],
        models={name: load(_read_file(folder, f"model-{name}.safetensors", record)) for name in outcome["models"]},
        predictions=load(_read_file(folder, PREDICTIONS, record)),
    )


def _read_record(folder: Path) -> dict[str, Any]:
    """state.json, which must be whole and of this version."""
    path = folder / STATE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {STATE}: its writing was cut short") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version!r}, this code reads {FORMAT_VERSION}")
    if record.pop("sha256_of_this", None) != _record_digest(record):
        raise CheckpointError(f"{path} is damaged: it differs from its own SHA-256")
    return dict(record)


def _read_file(folder: Path, name: str, record: Mapping[str, Any]) -> bytes:
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    if _digest(content) != record["sha256"].get(name):
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs from the one in {STATE}")
    return content


def _pack(tensors: Tensors) -> bytes:
    content: bytes = save({name: value.contiguous() for name, value in tensors.items()})
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _record_digest(record: Mapping[str, Any]) -> str:
    return _digest(json.dumps(record, sort_keys=True).encode())
