"""How good a model is on a split of a prepared data set: errors in the targets' units, and where they are large."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster.data.dataset import prepared_for, require_rows
from cluster.data.feed import Feed, TargetScaling
from cluster.data.tables import open_split
from cluster.errors import UserError
from cluster.run.progress import counting
from cluster.worker.evaluation import EVAL_BATCH
from crystalformer.artifact import ModelCard, Predictor, TargetScale
from data_pipeline.datasets import ResolvedDataset, resolve
from data_pipeline.elements import symbol_of
from data_pipeline.prepared import PreparedDataset
from data_pipeline.table import PackedStructures, StructureTable
from data_pipeline.validate import MAX_ATOMIC_NUMBER

Floats = npt.NDArray[np.float64]

_log = logging.getLogger(__name__)

CELL_SIZES = (4, 8, 16, 32, 64)
"""Atoms up to which a crystal counts into a class of cell sizes; larger ones are the last class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A split predicted: ids and atoms (n,) of its crystals, truth and prediction (n, T) in the targets' units.

    elements: (n, 99), whether an atomic number is among those of a crystal.
    """

    dataset: str
    ids: list[str]
    sizes: npt.NDArray[np.int64]
    elements: npt.NDArray[np.bool_]
    truth: Floats
    prediction: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Of one target over n crystals, in its unit but for r2, which is NaN where the truth has one value only."""

    mae: float
    rmse: float
    r2: float


def score_split(
    predictor: Predictor, device: torch.device, dataset: str, split: str, data_dir: Path, batch_size: int = EVAL_BATCH
) -> Scored:
    """Predict every crystal of a split that has all of the model's targets; the data are prepared if need be.

    Warns where the model was trained on other rows of this data set: the split may hold some of them.
    DataError where the data set is unknown or lacks a target; UserError where its unit is another or no row is there.
    """
    scales = predictor.card.targets
    data_dir = data_dir.resolve()
    found = _with_targets(dataset, scales, data_dir)
    prepared, names = prepared_for(found, data_dir), found.target_names
    _warn_of_other_rows(predictor.card, prepared, split)
    around = predictor.card.model.neighborhood
    with counting() as progress:
        tables = open_split(prepared, split, names, around, progress)
    structures = StructureTable.from_arrow(tables.structures, names)
    require_rows(structures, prepared, split, names)
    scaling = TargetScaling(scale=tuple(s.scale for s in scales), bias=tuple(s.bias for s in scales))
    feed = Feed(tables, names, around.radius, scaling)
    rows = np.arange(feed.num_rows)
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    predicted = [predictor.predict_batch(feed.batch(part, device)[0]).numpy() for part in parts]
    return Scored(
        dataset=prepared.name,
        ids=structures.material_ids(),
        sizes=structures.sizes,
        elements=np.concatenate([_elements(structures.gather(part)) for part in parts]),
        truth=structures.targets(),
        prediction=np.concatenate(predicted),
    )


def _with_targets(dataset: str, scales: tuple[TargetScale, ...], data_dir: Path) -> ResolvedDataset:
    """The data set with the model's targets. DataError where it lacks one, UserError where its unit is another."""
    found = resolve(dataset, [scale.name for scale in scales], data_dir)
    for target, scale in zip(found.targets, scales, strict=True):
        if scale.unit and target.unit and scale.unit != target.unit:
            raise UserError(f"{found.name} has {target.name} in {target.unit}, but the model predicts {scale.unit}")
    return found


def _warn_of_other_rows(card: ModelCard, prepared: PreparedDataset, split: str) -> None:
    """Warn where the card tells this data set, prepared otherwise: its rows were dealt to splits in another way."""
    was = card.provenance.get("dataset_fingerprint")
    if was is None or card.provenance.get("dataset") != prepared.name or was == prepared.fingerprint:
        return
    _log.warning(
        "%s was prepared anew since the model was trained on it (%s is now %s): the %s split may hold structures it "
        "was trained on, and the errors be too small",
        *(prepared.name, str(was)[:12], prepared.fingerprint[:12], split),
    )


def _elements(packed: PackedStructures) -> npt.NDArray[np.bool_]:
    """(n, 99) of packed structures; species of disordered sites count like others."""
    crystal = np.repeat(np.arange(len(packed.sizes)), packed.sizes)
    found = np.zeros((len(packed.sizes), MAX_ATOMIC_NUMBER + 1), dtype=np.bool_)
    found[crystal, packed.atomic_numbers] = True
    if packed.disorder is not None:
        found[crystal[packed.disorder.site], packed.disorder.atomic_number] = True
    found[:, 0] = False
    return found


def errors_of(truth: npt.NDArray[np.floating[Any]], prediction: npt.NDArray[np.floating[Any]]) -> Errors:
    """Of one target, (n,) each."""
    residual, spread = prediction - truth, truth - truth.mean()
    total = float((spread**2).sum())
    return Errors(
        mae=float(np.abs(residual).mean()),
        rmse=float(np.sqrt((residual**2).mean())),
        r2=1 - float((residual**2).sum()) / total if total > 0 else float("nan"),
    )


def worst(scored: Scored, column: int, count: int) -> list[int]:
    """Rows of the ``count`` largest errors of a target, the largest first."""
    residual = np.abs(scored.prediction[:, column] - scored.truth[:, column])
    order: list[int] = np.argsort(-residual, kind="stable")[:count].tolist()
    return order


def mae_by_size(scored: Scored, column: int) -> list[tuple[str, int, float]]:
    """(atoms, crystals, MAE in the target's unit) of every class of cell sizes that has any crystal."""
    residual = np.abs(scored.prediction[:, column] - scored.truth[:, column])
    classes = np.searchsorted(CELL_SIZES, scored.sizes)
    lows = [1, *(size + 1 for size in CELL_SIZES)]
    names = [f"{low} to {high}" for low, high in zip(lows, CELL_SIZES, strict=False)] + [f"{lows[-1]} and more"]
    return [
        (name, int((classes == i).sum()), float(residual[classes == i].mean()))
        for i, name in enumerate(names)
        if (classes == i).any()
    ]


def mae_by_element(scored: Scored, column: int) -> list[tuple[str, int, float]]:
    """(symbol, crystals that hold the element, their MAE in the target's unit), the largest error first."""
    residual = np.abs(scored.prediction[:, column] - scored.truth[:, column])
    counts = scored.elements.sum(0)
    found = [
        (symbol_of(z), int(counts[z]), float(residual[scored.elements[:, z]].mean()))
        for z in np.flatnonzero(counts).tolist()
    ]
    return sorted(found, key=lambda row: -row[2])
