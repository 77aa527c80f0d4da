"""A prepared data set on disk: data/<name>/{train,val,test}/*.parquet and dataset.json, which this file reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.info import SplitSizes, TargetInfo

FILE_NAME = "dataset.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Mean and population standard deviation of a target over the training split, in the target's unit."""

    mean: float
    std: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedRow:
    """A row that was left out. row counts from 0 in its file; material_id is empty where none was readable."""

    file: str
    row: int
    material_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedDataset:
    """What dataset.json says. reused: it was there already and nothing was done. own_splits: the source named them.

    statistics has an entry a target; rejected lists every row left out and why; in_no_split counts the usable ones
    that the recipe left over.
    """

    name: str
    path: Path
    sizes: SplitSizes
    targets: tuple[TargetInfo, ...]
    statistics: dict[str, Statistics]
    elements: tuple[str, ...]
    rejected: tuple[RejectedRow, ...]
    source: str
    citation: str
    licence: str
    fingerprint: str
    own_splits: bool = False
    in_no_split: int = 0
    reused: bool = True

    def split_path(self, split: str) -> Path:
        """The folder of ``train``, ``val`` or ``test``."""
        return self.path / split

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the targets, in order."""
        return tuple(target.name for target in self.targets)


def is_prepared(data_dir: Path, name: str) -> bool:
    """Whether data_dir/name holds a prepared data set."""
    return (data_dir / name / FILE_NAME).is_file()


def load_prepared(data_dir: Path, name: str) -> PreparedDataset:
    """Read data_dir/name/dataset.json. Raises DataError if it is not there or not readable.

    The set is called as its folder is: a copied or renamed one is the data in it, under whatever name it was made.
    """
    path = data_dir / name
    file = path / FILE_NAME
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return _from_json(raw, path, name)
    except FileNotFoundError:
        raise DataError(f"{file}: not found: data set {name!r} is not prepared under {data_dir}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a data set description ({error!r}); prepare the data set again") from error


def _from_json(raw: dict[str, Any], path: Path, name: str) -> PreparedDataset:
    recipe = raw.get("split", {})
    return PreparedDataset(
        name=name,
        path=path,
        sizes=SplitSizes(**raw["sizes"]),
        targets=tuple(
            TargetInfo(name=target, unit=field["unit"], description=field["description"])
            for target, field in raw["targets"].items()
        ),
        statistics={
            target: Statistics(mean=field["train_mean"], std=field["train_std"])
            for target, field in raw["targets"].items()
        },
        elements=tuple(raw["elements"]),
        rejected=tuple(RejectedRow(**row) for row in raw["rejected"]["rows"]),
        source=raw["source"],
        citation=raw["citation"],
        licence=raw["licence"],
        fingerprint=raw["fingerprint"],
        own_splits=bool(recipe) and "ratios" not in recipe,
        in_no_split=int(raw.get("rows", {}).get("in_no_split", 0)),
    )
