"""Where a measurement's rows go: to the terminal, to a JSON file after each, into a Markdown table at the end.

Needs Python alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLUMNS = ("section", "what", "measured", "beside", "ratio", "verdict")


class Report:
    """The rows so far."""

    def __init__(self, path: Path | None) -> None:
        """path: the JSON file, or None for none."""
        self.rows: list[Row] = []
        self._path = path

    def add(self, row: Row) -> None:
        """Take a row, print it and have the file hold it too."""
        self.rows.append(row)
        show(row)
        if self._path is None:
            return
        beside = self._path.with_name(self._path.name + ".new")
        try:
            beside.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
            beside.replace(self._path)  # never a file that is half written
        except OSError as error:  # the rows are printed, and the next ones are to be measured
            sys.stderr.write(f"{self._path}: {error}\n")

    @property
    def passed(self) -> bool:
        """Whether there is a verdict and none is bad."""
        verdicts = [row["passed"] for row in self.rows if "passed" in row]
        return bool(verdicts) and all(verdicts)

    def table(self) -> str:
        """All rows as Markdown, headed by what was measured on what."""
        about = [row for row in self.rows if row.get("section") == "machine" and "device" in row]
        heading = "### GPU measurement"
        if about:
            heading = "### {device}, {date}: torch {torch}, triton {triton}, {crystals} crystals".format(**about[0])
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(row) for row in self.rows if row not in about)]
        lines = ("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows)
        return "\n".join([heading, "", *lines]) + "\n"


def show(row: Row) -> None:
    """Print a row: name=value side by side, texts of several lines below."""
    short = [f"{name}={_number(value)}" for name, value in row.items() if "\n" not in str(value)]
    sys.stdout.write("  ".join(short) + "\n")
    for name, value in row.items():
        if "\n" in str(value):
            sys.stdout.write(f"  {name}:\n" + "".join(f"    {line}\n" for line in str(value).splitlines()))
    sys.stdout.flush()


def _cell(text: str) -> str:
    return text.partition("\n")[0].replace("|", "\\|")[:200]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cells(row: Row) -> tuple[str, ...]:
    """A row of the table, of COLUMNS."""
    section, verdict = str(row.get("section", "")), _VERDICTS[row.get("passed")]
    cells = _TABLE.get(section, _plain)
    # A row that ended in an error lacks what its section measures.
    measured, beside, ratio = cells(row) if not isinstance(row.get("error"), str) else (row["error"], "", "")
    return section, str(row.get("what", "")), measured, beside, ratio, verdict


def _plain(row: Row) -> tuple[str, str, str]:
    figures = {name: value for name, value in row.items() if name not in ("section", "what", "passed")}
    return ", ".join(f"{name} {_number(value)}" for name, value in figures.items()), "", ""


def _correctness(row: Row) -> tuple[str, str, str]:
    bitwise = "repeats bit for bit" if row["bitwise"] else "does **not** repeat"
    measured = f"{row['relative_error']:.2g} ({row['in']}), {bitwise}"
    beside = f"limit {row['limit']:.2g}, torch backend {_number(row['torch_error'])}"
    return measured, beside, f"{row['relative_error'] / row['limit']:.2f}"


def _tests(row: Row) -> tuple[str, str, str]:
    counts = ", ".join(f"{row[name]} {name}" for name in ("succeeded", "failed", "skipped"))
    return counts, f"{row['seconds']:.0f} s" + (f", {row['status']}" if isinstance(row["status"], str) else ""), ""


def _step(row: Row) -> tuple[str, str, str]:
    if "ms" not in row:
        return _plain(row)
    beside = {name: row[name] for name in ("relative_error", "limit", "bitwise", "first_call_s") if name in row}
    ratio = f"{row['torch_over_this']:.2f}" if row.get("torch_over_this") else ""
    return f"{row['ms']:.4g} ms", ", ".join(f"{name} {_number(value)}" for name, value in beside.items()), ratio


def _floor(row: Row) -> tuple[str, str, str]:
    if "us" not in row:
        return _plain(row)
    return f"{row['us']:.4g} µs", f"floor {row['floor_us']:.4g} µs ({row['floor_of']})", f"{row['times_floor']:.2f}"


_VERDICTS = {True: "ok", False: "**failed**", None: ""}

_TABLE: dict[str, Callable[[Row], tuple[str, str, str]]] = {
    "correctness": _correctness,
    "tests": _tests,
    "G1": _step,
    "G3": _floor,
    "compile": _step,
}
