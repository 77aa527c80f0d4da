"""The DeepSpeed engine around the model: one exact global step, whatever the workers, parts and ZeRO stage.

Weights and optimizer moments leave and enter it in one canonical form, a tensor a parameter name, so that a
checkpoint knows nothing of workers or stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.settings.config import TrainConfig
from cluster.settings.deepspeed_config import deepspeed_config
from cluster.settings.sections import OptimConfig
from cluster.worker.breakdown import Breakdown
from cluster.worker.lean import load_deepspeed, uncompiled
from cluster.worker.machine import Place
from crystalformer.batch import CrystalBatch

Tensors = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """Adam's state: ``moments`` holds "<moment>.<parameter>"; ``step`` counts the steps taken."""

    moments: Tensors
    step: int


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): lr sqrt(T / (T + step)), or lr."""
    if optim.lr_sch == "const":
        return optim.lr
    period = optim.sch_params[0]
    return float(optim.lr * (period / (period + step)) ** 0.5)


def loss_sum(output: Tensor, target: Tensor, function: str) -> Tensor:
    """Loss summed over crystals and targets, both (B, T) normalized."""
    if function == "L1":
        return functional.l1_loss(output, target, reduction="sum")
    if function == "MSE":
        return functional.mse_loss(output, target, reduction="sum")
    return functional.smooth_l1_loss(output, target, reduction="sum")


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or Adam with weight decay on all but biases (model.md, section 4).

    Fused: 0.8 instead of 2.7 ms a step of the default model on a CPU core, and a few launches on a GPU.
    """
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]
    kind = uncompiled(torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam)
    beta1, beta2 = optim.adam_betas
    optimizer: torch.optim.Optimizer = kind(groups, lr=optim.lr, betas=(beta1, beta2), fused=True)
    return optimizer


class Engine:
    """Steps, evaluates and hands out weights. Every method but ``predict`` is collective over the workers."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        place: Place,
        breakdown: Breakdown | None = None,
        overlay: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap ``model``, which already lies on its device with its first (or restored) weights.

        ``overlay``: DeepSpeed's settings of the user's file.
        """
        deepspeed = load_deepspeed()

        # Only inference uses this operator, and building it takes a compiler and 40 s.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._config, self._place = config, place
        self._breakdown = breakdown or Breakdown(place.device, enabled=False)
        self._norm: Tensor | None = None
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, config.optim),
            config=deepspeed_config(config, place.world_size, overlay),
            dist_init_required=False,
        )
        # A sum over one worker would copy every gradient to a buffer and back: 3 % of a step on a CPU.
        self._engine.enable_backward_allreduce = self.stage > 0 or place.world_size > 1
        self._parameters = {name: p for name, p in self._engine.module.named_parameters()}

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        module: nn.Module = self._engine.module
        return module

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self._config.scale.zero_stage

    def step(self, parts: Sequence[tuple[CrystalBatch, Tensor]], batch_size: int, rate: float) -> Tensor:
        """One optimizer step over this worker's parts of a global batch of ``batch_size`` crystals.

        Gives this worker's share of the batch's mean loss (detached, 0-d): summed over workers it is the loss.
        """
        self._set_rate(rate)
        self._engine.train()
        # DeepSpeed takes the mean over workers and parts; the loss is a sum over the global batch.
        factor = self._place.world_size * len(parts)
        total = torch.zeros((), dtype=torch.float64, device=parts[0][1].device)
        for batch, target in parts:
            with self._breakdown.part("forward"):
                loss = loss_sum(self._engine(batch).float(), target, self._config.optim.loss_func) / batch_size
            with self._breakdown.part("backward"):
                self._engine.backward(loss * factor)
            with self._breakdown.part("update"):
                if self.stage == 0 and self._engine.is_gradient_accumulation_boundary():
                    self._clip()
                self._engine.step()
            total += loss.detach()
        return total

    def _clip(self) -> None:
        """Clip the reduced gradients: DeepSpeed's own clipping at stage 0 keeps the norm to itself."""
        limit = self._config.optim.clip_norm or math.inf
        self._norm = nn.utils.clip_grad_norm_(self._parameters.values(), limit)

    @property
    def gradient_norm(self) -> float | None:
        """Global norm of the last step's gradient before clipping; None before the first step."""
        norm = self._norm if self.stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @torch.no_grad()
    def predict(self, batch: CrystalBatch) -> Tensor:
        """(B, T) normalized outputs in evaluation mode. At stage 3 all workers must call it together."""
        self._engine.eval()
        output: Tensor = self._engine(batch)
        return output.float()

    def _set_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    # Canonical state -------------------------------------------------------------------------------------------

    def weights(self) -> Tensors:
        """The whole state dict, on the CPU, on every worker."""
        deepspeed = load_deepspeed()

        with deepspeed.zero.GatheredParameters(list(self._parameters.values()), enabled=self.stage == 3):
            return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def optimizer_state(self) -> OptimizerState:
        """Adam's moments in full, on the CPU, on every worker; empty before the first step."""
        base = self._base_optimizer
        steps = [int(state["step"]) for state in base.state.values() if "step" in state]
        if not steps:
            return OptimizerState(moments={}, step=0)
        self._link_moments()
        moments = {
            f"{moment}.{name}": self._moment(name, moment).detach().cpu().reshape(_whole_shape(p)).clone()
            for name, p in self._parameters.items()
            for moment in MOMENTS
        }
        return OptimizerState(moments=moments, step=max(steps))

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Take up Adam's state where ``optimizer_state`` left it, on any number of workers and at any stage."""
        if state.step == 0:
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        base = self._base_optimizer
        for slot in self._optimizer_slots():
            base.state[slot] = {
                "step": torch.tensor(float(state.step), device=slot.device),
                **{moment: torch.zeros_like(slot) for moment in MOMENTS},
            }
        self._link_moments()
        for name, p in self._parameters.items():
            for moment in MOMENTS:
                value = state.moments[f"{moment}.{name}"].to(p.device)
                if self.stage == 0:
                    base.state[p][moment].copy_(value)
                elif self.stage < 3:
                    safe_set_full_optimizer_state(p, value, moment)
                else:  # DeepSpeed's full setter fails where the last worker's shard is padded
                    safe_set_local_optimizer_state(p, _shard(value, p.ds_tensor, self._place.rank), moment)

    def _link_moments(self) -> None:
        """Let every parameter find its moments at stages 1 and 2.

        DeepSpeed (0.19.8) links all groups after the first group's first step, when the others have no moments yet.
        """
        if self.stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _moment(self, name: str, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self.stage == 0:
            value: Tensor = self._base_optimizer.state[parameter][moment]
            return value
        found = safe_get_full_optimizer_state(parameter, moment)
        if found is None:
            raise RuntimeError(f"DeepSpeed holds no {moment} of {name}")
        whole: Tensor = found
        return whole

    def _optimizer_slots(self) -> list[Tensor]:
        """The tensors that key the base optimizer's state on this worker."""
        optimizer = self._engine.optimizer
        if self.stage == 0:
            return list(self._parameters.values())
        groups = "single_partition_of_fp32_groups" if self.stage < 3 else "fp32_partitioned_groups_flat"
        slots: list[Tensor] = getattr(optimizer, groups)
        return slots

    @property
    def _base_optimizer(self) -> Any:  # noqa: ANN401 - torch's optimizer under DeepSpeed's
        optimizer = self._engine.optimizer
        return optimizer if self.stage == 0 else optimizer.optimizer

    # Averaged weights ------------------------------------------------------------------------------------------

    def shards(self) -> list[Tensor]:
        """What this worker holds of each parameter: all of it, or its shard at stage 3."""
        if self.stage == 3:
            return [p.ds_tensor for p in self._parameters.values()]
        return [p.data for p in self._parameters.values()]

    def gathered(self, shards: Sequence[Tensor]) -> Tensors:
        """The full weights, on the CPU, that ``shards`` stand for; buffers are the model's."""
        with self._borrowing(self.shards(), shards):
            return self.weights()

    @contextmanager
    def loaded(self, weights: Tensors) -> Iterator[None]:
        """Within, the model has other weights and buffers, given in full; afterwards its own again."""
        buffers = dict(self.module.named_buffers())
        others = [*self.shards_of(weights), *(weights[name] for name in buffers)]
        with self._borrowing([*self.shards(), *buffers.values()], others):
            yield

    @contextmanager
    def _borrowing(self, own: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
        """Within, ``own`` tensors of the model hold ``others``."""
        kept = [value.clone() for value in own]
        self._release_gathered()
        _copy(own, others)
        try:
            yield
        finally:
            self._release_gathered()
            _copy(own, kept)

    def _release_gathered(self) -> None:
        """Stage 3 keeps the full weights of an evaluation for the next forward; drop them, the shards will change."""
        if self.stage == 3:
            self._engine.empty_partition_cache()

    def shards_of(self, weights: Tensors) -> list[Tensor]:
        """The shards of full weights given by name, as ``shards`` would give them."""
        full = {name: weights[name].to(p.device) for name, p in self._parameters.items()}
        if self.stage != 3:
            return list(full.values())
        return [_shard(full[name], p.ds_tensor, self._place.rank) for name, p in self._parameters.items()]


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, also where ZeRO 3 has taken its data away."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _shard(value: Tensor, like: Tensor, rank: int) -> Tensor:
    flat = value.flatten()
    size = like.numel()
    part = flat[rank * size : (rank + 1) * size]
    return functional.pad(part, (0, size - part.numel())).to(like.dtype)


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


class AveragedWeights:
    """The running mean of the weights after every step of the last epochs."""

    def __init__(self, engine: Engine, restored: Tensors | None = None, count: int = 0) -> None:
        """Begin at nothing, or with ``restored`` weights that stand for ``count`` steps."""
        self._engine = engine
        self.count = count
        self.shards = [s.clone() for s in (engine.shards() if restored is None else engine.shards_of(restored))]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the engine's weights."""
        self.count += 1
        torch._foreach_lerp_(self.shards, self._engine.shards(), 1.0 / self.count)
