"""POSCAR texts as VASP means them: pymatgen reads most of it, and invents or misreads the rest."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.crystal import Floats
from data_pipeline.formats.refusal import Refusal

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

_SCALE, _VECTORS = 1, slice(2, 5)
"""Lines of the scale and of the lattice vectors."""
_COMMENT = re.compile(r"[#!]")


def read_poscar(text: str) -> Structure:
    """The structure of a POSCAR.

    A negative scale is the cell's volume; three are factors of the x, y and z components, of lattice vectors and
    Cartesian coordinates alike (VASP 6). Raises Refusal where neither the sixth line nor the coordinates' ends name
    the elements, or it names more or fewer than there are numbers of atoms; the parser raises errors of every kind on
    malformed text.
    """
    from pymatgen.core.lattice import Lattice
    from pymatgen.core.structure import Structure

    lines = text.split("\n")
    _check_counts(lines)
    factors = _special_factors(lines)
    if factors is None:
        return _parsed(text)
    # Fractional coordinates are the same before and after stretching, also those of Cartesian coordinates.
    lines[_SCALE] = "1.0"
    plain = _parsed("\n".join(lines))
    return Structure(Lattice(plain.lattice.matrix * factors), plain.species_and_occu, plain.frac_coords)


def _parsed(text: str) -> Structure:
    from pymatgen.io.vasp.inputs import Poscar

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        poscar = Poscar.from_str(text, read_velocities=False)
    if not poscar.true_names:
        raise Refusal(
            "unknown element: the POSCAR names none (VASP 4 form); put their symbols into a line before the numbers"
        )
    return poscar.structure


def _check_counts(lines: list[str]) -> None:
    """Refuse elements and numbers of atoms that are not as many: pymatgen takes the first of them.

    And more atoms than lines, for which pymatgen would take memory before it looks for them. Raises Refusal.
    """
    words = [_COMMENT.split(line)[0].split() for line in lines[_VECTORS.stop :]]
    first = next((i for i, line in enumerate(words) if line and line[0].lstrip("+-").isdigit()), 0)
    symbols = [word for line in words[:first] for word in line]
    counts = [word for line in words[first : 2 * first or 1] for word in line]
    atoms = sum(int(word) for word in counts if word.isdecimal())
    if atoms > len(lines):
        raise Refusal(f"unreadable structure: the POSCAR says {atoms:.6g} atoms, but has {len(lines)} lines")
    if first and len(symbols) != len(counts):
        raise Refusal(
            f"unreadable structure: the POSCAR names {len(symbols)} elements ({' '.join(symbols):.40}), "
            f"but has {len(counts)} numbers of atoms ({' '.join(counts):.40})"
        )


def _special_factors(lines: list[str]) -> Floats | None:
    """What the components of lattice vectors are to be multiplied by, (3,); None for one positive scale.

    Raises Refusal for three scales that are not all positive; ValueError for what are no numbers.
    """
    if len(lines) < _VECTORS.stop:
        return None  # the parser says what is missing
    words = lines[_SCALE].partition("#")[0].split()
    if len(words) == 3:
        factors = np.array([float(word) for word in words])
        if not (factors > 0).all():
            raise Refusal(f"unreadable structure: three scale factors must be positive, got {' '.join(words)}")
        return factors
    if len(words) != 1 or float(words[0]) >= 0:
        return None
    vectors = np.array([[float(word) for word in line.partition("#")[0].split()[:3]] for line in lines[_VECTORS]])
    volume = abs(float(np.linalg.det(vectors)))
    if volume == 0:
        raise Refusal("volume not above 0: the lattice vectors of the POSCAR lie in a plane")
    return np.full(3, (-float(words[0]) / volume) ** (1 / 3))
