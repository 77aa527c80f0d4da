"""What tests of the search share: a small data set of real structure files, a small model, one local Ray."""

import csv

import pytest

from cluster.cli import main

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


def rocksalt(a: float) -> str:
    """NaCl with a cubic cell of ``a`` Å as CIF text."""
    from pymatgen.core import Lattice, Structure

    sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", "Cl"], sites).to(fmt="cif")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of data sets that holds ``salts``: 40 crystals with their gap in eV."""
    folder = tmp_path_factory.mktemp("tune")
    with (folder / "salts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "cif", "gap"])
        for number in range(40):
            rows.writerow([f"salt-{number}", rocksalt(4.5 + 0.05 * number), 1.0 + (7 * number % 40) / 20])
    words = ["prepare", "--source", str(folder / "salts.csv"), "--name", "salts", "--data_dir", str(folder / "data")]
    assert main(words) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def settings(data_dir):
    """Settings of the trials, by flat name."""
    return {**SMALL, "data_dir": str(data_dir)}
