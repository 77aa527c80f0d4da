"""How a head and feature size is cut into programs, tiles and warps: the compile-time side of every launch."""

from __future__ import annotations

from dataclasses import dataclass

PROGRAM_WIDTH = 128
"""Features a program aims at: one warp then reads a row of keys as 32 lanes of 16 bytes, and sums over rows without
leaving a thread. Wider models take several programs an atom, each a group of whole heads."""

TILE_ROWS = (16, 32, 64, 128)
"""A matrix product needs 16, and each atom's rows are filled up to that (rows.py)."""

MAX_GROUP = 16
"""Heads of a program at most: scores are (rows x heads), and 32 heads of 4 features filled the registers."""

MAX_CHUNK = 64
"""Radial bases that the query pass can hold beside its gathered keys and values."""

MAX_FEATURES = 256
MAX_BASES = 512
"""Limits of D and K: up to here the largest, oddest and usual sizes compile without spills for A100, H100 and B200
(test_aot.py); with operands of 16 bits, and for MI300, the default model's do. So it is with Triton 3.7; 3.6 spills
up to 400 bytes with 16-bit operands or heads of 8 features, 3.9 spills 8 in the default forward for B200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """The constants of the kernels (kernels.py) for one model.

    heads H, features D, bases K: real sizes. rows: shell rows of a tile, 16, 32, 64 or 128. warps: of a
    program; forward_warps: of the forward's, whose (K, GROUP) sums lie in registers.
    """

    heads: int
    features: int
    bases: int
    rows: int
    warps: int
    forward_warps: int

    def __post_init__(self) -> None:
        if self.rows not in TILE_ROWS:
            raise ValueError(f"rows must be one of {TILE_ROWS}, got {self.rows}")

    @classmethod
    def fitting(cls, heads: int, features: int, bases: int) -> Tiles:
        """What ``choose`` set for H, D and K, else a fixed default. ValueError where D or K are too large."""
        if not 1 <= features <= MAX_FEATURES:
            raise ValueError(f"triton backend: head_dim must be 1 to {MAX_FEATURES}, got {features}")
        if not 0 <= bases <= MAX_BASES:
            raise ValueError(f"triton backend: value_pe_dist_real must be 0 to {MAX_BASES}, got {bases}")
        if (heads, features, bases) in _CHOSEN:
            return _CHOSEN[heads, features, bases]
        wide = max(1, power_of_two(features) // PROGRAM_WIDTH)
        tall = max(1, power_of_two(max(1, bases)) // 64)
        return cls(heads=heads, features=features, bases=bases, rows=16, warps=wide, forward_warps=max(wide, tall))

    @property
    def width(self) -> int:
        """WIDTH: D padded."""
        return power_of_two(self.features)

    @property
    def group(self) -> int:
        """GROUP: heads of a program."""
        return min(power_of_two(self.heads), max(1, PROGRAM_WIDTH // self.width), MAX_GROUP)

    @property
    def groups(self) -> int:
        """Programs an atom."""
        return -(-self.heads // self.group)

    @property
    def basis(self) -> int:
        """BASIS: K padded to what a matrix product needs, 0 for none."""
        return max(16, power_of_two(self.bases)) if self.bases else 0

    @property
    def chunk(self) -> int:
        """CHUNK: all of K up to 64 at once, more of them piece by piece."""
        if self.basis <= MAX_CHUNK:
            return max(16, self.basis)
        return MAX_CHUNK // 2 if self.group < MAX_GROUP else MAX_CHUNK // 4

    def key_constants(self) -> dict[str, int | bool]:
        """Compile-time arguments of key_backward_kernel."""
        return {
            "HEADS": self.heads,
            "FEATURES": self.features,
            "GROUP": self.group,
            "WIDTH": self.width,
            "ROWS": self.rows,
            "ALIGNED": TILE_ROWS[0],
            "PADDED": self.width != self.features or self.heads % self.group != 0,
        }

    def query_constants(self, backend: str) -> dict[str, int | bool | str]:
        """Compile-time arguments of query_backward_kernel; backend: Triton's name, "cuda" or "hip"."""
        return {**self.key_constants(), "BASES": self.bases, "CHUNK": self.chunk, "PRECISION": precision_of(backend)}

    def forward_constants(self, backend: str) -> dict[str, int | bool | str]:
        """Compile-time arguments of forward_kernel."""
        return {
            **self.key_constants(),
            "BASES": self.bases,
            "BASIS": self.basis,
            "ALL_HEADS": power_of_two(self.heads),
            "PRECISION": precision_of(backend),
        }


def precision_of(backend: str) -> str:
    """tl.dot's input_precision, of float32 accuracy: NVIDIA's matrix units take three tf32 products for one.

    "ieee" there means scalar products, whose operands fill the registers: the query pass spilled 96 bytes at K = 64
    and 608 at K = 128 (sm_90, one warp), none with "tf32x3". Splitting by hand, without tf32x3's checks for
    infinities, saved 16 % of the forward's instructions but took 194 registers in place of 140. AMD's matrix units
    multiply float32.
    """
    return "tf32x3" if backend == "cuda" else "ieee"


_CHOSEN: dict[tuple[int, int, int], Tiles] = {}


def choose(tiles: Tiles) -> None:
    """Use other tiles for their H, D and K from now on in this process; tests/benchmarks/gpu.py compares them.

    Nothing is tuned by itself: another tile height adds in another order, and runs are to repeat bit for bit.
    """
    _CHOSEN[tiles.heads, tiles.features, tiles.bases] = tiles


def options(warps: int) -> dict[str, int | bool]:
    """Compiler options of every launch: nothing pipelined (gathers depend on loaded indices), a * b + c fused."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
