"""Crystalformer: embedding, encoder, pooling and head (model.md, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from crystalformer import fused
from crystalformer.batch import CrystalBatch, Disorder, lasting
from crystalformer.config import MAX_ATOMIC_NUMBER, ModelConfig
from crystalformer.layers import AllReduce, EncoderBlock


class Crystalformer(nn.Module):
    """Predicts ``config.num_targets`` properties of each crystal of a batch.

    ``backend``: the attention backend of all layers (see ops.periodic_attention). ValueError where there is none of
    that name, or it does not have the model's domain.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config, self._backend, self._around = config, backend, config.neighborhood
        self.embedding = nn.Parameter(torch.empty(MAX_ATOMIC_NUMBER, config.model_dim))
        nn.init.normal_(self.embedding, std=config.model_dim**-0.5 * (9 * config.num_layers) ** -0.25)
        self.blocks = nn.ModuleList(EncoderBlock(config, layer, backend) for layer in range(config.num_layers))
        widths = list(config.embedding_dim)
        self.pre_pooling, pooled = _pre_pooling(config, widths)
        self.head = _head(config, pooled, widths)

    @property
    def num_parameters(self) -> int:
        """All parameters, as the authors count them: with three frozen scalars a layer."""
        return sum(p.numel() for p in self.parameters()) + 3 * self.config.num_layers

    @property
    def frozen(self) -> bool:
        """Whether every layer's s and t were taken from a first training batch (or loaded)."""
        return all(bool(block.attention.frozen) for block in self.blocks)  # type: ignore[union-attr]

    def forward(self, batch: CrystalBatch) -> Tensor:
        """(B, num_targets), normalized as the targets it was trained on.

        The first call in training mode freezes s and t on that batch (``freeze_statistics``). A compiled model must
        have had that before, and wants each batch through ``prepare``.
        """
        if not torch.compiler.is_compiling():
            if self.training and not self.frozen:
                self.freeze_statistics(batch)
        batch = self._seen(batch)
        x = _through(self.blocks, self.embed(batch), batch)
        output: Tensor = self.head(self._pool(self.pre_pooling(x), batch))
        return output

    def prepare(self, batch: CrystalBatch) -> CrystalBatch:
        """The batch, with neighbour lists and plans made: after this, ``forward`` is nothing but tensors."""
        seen = self._seen(batch)
        for block in self.blocks:
            block.attention.prepare(seen)  # type: ignore[union-attr, operator]
        return batch

    @lasting
    def warm_up(self) -> None:
        """Have the attention backend's kernels compiled, or read where they are kept: a first step waits for that.

        Sends two made-up atoms through the blocks, there and back; no weight, gradient or statistic changes.
        """
        batch = CrystalBatch.from_arrays([[0.0, 0.0, 0.0], [1.5, 1.5, 1.5]], [1, 1], 3.0 * torch.eye(3)[None], [2])
        batch = self._seen(self.prepare(batch.to(self.embedding.device)))
        x = first = self.embed(batch).detach().requires_grad_()
        with torch.enable_grad():
            x = _through(self.blocks, x, batch)
            torch.autograd.grad(x.sum(), first)

    def embed(self, batch: CrystalBatch) -> Tensor:
        """(N, model_dim): the element's row, or the occupancy-weighted sum of a disordered site's rows."""
        rows = (batch.atomic_numbers - 1).clamp_min(0)
        # functional.embedding adds up its gradient in a fixed order; indexing does so atomically, in any order.
        ordered = functional.embedding(rows, self.embedding)
        if batch.disorder is None:
            return ordered
        whole = (batch.atomic_numbers > 0).unsqueeze(-1).to(self.embedding)
        return ordered * whole + self._mixed(batch.disorder, rows)

    def _mixed(self, species: Disorder, atoms: Tensor) -> Tensor:
        """(N, model_dim) for atoms (N,): the occupancy-weighted sum of a disordered site's rows, 0 elsewhere."""
        atom, order = species.atom.sort(stable=True)
        parts = functional.embedding(species.atomic_number[order] - 1, self.embedding)
        parts = parts * species.occupancy[order].unsqueeze(-1).to(self.embedding)
        ends = torch.searchsorted(atom, torch.arange(len(atoms) + 1, device=atom.device))
        return torch.segment_reduce(parts, "sum", offsets=ends, axis=0, initial=0.0, unsafe=True)

    @torch.no_grad()
    def freeze_statistics(self, batch: CrystalBatch, all_reduce: AllReduce | None = None) -> None:
        """Set every layer's s and t from the first training batch.

        In distributed training ``batch`` is this worker's part of the global first batch and ``all_reduce`` sums a
        tensor over the workers; all of them then hold the same numbers.
        """
        batch = self._seen(batch)
        x = self.embed(batch)
        for block in self.blocks:
            block.attention.freeze_statistics(x, all_reduce, batch.multiplicity)  # type: ignore[union-attr, operator]
            x = _through([block], x, batch)

    def _seen(self, batch: CrystalBatch) -> CrystalBatch:
        """The atoms that the blocks work on, with shells for the widest layer, so that all layers share one list.

        Of equivalent atoms one, but for the reference backend, which is the equation written down.
        """
        radius, distinct = self._around
        if distinct and self._backend != "reference":
            return batch.distinct(radius)
        if batch.multiplicity is not None:
            raise ValueError("batch must hold all atoms of its crystals for this model, not the distinct ones alone")
        if radius > 0 and self._backend != "reference":
            batch.shells(radius)
        return batch

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights under the authors' keys (reference_keys.py); KeyError or ValueError name what does not fit."""
        from crystalformer.reference_keys import from_reference

        self.load_state_dict(from_reference(state_dict, self))

    def _pool(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """(B, F) mean or maximum of x (N, F) over each crystal's atoms."""
        if self.config.pooling == "avr":
            times = torch.ones_like(x[:, :1]) if batch.multiplicity is None else batch.multiplicity[:, None].to(x)
            # Not index_add: on a GPU that adds atomically, in any order.
            total, cell = (
                torch.segment_reduce(values, "sum", lengths=batch.sizes, axis=0, unsafe=True)
                for values in (x * times, times)
            )
            return total / cell
        atoms = batch.crystal.unsqueeze(-1).expand(-1, x.shape[1])
        empty = x.new_zeros(batch.num_crystals, x.shape[1])
        return empty.scatter_reduce(0, atoms, x, "amax", include_self=False)


def _through(modules: Iterable[nn.Module], x: Tensor, batch: CrystalBatch) -> Tensor:
    """Features (N, model_dim) behind the encoder's blocks, from those before them."""
    blocks = cast("list[EncoderBlock]", list(modules))
    if fused.applies(blocks, x):
        return fused.encode(blocks, x, batch)
    for block in blocks:
        x = block(x, batch)
    return x


def _pre_pooling(config: ModelConfig, widths: list[int]) -> tuple[nn.Module, int]:
    """The operation on atoms before pooling and the features it gives; a projection takes the first of ``widths``."""
    if config.pre_pooling_op == "no":
        return nn.Identity(), config.model_dim
    if config.pre_pooling_op == "relu":
        return nn.ReLU(), config.model_dim
    width = widths.pop(0)
    linear = nn.Linear(config.model_dim, width)
    if config.pre_pooling_op == "w+relu":
        return nn.Sequential(linear, nn.ReLU()), width
    return nn.Sequential(linear, _norm(config, width), nn.ReLU()), width


def _norm(config: ModelConfig, width: int) -> nn.Module:
    return nn.BatchNorm1d(width) if config.norm_type == "bn" else nn.Identity()


def _head(config: ModelConfig, pooled: int, widths: list[int]) -> nn.Sequential:
    """[Linear, norm, ReLU] for each width, then Linear to the targets."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(pooled, width), _norm(config, width), nn.ReLU()]
        pooled = width
    return nn.Sequential(*layers, nn.Linear(pooled, config.num_targets))
