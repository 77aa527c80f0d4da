"""What makes a row unusable. Every rule gives its reason as "rule: details"; nothing is dropped or repaired here."""

from __future__ import annotations

import itertools
import math

import numpy as np

from data_pipeline.crystal import Crystal, Disorder, Floats, Ints

MIN_DISTANCE = 0.5
"""Å; two atoms closer than this, or an atom and its own image, overlap."""
MAX_ATOMIC_NUMBER = 98
"""Californium, the heaviest element the model knows."""
MIN_VOLUME = 1e-3
"""Å³; a smaller cell counts as flat."""
MAX_LENGTH = 1e4
"""Å; a longer lattice vector is a mistake: no crystal repeats itself only after a micrometre."""
MAX_FRACTIONAL = 1e6
"""A fractional coordinate farther out is a mistake: float64 still holds ten decimals there, but none at 1e16."""
MAX_TARGET = 3e38
"""What float32 holds. A larger target, such as 1e300, stands for a missing one, and its square is no number."""
OCCUPANCY_TOLERANCE = 1e-4
_PAIR_LIMIT = 1 << 20

MISSING = frozenset({"", "na", "nan", "none", "null", "n/a"})


def structure_problem(crystal: Crystal) -> str | None:
    """Why the crystal cannot be used, or None."""
    n = len(crystal.atomic_numbers)
    if n == 0:
        return "empty structure: no atoms"
    if len(crystal.positions) != n:
        return f"inconsistent structure: {len(crystal.positions)} positions for {n} atomic numbers"
    if not np.isfinite(crystal.lattice).all():
        return "non-finite number: in the lattice"
    if not np.isfinite(crystal.positions).all():
        return "non-finite number: in the positions"
    longest = float(np.abs(crystal.lattice).max())
    if longest > MAX_LENGTH:
        allowed = f"not between {-MAX_LENGTH:g} and {MAX_LENGTH:g}"
        return f"number out of range: {longest:.6g} Å in the lattice is {allowed}"
    volume = abs(float(np.linalg.det(crystal.lattice)))
    if volume < MIN_VOLUME:
        return f"volume not above 0: the cell has {volume:.3g} Å³"
    return _coordinate_problem(crystal) or _element_problem(crystal) or _overlap_problem(crystal)


def parse_target(value: object) -> float | None:
    """The number in a target field; None where it is missing ("na", empty, null, NaN).

    Raises ValueError for infinities, for numbers beyond MAX_TARGET, and for what is not a number.
    """
    number = _number(value)
    if number is not None and abs(number) > MAX_TARGET:
        raise ValueError(beyond_targets(value))
    return number


def beyond_targets(value: object) -> str:
    """What is wrong with a target beyond MAX_TARGET."""
    return f"{value!r:.60} is not between {-MAX_TARGET:g} and {MAX_TARGET:g}"


def is_number(value: object) -> bool | None:
    """Whether a field holds a number, be it one that no target may be; None where it is missing."""
    try:
        return None if _number(value) is None else True
    except ValueError:
        return False


def _number(value: object) -> float | None:
    """The number in a field, infinite where float64 does not hold it; None where it is missing. Or ValueError."""
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float | np.number):
        raise ValueError(f"{value!r:.60} is not a number")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf
    except ValueError:
        raise ValueError(f"{value!r:.60} is not a number") from None
    return None if math.isnan(number) else number


def _coordinate_problem(crystal: Crystal) -> str | None:
    fractional = crystal.fractional()
    atom, axis = divmod(int(np.argmax(np.abs(fractional))), 3)
    farthest = float(fractional[atom, axis])
    if abs(farthest) <= MAX_FRACTIONAL:
        return None
    allowed = f"not between {-MAX_FRACTIONAL:g} and {MAX_FRACTIONAL:g}"
    return f"number out of range: fractional coordinate {farthest:.6g} of atom {atom} is {allowed}"


def _element_problem(crystal: Crystal) -> str | None:
    lowest = 0 if crystal.disorder is not None else 1
    wrong = crystal.atomic_numbers[(crystal.atomic_numbers < lowest) | (crystal.atomic_numbers > MAX_ATOMIC_NUMBER)]
    if len(wrong):
        return f"unknown element: atomic number {int(wrong[0])} is not between 1 and {MAX_ATOMIC_NUMBER}"
    return None if crystal.disorder is None else _disorder_problem(crystal.disorder, crystal)


def _disorder_problem(disorder: Disorder, crystal: Crystal) -> str | None:
    open_sites = np.flatnonzero(crystal.atomic_numbers == 0)
    if not np.array_equal(np.unique(disorder.site), open_sites):
        return "wrong occupancies: disorder must list the species of exactly the sites with atomic number 0"
    heavy = disorder.atomic_number[(disorder.atomic_number < 1) | (disorder.atomic_number > MAX_ATOMIC_NUMBER)]
    if len(heavy):
        return f"unknown element: atomic number {int(heavy[0])} is not between 1 and {MAX_ATOMIC_NUMBER}"
    if not ((disorder.occupancy > 0) & (disorder.occupancy <= 1 + OCCUPANCY_TOLERANCE)).all():
        return "wrong occupancies: not all are in (0, 1]"
    total = np.zeros(len(crystal.atomic_numbers))
    np.add.at(total, disorder.site, disorder.occupancy)
    site = int(np.argmax(total))
    if total[site] > 1 + OCCUPANCY_TOLERANCE:
        return f"wrong occupancies: those of site {site} sum to {total[site]:.4g}, more than 1"
    return None


def _overlap_problem(crystal: Crystal) -> str | None:
    close = closest_pair(crystal, MIN_DISTANCE)
    if close is None:
        return None
    i, j, distance = close
    what = f"atom {i} and its own image" if i == j else f"atoms {i} and {j}"
    return f"overlapping atoms: {what} are {distance:.3f} Å apart, less than {MIN_DISTANCE} Å"


def closest_pair(crystal: Crystal, radius: float) -> tuple[int, int, float] | None:
    """The closest two atoms, images included, if less than ``radius`` Å apart: (i, j, Å), i = j for an image of i.

    Exact for any lattice: a displacement shorter than the radius has fractional coordinates below radius / height of
    the cell, so that wrapping suffices for cells higher than twice the radius and a few images for flat ones.
    """
    lattice = crystal.lattice
    reach = _reach(lattice, radius)
    if reach.any():
        lattice = _reduced(lattice)
        shortest = float(np.linalg.norm(lattice, axis=1).min())
        if shortest < radius:
            return 0, 0, shortest
        reach = _reach(lattice, radius)
    images = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), dtype=np.float64)
    return _closest(crystal.positions @ np.linalg.inv(lattice), lattice, images, radius)


def _reach(lattice: Floats, radius: float) -> Ints:
    inverse = np.linalg.inv(lattice)
    return np.asarray(np.floor(radius * np.sqrt((inverse * inverse).sum(axis=0)) + 0.5), dtype=np.int64)


def _reduced(lattice: Floats) -> Floats:
    """A basis of the same lattice whose first vector is the shortest there is."""
    import moyopy

    return np.array(moyopy.minkowski_reduce(lattice.tolist())[0], dtype=np.float64)


def _closest(fractional: Floats, lattice: Floats, images: Floats, radius: float) -> tuple[int, int, float] | None:
    n = len(fractional)
    rows = max(1, _PAIR_LIMIT // n)
    best: tuple[int, int, float] | None = None
    for start in range(0, n, rows):
        delta = fractional[start : start + rows, None] - fractional[None]
        delta -= np.rint(delta)
        for image in images:
            cartesian = (delta + image) @ lattice
            squared = np.einsum("ijk,ijk->ij", cartesian, cartesian)
            if not image.any():
                inside = np.arange(len(squared))
                squared[inside, inside + start] = np.inf
            flat = int(np.argmin(squared))
            i, j = divmod(flat, n)
            distance = math.sqrt(squared[i, j]) if np.isfinite(squared[i, j]) else math.inf
            if distance < (radius if best is None else best[2]):
                best = (min(i + start, j), max(i + start, j), distance)
    return best
