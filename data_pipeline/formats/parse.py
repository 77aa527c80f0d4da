"""Structures from the formats of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.crystal import Crystal, Disorder, to_cartesian
from data_pipeline.elements import number_of
from data_pipeline.formats.cif import check_cif, read_cif
from data_pipeline.formats.poscar import read_poscar
from data_pipeline.formats.refusal import Refusal, one_line

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

KINDS = ("cif", "poscar")
BYTE_ORDER_MARK = "\ufeff"


def parse_structure(kind: str, text: str) -> Crystal:
    """A crystal from the text of a CIF or POSCAR file.

    Raises ValueError "rule: details" for what cannot be read, "unreadable structure: why", and for what would be read
    as another crystal than it means: cif.py and poscar.py say what that is.
    """
    if kind not in KINDS:
        raise ValueError(f"unreadable structure: format {kind!r} is not one of {', '.join(KINDS)}")
    text = text.removeprefix(BYTE_ORDER_MARK)
    try:
        return _from_cif(text) if kind == "cif" else from_pymatgen(read_poscar(text))
    except Refusal:
        raise
    except Exception as error:  # the parsers raise errors of every kind on malformed text
        raise ValueError(f"unreadable structure: {one_line(error):.200}") from error


def _from_cif(text: str) -> Crystal:
    reading = read_cif(text)
    crystal = from_pymatgen(reading.structure)
    check_cif(reading, crystal)
    return crystal


def from_pymatgen(structure: Structure) -> Crystal:
    """A crystal from a pymatgen Structure; sites with one fully occupied species are ordered.

    Raises ValueError "unknown element: which" for dummies.
    """
    lattice = np.array(structure.lattice.matrix, dtype=np.float64)
    numbers = np.zeros(len(structure), dtype=np.int64)
    mixed: list[tuple[int, int, float]] = []
    for i, site in enumerate(structure):
        # By symbol: the number of a dummy, as X or Ln, is a hash, another one in every run.
        species = [(_number(specie.symbol), float(amount)) for specie, amount in site.species.items()]
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


def from_jarvis(atoms: Mapping[str, Any]) -> Crystal:
    """A crystal from a jarvis ``atoms`` dictionary: lattice_mat, coords, elements, cartesian.

    Raises ValueError "unreadable structure: why", "unknown element: which".
    """
    try:
        lattice = np.array(atoms["lattice_mat"], dtype=np.float64).reshape(3, 3)
        coordinates = np.array(atoms["coords"], dtype=np.float64).reshape(-1, 3)
        symbols = [str(symbol).strip() for symbol in atoms["elements"]]
        cartesian = _is_true(atoms["cartesian"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"unreadable structure: jarvis atoms: {error!r:.150}") from error
    return Crystal(
        positions=coordinates if cartesian else to_cartesian(coordinates, lattice),
        atomic_numbers=_numbers(symbols),
        lattice=lattice,
    )


def from_pymatgen_dict(structure: Mapping[str, Any]) -> Crystal:
    """A crystal from Structure.as_dict(), disordered sites included.

    Raises ValueError "unreadable structure: why", "unknown element: which".
    """
    mixed: list[tuple[int, str, float]] = []
    symbols: list[str] = []
    try:
        lattice = np.array(structure["lattice"]["matrix"], dtype=np.float64).reshape(3, 3)
        sites = structure["sites"]
        fractional = np.array([site["abc"] for site in sites], dtype=np.float64).reshape(-1, 3)
        for i, site in enumerate(sites):
            species = [(str(entry["element"]), float(entry["occu"])) for entry in site["species"]]
            if len(species) == 1 and abs(species[0][1] - 1) < 1e-8:
                symbols.append(species[0][0])
            else:
                symbols.append("")
                mixed += [(i, symbol, amount) for symbol, amount in species]
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"unreadable structure: pymatgen dictionary: {error!r:.150}") from error
    return Crystal(
        positions=to_cartesian(fractional, lattice),
        atomic_numbers=_numbers(symbols),
        lattice=lattice,
        disorder=make_disorder([(i, _number(symbol), amount) for i, symbol, amount in mixed]),
    )


def _is_true(value: object) -> bool:
    """A truth value, as such, as 1 or 0, or in words. Raises ValueError for any other."""
    word = str(value).strip().lower()
    if word in ("true", "1", "1.0"):
        return True
    if word in ("false", "0", "0.0"):
        return False
    raise ValueError(f"cartesian is {value!r:.30}, not true or false")


def _numbers(symbols: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Atomic numbers; 0 for an empty symbol."""
    return np.array([_number(symbol) if symbol else 0 for symbol in symbols], dtype=np.int64)


def _number(symbol: str) -> int:
    try:
        return number_of(symbol)
    except ValueError as error:
        raise Refusal(f"unknown element: {symbol!r:.20}") from error


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
