"""Predicting: row P1 of the design's targets, and very many structures through Ray Data.

    crystalformer bench predict [--rows 10000] [--screen N] [--kill] [--model FOLDER] [--json FILE]

P1      seconds of ``predict`` from a structure table to CSV, against bare forward passes of the same batches: with
        the neighbour search that a forward pass does of itself, and with lists found beforehand
screen  structures a second, peak memory of all processes of ``crystalformer predict`` on a made-up table of N; with
        --kill it is killed (SIGKILL) in the middle and goes on with --resume
one     seconds of ``crystalformer predict`` on one CIF, against ``import torch`` in a fresh process
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.commands.predict import predict_here
from cluster.data.feed import batch_of_crystals
from cluster.prediction.inputs import find_structures, plan_pieces
from cluster.prediction.predict import Ensemble, crystal_work
from crystalformer.artifact import ModelCard, TargetScale, batch_ends, load_model, save_model
from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer
from data_pipeline.schema import structure_schema
from tests.benchmarks.measure import Row, environment, report
from tests.benchmarks.memory import family, pss_mb
from tests.benchmarks.options import Parser, natural, out_file
from tests.benchmarks.synthetic import SyntheticSource

ROWS_A_GROUP = 8192
CPU = torch.device("cpu")
REPEATS = 3


def write_table(path: Path, rows: int) -> Path:
    """A made-up structure table."""
    schema = structure_schema(())
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        held: list[pa.Table] = []
        for table in SyntheticSource(rows).tables():
            held.append(table.select(schema.names).cast(schema))
            if sum(map(len, held)) >= ROWS_A_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if held:
            writer.write_table(pa.concat_tables(held))
    return path


def write_model(folder: Path, table: Path) -> Path:
    """The default model with fresh weights and statistics of some crystals: as fast as a trained one."""
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig())
    model.freeze_statistics(batches(table, 64, model.config.neighbor_radius)[0])
    card = ModelCard(model=model.config, targets=(TargetScale(name="made_up", unit="eV", scale=1.0, bias=0.0),))
    save_model(folder, card, model.state_dict())
    return folder


def batches(table: Path, rows: int, radius: float) -> list[CrystalBatch]:
    """The batches that predict makes of the first rows of a table."""
    crystals = [
        one.crystal for one, _ in zip(find_structures([str(table)]), range(rows), strict=False) if one.crystal
    ]
    ends = [0, *batch_ends(crystal_work(crystal, radius) for crystal in crystals)]
    return [batch_of_crystals(crystals[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def against_forward(folder: Path, table: Path, rows: int) -> list[Row]:
    """P1."""
    predictor = load_model(folder)
    radius = predictor.card.model.neighbor_radius
    with tempfile.TemporaryDirectory() as place:
        models = Ensemble([str(folder)], CPU)
        models.predict_batch(batches(table, 64, radius)[0])  # torch's threads are started
        start = time.perf_counter()
        predict_here(models, plan_pieces([str(table)]), Path(place) / "out.csv", None)
        whole = time.perf_counter() - start
    made = batches(table, rows, radius)
    searching = finding = forward = 0.0
    for batch in made:
        start = time.perf_counter()
        predictor.predict_batch(batch)
        searching += time.perf_counter() - start
        start = time.perf_counter()
        replace(batch).distinct(radius)
        finding += time.perf_counter() - start
        start = time.perf_counter()
        predictor.predict_batch(batch)
        forward += time.perf_counter() - start
    sys.stderr.write(f"neighbour search alone: {finding:.1f} s\n")
    row: Row = {"row": "P1", "rows": rows, "batches": len(made), "seconds": whole, "per_second": rows / whole}
    return [
        row | {"what": "against forward passes (target 0.8)", "bare": searching, "ratio": searching / whole},
        row | {"what": "the same with lists found beforehand", "bare": forward, "ratio": forward / whole},
    ]


def screened(folder: Path, table: Path, rows: int, place: Path, *, kill: bool) -> list[Row]:
    """``crystalformer predict`` of a large table, perhaps killed on its way."""
    out = place / "out.csv"
    made: list[Row] = []
    if kill:
        seconds, peak, shards = _command(folder, table, out, rows // 2, [])
        made.append(_row("killed on its way", shards, seconds, peak))
    seconds, peak, _ = _command(folder, table, out, None, ["--resume"])
    done = sum(1 for _ in out.open(encoding="utf-8")) - 1
    left = rows - (made[0]["rows"] if made else 0)
    made.append(_row("resumed: the rest" if kill else "whole", left, seconds, peak) | {"predictions": done})
    return made


def _command(
    folder: Path, table: Path, out: Path, kill_at: int | None, words: Sequence[str]
) -> tuple[float, float, int]:
    """Run predict; seconds, peak memory in MB, rows that have a shard at the end. ``kill_at``: rows to die after."""
    parts = out.with_name(f"{out.name}.parts")
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "predict", str(folder), str(table), "--output", str(out), *words]
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, pss_mb(family(process.pid)))
        if kill_at is not None and _rows_done(parts) >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            seconds = time.perf_counter() - start
            time.sleep(15)  # Ray's processes end by themselves
            return seconds, peak, _rows_done(parts)
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, peak, _rows_done(parts)


def _rows_done(parts: Path) -> int:
    return sum(int(path.stem.split("-")[2]) for path in parts.glob("*-*.parquet"))


def _row(what: str, rows: int, seconds: float, peak: float) -> Row:
    row: Row = {"row": "screen", "what": what, "rows": rows, "seconds": seconds}
    return row | {"per_second": rows / seconds, "peak_mb": peak}


def one_structure(folder: Path, place: Path) -> Row:
    """The time of a command on one CIF and that of importing torch, medians."""
    from pymatgen.core import Lattice, Structure

    file = place / "salt.cif"
    sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
    file.write_text(Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], sites).to(fmt="cif"))
    command = [sys.executable, "-m", "cluster", "predict", str(folder), str(file)]
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(REPEATS):
        for name, words in (("ours", command), ("torch", [sys.executable, "-c", "import torch"])):
            start = time.perf_counter()
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
            times[name].append(time.perf_counter() - start)
    ours, bare = (statistics.median(times[name]) for name in ("ours", "torch"))
    return {"row": "one", "what": "one CIF; import torch", "seconds": ours, "bare": bare, "ratio": ours / bare}


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Command line; see the module's docstring."""
    parser = Parser("predict", __doc__.split("\n")[0])
    parser.add_argument("--rows", type=natural, default=10_000, metavar="N", help="structures of P1; 0 for none")
    parser.add_argument("--screen", type=natural, default=0, metavar="N", help="structures to screen through Ray")
    parser.add_argument("--kill", action="store_true", help="kill that in the middle and resume")
    parser.add_argument("--one", action="store_true", help="time one CIF")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="model folder (default: a fresh default model)")
    parser.add_argument("--json", type=out_file, metavar="FILE")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="crystalformer-bench-") as name:
        place = Path(name)
        folder = args.model or write_model(place / "model", write_table(place / "some.parquet", 64))
        if args.rows:
            table = write_table(place / "p1.parquet", args.rows)
            rows += against_forward(folder, table, args.rows)
        if args.screen:
            table = write_table(place / "screen.parquet", args.screen)
            rows += screened(folder, table, args.screen, place, kill=args.kill)
        if args.one:
            rows.append(one_structure(folder, place))
    result = report(rows, environment("cpu"))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
