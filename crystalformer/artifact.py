"""The model folder: ``model.safetensors`` and ``config.json``, all that is needed to predict and to trust it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig, is_number
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

    def __post_init__(self) -> None:
        for what, value in (("name", self.name), ("unit", self.unit)):
            if not isinstance(value, str):
                raise ValueError(f"a target's {what} must be a text, got {value!r}")
        for what, number in (("scale", self.scale), ("bias", self.bias)):
            if not is_number(number):
                raise ValueError(f"a target's {what} must be a finite number, got {number!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRanges:
    """Smallest and largest of the crystals trained on: sites of the primitive cell, and sites an Å³."""

    cell_sizes: tuple[int, int]
    number_densities: tuple[float, float]

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[float]]) -> TrainRanges:
        """Of ``dataclasses.asdict``'s values, as JSON has them."""
        low, high = values["cell_sizes"]
        thin, dense = values["number_densities"]
        return cls(cell_sizes=(int(low), int(high)), number_densities=(float(thin), float(dense)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a model folder says besides its weights; no ranges where it was converted or is older than they are."""

    model: ModelConfig
    targets: tuple[TargetScale, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    ranges: TrainRanges | None = None

    def __post_init__(self) -> None:
        if len(self.targets) != self.model.num_targets:
            raise ValueError(f"targets must be {self.model.num_targets}, got {len(self.targets)}")
        if not isinstance(self.provenance, Mapping):
            raise ValueError(f"provenance must be a mapping, got {self.provenance!r}")
        symbols = self.provenance.get("elements", ())
        if not isinstance(symbols, list | tuple) or not all(isinstance(symbol, str) for symbol in symbols):
            raise ValueError(f"provenance's elements must be a list of symbols, got {symbols!r:.80}")
        dataset = self.provenance.get("dataset", "")
        if not isinstance(dataset, str):
            raise ValueError(f"provenance's dataset must be a text, got {dataset!r:.80}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        targets = [{"name": t.name, "unit": t.unit, "scale": t.scale, "bias": t.bias} for t in self.targets]
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "targets": targets,
            "provenance": dict(self.provenance),
            **({} if self.ranges is None else {"ranges": asdict(self.ranges)}),
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
            ranges=TrainRanges.from_dict(values["ranges"]) if values.get("ranges") else None,
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
        partial = folder / f".{name}.{uuid4().hex[:8]}.partial"  # another process may write one, too
        try:
            partial.write_bytes(content)
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)


def read_card(folder: Path) -> ModelCard:
    """The card of a model folder; FileNotFoundError or ValueError say what is wrong with it."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}")
    try:
        return ModelCard.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # no JSON, or of another shape
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: brackets within brackets, too deep to be a card") from None
    except KeyError as error:
        raise ValueError(f"{path}: ranges lack {error}") from error


WORK_AT_ONCE = 2**19
"""Images and pairs of atoms of a batch at most; their radial features are then some 130 MB. See ``batch_work``."""

_WAVES_A_UNIT = 16
"""Wave vectors, times the atoms and 8 heads, that need the memory of an image: 290 bytes a wave for 10 atoms."""


def batch_work(atoms: int, volume: float, radius: float, wave_radius: float = 0.0) -> float:
    """Images within ``radius`` (Å) that a crystal's atoms have, and pairs of atoms: its share of a batch's memory.

    ``volume``: of its cell, Å³. The images follow from the density, so nothing has to be searched; symmetric crystals
    need fewer rows than that (neighbors.py). Of reciprocal space the wave vectors within ``wave_radius`` (1/Å) are
    counted likewise, half a sphere of them: a cell with vacuum has many. ValueError for a cell without volume.
    """
    if not volume > 0:
        raise ValueError(f"a cell must have a volume, got {volume} Å³")
    waves = volume * wave_radius**3 / (12 * math.pi**2)
    images = atoms / volume * 4 / 3 * math.pi * radius**3
    return atoms * (atoms + 1 + images) + (atoms + 8) * waves / _WAVES_A_UNIT


def batch_ends(work: Iterable[float], batch_size: int | None = None) -> Iterator[int]:
    """Where batches end: at WORK_AT_ONCE or ``batch_size`` crystals, whichever is less, but after one at least."""
    held, count, position = 0.0, 0, 0
    for position, one in enumerate(work):
        if count and (held + one > WORK_AT_ONCE or count == batch_size):
            yield position
            held, count = 0.0, 0
        held, count = held + one, count + 1
    if count:
        yield position + 1


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

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def predict_batch(self, batch: CrystalBatch) -> Tensor:
        """(B, targets) float64 on the CPU, in the targets' own units."""
        output = self.model(batch.to(self.device)).double().cpu()
        values: Tensor = output * self._scale + self._bias
        return values

    def predict(self, structures: Iterable[Structure], batch_size: int | None = None) -> Tensor:
        """(number of structures, targets) float64 in the targets' own units; pymatgen Structures in their order.

        Batches are as large as memory allows (``batch_work``), ``batch_size`` crystals at most if given; the values
        do not depend on it. Cells are taken as they are, nothing is reduced: attention sums over all periodic images
        and pooling over the cell, so a crystal has the same prediction in its primitive and in any larger cell
        (tested in real space to 1e-5), of which equivalent atoms are computed once (equivalence.py).
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if hasattr(structures, "lattice"):
            raise ValueError("structures must be several, as in a list; got a single one")
        crystals: Sequence[Structure] = list(structures)
        reach = self.card.model.neighbor_radius, self.card.model.wave_radius
        work = (batch_work(len(crystal), crystal.lattice.volume, *reach) for crystal in crystals)
        ends = [0, *batch_ends(work, batch_size)]
        parts = [
            self.predict_batch(CrystalBatch.from_structures(crystals[start:end])) for start, end in pairwise(ends)
        ]
        return torch.cat(parts) if parts else torch.empty(0, len(self.targets), dtype=torch.float64)


def load_model(folder: str | Path, *, device: str = "cpu", backend: str = "auto") -> Predictor:
    """The predictor of a model folder. ValueError names the first weight that does not fit its config.json."""
    folder = Path(folder)
    card = read_card(folder)
    weights = _read_weights(folder / WEIGHTS)
    try:
        check_size(card.model, weights)
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and replaced
            model = Crystalformer(card.model, backend=backend)
    except (ValueError, RuntimeError, MemoryError) as error:  # sizes that no memory holds
        raise ValueError(f"{folder / CONFIG}: no such model can be made: {error}") from error
    _check_weights(folder / WEIGHTS, weights, model)
    model.load_state_dict(weights)
    return Predictor(model.to(device), card)


def check_size(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """ValueError where a model is far larger than its weights: before memory is taken for it.

    Where it is less far, the first of them that does not fit can be named.
    """
    least, held = _least_numbers(config), sum(value.numel() for value in weights.values())
    if least > 10 * held:
        raise ValueError(f"it has {least} numbers or more, its weights are {held}")


def _least_numbers(config: ModelConfig) -> int:
    """Numbers in the matrices of a model's blocks and of its head; it has some more."""
    dim, sizes = config.model_dim, (config.model_dim, *config.embedding_dim, config.num_targets)
    radial = config.value_pe_dist_real * (dim if config.value_pe_headed else config.head_dim)
    of_block = 4 * dim**2 + 2 * dim * config.ff_dim + (radial if config.domain == "real" else 0)
    return config.num_layers * of_block + sum(a * b for a, b in pairwise(sizes))


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    return weights


def _check_weights(path: Path, weights: Mapping[str, Tensor], model: Crystalformer) -> None:
    """Raises ValueError unless they are those of ``model`` by name and shape, and finite."""
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name!r}")
        if weights[name].shape != value.shape:
            raise ValueError(f"{path}: {name!r} has the shape {tuple(weights[name].shape)}, not {tuple(value.shape)}")
        if not bool(torch.isfinite(weights[name]).all()):
            raise ValueError(f"{path}: {name!r} holds what is no finite number, as of a training that diverged")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ValueError(f"{path} holds {unknown[0]!r}, which its {CONFIG} lacks")
