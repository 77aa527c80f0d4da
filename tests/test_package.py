"""An installed package works outside the checkout, embedded data included."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the wheel's content, as pip would unpack it."""
    folder = tmp_path_factory.mktemp("package")
    # From a copy: setuptools builds inside the source tree and would pick up what an earlier build left there.
    source = folder / "source"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".*", "data", "runs", "build", "tests"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("crystalformer-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """A Python that sees the unpacked wheel before the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_command_comes_from_the_installed_package(installed, tmp_path):
    done = run(installed, tmp_path, "-c", "import cluster, tune; print(cluster.__file__, tune.__file__)")
    assert done.stdout.count(str(installed)) == 2, done.stderr
    script = (installed / next(installed.glob("*.dist-info")).name / "entry_points.txt").read_text()
    assert "crystalformer = cluster.cli:main" in script
    done = run(installed, tmp_path, "-m", "cluster", "--help")
    assert done.returncode == 0 and "train" in done.stdout


def test_embedded_data_are_prepared_outside_the_checkout(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "cluster", "prepare", "dielectric_2017")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "data" / "dielectric_2017").glob("*")) == [
        "dataset.json",
        "test",
        "train",
        "val",
    ]


def test_only_the_four_packages_are_installed(installed):
    folders = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert folders == {"cluster", "crystalformer", "data_pipeline", "tune"}
