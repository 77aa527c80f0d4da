"""The operator ``crystalformer::numba_attention``: what it takes, its fake and its gradient. Kernels: launch.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crystalformer.batch import PackedShells
from crystalformer.ops.numba.launch import Kernels, lengths_of
from crystalformer.ops.numba.pairs import PLANS, PairPlan
from crystalformer.ops.radial import RadialBasis

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of q, k and v. Everything is computed in float32."""


def refusal(device: torch.device, dtype: torch.dtype, *_: int) -> str | None:
    """Why the kernels do not take operands like these, or None where they do; all sizes will do."""
    if device.type != "cpu":
        return f"numba backend: needs tensors on the CPU, got {device}"
    if dtype not in DTYPES:
        return f"numba backend: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}"
    return None


def plan(shells: PackedShells) -> Tensor:
    """Handle of the plan of a batch's shells, made once."""
    if "pairs" not in shells.cache:
        shells.cache["pairs"] = PLANS.give(PairPlan.of(shells))
    handle: Tensor = shells.cache["pairs"]
    return handle


def kernels_of(
    shells: PackedShells, shape: tuple[int, int, int], radial: RadialBasis | None, cutoff_sigmas: float
) -> Kernels:
    """One layer's attention over a batch's shells for operands of a shape (N, H, D), without autograd."""
    basis = [] if radial is None else [float(radial.count), radial.r_max, radial.width]
    return _kernels(plan(shells), shape, basis, cutoff_sigmas)


def attend(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    shells: PackedShells,
    *,
    scale: float,
    cutoff_sigmas: float,
    radial: RadialBasis | None,
    weight: Tensor | None,
) -> Tensor:
    """Real-space attention (N, H, D); operands as in ``ops.periodic_attention``, ``shells`` within every reach.

    Raises ValueError for operands that are not on the CPU or in float64.
    """
    reason = refusal(q.device, q.dtype)
    if reason is not None:
        raise ValueError(reason)
    # Under torch.compile as the registered operator; its wrappers take longer than a small crystal's attention.
    attention = _attention if torch.compiler.is_compiling() else _Eager.apply
    y: Tensor = attention(
        q.float(),
        k.float(),
        v.float(),
        rho.float() / (2.0 * scale**2),
        None if weight is None else weight.float(),
        plan(shells),
        [] if radial is None else [float(radial.count), radial.r_max, radial.width],
        cutoff_sigmas,
    )[0]
    return y.to(q.dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor]:
    """y (N, H, D), and what the backward needs in one piece.

    q, k, v (N, H, D); precision (N, H) in 1/Å²; weight (H or 1, D, K) or None; handle: the PairPlan's; basis: K,
    r_max, width of the radial features, or nothing.
    """
    weight = None if weight is None else weight.contiguous()
    qkv = [t.contiguous() for t in (q, k, v)]
    return _kernels(handle, q.shape, basis, cutoff_sigmas).forward(qkv, precision.contiguous(), weight)


def _kernels(handle: Tensor, shape: Sequence[int], basis: Sequence[float], cutoff_sigmas: float) -> Kernels:
    n, heads, features = shape
    made = PLANS.plan(handle)
    if len(made.arrays.order) != n:
        raise RuntimeError(f"numba backend: the plan is of {len(made.arrays.order)} atoms, the operands of {n}")
    return Kernels(made, (n, heads, features), tuple(basis), cutoff_sigmas)


_attention = torch.library.custom_op("crystalformer::numba_attention", _forward, mutates_args=())


def _backward(
    dy: Tensor, memory: Tensor, handle: Tensor, basis: Sequence[float], cutoff_sigmas: float, weight_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (N, H, D), precision (N, H), weight (weight_heads, D, K), from what the forward kept."""
    return _kernels(handle, dy.shape, basis, cutoff_sigmas).backward(dy.contiguous(), memory, weight_heads)


_attention_backward = torch.library.custom_op("crystalformer::numba_attention_backward", _backward, mutates_args=())


@_attention.register_fake
def _attention_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor]:
    lengths = lengths_of(q.shape, int(basis[0]) if basis else 0)
    return q.new_empty(q.shape), q.new_empty(sum(lengths))


@_attention_backward.register_fake
def _attention_backward_shapes(
    dy: Tensor, memory: Tensor, handle: Tensor, basis: Sequence[float], cutoff_sigmas: float, weight_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, heads, features = dy.shape
    dq, dk, dv = (dy.new_empty(dy.shape) for _ in range(3))
    bases = int(basis[0]) if weight_heads else 0
    return dq, dk, dv, dy.new_empty(n, heads), dy.new_empty(weight_heads, features, bases)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's context
    weight, handle, ctx.basis, ctx.cutoff_sigmas = inputs[4:]
    ctx.weight_heads = 0 if weight is None else len(weight)
    ctx.save_for_backward(output[1], handle)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return _gradients(ctx, dy, _attention_backward)


def _gradients(ctx: Any, dy: Tensor | None, backward: Callable[..., Any]) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Gradients of the operator's operands, by its registered backward or the function behind it."""
    if dy is None:
        return (None,) * 8
    settings = ctx.basis, ctx.cutoff_sigmas, ctx.weight_heads
    *gradients, dweight = backward(dy.contiguous(), *ctx.saved_tensors, *settings)
    return *gradients, dweight if ctx.weight_heads else None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator outside torch.compile.

    Without a setup_context of its own: where there is one, torch inspects forward's signature at every call (45 µs).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's context, the operator's
        """As the operator's."""
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """As the operator's."""
        return _gradients(ctx, dy, _backward)
