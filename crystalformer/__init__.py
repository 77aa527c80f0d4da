"""Crystalformer as a plain torch library: no Ray, no DeepSpeed.

>>> model = Crystalformer(ModelConfig(value_pe_dist_real=64, scale_real=1.4))
>>> prediction = model(CrystalBatch.from_arrays(positions, atomic_numbers, lattice, sizes))
"""

from crystalformer.artifact import load_model
from crystalformer.batch import CrystalBatch, Disorder
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer

__all__ = ["CrystalBatch", "Crystalformer", "Disorder", "ModelConfig", "load_model"]
