"""One command for the first try and for every repetition of it: auto_resume."""

import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pytest

from cluster import lock
from cluster.driver.run_folder import DATA_FILE, check_data, claimed, open_run, settle_resume, with_free_name
from cluster.errors import UserError
from cluster.run.storage import RunStore
from cluster.settings.config import CONFIG_FILE, save_yaml
from data_pipeline.prepared import load_prepared
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


HOLD = """
import sys, time
from pathlib import Path
from cluster.lock import locked
with locked(Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(store):
    """Another process that writes the run."""
    with subprocess.Popen([sys.executable, "-c", HOLD, store.folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_run_is_written_by_one_process(config, store, holder):
    plain = replace(config, run=replace(config.run, auto_resume=False))
    with (
        pytest.raises(UserError, match="run_name 'night/one' in .* is being written by another process"),
        claimed(plain, store),
    ):
        raise AssertionError("the run was given to two")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(plain, store):
        assert (store.folder / ".lock").is_file()


def test_what_goes_on_by_itself_waits_for_the_last_one(config, store, holder, monkeypatch):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    with subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"]), claimed(config, store):
        assert holder.wait(0.3) == -signal.SIGKILL


def test_resuming_a_run_that_is_not_there_makes_no_folder(config, store):
    resumed = replace(config, run=replace(config.run, auto_resume=False, resume=True))
    with claimed(resumed, store), pytest.raises(UserError, match="cannot be resumed"):
        open_run(resumed, store)
    assert not store.folder.exists()


def test_runs_begun_in_the_same_second_get_folders_of_their_own(config):
    unnamed = replace(config, run=replace(config.run, run_name=None, auto_resume=False))
    resolved = unnamed.resolved(dataset="d", target=("shear",), now=datetime(2026, 11, 23, 6, 0, 0))
    names = [with_free_name(resolved).run.run_name for _ in range(3)]
    assert names == ["shear-d-20261123-060000", "shear-d-20261123-060000-2", "shear-d-20261123-060000-3"]


def test_other_rows_under_the_same_name_are_not_mixed_into_a_run(config, store, elastic):
    dataset = load_prepared(elastic.path.parent, elastic.name)
    store.folder.mkdir(parents=True)
    check_data(config, store, dataset)
    resumed = replace(config, run=replace(config.run, auto_resume=False, resume=True))
    check_data(resumed, store, dataset)
    again = replace(dataset, fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"was prepared anew since run 'night/one' began \(.* is now 000000000000\)"):
        check_data(resumed, store, again)
    assert dataset.fingerprint in (store.folder / DATA_FILE).read_text()
