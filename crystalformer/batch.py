"""CrystalBatch: several crystals packed one after another, without padding.

Legend of shapes used all over this package
    B crystals · N atoms of all crystals · S shells (see neighbors.py) · H heads · D features a head · K radial bases
Units: lengths Å, atomic numbers 1..98 (0 marks a disordered site), occupancies 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crystalformer.config import MAX_ATOMIC_NUMBER
from crystalformer.equivalence import Rows, distinct_atoms, kinds
from crystalformer.neighbors import Shells, find_shells

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

lasting = torch.inference_mode(mode=False)
"""Decorates what makes tensors that a batch keeps: those made under inference_mode could never be trained with."""


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; from the CPU to a GPU by way of pinned memory, without waiting for the GPU's work."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Derived(dict[Any, Any]):
    """What backends derive from a batch, in this process: copies and pickles begin with none of it."""

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Disorder:
    """The species of disordered sites; a site's atomic number in the batch is then 0.

    atom (X,) index of the site in the packed atoms; atomic_number (X,) 1..98; occupancy (X,) in (0, 1].
    """

    atom: Tensor
    atomic_number: Tensor
    occupancy: Tensor

    def to(self, device: torch.device) -> Disorder:
        """The same on another device."""
        return Disorder(
            atom=moved(self.atom, device),
            atomic_number=moved(self.atomic_number, device),
            occupancy=moved(self.occupancy, device),
        )

    def of(self, atoms: Tensor) -> Disorder | None:
        """The species of some of the packed atoms (R,), ascending, renumbered; None where all of them are ordered."""
        place = torch.searchsorted(atoms, self.atom).clamp_max_(len(atoms) - 1)
        here = atoms[place] == self.atom
        if not bool(here.any()):
            return None
        return Disorder(atom=place[here], atomic_number=self.atomic_number[here], occupancy=self.occupancy[here])


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShells:
    """The shells of every crystal of a batch, packed like its atoms (neighbors.Shells, atoms renumbered).

    radius: Å. ptr (N+1,) int64; neighbor (S,) int64 index of the packed atoms; distance (S,) float64 Å;
    count (S,) int64. ``cache`` keeps what an attention backend derives from the list (block plans, radial features),
    so that every layer shares it.
    """

    radius: float
    ptr: Tensor
    neighbor: Tensor
    distance: Tensor
    count: Tensor
    cache: Derived = field(default_factory=Derived, init=False, repr=False, compare=False)

    @classmethod
    def pack(cls, shells: Sequence[Shells], sizes: Sequence[int], radius: float) -> PackedShells:
        """Join the lists of single crystals of ``sizes`` atoms."""
        starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        rows = np.array([len(s.neighbor) for s in shells])
        row_starts = np.concatenate([[0], np.cumsum(rows)])
        ptr = [s.ptr[:-1] + start for s, start in zip(shells, row_starts, strict=False)]
        neighbor = np.concatenate([s.neighbor for s in shells]) + np.repeat(starts, rows)
        return cls(
            radius=radius,
            ptr=torch.from_numpy(np.concatenate([*ptr, row_starts[-1:]]).astype(np.int64)),
            neighbor=torch.from_numpy(neighbor.astype(np.int64)),
            distance=torch.from_numpy(np.concatenate([s.distance for s in shells])),
            count=torch.from_numpy(np.concatenate([s.count for s in shells]).astype(np.int64)),
        )

    def to(self, device: torch.device) -> PackedShells:
        """The same list on another device, with an empty cache."""
        return replace(
            self,
            ptr=moved(self.ptr, device),
            neighbor=moved(self.neighbor, device),
            distance=moved(self.distance, device),
            count=moved(self.count, device),
        )

    @classmethod
    def of_rows(cls, rows: Rows, radius: float) -> PackedShells:
        """From NumPy's arrays, which are kept."""
        ptr, neighbor, distance, count = map(torch.from_numpy, rows)
        return cls(radius=radius, ptr=ptr, neighbor=neighbor, distance=distance, count=count)

    @property
    def rows(self) -> Rows:
        """The list as NumPy's, on the CPU."""
        return Rows(*(t.cpu().numpy() for t in (self.ptr, self.neighbor, self.distance, self.count)))


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:  # noqa: ANN401 - anything torch.as_tensor reads
    return torch.as_tensor(values if isinstance(values, Tensor) else np.array(values), dtype=dtype)


def _whole(values: Any, name: str) -> Tensor:  # noqa: ANN401 - anything torch.as_tensor reads
    found = torch.as_tensor(values if isinstance(values, Tensor) else np.array(values))
    whole = found.to(torch.int64)
    if found.is_floating_point() and not torch.equal(whole.to(found.dtype), found):
        raise ValueError(f"{name} must be whole numbers, got {found.tolist()}")
    return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class CrystalBatch:
    """B crystals with N atoms in all.

    positions (N, 3) float64 Cartesian Å; atomic_numbers (N,) int64, 0 for a disordered site; lattice (B, 3, 3)
    float64, rows Å; sizes (B,) int64 atoms of each crystal. Geometry stays float64 whatever the model's dtype.
    multiplicity (N,) int64: how many equivalent atoms of its cell each atom stands for, the others being left out
    (``distinct``); None where all atoms are there.
    ``cache`` keeps what an attention backend derives from the cells (wave vectors and phases), for all layers.
    """

    positions: Tensor
    atomic_numbers: Tensor
    lattice: Tensor
    sizes: Tensor
    disorder: Disorder | None = None
    multiplicity: Tensor | None = None
    cache: Derived = field(default_factory=Derived, init=False, repr=False, compare=False)
    _shells: dict[float, PackedShells] = field(default_factory=dict, init=False, repr=False, compare=False)
    _distinct: dict[float, CrystalBatch] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    @lasting
    def from_arrays(
        cls,
        positions: Any,  # noqa: ANN401 - anything torch.as_tensor reads
        atomic_numbers: Any,  # noqa: ANN401
        lattice: Any,  # noqa: ANN401
        sizes: Any,  # noqa: ANN401
        disorder: Disorder | None = None,
    ) -> CrystalBatch:
        """A batch from arrays or tensors of the shapes above; ValueError says which of them does not fit.

        Atomic numbers and sizes that are not whole numbers are refused.

        Arrays are copied: what is done to them later does not reach the batch. Tensors of the dtypes above are not.
        """
        batch = cls(
            positions=_tensor(positions, torch.float64),
            atomic_numbers=_whole(atomic_numbers, "atomic_numbers"),
            lattice=_tensor(lattice, torch.float64),
            sizes=_whole(sizes, "sizes"),
            disorder=disorder,
        )
        batch._check()
        return batch

    @classmethod
    def from_structures(cls, structures: Iterable[Structure]) -> CrystalBatch:
        """A batch of pymatgen Structures, ordered or disordered."""
        crystals = [structure for structure in structures]
        if not crystals:
            raise ValueError("structures must hold at least one crystal, got none")
        sites = [site for crystal in crystals for site in crystal]
        species = [[(int(element.Z), float(part)) for element, part in site.species.items()] for site in sites]
        ordered = [len(parts) == 1 and parts[0][1] == 1.0 for parts in species]
        mixed = [(a, z, part) for a, parts in enumerate(species) if not ordered[a] for z, part in parts]
        disorder = None
        if mixed:
            atom, number, part = (list(column) for column in zip(*mixed, strict=True))
            disorder = Disorder(
                atom=torch.tensor(atom),
                atomic_number=torch.tensor(number),
                occupancy=torch.tensor(part, dtype=torch.float64),
            )
        return cls.from_arrays(
            np.concatenate([crystal.cart_coords for crystal in crystals]),
            [parts[0][0] if whole else 0 for parts, whole in zip(species, ordered, strict=True)],
            np.stack([crystal.lattice.matrix for crystal in crystals]),
            [len(crystal) for crystal in crystals],
            disorder,
        )

    def _check(self) -> None:
        n, b = self.atomic_numbers.numel(), self.sizes.numel()
        expected = {"atomic_numbers": (n,), "sizes": (b,), "positions": (n, 3), "lattice": (b, 3, 3)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(getattr(self, name).shape)}")
        if b == 0 or int(self.sizes.min()) < 1 or int(self.sizes.sum()) != n:
            raise ValueError(f"sizes must be at least 1 each and sum to the {n} atoms, got {self.sizes.tolist()}")
        for name in ("positions", "lattice"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{name} must be finite numbers")
        lowest = 1 if self.disorder is None else 0
        if n and not lowest <= int(self.atomic_numbers.min()) <= int(self.atomic_numbers.max()) <= MAX_ATOMIC_NUMBER:
            raise ValueError(
                f"atomic_numbers must be between {lowest} and {MAX_ATOMIC_NUMBER} (H to Cf), got "
                f"{int(self.atomic_numbers.min())} to {int(self.atomic_numbers.max())}"
            )
        if self.disorder is not None:
            self._check_disorder(self.disorder, n)

    def _check_disorder(self, disorder: Disorder, n: int) -> None:
        atom, number, occupancy = disorder.atom, disorder.atomic_number, disorder.occupancy
        if not atom.shape == number.shape == occupancy.shape == (len(atom),):
            shapes = [tuple(t.shape) for t in (atom, number, occupancy)]
            raise ValueError(f"disorder must hold three lists of one length, got the shapes {shapes}")
        if len(atom) == 0 or int(atom.min()) < 0 or int(atom.max()) >= n:
            raise ValueError(f"disorder.atom must hold indices of the {n} atoms")
        if int(number.min()) < 1 or int(number.max()) > MAX_ATOMIC_NUMBER:
            raise ValueError(f"disorder.atomic_number must be between 1 and {MAX_ATOMIC_NUMBER}")
        if not bool(((occupancy > 0) & (occupancy <= 1 + 1e-4)).all()):  # published ones are rounded
            raise ValueError(f"disorder.occupancy must be greater than 0 and at most 1, got {occupancy.tolist()}")
        has_species = torch.zeros(n, dtype=torch.bool).index_fill_(0, atom, value=True)
        if not torch.equal(has_species, self.atomic_numbers == 0):
            raise ValueError("disorder must list the species of exactly the atoms whose atomic number is 0")

    @property
    def num_atoms(self) -> int:
        """N."""
        return len(self.atomic_numbers)

    @property
    def num_crystals(self) -> int:
        """B."""
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.positions.device

    @property
    def crystal(self) -> Tensor:
        """(N,) int64: the crystal that each atom belongs to."""
        return torch.repeat_interleave(
            torch.arange(self.num_crystals, device=self.device), self.sizes, output_size=self.num_atoms
        )

    @lasting
    def to(self, device: torch.device | str) -> CrystalBatch:
        """The same batch on another device, shell lists included; itself where it lies there already."""
        device = torch.empty(0, device=device).device  # "cuda" with the number of the current one
        if device == self.device:
            return self
        there = CrystalBatch(
            positions=moved(self.positions, device),
            atomic_numbers=moved(self.atomic_numbers, device),
            lattice=moved(self.lattice, device),
            sizes=moved(self.sizes, device),
            disorder=None if self.disorder is None else self.disorder.to(device),
            multiplicity=None if self.multiplicity is None else moved(self.multiplicity, device),
        )
        there._shells.update((radius, shells.to(device)) for radius, shells in self._shells.items())
        there._distinct.update((radius, batch.to(device)) for radius, batch in self._distinct.items())
        return there

    def attach_shells(self, shells: PackedShells) -> None:
        """Hand over lists found beforehand (a training run finds each crystal's once)."""
        if len(shells.ptr) != self.num_atoms + 1:
            raise ValueError(f"shells must cover {self.num_atoms} atoms, got {len(shells.ptr) - 1}")
        self._shells[shells.radius] = shells

    def shells(self, radius: float) -> PackedShells:
        """The shells within ``radius`` (Å) or more, found on first use and kept with the batch."""
        known = self._known(radius)
        if known is not None:
            return known
        if self.multiplicity is not None:
            raise ValueError(f"shells within {radius:g} Å cannot be found of a batch's distinct atoms alone")
        self.attach_shells(self._found(radius).to(self.device))
        return self._shells[radius]

    def _known(self, radius: float) -> PackedShells | None:
        enough = [known for known in self._shells if known >= radius]
        return self._shells[min(enough)] if enough else None

    def distinct(self, radius: float) -> CrystalBatch:
        """The atoms that see different crystals (equivalence.py), with their shells within ``radius`` (Å) or more.

        Found on first use and kept with the batch; itself where it was made so.
        """
        if self.multiplicity is not None:
            return self
        enough = [known for known in self._distinct if known >= radius]
        if enough:
            return self._distinct[min(enough)]
        self._find_distinct(self._known(radius) or self._found(radius))
        return self._distinct[min(known for known in self._distinct if known >= radius)]

    def unmerged(self, radius: float) -> CrystalBatch:
        """All atoms, each standing for itself alone, with their shells within ``radius`` (Å) or more.

        A model computes every one of them, and gives the same in more time. ValueError where they are not all there.
        """
        if self.multiplicity is not None:
            raise ValueError("a batch of distinct atoms alone does not hold the others")
        shells = self.shells(radius)
        alone = replace(self, multiplicity=torch.ones_like(self.atomic_numbers))
        alone.attach_shells(shells)
        return alone

    @lasting
    def attach_distinct(self, atom: Tensor, multiplicity: Tensor, sizes: Tensor, shells: PackedShells) -> None:
        """Hand over distinct atoms found beforehand (equivalence.py), with their shells.

        atom (R,): of the packed atoms, ascending; multiplicity (R,); sizes (B,): distinct atoms of each crystal.
        """
        distinct = CrystalBatch(
            positions=self.positions[atom],
            atomic_numbers=self.atomic_numbers[atom],
            lattice=self.lattice,
            sizes=sizes,
            disorder=None if self.disorder is None else self.disorder.of(atom),
            multiplicity=multiplicity,
        )
        distinct.attach_shells(shells)
        self._distinct[shells.radius] = distinct

    @lasting
    def _find_distinct(self, shells: PackedShells) -> None:
        mixed = self.disorder
        species = () if mixed is None else (mixed.atom, mixed.atomic_number, mixed.occupancy)
        alike = kinds(*(t.cpu().numpy() for t in (self.atomic_numbers, *species)))
        found = distinct_atoms(self.sizes.cpu().numpy(), alike, shells.rows)
        atom, multiplicity, sizes = (
            moved(torch.from_numpy(v), self.device) for v in (found.atom, found.multiplicity, found.sizes)
        )
        self.attach_distinct(
            atom, multiplicity, sizes, PackedShells.of_rows(found.rows, shells.radius).to(self.device)
        )

    @lasting
    def _found(self, radius: float) -> PackedShells:
        """On the CPU."""
        sizes = self.sizes.tolist()
        positions = self.positions.cpu().numpy()
        lattice = self.lattice.cpu().numpy()
        ends = np.cumsum(sizes)
        found = [
            find_shells(positions[end - size : end], cell, radius)
            for size, end, cell in zip(sizes, ends, lattice, strict=True)
        ]
        return PackedShells.pack(found, sizes, radius)
