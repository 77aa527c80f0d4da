"""The model folder: ``model.safetensors`` and ``config.json``, all that is needed to predict and to trust it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetScale:
    """A target and how its values were normalized: prediction = output * scale + bias, in ``unit``."""

    name: str
    unit: str
    scale: float
    bias: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a model folder says besides its weights."""

    model: ModelConfig
    targets: tuple[TargetScale, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.targets) != self.model.num_targets:
            raise ValueError(f"targets must be {self.model.num_targets}, got {len(self.targets)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        targets = [{"name": t.name, "unit": t.unit, "scale": t.scale, "bias": t.bias} for t in self.targets]
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "targets": targets,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelCard:
        """The card of ``to_dict``'s values; ValueError names what is missing or of another version."""
        missing = sorted({"format_version", "model", "targets"} - set(values))
        if missing:
            raise ValueError(f"{CONFIG} lacks {missing[0]!r}")
        if values["format_version"] != FORMAT_VERSION:
            version = values["format_version"]
            raise ValueError(f"{CONFIG} has format_version {version!r}, this code reads {FORMAT_VERSION}")
        return cls(
            model=ModelConfig.from_dict(values["model"]),
            targets=tuple(TargetScale(**target) for target in values["targets"]),
            provenance=values.get("provenance", {}),
        )


def save_model(folder: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write a model folder. Each file is complete under its name or not there at all."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    for name, content in (
        (WEIGHTS, save(tensors)),
        (CONFIG, (json.dumps(card.to_dict(), indent=2, allow_nan=False) + "\n").encode()),
    ):
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)


def read_card(folder: Path) -> ModelCard:
    """The card of a model folder; FileNotFoundError or ValueError say what is wrong with it."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}")
    try:
        return ModelCard.from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


class Predictor:
    """A trained model with its targets' units: structures in, numbers out."""

    def __init__(self, model: Crystalformer, card: ModelCard) -> None:
        self.model = model.eval()
        self.card = card
        self._scale = torch.tensor([t.scale for t in card.targets], dtype=torch.float64)
        self._bias = torch.tensor([t.bias for t in card.targets], dtype=torch.float64)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the predicted properties, in the order of the columns."""
        return tuple(t.name for t in self.card.targets)

    @torch.no_grad()
    def predict_batch(self, batch: CrystalBatch) -> Tensor:
        """(B, targets) float64 on the CPU, in the targets' own units."""
        device = next(self.model.parameters()).device
        output = self.model(batch.to(device)).double().cpu()
        values: Tensor = output * self._scale + self._bias
        return values

    def predict(self, structures: Iterable[Structure], batch_size: int = 64) -> Tensor:
        """(number of structures, targets) float64 in the targets' own units; pymatgen Structures in their order."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        crystals: Sequence[Structure] = list(structures)
        parts = [
            self.predict_batch(CrystalBatch.from_structures(crystals[start : start + batch_size]))
            for start in range(0, len(crystals), batch_size)
        ]
        return torch.cat(parts) if parts else torch.empty(0, len(self.targets), dtype=torch.float64)


def load_model(folder: str | Path, *, device: str = "cpu", backend: str = "auto") -> Predictor:
    """The predictor of a model folder. ValueError names the first weight that does not fit its config.json."""
    folder = Path(folder)
    card = read_card(folder)
    model = Crystalformer(card.model, backend=backend)
    model.load_state_dict(_read_weights(folder / WEIGHTS, model))
    return Predictor(model.to(device), card)


def _read_weights(path: Path, model: Crystalformer) -> dict[str, Tensor]:
    """The tensors of the file, which are those of ``model`` by name and shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name!r}")
        if weights[name].shape != value.shape:
            raise ValueError(f"{path}: {name!r} has the shape {tuple(weights[name].shape)}, not {tuple(value.shape)}")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ValueError(f"{path} holds {unknown[0]!r}, which its {CONFIG} lacks")
    return weights
