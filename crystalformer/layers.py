"""Attention module and encoder block. Legend of shapes: batch.py; model_dim = H*D."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig
from crystalformer.ops import RadialBasis, check_backend, periodic_attention, prepare
from crystalformer.positive import positive

AllReduce = Callable[[Tensor], Tensor]
"""Sums a small float64 tensor over all workers."""


class PeriodicAttention(nn.Module):
    """Multi-head attention over the infinite crystal, in real or reciprocal space or half and half."""

    statistics: Tensor

    def __init__(self, config: ModelConfig, layer: int, backend: str = "auto") -> None:
        super().__init__()
        dim, heads = config.model_dim, config.head_num
        self.config, self.layer, self.backend, self.positive = config, layer, backend, config.positive
        domain = config.layer_domain(layer)
        for part in ("real", "reci") if domain == "multihead" else (domain,):
            check_backend(backend, part)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.gauss_direction = nn.Parameter(torch.empty(heads, config.head_dim))
        self.radial = _radial_basis(config, layer)
        self.radial_weight: nn.Parameter | None = None
        if self.radial is not None:
            real_heads = heads // 2 if config.layer_domain(layer) == "multihead" else heads
            shape = (real_heads if config.value_pe_headed else 1, config.head_dim, self.radial.count)
            self.radial_weight = nn.Parameter(torch.empty(shape))
        # (s, t): frozen at the first training batch; s = 0 says that this has not happened yet.
        self.register_buffer("statistics", torch.zeros(2))
        self._known_frozen = False
        self.register_load_state_dict_post_hook(_forget_frozen)
        self._initialize()

    def _initialize(self) -> None:
        """T-Fixup's scheme without layer norm (model.md, section 3)."""
        gain = 0.67 * self.config.num_layers**-0.25
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        with torch.no_grad():
            self.v_proj.weight.mul_(gain)
            self.out_proj.weight.mul_(gain)
        nn.init.normal_(self.gauss_direction, std=self.config.head_dim**-0.5)
        if self.radial_weight is not None:
            matrix = self.radial_weight.detach().view(-1, self.radial_weight.shape[-1])
            rows, bases = matrix.shape
            # In multihead the matrix is that of all heads, of which the reciprocal ones have no use for their part.
            all_rows = self.config.head_dim * (self.config.head_num if self.config.value_pe_headed else 1)
            spread = ((rows + bases) / (all_rows + bases)) ** 0.5
            nn.init.xavier_uniform_(matrix, gain=spread * bases**-0.5)

    @property
    def frozen(self) -> bool:
        """Whether s and t were taken from a first training batch (or loaded).

        A yes is remembered: asking a GPU at every step would make the host wait for it.
        """
        if not self._known_frozen:
            self._known_frozen = bool(self.statistics[0] != 0)
        return self._known_frozen

    @torch.no_grad()
    def freeze_statistics(
        self, x: Tensor, all_reduce: AllReduce | None = None, multiplicity: Tensor | None = None
    ) -> None:
        """Set s and t from the features x (N, model_dim) of the first training batch, over all workers and heads.

        multiplicity (N,): how many atoms each of them stands for; None: one.
        """
        q = self.q_proj(x).view(len(x), self.config.head_num, -1)
        a = (q * self.gauss_direction).sum(-1).double()
        times = torch.ones_like(a) if multiplicity is None else multiplicity.to(a).unsqueeze(-1).expand_as(a)
        sums = torch.stack([(times * a).sum(), (times * a.square()).sum(), times.sum()])
        total, squares, count = (sums if all_reduce is None else all_reduce(sums)).unbind()
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)
        if not bool(variance > 0):
            raise ValueError("the first training batch has no spread in its Gaussian parameters; is it one atom?")
        self.statistics.copy_(torch.stack([variance.rsqrt(), -mean]))

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """(N, model_dim) from the atoms' features x (N, model_dim)."""
        config, n, heads = self.config, len(x), self.config.head_num
        q, k, v = (p(x).view(n, heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        domain = config.layer_domain(self.layer)
        if domain == "multihead":
            (q_0, q_1), (k_0, k_1), (v_0, v_1), (a_0, a_1) = (t.chunk(2, 1) for t in (q, k, v, self._arguments(q)))
            halves = [self._real(q_0, k_0, v_0, a_0, batch), self._reciprocal(q_1, k_1, v_1, a_1, batch)]
            y = torch.cat(halves, 1)
        else:
            attend = self._real if domain == "real" else self._reciprocal
            y = attend(q, k, v, self._arguments(q), batch)
        output: Tensor = self.out_proj(y.reshape(n, -1))
        return output

    def _real(self, q: Tensor, k: Tensor, v: Tensor, argument: Tensor, batch: CrystalBatch) -> Tensor:
        """(N, heads, D) of the heads that attend in real space."""
        config = self.config
        return periodic_attention(
            q,
            k,
            v,
            positive(argument, self.positive, config.gauss_lb_real),
            batch,
            scale=config.layer_scale_real(self.layer),
            rho_min=config.gauss_lb_real,
            radial=self.radial,
            weight=self.radial_weight,
            cutoff_sigmas=config.cutoff_sigmas,
            backend=self.backend,
        )

    def _reciprocal(self, q: Tensor, k: Tensor, v: Tensor, argument: Tensor, batch: CrystalBatch) -> Tensor:
        """(N, heads, D) of the heads that attend in reciprocal space."""
        config = self.config
        return periodic_attention(
            q,
            k,
            v,
            positive(argument, self.positive, config.gauss_lb_reci),
            batch,
            scale=config.layer_scale_reci(self.layer),
            rho_min=config.gauss_lb_reci,
            cutoff_sigmas=config.cutoff_sigmas,
            domain="reci",
            backend=self.backend,
        )

    def prepare(self, batch: CrystalBatch) -> None:
        """Make what the attention backend keeps with a batch, as ``forward`` would."""
        config, like = self.config, self.gauss_direction
        domain = config.layer_domain(self.layer)
        cutoff, backend = config.cutoff_sigmas, self.backend
        if domain != "reci":
            scale, lower = config.layer_scale_real(self.layer), config.gauss_lb_real
            prepare(
                batch, like, scale=scale, rho_min=lower, radial=self.radial, cutoff_sigmas=cutoff, backend=backend
            )
        if domain != "real":
            scale, lower = config.layer_scale_reci(self.layer), config.gauss_lb_reci
            prepare(batch, like, scale=scale, rho_min=lower, cutoff_sigmas=cutoff, domain="reci", backend=backend)

    def _arguments(self, q: Tensor) -> Tensor:
        """(N, H): s (omega_h q_ih + t), what rho is taken of."""
        scale, shift = self.statistics.unbind()
        a = (q * self.gauss_direction).sum(-1)
        if not torch.compiler.is_compiling() and self.frozen:
            return scale * (a + shift)
        return torch.where(scale == 0, a, scale * (a + shift))


def _forget_frozen(module: nn.Module, _: object) -> None:
    """After loading, the buffer says anew whether it is frozen."""
    if isinstance(module, PeriodicAttention):
        module._known_frozen = False


def _radial_basis(config: ModelConfig, layer: int) -> RadialBasis | None:
    if config.value_pe_dist_real == 0 or config.layer_domain(layer) == "reci":
        return None
    r_max, count = config.radial_max(layer), config.value_pe_dist_real
    return RadialBasis(count=count, r_max=r_max, width=config.value_pe_width_scale * r_max / count)


class EncoderBlock(nn.Module):
    """x <- x + attention(x); x <- x + W2 relu(W1 x + b1) + b2. No layer norm."""

    def __init__(self, config: ModelConfig, layer: int, backend: str = "auto") -> None:
        super().__init__()
        self.attention = PeriodicAttention(config, layer, backend)
        self.linear1 = nn.Linear(config.model_dim, config.ff_dim)
        self.linear2 = nn.Linear(config.ff_dim, config.model_dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            with torch.no_grad():
                linear.weight.mul_(0.67 * config.num_layers**-0.25)

    @property
    def inside(self) -> tuple[nn.Module, ...]:
        """The block and all modules in it."""
        a = self.attention
        return self, a, a.q_proj, a.k_proj, a.v_proj, a.out_proj, self.linear1, self.linear2

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """(N, model_dim) from x (N, model_dim)."""
        x = x + self.attention(x, batch)
        hidden = self.linear2(functional.relu(self.linear1(x), inplace=True))
        result: Tensor = x + hidden
        return result
