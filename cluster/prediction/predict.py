"""Predicting structures with trained models: one, or several whose mean and spread are given."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cluster.ahead import ahead
from cluster.data.feed import batch_of_crystals
from cluster.errors import UserError
from cluster.prediction.answers import Cell
from cluster.prediction.seen import Seen, elements_of
from cluster.run.report import labelled
from cluster.run.storage import local_folder
from cluster.settings.reach import check_reach
from crystalformer.artifact import CONFIG, WORK_AT_ONCE, Predictor, batch_work, load_model, read_card
from crystalformer.batch import CrystalBatch
from data_pipeline.composition import amounts_of
from data_pipeline.elements import symbol_of

if TYPE_CHECKING:
    from cluster.prediction.inputs import Found
    from data_pipeline.crystal import Crystal

Floats = npt.NDArray[np.float64]
NOT_FINITE = "no finite prediction"
"""The warning of a structure for which a model gives NaN or infinity."""

_Batch = tuple[list["Found"], list["Crystal"], list[str], CrystalBatch]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What is said of a structure: ``values`` (T,) in the targets' units, the mean where there are several models.

    spread: (T,) standard deviation over the models (n - 1), None for a single one. warning: empty if there is none.
    """

    id: str
    formula: str
    values: npt.NDArray[np.float64]
    spread: npt.NDArray[np.float64] | None
    warning: str


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` names. UserError where there is no GPU but one is asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but no CUDA GPU is visible; use auto or cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_predictor(folder: str | Path, device: torch.device) -> Predictor:
    """The model of a folder or URI. UserError says what is wrong with it."""
    with local_folder(str(folder), "MODEL") as local:
        try:
            return _load(local, device)
        except (OSError, ValueError) as error:
            inside = f"{str(folder).rstrip('/')}/model"
            hint = f"; did you mean {inside}?" if (local / "model" / CONFIG).is_file() else ""
            raise UserError(f"{error}{hint}".replace(str(local), str(folder))) from error


def _load(folder: Path, device: torch.device) -> Predictor:
    """As ``load_model``, but ValueError as well for a model whose attention reaches too far."""
    try:
        check_reach(read_card(folder).model)
    except UserError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return load_model(folder, device=str(device))


class Ensemble:
    """One model or several of the same targets."""

    def __init__(self, folders: Sequence[str], device: torch.device) -> None:
        """Read the model folders. UserError where one cannot be read or predicts something else."""
        self._models = [load_predictor(folder, device) for folder in folders]
        first = self._models[0].card
        self.targets = tuple((target.name, target.unit) for target in first.targets)
        for folder, model in zip(folders, self._models, strict=True):
            targets = tuple((target.name, target.unit) for target in model.card.targets)
            if targets != self.targets:
                raise UserError(f"{folder} predicts {_listed(targets)}, but {folders[0]} {_listed(self.targets)}")
            try:
                elements_of(model.card)
            except ValueError as error:
                raise UserError(f"{folder}: {CONFIG}: provenance's elements: {error}") from error
        self.seen = Seen.by_all([model.card for model in self._models])
        self.wave_radius = max(model.card.model.wave_radius for model in self._models)
        around = {model.card.model.neighborhood for model in self._models}
        self.neighborhoods = sorted(one for one in around if one.radius > 0)
        """What the models look at in real space, the widest last."""

    @property
    def header(self) -> list[str]:
        """The columns of ``row``, with units."""
        names = [""] if len(self._models) == 1 else ["", " spread"]
        values = [labelled(name + what, unit) for name, unit in self.targets for what in names]
        return ["id", "formula", *values, "warning"]

    def predict(self, found: Iterable[Found], batch_size: int | None = None) -> Iterator[Prediction]:
        """Predictions of structures that were read, in their order; batches as large as memory allows, or smaller."""
        for group, crystals, formulas, batch in ahead(self._batches(found, batch_size)):
            mean, spread = self.predict_batch(batch)
            for i, (one, crystal) in enumerate(zip(group, crystals, strict=True)):
                yield Prediction(
                    id=one.id,
                    formula=formulas[i],
                    values=mean[i],
                    spread=None if spread is None else spread[i],
                    warning=self.seen.warning(crystal) if np.isfinite(mean[i]).all() else NOT_FINITE,
                )

    def _batches(self, found: Iterable[Found], batch_size: int | None) -> Iterator[_Batch]:
        """What was read, batch by batch: with neighbour shells, which all models share, and formulas.

        Those are made here as they silence warnings, which reading listens to: Python's are those of the process.
        """
        reach = max((one.radius for one in self.neighborhoods), default=0.0)
        for group in _groups(found, reach, self.wave_radius, batch_size):
            crystals = [one.crystal for one in group if one.crystal is not None]
            batch = batch_of_crystals(crystals)
            for radius, distinct in self.neighborhoods:
                _ = batch.distinct(radius) if distinct else batch.shells(radius)
            yield group, crystals, [formula(crystal) for crystal in crystals], batch

    def predict_batch(self, batch: CrystalBatch) -> tuple[Floats, Floats | None]:
        """Mean over the models and its spread (None for a single one), (B, T) each, in the targets' units."""
        batch = batch.to(self._models[0].device)  # once, with what all of them derive from it
        each = np.stack([model.predict_batch(batch).numpy() for model in self._models])
        return each.mean(0), each.std(0, ddof=1) if len(each) > 1 else None


def columns(values: Floats, spread: Floats | None) -> Floats:
    """(.., T) values and their spread as the header orders them: (.., T) or (.., 2 T)."""
    parts = [values] if spread is None else [values, spread]
    return np.stack(parts, axis=-1).reshape(*values.shape[:-1], -1)


def row(prediction: Prediction) -> list[Cell]:
    """The values of ``Ensemble.header``'s columns."""
    numbers = columns(prediction.values, prediction.spread).tolist()
    return [prediction.id, prediction.formula, *numbers, prediction.warning]


def _listed(targets: Sequence[tuple[str, str]]) -> str:
    return ", ".join(labelled(name, unit) for name, unit in targets)


def _groups(
    found: Iterable[Found], radius: float, wave_radius: float, batch_size: int | None
) -> Iterator[list[Found]]:
    """What is one batch: as much as ``batch_ends`` says, read no further than to the next structure."""
    group: list[Found] = []
    held = 0.0
    for one in found:
        work = 0.0 if one.crystal is None else crystal_work(one.crystal, radius, wave_radius)
        if group and (held + work > WORK_AT_ONCE or len(group) == batch_size):
            yield group
            group, held = [], 0.0
        group.append(one)
        held += work
    if group:
        yield group


def crystal_work(crystal: Crystal, radius: float, wave_radius: float = 0.0) -> float:
    """A crystal's share of a batch's memory, as ``batch_work`` has it."""
    return batch_work(len(crystal.atomic_numbers), abs(float(np.linalg.det(crystal.lattice))), radius, wave_radius)


def formula(crystal: Crystal) -> str:
    """The reduced formula, as pymatgen writes it."""
    from pymatgen.core.composition import Composition

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noble gases have no electronegativity to be sorted by
        return Composition({symbol_of(z): amount for z, amount in amounts_of(crystal).items()}).reduced_formula
