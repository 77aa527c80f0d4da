"""Crystalformer as a plain torch library: no Ray, no DeepSpeed.

>>> model = Crystalformer(ModelConfig(value_pe_dist_real=64, scale_real=1.4))
>>> prediction = model(CrystalBatch.from_arrays(positions, atomic_numbers, lattice, sizes))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crystalformer.artifact import load_model
    from crystalformer.batch import CrystalBatch, Disorder
    from crystalformer.config import ModelConfig
    from crystalformer.model import Crystalformer

__all__ = ["CrystalBatch", "Crystalformer", "Disorder", "ModelConfig", "load_model"]

_MODULES = {
    "CrystalBatch": "crystalformer.batch",
    "Crystalformer": "crystalformer.model",
    "Disorder": "crystalformer.batch",
    "ModelConfig": "crystalformer.config",
    "load_model": "crystalformer.artifact",
}


def __getattr__(name: str) -> object:
    """Import a name's module on first use: the command line's help reads ModelConfig and needs no torch (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'crystalformer' has no attribute {name!r}")
    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
