"""A search's folder: where it lies, and that it is found there again."""

from datetime import datetime

import pytest

from cluster.settings.sections import ScaleConfig
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


def test_a_trial_has_checkpoints_of_its_own_measure_and_the_training_that_follows_has_not(tmp_path):
    def made(name, **settings):
        where = {"storage_path": str(tmp_path), "run_name": name, "target": ["shear"]}
        found = new_search({**where, **settings}, {}, datetime(2026, 1, 2))
        begin(found)
        return found.options.checkpoint_minutes, found.config.scale.checkpoint_minutes

    assert made("default") == (1.0, ScaleConfig().checkpoint_minutes)
    assert made("given", checkpoint_minutes=20.0) == (20.0, 20.0)
    where = {"storage_path": str(tmp_path), "run_name": "default", "resume": True}
    assert saved_search(where, {"checkpoint_minutes": 0.5}).options.checkpoint_minutes == 0.5
    assert saved_search(where | {"checkpoint_minutes": 3.0}, {}).options.checkpoint_minutes == 3.0  # from a file


def test_an_objective_may_be_spelt_as_the_authors_do(tmp_path):
    settings = {"target": ["shear_modulus", "bulk"], "storage_path": str(tmp_path), "run_name": "spelt"}
    plan = new_search(settings, {"objective": "shear_modulus"}, datetime(2026, 1, 2))
    assert (plan.config.data.target, plan.objective) == (("shear", "bulk"), "shear")
    begin(plan)
    again = saved_search({**settings, "resume": True}, {"objective": "shear_modulus"})
    assert again.objective == "shear"
