"""Libraries that may be missing or broken, and what is said of them."""

import importlib.util
import sys

import pytest

from crystalformer import optional


def test_a_loaded_library_is_not_looked_for(monkeypatch):
    """torch.compile comes here in every block, and before 2.13 traces no search of the path."""

    def search(name):
        raise AssertionError(f"{name} was looked for")

    monkeypatch.setattr(optional, "find_spec", search)
    assert optional.problem("numpy") is None


def test_a_library_that_is_not_there():
    assert optional.problem("no_such_library") == "is not installed"


@pytest.mark.parametrize("error", ["ImportError('too old')", "RuntimeError('too\\nold')"])
def test_a_library_that_cannot_be_loaded(error, tmp_path, monkeypatch):
    name = f"broken_{len(error)}"
    (tmp_path / f"{name}.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for _ in range(2):
        assert optional.problem(name) == "cannot be loaded (too old)"
    assert name not in sys.modules
