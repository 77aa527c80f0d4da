"""Rebuild the tables of data_pipeline/embedded from the package that published the data.

    pip download --no-deps --no-binary :all: matminer==0.4.0
    python -m data_pipeline.embedded_build matminer-0.4.0.tar.gz data_pipeline/embedded

The structures are kept as published, all usable rows in file order, in one Parquet file a set; the same input gives
the same bytes. A row that is left out is printed and listed in the file's metadata.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import math
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.crystal import Crystal, structure_columns, to_cartesian
from data_pipeline.datasets import embedded_names, find_dataset
from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo
from data_pipeline.prepared import RejectedRow
from data_pipeline.schema import structure_schema
from data_pipeline.validate import parse_target, structure_problem

SDIST_SHA256 = "1a6bdfb198b36d836bab4fbcdffb2dc4fda8a740c3dc08cbb21ea43b817fec86"
REJECTED_KEY = "crystalformer.rejected"
_FOLDER = PurePosixPath("matminer/datasets")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """How one CSV file is read: its name, the structure's column and parser, the rule from a field to a target."""

    file: str
    structure: str
    parse: Callable[[str], Crystal]
    convert: Callable[[float], float] = float


def parse_poscar(text: str) -> Crystal:
    """A crystal from the text of a POSCAR file."""
    from pymatgen.io.vasp.inputs import Poscar

    structure = Poscar.from_str(text).structure
    lattice = np.asarray(structure.lattice.matrix, dtype=np.float64)
    return Crystal(
        positions=to_cartesian(structure.frac_coords, lattice),
        atomic_numbers=np.array(structure.atomic_numbers, dtype=np.int64),
        lattice=lattice,
    )


def parse_literal(text: str) -> Crystal:
    """A crystal from the Python literal of a pymatgen dictionary with fully occupied sites."""
    from pymatgen.core.periodic_table import Element

    raw = ast.literal_eval(text)
    numbers = []
    for site in raw["sites"]:
        (species,) = site["species"]
        if species["occu"] != 1:
            raise ValueError(f"occupancy {species['occu']} is not 1")
        numbers.append(Element(species["element"]).Z)
    lattice = np.array(raw["lattice"]["matrix"], dtype=np.float64)
    fractional = np.array([site["abc"] for site in raw["sites"]], dtype=np.float64)
    return Crystal(
        positions=to_cartesian(fractional, lattice), atomic_numbers=np.array(numbers, dtype=np.int64), lattice=lattice
    )


def log10_gpa(value: float) -> float:
    """Decimal logarithm of a modulus in GPa. Raises ValueError unless it is above 0."""
    if value <= 0:
        raise ValueError(f"modulus {value} GPa is not above 0")
    return math.log10(value)


PUBLISHED: Mapping[str, PublishedFile] = {
    "elastic_tensor_2015": PublishedFile(
        file="elastic_tensor.csv", structure="poscar", parse=parse_poscar, convert=log10_gpa
    ),
    "flla_2015": PublishedFile(file="flla_2015.csv", structure="structure", parse=parse_literal),
    "dielectric_2017": PublishedFile(file="dielectric_constant.csv", structure="poscar", parse=parse_poscar),
}


def read_rows(text: str, where: str) -> Iterator[dict[str, str]]:
    """The rows of one published CSV file, by column.

    Its first line is a comment with the reference. Two of the files have an index before the first named column, so
    that every row holds one field more than the header: it is left out. Raises DataError on any other count.
    """
    csv.field_size_limit(1 << 30)
    stream = io.StringIO(text, newline="")
    if not stream.readline().startswith("#"):
        raise DataError(f"{where}: line 1 is not the comment with the reference")
    reader = csv.reader(stream)
    header = next(reader)
    for number, row in enumerate(reader):
        if len(row) - len(header) not in (0, 1):
            raise DataError(f"{where}: row {number} has {len(row)} fields, the header {len(header)}")
        yield dict(zip(header, row[len(row) - len(header) :], strict=True))


def build_table(info: DatasetInfo, text: str) -> tuple[pa.Table, list[RejectedRow]]:
    """The structure table of one set from the text of its CSV file, and the rows left out."""
    published = PUBLISHED[info.name]
    ids: list[str] = []
    crystals: list[Crystal] = []
    values: list[list[float]] = []
    rejected: list[RejectedRow] = []
    for number, row in enumerate(read_rows(text, published.file)):
        try:
            if row["material_id"] in ids:
                raise ValueError(f"duplicate material_id {row['material_id']!r}")
            crystal, targets = _read_row(info, published, row)
        except ValueError as error:
            rejected.append(
                RejectedRow(file=published.file, row=number, material_id=row["material_id"], reason=str(error))
            )
            continue
        ids.append(row["material_id"])
        crystals.append(crystal)
        values.append(targets)
    metadata = {
        "crystalformer.dataset": info.name,
        "crystalformer.source": info.source,
        "crystalformer.citation": info.citation,
        "crystalformer.licence": info.licence,
        REJECTED_KEY: json.dumps([asdict(row) for row in rejected]),
    }
    columns = [pa.array(ids, pa.string()), *structure_columns(crystals)]
    columns += [pa.array(column, pa.float64()) for column in zip(*values, strict=True)]
    return pa.Table.from_arrays(columns, schema=structure_schema(info.targets, metadata)), rejected


def write_table(table: pa.Table, path: Path) -> None:
    """Write with the settings that make the shipped bytes."""
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=False, row_group_size=1 << 16
    )


def main(arguments: list[str]) -> int:
    """``SDIST_OR_FOLDER OUT``: write the three tables and print rows, rejected rows and digests."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m data_pipeline.embedded_build SDIST_OR_FOLDER OUT\n")
        return 2
    source, out = Path(arguments[0]), Path(arguments[1])
    out.mkdir(parents=True, exist_ok=True)
    for name in embedded_names():
        table, rejected = build_table(find_dataset(name), _read_file(source, PUBLISHED[name].file))
        path = out / f"{name}.parquet"
        write_table(table, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sys.stdout.write(f"{name}: {len(table)} rows, {len(rejected)} rejected, sha256 {digest}\n")
        for row in rejected:
            sys.stdout.write(f"  {row.file} row {row.row} {row.material_id}: {row.reason}\n")
    return 0


def _read_row(info: DatasetInfo, published: PublishedFile, row: dict[str, str]) -> tuple[Crystal, list[float]]:
    """Raises ValueError with the reason if the row cannot be used."""
    targets = []
    for target in info.targets:
        value = parse_target(row[target.column])
        if value is None:
            raise ValueError(f"target {target.name} is missing: {target.column} is {row[target.column]!r}")
        targets.append(published.convert(value))
    try:
        crystal = published.parse(row[published.structure])
    except (ValueError, SyntaxError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"unreadable {published.structure}: {error!r}") from error
    if len(crystal.atomic_numbers) != int(row["nsites"]):
        raise ValueError(f"{len(crystal.atomic_numbers)} sites, but nsites is {row['nsites']}")
    problem = structure_problem(crystal)
    if problem is not None:
        raise ValueError(problem)
    return crystal, targets


def _read_file(source: Path, name: str) -> str:
    """The text of matminer/datasets/``name`` in a source distribution, its unpacked folder or that folder itself."""
    if source.is_dir():
        for path in (source / name, source / _FOLDER / name):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        raise DataError(f"{source}: neither {name} nor {_FOLDER / name} is in it")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise DataError(f"{source}: sha256 is {digest}, not {SDIST_SHA256} of matminer 0.4.0's source distribution")
    with tarfile.open(source) as archive:
        for member in archive:
            if PurePosixPath(member.name).parts[1:] == (*_FOLDER.parts, name):
                content = archive.extractfile(member)
                if content is not None:
                    return content.read().decode("utf-8")
    raise DataError(f"{source}: {_FOLDER / name} is not in it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
