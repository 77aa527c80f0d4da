"""Structure files of the further formats that pymatgen reads, such as XSF, CSSR, RES, CHGCAR and vasprun.xml."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from data_pipeline.crystal import Crystal
from data_pipeline.formats.compressed import inner_name, is_compressed, read_bytes
from data_pipeline.formats.parse import from_pymatgen
from data_pipeline.formats.refusal import Refusal, one_line

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

_INVENTED = ("Elements in POSCAR cannot be determined", "Defaulting to P1")
"""Parts of pymatgen's warnings that it reads something else than the file means: here a CHGCAR's POSCAR, say."""


def read_other(path: Path) -> Crystal:
    """The crystal of a file, compressed or not, in the format that pymatgen takes from its name.

    Raises OSError where there is no such file, Refusal where pymatgen invents what the file does not say, and
    ValueError "unreadable structure: why".
    """
    if not is_compressed(path):
        with path.open("rb"):
            pass  # a file that is not there is said to be so, and not of an unknown format
        return _read(path)
    with TemporaryDirectory(prefix="crystalformer-") as folder:
        whole = Path(folder) / inner_name(path)
        whole.write_bytes(read_bytes(path))
        return _read(whole)


def _read(path: Path) -> Crystal:
    from pymatgen.core.structure import Structure

    try:
        structure, said = _warned_of(path)
    except Exception as error:  # the parsers raise errors of every kind on malformed text
        raise ValueError(f"unreadable structure: {one_line(error):.200}") from error
    invented = next((warning for warning in said if any(part in warning for part in _INVENTED)), None)
    if invented is not None:
        raise Refusal(f"unreadable structure: {invented:.200}")
    if not isinstance(structure, Structure):
        raise ValueError(f"unreadable structure: the file holds a {type(structure).__name__}")
    return from_pymatgen(structure)


def _warned_of(path: Path) -> tuple[Structure, list[str]]:
    """What pymatgen reads, and its warnings. Not for several threads: Python's warnings are those of the process."""
    from pymatgen.core.structure import Structure

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        structure = Structure.from_file(path)
    return structure, [" ".join(str(warning.message).split()) for warning in caught]
