"""Predicting structures with trained models: one, or several whose mean and spread are given."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cluster.errors import UserError
from cluster.files import write_text
from crystalformer.artifact import Predictor, load_model
from crystalformer.batch import CrystalBatch, Disorder
from data_pipeline.elements import number_of, symbol_of

if TYPE_CHECKING:
    from cluster.inputs import Found
    from data_pipeline.crystal import Crystal

ATOMS_AT_ONCE = 4096
"""Atoms of a batch at most, however many crystals may be in it; a larger crystal is a batch of its own."""

Cell = str | float


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
    """The model of a folder. UserError says what is wrong with it."""
    folder = Path(folder)
    try:
        return load_model(folder, device=str(device))
    except (OSError, ValueError) as error:
        hint = f"; did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        raise UserError(f"{error}{hint}") from error


class Ensemble:
    """One model or several of the same targets."""

    def __init__(self, folders: Sequence[str], device: torch.device) -> None:
        """Read the model folders. UserError where one cannot be read or predicts something else."""
        self._models = [load_predictor(folder, device) for folder in folders]
        first = self._models[0].card
        self.targets = tuple((target.name, target.unit) for target in first.targets)
        seen = []
        for folder, model in zip(folders, self._models, strict=True):
            targets = tuple((target.name, target.unit) for target in model.card.targets)
            if targets != self.targets:
                raise UserError(f"{folder} predicts {_listed(targets)}, but {folders[0]} {_listed(self.targets)}")
            seen.append({number_of(symbol) for symbol in model.card.provenance.get("elements", ())})
        self._seen = set.intersection(*seen) if all(seen) else None

    @property
    def header(self) -> list[str]:
        """The columns of ``row``, with units."""
        names = [""] if len(self._models) == 1 else ["", " spread"]
        values = [_with_unit(name + what, unit) for name, unit in self.targets for what in names]
        return ["id", "formula", *values, "warning"]

    def predict(self, found: Iterable[Found], batch_size: int) -> Iterator[Prediction]:
        """Predictions of structures that were read, in their order, ``batch_size`` or fewer at once."""
        for group in _groups(found, batch_size):
            crystals = [one.crystal for one in group if one.crystal is not None]
            batch = to_batch(crystals)
            each = np.stack([model.predict_batch(batch).numpy() for model in self._models])
            mean = each.mean(0)
            spread = each.std(0, ddof=1) if len(each) > 1 else None
            for i, (one, crystal) in enumerate(zip(group, crystals, strict=True)):
                yield Prediction(
                    id=one.id,
                    formula=formula(crystal),
                    values=mean[i],
                    spread=None if spread is None else spread[i],
                    warning=self._warning(crystal),
                )

    def _warning(self, crystal: Crystal) -> str:
        if self._seen is None:
            return ""
        new = sorted(set(_amounts(crystal)) - self._seen)
        return f"never seen in training: {' '.join(symbol_of(number) for number in new)}" if new else ""


def row(prediction: Prediction) -> list[Cell]:
    """The values of ``Ensemble.header``'s columns."""
    columns = [prediction.values] if prediction.spread is None else [prediction.values, prediction.spread]
    numbers = np.stack(columns, axis=-1).reshape(-1).tolist()
    return [prediction.id, prediction.formula, *numbers, prediction.warning]


def _with_unit(name: str, unit: str) -> str:
    return name if unit in ("", "1") else f"{name} [{unit}]"


def _listed(targets: Sequence[tuple[str, str]]) -> str:
    return ", ".join(_with_unit(name, unit) for name, unit in targets)


def _groups(found: Iterable[Found], batch_size: int) -> Iterator[list[Found]]:
    """At most ``batch_size`` structures and ATOMS_AT_ONCE atoms at a time, but at least one structure."""
    group: list[Found] = []
    atoms = 0
    for one in found:
        size = 0 if one.crystal is None else len(one.crystal.atomic_numbers)
        if group and (len(group) == batch_size or atoms + size > ATOMS_AT_ONCE):
            yield group
            group, atoms = [], 0
        group.append(one)
        atoms += size
    if group:
        yield group


def to_batch(crystals: Sequence[Crystal]) -> CrystalBatch:
    """Checked crystals, one after another."""
    sizes = [len(crystal.atomic_numbers) for crystal in crystals]
    starts = np.cumsum(sizes) - sizes
    mixed = [(s, c.disorder) for s, c in zip(starts, crystals, strict=True) if c.disorder is not None]
    disorder = None
    if mixed:
        disorder = Disorder(
            atom=torch.from_numpy(np.concatenate([d.site + start for start, d in mixed])),
            atomic_number=torch.from_numpy(np.concatenate([d.atomic_number for _, d in mixed])),
            occupancy=torch.from_numpy(np.concatenate([d.occupancy for _, d in mixed])),
        )
    return CrystalBatch.from_arrays(
        np.concatenate([crystal.positions for crystal in crystals]),
        np.concatenate([crystal.atomic_numbers for crystal in crystals]),
        np.stack([crystal.lattice for crystal in crystals]),
        sizes,
        disorder,
    )


def formula(crystal: Crystal) -> str:
    """The reduced formula, as pymatgen writes it."""
    from pymatgen.core.composition import Composition

    return Composition({symbol_of(z): amount for z, amount in _amounts(crystal).items()}).reduced_formula


def _amounts(crystal: Crystal) -> dict[int, float]:
    """Atoms of each atomic number in the cell, with the occupancies of disordered sites."""
    numbers = crystal.atomic_numbers[crystal.atomic_numbers > 0]
    kinds, counts = np.unique(numbers, return_counts=True)
    amounts = dict(zip(kinds.tolist(), counts.astype(float).tolist(), strict=True))
    if crystal.disorder is not None:
        for z, part in zip(crystal.disorder.atomic_number.tolist(), crystal.disorder.occupancy.tolist(), strict=True):
            amounts[z] = amounts.get(z, 0.0) + part
    return amounts


FORMATS = (".csv", ".jsonl", ".parquet")


def check_output(path: Path) -> None:
    """UserError for a file of no known format."""
    if path.suffix not in FORMATS:
        raise UserError(f"output must end in {', '.join(FORMATS)}, got {str(path)!r}")


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Write a table in the format of the path's suffix, in one step. UserError where it cannot be written."""
    try:
        if path.suffix == ".parquet":
            _write_parquet(path, header, rows)
        else:
            write_text(path, as_csv(header, rows) if path.suffix == ".csv" else as_jsonl(header, rows))
    except OSError as error:
        raise UserError(f"output {path}: {error.strerror or error}") from error


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Comma-separated lines, numbers with eight digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_shown(cell, 8) for cell in cells] for cells in rows)
    return text.getvalue()


def as_jsonl(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A JSON object a line."""
    lines = [json.dumps(dict(zip(header, cells, strict=True)), ensure_ascii=False) for cells in rows]
    return "".join(line + "\n" for line in lines)


def _write_parquet(path: Path, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [pa.string() if name in ("id", "formula", "warning") else pa.float64() for name in header]
    columns = [pa.array([cells[i] for cells in rows], kind) for i, kind in enumerate(kinds)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(pa.table(columns, names=list(header)), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned columns for people, numbers with five digits; the warnings only where there are any."""
    kept = len(header) if any(cells[-1] for cells in rows) else len(header) - 1
    lines = [list(header[:kept]), *([_shown(cell, 5) for cell in cells[:kept]] for cells in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(kept)]
    padded = ("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _shown(cell: Cell, digits: int) -> str:
    return cell if isinstance(cell, str) else f"{cell:.{digits}g}"
