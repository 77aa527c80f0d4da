"""A disk that fills up: one line, no checkpoint lost, and the run goes on when there is room again."""

import errno
import os
import subprocess

import pytest

from cluster.cli import main
from cluster.worker.checkpoint import read_checkpoint
from tests.cluster.runs import Run, numbers


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder) -> None:
    """Leave no byte free."""
    with (folder / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_data_set_that_does_not_fit(small_disk, capsys):
    fill(small_disk)
    words = ["prepare", "dielectric_2017", "--data_dir", str(small_disk)]
    assert main(words) == 2
    assert "error: data set dielectric_2017: [Errno 28]" in capsys.readouterr().err
    (small_disk / "filler").unlink()
    assert main(words) == 0


def test_a_disk_that_fills_up(small_disk, elastic):
    data = {"data_dir": str(elastic.path.parent)}
    run = Run(small_disk, "run", checkpoint_every=1, epochs=10, swa_epochs=0, **data)
    run.wait_for_checkpoint()
    fill(small_disk)
    text = run.end()
    assert run.process.returncode == 1, text
    (line,) = error_lines(text)
    assert "No space left on device" in line and text.rstrip().endswith(line)
    assert "Traceback" not in text
    os.remove(small_disk / "filler")
    whole = [read_checkpoint(path) for path in run.folder.glob("checkpoint-*") if (path / "state.json").is_file()]
    assert whole
    reached = max(state.position.epoch for state in whole)
    again = Run(small_disk, "run", checkpoint_every=1, epochs=10, swa_epochs=0, resume=True, **data)
    text = again.end()
    assert again.process.returncode == 0, text
    assert "resuming after step" in text and reached > 1
    assert [row[0] for row in numbers(run.folder)] == list(range(1, 11))


def test_a_disk_that_is_full_before_the_start(small_disk, elastic, capsys):
    fill(small_disk)
    words = ["--data_dir", str(elastic.path.parent), "--storage_path", str(small_disk), "--run_name", "run"]
    assert main(["train", "--target", "shear", *words]) == 2
    told = f"error: storage_path {str(small_disk)!r} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == told
