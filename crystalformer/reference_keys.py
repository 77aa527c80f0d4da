"""The authors' checkpoint keys (model.md, section 5), both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crystalformer.model import Crystalformer

_QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


def from_reference(state: Mapping[str, Tensor], model: Crystalformer) -> dict[str, Tensor]:
    """Our state dict for ``model`` from the authors'.

    KeyError names the first missing key; ValueError the first that this architecture lacks or has in another shape.
    """
    names = _names(model)
    known = {*names.values(), *(_in_proj_bias(n) for n in range(model.config.num_layers))}
    known |= {f"encoder.layers.{n}.self_attn.atten_scale" for n in range(model.config.num_layers)}
    missing = sorted(known - set(state) - {key for key in known if key.endswith(("atten_scale", "_tracked"))})
    if missing:
        raise KeyError(f"reference weights lack {missing[0]!r}")
    unknown = sorted(set(state) - known)
    if unknown:
        raise ValueError(f"reference weights hold {unknown[0]!r}, which this architecture lacks")
    current, unread = model.state_dict(), _unread_heads(model)
    if unread:
        state = {k: v[:, :-unread] if k.endswith("pe_dist_proj") and v.dim() == 4 else v for k, v in state.items()}
    ours = {name: _shaped(state[key], key, current[name]) for name, key in names.items() if key in state}
    for layer in range(model.config.num_layers):
        key = _in_proj_bias(layer)
        dim = model.config.model_dim
        if state[key].shape != (3 * dim,):
            raise ValueError(f"reference weights {key!r} have the shape {tuple(state[key].shape)}, not ({3 * dim},)")
        for name, bias in zip(_QKV_BIASES, state[key].chunk(3), strict=True):
            ours[f"blocks.{layer}.attention.{name}"] = bias
    return {**current, **ours}


def to_reference(model: Crystalformer) -> dict[str, Tensor]:
    """The authors' state dict of ``model``; ``from_reference`` gives the same weights back bit by bit."""
    current = model.state_dict()
    theirs = {key: current[name] for name, key in _names(model).items()}
    theirs["input_embeddings.weight"] = current["embedding"].T.contiguous()
    for layer in range(model.config.num_layers):
        ours, prefix = f"blocks.{layer}.attention.", f"encoder.layers.{layer}.self_attn."
        theirs[_in_proj_bias(layer)] = torch.cat([current[ours + name] for name in _QKV_BIASES])
        theirs[prefix + "atten_scale"] = current[ours + "q_proj.bias"].new_zeros(1)  # they never set it either
        theirs[prefix + "lattice_pos_weights"] = current[ours + "gauss_direction"].reshape(-1)
        if ours + "radial_weight" in current:
            weight = current[ours + "radial_weight"]
            unread = weight.new_zeros(_unread_heads(model), *weight.shape[1:])
            theirs[prefix + "pe_dist_proj"] = torch.cat([weight, unread]).unsqueeze(0)
    return theirs


def _unread_heads(model: Crystalformer) -> int:
    """In multihead the authors keep a W for the reciprocal heads, too, and never read it."""
    config = model.config
    return config.head_num // 2 if config.domain == "multihead" and config.value_pe_headed else 0


def _in_proj_bias(layer: int) -> str:
    return f"encoder.layers.{layer}.self_attn.in_proj_bias"


def _names(model: Crystalformer) -> dict[str, str]:
    """Our name -> the authors' key, for every entry of the state dict but the q, k, v biases."""
    names = {}
    for name in model.state_dict():
        if name.endswith(_QKV_BIASES):
            continue
        key = name.replace("blocks.", "encoder.layers.").replace(".attention.", ".self_attn.")
        key = key.replace("head.", "mlp.").replace("pre_pooling.", "proj_before_pooling.")
        for ours, theirs in (
            ("q_proj.weight", "q_proj_weight"),
            ("k_proj.weight", "k_proj_weight"),
            ("v_proj.weight", "v_proj_weight"),
            ("statistics", "gauss_scale"),
            ("gauss_direction", "lattice_pos_weights"),
            ("radial_weight", "pe_dist_proj"),
        ):
            key = key.replace(ours, theirs)
        names[name] = "input_embeddings.weight" if name == "embedding" else key
    return names


def _shaped(value: Tensor, key: str, like: Tensor) -> Tensor:
    """``value`` in our layout: the embedding transposed, a leading 1 or a flattened (H, D) undone."""
    if key == "input_embeddings.weight":
        value = value.T
    elif key.endswith("pe_dist_proj") and value.dim() == like.dim() + 1 and value.shape[0] == 1:
        value = value.squeeze(0)
    elif key.endswith("lattice_pos_weights") and value.numel() == like.numel():
        value = value.reshape(like.shape)
    if value.shape != like.shape:
        raise ValueError(f"reference weights {key!r} have the shape {tuple(value.shape)}, not {tuple(like.shape)}")
    return value
