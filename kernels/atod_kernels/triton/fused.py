"""Kernels that compute both models' logits in registers, tile by tile, and apply the algebra of `tiles.py`.

No logits reach memory. The three passes share one loop over the hidden dimension, so that the statistics, a mixture's
second look and the gradient see the same logits to the last bit. The teacher's product comes first and its tile waits
in registers for the student's. Operands come through tensor-memory descriptors made on the host (TMA) where the
hardware has them, through pointers elsewhere.

Names are those of `tiles.py`. xs [T, HS] and ws [V, HS] are the student's operands, xt and wt the teacher's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    IGNORE,
    LOG_S,
    LOG_T,
    MASKED,
    NO_TEACHER,
    SHIFT_S,
    SHIFT_T,
    absorb_both,
    factors,
    logit_gradient,
    mixture_value,
    row_values,
    scaled,
    store_sums,
)


@triton.jit
def multiply(b_x, b_w, b_z, PRECISION: tl.constexpr):
    """Return z + x @ w."""
    if PRECISION == "interpreter":
        # its dot multiplies bf16 operands as if they were integers
        b_z = tl.dot(b_x.to(tl.float32), b_w.to(tl.float32), b_z, input_precision="ieee")
    else:
        b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
    return b_z


@triton.jit
def product(
    p_x, p_w, i_row, i_column, tokens, width, H, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x[i_row : i_row + BM] @ w[i_column : i_column + BN].T in fp32.

    p_x and p_w are pointers or, with TMA, descriptors. Rows beyond `tokens` and `width` read others' memory,
    harmlessly, or zeros.
    """
    b_z = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for i_h in tl.range(0, H, BK):
            b_z = multiply(p_x.load([i_row, i_h]), p_w.load([i_column, i_h]).T, b_z, PRECISION)
    else:
        o_n = tl.arange(0, BM)
        o_v = tl.arange(0, BN)
        STEP: tl.constexpr = BK if EVEN else 16  # masked loads need registers
        o_h = tl.arange(0, STEP)
        p_x += tl.cast(i_row, tl.int64) * H
        p_w += tl.cast(i_column, tl.int64) * H
        # offsets within a block fit in 32 bits
        o_x = (tl.where(i_row + o_n < tokens, o_n, 0) * H)[:, None] + o_h[None, :]
        o_w = (tl.where(i_column + o_v < width, o_v, 0) * H)[None, :] + o_h[:, None]
        for i_h in range(0, H, STEP):
            if EVEN:
                b_x = tl.load(p_x + o_x)
                b_w = tl.load(p_w + o_w)
            else:
                b_x = tl.load(p_x + o_x, mask=(i_h + o_h)[None, :] < H, other=0.0)
                b_w = tl.load(p_w + o_w, mask=(i_h + o_h)[:, None] < H, other=0.0)
            b_z = multiply(b_x, b_w, b_z, PRECISION)
            p_x += STEP
            p_w += STEP
    return b_z


@triton.jit
def halves(b_z):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(b_z, [b_z.shape[0], 2, b_z.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def cut(b_z, PARTS: tl.constexpr):
    """A tile [R, N] as 1, 2 or 4 tiles [R, N / PARTS], left to right.

    Epilogues take them in turn where their temporaries for a whole tile do not fit in registers.
    """
    if PARTS == 1:
        pieces = (b_z,)
    elif PARTS == 2:
        pieces = halves(b_z)
    else:
        b_left, b_right = halves(b_z)
        b_0, b_1 = halves(b_left)
        b_2, b_3 = halves(b_right)
        pieces = (b_0, b_1, b_2, b_3)
    return pieces


@triton.jit
def products(
    xs, ws, xt, wt, i_row, i_column, end, tokens, HS, HT, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return both models' raw logits, each in PARTS tiles [BM, BN / PARTS]; without a teacher the student's twice."""
    if KIND != NO_TEACHER:
        b_zt = product(xt, wt, i_row, i_column, tokens, end, HT, BM, BN, BK, TMA, EVEN, PRECISION)
    b_zs = product(xs, ws, i_row, i_column, tokens, end, HS, BM, BN, BK, TMA, EVEN, PRECISION)
    if KIND == NO_TEACHER:
        b_zt = b_zs
    return cut(b_zs, PARTS), cut(b_zt, PARTS)


@triton.jit
def logits(
    b_zs, b_zt, bias_s, bias_t, valid, b_inverse, o_v, end,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Scaled logits of both models; columns o_v from `end` on are MASKED."""
    b_zs = scaled(b_zs, bias_s, valid, b_inverse, o_v, o_v < end, CAP_S)
    if KIND == NO_TEACHER:
        b_zt = b_zs
    else:
        b_zt = scaled(b_zt, bias_t, valid, b_inverse, o_v, o_v < end, CAP_T, SCALE_T)
    return b_zs, b_zt


@triton.jit
def target_columns(target, o_n, m_n, start, end):
    """The targets' columns [R] counted from `start`; -1 for one that does not lie before `end`."""
    o_y = tl.load(target + o_n, mask=m_n, other=IGNORE) - start
    return tl.where((o_y >= 0) & (o_y < end), o_y, -1).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "V", "start", "share", "stride_parts"])
def fused_sums_fwd_kernel(
    xs, ws, xt, wt, target, bias_s, bias_t, valid, inverse, parts, tokens, V, HS, HT, start, share, stride_parts,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """`algebra.partial` of `share` columns a program, into parts [PARTIALS, splits, T].

    Grid: (cdiv(T, BM), splits), rows of blocks fastest: programs that run together read the same slice of the weights.
    """
    i_row = tl.program_id(0) * BM
    o_n = i_row + tl.arange(0, BM)
    m_n = o_n < tokens
    b_inverse = row_values(inverse, o_n, m_n)
    if target is not None:
        o_y = target_columns(target, o_n, m_n, start, V)
    b_max_s = tl.full([BM], MASKED, tl.float32)
    b_max_t = tl.full([BM], MASKED, tl.float32)
    b_sum_s = tl.zeros([BM], tl.float32)
    b_sum_t = tl.zeros([BM], tl.float32)
    b_dot_s = tl.zeros([BM], tl.float32)
    b_dot_t = tl.zeros([BM], tl.float32)
    b_cross = tl.zeros([BM], tl.float32)
    b_pick_s = tl.zeros([BM], tl.float32)
    b_pick_t = tl.zeros([BM], tl.float32)
    b_owned = tl.zeros([BM], tl.float32)
    i_first = tl.program_id(1) * share
    i_end = tl.minimum(i_first + share, V)
    for i_v in tl.range(i_first, i_end, BN, num_stages=1):
        b_raw_s, b_raw_t = products(
            xs, ws, xt, wt, i_row, i_v, i_end, tokens, HS, HT, KIND, BM, BN, BK, TMA, EVEN, PRECISION, PARTS
        )
        for i in tl.static_range(PARTS):
            o_v = i_v + i * (BN // PARTS) + tl.arange(0, BN // PARTS)
            b_zs, b_zt = logits(
                b_raw_s[i], b_raw_t[i], bias_s, bias_t, valid, b_inverse, o_v, i_end, CAP_S, CAP_T, SCALE_T, KIND
            )
            if target is not None:
                m_hit = (o_v[None, :] == o_y[:, None]) & (o_v < i_end)[None, :]
                b_pick_s += tl.sum(tl.where(m_hit, b_zs, 0.0), 1)
                if KIND != NO_TEACHER:
                    b_pick_t += tl.sum(tl.where(m_hit, b_zt, 0.0), 1)
            b_max_s, b_sum_s, b_dot_s, b_max_t, b_sum_t, b_dot_t, b_cross = absorb_both(
                b_zs, b_zt, b_max_s, b_sum_s, b_dot_s, b_max_t, b_sum_t, b_dot_t, b_cross, KIND
            )
        if target is not None:
            b_owned += tl.where((o_y >= i_v) & (o_y < tl.minimum(i_v + BN, i_end)), 1.0, 0.0)
    p_parts = parts + tl.program_id(1).to(tl.int64) * tokens
    store_sums(
        p_parts, o_n, m_n, stride_parts,
        b_max_s, b_sum_s, b_dot_s, b_pick_s, b_max_t, b_sum_t, b_dot_t, b_pick_t, b_cross, b_owned,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "V", "share", "stride_stats", "stride_look"])
def fused_mixture_fwd_kernel(
    xs, ws, xt, wt, bias_s, bias_t, valid, inverse, stats, look, tokens, V, HS, HT, share, stride_stats, stride_look,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """`algebra.second_look` of `share` columns a program, into look [2, splits, T].

    Grid: as `fused_sums_fwd_kernel`.
    """
    i_row = tl.program_id(0) * BM
    o_n = i_row + tl.arange(0, BM)
    m_n = o_n < tokens
    b_inverse = row_values(inverse, o_n, m_n)
    b_shift_s = tl.load(stats + SHIFT_S * stride_stats + o_n, mask=m_n, other=0.0)
    b_log_s = tl.load(stats + LOG_S * stride_stats + o_n, mask=m_n, other=0.0)
    b_shift_t = tl.load(stats + SHIFT_T * stride_stats + o_n, mask=m_n, other=0.0)
    b_log_t = tl.load(stats + LOG_T * stride_stats + o_n, mask=m_n, other=0.0)
    b_value = tl.zeros([BM], tl.float32)
    b_slope = tl.zeros([BM], tl.float32)
    i_first = tl.program_id(1) * share
    i_end = tl.minimum(i_first + share, V)
    for i_v in tl.range(i_first, i_end, BN, num_stages=1):
        b_raw_s, b_raw_t = products(
            xs, ws, xt, wt, i_row, i_v, i_end, tokens, HS, HT, KIND, BM, BN, BK, TMA, EVEN, PRECISION, PARTS
        )
        for i in tl.static_range(PARTS):
            o_v = i_v + i * (BN // PARTS) + tl.arange(0, BN // PARTS)
            b_zs, b_zt = logits(
                b_raw_s[i], b_raw_t[i], bias_s, bias_t, valid, b_inverse, o_v, i_end, CAP_S, CAP_T, SCALE_T, KIND
            )
            b_log_p = b_zs - b_shift_s[:, None] - b_log_s[:, None]
            b_log_q = b_zt - b_shift_t[:, None] - b_log_t[:, None]
            b_dvalue, b_dslope = mixture_value(b_log_p, b_log_q, KIND, A, B)
            b_value += b_dvalue
            b_slope += b_dslope
    p_look = look + tl.program_id(1).to(tl.int64) * tokens + o_n
    tl.store(p_look, b_value, mask=m_n)
    tl.store(p_look + stride_look, b_slope, mask=m_n)


@triton.jit(do_not_specialize=["tokens", "row0", "n", "column0", "end", "start", "stride_stats", "stride_upstream"])
def fused_gradient_bwd_kernel(
    xs, ws, xt, wt, dz, target, bias_s, bias_t, valid, inverse, temperature, stats, upstream,
    tokens, row0, n, column0, end, HS, HT, start, stride_dz, stride_stats, stride_upstream,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """`algebra.logit_gradient` of tokens row0 to row0 + n and columns column0 to end, into dz [n, w].

    Grid: (cdiv(n, BM), cdiv(w, BN)).
    """
    i_row = row0 + tl.program_id(0) * BM
    i_v = column0 + tl.program_id(1) * BN
    o_n = i_row + tl.arange(0, BM)
    m_n = o_n < row0 + n
    b_inverse = row_values(inverse, o_n, m_n)
    b_own, b_other, b_constant, b_onehot, b_shift_s, b_shift_t, b_log_ratio, m_dead = factors(
        stats, upstream, target, b_inverse, o_n, m_n, stride_stats, stride_upstream, KIND
    )
    b_raw_s, b_raw_t = products(
        xs, ws, xt, wt, i_row, i_v, end, tokens, HS, HT, KIND, BM, BN, BK, TMA, EVEN, PRECISION, PARTS
    )
    if target is not None:
        o_y = target_columns(target, o_n, m_n, start, end)
    b_temperature = row_values(temperature, o_n, m_n)
    p_dz = dz + (o_n - row0).to(tl.int64) * stride_dz
    for i in tl.static_range(PARTS):
        o_w = tl.program_id(1) * BN + i * (BN // PARTS) + tl.arange(0, BN // PARTS)  # within dz
        o_v = column0 + o_w
        b_zs, b_zt = logits(
            b_raw_s[i], b_raw_t[i], bias_s, bias_t, valid, b_inverse, o_v, end, CAP_S, CAP_T, SCALE_T, KIND
        )
        m_hit = o_v[None, :] < 0
        if target is not None:
            m_hit = o_v[None, :] == o_y[:, None]
        b_dz = logit_gradient(
            b_zs, b_zt, m_hit, b_temperature, b_own, b_other, b_constant, b_onehot, b_shift_s, b_shift_t, b_log_ratio,
            m_dead, CAP_S, KIND, A, B,
        )  # fmt: skip
        m_dz = m_n[:, None] & (o_w < stride_dz)[None, :]
        tl.store(p_dz[:, None] + o_w[None, :], b_dz.to(dz.dtype.element_ty), mask=m_dz)
