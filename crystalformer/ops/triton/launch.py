"""Checks, allocation, grids and autograd of the Triton kernels.

Two torch.library operators: ``crystalformer::triton_moments`` sums values and radial features with the softmax
weights, ``crystalformer::triton_moments_backward`` is its gradient. Applying W to the sums, one product an atom, is
plain PyTorch around them. Legend of shapes: kernels.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from crystalformer.batch import PackedShells
from crystalformer.ops.radial import RadialBasis
from crystalformer.ops.triton import kernels
from crystalformer.ops.triton.rows import rows_of
from crystalformer.ops.triton.tiles import Tiles, options

LOG2_E = math.log2(math.e)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of q, k and v. Sums are float32 whatever they are."""

INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET=1 was set when triton was imported: the kernels run on CPU tensors, slowly."""

POINTER_TYPES = {
    "row_start_ptr": "i64",
    "neighbor_ptr": "i32",
    "partner_ptr": "i32",
    "row_end_ptr": "i32",
    **dict.fromkeys(
        ("distance_ptr", "log_count_ptr", "rho_ptr", "y_ptr", "sums_ptr", "lse_ptr", "dy_ptr", "dsums_ptr"), "fp32"
    ),
    **dict.fromkeys(("drho_ptr", "weights_ptr"), "fp32"),
}
"""Element types of the kernels' arrays; those not listed have q's."""


def driver_problem() -> str | None:
    """Why Triton cannot launch kernels on this machine's GPU, or None.

    It compiles its way to the driver when it is first used, with the machine's C compiler and Python's headers, and
    keeps it on disk.
    """
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 - compilers and loaders fail in ways of their own
        return f"triton backend: cannot launch kernels: {' '.join(str(error).split()):.300}"
    return None


_DRIVER_PROBLEM = driver_problem() if torch.cuda.is_available() and not INTERPRETED else None


def refusal(device: torch.device, dtype: torch.dtype, heads: int, features: int, bases: int) -> str | None:
    """Why the kernels do not take H heads of D features with K radial bases, or None where they do."""
    try:
        validate(device, dtype, heads, features, bases)
    except ValueError as error:
        return str(error)
    return None


def validate(device: torch.device, dtype: torch.dtype, heads: int, features: int, bases: int) -> None:
    """ValueError with the reason where the kernels do not take H heads of D features with K radial bases."""
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            raise ValueError(f"triton backend: needs compute capability 8.0 or newer, {device} has {found}")
        if _DRIVER_PROBLEM is not None:
            raise ValueError(_DRIVER_PROBLEM)
    elif not (INTERPRETED and device.type == "cpu"):
        raise ValueError(f"triton backend: needs tensors on a GPU, got {device} (TRITON_INTERPRET=1 takes the CPU's)")
    if dtype not in DTYPES:
        raise ValueError(f"triton backend: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    Tiles.fitting(heads, features, bases)


def attend(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    shells: PackedShells,
    *,
    scale: float,
    cutoff_sigmas: float,
    radial: RadialBasis | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Real-space attention (N, H, D); operands as in ``ops.periodic_attention``, ``shells`` within every reach.

    q, k, v float32, bfloat16 or float16; the result has q's dtype. The product with W is a linear layer like those
    around it: in TF32 where the program allows that. What goes into exponents never is.
    """
    validate(q.device, q.dtype, q.shape[1], q.shape[2], 0 if radial is None else radial.count)
    if not (q.dtype == k.dtype == v.dtype) or not (q.shape == k.shape == v.shape):
        raise ValueError(f"q, k and v must be alike, got {[(tuple(t.shape), t.dtype) for t in (q, k, v)]}")
    if len(shells.ptr) - 1 != len(q):
        raise ValueError(f"shells must cover {len(q)} atoms, got {len(shells.ptr) - 1}")
    rows = rows_of(shells)
    y, sums, _, _ = moments(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        rho.float().contiguous(),
        rows.start,
        rows.neighbor,
        rows.partner,
        rows.distance,
        rows.log_count,
        scale,
        cutoff_sigmas,
        0 if radial is None else radial.count,
        1.0 if radial is None else radial.r_max / radial.count,
        1.0 if radial is None else radial.width,
    )
    if radial is not None and weight is not None:
        with torch.autocast(q.device.type, enabled=False):
            heads = weight.float().expand(q.shape[1], -1, -1)
            y = y + torch.bmm(sums, heads.transpose(1, 2)).transpose(0, 1)
    result: Tensor = y.to(q.dtype)
    return result


@torch.library.custom_op("crystalformer::triton_moments", mutates_args=())
def moments(  # noqa: PLR0913 - an operator takes its operands one by one
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    row_start: Tensor,
    neighbor: Tensor,
    partner: Tensor,
    distance: Tensor,
    log_count: Tensor,
    scale: float,
    cutoff_sigmas: float,
    bases: int,
    step: float,
    width: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (N, H, D), sums (H, N, K), lse (N, H), all float32, and row_end (N,) of contiguous operands.

    scale, step and width in Å; step: distance of two radial centers.
    """
    n, heads, features = q.shape
    q, k, v, rho = map(_aligned, (q, k, v, rho))
    y, sums, lse, row_end = _moments_like(q, bases)
    tiles = Tiles.fitting(heads, features, bases)
    with _on(q.device):
        kernels.forward_kernel[(n, tiles.groups)](
            q,
            k,
            v,
            rho,
            row_start,
            neighbor,
            distance,
            log_count,
            y,
            sums,
            lse,
            row_end,
            n,
            LOG2_E / math.sqrt(features),
            LOG2_E / (2.0 * scale**2),
            cutoff_sigmas * scale,
            step,
            math.sqrt(0.5 * LOG2_E) / width,
            **tiles.forward_constants(_backend()),
            **options(tiles.forward_warps),
        )
    return y, sums, lse, row_end


def _moments_like(q: Tensor, bases: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, heads, _ = q.shape
    return (
        torch.empty_like(q, dtype=torch.float32),
        q.new_empty((heads, n, bases), dtype=torch.float32),
        q.new_empty((n, heads), dtype=torch.float32),
        q.new_empty((n,), dtype=torch.int32),
    )


@moments.register_fake
def _moments_fake(q: Tensor, *operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ANN401 - torch's
    return _moments_like(q, operands[10])


@torch.library.custom_op("crystalformer::triton_moments_backward", mutates_args=())
def moments_backward(  # noqa: PLR0913 - an operator takes its operands one by one
    dy: Tensor,
    dsums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    y: Tensor,
    sums: Tensor,
    lse: Tensor,
    row_end: Tensor,
    row_start: Tensor,
    neighbor: Tensor,
    partner: Tensor,
    distance: Tensor,
    log_count: Tensor,
    scale: float,
    step: float,
    width: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv (N, H, D) like q and drho (N, H); contiguous operands.

    The query pass leaves each row's p and dlogit in a scratch array (S, 2, H), which the key pass reads at the rows'
    partners: 64 bytes a row at 8 heads, in place of 2 KB of dsums that a key pass of its own would have to gather.
    """
    n, heads, features = q.shape
    dy, dsums, q, k, v, rho = map(_aligned, (dy, dsums, q, k, v, rho))
    dq, dk, dv, drho = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(rho)
    weights = q.new_empty((len(neighbor), 2, heads), dtype=torch.float32)
    tiles = Tiles.fitting(heads, features, sums.shape[2])
    score_scale = LOG2_E / math.sqrt(features)
    numbers = (n, score_scale, LOG2_E / (2.0 * scale**2), step, math.sqrt(0.5 * LOG2_E) / width)
    listed = (row_start, neighbor, distance, log_count)
    kept = (y, sums, lse, row_end, dy, dsums)
    with _on(q.device):
        kernels.query_backward_kernel[(n, tiles.groups)](
            *(q, k, v, rho, *listed, *kept, dq, drho, weights, *numbers),
            **tiles.query_constants(_backend()),
            **options(tiles.warps),
        )
        kernels.key_backward_kernel[(n, tiles.groups)](
            *(q, dy, row_start, neighbor, partner, row_end, weights, dk, dv, score_scale),
            **tiles.key_constants(),
            **options(tiles.warps),
        )
    return dq, dk, dv, drho


@moments_backward.register_fake
def _moments_backward_fake(
    dy: Tensor,
    dsums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    *operands: Any,  # noqa: ANN401 - tensors and numbers that do not shape the results
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(rho)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401 - torch's context
    tensors, numbers = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors[:4], *output, *tensors[4:])
    ctx.scale, _, _, ctx.step, ctx.width = numbers
    ctx.mark_non_differentiable(output[2], output[3])


def _gradient(ctx: Any, dy: Tensor, dsums: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
    gradients = moments_backward(
        dy.contiguous(), dsums.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.step, ctx.width
    )
    return *gradients, *(None,) * 10


moments.register_autograd(_gradient, setup_context=_keep)


def _aligned(tensor: Tensor) -> Tensor:
    """At an address that is a multiple of 16 bytes, as fresh tensors are; other addresses would compile anew."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _backend() -> str:
    """Triton's name of what runs the kernels; the interpreter multiplies float32 exactly, as AMD's GPUs do."""
    return "cuda" if torch.version.hip is None and not INTERPRETED else "hip"


def _on(device: torch.device) -> torch.cuda.device:
    """Kernels start on the current GPU: make it the tensors'; does nothing for the CPU."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)
