"""Whole files or none."""

import os

import pytest

from cluster.errors import UserError
from cluster.files import dump_yaml, read_yaml, write_text


def test_write_text_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_text(path, "twö\n")
    assert path.read_bytes() == "twö\n".encode()
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_yaml_there_and_back(tmp_path):
    values = {"b": [1, 2.5], "a": "no", "c": None, "d": True, "e": "2026-01-01", "f": "x: y"}
    path = tmp_path / "a.yaml"
    write_text(path, dump_yaml(values))
    assert read_yaml(path) == values
    assert path.read_text(encoding="utf-8").splitlines()[0] == "b: [1, 2.5]"
    write_text(path, "# nothing\n")
    assert read_yaml(path) == {}
    same = [1, 2]
    write_text(path, dump_yaml({"a": same, "b": {"c": same}}))
    assert read_yaml(path) == {"a": [1, 2], "b": {"c": [1, 2]}}


@pytest.mark.parametrize("merged", ["b: *a0", "b: {<<: *a0}", "b: [1, *a0]", "*a0 : 1"])
def test_aliases_are_refused(merged, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: &a0 [x, x]\n{merged}\n")
    with pytest.raises(UserError, match=r"a\.yaml: line 2: \*a0 is an alias, which settings cannot have"):
        read_yaml(path)


def test_a_few_lines_cannot_fill_the_memory(tmp_path):
    lists = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 5)]
    path = tmp_path / "a.yaml"
    path.write_text(f"target: [{', '.join(lists)}]\n")
    with pytest.raises(UserError, match="is an alias") as refused:
        read_yaml(path)
    assert len(str(refused.value)) < 300
