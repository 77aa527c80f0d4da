"""The image's parts, as far as they show without a container engine."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.k8s.rendered import load

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = (REPOSITORY / "k8s" / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.*(?:\\\n.*)*)", DOCKERFILE, re.MULTILINE)
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def values(name: str) -> list[str]:
    """What follows each of the instructions called ``name``."""
    return [value for instruction, value in INSTRUCTIONS if instruction == name]


def test_the_base_is_one_python_that_the_project_admits_and_never_latest():
    (base,) = [value.removeprefix("BASE=") for value in values("ARG") if value.startswith("BASE=")]
    major, minor = map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", base).groups())
    assert (3, 11) <= (major, minor) <= (3, 13)
    assert [value.split()[0] for value in values("FROM")] == ["${BASE}", "${BASE}"]


def test_tags_name_the_pinned_ray_and_the_project():
    pinned = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE).group(1)
    tags = re.findall(r"-t crystalformer:(\S+)", DOCKERFILE)
    assert tags
    for tag in tags:
        assert tag.startswith(f"{PROJECT['project']['version']}-ray{pinned}-py311-")


def test_everything_copied_is_in_the_build_context_and_every_package_is_copied():
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    copied = [name for value in values("COPY") if "--from" not in value for name in value.split()[:-1]]
    for name in copied:
        assert (REPOSITORY / name).exists()
        assert f"!{name}" in ignored
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied)


def test_it_is_installed_with_the_pins_and_runs_as_nobody_special():
    (installed,) = [value for value in values("RUN") if "pip install" in value]
    extras = re.search(r'-c constraints\.txt "\.\[([\w,]+)\]"$', installed).group(1).split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"]) - {"dev"}
    assert values("USER") == ["1000:1000"]
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]
    assert not re.search(r"\b(gcc|g\+\+|build-essential|git)\b", last_stage)


def test_one_version_of_ray():
    pinned = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert f"RAY_VERSION={pinned}" in values("ARG")
    dependency = [line for line in PROJECT["project"]["dependencies"] if line.startswith("ray[")]
    assert [line.partition("==")[2] for line in dependency] == [pinned]
    tags = set()
    for path in (REPOSITORY / "k8s").rglob("*.yaml"):
        text = path.read_text()
        assert set(re.findall(r"rayVersion: (\S+)", text)) <= {pinned}, path
        tags |= set(re.findall(r"newTag: (\S+)", text))
    assert tags == set(re.findall(r"-t crystalformer:(\S+)", DOCKERFILE))


def test_hadolint_finds_nothing():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, REPOSITORY / "k8s" / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_makes_the_whole_wheel(tmp_path):
    """``pip install .`` of the build stage, as far as the project itself goes: with the copied files alone."""
    context = tmp_path / "context"
    context.mkdir()
    for value in values("COPY"):
        for name in [] if "--from" in value else value.split()[:-1]:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, context)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(context)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]:
        folder = REPOSITORY / package.rstrip("*")
        for file in (*folder.rglob("*.py"), *folder.glob("embedded/*.parquet")):
            assert str(file.relative_to(REPOSITORY)) in inside


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, as the image's build stage has it")
def test_triton_gets_its_driver_without_a_compiler(tmp_path, monkeypatch):
    """The module made by the build stage is what Triton has when it has ``compiled`` it with the image's cc."""
    triton_driver = load("image/triton_driver.py")
    made = triton_driver.build(tmp_path / "opt")
    symbols = made.read_bytes()
    assert b"cuLaunchKernelEx" in symbols
    assert b"PyInit_cuda_utils" in symbols
    monkeypatch.setenv("CC", str(REPOSITORY / "k8s" / "image" / "cc"))
    monkeypatch.setenv("TRITON_DRIVER_FOLDER", str(tmp_path / "opt"))
    source = Path(triton_driver.driver.dirname) / "driver.c"
    folders = [triton_driver.driver.include_dirs, triton_driver.driver.libraries]
    handed = triton_driver._build("cuda_utils", str(source), str(tmp_path), [], *folders, [])
    assert Path(handed).read_bytes() == symbols


def test_the_image_compiles_nothing_else(tmp_path):
    words = [REPOSITORY / "k8s" / "image" / "cc", "x.c", "-shared", "-o", tmp_path / "fused_adam.so"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no C compiler; asked to make fused_adam.so" in done.stderr


def test_the_packages_import_without_a_home_folder(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", "import crystalformer, cluster, data_pipeline.datasets, tune"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
