"""CIF texts as pymatgen reads them, refused wherever another crystal was read than the one that was meant.

pymatgen goes on where a CIF cannot be understood, and says so in warnings. Which of them mean another crystal is
decided here, from the parser's own list of them: Python's warnings belong to the process, not to the thread.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.composition import amounts_of, mismatch, parse_formula
from data_pipeline.elements import number_of
from data_pipeline.formats.refusal import Refusal
from data_pipeline.formats.symmetry import broken_operation, symmetry_problem

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure
    from pymatgen.io.cif import CifParser

    from data_pipeline.crystal import Crystal, Floats

OCCUPANCY_LIMIT = 1.01
"""Occupancies of a site that sum to at most this, as rounded ones do, are scaled to 1."""

FORMULA = "_chemical_formula_sum"
IMPLICIT_HYDROGENS = "implicit hydrogens"
"""Part of pymatgen's warning of hydrogens that are stated as a number, without positions."""

_BLOCK = re.compile(r"^\s*data_", re.MULTILINE)
"""Where pymatgen takes a data block to begin."""
_SITES = re.compile(r"^\s*_atom_site_(?:fract_x|Cartn_x|label|type_symbol)\s", re.MULTILINE)
_OCCUPANCY = re.compile(r"Occupancy (\S+) exceeded tolerance")
_SECTION = re.compile(r"No structure parsed for section \d+ in CIF\.\s*")
_GROUPS = ("OH", "NO3")
"""Symbols that pymatgen takes for groups of atoms, of which it leaves out some or all."""
_WATER = ("Wat", "wat", "O-H")
"""Symbols of groups that pymatgen says to hold implicit hydrogens, as check_cif tells in turn."""
_TYPE = re.compile(r"(?P<letters>[A-Za-z]+)[\d.+\-()']*(?:\([IVX]+\)|_\w*|,spin=[-+.\d]+)?")
"""A type symbol: an element, its charge, numbers and pymatgen's spin. With more letters it is a vacancy, a dummy or a
molecule."""
_TYPES = frozenset({"ow", "hw", "cval", "siva"})
"""Type symbols with a further letter that are elements: atoms of water, and names of scattering factors."""
_NO_LABELS = re.compile(r"(?i)(?:va|vac|vacancy|vc|du|dum|dummy|tt|t|bq|hoh|wat|water)(?![a-z])|h2o")
"""Beginnings of labels that are no elements, though their first letters are ones; T is a tetrahedral site."""
_UNCERTAINTY = re.compile(r"\(.+\)*")
"""Behind a number, as pymatgen takes it away."""
_UNKNOWN = (".", "?")
"""CIF's words for a value that is left to its default, or not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A data block with atoms: its name, and its text from ``data_`` on."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CifReading:
    """What pymatgen made of a block.

    said: its warnings. rotations: (operations, 3, 3) of fractional coordinates, by which it repeated the sites. data:
    the items of the block by name, lists where they are columns of a loop.
    """

    structure: Structure
    said: Sequence[str]
    rotations: Floats
    data: Mapping[str, Any]


def split_blocks(text: str) -> list[Block]:
    """The data blocks of a CIF that hold atoms, as one of a publication does not; a sole block is taken anyway."""
    starts = [found.start() for found in _BLOCK.finditer(text)]
    parts = [text[start:end].lstrip() for start, end in zip(starts, [*starts[1:], len(text)], strict=False)]
    if len(parts) > 1:
        parts = [part for part in parts if _SITES.search(part)]
    return [Block(name=part.split(maxsplit=1)[0].removeprefix("data_"), text=part) for part in parts]


def read_cif(text: str) -> CifReading:
    """The one structure of a CIF, as it was read: ``check_cif`` says whether it may be used.

    Raises Refusal for several structures, for occupancies that are no numbers from 0 to 1, for sites that pymatgen
    would leave out or take for other elements, and for dummies; the parser raises errors of every kind on malformed
    text.
    """
    from pymatgen.io.cif import CifParser

    block = _only_block(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = CifParser.from_str(block.text, occupancy_tolerance=OCCUPANCY_LIMIT, check_cif=False)
        data: dict[str, Any] = next(iter(parser.as_dict().values()), {})
        _fill_occupancies(data)
        _check_sites(data)
        try:
            structure = parser.parse_structures(primitive=False, on_error="raise")[0]
        except ValueError as error:
            raise _explained(error, _rotations(parser)) from error
    return CifReading(structure=structure, said=vars(parser)["warnings"], rotations=_rotations(parser), data=data)


def check_cif(reading: CifReading, crystal: Crystal) -> None:
    """Refuse what may be another crystal than the file means.

    crystal: of the reading. Raises Refusal
    - "unknown symmetry", where the sites may have been repeated by another one (symmetry.py);
    - "wrong composition", where _chemical_formula_sum has other elements than the sites, or other ratios than
      rounding explains; a formula that cannot be read says nothing;
    - "implicit hydrogens", where some are stated as a number only, unless the sites do make up the formula.
    """
    found = amounts_of(crystal)
    stated = reading.data.get(FORMULA)
    formula = parse_formula(stated) if isinstance(stated, str) else None
    problem = None if formula is None else mismatch(formula, found)
    implicit = any(IMPLICIT_HYDROGENS in said for said in reading.said)
    if implicit and (problem is not None or formula is None or 1 not in formula):
        raise Refusal(
            "implicit hydrogens: some have no positions (_atom_site_attached_hydrogens, or water as a site)"
        )
    symmetry = symmetry_problem(reading.said, reading.rotations, reading.data, crystal.lattice, formula, found)
    if symmetry is not None:
        raise Refusal(f"unknown symmetry: {symmetry}")
    if problem is not None:
        raise Refusal(f"wrong composition: {problem}")


def _only_block(text: str) -> Block:
    blocks = split_blocks(text)
    if not blocks:
        raise Refusal("unreadable structure: no data block holds atoms")
    if len(blocks) > 1:
        names = ", ".join(block.name for block in blocks)
        raise Refusal(f"several structures: {len(blocks)} data blocks hold atoms: {names:.100}")
    return blocks[0]


def _rotations(parser: CifParser) -> Floats:
    """(n, 3, 3) of the operations by which sites are repeated; none where the parser did not get so far."""
    operations = vars(parser).get("symmetry_operations", ())
    return np.array([operation.rotation_matrix for operation in operations]).reshape(-1, 3, 3)


def _explained(error: ValueError, rotations: Floats) -> ValueError:
    """pymatgen's error as a user understands it."""
    broken = broken_operation(rotations)
    if broken is not None:
        return Refusal(f"unknown symmetry: {broken}")
    occupancy = _OCCUPANCY.search(str(error))
    if occupancy is not None:
        total = float(occupancy[1])
        return Refusal(f"wrong occupancies: those of a site sum to {total:.4g}, more than {OCCUPANCY_LIMIT}")
    if isinstance(error.__cause__, KeyError):
        return ValueError(f"the data block has no item {error.__cause__.args[0]}")
    return ValueError(_SECTION.sub("", str(error)))


def _check_sites(data: Mapping[str, Any]) -> None:
    """Refuse sites that pymatgen leaves out, or takes for others, without a word. Raises Refusal."""
    if "dum" in data.get("_atom_site_calc_flag", ()):
        raise Refusal("unreadable structure: some sites are dummies without coordinates (_atom_site_calc_flag dum)")
    symbols = data.get("_atom_site_type_symbol")
    is_element = _is_label if symbols is None else _is_type
    for symbol in data.get("_atom_site_label", ()) if symbols is None else symbols:
        if symbol.startswith(_GROUPS) or not (symbol.startswith(_WATER) or is_element(symbol)):
            raise Refusal(f"unknown element: site {symbol!r:.20} is no single element")
    for axis in "xyz":
        if "." in data.get(f"_atom_site_fract_{axis}", ()):  # pymatgen reads 0
            raise Refusal(f"unreadable structure: a site has no coordinate (_atom_site_fract_{axis} is '.')")
    for value in data.get("_atom_site_occupancy", ()):
        if not _is_occupancy(value):
            raise Refusal(f"wrong occupancies: {value!r:.20} is no number from 0 to 1 (_atom_site_occupancy)")


def _fill_occupancies(data: Mapping[str, Any]) -> None:
    """Write CIF's default, 1, where an occupancy is left to it: pymatgen reads 0, and leaves the site out.

    data: the parser's own lists, not copies of them.
    """
    occupancies = data.get("_atom_site_occupancy")
    if isinstance(occupancies, list):
        occupancies[:] = ["1" if value.strip() in _UNKNOWN else value for value in occupancies]


def _is_type(symbol: str) -> bool:
    found = _TYPE.fullmatch(symbol)
    return found is not None and (found["letters"].lower() in _TYPES or _is_element(found["letters"]))


def _is_label(label: str) -> bool:
    """Whether a label, of a file without type symbols, begins with one element, as pymatgen looks for it."""
    if _NO_LABELS.match(label) or "," in label or "/" in label:
        return False
    return _is_element(label[:2]) or _is_element(label[:1])


def _is_element(symbol: str) -> bool:
    try:
        number_of(symbol.title())
    except ValueError:
        return False
    return True


def _is_occupancy(value: str) -> bool:
    """Whether pymatgen reads a number not below 0; what exceeds 1 it says itself, of the sum over a site."""
    try:
        return float(_UNCERTAINTY.sub("", value)) >= 0
    except ValueError:
        return False
