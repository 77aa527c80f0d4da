"""Preparing the user's own structures under a name of the user's choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.datasets import check_name
from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo, SourceKind, SplitRecipe
from data_pipeline.prepare import Executor, prepare_from
from data_pipeline.prepared import PreparedDataset
from data_pipeline.registry import DATASETS
from data_pipeline.sources.opening import open_path
from data_pipeline.splits import check_ratios
from data_pipeline.steps.execute import Progress
from data_pipeline.text import readable

_RECIPE = SplitRecipe()


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnData:
    """What `crystalformer prepare --source` was given.

    path: of the structures (sources/opening.py says what may lie there). name: of the data set to be. split and seed:
    of the recipe, unused where the source has splits of its own. targets: columns to predict; all numeric ones if
    empty. allow_pickle: read pickles, restricted.
    """

    path: Path
    name: str
    split: tuple[float, float, float] = _RECIPE.ratios
    seed: int = _RECIPE.seed
    targets: tuple[str, ...] = ()
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        """Raises DataError for a name that is no folder's or is registered, and for ratios that are no split."""
        check_name(self.name)
        check_ratios(self.split)
        if any(self.name == info.name or self.name in info.aliases for info in DATASETS):
            raise DataError(f"data set name {self.name!r} is that of a registered set; choose another with --name")


def prepare_source(
    own: OwnData,
    data_dir: Path,
    *,
    strict: bool = False,
    progress: Progress | None = None,
    executor: Executor = "auto",
) -> PreparedDataset:
    """Make data_dir/<name> from the user's structures, or reuse it if the source has not changed.

    Bad rows are counted and listed in dataset.json; strict makes one an error. Raises DataError.
    """
    source = open_path(own.path, own.targets, allow_pickle=own.allow_pickle)
    info = DatasetInfo(
        name=own.name,
        kind=SourceKind.OWN,
        targets=source.targets,
        source=readable(own.path.name),
        citation="",
        licence="",
        recipe=SplitRecipe(ratios=own.split, seed=own.seed),
    )
    return prepare_from(source, info, data_dir, strict=strict, progress=progress, executor=executor)
