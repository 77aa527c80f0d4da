"""Models for the tests."""

import numpy as np
import torch

from crystalformer import Crystalformer
from tests.crystalformer.crystals import Crystal, batch_of

SMALL = {
    "model_dim": 32,
    "head_num": 4,
    "ff_dim": 48,
    "num_layers": 2,
    "embedding_dim": (24,),
    "value_pe_dist_real": 16,
}


def predict(model: Crystalformer, *crystals: Crystal) -> np.ndarray:
    with torch.no_grad():
        return model(batch_of(*crystals)).numpy()
