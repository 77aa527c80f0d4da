"""Cubic cells by all their sites: those of a space group take pymatgen most of a second to work out, every time."""

from collections.abc import Sequence

from pymatgen.core import Lattice, Structure

Site = tuple[str, Sequence[float]]

FACES = ((0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
"""The lattice points of a face-centred cubic cell, in fractions of its edges."""

ROCK_SALT: tuple[Site, ...] = (("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5)))


def face_centred(a: float, sites: Sequence[Site]) -> Structure:
    """The cubic cell with an edge of ``a`` Å; of sites (element, fractions of its edges) at one lattice point."""
    whole = [(element, [x + dx for x, dx in zip(at, face, strict=True)]) for element, at in sites for face in FACES]
    return simple(a, whole)


def simple(a: float, sites: Sequence[Site]) -> Structure:
    """A cubic cell with an edge of ``a`` Å and just these sites (element, fractions of the edges)."""
    elements, places = zip(*sites, strict=True)
    return Structure(Lattice.cubic(a), list(elements), list(places), to_unit_cell=True)
