"""What a run leaves behind: results.json, metrics.jsonl, predictions.csv, and who made it.

Metrics rows count epochs from 1. A row holds epoch, step, lr, train_loss, val_mae (an object by target, in the
target's unit), structures_per_s and seconds, and may hold more numbers.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cluster.errors import UserError
from cluster.files import write_text

RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.jsonl"
PREDICTIONS_FILE = "predictions.csv"
TENSORBOARD_FOLDER = "tensorboard"

_LIBRARIES = ("torch", "ray", "deepspeed", "numpy", "numba", "triton", "crystalformer")
_REPOSITORY = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a finished run reports: the content of results.json, and where it lies."""

    run_dir: str
    """Folder of the run; not written."""
    dataset: str
    targets: tuple[str, ...]
    units: Mapping[str, str]
    """Unit of each target, e.g. log10(GPa)."""
    seed: int
    epochs: int
    num_parameters: int
    world_size: int
    """Workers at the end."""
    zero_stage: int
    device: str
    train_size: int
    """Crystals of the split, like val_size and test_size."""
    val_size: int
    test_size: int
    best_epoch: int
    """Epoch, from 1, of the smallest validation error."""
    val_mae: Mapping[str, float]
    """Of the best-validation weights, by target in its unit; so is test_mae."""
    test_mae: Mapping[str, float]
    test_mae_swa: Mapping[str, float]
    """Of the averaged weights; empty where none were averaged."""
    wall_seconds: float
    """From start to end; of a run that was gone on with, its training before and all of the last command."""
    structures_per_second: float
    """Training throughput over all workers."""
    peak_memory_mb: float
    """Largest memory of a worker: of its GPU where it has one, else resident."""
    versions: Mapping[str, str]
    git_commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "run_dir"}
        cleaned: dict[str, Any] = json_ready(values)
        return cleaned


def json_ready(value: Any) -> Any:  # noqa: ANN401 - JSON is any of its types
    """``value`` in JSON's own types: numpy scalars and arrays as numbers and lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def wall_seconds(run_dir: str | Path) -> float | None:
    """How long the run took, where its results are there already."""
    path = Path(run_dir) / RESULTS_FILE
    return float(json.loads(path.read_text(encoding="utf-8"))["wall_seconds"]) if path.is_file() else None


def seconds_before(run_dir: str | Path) -> float:
    """How long a run has trained by its metrics, which go on counting where it is gone on with."""
    return float(max((row.get("seconds", 0.0) for row in read_metrics(run_dir)), default=0.0))


def write_results(run_dir: str | Path, result: RunResult) -> Path:
    """Write results.json (keys sorted, non-finite numbers as null) in one step; gives its path."""
    path = Path(run_dir) / RESULTS_FILE
    write_text(
        path, json.dumps(result.to_dict(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    )
    return path


def read_metrics(run_dir: str | Path) -> list[Row]:
    """The rows of metrics.jsonl in order; none where there is no file.

    A last line cut short by a crash is passed over; UserError for any other line that is no JSON object.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or cut within a letter
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} must be a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


class MetricsLog:
    """metrics.jsonl, a row an epoch as epochs end, and the same numbers as TensorBoard events."""

    def __init__(self, run_dir: str | Path, resume_from_epoch: int | None = None) -> None:
        """Open the log of ``run_dir``, empty or with the rows before the epoch a run is resumed from.

        ``resume_from_epoch`` is the first epoch (from 1) still to be run; None starts an empty log.
        """
        from torch.utils.tensorboard import SummaryWriter  # torch takes seconds to import

        run_dir = Path(run_dir)
        kept = (
            [] if resume_from_epoch is None else [r for r in read_metrics(run_dir) if r["epoch"] < resume_from_epoch]
        )
        path = run_dir / METRICS_FILE
        write_text(path, "".join(_json_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=resume_from_epoch)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row to disk before returning; it must hold an integer ``epoch``, which is TensorBoard's step."""
        epoch = int(row["epoch"])
        self._file.write(_json_line(row))
        self._file.flush()
        for name, value in scalars_of(row):
            self._events.add_scalar(name, value, epoch)
        self._events.flush()

    def close(self) -> None:
        """Close both files; closing twice does nothing."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(json_ready(row), allow_nan=False, ensure_ascii=False) + "\n"


def scalars_of(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The finite numbers of a row but its epoch, objects as name/key: ``[("val_mae/shear", 0.1), ...]``."""
    found: list[tuple[str, float]] = []
    for name, value in json_ready(row).items():
        items = [(f"{name}/{key}", v) for key, v in value.items()] if isinstance(value, dict) else [(name, value)]
        found += [(tag, float(v)) for tag, v in items if isinstance(v, int | float) and tag != "epoch"]
    return found


def with_unit(value: float, unit: str) -> str:
    """A number as it is shown to people: four decimals and its unit, none where it is ``1`` (dimensionless)."""
    return f"{value:.4f}" if unit in ("", "1") else f"{value:.4f} {unit}"


def labelled(name: str, unit: str) -> str:
    """``name [unit]``, or the name alone where the unit is unknown (empty) or ``1`` (dimensionless)."""
    return name if unit in ("", "1") else f"{name} [{unit}]"


def write_predictions(
    run_dir: str | Path,
    material_ids: Sequence[str],
    target_names: Sequence[str],
    truth: npt.NDArray[np.floating[Any]],
    prediction: npt.NDArray[np.floating[Any]],
) -> Path:
    """Write predictions.csv, a row a crystal, from (n, T) arrays in the targets' units; gives its path.

    Columns are material_id, target, prediction for one target, material_id, target_<t>, prediction_<t>, ... for
    several. Raises ValueError where ids, names and arrays do not agree.
    """
    shape = (len(material_ids), len(target_names))
    if truth.shape != shape or prediction.shape != shape:
        raise ValueError(f"truth and prediction must be {shape}, got {truth.shape} and {prediction.shape}")
    suffixes = [""] if len(target_names) == 1 else [f"_{name}" for name in target_names]
    header = [column + suffix for suffix in suffixes for column in ("target", "prediction")]
    pairs = np.stack([truth, prediction], axis=-1).reshape(shape[0], -1).tolist()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["material_id", *header])
    writer.writerows(
        [name, *(f"{value:.8g}" for value in row)] for name, row in zip(material_ids, pairs, strict=True)
    )
    path = Path(run_dir) / PREDICTIONS_FILE
    write_text(path, text.getvalue())
    return path


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: str | Path = _REPOSITORY) -> str | None:
    """Commit of the checkout whose top is ``folder``, with ``+dirty`` where tracked files differ from it.

    None where ``folder`` is not the top of a checkout (an installed package), has no commit, or git is missing.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != Path(folder).resolve():
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+dirty" if changed else "")


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
