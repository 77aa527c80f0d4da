"""The image's parts, as far as they show without a container engine."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
    assert any("pip install" in value and "-c constraints.txt ." in value for value in values("RUN"))
    assert values("USER") == ["1000:1000"]
    last_stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]
    assert not re.search(r"\b(gcc|g\+\+|build-essential|git)\b", last_stage)


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
