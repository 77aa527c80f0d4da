"""The authors' checkpoints into model folders and back (model.md, section 5).

Theirs is a torch file whose ``state_dict`` holds ``target_mean``, ``target_std`` (both in the targets' units, one a
target), the best weights under ``model.`` and the averaged ones under ``swa_model.module.``. As PyTorch Lightning
wrote it, ``hyper_parameters`` beside it holds the settings of the training, which go under the same names as ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.prediction.predict import load_predictor
from cluster.run.storage import local_folder
from cluster.settings.reach import check_reach
from crystalformer.artifact import ModelCard, TargetScale, check_size, save_model
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer
from crystalformer.reference_keys import from_reference, to_reference

PREFIXES = {"model": "model.", "model-swa": "swa_model.module."}
"""Our folder -> their prefix."""
NOT_WEIGHTS = frozenset({"target_mean", "target_std", "swa_model.n_averaged"})

_OURS: Mapping[str, tuple[object, ...]] = {
    "gauss_state": ("q", "q-headdim", "q-kdim"),
    "normalize_gauss": (True,),
    "t_activation": ("relu",),
    "exclude_self": (False,),
    "norm_func_mode": (0,),
    "use_cgcnn_feat": (False,),
}
"""Settings of theirs that this model does not have, and the values at which theirs is this model."""

_OURS_ALONE = frozenset({"cutoff_sigmas"})
"""Settings of ModelConfig that theirs do not have: how exactly their infinite sums are taken."""

_RECIPROCAL = frozenset({"scale_reci", "gauss_lb_reci"})
_RADIAL = frozenset({"value_pe_dist_max", "value_pe_width_scale", "value_pe_headed"})
"""Settings that play no part in every model: only in one of reciprocal space, or with radial projections."""

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_HEAD = re.compile(r"(?:mlp|proj_before_pooling)\.(\d+)\.weight")
_FIRST = "encoder.layers.0."


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceCheckpoint:
    """An authors' file: weights by our folder's name, under their keys; mean and std (T,) of the targets, if told.

    settings: those of ModelConfig that the file tells. targets: their names, where it tells them. not_averaged:
    whether it has a place for averaged weights that holds the initial ones, as before the epochs that are averaged.
    """

    weights: dict[str, dict[str, Tensor]]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    not_averaged: bool
    settings: dict[str, Any]
    targets: tuple[str, ...]


def read_reference_file(path: Path) -> ReferenceCheckpoint:
    """Read a file with tensors and plain values only. UserError says what it lacks or holds beside them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the unpickler raises errors of every kind on other files
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no torch file of tensors and plain values: {reason:.200}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: must hold a `state_dict` of tensors, as the authors' checkpoints do")
    weights = {name: _under(state, prefix) for name, prefix in PREFIXES.items()}
    for key in state:
        if key not in NOT_WEIGHTS and not key.startswith(tuple(PREFIXES.values())):
            known = ", ".join([*PREFIXES.values(), *sorted(NOT_WEIGHTS)])
            raise UserError(f"{path}: {key!r} is under none of {known}")
    if not weights["model"]:
        raise UserError(f"{path}: holds no weights under model.*")
    scales = [key for key in ("target_mean", "target_std") if key in state]
    if len(scales) == 1:
        raise UserError(f"{path}: holds {scales[0]!r} alone; target_mean and target_std belong together")
    counted = state.get("swa_model.n_averaged")
    not_averaged = bool(weights["model-swa"]) and counted is not None and not bool(counted.any())
    if not_averaged:
        del weights["model-swa"]
    return ReferenceCheckpoint(
        weights={name: part for name, part in weights.items() if part},
        mean=_numbers(state, "target_mean", path),
        std=_numbers(state, "target_std", path),
        not_averaged=not_averaged,
        **_told(content.get("hyper_parameters"), path),
    )


def _told(parameters: object, path: Path) -> dict[str, Any]:
    """``settings`` and ``targets`` of a ReferenceCheckpoint. UserError where theirs was a model that is not ours."""
    told = parameters if isinstance(parameters, dict) else {}
    for name, ours in _OURS.items():
        if told.get(name, ours[0]) not in ours:
            allowed = " or ".join(map(repr, ours))
            raise UserError(f"{path}: its {name} is {told[name]!r}, but this model has {allowed} alone")
    known = {field.name for field in fields(ModelConfig)} - {"num_targets"}
    targets = told.get("targets", ())
    named = [targets] if isinstance(targets, str) else targets
    good = isinstance(named, list | tuple) and all(isinstance(name, str) and name for name in named)
    return {
        "settings": {name: value for name, value in told.items() if name in known},
        "targets": tuple(named) if good else (),
    }


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _numbers(state: Mapping[str, Tensor], key: str, path: Path) -> tuple[float, ...] | None:
    """The numbers of a tensor; None where it is not there."""
    if key not in state:
        return None
    values = state[key].double().reshape(-1)
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{path}: {key!r} must hold finite numbers, got {values.tolist()}")
    return tuple(values.tolist())


def infer_settings(weights: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ModelConfig that follow from the shapes, with ``given`` ones over them.

    UserError where a tensor that shapes are taken from is missing or no matrix.
    """
    layers = {int(match.group(1)) for key in weights if (match := _LAYER.match(key))}
    if not layers:
        raise UserError("weights lack 'encoder.layers.0.self_attn.q_proj_weight'")
    missing = next((layer for layer in range(max(layers)) if layer not in layers), None)
    if missing is not None:
        raise UserError(f"weights have none of layer {missing}, but of layer {max(layers)}")
    widths = _head_widths(weights)
    settings: dict[str, Any] = {
        "num_layers": max(layers) + 1,
        "model_dim": _matrix(weights, _FIRST + "self_attn.q_proj_weight").shape[0],
        "ff_dim": _matrix(weights, _FIRST + "linear1.weight").shape[0],
        "embedding_dim": tuple(widths[:-1]),
        "num_targets": widths[-1],
        "norm_type": "bn" if any(key.endswith("running_mean") for key in weights) else "no",
        "value_pe_dist_real": 0,
    }
    settings |= _radial_settings(weights, settings["num_layers"], settings["model_dim"])
    if any(key.startswith("proj_before_pooling.") for key in weights):
        settings["pre_pooling_op"] = "w+bn+relu" if "proj_before_pooling.1.weight" in weights else "w+relu"
    return {**settings, **given}


def _radial_settings(weights: Mapping[str, Tensor], layers: int, dim: int) -> dict[str, Any]:
    """What the radial projections (1, H or 1, D, K) tell; nothing where there are none."""
    radial = {key: value for key, value in weights.items() if key.endswith("self_attn.pe_dist_proj")}
    if not radial:
        return {}
    key, first = next(iter(radial.items()))
    if first.dim() < 3 or 0 in first.shape:
        raise UserError(f"weights {key!r} have the shape {tuple(first.shape)}, not (1, heads, features, bases)")
    heads, features, bases = first.shape[-3:]
    settings: dict[str, Any] = {
        "value_pe_dist_real": bases,
        "value_pe_headed": heads > 1,
        "head_num": heads if heads > 1 else dim // features,
    }
    if len(radial) < layers:
        settings["domain"] = "real-reci" if key.startswith(_FIRST) else "reci-real"
    return settings


def _matrix(weights: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in weights:
        raise UserError(f"weights lack {key!r}")
    if weights[key].dim() != 2:
        raise UserError(f"weights {key!r} have the shape {tuple(weights[key].shape)}, not two dimensions")
    return weights[key]


def _head_widths(weights: Mapping[str, Tensor]) -> list[int]:
    """Outputs of every linear layer after the encoder, in order: the hidden sizes, then the number of targets."""
    matrices = [
        (key.startswith("mlp."), int(match.group(1)), value.shape[0])
        for key, value in weights.items()
        if (match := _HEAD.fullmatch(key)) and value.dim() == 2
    ]
    if not any(mlp for mlp, _, _ in matrices):
        raise UserError("weights lack 'mlp.0.weight'")
    return [width for _, _, width in sorted(matrices)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """The model folders that were written, and lines on what was assumed or left out."""

    folders: list[Path]
    remarks: list[str]


def to_folders(path: Path, out: Path, given: Mapping[str, Any], targets: Sequence[tuple[str, str]]) -> Converted:
    """Write ``out/model`` and, where averaged weights are there, ``out/model-swa``.

    given: settings of ModelConfig that neither shapes nor the file's own settings tell, or that go before these.
    targets: their names and units; those of the file, or made-up ones, where there are none. UserError names the
    first tensor or setting that does not fit, or a folder that is there, before anything is written.
    """
    for name in PREFIXES:
        _refuse_existing(out / name)
    checkpoint = read_reference_file(path)
    try:
        known = infer_settings(checkpoint.weights["model"], {**checkpoint.settings, **given})
        config = ModelConfig(**known)
        check_reach(config)
        card = ModelCard(model=config, targets=_scales(checkpoint, config.num_targets, targets))
        ours = {name: _converted(config, weights) for name, weights in checkpoint.weights.items()}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: {error.args[0]}") from error
    for name, state in ours.items():
        provenance = {"converted_from": path.name, "weights": name}
        try:
            save_model(out / name, ModelCard(model=card.model, targets=card.targets, provenance=provenance), state)
        except OSError as error:
            raise UserError(f"{out / name}: {error.strerror or error}") from error
    return Converted(folders=[out / name for name in ours], remarks=_remarks(checkpoint, config, known))


def _remarks(checkpoint: ReferenceCheckpoint, config: ModelConfig, known: Mapping[str, Any]) -> list[str]:
    """What nothing told and the defaults were taken for, and that there were no averaged weights."""
    settled = {*known, *_OURS_ALONE}
    settled |= _RECIPROCAL if config.domain == "real" else set()
    settled |= set() if config.value_pe_dist_real else _RADIAL
    values = {name: value for name, value in config.to_dict().items() if name not in settled}
    if checkpoint.mean is None:
        values |= {"target_mean": 0, "target_std": 1}
    words = [
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in values.items()
    ]
    remarks = [f"assumed: {', '.join(words)} (neither file nor options tell)"] if words else []
    if checkpoint.not_averaged:
        remarks.append("no model-swa: the file's averaged weights are the initial ones (swa_model.n_averaged is 0)")
    return remarks


def _refuse_existing(place: Path) -> None:
    """UserError where something is there: trained weights and inputs are not written over."""
    if os.path.lexists(place):
        raise UserError(f"{place}: exists; choose another OUT or delete it")


def _converted(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    check_size(config, weights)
    model = Crystalformer(config).to(next(iter(weights.values())).dtype)
    return from_reference(weights, model)


def _scales(
    checkpoint: ReferenceCheckpoint, count: int, targets: Sequence[tuple[str, str]]
) -> tuple[TargetScale, ...]:
    made_up = [f"target_{i + 1}" if count > 1 else "target" for i in range(count)]
    told = checkpoint.targets if len(checkpoint.targets) == count else made_up
    named = list(targets) or [(name, "") for name in told]
    if len(named) != count:
        raise UserError(f"targets must be {count}, as the weights predict, got {', '.join(n for n, _ in named)}")
    columns = {
        "target_mean": (0.0,) if checkpoint.mean is None else checkpoint.mean,
        "target_std": (1.0,) if checkpoint.std is None else checkpoint.std,
    }
    for key, values in columns.items():
        if len(values) not in (1, count):
            raise UserError(f"{key!r} holds {len(values)} numbers for {count} targets")
    mean, std = (values * count if len(values) == 1 else values for values in columns.values())
    return tuple(
        TargetScale(name=name, unit=unit, scale=scale, bias=bias)
        for (name, unit), scale, bias in zip(named, std, mean, strict=True)
    )


def to_file(location: str, out: Path) -> None:
    """Write the authors' torch file of a model folder, or of a folder that holds model/ and perhaps model-swa/.

    With the settings, as Lightning has them beside the weights, which alone do not tell pooling, widths or domains.

    location: a path or a URI such as s3://bucket/runs/NAME. UserError for a model that cannot be read, and where
    ``out`` is there or cannot be written.
    """
    if not out.name or out.is_dir():
        raise UserError(f"{out}: must be the name of a file to write")
    _refuse_existing(out)
    with local_folder(location, "CHECKPOINT") as folder:
        _write_reference(folder, out)


def _write_reference(folder: Path, out: Path) -> None:
    single = not (folder / "model").is_dir()
    folders = {"model": folder} if single else {n: folder / n for n in PREFIXES if (folder / n).is_dir()}
    state: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for name, source in folders.items():
        predictor = load_predictor(source, torch.device("cpu"))
        scales = predictor.card.targets
        told = {**predictor.card.model.to_dict(), "targets": [scale.name for scale in scales]}
        state["target_mean"] = _tensor([scale.bias for scale in scales])
        state["target_std"] = _tensor([scale.scale for scale in scales])
        state |= {PREFIXES[name] + key: value.clone() for key, value in to_reference(predictor.model).items()}
    if "model-swa" in folders:
        state["swa_model.n_averaged"] = torch.tensor(1)  # torch's AveragedModel, which holds theirs, asks for it
    partial = out.with_name(f".{out.name}.{uuid4().hex[:8]}.partial")  # another command may write one, too
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({"state_dict": state, "hyper_parameters": told}, partial)
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out}: {getattr(error, 'strerror', None) or error}") from error


def _tensor(values: Sequence[float]) -> Tensor:
    """(T,) float32, as theirs are, where that holds the values exactly, else float64."""
    exact = torch.tensor(values, dtype=torch.float64)
    return exact.float() if torch.equal(exact.float().double(), exact) else exact
