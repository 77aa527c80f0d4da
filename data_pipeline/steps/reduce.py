"""Reduction to the primitive cell.

A primitive crystal keeps its own atoms and lattice, bit for bit. Of any other one, the lattice becomes the primitive
one that moyopy finds, expressed exactly in the crystal's own lattice vectors, and of every class of atoms that differ
by a translation the first is kept where it is. Nothing is symmetrized and nothing rotated, so that distances stay the
published ones; of a left-handed lattice two vectors are exchanged, which leaves crystal and positions as they are.
Disordered sites take part: two of them are alike if they hold the same species with the same
occupancies.

Two exact tests come first because they are many times cheaper than the symmetry search. The translations that map a
crystal onto itself move every atom, so their number divides the count of each species: if these counts have no common
divisor the cell is primitive. And one of them must map an atom of the rarest species onto another: if none of those
few displacements maps every atom to within a generous tolerance, the cell is primitive too.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np

from data_pipeline.crystal import Crystal, Disorder, Floats, Ints, to_cartesian

SYMPREC = 0.01
"""Å; atoms this close to a translated atom count as mapped on it. pymatgen's SpacegroupAnalyzer has the same."""
_LOOSE = 5 * SYMPREC
_FILTER_LIMIT = 200_000
_FIRST_DISORDERED_TYPE = 1000

# It warns of symmetry operations left out for supercells; only its cell and atom mapping are used here.
logging.getLogger("moyo").setLevel(logging.ERROR)


class ReductionError(ValueError):
    """The symmetry search failed; the text says for which cell."""


def primitive_cell(crystal: Crystal) -> Crystal:
    """The crystal in its primitive, right-handed cell; the same object if it is in it already.

    Raises ReductionError.
    """
    if np.linalg.det(crystal.lattice) < 0:
        crystal = replace(crystal, lattice=crystal.lattice[[1, 0, 2]])
    types = site_types(crystal)
    counts = np.unique(types, return_counts=True)[1]
    if math.gcd(*counts.tolist()) == 1:
        return crystal
    fractional = crystal.fractional()
    if not may_have_translation(fractional, types, crystal.lattice):
        return crystal
    return _reduce(crystal, fractional, types)


def site_types(crystal: Crystal) -> Ints:
    """(n,) a number a site: the atomic number, or 1000 and up for every distinct mixture of species."""
    if crystal.disorder is None:
        return crystal.atomic_numbers
    types = crystal.atomic_numbers.copy()
    known: dict[tuple[tuple[int, float], ...], int] = {}
    d = crystal.disorder
    for site in np.unique(d.site):
        here = d.site == site
        mixture = tuple(sorted(zip(d.atomic_number[here].tolist(), d.occupancy[here].tolist(), strict=True)))
        types[site] = known.setdefault(mixture, _FIRST_DISORDERED_TYPE + len(known))
    return types


def may_have_translation(fractional: Floats, types: Ints, lattice: Floats) -> bool:
    """False only if no translation inside the cell maps the crystal onto itself within the tolerance."""
    values, counts = np.unique(types, return_counts=True)
    rarest = np.flatnonzero(types == values[np.argmin(counts)])
    heights = 1 / np.sqrt((np.linalg.inv(lattice) ** 2).sum(axis=0))
    if (len(rarest) - 1) * len(types) ** 2 > _FILTER_LIMIT or heights.min() < 2 * _LOOSE:
        return True
    shifts = fractional[rarest[1:]] - fractional[rarest[0]]
    delta = shifts[:, None, None] + fractional[None, :, None] - fractional[None, None, :]
    delta -= np.rint(delta)
    cartesian = delta @ lattice
    near = np.einsum("sijk,sijk->sij", cartesian, cartesian) < _LOOSE**2
    near &= types[:, None] == types[None]
    return bool(near.any(axis=2).all(axis=1).any())


def _reduce(crystal: Crystal, fractional: Floats, types: Ints) -> Crystal:
    import moyopy

    cell = moyopy.Cell(crystal.lattice.tolist(), fractional.tolist(), types.tolist())
    try:
        found = moyopy.MoyoDataset(cell, symprec=SYMPREC)
    except ValueError as error:
        raise ReductionError(f"cell reduction failed: {error}") from error
    classes, kept = np.unique(np.asarray(found.mapping_std_prim), return_index=True)
    if len(classes) == len(types):
        return crystal
    linear = np.asarray(found.prim_std_linear)
    if abs(abs(np.linalg.det(linear)) * len(types) - len(classes)) > 1e-6:
        raise ReductionError(
            f"cell reduction failed: {len(types)} atoms became {len(classes)} in a cell of "
            f"{abs(np.linalg.det(linear)):.4g} of the volume"
        )
    kept = np.sort(kept)
    lattice = to_cartesian(linear.T, crystal.lattice)
    inside = crystal.positions[kept] @ np.linalg.inv(lattice)
    return Crystal(
        positions=crystal.positions[kept] - to_cartesian(np.floor(inside + 1e-9), lattice),
        atomic_numbers=crystal.atomic_numbers[kept],
        lattice=lattice,
        disorder=_kept_disorder(crystal.disorder, kept),
    )


def _kept_disorder(disorder: Disorder | None, kept: Ints) -> Disorder | None:
    if disorder is None:
        return None
    here = np.isin(disorder.site, kept)
    return replace(
        disorder,
        site=np.searchsorted(kept, disorder.site[here]),
        atomic_number=disorder.atomic_number[here],
        occupancy=disorder.occupancy[here],
    )
