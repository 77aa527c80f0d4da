"""Small crystals the tests share."""

import numpy as np

from data_pipeline.crystal import Crystal, Disorder, to_cartesian
from data_pipeline.info import TargetInfo

HARDNESS = TargetInfo(name="hardness", unit="GPa", description="made up")


def crystal(lattice, fractional, numbers, disorder=None):
    rows = np.array(lattice, dtype=np.float64)
    return Crystal(
        positions=to_cartesian(np.array(fractional, dtype=np.float64), rows),
        atomic_numbers=np.array(numbers, dtype=np.int64),
        lattice=rows,
        disorder=disorder,
    )


def rock_salt(a=5.64, numbers=(11, 17)):
    """The conventional cell of NaCl: 8 atoms, 2 in the primitive one."""
    corners = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    return crystal(
        np.eye(3) * a, np.concatenate([corners, corners + [0.5, 0, 0]]), [numbers[0]] * 4 + [numbers[1]] * 4
    )


def mixed_rock_salt(a=5.64):
    """Rock salt whose first four sites are half Na, half K."""
    plain = rock_salt(a)
    numbers = plain.atomic_numbers.copy()
    numbers[:4] = 0
    disorder = Disorder(
        site=np.repeat(np.arange(4), 2), atomic_number=np.array([11, 19] * 4), occupancy=np.full(8, 0.5)
    )
    return Crystal(positions=plain.positions, atomic_numbers=numbers, lattice=plain.lattice, disorder=disorder)


def caesium_chloride(a=4.1, z=55):
    return crystal(np.eye(3) * a, [[0, 0, 0], [0.5, 0.5, 0.5]], [z, 17])
