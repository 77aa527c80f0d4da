"""Structures in the further formats; dictionaries are data, whatever they name."""

import json
import lzma
import subprocess
import sys

import pytest
from pymatgen.core import Lattice, Structure

from data_pipeline.formats.other_files import read_other
from tests.cluster.trained import structures


def test_other_formats(tmp_path):
    structure = structures()[0]
    plain, packed = tmp_path / "x.xsf", tmp_path / "x.XSF.xz"
    structure.to(filename=str(plain))
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert read_other(packed).positions.tolist() == read_other(plain).positions.tolist()
    with pytest.raises(FileNotFoundError):
        read_other(tmp_path / "none.xsf")
    with pytest.raises(ValueError, match="unreadable structure: ValueError"):
        read_other(_made(tmp_path / "x.unknown", "x"))


def test_a_charge_density_without_symbols_is_refused(tmp_path):
    poscar = "x\n1.0\n0 2.8 2.8\n2.8 0 2.8\n2.8 2.8 0\n1 1\nDirect\n0 0 0\n0.25 0.25 0.25\n"
    with pytest.raises(ValueError, match="unreadable structure: Elements in POSCAR cannot be determined"):
        read_other(_made(tmp_path / "CHGCAR", f"{poscar}\n1 1 1\n1.0\n"))


@pytest.mark.parametrize("name", ["x.yaml", "x.YML", "x.yaml.txt", "x.mson", "x.json.bak"])
def test_dictionaries_as_pymatgen_writes_them(tmp_path, name):
    mixed = Structure(
        Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}, "Cl-"], [[0, 0, 0], [0.5] * 3], site_properties={"m": [1e-7, 2]}
    )
    path = tmp_path / name
    path.write_text(mixed.to(fmt="json" if "son" in name else "yaml"))
    crystal = read_other(path)
    assert crystal.atomic_numbers.tolist() == [0, 17] and crystal.lattice.tolist() == mixed.lattice.matrix.tolist()
    assert crystal.positions.tolist() == mixed.cart_coords.tolist()
    assert crystal.disorder.occupancy.tolist() == [0.5, 0.5]
    packed = path.with_name(f"{name}.xz")
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert read_other(packed).positions.tolist() == mixed.cart_coords.tolist()


def test_atoms_as_jarvis_writes_them(tmp_path):
    text = "lattice_mat: [[2, 0, 0], [0, 2, 0], [0, 0, 2]]\ncoords: [[0, 0, 0]]\nelements: [Fe]\ncartesian: false\n"
    assert read_other(_made(tmp_path / "fe.yaml", text)).atomic_numbers.tolist() == [26]


@pytest.mark.parametrize("name", ["x.yaml", "x.mson"])
def test_a_dictionary_runs_nothing(tmp_path, name):
    """A module beside the file, named in a site's properties as monty's decoder takes it."""
    (tmp_path / "acting.py").write_text("from pathlib import Path\nPath('it-ran').touch()\n")
    content = structures()[0].as_dict()
    content["sites"][0]["properties"] = {"m": {"@module": "acting", "@class": "Any"}}
    _made(tmp_path / name, json.dumps(content))
    reader = (
        "import sys, pathlib, data_pipeline.formats.other_files as f; print(f.read_other(pathlib.Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", reader, name], cwd=tmp_path, capture_output=True, text=True)
    assert "Crystal(" in done.stdout and not (tmp_path / "it-ran").exists(), done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nb: *x\n", r"unreadable structure: YAML with aliases \(\*name\) is not read"),
        ("a: [\n", "unreadable structure: ParserError: "),
        ("a: !!python/object/apply:os.system [ls]\n", "unreadable structure: ConstructorError: "),
        ("[1, 2]\n", "unreadable structure: the file holds a list"),
        ("a: 1\n", "unreadable structure: pymatgen dictionary: KeyError"),
        ("[" * 2000 + "]" * 2000, "unreadable structure: JSON within JSON, too deep"),
    ],
)
def test_what_is_no_structure_is_told_in_one_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as caught:
        read_other(_made(tmp_path / "x.yaml", text))
    assert "\n" not in str(caught.value)


def _made(path, text):
    path.write_text(text)
    return path
