"""Fine-tuning on few crystals: bulk modulus learnt on all training crystals, then shear modulus on 200 of them.

    python -m tests.benchmarks.fine_tuning [--seeds 3] [--crystals 200] [-- --epochs 100 ..]

A model of the bulk modulus is trained on elastic_tensor_2015, unless --model names one. A data set is made of the
first crystals of its training split, with its validation and test splits as they are. On that, the shear modulus is
learnt from fresh weights and from the bulk model's, everything else alike; test errors of every seed are printed.
Words after a lone ``--`` go to every ``crystalformer train``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.cli import main as crystalformer
from cluster.session import ray_session
from data_pipeline.info import DatasetInfo, SourceKind
from data_pipeline.prepare import prepare_dataset, prepare_from
from data_pipeline.prepared import PreparedDataset
from data_pipeline.sources.base import ARRAY_SECONDS
from data_pipeline.sources.raw import from_structures
from data_pipeline.splits import SPLITS
from data_pipeline.table import read_table

DATASET = "elastic_tensor_2015"


class FirstCrystals:
    """A prepared data set with only the first ``crystals`` rows of its training split."""

    every_target = False
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, whole: PreparedDataset, crystals: int) -> None:
        self.targets = whole.targets
        self._whole, self._crystals = whole, crystals

    def fingerprint(self) -> str:
        """Of the whole set, and how much of it is taken."""
        return f"{self._whole.fingerprint} {self._crystals}"

    def tables(self) -> Iterator[pa.Table]:
        """A raw table a split."""
        for split in SPLITS:
            table = read_table(self._whole.split_path(split), self._whole.target_names)
            raw = from_structures(table[: self._crystals] if split == "train" else table, split, self.targets)
            place = raw.schema.get_field_index("split")
            yield raw.set_column(place, raw.schema.field(place), pa.array([split] * len(raw)))


def subset(data_dir: Path, crystals: int) -> str:
    """Prepare the small data set; its name."""
    whole = prepare_dataset(DATASET, data_dir)
    name = f"{DATASET}-{crystals}"
    info = DatasetInfo(
        name=name, kind=SourceKind.OWN, targets=whole.targets, source=DATASET, citation="", licence=whole.licence
    )
    prepare_from(FirstCrystals(whole, crystals), info, data_dir)
    return name


def train(storage: Path, name: str, words: Sequence[str]) -> dict[str, Any]:
    """One ``crystalformer train``; its results.json. A finished run of that name is not repeated."""
    results = storage / name / "results.json"
    if not results.is_file():
        status = crystalformer(["train", "--storage_path", str(storage), "--run_name", name, "--auto_resume", *words])
        if status:
            raise SystemExit(status)
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def compare(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Test MAE in log10(GPa) of both arms by seed: best-validation and averaged weights."""
    data = ["--data_dir", str(args.data_dir)]
    small = ["--target", "shear", "--dataset", subset(args.data_dir, args.crystals), *data, *args.words]
    model = args.model
    if model is None:
        train(args.storage_path, "bulk", ["--target", "bulk", "--dataset", DATASET, *data, *args.words])
        model = args.storage_path / "bulk"
    found: dict[str, list[dict[str, float]]] = {"fresh weights": [], "fine-tuned": []}
    for seed in range(1, args.seeds + 1):
        for arm, start in (("fresh weights", []), ("fine-tuned", ["--init_from", str(model)])):
            words = [*small, *args.small, *start, "--seed", str(seed)]
            result = train(args.storage_path, f"{arm.replace(' ', '-')}-{seed}", words)
            errors = {"best": result["test_mae"]["shear"], "averaged": result["test_mae_swa"]["shear"]}
            found[arm].append(errors)
            sys.stdout.write(f"{arm}, seed {seed}: {errors}\n")
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Fine-tuning against training from scratch.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crystals", type=int, default=200)
    parser.add_argument("--model", type=Path, help="a trained bulk model to start from")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--storage_path", type=Path, default=Path("runs/fine-tuning"))
    parser.add_argument("--small", nargs="*", default=["--batch_size", "32"], help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", metavar="-- WORDS")
    args = parser.parse_args(argv)
    with ray_session():
        found = compare(args)
    for arm, errors in found.items():
        means = {name: float(np.mean([error[name] for error in errors])) for name in errors[0]}
        sys.stdout.write(f"{arm:14} test MAE shear, mean of {args.seeds} seeds: {means}\n")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
