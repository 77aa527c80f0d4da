"""Fine-tuning: a run that starts from a trained model, whose architecture and weights it takes over (--init_from)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import CONFIG_FILE, TrainConfig, flat_fields, load_yaml, section_fields
from cluster.errors import UserError
from cluster.storage import RunStore, local_folder

if TYPE_CHECKING:
    from torch import Tensor

    from crystalformer.artifact import ModelCard
    from crystalformer.model import Crystalformer

_HEAD = "head."
"""Weights under this belong to the targets, not to crystals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Initial:
    """A trained model to start from: its weights, frozen statistics included, and the names of its targets."""

    weights: Mapping[str, Tensor]
    targets: tuple[str, ...]

    def into(self, model: Crystalformer, targets: tuple[str, ...]) -> None:
        """Load the weights; the head keeps its fresh ones where ``targets`` are not those of the trained model."""
        fresh = model.state_dict() if targets != self.targets else {}
        head = {name: value for name, value in fresh.items() if name.startswith(_HEAD)}
        model.load_state_dict({**self.weights, **head})


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


def load_initial(config: TrainConfig) -> Initial | None:
    """What the workers start from where the run has no checkpoint yet; None without ``init_from``.

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
    return Initial(weights=predictor.model.state_dict(), targets=predictor.targets)


@contextmanager
def _model_folder(location: str) -> Iterator[Path]:
    """The model folder of a location: itself, or the best-validation weights of a run folder."""
    with local_folder(location) as folder:
        inside = folder / "model"
        yield inside if (inside / "config.json").is_file() and not (folder / "config.json").is_file() else folder


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
    name = settings.get("run_name")
    if name is None or not (settings.get("resume") or settings.get("auto_resume")):
        return None

    store = RunStore(settings.get("storage_path", flat_fields()["storage_path"].default), name)
    try:
        if not store.holds(CONFIG_FILE):
            return None
        store.pull(CONFIG_FILE)
        saved = load_yaml(store.folder / CONFIG_FILE)
    finally:
        store.close()
    return saved.section_values("model") if saved.run.init_from == location else None
