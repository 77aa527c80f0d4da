"""DeepSpeed's settings from our typed fields, with a user's JSON file laid over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.settings.config import TrainConfig

OWNED = {
    "train_batch_size": "--batch_size",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation",
    "gradient_clipping": "--clip_norm",
    "optimizer": "--optimizer, --lr, --adam_betas and --weight_decay",
    "scheduler": "--lr_sch and --sch_params",
    "amp": "--precision",
    "bf16": "--precision",
    "bfloat16": "--precision",
    "fp16": "--precision",
    "torch_autocast": "--precision",
    "zero_optimization.stage": "--zero_stage",
    "zero_optimization.stage3_param_persistence_threshold": "--zero_stage",
}
"""What a file may not set, and the option that does."""

DEEPEST = 50
"""Brackets in each other in a file: DeepSpeed's settings have a handful, and what is deeper could not be sent to the
workers."""


def deepspeed_config(
    config: TrainConfig, world_size: int, overlay: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The dict for ``deepspeed.initialize``: ours, and over it what ``overlay_of`` has read."""
    accumulation = config.optim.gradient_accumulation
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": -(-config.data.batch_size // (world_size * accumulation)),
        "gradient_accumulation_steps": accumulation,
        # At stage 0 the engine clips, because DeepSpeed would not tell the norm.
        "gradient_clipping": config.optim.clip_norm if config.scale.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": config.scale.zero_stage},
        "zero_allow_untested_optimizer": True,
        # Offloading works with torch's AdamW; DeepSpeed's own for the CPU takes a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # DeepSpeed's own count of samples a second would make the host wait for the GPU twice a step.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.scale.zero_stage == 3:
        # Every parameter is sharded, none kept whole: averaged weights and checkpoints then see one form only.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if config.scale.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    _overlay(settings, overlay or {})
    return settings


def overlay_of(config: TrainConfig) -> dict[str, Any] | None:
    """The content of the user's file, if there is one; read once, by the driver: other nodes may not see it."""
    return None if config.scale.deepspeed is None else read_overlay(config.scale.deepspeed)


def read_overlay(path: str) -> dict[str, Any]:
    """The user's JSON file; UserError for one that cannot be read or that sets what our options own."""
    values = _load(path)
    if not isinstance(values, dict):
        raise UserError(f"deepspeed: {path}: must be a JSON object, got {type(values).__name__}")
    if not isinstance(values.get("zero_optimization", {}), dict):
        raise UserError(f"deepspeed: {path}: zero_optimization must be a JSON object; its stage is --zero_stage")
    for key in _dotted(values):
        for owned, option in OWNED.items():
            if key == owned or key.startswith(owned + "."):
                raise UserError(f"deepspeed: {path}: {key} conflicts with {option}, which sets it; remove it there")
    return values


def _load(path: str) -> object:
    """What the JSON file holds. UserError where it is none, or none that could be used."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if _deeper(values, DEEPEST):
            raise RecursionError
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed: {path}: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed: {path}: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"deepspeed: {path}: more than {DEEPEST} brackets stand in each other") from error
    except ValueError as error:  # json's own are told above
        raise UserError(f"deepspeed: {path}: holds an integer of too many digits") from error
    return values


def _deeper(value: object, levels: int) -> bool:
    """Whether more than so many brackets stand in each other."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [prefix + key]
    return keys


def _overlay(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            _overlay(settings[key], value)
        else:
            settings[key] = value
