"""Pickles are read without running anything they bring."""

import collections
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import numpy.testing
import pytest
from pymatgen.core import Lattice, Structure

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
    harmless = {"_reconstruct", "scalar", "_frombuffer", "_reconstructor", "encode"}
    for module, names in ALLOWED.items():
        if module in ("__builtin__", "copy_reg", "numpy.core.multiarray", "numpy.core.numeric"):
            continue  # spellings of Python 2 and numpy 1, of names that are tested under their own
        loaded = importlib.import_module(module)
        for name in names:
            if hasattr(loaded, name):
                assert isinstance(getattr(loaded, name), type) or name in harmless, (module, name)
