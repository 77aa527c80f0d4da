"""Which pairs of atoms meet in a batch's shells: a score q_i k_j is the same for all shells of its pair.

Legend: N atoms, S shells, E pairs (i, j) with a shell, in the order of i and then of their nearest shells.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crystalformer.batch import PackedShells
from crystalformer.ops.handles import Handles
from crystalformer.ops.numba.simd import compiled

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class PairPlan:
    """Shells and their pairs, as the kernels read them.

    ptr (N+1,), distance (S,) Å: of the shells (batch.PackedShells). farness (S,): minus the squared distance, Å².
    images (S,): of the shell. pair (S,): the shell's pair among those of its atom.
    pair_ptr (N+1,): where an atom's pairs begin. key (E,): j. query (E,): i. nearest (E,): the pair's first shell
    among those of its atom.
    by_key (E,): the pairs in order of j, then i; by_key_ptr (N+1,): where those of an atom begin.
    features: of each radial basis (count, spacing and width in Å), as operands.Features keeps them.
    """

    ptr: IntArray
    distance: FloatArray
    farness: Floats
    images: Floats
    pair: Int32Array
    pair_ptr: IntArray
    key: Int32Array
    query: Int32Array
    nearest: Int32Array
    by_key_ptr: IntArray
    by_key: Int32Array
    features: dict[tuple[int, float, float], tuple[Floats, Int32Array, IntArray]] = field(default_factory=dict)

    @classmethod
    def of(cls, shells: PackedShells) -> PairPlan:
        """From the shells of a batch on the CPU."""
        ptr, neighbor, distance = shells.ptr.numpy(), shells.neighbor.numpy(), shells.distance.numpy()
        pair, pair_ptr = np.empty(len(neighbor), np.int32), np.zeros(len(ptr), np.int64)
        key, query, nearest = (np.empty(len(neighbor), np.int32) for _ in range(3))
        found = _join(ptr, neighbor, pair, pair_ptr, key, query, nearest)
        key, query, nearest = (values[:found].copy() for values in (key, query, nearest))
        by_key_ptr, by_key = np.zeros(len(ptr), np.int64), np.empty(found, np.int32)
        _transpose(key, by_key_ptr, by_key)
        return cls(
            ptr=ptr,
            distance=distance,
            farness=-np.square(distance, dtype=np.float32, casting="same_kind"),
            images=shells.count.numpy().astype(np.float32),
            pair=pair,
            pair_ptr=pair_ptr,
            key=key,
            query=query,
            nearest=nearest,
            by_key_ptr=by_key_ptr,
            by_key=by_key,
        )

    @property
    def num_pairs(self) -> int:
        """E."""
        return len(self.key)


PLANS: Handles[PairPlan] = Handles()


@compiled
def _join(
    ptr: IntArray,
    neighbor: IntArray,
    pair: Int32Array,
    pair_ptr: IntArray,
    key: Int32Array,
    query: Int32Array,
    nearest: Int32Array,
) -> int:
    """Fill all but the shells' own arrays, by the names of PairPlan; the number of pairs."""
    atoms = len(ptr) - 1
    seen = np.full(atoms, -1, np.int64)
    found = 0
    for i in range(atoms):
        first = found
        for shell in range(ptr[i], ptr[i + 1]):
            j = neighbor[shell]
            if seen[j] < first:
                seen[j] = found
                key[found], query[found], nearest[found] = j, i, shell - ptr[i]
                found += 1
            pair[shell] = seen[j] - first
        pair_ptr[i + 1] = found
    return found


@compiled
def _transpose(key: Int32Array, by_key_ptr: IntArray, by_key: Int32Array) -> None:
    """Fill ``by_key_ptr``, which holds zeros, and ``by_key``."""
    for j in key:
        by_key_ptr[j + 1] += 1
    atoms = len(by_key_ptr) - 1
    filled = np.empty(atoms, np.int64)
    for j in range(atoms):
        filled[j] = by_key_ptr[j]
        by_key_ptr[j + 1] += by_key_ptr[j]
    for e, j in enumerate(key):
        by_key[filled[j]] = e
        filled[j] += 1
