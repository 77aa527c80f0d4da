"""Structures from the formats of other programs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.crystal import Crystal, Disorder, to_cartesian

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

KINDS = ("cif", "poscar")


def parse_structure(kind: str, text: str) -> Crystal:
    """A crystal from the text of a CIF or POSCAR file. Raises ValueError "unreadable structure: why"."""
    from pymatgen.core.structure import Structure

    if kind not in KINDS:
        raise ValueError(f"unreadable structure: format {kind!r} is not one of {', '.join(KINDS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = Structure.from_str(text, fmt=kind)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - the parsers raise errors of every kind on malformed text
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"unreadable structure: {reason:.200}") from error
    return from_pymatgen(structure)


def from_pymatgen(structure: Structure) -> Crystal:
    """A crystal from a pymatgen Structure; sites with one fully occupied species are ordered."""
    lattice = np.array(structure.lattice.matrix, dtype=np.float64)
    numbers = np.zeros(len(structure), dtype=np.int64)
    mixed: list[tuple[int, int, float]] = []
    for i, site in enumerate(structure):
        species = [(specie.Z, float(amount)) for specie, amount in site.species.items()]
        if len(species) == 1 and abs(species[0][1] - 1) < 1e-8:
            numbers[i] = species[0][0]
        else:
            mixed += [(i, number, amount) for number, amount in species]
    return Crystal(
        positions=to_cartesian(np.asarray(structure.frac_coords), lattice),
        atomic_numbers=numbers,
        lattice=lattice,
        disorder=make_disorder(mixed),
    )


def make_disorder(mixed: list[tuple[int, int, float]]) -> Disorder | None:
    """Disorder from (site, atomic number, occupancy) triples; None without any."""
    if not mixed:
        return None
    site, number, occupancy = zip(*mixed, strict=True)
    return Disorder(
        site=np.array(site, dtype=np.int64),
        atomic_number=np.array(number, dtype=np.int64),
        occupancy=np.array(occupancy, dtype=np.float64),
    )
