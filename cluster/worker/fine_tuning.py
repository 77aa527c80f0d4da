"""Fine-tuning: a run that starts from a trained model, whose architecture and weights it takes over (--init_from)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.run.resumed import saved_settings
from cluster.run.storage import local_folder
from cluster.settings.config import TrainConfig, section_fields

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.data.feed import TargetScaling
    from crystalformer.artifact import ModelCard, TargetScale
    from crystalformer.model import Crystalformer

_HEAD = "head."
"""Weights under this belong to the targets, not to crystals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Initial:
    """A trained model to start from: its weights, frozen statistics included, and what its head speaks of.

    scales: its targets, in the order of its outputs; none where the run has other targets or units.
    """

    weights: Mapping[str, Tensor]
    scales: tuple[TargetScale, ...]

    def into(self, model: Crystalformer, scaling: TargetScaling) -> None:
        """Load the weights. The head keeps its fresh ones for other targets; for the same ones the predictions stay.

        scaling: how the run's targets are normalized, which is not as those of the trained model were.
        """
        if self.scales:
            model.load_state_dict({**self.weights, **self._last_layer(model, scaling)})
            return
        head = {name: value for name, value in model.state_dict().items() if name.startswith(_HEAD)}
        model.load_state_dict({**self.weights, **head})

    def _last_layer(self, model: Crystalformer, scaling: TargetScaling) -> dict[str, Tensor]:
        """The last layer's weights with outputs in the run's scaling: (old * scale + bias - new bias) / new scale."""
        name = f"{_HEAD}{len(model.head) - 1}"
        weight, bias = (self.weights[f"{name}.{part}"].double() for part in ("weight", "bias"))
        old_scale = weight.new_tensor([one.scale for one in self.scales])
        old_bias = weight.new_tensor([one.bias for one in self.scales])
        new_scale, new_bias = weight.new_tensor(scaling.scale), weight.new_tensor(scaling.bias)
        weight = weight * (old_scale / new_scale)[:, None]
        bias = (bias * old_scale + old_bias - new_bias) / new_scale
        return {f"{name}.weight": weight, f"{name}.bias": bias}


def with_architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command line with the architecture of ``init_from``'s model, where that is given.

    A run that is resumed has it in its config.yaml. UserError where a given setting is another, or there is no model.
    """
    location = settings.get("init_from")
    if location is None:
        return dict(settings)
    found = _resumed(settings, location) or _architecture(location)
    for name, value in found.items():
        given = settings.get(name, value)
        given = list(given) if isinstance(given, tuple) else given
        if given != value:
            raise UserError(f"{name} is {given!r}, but the model of init_from {location} has {value!r}")
    return {**settings, **found}


def load_initial(config: TrainConfig, units: Mapping[str, str]) -> Initial | None:
    """What the workers start from where the run has no checkpoint yet; None without ``init_from``.

    units: of the run's targets, by name. A model that does not tell a unit, as converted ones may, has the same.
    UserError where the model cannot be read or is of another architecture. A run that is resumed may do without.
    """
    location = config.run.init_from
    if location is None:
        return None
    from crystalformer.artifact import load_model

    try:
        with _model_folder(location) as folder:
            predictor = load_model(folder)
    except (OSError, ValueError) as error:
        if config.run.resume:
            return None
        raise UserError(f"init_from: {error}") from error
    wanted, found = config.section_values("model"), _settings(predictor.card)
    for name, value in found.items():
        if wanted[name] != value:
            raise UserError(f"{name} is {wanted[name]!r}, but the model of init_from {location} has {value!r}")
    scales = predictor.card.targets
    same = tuple(scale.name for scale in scales) == config.data.target and all(
        scale.unit in ("", units[scale.name]) for scale in scales
    )
    return Initial(weights=predictor.model.state_dict(), scales=scales if same else ())


@contextmanager
def _model_folder(location: str) -> Iterator[Path]:
    """The model folder of a location: itself, or the best-validation weights of a run folder."""
    from crystalformer.artifact import CONFIG

    with local_folder(location) as folder:
        inside = folder / "model"
        yield inside if (inside / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder


def _architecture(location: str) -> dict[str, Any]:
    from crystalformer.artifact import read_card

    try:
        with _model_folder(location) as folder:
            return _settings(read_card(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"init_from: {error}") from error


def _settings(card: ModelCard) -> dict[str, Any]:
    """The architecture as flat settings, lists for tuples."""
    values = card.model.to_dict()
    return {spec.name: values[spec.name] for spec in section_fields("model")}


def _resumed(settings: Mapping[str, Any], location: str) -> dict[str, Any] | None:
    """The architecture of the run that is gone on with, if there is one that began from the same model."""
    saved = saved_settings(settings)
    if saved.get("init_from") != location:
        return None
    return TrainConfig.from_flat(saved).section_values("model")
