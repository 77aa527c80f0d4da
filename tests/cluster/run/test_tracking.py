"""MLflow's own client and store: what a run leaves there, going on in the same MLflow run, a store that fails."""

import pytest

from cluster.errors import UserError
from cluster.interrupts import RunStopped
from cluster.run.tracking import RUN_FILE, VARIABLE, Tracker
from tests.cluster.small import small_config

mlflow = pytest.importorskip("mlflow")

ROW = {"epoch": 1, "step": 7, "lr": 1e-3, "train_loss": 0.5, "val_mae": {"shear": 0.25, "bulk": None}}


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # artifacts of this store go beside it
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow.MlflowClient()


def test_settings_curve_and_files_are_kept_and_a_resumed_run_goes_on(client, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("lr: 1\n")
    config = small_config(run_name="first")
    with pytest.raises(RunStopped), Tracker(config, folder) as tracker:
        tracker.row(ROW)
        raise RunStopped("", 15)
    number = (folder / RUN_FILE).read_text().strip()
    run = client.get_run(number)
    assert (run.info.status, run.info.run_name) == ("KILLED", "first")
    assert client.get_experiment(run.info.experiment_id).name == "crystalformer"
    assert run.data.params["batch_size"] == "8"
    with Tracker(config, folder) as tracker:
        tracker.row(ROW | {"epoch": 2, "val_mae": {"shear": 0.125}})
    assert (folder / RUN_FILE).read_text().strip() == number
    assert client.get_run(number).info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(number, "val_mae/shear")] == [(1, 0.25), (2, 0.125)]
    assert [item.path for item in client.list_artifacts(number)] == ["config.yaml"]


def test_without_the_variable_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with Tracker(small_config(), tmp_path) as tracker:
        tracker.row(ROW)
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "nonsense://x")
    mlflow.set_tracking_uri("nonsense://x")
    with pytest.raises(UserError, match=f"^{VARIABLE}: ") as refused:
        Tracker(small_config(), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_password_is_not_told(tmp_path, monkeypatch):
    uri = "http://alice:S3cretPw@127.0.0.1:9"
    monkeypatch.setenv(VARIABLE, uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(uri)
    with pytest.raises(UserError, match=f"^{VARIABLE}: .*http://\\*\\*\\*@127.0.0.1:9/api") as refused:
        Tracker(small_config(), tmp_path)
    assert "S3cretPw" not in str(refused.value) and "alice" not in str(refused.value)


def test_a_store_that_fails_later_is_given_up_with_a_warning(client, tmp_path, capsys):
    with Tracker(small_config(), tmp_path) as tracker:
        client.delete_run((tmp_path / RUN_FILE).read_text().strip())
        tracker.row(ROW)
        tracker.row(ROW)
    assert capsys.readouterr().out.count("warning: MLflow logging stopped: ") == 1


def test_a_store_that_fails_later_tells_no_password(client, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no answer from http://alice:S3cretPw@host/api")

    with Tracker(small_config(), tmp_path) as tracker:
        monkeypatch.setattr(tracker._client, "log_metric", fail)
        tracker.row(ROW)
    assert "no answer from http://***@host/api" in capsys.readouterr().out
