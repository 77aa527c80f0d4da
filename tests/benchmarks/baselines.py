"""What Crystalformer has to beat: the train mean and a random forest, on the same split of the same data set.

    python -m tests.benchmarks.baselines --dataset elastic_tensor_2015 --target shear --seeds 3

Prints a line a model with the test MAE in the target's unit, and the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pymatgen.core.periodic_table import Element
from sklearn.ensemble import RandomForestRegressor

from data_pipeline.prepare import prepare_dataset
from data_pipeline.table import StructureTable

Floats = npt.NDArray[np.float64]

PROPERTIES = (
    "Z",
    "X",
    "atomic_mass",
    "atomic_radius",
    "average_ionic_radius",
    "mendeleev_no",
    "row",
    "group",
    "melting_point",
    "density_of_solid",
    "molar_volume",
    "thermal_conductivity",
    "electron_affinity",
    "ionization_energy",
)
"""pymatgen's element properties that the features are statistics of."""

TREES = 300


def element_table() -> Floats:
    """(99, properties) by atomic number; where pymatgen knows no value, the median over the elements stands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each unknown value
        rows = [[_number(Element.from_Z(z), name) for name in PROPERTIES] for z in range(1, 99)]
    table = np.array(rows)
    unknown = ~np.isfinite(table)
    table[unknown] = np.nanmedian(np.where(unknown, np.nan, table), axis=0)[np.nonzero(unknown)[1]]
    return np.vstack([np.zeros(len(PROPERTIES)), table])


def _number(element: Element, name: str) -> float:
    value = getattr(element, name)
    return float("nan") if value is None else float(value)


def composition_features(table: StructureTable, elements: Floats) -> Floats:
    """(rows, 4 * properties): mean, standard deviation, minimum and maximum over a cell's atoms."""
    packed = table.gather(np.arange(table.num_rows))
    cells = np.split(elements[packed.atomic_numbers], np.cumsum(packed.sizes)[:-1])
    return np.array([np.concatenate([c.mean(0), c.std(0), c.min(0), c.max(0)]) for c in cells])


def volume_an_atom(table: StructureTable) -> Floats:
    """(rows, 1) in Å³."""
    packed = table.gather(np.arange(table.num_rows))
    return (np.abs(np.linalg.det(packed.lattice)) / packed.sizes)[:, None]


def baselines(data_dir: Path, dataset: str, target: str, seeds: int) -> dict[str, list[float]]:
    """Test MAE of each model, one a seed, in the target's unit."""
    prepared = prepare_dataset(dataset, data_dir)
    splits = {name: StructureTable.open(prepared.split_path(name), [target]) for name in ("train", "test")}
    elements = element_table()
    composition = {name: composition_features(table, elements) for name, table in splits.items()}
    volume = {name: volume_an_atom(table) for name, table in splits.items()}
    train, test = (splits[name].targets()[:, 0] for name in ("train", "test"))
    features = {
        "random forest, composition": composition,
        "random forest, composition and volume": {n: np.hstack([composition[n], volume[n]]) for n in splits},
    }
    errors = {"train mean": [float(np.abs(test - train.mean()).mean())]}
    for name, x in features.items():
        errors[name] = [_forest_mae(x["train"], train, x["test"], test, seed) for seed in range(seeds)]
    return errors


def _forest_mae(x: Floats, y: Floats, x_test: Floats, y_test: Floats, seed: int) -> float:
    forest = RandomForestRegressor(TREES, random_state=seed, n_jobs=-1).fit(x, y)
    return float(np.abs(forest.predict(x_test) - y_test).mean())


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Baselines on the same split.")
    parser.add_argument("--dataset", default="elastic_tensor_2015")
    parser.add_argument("--target", default="shear")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    args = parser.parse_args(argv)
    errors = baselines(args.data_dir, args.dataset, args.target, args.seeds)
    for name, values in errors.items():
        sys.stdout.write(f"{name:40} {np.mean(values):.4f}  ({', '.join(f'{v:.4f}' for v in values)})\n")
    sys.stdout.write(json.dumps({"dataset": args.dataset, "target": args.target, "test_mae": errors}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
