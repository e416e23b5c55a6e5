"""The algebra of `algebra.py` as Triton kernels over tiles of logits in memory. Functions have the same names.

Logits are fp32 [n, w] as the matrix product left them; bias, softcap, temperature and excluded columns are applied on
the way in, so that no pass over memory is spent on them. One program takes one row: the sums of a row stay in
registers. Loads are 128 bits wide: they are masked by the row's stride, a multiple of 16, and read into the padding;
what counts is decided by the width w. Numbers and per-row pointers that change no load are not specialised on: a
ragged last chunk compiles nothing anew.

Names: b_ values of a block, i_ an index, p_ a pointer, o_ offsets of a block's elements, m_ a mask; constants in
capitals. A suffix _s is the student's, _t the teacher's; o_n are the rows [R] of a block and o_v its columns [N],
counted within the tile. Vectors over rows are broadcast as [:, None]. `stride_x` is the distance between two rows of
x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import algebra, names

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(names.MASKED)
IGNORE = tl.constexpr(names.IGNORE)

NO_TEACHER = tl.constexpr(names.NO_TEACHER)
REVERSE_KL = tl.constexpr(names.REVERSE_KL)
FORWARD_KL = tl.constexpr(names.FORWARD_KL)
JSD = tl.constexpr(names.JSD)
SKEW_REVERSE_KL = tl.constexpr(names.SKEW_REVERSE_KL)
SKEW_FORWARD_KL = tl.constexpr(names.SKEW_FORWARD_KL)

# Rows of partial sums.
MAX_S, SUM_S, DOT_S, PICK_S = (tl.constexpr(x) for x in (algebra.MAX_S, algebra.SUM_S, algebra.DOT_S, algebra.PICK_S))
MAX_T, SUM_T, DOT_T, PICK_T = (tl.constexpr(x) for x in (algebra.MAX_T, algebra.SUM_T, algebra.DOT_T, algebra.PICK_T))
CROSS, OWNED = tl.constexpr(algebra.CROSS), tl.constexpr(algebra.OWNED)

# Rows of statistics; the first three are those of upstream gradients, too.
DIVERGENCE, ENTROPY, LOGP = (tl.constexpr(x) for x in (algebra.DIVERGENCE, algebra.ENTROPY, algebra.LOGP))
TEACHER_LOGP, TEACHER_ENTROPY = tl.constexpr(algebra.TEACHER_LOGP), tl.constexpr(algebra.TEACHER_ENTROPY)
SHIFT_S, LOG_S = tl.constexpr(algebra.SHIFT_S), tl.constexpr(algebra.LOG_S)
SHIFT_T, LOG_T = tl.constexpr(algebra.SHIFT_T), tl.constexpr(algebra.LOG_T)
MEAN_SLOPE = tl.constexpr(algebra.MEAN_SLOPE)


@triton.jit
def exp(b_x):
    """Compute exp by the hardware's exp2; tl.exp adds a scaling for denormal results, which count as 0 here."""
    return tl.exp2(b_x * LOG2E)


@triton.jit
def scaled(b_z, bias, valid, b_inverse, o_v, m_v, CAP: tl.constexpr, SCALE: tl.constexpr = 1.0):
    """Scaled logits [R, N] of raw products; b_inverse [R] = 1/temperature or None; a column not in m_v is MASKED."""
    if bias is not None:
        b_z += tl.load(bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    if CAP > 0:
        b_z = CAP * (1 - 2 / (exp(2 / CAP * b_z) + 1))  # CAP tanh(z / CAP)
    if SCALE != 1.0:
        b_z *= SCALE
    if b_inverse is not None:
        b_z *= b_inverse[:, None]
    if bias is not None:
        b_z = tl.where(b_z < MASKED, MASKED, b_z)  # a bias of -inf is probability 0; NaN stays
    if valid is not None:
        m_v &= tl.load(valid + o_v, mask=m_v, other=0) != 0
    return tl.where(m_v[None, :], b_z, MASKED)


@triton.jit
def tile_logits(
    p_zs, p_zt, bias_s, bias_t, valid, b_inverse, o_v, w, stride_z,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Scaled logits [1, N] of both models from one row in memory; the student's twice where there is no teacher."""
    m_v = o_v < w
    m_row = (o_v < stride_z)[None, :]
    b_zs = tl.load(p_zs + o_v[None, :], mask=m_row, other=0.0)
    b_zs = scaled(b_zs, bias_s, valid, b_inverse, o_v, m_v, CAP_S)
    b_zt = b_zs
    if KIND != NO_TEACHER:
        b_zt = tl.load(p_zt + o_v[None, :], mask=m_row, other=0.0)
        b_zt = scaled(b_zt, bias_t, valid, b_inverse, o_v, m_v, CAP_T, SCALE_T)
    return b_zs, b_zt


@triton.jit
def row_values(x, o_n, m_n):
    """Values [R] of x at some rows, in fp32; None where x is None."""
    b_x = None
    if x is not None:
        b_x = tl.load(x + o_n, mask=m_n, other=1.0).to(tl.float32)
    return b_x


@triton.jit
def absorb(b_z, b_max, b_sum, b_dot):
    """One model's running maximum m, S = sum e and R = sum e u, u = z - m, over one more block.

    Also returns u, e, and the shift and the scale of the old sums.
    """
    b_new = tl.maximum(b_max, tl.max(b_z, 1))
    b_shift = b_max - b_new
    b_scale = exp(b_shift)
    b_u = b_z - b_new[:, None]
    b_e = exp(b_u)
    b_dot = b_scale * (b_dot + b_shift * b_sum) + tl.sum(b_e * b_u, 1)
    b_sum = b_scale * b_sum + tl.sum(b_e, 1)
    return b_new, b_sum, b_dot, b_u, b_e, b_shift, b_scale


@triton.jit
def absorb_both(b_zs, b_zt, b_max_s, b_sum_s, b_dot_s, b_max_t, b_sum_t, b_dot_t, b_cross, KIND: tl.constexpr):
    """The sums of `algebra.partial` over one more block of both models; b_zt is unused where there is no teacher."""
    b_old_s, b_old_t = b_sum_s, b_sum_t
    b_max_s, b_sum_s, b_dot_s, b_us, b_es, b_shift_s, b_scale_s = absorb(b_zs, b_max_s, b_sum_s, b_dot_s)
    if KIND != NO_TEACHER:
        b_max_t, b_sum_t, b_dot_t, b_ut, b_et, b_shift_t, b_scale_t = absorb(b_zt, b_max_t, b_sum_t, b_dot_t)
        if KIND == REVERSE_KL:
            b_cross = b_scale_s * (b_cross + (b_shift_s - b_shift_t) * b_old_s) + tl.sum(b_es * (b_us - b_ut), 1)
        elif KIND == FORWARD_KL:
            b_cross = b_scale_t * (b_cross + (b_shift_t - b_shift_s) * b_old_t) + tl.sum(b_et * (b_ut - b_us), 1)
    return b_max_s, b_sum_s, b_dot_s, b_max_t, b_sum_t, b_dot_t, b_cross


@triton.jit
def store_sums(
    parts, o_n, m_n, stride_parts,
    b_max_s, b_sum_s, b_dot_s, b_pick_s, b_max_t, b_sum_t, b_dot_t, b_pick_t, b_cross, b_owned,
):  # fmt: skip
    """Store partial sums [R] in their rows of parts [PARTIALS, n]."""
    p_parts = parts + o_n
    tl.store(p_parts + MAX_S * stride_parts, b_max_s, mask=m_n)
    tl.store(p_parts + SUM_S * stride_parts, b_sum_s, mask=m_n)
    tl.store(p_parts + DOT_S * stride_parts, b_dot_s, mask=m_n)
    tl.store(p_parts + PICK_S * stride_parts, b_pick_s, mask=m_n)
    tl.store(p_parts + MAX_T * stride_parts, b_max_t, mask=m_n)
    tl.store(p_parts + SUM_T * stride_parts, b_sum_t, mask=m_n)
    tl.store(p_parts + DOT_T * stride_parts, b_dot_t, mask=m_n)
    tl.store(p_parts + PICK_T * stride_parts, b_pick_t, mask=m_n)
    tl.store(p_parts + CROSS * stride_parts, b_cross, mask=m_n)
    tl.store(p_parts + OWNED * stride_parts, b_owned, mask=m_n)


@triton.jit
def mixture_parts(b_log_p, b_log_q, A: tl.constexpr, B: tl.constexpr):
    """log q - log p within +-80, q/p and D = m/p; `algebra.Mixture.ratio`."""
    b_difference = tl.minimum(tl.maximum(b_log_q - b_log_p, -80.0), 80.0)
    b_ratio = exp(b_difference)
    return b_difference, b_ratio, A + B * b_ratio


@triton.jit
def mixture_value(b_log_p, b_log_q, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The block's part of the divergence and of sum p f', [R] each; `algebra.Mixture.value`."""
    b_difference, _, b_mean = mixture_parts(b_log_p, b_log_q, A, B)
    b_p = exp(b_log_p)
    b_q = exp(b_log_q)
    b_log_mean = tl.log(b_mean)
    if KIND == SKEW_REVERSE_KL:
        b_value = -tl.sum(b_p * b_log_mean, 1)
        b_slope = -tl.sum(b_p * (b_log_mean + A / b_mean), 1)
    elif KIND == SKEW_FORWARD_KL:
        b_value = tl.sum(b_q * (b_difference - b_log_mean), 1)
        b_slope = -A * tl.sum(b_q * (1 / b_mean), 1)
    else:
        b_slope = -A * tl.sum(b_p * b_log_mean, 1)
        b_value = b_slope + B * tl.sum(b_q * (b_difference - b_log_mean), 1)
    return b_value, b_slope


@triton.jit
def mixture_slope(b_log_p, b_log_q, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """f' [R, N]; `algebra.Mixture.slope`."""
    _, b_ratio, b_mean = mixture_parts(b_log_p, b_log_q, A, B)
    if KIND == JSD:
        b_slope = -A * tl.log(b_mean)
    elif KIND == SKEW_FORWARD_KL:
        b_slope = -A * b_ratio / b_mean
    else:
        b_slope = -tl.log(b_mean) - A / b_mean
    return b_slope


@triton.jit
def factors(stats, upstream, target, b_inverse, o_n, m_n, stride_stats, stride_upstream, KIND: tl.constexpr):
    """Return the per-row factors of `algebra.factors`, and the shifts and normalisers of both models, [R] each.

    Rows in m_dead get no gradient: their target is ignored or out of range (NaN).
    """
    p_stats = stats + o_n
    p_upstream = upstream + o_n
    b_divergence = tl.load(p_stats + DIVERGENCE * stride_stats, mask=m_n, other=0.0)
    b_entropy = tl.load(p_stats + ENTROPY * stride_stats, mask=m_n, other=0.0)
    b_logp = tl.load(p_stats + LOGP * stride_stats, mask=m_n, other=0.0)
    b_shift_s = tl.load(p_stats + SHIFT_S * stride_stats, mask=m_n, other=0.0)
    b_log_s = tl.load(p_stats + LOG_S * stride_stats, mask=m_n, other=0.0)
    b_shift_t = tl.load(p_stats + SHIFT_T * stride_stats, mask=m_n, other=0.0)
    b_log_t = tl.load(p_stats + LOG_T * stride_stats, mask=m_n, other=0.0)
    b_g = tl.load(p_upstream + DIVERGENCE * stride_upstream, mask=m_n, other=0.0)
    b_h = tl.load(p_upstream + ENTROPY * stride_upstream, mask=m_n, other=0.0)
    b_lp = tl.load(p_upstream + LOGP * stride_upstream, mask=m_n, other=0.0)
    m_dead = ~m_n
    if target is not None:
        m_dead |= (tl.load(target + o_n, mask=m_n, other=IGNORE) == IGNORE) | (b_logp != b_logp)
    else:
        b_lp = tl.zeros_like(b_lp)
    if b_inverse is not None:
        b_g *= b_inverse
        b_h *= b_inverse
        b_lp *= b_inverse
    b_norm = exp(-b_log_s)
    b_own = -b_h
    b_other = b_g
    b_constant = b_h * (b_log_s - b_entropy) - b_lp
    if KIND == REVERSE_KL:
        b_own += b_g
        b_other = -b_g
        b_constant -= b_g * (b_log_s - b_log_t + b_divergence)
    elif KIND == FORWARD_KL:
        b_other = -b_g * exp(b_log_s - b_log_t)
        b_constant += b_g
    elif KIND != NO_TEACHER:
        b_constant -= b_g * tl.load(p_stats + MEAN_SLOPE * stride_stats, mask=m_n, other=0.0)
    b_own *= b_norm
    b_other *= b_norm
    b_constant *= b_norm
    return b_own, b_other, b_constant, b_lp, b_shift_s, b_shift_t, b_log_s - b_log_t, m_dead


@triton.jit
def logit_gradient(
    b_zs, b_zt, m_hit, b_temperature, b_own, b_other, b_constant, b_onehot, b_shift_s, b_shift_t, b_log_ratio, m_dead,
    CAP: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Return the gradient [R, N] with respect to the student's raw logits, from the scaled logits.

    m_hit [R, N] marks the targets, b_log_ratio [R] is log S - log Q.
    """
    b_us = b_zs - b_shift_s[:, None]
    b_e = exp(b_us)
    b_dz = b_own[:, None] * b_us + b_constant[:, None]
    if KIND == FORWARD_KL:
        b_dz = b_dz * b_e + b_other[:, None] * exp(b_zt - b_shift_t[:, None])
    elif KIND == NO_TEACHER:
        b_dz *= b_e
    else:
        b_x = b_zt - b_shift_t[:, None]
        if KIND != REVERSE_KL:
            # log S is added to both logarithms
            b_x = mixture_slope(b_us, b_x + b_log_ratio[:, None], KIND, A, B)
        b_dz = (b_dz + b_other[:, None] * b_x) * b_e
    b_dz += tl.where(m_hit, b_onehot[:, None], 0.0)
    if CAP > 0:
        b_capped = b_zs / CAP
        if b_temperature is not None:
            b_capped *= b_temperature[:, None]
        b_dz *= 1 - tl.minimum(b_capped * b_capped, 1.0)
    return tl.where(m_dead[:, None], 0.0, b_dz)


@triton.jit(
    do_not_specialize=["start", "w", "stride_parts"],
    do_not_specialize_on_alignment=["target", "inverse", "parts"],
)
def tile_sums_fwd_kernel(
    zs, zt, target, bias_s, bias_t, valid, inverse, parts, start, w, stride_z, stride_parts,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`algebra.partial`: the sums of one tile, columns start to start + w of the vocabulary, into parts [PARTIALS, n].

    Grid: (n,). In all kernels of tiles, bias_s, bias_t and valid begin at the tile's first column.
    """
    o_n = tl.program_id(0) + tl.arange(0, 1)
    m_n = o_n >= 0
    b_inverse = row_values(inverse, o_n, m_n)
    i_row = tl.program_id(0).to(tl.int64) * stride_z
    p_zs = zs + i_row
    p_zt = zt
    if KIND != NO_TEACHER:
        p_zt = zt + i_row
    b_max_s = tl.full([1], MASKED, tl.float32)
    b_max_t = tl.full([1], MASKED, tl.float32)
    b_sum_s = tl.zeros([1], tl.float32)
    b_sum_t = tl.zeros([1], tl.float32)
    b_dot_s = tl.zeros([1], tl.float32)
    b_dot_t = tl.zeros([1], tl.float32)
    b_cross = tl.zeros([1], tl.float32)
    for i_v in tl.range(0, w, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        b_zs, b_zt = tile_logits(
            p_zs, p_zt, bias_s, bias_t, valid, b_inverse, o_v, w, stride_z, CAP_S, CAP_T, SCALE_T, KIND
        )
        b_max_s, b_sum_s, b_dot_s, b_max_t, b_sum_t, b_dot_t, b_cross = absorb_both(
            b_zs, b_zt, b_max_s, b_sum_s, b_dot_s, b_max_t, b_sum_t, b_dot_t, b_cross, KIND
        )
    b_pick_s = tl.zeros([1], tl.float32)
    b_pick_t = tl.zeros([1], tl.float32)
    b_owned = tl.zeros([1], tl.float32)
    if target is not None:
        o_y = tl.load(target + o_n) - start
        m_y = (o_y >= 0) & (o_y < w)
        o_y = tl.where(m_y, o_y, 0).to(tl.int32)
        b_owned = m_y.to(tl.float32)
        b_y = tl.load(p_zs + o_y[None, :], mask=m_y[None, :], other=0.0)
        b_y = scaled(b_y, bias_s, valid, b_inverse, o_y, m_y, CAP_S)
        b_pick_s = tl.where(m_y, tl.sum(b_y, 1), 0.0)
        if KIND != NO_TEACHER:
            b_y = tl.load(p_zt + o_y[None, :], mask=m_y[None, :], other=0.0)
            b_y = scaled(b_y, bias_t, valid, b_inverse, o_y, m_y, CAP_T, SCALE_T)
            b_pick_t = tl.where(m_y, tl.sum(b_y, 1), 0.0)
    store_sums(
        parts, o_n, m_n, stride_parts,
        b_max_s, b_sum_s, b_dot_s, b_pick_s, b_max_t, b_sum_t, b_dot_t, b_pick_t, b_cross, b_owned,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["w", "stride_stats", "stride_look"],
    do_not_specialize_on_alignment=["inverse", "stats", "look"],
)
def tile_mixture_fwd_kernel(
    zs, zt, bias_s, bias_t, valid, inverse, stats, look, w, stride_z, stride_stats, stride_look,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`algebra.second_look`: a mixture's part of one tile into look [2, n]. Grid: (n,)."""
    o_n = tl.program_id(0) + tl.arange(0, 1)
    m_n = o_n >= 0
    b_inverse = row_values(inverse, o_n, m_n)
    i_row = tl.program_id(0).to(tl.int64) * stride_z
    b_shift_s = tl.load(stats + SHIFT_S * stride_stats + o_n)
    b_log_s = tl.load(stats + LOG_S * stride_stats + o_n)
    b_shift_t = tl.load(stats + SHIFT_T * stride_stats + o_n)
    b_log_t = tl.load(stats + LOG_T * stride_stats + o_n)
    b_value = tl.zeros([1], tl.float32)
    b_slope = tl.zeros([1], tl.float32)
    for i_v in tl.range(0, w, BLOCK):
        o_v = i_v + tl.arange(0, BLOCK)
        b_zs, b_zt = tile_logits(
            zs + i_row, zt + i_row, bias_s, bias_t, valid, b_inverse, o_v, w, stride_z, CAP_S, CAP_T, SCALE_T, KIND
        )
        b_log_p = b_zs - b_shift_s[:, None] - b_log_s[:, None]
        b_log_q = b_zt - b_shift_t[:, None] - b_log_t[:, None]
        b_dvalue, b_dslope = mixture_value(b_log_p, b_log_q, KIND, A, B)
        b_value += b_dvalue
        b_slope += b_dslope
    tl.store(look + o_n, b_value)
    tl.store(look + stride_look + o_n, b_slope)


@triton.jit(
    do_not_specialize=["start", "w", "stride_stats", "stride_upstream"],
    do_not_specialize_on_alignment=["target", "inverse", "temperature", "stats", "upstream"],
)
def tile_gradient_bwd_kernel(
    zs, zt, dz, target, bias_s, bias_t, valid, inverse, temperature, stats, upstream,
    start, w, stride_z, stride_dz, stride_stats, stride_upstream,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`algebra.logit_gradient` of one tile into dz [n, w], which may be zs where it is fp32 too.

    Grid: (n, cdiv(w, BLOCK)). Half-width gradients need memory of their own: written over fp32 logits, one program's
    results would lie on another's input.
    """
    o_n = tl.program_id(0) + tl.arange(0, 1)
    m_n = o_n >= 0
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_inverse = row_values(inverse, o_n, m_n)
    i_row = tl.program_id(0).to(tl.int64)
    p_zs = zs + i_row * stride_z
    p_zt = zt
    if KIND != NO_TEACHER:
        p_zt = zt + i_row * stride_z
    b_zs, b_zt = tile_logits(
        p_zs, p_zt, bias_s, bias_t, valid, b_inverse, o_v, w, stride_z, CAP_S, CAP_T, SCALE_T, KIND
    )
    b_own, b_other, b_constant, b_onehot, b_shift_s, b_shift_t, b_log_ratio, m_dead = factors(
        stats, upstream, target, b_inverse, o_n, m_n, stride_stats, stride_upstream, KIND
    )
    m_hit = o_v[None, :] < 0
    if target is not None:
        m_hit = (start + o_v)[None, :] == tl.load(target + o_n)[:, None]
    b_temperature = row_values(temperature, o_n, m_n)
    b_dz = logit_gradient(
        b_zs, b_zt, m_hit, b_temperature, b_own, b_other, b_constant, b_onehot, b_shift_s, b_shift_t, b_log_ratio,
        m_dead, CAP_S, KIND, A, B,
    )  # fmt: skip
    m_dz = (o_v < stride_dz)[None, :]
    p_dz = dz + i_row * stride_dz + o_v[None, :]
    tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m_dz)


@triton.jit(
    do_not_specialize=["n", "k", "stride_parts", "stride_set", "stride_stats"],
    do_not_specialize_on_alignment=["parts", "stats", "target"],
)
def combine_sums_fwd_kernel(
    parts, stats, target, n, k, stride_parts, stride_set, stride_stats, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """`algebra.merge`, then `algebra.statistics`: parts [PARTIALS, k, n] of k column sets into stats [STATISTICS, n].

    Grid: (cdiv(n, BLOCK),). An ignored row's outputs are 0; those of a row whose target no column set holds, or is left
    out, are NaN. A mixture's own outputs are left to the second look.
    """
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_max_s = tl.full([BLOCK], MASKED, tl.float32)
    b_max_t = tl.full([BLOCK], MASKED, tl.float32)
    b_sum_s = tl.zeros([BLOCK], tl.float32)
    b_sum_t = tl.zeros([BLOCK], tl.float32)
    b_dot_s = tl.zeros([BLOCK], tl.float32)
    b_dot_t = tl.zeros([BLOCK], tl.float32)
    b_pick_s = tl.zeros([BLOCK], tl.float32)
    b_pick_t = tl.zeros([BLOCK], tl.float32)
    b_cross = tl.zeros([BLOCK], tl.float32)
    b_owned = tl.zeros([BLOCK], tl.float32)
    for i_k in range(k):
        p_part = parts + i_k * stride_set + o_n
        b_part_s = tl.load(p_part + MAX_S * stride_parts, mask=m_n, other=MASKED)
        b_part_sum_s = tl.load(p_part + SUM_S * stride_parts, mask=m_n, other=0.0)
        b_new_s = tl.maximum(b_max_s, b_part_s)
        b_shift_s = b_max_s - b_new_s
        b_by_s = b_part_s - b_new_s
        b_part_t = tl.load(p_part + MAX_T * stride_parts, mask=m_n, other=MASKED)
        b_part_sum_t = tl.load(p_part + SUM_T * stride_parts, mask=m_n, other=0.0)
        b_new_t = tl.maximum(b_max_t, b_part_t)
        b_shift_t = b_max_t - b_new_t
        b_by_t = b_part_t - b_new_t
        b_part_cross = tl.load(p_part + CROSS * stride_parts, mask=m_n, other=0.0)
        if KIND == REVERSE_KL:
            b_cross = exp(b_shift_s) * (b_cross + (b_shift_s - b_shift_t) * b_sum_s) + exp(b_by_s) * (
                b_part_cross + (b_by_s - b_by_t) * b_part_sum_s
            )
        elif KIND == FORWARD_KL:
            b_cross = exp(b_shift_t) * (b_cross + (b_shift_t - b_shift_s) * b_sum_t) + exp(b_by_t) * (
                b_part_cross + (b_by_t - b_by_s) * b_part_sum_t
            )
        b_dot_s = exp(b_shift_s) * (b_dot_s + b_shift_s * b_sum_s) + exp(b_by_s) * (
            tl.load(p_part + DOT_S * stride_parts, mask=m_n, other=0.0) + b_by_s * b_part_sum_s
        )
        b_sum_s = exp(b_shift_s) * b_sum_s + exp(b_by_s) * b_part_sum_s
        b_dot_t = exp(b_shift_t) * (b_dot_t + b_shift_t * b_sum_t) + exp(b_by_t) * (
            tl.load(p_part + DOT_T * stride_parts, mask=m_n, other=0.0) + b_by_t * b_part_sum_t
        )
        b_sum_t = exp(b_shift_t) * b_sum_t + exp(b_by_t) * b_part_sum_t
        b_pick_s += tl.load(p_part + PICK_S * stride_parts, mask=m_n, other=0.0)
        b_pick_t += tl.load(p_part + PICK_T * stride_parts, mask=m_n, other=0.0)
        b_owned += tl.load(p_part + OWNED * stride_parts, mask=m_n, other=0.0)
        b_max_s = b_new_s
        b_max_t = b_new_t
    b_log_s = tl.log(b_sum_s)
    b_entropy = b_log_s - b_dot_s / b_sum_s
    b_logp = b_pick_s - b_max_s - b_log_s
    b_log_t = tl.zeros([BLOCK], tl.float32)
    b_teacher_entropy = tl.zeros([BLOCK], tl.float32)
    b_teacher_logp = tl.zeros([BLOCK], tl.float32)
    b_divergence = tl.zeros([BLOCK], tl.float32)
    if KIND != NO_TEACHER:
        b_log_t = tl.log(b_sum_t)
        b_teacher_entropy = b_log_t - b_dot_t / b_sum_t
        b_teacher_logp = b_pick_t - b_max_t - b_log_t
        if KIND == REVERSE_KL:
            b_divergence = b_cross / b_sum_s - b_log_s + b_log_t
        elif KIND == FORWARD_KL:
            b_divergence = b_cross / b_sum_t - b_log_t + b_log_s
    if target is not None:
        m_ignored = tl.load(target + o_n, mask=m_n, other=IGNORE) == IGNORE
        b_lost = tl.where((b_owned == 1) & (b_pick_s > MASKED / 2), 0.0, float("nan"))
        b_divergence = tl.where(m_ignored, 0.0, b_divergence + b_lost)
        b_entropy = tl.where(m_ignored, 0.0, b_entropy + b_lost)
        b_logp = tl.where(m_ignored, 0.0, b_logp + b_lost)
        b_teacher_entropy = tl.where(m_ignored, 0.0, b_teacher_entropy + b_lost)
        b_teacher_logp = tl.where(m_ignored, 0.0, b_teacher_logp + b_lost)
    p_stats = stats + o_n
    tl.store(p_stats + DIVERGENCE * stride_stats, b_divergence, mask=m_n)
    tl.store(p_stats + ENTROPY * stride_stats, b_entropy, mask=m_n)
    tl.store(p_stats + LOGP * stride_stats, b_logp, mask=m_n)
    tl.store(p_stats + TEACHER_LOGP * stride_stats, b_teacher_logp, mask=m_n)
    tl.store(p_stats + TEACHER_ENTROPY * stride_stats, b_teacher_entropy, mask=m_n)
    tl.store(p_stats + SHIFT_S * stride_stats, b_max_s, mask=m_n)
    tl.store(p_stats + LOG_S * stride_stats, b_log_s, mask=m_n)
    tl.store(p_stats + SHIFT_T * stride_stats, b_max_t, mask=m_n)
    tl.store(p_stats + LOG_T * stride_stats, b_log_t, mask=m_n)
    tl.store(p_stats + MEAN_SLOPE * stride_stats, tl.zeros([BLOCK], tl.float32), mask=m_n)
