"""Predicting very many structures: read and listed all over the cluster, predicted by a pool of model copies.

The inputs are cut into pieces (inputs.py). Tasks of Ray Data read a piece each and find its neighbour shells; actors,
each with one copy of the models, predict what comes from them and write it as shards beside the output file. Ray Data
holds the tasks back where the actors do not keep up, so that memory does not grow with the inputs. A shard appears
when it is whole; a command that was killed goes on with what has no shard yet. At the end the shards become the
output, in the order of the inputs. All nodes must see the inputs and the output's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import chdir, closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.data.feed import batch_of_packed
from cluster.data.shells import SCHEMA, ShellTable, find_table_shells
from cluster.errors import UserError
from cluster.prediction.answers import TableFile, claimed
from cluster.prediction.inputs import Found, Piece, read_piece
from cluster.prediction.predict import NOT_FINITE, Ensemble, columns, formula, pick_device
from cluster.prediction.seen import Seen
from cluster.run.storage import is_remote, local_folder
from crystalformer.artifact import CONFIG, WEIGHTS, batch_ends
from crystalformer.config import Neighborhood
from data_pipeline.crystal import structure_columns
from data_pipeline.schema import FIXED_COLUMNS, STRUCTURE_COLUMNS
from data_pipeline.steps.ray_data import blocks_of, quiet_ray_data
from data_pipeline.steps.store import rows_in, write_atomically, written_whole
from data_pipeline.table import StructureTable
from data_pipeline.text import printable

ROWS_AT_ONCE = 256
"""Structures that a task hands on together: some 7 MB with the shells of the default model."""

ATOMS_AT_ONCE = 4096
"""A task hands on no more once it holds so many atoms: some 26 MB with the shells of the default model."""

MEMORY = 2**30
"""Bytes of structures and shells that may wait for the actors."""

TASK_CPUS = 0.9
ACTOR_CPUS = 0.1
"""What Ray reserves. Tasks are most of the work on CPUs, and an actor's threads take what they leave."""

CPUS_AN_ACTOR = 4
"""Where there are no GPUs, actors are one to so many CPUs."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Screening:
    """What is to be predicted with what, and where it goes."""

    models: tuple[str, ...]
    pieces: tuple[Piece, ...]
    output: Path
    device: str
    batch_size: int | None = None

    @property
    def parts(self) -> Path:
        """The folder of shards."""
        return self.output.with_name(f"{self.output.name}.parts").resolve()

    @property
    def count(self) -> int:
        """Structures, a file counted as one."""
        return sum(piece.count for piece in self.pieces)


def predict_many(job: Screening, seen: Seen, header: Sequence[str], progress: Progress, *, resume: bool) -> list[int]:
    """Predict everything that has no shard yet and write the output; gives numbers of predictions and of problems.

    Problems are told on stderr. UserError where an earlier command's shards are in the way or belong to other inputs,
    or another command is at work on them.
    """
    from cluster.session import ray_session

    with claimed(job.output):
        _take_over(job, _plan(job, header), resume=resume)
        missing = _unfinished(job)
        done = sum(piece.count for number, piece in enumerate(job.pieces) if number not in missing)
        progress("structures", done, job.count)
        if missing:
            with ray_session(), closing(_run(job, seen, missing)) as written:
                for rows in written:
                    done += rows
                    progress("structures", min(done, job.count), job.count)
        if left := _unfinished(job):
            raise RuntimeError(f"Ray Data returned without {len(left)} of {len(job.pieces)} pieces")
        counts = _merge(job, header)
        shutil.rmtree(job.parts)
    return counts


# Plan and shards ----------------------------------------------------------------------------------------------------


def _plan(job: Screening, header: Sequence[str]) -> dict[str, Any]:
    """What identifies the work: a shard of another plan must not be taken for one of this."""
    digest = hashlib.sha256(version("crystalformer").encode())
    for location in job.models:
        with local_folder(location) as folder:
            for name in (CONFIG, WEIGHTS):
                digest.update((folder / name).read_bytes())
    for piece in job.pieces:
        digest.update(json.dumps(asdict(piece)).encode())
        digest.update(repr([_state(Path(path)) for path in piece.paths]).encode())
    return {"columns": list(header), "pieces": len(job.pieces), "digest": digest.hexdigest()}


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file; zeros where it is not there."""
    status = path.stat() if path.exists() else None
    return (0, 0) if status is None else (status.st_size, status.st_mtime_ns)


def _take_over(job: Screening, plan: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of shards, or find that of an earlier command with the same plan."""
    file = job.parts / "plan.json"
    if file.is_file():
        if not resume:
            raise UserError(f"{job.parts} holds what an earlier command finished; go on with --resume, or delete it")
        if _read_plan(file) != plan:
            raise UserError(f"{job.parts} belongs to other inputs or another model; delete it or change --output")
        return
    try:
        job.parts.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as partial:
            partial.write_text(json.dumps(plan), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output {job.output}: {error.strerror or error}") from error


def _read_plan(file: Path) -> Any:  # noqa: ANN401 - whatever the JSON holds
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: delete {file.parent}, and all is predicted again") from error


def _shards(job: Screening) -> dict[int, list[Path]]:
    """The shards of every piece, in order."""
    found: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(job.parts.glob("*.parquet")):
        found[int(path.name.split("-")[0])].append(path)
    return found


def _unfinished(job: Screening) -> set[int]:
    """Pieces whose shards are not all there and whole; what there is of them is deleted."""
    shards = _shards(job)
    missing = set()
    for number in range(len(job.pieces)):
        row, ended, whole = 0, False, True
        for path in shards[number]:
            _, first, count, last = path.stem.split("-")
            ended = int(first) == row and last == "last"
            whole = whole and rows_in(path) == int(count)
            row += int(count)
        if not (ended and whole):
            missing.add(number)
            for path in shards[number]:
                path.unlink()
    return missing


def _merge(job: Screening, header: Sequence[str]) -> list[int]:
    """The output from all shards; predictions and problems in it."""
    counts = [0, 0]
    shards = _shards(job)
    with TableFile(job.output, header) as file:
        for number in range(len(job.pieces)):
            for path in shards[number]:
                table = pq.read_table(path)
                good = table.filter(table.column("problem").is_null())
                bad = table.filter(table.column("problem").is_valid())
                file.add(list(zip(*(good.column(name).to_pylist() for name in header), strict=True)))
                for row in bad.to_pylist():
                    sys.stderr.write(printable(f"{row['where']}: {row['problem']}") + "\n")
                counts = [counts[0] + len(good), counts[1] + len(bad)]
    return counts


# On the cluster -----------------------------------------------------------------------------------------------------


def _run(job: Screening, seen: Seen, missing: set[int]) -> Generator[int, None, None]:
    """Work off pieces; gives the rows of each shard as it is written."""
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, ExecutionResources

    quiet_ray_data()
    share = shared_out(job.device, ray.cluster_resources())
    work = [{"number": number, "piece": json.dumps(asdict(job.pieces[number]))} for number in sorted(missing)]
    data = ray.data.from_items(work, override_num_blocks=len(work))
    data.context.enable_progress_bars = False
    data.context.execution_options.resource_limits = ExecutionResources(object_store_memory=MEMORY)
    neighborhoods = Ensemble(job.models, torch.device("cpu")).neighborhoods
    models = [location if is_remote(location) else str(Path(location).resolve()) for location in job.models]
    listed = data.map_batches(
        _prepare,
        fn_kwargs={"seen": seen, "neighborhoods": neighborhoods, "here": os.getcwd()},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=share.task_cpus,
    )
    written = listed.map_batches(
        _Predict,
        fn_constructor_args=(models, job.parts, job.device, job.batch_size, share.threads),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(size=share.actors) if share.actors else ActorPoolStrategy(min_size=1),
        num_cpus=share.actor_cpus,
        num_gpus=share.gpus,
    )
    with closing(blocks_of(written)) as blocks:
        for block in blocks:
            yield sum(block.column("rows").to_pylist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What is whose: actors, None for as many as the autoscaler adds, their threads, what Ray reserves for them."""

    actors: int | None
    threads: int
    gpus: int
    actor_cpus: float
    task_cpus: float


def shared_out(device: str, total: Mapping[str, float]) -> Share:
    """Of ``ray.cluster_resources()``. UserError where a GPU is asked for and none is there or may come."""
    from cluster.session import autoscaled, require_told

    if autoscaled():
        require_told(device=device)
        if device == "cuda":
            return Share(actors=None, threads=1, gpus=1, actor_cpus=ACTOR_CPUS, task_cpus=TASK_CPUS)
        threads = CPUS_AN_ACTOR // 2
        return Share(actors=None, threads=threads, gpus=0, actor_cpus=threads, task_cpus=TASK_CPUS)
    gpus = int(total.get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise UserError("device is cuda, but the cluster has no GPU; use auto or cpu")
    cpus = max(1, int(total.get("CPU", 1)))
    actors = gpus or max(1, cpus // CPUS_AN_ACTOR)
    return Share(
        actors=actors,
        threads=max(1, cpus // actors // 2),
        gpus=1 if gpus else 0,
        actor_cpus=ACTOR_CPUS,
        task_cpus=min(TASK_CPUS, cpus - ACTOR_CPUS * actors),
    )


def _prepare(pieces: pa.Table, *, seen: Seen, neighborhoods: Sequence[Neighborhood], here: str) -> Iterator[pa.Table]:
    """The structures of pieces with what the model needs of them, some at once; the last of a piece says so.

    here: the folder where relative paths begin, the command's.
    """
    for task in pieces.to_pylist():
        fields = json.loads(task["piece"])
        found = read_piece(Piece(**{**fields, "paths": tuple(fields["paths"])}))
        row, some = 0, _next_from(found, here)
        while some:
            following = _next_from(found, here)
            # Every row has its place: Ray cuts blocks that are large, and joins others.
            place = {
                "number": [task["number"]] * len(some),
                "row": range(row, row + len(some)),
                "last": [False] * (len(some) - 1) + [not following],
            }
            yield _listed(some, place, seen, neighborhoods)
            row += len(some)
            some = following


def _next_from(found: Iterator[Found], here: str) -> list[Found]:
    some: list[Found] = []
    atoms = 0
    with chdir(here):
        for one in islice(found, ROWS_AT_ONCE):
            some.append(one)
            atoms += 0 if one.crystal is None else len(one.crystal.atomic_numbers)
            if atoms >= ATOMS_AT_ONCE:
                break
    return some


def _listed(
    found: Sequence[Found], place: Mapping[str, Sequence[int]], seen: Seen, neighborhoods: Sequence[Neighborhood]
) -> pa.Table:
    """A row a structure: its place, what is said of it, its arrays and shells, null where there is a problem."""
    crystals = [one.crystal for one in found if one.crystal is not None]
    good = np.cumsum([one.crystal is not None for one in found]) - 1
    taken = [int(i) if one.crystal is not None else None for i, one in zip(good, found, strict=True)]
    rows = pa.array(taken, pa.int64())
    said = {
        **{name: pa.array(values) for name, values in place.items()},
        "id": [one.id for one in found],
        "where": [one.where for one in found],
        "problem": pa.array([one.problem for one in found], pa.string()),
        "formula": pa.array([one.crystal and formula(one.crystal) for one in found], pa.string()),
        "warning": pa.array([one.crystal and seen.warning(one.crystal) for one in found], pa.string()),
    }
    names = [name for name, _ in STRUCTURE_COLUMNS]
    arrays = pa.Table.from_arrays(structure_columns(crystals), names=names)
    structures = arrays.append_column("material_id", pa.nulls(len(arrays), pa.string()))
    for i, around in enumerate(neighborhoods):
        shells = find_table_shells(structures, around=around) if crystals else SCHEMA.empty_table()
        for name in SCHEMA.names:
            arrays = arrays.append_column(f"{name} {i}", shells.column(name))
    table = pa.table(said)
    for name, column in zip(arrays.column_names, arrays.take(rows).columns, strict=True):
        table = table.append_column(name, column)
    return table


class _Predict:
    """An actor with its own copy of the models."""

    def __init__(self, models: Sequence[str], parts: Path, device: str, batch_size: int | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._parts, self._batch_size = parts, batch_size
        self._models = Ensemble(models, pick_device(device))
        self._neighborhoods = self._models.neighborhoods

    def __call__(self, block: pa.Table) -> pa.Table:
        """Predict the rows of a block and write a shard for each run of rows that follow each other in a piece."""
        starts = [0, *(np.flatnonzero(np.diff(_place(block)) != 1) + 1).tolist(), len(block)]
        written = [self._shard(block.slice(a, b - a).combine_chunks()) for a, b in pairwise(starts) if b > a]
        return pa.table({"rows": pa.array(written, pa.int64())})

    def _shard(self, rows: pa.Table) -> int:
        number, first = rows.column("number")[0].as_py(), rows.column("row")[0].as_py()
        last = "last" if rows.column("last")[-1].as_py() else "more"
        said = rows.select(["id", "where", "problem", "formula"])
        valid = rows.column("problem").is_null()
        names = self._models.header[2:-1]
        values = np.full((len(rows), len(names)), np.nan)
        values[valid.to_numpy()] = self._predicted(rows.filter(valid).combine_chunks(), len(names))
        means = values[:, :: len(names) // len(self._models.targets)]
        told = zip(rows.column("warning").to_pylist(), np.isfinite(means).all(1) | ~valid.to_numpy(), strict=True)
        warnings = [warning if good else NOT_FINITE for warning, good in told]
        said = said.append_column("warning", pa.array(warnings, pa.string()))
        for i, name in enumerate(names):
            said = said.append_column(name, pa.array(values[:, i]))
        path = self._parts / f"{number:08d}-{first:010d}-{len(rows)}-{last}.parquet"
        write_atomically(said, path)
        return len(rows)

    def _predicted(self, rows: pa.Table, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(n, width) numbers of the header for rows without problem."""
        if not len(rows):
            return np.zeros((0, width))
        ids = pa.nulls(len(rows), pa.string())
        fixed = {name: rows.column(name) if name != "material_id" else ids for name, _ in FIXED_COLUMNS}
        structures = StructureTable.from_arrow(pa.table(fixed))
        shells = [self._shells(rows, i) for i in range(len(self._neighborhoods))]
        work = shells[-1].costs if shells else structures.sizes**2
        parts = []
        for start, end in pairwise([0, *batch_ends(work.tolist(), self._batch_size)]):
            chosen = np.arange(start, end)
            batch = batch_of_packed(structures.gather(chosen))
            for one in shells:
                one.attach(batch, chosen)
            parts.append(columns(*self._models.predict_batch(batch)))
        return np.concatenate(parts)

    def _shells(self, rows: pa.Table, i: int) -> ShellTable:
        named = {name: rows.column(f"{name} {i}") for name in SCHEMA.names}
        return ShellTable(pa.table(named), self._neighborhoods[i].radius)


def _place(block: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(rows,) one number for each row of each piece, the next row's the next."""
    number, row = (block.column(name).to_numpy() for name in ("number", "row"))
    return np.asarray(number * (1 << 32) + row, dtype=np.int64)
