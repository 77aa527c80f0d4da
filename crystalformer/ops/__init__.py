"""The periodic attention operator and its backends."""

from crystalformer.ops.attention import check_backend, periodic_attention, prepare
from crystalformer.ops.radial import RadialBasis

__all__ = ["RadialBasis", "check_backend", "periodic_attention", "prepare"]
