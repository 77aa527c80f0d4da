"""A search's folder: where it lies, and that it is found there again."""

from datetime import datetime

import pytest

from tune.folder import begin, new_search, saved_search


@pytest.mark.parametrize("name", ["search1", "elastic/search1", "a/b/c"])
def test_a_search_is_found_again_where_it_was_begun(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for place in ("runs", str(tmp_path / "elsewhere")):
        where = {"storage_path": place, "run_name": name}
        made = new_search({"target": ["shear"], **where}, {}, datetime(2026, 1, 2))
        begin(made)
        again = saved_search({**where, "resume": True}, {})
        assert again.folder == made.folder == tmp_path / place / name
        assert (again.url, again.name, again.study_name) == (made.url, made.name, made.study_name)
        assert again.root == made.root == tmp_path / place  # what a trial's run_name is put behind
