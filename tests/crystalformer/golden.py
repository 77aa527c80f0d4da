"""The golden vectors in tests/golden for the tests: real crystals through the authors' code in float64."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from crystalformer import CrystalBatch, Crystalformer, ModelConfig
from crystalformer.reference_keys import to_reference

FOLDER = Path(__file__).parents[1] / "golden"

NAMES = (
    "real_k16",
    "real_k0",
    "real_k32_scales",
    "real_lb03",
    "real_abs",
    "real_exp",
    "real_softplus",
    "real_sigmoid",
    "headless_pe",
    "max_pool_two_targets",
    "reci",
    "multihead_k0",
    "real-reci",
)
"""The vectors that the library must reproduce; ``tests/golden/<name>.npz``."""

NOT_OURS = {"normalize_gauss": True, "gauss_state": "q", "t_activation": "relu"}
"""Settings of the authors' file that this library does not offer, at the values it assumes."""


@dataclass(frozen=True)
class Golden:
    """One file: the architecture, five crystals, weights and gradients under the authors' keys, the output."""

    name: str
    config: ModelConfig
    arrays: dict[str, np.ndarray]

    @property
    def output(self) -> np.ndarray:
        return self.arrays["output"]

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        return {key[len("grad:") :]: value for key, value in self.arrays.items() if key.startswith("grad:")}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        prefix = "param:"
        return {k[len(prefix) :]: torch.from_numpy(v) for k, v in self.arrays.items() if k.startswith(prefix)}

    def batch(self) -> CrystalBatch:
        return CrystalBatch.from_arrays(
            *(self.arrays[name] for name in ("positions", "atomic_numbers", "lattice", "sizes"))
        )

    def crystals(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(positions, atomic numbers, lattice) of each crystal."""
        ends = np.cumsum(self.arrays["sizes"])
        positions, numbers = self.arrays["positions"], self.arrays["atomic_numbers"]
        spans = [slice(end - size, end) for size, end in zip(self.arrays["sizes"], ends, strict=True)]
        return [(positions[s], numbers[s], self.arrays["lattice"][i]) for i, s in enumerate(spans)]

    def model(self, backend: str = "auto", dtype: torch.dtype = torch.float64, **settings) -> Crystalformer:
        """The authors' model with its weights; ``settings`` replace fields of its ModelConfig."""
        config = ModelConfig(**{**self.config.to_dict(), **settings})
        model = Crystalformer(config, backend=backend).to(dtype)
        model.load_reference_state_dict(self.weights)
        return model


@cache
def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    settings = json.loads(str(arrays.pop("config")))
    for key, value in NOT_OURS.items():
        assert settings.pop(key) == value, f"{name}: {key}"
    targets = settings.pop("targets")
    config = ModelConfig(**settings, num_targets=1 if isinstance(targets, str) else len(targets))
    return Golden(name=name, config=config, arrays=arrays)


@dataclass(frozen=True)
class Result:
    """What a model gave: its output and, under the authors' keys, the gradients of sum_r (r + 1) output_r."""

    output: np.ndarray
    gradients: dict[str, np.ndarray]


def run(model: Crystalformer, batch: CrystalBatch) -> Result:
    output = model(batch)
    rank = torch.arange(1, output.numel() + 1).to(output)
    (output.flatten() * rank).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():  # the authors' layout of the gradients is that of the weights
        for name, p in model.named_parameters():
            p.copy_(gradients[name])
    layout = {key: value.detach().double().cpu().numpy() for key, value in to_reference(model).items()}
    return Result(output=output.detach().double().cpu().numpy(), gradients=layout)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest number expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def gradient_errors(found: Result, expected: Golden) -> dict[str, float]:
    return {key: error(found.gradients[key], value) for key, value in expected.gradients.items()}
