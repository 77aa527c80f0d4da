"""Pickles are read without running anything they bring."""

import collections
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.testing
import pytest
from pymatgen.core import Element, Lattice, Structure

from data_pipeline.errors import DataError
from data_pipeline.formats.unpickle import ALLOWED, check_pickle, read_pickle


class Evil:
    """Calls whatever it is given when unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def write(path, content, protocol=None):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_structures_arrays_and_containers_pass(tmp_path, protocol):
    mixed = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    charged = Structure(Lattice.cubic(4), ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]], site_properties={"m": [1, 2]})
    content = [
        {"structure": mixed, "e": np.float64(1.5), "ids": {1, 2}, "a": np.arange(3.0)},
        collections.OrderedDict(structure=charged, n=np.int64(3), d=collections.defaultdict(list, x=[1])),
    ]
    found = read_pickle(write(tmp_path / "a.pkl", content, protocol))
    assert found[0]["structure"] == mixed and found[1]["structure"] == charged
    assert found[0]["e"] == 1.5 and found[0]["a"].tolist() == [0, 1, 2] and found[1]["d"]["x"] == [1]


def attacks(marker: Path):
    touch = f"open({str(marker)!r}, 'w').close()"
    yield "os.system", pickle.dumps([Evil(os.system, f"touch {marker}")])
    yield "subprocess", pickle.dumps([Evil(subprocess.check_call, ["touch", str(marker)])])
    yield "exec", pickle.dumps([Evil(exec, touch)])
    yield "eval", pickle.dumps([Evil(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()")])
    yield "open", pickle.dumps([Evil(open, str(marker), "w")])
    yield "numpy's own exec", pickle.dumps([Evil(numpy.testing.runstring, touch, {})])
    yield "pathlib", pickle.dumps([Evil(Path.touch, marker)])
    # Dotted names reach a module's globals through an admitted class.
    module, name = b"pymatgen.core.structure", b"Structure.__init__.__globals__"
    names = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module, name))
    yield "dotted", b"\x80\x04" + names + b"\x93."
    yield "monty", b"cmonty.os.path\nwhich\n(S'touch'\ntR."
    yield "getattr", b"cbuiltins\ngetattr\n(cbuiltins\nlist\nS'append'\ntR."


@pytest.mark.parametrize("number", range(10))
def test_malicious_pickles_are_refused_and_nothing_runs(tmp_path, number):
    marker = tmp_path / "it-ran"
    name, content = list(attacks(marker))[number]
    with pytest.raises(DataError, match="not on the list of harmless classes"):
        read_pickle(write(tmp_path / "evil.pkl", content))
    assert not marker.exists(), name


def forged_kind(flags):
    """A dtype of eight bytes that says, or does not say, that they are a Python object's address."""
    state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, flags)
    return Filled(np.dtype, ("V8", False, True), state)


class Filled:
    """Calls a function when unpickled and fills what comes with a state."""

    def __init__(self, function, arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


ADDRESS = b"A" * 8
CORE = np._core.multiarray
EMPTY = (np.ndarray, (0,), b"b")
SEALED = (3, "|", None, None, None, -1, -1, 0)
FORGED = {
    "array of an address": Filled(np.ndarray, ((1,), np.dtype("O"), ADDRESS)),
    "array of a made-up kind": Filled(np.ndarray, ((1,), forged_kind(0), ADDRESS)),
    "filled array of a made-up kind": Filled(CORE._reconstruct, EMPTY, (1, (1,), forged_kind(0), False, ADDRESS)),
    "filled array of objects": Filled(CORE._reconstruct, EMPTY, (1, (1,), np.dtype("O"), False, ADDRESS)),
    "objects that deny it": Filled(np.dtype, ("O8", False, True), SEALED),
    "number of a made-up kind": Filled(CORE.scalar, (forged_kind(0), ADDRESS)),
    "buffer of a made-up kind": Filled(np._core.numeric._frombuffer, (ADDRESS, forged_kind(27), (1,), "C")),
    "buffer of objects": Filled(np._core.numeric._frombuffer, (ADDRESS, np.dtype("O"), (1,), "C")),
    "more than its bytes": Filled(CORE._reconstruct, EMPTY, (1, (1 << 20,), np.dtype("f8"), False, ADDRESS)),
    "another kind of array": Filled(CORE._reconstruct, (list, (0,), b"b")),
}


@pytest.mark.parametrize("name", FORGED)
def test_arrays_cannot_be_made_of_addresses(tmp_path, name):
    content = pickle.dumps([FORGED[name]], protocol=4)
    with pytest.raises(DataError, match="was not read: (its array|it makes an array|it asks for a kind of array)"):
        read_pickle(write(tmp_path / "forged.pkl", content))


def filling(module, name, state):
    """A pickle that names a thing and fills it."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(state, protocol=2)[2:-1] + b"b."


@pytest.mark.parametrize(
    "content",
    [
        filling("pymatgen.core.lattice", "Lattice", (None, {"matrix": "altered"})),
        filling("numpy", "dtype", (None, {"__defaults__": (1,)})),
        b"\x80\x02cpymatgen.core.periodic_table\nElement\n"
        + pickle.dumps("Na", protocol=2)[2:-1]
        + b"\x85R"
        + pickle.dumps({"_value_": "Au"}, protocol=2)[2:-1]
        + b"b.",
    ],
    ids=["class", "function", "constant"],
)
def test_a_pickle_alters_nothing_of_the_process(tmp_path, content):
    with pytest.raises(DataError, match="it would alter"):
        read_pickle(write(tmp_path / "altering.pkl", content))
    assert Lattice.cubic(2).matrix.tolist()[0] == [2, 0, 0] and Element("Na").value == "Na"


def test_the_kinds_of_numbers_stay_as_they_are(tmp_path):
    swapped = Filled(np.dtype, ("f8",), (3, ">", None, None, None, -1, -1, 0))
    assert read_pickle(write(tmp_path / "a.pkl", pickle.dumps(swapped))) == np.dtype(">f8")
    assert np.dtype("f8").str == np.dtype(float).str == ("<f8" if sys.byteorder == "little" else ">f8")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_every_layout_pass(tmp_path, protocol):
    cube = np.arange(24.0).reshape(2, 3, 4)
    arrays = [
        *(cube, cube.T, cube.transpose(1, 0, 2), cube[:, ::2], np.asfortranarray(cube[0]), np.zeros((0, 3))),
        *(np.array(["Na", "Cl"]), np.array([b"Na"]), np.array([True]), np.array(3), np.arange(3, dtype=">i2")),
        *(np.array([{"a": 1}, None], dtype=object), np.array([1 + 2j]), np.float32(2), np.str_("Na"), np.bool_(True)),
    ]
    written = write(tmp_path / "a.pkl", arrays, protocol)
    for array, found in zip(pickle.loads(written.read_bytes()), read_pickle(written), strict=True):
        assert found.dtype == array.dtype and found.shape == array.shape and found.tolist() == array.tolist()


def test_the_attack_would_run_in_a_plain_unpickler(tmp_path):
    marker = tmp_path / "it-ran"
    pickle.loads(dict(attacks(marker))["os.system"])
    assert marker.exists()


def test_damaged_files_are_one_line(tmp_path):
    whole = pickle.dumps([1] * 1000)
    for content in (b"", whole[:50], b"not a pickle"):
        with pytest.raises(DataError, match="the pickle was not read") as caught:
            read_pickle(write(tmp_path / "x.pkl", content))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not found"):
        read_pickle(tmp_path / "nowhere.pkl")


def test_pickles_need_leave():
    check_pickle("x", allow_pickle=True)
    with pytest.raises(DataError, match="--allow-pickle"):
        check_pickle("x", allow_pickle=False)


def test_the_list_holds_no_function_that_acts():
    import importlib

    assert "Structure" in ALLOWED["pymatgen.core.structure"]
    harmless = {"_reconstructor", "encode"}
    for module, names in ALLOWED.items():
        if module in ("__builtin__", "copy_reg"):
            continue  # spellings of Python 2, of names that are tested under their own
        loaded = importlib.import_module(module)
        for name in names:
            if hasattr(loaded, name):
                assert isinstance(getattr(loaded, name), type) or name in harmless, (module, name)
