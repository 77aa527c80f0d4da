"""What is in a prepared data set, as text and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.elements import symbol_of
from data_pipeline.prepared import PreparedDataset, load_prepared
from data_pipeline.splits import SPLITS
from data_pipeline.steps.assign import count_rules
from data_pipeline.table import StructureTable
from data_pipeline.text import printable

BINS = 12
_BAR = 40
_SHOWN_ROWS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """All splits together: atoms (n,) of each cell; values a target, without missing ones; crystals by element."""

    sizes: dict[str, int]
    atoms: Floats
    values: dict[str, Floats]
    missing: dict[str, int]
    elements: dict[str, int]


def read_contents(prepared: PreparedDataset) -> Contents:
    """Count what the splits hold. Raises DataError where a split cannot be read."""
    atoms: list[Floats] = []
    values: dict[str, list[Floats]] = {name: [] for name in prepared.target_names}
    missing = dict.fromkeys(prepared.target_names, 0)
    elements = np.zeros(128, dtype=np.int64)
    sizes = {}
    for split in SPLITS:
        table = StructureTable.open(prepared.split_path(split), [])
        sizes[split] = table.num_rows
        atoms.append(table.sizes.astype(np.float64))
        elements += _crystals_by_element(table)
        for name in prepared.target_names:
            column = StructureTable.open(prepared.split_path(split), [name])
            values[name].append(column.targets()[:, 0])
            missing[name] += column.num_dropped
    return Contents(
        sizes=sizes,
        atoms=np.concatenate(atoms),
        values={name: np.concatenate(parts) for name, parts in values.items()},
        missing=missing,
        elements={symbol_of(int(z)): int(elements[z]) for z in np.flatnonzero(elements) if z > 0},
    )


def describe(data_dir: Path, name: str) -> str:
    """Sizes, elements, atoms a cell, histograms of the targets and rejected rows of a prepared data set.

    Raises DataError if it is not prepared under ``data_dir``.
    """
    prepared = load_prepared(data_dir, name)
    contents = read_contents(prepared)
    lines = [
        f"{prepared.name}: " + ", ".join(f"{n} {split}" for split, n in contents.sizes.items()),
        f"source    {prepared.source}",
        *([f"cite      {prepared.citation}"] if prepared.citation else []),
        *([f"licence   {prepared.licence}"] if prepared.licence else []),
        f"prepared  {prepared.path}",
        "",
        f"{len(contents.elements)} elements, by the number of crystals that hold them",
        *_wrapped(f"{symbol} {n}" for symbol, n in sorted(contents.elements.items(), key=lambda item: -item[1])),
        "",
        f"atoms a cell: mean {contents.atoms.mean():.1f}, {contents.atoms.min():.0f} to {contents.atoms.max():.0f}",
        *histogram(contents.atoms),
    ]
    for target in prepared.targets:
        statistics = prepared.statistics[target.name]
        absent = f"; missing in {contents.missing[target.name]} rows" if contents.missing[target.name] else ""
        unit = "" if target.unit == "1" else f" [{target.unit or 'no unit given'}]"
        lines += [
            "",
            f"{target.name}{unit}: training mean {statistics.mean:.4g}, std {statistics.std:.4g}{absent}",
            *([f"  {target.description}"] if target.description else []),
            *histogram(contents.values[target.name]),
        ]
    return "\n".join(map(printable, [*lines, "", *rejected_lines(prepared)]))


def rejected_lines(prepared: PreparedDataset) -> list[str]:
    """The rows left out: how many by rule, and the first of them; and how many the recipe left over."""
    n = prepared.in_no_split
    over = (
        [f"{n} usable {'row is' if n == 1 else 'rows are'} in no split, left over by its sizes or ratios"]
        if n
        else []
    )
    if not prepared.rejected:
        return ["no row was rejected", *over]
    counts = count_rules(row.reason for row in prepared.rejected)
    lines = [f"{len(prepared.rejected)} rows rejected: " + ", ".join(f"{n} {rule}" for rule, n in counts.items())]
    for row in prepared.rejected[:_SHOWN_ROWS]:
        lines.append(printable(f"  {row.file} row {row.row} {row.material_id}: {row.reason}"))
    if len(prepared.rejected) > _SHOWN_ROWS:
        lines.append(f"  ... all of them in {prepared.path / 'dataset.json'}")
    return [*lines, *over]


def histogram(values: Floats) -> list[str]:
    """Lines of a histogram in text: where a bin begins, a bar, how many values."""
    if len(values) == 0:
        return ["  no values"]
    counts, edges = np.histogram(values, bins=BINS)
    longest = int(counts.max())
    bars = ["█" * round(_BAR * int(n) / longest) for n in counts]
    return [
        f"  {edge:>10.4g} {bar:{_BAR}} {n}" for edge, bar, n in zip(edges[:-1], bars, counts.tolist(), strict=True)
    ]


def plot(data_dir: Path, name: str, out: Path) -> Path:
    """A picture of the same: elements, atoms a cell and every target. Returns ``out``. Raises DataError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prepared = load_prepared(data_dir, name)
    contents = read_contents(prepared)
    panels = 1 + len(prepared.targets)
    figure = Figure(figsize=(4 * max(panels, 2), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, panels)
    _bars(figure.add_subplot(grid[0, :]), contents.elements)
    _bins(figure.add_subplot(grid[1, 0]), contents.atoms, "atoms a cell")
    for i, target in enumerate(prepared.targets):
        unit = "" if target.unit in ("", "1") else f" ({target.unit})"
        _bins(figure.add_subplot(grid[1, i + 1]), contents.values[target.name], f"{target.name}{unit}")
    sizes = ", ".join(f"{n} {split}" for split, n in contents.sizes.items())
    figure.suptitle(f"{prepared.name}: {sizes}; {len(prepared.rejected)} rows rejected")
    figure.savefig(out, dpi=120)
    return out


def _bars(axes: Any, elements: dict[str, int]) -> None:  # noqa: ANN401 - matplotlib ships no types
    axes.bar(range(len(elements)), list(elements.values()), color="tab:blue")
    axes.set_xticks(range(len(elements)), list(elements), fontsize=6, rotation=90)
    axes.set_ylabel("crystals with the element")
    axes.margins(x=0.01)


def _bins(axes: Any, values: Floats, label: str) -> None:  # noqa: ANN401 - matplotlib ships no types
    axes.hist(values, bins=40, color="tab:blue")
    axes.set_xlabel(label)
    axes.set_ylabel("crystals")


def _crystals_by_element(table: StructureTable) -> NDArray[np.int64]:
    """(128,) in how many crystals each atomic number occurs."""
    packed = table.gather(np.arange(table.num_rows))
    row = np.repeat(np.arange(table.num_rows), packed.sizes)
    number = packed.atomic_numbers
    if packed.disorder is not None:
        row = np.concatenate([row, row[packed.disorder.site]])
        number = np.concatenate([number, packed.disorder.atomic_number])
    pairs = np.unique(row * 128 + number)
    return np.bincount(pairs % 128, minlength=128)


def _wrapped(words: Iterable[str], width: int = 100) -> list[str]:
    whole = "  ".join(word.replace(" ", "\u00a0") for word in words)
    lines = textwrap.wrap(whole, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines]
