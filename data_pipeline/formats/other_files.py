"""Structure files of the further formats that pymatgen reads, such as XSF, CSSR, RES, CHGCAR and vasprun.xml.

Dictionaries in YAML or JSON are read as data, not by pymatgen, which imports the modules that they name and calls
what is in them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data_pipeline.crystal import Crystal
from data_pipeline.formats.compressed import inner_name, is_compressed, read_bytes, read_text
from data_pipeline.formats.parse import from_jarvis, from_pymatgen, from_pymatgen_dict
from data_pipeline.formats.refusal import TOO_DEEP, Refusal, one_line

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

_INVENTED = ("Elements in POSCAR cannot be determined", "Defaulting to P1")
"""Parts of pymatgen's warnings that it reads something else than the file means: here a CHGCAR's POSCAR, say."""

_JSON, _YAML = ("*.json*", "*.mson*"), ("*.yaml*", "*.yml*")
"""Names, in lower case, by which pymatgen takes a file for a dictionary."""


def read_other(path: Path) -> Crystal:
    """The crystal of a file, compressed or not, in the format that its name says.

    Raises OSError where there is no such file, Refusal where pymatgen invents what the file does not say, and
    ValueError "unreadable structure: why".
    """
    if any(fnmatch(inner_name(path), pattern) for pattern in (*_JSON, *_YAML)):
        return _of_dictionary(path)
    if not is_compressed(path):
        with path.open("rb"):
            pass  # a file that is not there is said to be so, and not of an unknown format
        return _read(path)
    with TemporaryDirectory(prefix="crystalformer-") as folder:
        whole = Path(folder) / inner_name(path)
        whole.write_bytes(read_bytes(path))
        return _read(whole)


def _of_dictionary(path: Path) -> Crystal:
    """A structure as pymatgen or jarvis writes it, in YAML or JSON. Raises as ``read_other``."""
    text = read_text(path)
    try:
        content = json.loads(text) if any(fnmatch(inner_name(path), name) for name in _JSON) else _of_yaml(text)
    except Refusal:
        raise
    except RecursionError as error:
        raise ValueError(f"unreadable structure: {TOO_DEEP}") from error
    except Exception as error:  # YAML's parser has errors of its own, JSON's of Python's
        raise ValueError(f"unreadable structure: {one_line(error):.200}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"unreadable structure: the file holds a {type(content).__name__}")
    return from_jarvis(content) if "lattice_mat" in content else from_pymatgen_dict(content)


def _of_yaml(text: str) -> Any:  # noqa: ANN401 - whatever the file holds
    """Raises Refusal where parts of it stand for others: a few lines can be made to mean any number."""
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise Refusal("unreadable structure: YAML with aliases (*name) is not read; write out what they stand for")
    return yaml.safe_load(text)


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
