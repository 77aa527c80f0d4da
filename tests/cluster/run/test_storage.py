"""Runs kept in an object store, over its real protocol: what lies there, going on after a stop, what can go wrong."""

import json
import shutil
from types import SimpleNamespace

import pyarrow.fs
import pytest

import cluster  # noqa: F401 - sets Ray's environment
from cluster.cli import main
from cluster.driver import trainer
from cluster.driver.launch import launch
from cluster.driver.recorder import Recorder
from cluster.errors import RunFailed, UserError
from cluster.run.report import read_metrics
from cluster.run.storage import RunStore, local_folder
from crystalformer import load_model
from tests.cluster.local_ray import local_ray
from tests.cluster.s3 import s3_server
from tests.cluster.small import small_config

BUCKET = "s3://bucket/runs"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The environment of the server, set in this process; its bucket's file system."""
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3") / "log") as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield pyarrow.fs.FileSystem.from_uri(BUCKET)[0]


@pytest.fixture(scope="module")
def ray_here(s3):
    with local_ray(2):
        yield


EPOCHS = 16
"""Of a run that is stopped after its first: it must not have ended when its driver looks."""


@pytest.fixture(scope="module")
def config(elastic):
    def make(name, storage_path=BUCKET, **settings):
        run = {"run_name": name, "storage_path": storage_path, "data_dir": str(elastic.path.parent)}
        run |= {"dataset": "elastic_tensor_2015", "device": "cpu", "threads_per_worker": 1, "num_layers": 1}
        return small_config(**{"batch_size": 16, "epochs": 4, "checkpoint_every": 1, **run, **settings})

    return make


def names(s3, run: str) -> set[str]:
    """The files of a run in the bucket."""
    found = s3.get_file_info(pyarrow.fs.FileSelector(f"bucket/runs/{run}", recursive=True))
    return {info.path.removeprefix(f"bucket/runs/{run}/") for info in found if info.is_file}


def curve(folder) -> list[tuple[float, float]]:
    return [(row["train_loss"], row["val_mae"]["shear"]) for row in read_metrics(folder)]


def test_a_run_in_a_bucket_is_stopped_and_goes_on(ray_here, s3, config, tmp_path, monkeypatch):
    def launch_and_stop(*arguments, **named):
        seen = []
        return launch(*arguments, lambda rows: seen.extend(rows) or len(seen) < 1, **named)

    long = {"epochs": EPOCHS, "num_workers": 2}
    whole = trainer.train(config("whole", str(tmp_path), **long))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "launch", launch_and_stop)
        with pytest.raises(RuntimeError, match="training stopped before its end"):
            trainer.train(config("run", **long))
    before = names(s3, "run")
    assert {"config.yaml", "metrics.jsonl"} <= before and "results.json" not in before
    assert any(name.endswith("/state.json") for name in before)
    result = trainer.train(config("run", **long, resume=True))
    assert result.run_dir == f"{BUCKET}/run"
    assert result.test_mae == pytest.approx(whole.test_mae, rel=1e-4)
    with local_folder(f"{BUCKET}/run") as copy:
        assert json.loads((copy / "results.json").read_text())["test_mae"] == result.test_mae
        assert len(read_metrics(copy)) == EPOCHS
        for mine, theirs in zip(curve(copy), curve(tmp_path / "whole"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert load_model(copy / "model").targets[0] == "shear"
        kept = [path for path in copy.iterdir() if path.name.startswith("checkpoint-")]
        assert len(kept) == 2
    with pytest.raises(UserError, match=f"run_name 'run' exists in {BUCKET}"):
        trainer.train(config("run"))


def test_only_changed_files_are_sent(s3):
    store = RunStore(BUCKET, "changes")
    (store.folder / "a").write_text("1")
    (store.folder / "b").write_text("1")
    store.push(now=True)
    path = "bucket/runs/changes"
    s3.delete_file(f"{path}/a")
    (store.folder / "b").write_text("22")
    store.push()  # a moment ago: not yet
    assert s3.get_file_info(f"{path}/b").size == 1
    store.push(now=True)
    assert names(s3, "changes") == {"b"}
    assert s3.get_file_info(f"{path}/b").size == 2
    store.close()
    assert not store.folder.exists()


def test_the_local_copy_is_kept_where_it_cannot_be_sent(s3, capsys):
    store = RunStore("s3://no-such-bucket/runs", "lost")
    (store.folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match="s3://no-such-bucket/runs/lost: .*bucket"):
        store.close()
    assert (store.folder / "results.json").read_text() == "{}"
    assert str(store.folder) in capsys.readouterr().out


def test_why_a_run_ended_is_not_hidden_by_files_that_cannot_be_sent(s3, capsys):
    with pytest.raises(RunFailed, match="diverged"), RunStore("s3://no-such-bucket/runs", "lost") as store:
        (store.folder / "results.json").write_text("{}")
        raise RunFailed("diverged")
    assert f"are kept in {store.folder}" in capsys.readouterr().out
    shutil.rmtree(store.folder)
    with pytest.raises(UserError, match="no-such-bucket"), RunStore("s3://no-such-bucket/runs", "lost") as store:
        (store.folder / "results.json").write_text("{}")
    shutil.rmtree(store.folder)


def test_a_store_that_does_not_answer_in_mid_run_is_told_of_once(s3, config, capsys):
    store = RunStore("s3://no-such-bucket/runs", "away")
    with Recorder(store, config("away"), {}, lambda _: None) as recorder:
        for _ in range(3):
            store._last_push = -float("inf")  # a while ago
            recorder.push()
    assert capsys.readouterr().out.count("warning: the run folder is behind") == 1
    shutil.rmtree(store.folder)


def test_what_was_fetched_is_not_sent_back(s3):
    first = RunStore(BUCKET, "fetched")
    (first.folder / "config.yaml").write_text("old")
    first.close()
    second = RunStore(BUCKET, "fetched")
    second.pull("config.yaml", "metrics.jsonl")
    with s3.open_output_stream("bucket/runs/fetched/config.yaml") as stream:
        stream.write(b"written by another run since")
    second.close()
    with local_folder(f"{BUCKET}/fetched") as copy:
        assert (copy / "config.yaml").read_text() == "written by another run since"


def test_an_error_in_the_use_of_a_copy_is_not_the_stores(s3):
    store = RunStore(BUCKET, "copied")
    (store.folder / "a").write_text("1")
    store.close()
    with pytest.raises(FileNotFoundError, match="elsewhere"), local_folder(f"{BUCKET}/copied"):
        raise FileNotFoundError("elsewhere")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://host/runs", "storage_path must be a folder or begin with one of s3://"),
        ("s3://", "storage_path must name a bucket"),
        ("s3://key:secret@bucket/runs", "storage_path must not hold credentials"),
        ("s3://key:abc/secret@bucket/runs", "storage_path must not hold credentials"),
        ("S3://key:se cret/secret@bucket/runs", "storage_path must not hold credentials"),
        ("s3a://key:secret@bucket/runs", "storage_path must not hold credentials"),
        ("s3://[key:secret@bucket/runs", "storage_path must not hold credentials"),
        ("s3://[bucket/runs", "storage_path must be a URI, got 's3://[bucket/runs': Invalid IPv6 URL"),
        ("abfs://box:secret@account.dfs.core.windows.net/runs", "storage_path must not hold credentials"),
        ("abfs://box:abc/secret@account.dfs.core.windows.net/runs", "storage_path must not hold credentials"),
        ("abfss://box@account.dfs.core.windows.net/runs?sv=1&sig=secret", "storage_path must not hold credentials"),
        ("hdfs://key:secret@host:8020/runs", "storage_path must not hold credentials"),
        ("s3://no-such-bucket/runs", "s3://no-such-bucket/runs/run: "),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(s3, config, path, message):
    with pytest.raises(UserError) as refused:
        trainer.train(config("run", path))
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("info foo://x", "MODEL must be a folder or begin with one of s3://"),
        ("predict s3:// a.cif", "MODEL must name a bucket"),
        ("evaluate s3://key:secret@bucket/model", "MODEL must not hold credentials"),
        ("convert foo://x out.pt --to_reference", "CHECKPOINT must be a folder or begin with one of s3://"),
        (
            "train --target shear --init_from foo://x",
            "init_from: location must be a folder or begin with one of s3://",
        ),
    ],
)
def test_a_uri_that_cannot_be_read_is_refused_under_the_name_it_was_given_by(words, message, capsys):
    assert main(words.split()) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("abfs://box@account.dfs.core.windows.net/runs", "box/runs/a"),
        ("abfss://box@account.dfs.core.windows.net/me@work/runs", "box/me@work/runs/a"),
        ("s3://bucket/me@work:1/runs", "bucket/me@work:1/runs/a"),
    ],
)
def test_a_container_and_a_path_are_no_credentials(s3, uri, path):
    store = RunStore(uri, "a")
    assert store.ray_storage["storage_path"] + "/a" == path and store.location == f"{uri}/a"
    shutil.rmtree(store.folder)


def test_a_port_is_no_password(monkeypatch):
    uri = "hdfs://host:8020/user/me@WORK"
    # pyarrow has it where Java is installed.
    monkeypatch.setattr(
        "cluster.run.storage.FileSystem", SimpleNamespace(from_uri=lambda uri: (uri, "/user/me@WORK"))
    )
    store = RunStore(uri, "a")
    assert store.location == f"{uri}/a"
    shutil.rmtree(store.folder)


def test_a_folder_that_is_not_there(s3):
    with (
        pytest.raises(UserError, match="s3://bucket/runs/nothing: there is no such folder"),
        local_folder(f"{BUCKET}/nothing"),
    ):
        pass
