"""One command for the first try and for every repetition of it: auto_resume."""

from dataclasses import replace

import pytest

from cluster.config import save_yaml
from cluster.run_folder import CONFIG_FILE, open_run, settle_resume
from cluster.storage import RunStore
from tests.cluster.small import small_config


@pytest.fixture
def config(tmp_path):
    return small_config(run_name="night/one", storage_path=str(tmp_path), auto_resume=True)


@pytest.fixture
def store(tmp_path):
    return RunStore(str(tmp_path), "night/one")


def test_the_first_try_starts_the_run(config, store, tmp_path):
    settled = settle_resume(config, store)
    assert (settled.run.resume, settled.run.auto_resume) == (False, False)
    open_run(settled, store)
    assert store.folder == tmp_path / "night" / "one" and store.folder.is_dir()


def test_a_repetition_resumes_it(config, store):
    first = settle_resume(config, store)
    open_run(first, store)
    save_yaml(store.folder / CONFIG_FILE, first)
    again = settle_resume(config, store)
    assert again == replace(first, run=replace(first.run, resume=True))
    open_run(again, store)


def test_without_it_nothing_changes(config, store):
    plain = replace(config, run=replace(config.run, auto_resume=False))
    assert settle_resume(plain, store) is plain
