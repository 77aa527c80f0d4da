"""What tests of the search share: a small data set of real structure files, a small model, one local Ray."""

import csv
import json
import random
import threading
import time
from datetime import datetime

import pytest

from cluster.cli import main
from tests.cells import ROCK_SALT, face_centred, simple

SMALL = {
    "target": ["gap"],
    "dataset": "salts",
    "batch_size": 8,
    "num_layers": 1,
    "model_dim": 16,
    "head_num": 2,
    "ff_dim": 32,
    "embedding_dim": [16],
    "value_pe_dist_real": 16,
    "scale_real": 0.9,
    "device": "cpu",
    "threads_per_worker": 1,
}
"""Settings of a trial that takes a fraction of a second an epoch."""


KINDS = {
    "rocksalt": (face_centred, 5.0, ROCK_SALT),
    "caesium": (simple, 4.0, [("Cs", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5))]),
    "fluorite": (face_centred, 5.4, [("Ca", (0, 0, 0)), ("F", (0.25, 0.25, 0.25)), ("F", (0.75, 0.75, 0.75))]),
    "perovskite": (
        simple,
        3.9,
        [
            ("Sr", (0, 0, 0)),
            ("Ti", (0.5, 0.5, 0.5)),
            *(("O", at) for at in ((0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5))),
        ],
    ),
}
"""Kind of cell, edge of the cubic one in Å, and its sites."""


def cif(kind: str, strain: float) -> str:
    """A structure of 2 to 5 atoms as CIF text."""
    cell, a, sites = KINDS[kind]
    return cell(a * strain, sites).to(fmt="cif")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of data sets that holds ``salts``: 40 crystals of four kinds with a gap in eV and a random edge."""
    folder = tmp_path_factory.mktemp("tune")
    with (folder / "salts.csv").open("w", newline="") as file:
        rows, edges = csv.writer(file), random.Random(1)
        rows.writerow(["id", "cif", "gap", "edge"])
        for number in range(40):
            kind = sorted(KINDS)[number % 4]
            rows.writerow(
                [f"salt-{number}", cif(kind, 0.95 + 0.0025 * number), 1.0 + number % 4 + number / 40, edges.random()]
            )
    words = ["prepare", "--source", str(folder / "salts.csv"), "--name", "salts", "--data_dir", str(folder / "data")]
    assert main(words) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def settings(data_dir):
    """Settings of the trials, by flat name."""
    return {**SMALL, "data_dir": str(data_dir)}


@pytest.fixture(scope="module")
def address():
    """Of a local Ray for all searches of a file, those in other processes too."""
    import ray  # after cluster, which sets its environment

    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def words(settings, folder):
    """``words(name, own options)``: the options of a search's command line."""

    def make(name, **options):
        every = settings | {"storage_path": str(folder), "run_name": name} | options
        return [f"--{key}={value[0] if isinstance(value, list) else value}" for key, value in every.items()]

    return make


@pytest.fixture(scope="module")
def plan(settings, folder):
    """``plan(name, own options, **settings)``: a search of that name."""

    def make(name, given, **others):
        from tune.folder import new_search  # Optuna takes a second to import

        where = {"run_name": name, "storage_path": str(folder)}
        return new_search({**settings, **where, **others}, given, datetime.now())

    return make


@pytest.fixture
def own_file(folder):
    """``own_file(search, content)``: a JSON file that is not there any more when trials of that search begin."""

    def make(name, content):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(content))

        def remove():
            while not (folder / name / ".ray").exists():
                time.sleep(0.05)
            file.unlink()

        threading.Thread(target=remove, daemon=True).start()
        return str(file)

    return make
