"""The pictures of a run folder: predictions against truth, and learning curves."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cluster.prediction.scoring import errors_of
from cluster.run.report import labelled, with_unit

Array = npt.NDArray[np.floating[Any]]

_INK = "#1b4965"
_ACCENT = "#d1495b"
_GREY = "#8d99ae"
_PANEL = 4.4
"""Side of a panel, inches."""


def plot_parity(
    path: str | Path, target_names: Sequence[str], units: Mapping[str, str], truth: Array, prediction: Array
) -> None:
    """Draw predictions over true values to ``path``, a square panel a target, from (n, T) arrays in its unit.

    Each panel states MAE, R² and the number of crystals; crystals with a non-finite value are left out of it.
    Raises ValueError where the arrays are not (n, number of targets).
    """
    if truth.shape != prediction.shape or truth.shape[1:] != (len(target_names),):
        raise ValueError(
            f"truth and prediction must be (n, {len(target_names)}), got {truth.shape} and {prediction.shape}"
        )
    figure, panels = _panels(len(target_names))
    for column, (name, axes) in enumerate(zip(target_names, panels, strict=True)):
        finite = np.isfinite(truth[:, column]) & np.isfinite(prediction[:, column])
        _draw_parity(axes, name, units.get(name, ""), truth[finite, column], prediction[finite, column])
    _save(figure, path)


def _draw_parity(axes: Axes, name: str, unit: str, truth: Array, prediction: Array) -> None:
    axes.set_title(name, parse_math=False)
    axes.set_xlabel(labelled("true", _pretty(unit)))
    axes.set_ylabel(labelled("predicted", _pretty(unit)))
    axes.set_aspect("equal")
    if truth.size == 0:
        axes.text(0.5, 0.5, "no crystals", transform=axes.transAxes, ha="center", color=_GREY)
        return
    low, high = min(truth.min(), prediction.min()), max(truth.max(), prediction.max())
    margin = 0.05 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(low - margin, high + margin)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.axline((low, low), slope=1, color=_GREY, linewidth=1, zorder=1)
    size = 18 if truth.size < 1000 else 6
    axes.scatter(truth, prediction, s=size, color=_INK, alpha=0.55, linewidths=0, zorder=2)
    axes.text(0.04, 0.96, _summary(unit, truth, prediction), transform=axes.transAxes, va="top", fontsize=9)


def _summary(unit: str, truth: Array, prediction: Array) -> str:
    errors = errors_of(truth, prediction)
    lines = [f"MAE {_pretty(with_unit(errors.mae, unit))}"]
    if math.isfinite(errors.r2):
        lines.append(f"R² {errors.r2:.3f}")
    return "\n".join([*lines, f"{truth.size} crystals"])


def plot_curves(
    path: str | Path, rows: Sequence[Mapping[str, Any]], units: Mapping[str, str], swa_from: int | None = None
) -> None:
    """Draw metrics rows to ``path``: training loss, then a panel of validation MAE for each target of ``units``.

    ``swa_from`` is the first epoch (from 1) whose weights are averaged: it and those after are shaded. Values that
    are None or missing leave a gap; the smallest validation MAE is marked.
    """
    figure, panels = _panels(1 + len(units))
    epochs = np.array([row["epoch"] for row in rows], dtype=float)
    _draw_curve(panels[0], epochs, _column([row.get("train_loss") for row in rows]))
    panels[0].set_title("training")
    panels[0].set_ylabel("loss on normalized targets")
    for (name, unit), axes in zip(units.items(), panels[1:], strict=True):
        mae = _column([(row.get("val_mae") or {}).get(name) for row in rows])
        _draw_curve(axes, epochs, mae)
        axes.set_title(f"validation: {name}", parse_math=False)
        axes.set_ylabel(labelled("MAE", _pretty(unit)))
        if np.isfinite(mae).any():
            best = int(np.nanargmin(mae))
            label = f"best: {mae[best]:.4g}, epoch {epochs[best]:g}"
            axes.plot(epochs[best], mae[best], "o", color=_ACCENT, label=label)
    for axes in panels:
        if swa_from is not None and epochs.size and epochs[-1] >= swa_from:
            span = (swa_from - 0.5, epochs[-1] + 0.5)
            axes.axvspan(*span, color=_GREY, alpha=0.15, linewidth=0, zorder=0, label="weights averaged")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, loc="upper right")
    _save(figure, path)


def _draw_curve(axes: Axes, epochs: Array, values: Array) -> None:
    axes.plot(epochs, values, color=_INK, linewidth=1.5, marker="." if epochs.size <= 20 else None)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finite = values[np.isfinite(values)]
    if finite.size > 1 and finite.min() > 0 and finite.max() > 5 * finite.min():
        axes.set_yscale("log")


def _column(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels in a row and nothing of pyplot's global state."""
    figure = Figure(figsize=(_PANEL * count, _PANEL * 0.95), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def _pretty(unit: str) -> str:
    """The unit with log10's base set low, and a dollar as it is: to Matplotlib it would begin a formula."""
    return unit.replace("$", r"\$").replace("log10", "log$_{10}$").replace("^-1", "$^{-1}$")


def check_place(path: Path) -> None:
    """Nothing where a picture can be written to ``path``. OSError or ValueError say what is in the way."""
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise ValueError(f"must end in one of {', '.join(f'.{name}' for name in sorted(known))}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with tempfile.TemporaryFile(dir=folder):  # what the rights to a folder say is not all: it may be read-only
        pass


def _save(figure: Figure, path: str | Path) -> None:
    """Write the picture in one step, in the format of the path's suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")  # another command may write one, too
    try:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip("."))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
