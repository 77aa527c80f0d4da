"""Chemical formulas, and whether the atoms of a crystal are what a formula says."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from data_pipeline.crystal import Crystal
from data_pipeline.elements import number_of, symbol_of

Amounts = dict[int, float]
"""Atoms, or a fraction of one, by atomic number. Deuterium counts as hydrogen."""

ROUNDING = 0.01
"""Of a formula unit: amounts in formulas and occupancies are published with two digits."""
RELATIVE, MOST = 0.01, 0.25
"""What an amount may be off beyond that: a share of it, but never so much that a whole atom may be missing."""

_PART = re.compile(r"([A-Z][a-z]?)(\d+\.?\d*|\.\d+)?")


def parse_formula(text: str) -> Amounts | None:
    """The amounts of a formula such as "Ca0.5 Sr0.5 Ti1 O3"; None where it is none, as "?" and "Al2 O3, x(H2 O)"."""
    amounts: Amounts = defaultdict(float)
    for word in text.split():
        at = 0
        while at < len(word):
            part = _PART.match(word, at)
            if part is None:
                return None
            try:
                amounts[number_of(part[1])] += float(part[2] or 1)
            except ValueError:
                return None
            at = part.end()
    return {number: amount for number, amount in amounts.items() if amount > 0} or None


def amounts_of(crystal: Crystal) -> Amounts:
    """The atoms in the cell of a crystal, disordered sites by their occupancies."""
    ordered = crystal.atomic_numbers[crystal.atomic_numbers != 0]
    numbers, counts = np.unique(ordered, return_counts=True)
    amounts: Amounts = defaultdict(float, zip(numbers.tolist(), counts.astype(float).tolist(), strict=True))
    if crystal.disorder is not None:
        species = zip(crystal.disorder.atomic_number.tolist(), crystal.disorder.occupancy.tolist(), strict=True)
        for number, occupancy in species:
            amounts[number] += occupancy
    return dict(amounts)


def written(amounts: Mapping[int, float]) -> str:
    """The amounts as a formula, in the order of the elements."""
    return " ".join(f"{symbol_of(number)}{amount:.4g}" for number, amount in sorted(amounts.items()))


def mismatch(formula: Amounts, found: Amounts) -> str | None:
    """How the atoms of a cell differ from what a formula says, in elements or ratios; None where they agree."""
    both = f"the formula is {written(formula)}, the sites of the cell are {written(found)}"
    for missing, where in ((formula.keys() - found.keys(), "sites"), (found.keys() - formula.keys(), "formula")):
        if missing:
            return f"no {', '.join(symbol_of(number) for number in sorted(missing))} in the {where}: {both}"
    units = sum(found.values()) / sum(formula.values())
    return None if fills(formula, units, found) else both


def fills(formula: Amounts, units: float, found: Amounts) -> bool:
    """Whether the atoms of a cell are ``units`` formula units, no more and no less."""
    if units <= 0 or formula.keys() != found.keys():
        return False
    return all(_close(amount, found[number] / units) for number, amount in formula.items())


def _close(stated: float, found: float) -> bool:
    return abs(stated - found) <= ROUNDING + min(RELATIVE * stated, MOST)
