"""A model folder for tests that use one: the small model with frozen statistics, no better than its seed."""

from pathlib import Path

import torch
from pymatgen.core import Lattice, Structure

from crystalformer import CrystalBatch, Crystalformer
from crystalformer.artifact import ModelCard, TargetScale, save_model
from tests.cells import ROCK_SALT, face_centred
from tests.cluster.small import SMALL_MODEL

SCALES = (
    TargetScale(name="shear", unit="log10(GPa)", scale=0.5, bias=1.25),
    TargetScale(name="bulk", unit="GPa", scale=2.0, bias=-3.0),
)


def structures() -> list[Structure]:
    """Rock salt in its primitive and cubic cell, caesium chloride, and an alloy."""
    sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
    salt = face_centred(5.64, ROCK_SALT)
    return [
        salt.get_primitive_structure(),
        salt,
        Structure(Lattice.cubic(4.12), ["Cs", "Cl"], sites),
        Structure(Lattice.cubic(2.95), [{"Cu": 0.5, "Au": 0.5}, "Zn"], sites),
    ]


def write_model(folder: Path, seed: int = 0, elements=("Na", "Cl", "Cs"), scales=SCALES, **provenance) -> Path:
    torch.manual_seed(seed)
    model = Crystalformer(SMALL_MODEL)
    model.freeze_statistics(CrystalBatch.from_structures(structures()))
    card = ModelCard(model=SMALL_MODEL, targets=tuple(scales), provenance={"elements": list(elements), **provenance})
    save_model(folder, card, model.state_dict())
    return folder
