"""The periodic attention operator and its backends."""

from crystalformer.ops.attention import periodic_attention, prepare
from crystalformer.ops.radial import RadialBasis

__all__ = ["RadialBasis", "periodic_attention", "prepare"]
