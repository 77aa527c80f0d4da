"""One command for the first try and for every repetition of it: auto_resume."""

from dataclasses import replace

import pytest

from cluster.config import save_yaml
from cluster.run_folder import CONFIG_FILE, open_run, settle_resume
from tests.cluster.small import small_config


@pytest.fixture
def config(tmp_path):
    return small_config(run_name="night/one", storage_path=str(tmp_path), auto_resume=True)


def test_the_first_try_starts_the_run(config, tmp_path):
    settled = settle_resume(config)
    assert (settled.run.resume, settled.run.auto_resume) == (False, False)
    assert open_run(settled) == tmp_path / "night" / "one"


def test_a_repetition_resumes_it(config):
    first = settle_resume(config)
    save_yaml(open_run(first) / CONFIG_FILE, first)
    again = settle_resume(config)
    assert again == replace(first, run=replace(first.run, resume=True))
    open_run(again)


def test_without_it_nothing_changes(config):
    plain = replace(config, run=replace(config.run, auto_resume=False))
    assert settle_resume(plain) is plain
