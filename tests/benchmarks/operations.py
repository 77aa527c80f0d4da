"""Floating-point operations of the model's matrix products, for the rows beside the machine's rate.

They are those of the formulation (radial features summed with the softmax weights, W applied after the sum) for the
shells within every atom's reach, whatever a backend leaves out or adds as padding. Of a batch of distinct atoms alone
they are those of these atoms.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from crystalformer import CrystalBatch, Crystalformer, ModelConfig, layers


def attention_operations(members: CrystalBatch, rho: Tensor, scale: float, config: ModelConfig) -> float:
    """Of a layer's attention, forward and backward; rho (N, H), scale in Å.

    For each shell in reach H·K for the radial sums and as many for their gradient; for each pair seven products over
    H·D; W applied once an atom, its gradient and that of the sums.
    """
    shells = members.shells(config.neighbor_radius)
    reach = config.cutoff_sigmas * scale / rho.detach().amin(1).double().sqrt()
    atom = torch.repeat_interleave(torch.arange(members.num_atoms), shells.ptr.diff())
    inside = shells.distance <= reach[atom]
    pairs = len(torch.unique(atom[inside] * members.num_atoms + shells.neighbor[inside]))
    radial = 4.0 * int(inside.sum()) * config.head_num * config.value_pe_dist_real
    project = 6.0 * members.num_atoms * config.model_dim * config.value_pe_dist_real
    return radial + 14.0 * pairs * config.model_dim + project


def step_operations(model: Crystalformer, members: CrystalBatch) -> float:
    """Of a training step: linear layers and attention, forward and backward, of the atoms that are in the batch.

    members: ``unmerged`` or ``distinct``, for a model that would merge them.
    """
    config = model.config
    linear = 4 * config.model_dim**2 + 2 * config.model_dim * config.ff_dim
    total = 6.0 * members.num_atoms * linear * config.num_layers
    by_modules = Crystalformer(config, backend="torch").to(members.device)
    by_modules.load_state_dict(model.state_dict())
    calls: list[tuple[Tensor, float]] = []
    attend = layers.periodic_attention

    def recorded(*operands: Any, **settings: Any) -> Tensor:  # the operator's
        calls.append((operands[3], settings["scale"]))
        return attend(*operands, **settings)

    with mock.patch.object(layers, "periodic_attention", recorded), torch.no_grad():
        by_modules(members)
    return total + sum(attention_operations(members, rho, scale, config) for rho, scale in calls)
