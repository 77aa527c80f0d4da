"""Triton kernels of real-space periodic attention; only ``@triton.jit`` code. launch.py calls them.

A program is one atom and one group of heads. It walks the atom's rows of the shell list (neighbors.py: sorted by
distance) in tiles of ROWS and never meets another program's output, so nothing is atomic and results repeat bit for
bit. Widths are padded to powers of two; the padding is masked. Scores are in base 2, because exp2 is one instruction.

Legend of shapes (CAPITALS are compile-time constants)
    N atoms (num_atoms) · HEADS H · FEATURES D · BASES K, the real sizes; GROUP heads of a program, WIDTH >= D and
    BASIS >= K powers of two (K = 0: no radial values) · CHUNK radial bases at a time · ROWS shell rows of a tile ·
    S rows of the whole list
    q, k, v, y (N, H, D) · rho, lse (N, H) · sums (H, N, K): radial features summed with the softmax weights
    row_start (N+1,) int64 · neighbor, partner, row_end int32 · distance (Å), log_count (base 2) float32, all (S,) but
    row_end (N,): one past the last row that the atom's own reach calls for
    An atom's rows begin at a multiple of ALIGNED, the least tile height, and are filled up with rows without weight
    (rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_part(
    HEADS: tl.constexpr, FEATURES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A program's atom (int64) and heads (GROUP,), their columns in an atom's row, and which are no padding."""
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    feature = tl.arange(0, WIDTH)
    columns = head[:, None] * FEATURES + feature[None, :]
    inside = (head < HEADS)[:, None] & (feature < FEATURES)[None, :]
    return tl.program_id(0).to(tl.int64), head, columns, inside


@triton.jit
def radial_tile(distance: tl.tensor, basis: tl.tensor, step: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """(ROWS, len(basis)): Gaussians at (basis + 1) * step of distances (ROWS,), Å; inverse sqrt(log2(e)/2)/width."""
    offset = (distance * inverse)[:, None] - ((basis + 1).to(tl.float32) * (step * inverse))[None, :]
    return tl.exp2(-(offset * offset))


@triton.jit
def load_rows(
    neighbor_ptr: tl.tensor,
    distance_ptr: tl.tensor,
    log_count_ptr: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """neighbor, distance and log_count of an atom's rows (ROWS,); those past its count get the logit -inf.

    Counts are whole tiles of the least height, so only higher tiles can go past the end: there lie other atoms' rows.
    """
    neighbor = tl.load(neighbor_ptr + first + row)
    distance = tl.load(distance_ptr + first + row)
    log_count = tl.load(log_count_ptr + first + row)
    if MASKED:
        log_count = tl.where(row < count, log_count, float("-inf"))
    return neighbor, distance, log_count


@triton.jit
def load_atoms(
    values_ptr: tl.tensor,
    atom: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
) -> tl.tensor:
    """(ROWS, GROUP, WIDTH) float32: the features of the atoms (ROWS,), 0 in the padding."""
    start = atom.to(tl.int64) * (HEADS * FEATURES)
    pointers = values_ptr + start[:, None, None] + columns[None, :, :]
    if PADDED:
        return tl.load(pointers, mask=inside[None, :, :], other=0.0).to(tl.float32)
    return tl.load(pointers).to(tl.float32)


@triton.jit(do_not_specialize=["num_atoms"])
def forward_kernel(  # noqa: PLR0913 - a kernel takes its operands one by one
    # data
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    rho_ptr: tl.tensor,
    # shell list
    row_start_ptr: tl.tensor,
    neighbor_ptr: tl.tensor,
    distance_ptr: tl.tensor,
    log_count_ptr: tl.tensor,
    # results
    y_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    row_end_ptr: tl.tensor,
    # sizes and numbers
    num_atoms: tl.tensor,
    score_scale: tl.tensor,
    decay: tl.tensor,
    reach_scale: tl.tensor,
    step: tl.tensor,
    inverse: tl.tensor,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    BASES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BASIS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """y = sum p v and sums = sum p b(d) of one atom and head group, by one online softmax over its shell rows.

    Row t of atom i has the base-2 logit score_scale q_i k_j - decay rho_i d² + log2 count. The atom's reach is
    reach_scale / sqrt(its smallest rho), Å; the tile in which it ends counts whole. Also keeps lse (base 2) and
    row_end for the backward.
    """
    atom, head, columns, inside = program_part(HEADS, FEATURES, GROUP, WIDTH)
    own = atom * (HEADS * FEATURES) + columns
    q = tl.load(q_ptr + own, mask=inside, other=0.0).to(tl.float32) * score_scale
    slope = tl.load(rho_ptr + atom * HEADS + head, mask=head < HEADS, other=1.0) * decay

    every_head = tl.arange(0, ALL_HEADS)
    rho = tl.load(rho_ptr + atom * HEADS + every_head, mask=every_head < HEADS, other=float("inf"))
    reach = reach_scale / tl.sqrt(tl.min(rho, axis=0))
    first = tl.multiple_of(tl.load(row_start_ptr + atom), ALIGNED)
    listed = (tl.load(row_start_ptr + atom + 1) - first).to(tl.int32)
    count = 0
    for start in range(0, listed, 128):
        row = start + tl.arange(0, 128)
        near = tl.load(distance_ptr + first + row, mask=row < listed, other=float("inf")) <= reach
        count += tl.sum(near.to(tl.int32), axis=0)
    count = (count + (ALIGNED - 1)) // ALIGNED * ALIGNED

    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    y = tl.zeros((GROUP, WIDTH), tl.float32)
    if BASIS > 0:
        basis = tl.arange(0, BASIS)
        sums = tl.zeros((BASIS, GROUP), tl.float32)
    tile = tl.arange(0, ROWS)
    for start in range(0, count, ROWS):
        row = start + tile
        neighbor, distance, log_count = load_rows(
            neighbor_ptr, distance_ptr, log_count_ptr, first, row, count, ROWS > ALIGNED
        )
        key = load_atoms(k_ptr, neighbor, columns, inside, HEADS, FEATURES, PADDED)
        logit = tl.sum(key * q[None, :, :], axis=2) + log_count[:, None]
        logit -= (distance * distance)[:, None] * slope[None, :]
        new_top = tl.maximum(top, tl.max(logit, axis=0))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(logit - new_top[None, :])
        value = load_atoms(v_ptr, neighbor, columns, inside, HEADS, FEATURES, PADDED)
        total = total * shrink + tl.sum(p, axis=0)
        y = y * shrink[:, None] + tl.sum(p[:, :, None] * value, axis=0)
        if BASIS > 0:
            features = radial_tile(distance, basis, step, inverse)
            sums = tl.dot(tl.trans(features), p, acc=sums * shrink[None, :], input_precision=PRECISION)
        top = new_top

    tl.store(y_ptr + own, y / total[:, None], mask=inside)
    tl.store(lse_ptr + atom * HEADS + head, top + tl.log2(total), mask=head < HEADS)
    tl.store(row_end_ptr + atom, (first + count).to(tl.int32), mask=tl.program_id(1) == 0)
    if BASIS > 0:
        place = (head[None, :].to(tl.int64) * num_atoms + atom) * BASES + basis[:, None]
        kept = (head < HEADS)[None, :] & (basis < BASES)[:, None]
        tl.store(sums_ptr + place, sums / total[None, :], mask=kept)


@triton.jit(do_not_specialize=["num_atoms"])
def query_backward_kernel(  # noqa: PLR0913 - a kernel takes its operands one by one
    # data
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    rho_ptr: tl.tensor,
    # shell list
    row_start_ptr: tl.tensor,
    neighbor_ptr: tl.tensor,
    distance_ptr: tl.tensor,
    log_count_ptr: tl.tensor,
    # kept by the forward
    y_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    row_end_ptr: tl.tensor,
    # gradients of the results
    dy_ptr: tl.tensor,
    dsums_ptr: tl.tensor,
    # results
    dq_ptr: tl.tensor,
    drho_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    # sizes and numbers
    num_atoms: tl.tensor,
    score_scale: tl.tensor,
    decay: tl.tensor,
    step: tl.tensor,
    inverse: tl.tensor,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    BASES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """dq and drho of one atom, and every used row's p and dlogit: weights (S, 2, H), read by key_backward_kernel.

    dlogit = p (dy_i v_j + dsums_i b(d) - delta_i), delta_i = dy_i y_i + dsums_i sums_i, natural units.
    """
    atom, head, columns, inside = program_part(HEADS, FEATURES, GROUP, WIDTH)
    own = atom * (HEADS * FEATURES) + columns
    q = tl.load(q_ptr + own, mask=inside, other=0.0).to(tl.float32) * score_scale
    dy = tl.load(dy_ptr + own, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(rho_ptr + atom * HEADS + head, mask=head < HEADS, other=1.0) * decay
    lse = tl.load(lse_ptr + atom * HEADS + head, mask=head < HEADS, other=0.0)
    delta = tl.sum(dy * tl.load(y_ptr + own, mask=inside, other=0.0), axis=1)
    basis = tl.arange(0, CHUNK)
    place = (head[None, :].to(tl.int64) * num_atoms + atom) * BASES + basis[:, None]
    for chunk in range(0, BASES, CHUNK):
        kept = (head < HEADS)[None, :] & (chunk + basis < BASES)[:, None]
        part = tl.load(dsums_ptr + place + chunk, mask=kept, other=0.0)
        delta += tl.sum(part * tl.load(sums_ptr + place + chunk, mask=kept, other=0.0), axis=0)
    if BASES > 0 and BASES <= CHUNK:
        dsums = tl.load(dsums_ptr + place, mask=(head < HEADS)[None, :] & (basis < BASES)[:, None], other=0.0)

    dq = tl.zeros((GROUP, WIDTH), tl.float32)
    dslope = tl.zeros((GROUP,), tl.float32)
    first = tl.multiple_of(tl.load(row_start_ptr + atom), ALIGNED)
    count = tl.load(row_end_ptr + atom) - first.to(tl.int32)
    tile = tl.arange(0, ROWS)
    for start in range(0, count, ROWS):
        row = start + tile
        neighbor, distance, log_count = load_rows(
            neighbor_ptr, distance_ptr, log_count_ptr, first, row, count, ROWS > ALIGNED
        )
        value = load_atoms(v_ptr, neighbor, columns, inside, HEADS, FEATURES, PADDED)
        dp = tl.sum(value * dy[None, :, :], axis=2)
        if BASES > CHUNK:
            for chunk in range(0, BASES, CHUNK):
                kept = (head < HEADS)[None, :] & (chunk + basis < BASES)[:, None]
                part = tl.load(dsums_ptr + place + chunk, mask=kept, other=0.0)
                features = radial_tile(distance, chunk + basis, step, inverse)
                dp = tl.dot(features, part, acc=dp, input_precision=PRECISION)
        elif BASES > 0:
            features = radial_tile(distance, basis, step, inverse)
            dp += tl.dot(features, dsums, input_precision=PRECISION)
        # After the values are done with: both at once filled the registers.
        key = load_atoms(k_ptr, neighbor, columns, inside, HEADS, FEATURES, PADDED)
        squared = (distance * distance)[:, None]
        logit = tl.sum(key * q[None, :, :], axis=2) + log_count[:, None] - squared * slope[None, :]
        p = tl.exp2(logit - lse[None, :])
        dlogit = p * (dp - delta[None, :])
        dq += tl.sum(dlogit[:, :, None] * key, axis=0)
        dslope += tl.sum(dlogit * squared, axis=0)
        target = weights_ptr + first * (2 * HEADS) + row[:, None] * (2 * HEADS) + head[None, :]
        kept_row = (head < HEADS)[None, :]
        if ROWS > ALIGNED:
            kept_row = (row < count)[:, None] & kept_row
        tl.store(target, p, mask=kept_row)
        tl.store(target + HEADS, dlogit, mask=kept_row)

    natural = 0.6931471805599453  # ln 2: score_scale and decay carry log2(e)
    tl.store(dq_ptr + own, dq * (score_scale * natural), mask=inside)
    tl.store(drho_ptr + atom * HEADS + head, dslope * (-decay * natural), mask=head < HEADS)


@triton.jit
def key_backward_kernel(  # noqa: PLR0913 - a kernel takes its operands one by one
    # data
    q_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    # shell list and what the query pass left
    row_start_ptr: tl.tensor,
    neighbor_ptr: tl.tensor,
    partner_ptr: tl.tensor,
    row_end_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    # results
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    # numbers
    score_scale: tl.tensor,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """dk_j = sum dlogit q_i / sqrt(D) and dv_j = sum p dy_i over the atoms i that see j: j's own list, transposed.

    Row s = (j, i, d) of the list has its partner row (i, j, d); it counts where that lies within i's reach.
    """
    atom, head, columns, inside = program_part(HEADS, FEATURES, GROUP, WIDTH)
    dk = tl.zeros((GROUP, WIDTH), tl.float32)
    dv = tl.zeros((GROUP, WIDTH), tl.float32)
    first = tl.multiple_of(tl.load(row_start_ptr + atom), ALIGNED)
    listed = (tl.load(row_start_ptr + atom + 1) - first).to(tl.int32)
    tile = tl.arange(0, ROWS)
    for start in range(0, listed, ROWS):
        row = start + tile
        query = tl.load(neighbor_ptr + first + row)
        partner = tl.load(partner_ptr + first + row)
        used = partner < tl.load(row_end_ptr + query)
        if ROWS > ALIGNED:
            used = used & (row < listed)
        if tl.max(used.to(tl.int32), axis=0) > 0:
            source = weights_ptr + partner.to(tl.int64)[:, None] * (2 * HEADS) + head[None, :]
            kept = used[:, None] & (head < HEADS)[None, :]
            p = tl.load(source, mask=kept, other=0.0)
            dlogit = tl.load(source + HEADS, mask=kept, other=0.0)
            q = load_atoms(q_ptr, query, columns, inside, HEADS, FEATURES, PADDED)
            dk += tl.sum(dlogit[:, :, None] * q, axis=0)
            dy = load_atoms(dy_ptr, query, columns, inside, HEADS, FEATURES, PADDED)
            dv += tl.sum(p[:, :, None] * dy, axis=0)
    own = atom * (HEADS * FEATURES) + columns
    tl.store(dk_ptr + own, dk * (score_scale * 0.6931471805599453), mask=inside)
    tl.store(dv_ptr + own, dv, mask=inside)
