"""Every command of the README runs: as written, but for a smaller model, one epoch and a folder of the test's own."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import head
from cluster.cli import _parse, main
from tests.benchmarks import baselines
from tests.cells import ROCK_SALT, face_centred
from tests.cluster.trained import write_model

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
QUICK = "--epochs 1 --model_dim 32 --head_num 2 --num_layers 2 --ff_dim 64 --value_pe_dist_real 16 --scale_real 0.9"
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line
]
TRAIN = [c for c in COMMANDS if c.startswith(".venv/bin/crystalformer train")]
DATA = [c for c in COMMANDS if re.match(r"\.venv/bin/crystalformer (info|prepare)", c)]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
USE = [c for c in COMMANDS if re.match(r"\.venv/bin/crystalformer (predict|evaluate|convert)", c)]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [c for c in COMMANDS if c.startswith(".venv/bin/python -m ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run, with the structures.csv, salt.cif and POSCAR that the README speaks of."""
    path = tmp_path_factory.mktemp("readme")
    (path / "salt.cif").write_text(rocksalt(5.64))
    (path / "POSCAR").write_text("CsCl\n4.12\n1 0 0\n0 1 0\n0 0 1\nCs Cl\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n")
    with (path / "structures.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "cif", "gap"])
        for number in range(40):
            rows.writerow([f"rocksalt-{number}", rocksalt(5.0 + 0.05 * number), 1.0 + 0.1 * number])
    return path


@pytest.fixture(scope="module", autouse=True)
def shared_ray():
    """One local Ray for all commands that train."""
    from cluster.session import ray_session

    with ray_session():
        yield


def rocksalt(a: float) -> str:
    """NaCl with a cubic cell of ``a`` Å as CIF text."""
    return face_centred(a, ROCK_SALT).to(fmt="cif")


def test_every_command_is_of_a_kind_that_is_run_here():
    assert len(COMMANDS) >= 12
    assert sorted(COMMANDS) == sorted([*TRAIN, *DATA, *USE, *MAKE, *PYTHON])


def test_data_training_and_predicting_commands(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command in [c for c in COMMANDS if c in DATA or c in TRAIN or c in USE]:
        words = shlex.split(command)[1:]
        if words[0] == "train" and "--resume" not in words:
            # The README's own 40 crystals make no larger batch.
            words += [*shlex.split(QUICK), *(["--batch_size", "16"] if "mine" in words else [])]
        assert main(words) == 0, f"{command}: {capsys.readouterr().err}"
    runs = sorted(path.parent for path in (folder / "runs").rglob("results.json"))
    assert len(runs) == len(TRAIN) - sum("--resume" in c for c in TRAIN)
    assert len((folder / "shear.csv").read_text().splitlines()) > 100


def test_make_train_and_the_other_make_commands(folder):
    first, *others = MAKE
    small = f"ARGS=--storage_path {folder}/made --data_dir {folder}/made-data {QUICK}"
    done = subprocess.run(
        [*shlex.split(first), "EPOCHS=1", small], cwd=REPOSITORY, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^test MAE    shear \d\.\d+ log10\(GPa\)", done.stdout, re.MULTILINE), done.stdout
    for command in others:
        dry_run = ["make", "-n", *shlex.split(command)[1:]]
        dry = subprocess.run(dry_run, cwd=REPOSITORY, capture_output=True, text=True)
        assert dry.returncode == 0, f"{command}: {dry.stderr}"
        assert taken(shlex.split(dry.stdout)), command


def taken(words: list[str]) -> bool:
    """Whether what make would run is a command with options that it takes: a wrong one raises UserError or exits."""
    if words[0].endswith("/crystalformer"):
        return bool(_parse(words[1:]).command_name)
    module, *rest = words[words.index("-m") + 1 :]
    return bool(head.command_line().parse_args(rest).command) if module == "cluster.head" else module == "pytest"


def test_baselines(folder, monkeypatch, capsys):
    """That they run; the README's table has 300 trees."""
    monkeypatch.setattr(baselines, "TREES", 20)
    for command in PYTHON:
        words = shlex.split(command)
        assert words[1:3] == ["-m", baselines.__name__]
        assert baselines.main([*words[3:], "--seeds", "1", "--data_dir", str(folder / "data")]) == 0
    assert capsys.readouterr().out.count("train mean ") == len(PYTHON)


def test_the_library_example():
    arrays, _ = EXAMPLES
    done = subprocess.run([sys.executable, "-c", arrays], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_from_pymatgen_to_a_number(tmp_path):
    write_model(tmp_path / "runs" / "night" / "model")
    done = subprocess.run([sys.executable, "-c", EXAMPLES[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"shear -?\d+\.\d{4} log10\(GPa\)\n", done.stdout)


def test_the_error_shown_is_the_error_given(capsys):
    (shown,) = re.findall(r"^\$ crystalformer (.*)\n(error: .*)$", README, re.MULTILINE)
    assert main(shlex.split(shown[0])) == 2
    assert capsys.readouterr().err == shown[1] + "\n"
