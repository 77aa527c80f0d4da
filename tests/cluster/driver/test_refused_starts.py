"""A start that is refused: one line, status 2, and nothing left that keeps the name."""

import pytest

from cluster.cli import main
from cluster.driver.run_folder import DATA_FILE, withdraw
from cluster.errors import UserError
from cluster.files import write_text
from cluster.run.report import METRICS_FILE
from cluster.run.storage import RunStore
from cluster.settings.config import CONFIG_FILE
from tests.cluster.small import SMALL
from tests.cluster.trained import write_model


@pytest.fixture
def start(elastic, tmp_path, monkeypatch, capsys):
    """Run ``train`` in an empty folder with the words; gives the error line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = [word for name, value in SMALL.items() for word in (f"--{name}", *map(str, _listed(value)))]

    def begin(*more: str) -> str:
        assert main(["train", "--target", "shear", *words, "--data_dir", str(elastic.path.parent), *more]) == 2
        said = capsys.readouterr().err
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        return line

    return begin


def _listed(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "device cuda: 1 workers need a GPU each, the cluster has 0"),
        (["--batch_size", "5000"], "batch_size must be at most the 944 training crystals, got 5000"),
        (
            ["--domain", "reci", "--scale_reci", "0.05"],
            "the reach in reciprocal space, must be at most 20 1/Å, got 169.7 1/Å",
        ),
        (["--scale_real", "1000"], "the reach of attention, must be at most 100 Å, got 8485 Å"),
    ],
)
def test_its_name_stays_free(start, tmp_path, words, message):
    for name in ([], ["--run_name", "night/a"]):
        assert message in start(*words, *name)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert not (tmp_path / "runs" / "night" / "a").exists()


def test_a_model_without_weights_to_start_from(start, tmp_path):
    folder = write_model(tmp_path / "m" / "model")
    (folder / "model.safetensors").unlink()
    assert "init_from: " in start("--init_from", str(folder), "--run_name", "a")
    assert not (tmp_path / "runs" / "a").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "RAY_ADDRESS '127.0.0.1:9': no Ray answers there: [Errno 111] Connection refused"),
        ("somewhere", "RAY_ADDRESS must be host:port, ray://host:port, auto or local, got 'somewhere'"),
        ("127.0.0.1:99999", "RAY_ADDRESS '127.0.0.1:99999': no Ray answers there"),
    ],
)
def test_no_ray_where_ray_address_points(start, tmp_path, monkeypatch, address, message):
    """Ray itself tries for a quarter of an hour."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert message in start("--run_name", "a")
    assert not (tmp_path / "runs" / "a").exists()


@pytest.mark.parametrize("name", [[], ["--run_name", "a"]])
def test_a_storage_path_that_leads_nowhere(start, tmp_path, name):
    """A disk that is not mounted, say; without a name it was tried for ever."""
    (tmp_path / "disk").symlink_to(tmp_path / "gone")
    line = start("--storage_path", "disk", *name)
    assert f"storage_path 'disk' leads to '{tmp_path / 'gone'}', which is not there" in line
    assert not (tmp_path / "gone").exists()


def test_a_run_that_has_begun_is_kept(tmp_path):
    store = RunStore(str(tmp_path), "a")
    for name in (CONFIG_FILE, DATA_FILE, METRICS_FILE):
        write_text(store.folder / name, "x")
    withdraw(store)
    assert len(list(store.folder.iterdir())) == 3
    (store.folder / METRICS_FILE).unlink()
    (store.folder / "notes.txt").write_text("the user's own")
    withdraw(store)
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="leads to"):
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        RunStore(str(tmp_path / "link"), "a")
