"""Both models' logits made and used in registers: a tile of the two matrix products, then the algebra of `tiles.py`.

No logits reach memory. The three passes share one loop over the hidden dimension, so that the statistics, a mixture's second look and
the gradient see the same logits to the last bit. The teacher's product comes first and its tile waits in registers for the student's.
Operands come through tensor-memory descriptors made on the host (TMA) where the hardware has them, through pointers elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    IGNORED,
    LOG_S,
    LOG_T,
    MASKED,
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
def multiply(a, b, z, PRECISION: tl.constexpr):
    """z + a @ b."""
    if PRECISION == "interpreter":
        z = tl.dot(a.to(tl.float32), b.to(tl.float32), z, input_precision="ieee")  # its dot multiplies bf16 operands as if they were integers
    else:
        z = tl.dot(a, b, z, input_precision=PRECISION)
    return z


@triton.jit
def product(
    x, w, row, column, tokens, width, H, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr
):
    """x[row : row + BM] @ w[column : column + BN].T in fp32; rows beyond `tokens` and `width` read others' memory, harmlessly, or zeros."""
    z = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for k in tl.range(0, H, BK):
            z = multiply(x.load([row, k]), w.load([column, k]).T, z, PRECISION)
    else:
        rows = tl.arange(0, BM)
        columns = tl.arange(0, BN)
        STEP: tl.constexpr = BK if EVEN else 16  # masked loads need registers
        at = tl.arange(0, STEP)
        x += tl.cast(row, tl.int64) * H
        w += tl.cast(column, tl.int64) * H
        in_x = (tl.where(row + rows < tokens, rows, 0) * H)[:, None] + at[None, :]  # offsets within a block fit in 32 bits
        in_w = (tl.where(column + columns < width, columns, 0) * H)[None, :] + at[:, None]
        for k in range(0, H, STEP):
            if EVEN:
                a = tl.load(x + in_x)
                b = tl.load(w + in_w)
            else:
                a = tl.load(x + in_x, mask=(k + at)[None, :] < H, other=0.0)
                b = tl.load(w + in_w, mask=(k + at)[:, None] < H, other=0.0)
            z = multiply(a, b, z, PRECISION)
            x += STEP
            w += STEP
    return z


@triton.jit
def halves(z):
    return tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def cut(z, PARTS: tl.constexpr):
    """A tile [R, N] as 1, 2 or 4 tiles [R, N / PARTS], left to right. Epilogues take them in turn where their temporaries for a whole tile
    do not fit in registers."""
    if PARTS == 1:
        pieces = (z,)
    elif PARTS == 2:
        pieces = halves(z)
    else:
        left, right = halves(z)
        a, b = halves(left)
        c, d = halves(right)
        pieces = (a, b, c, d)
    return pieces


@triton.jit
def products(
    xs, ws, xt, wt, row, column, end, tokens, HS, HT, KIND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Raw logits of both models in PARTS tiles [BM, BN / PARTS]; the student's twice where there is no teacher."""
    if KIND != "":
        zt = product(xt, wt, row, column, tokens, end, HT, BM, BN, BK, TMA, EVEN, PRECISION)
    zs = product(xs, ws, row, column, tokens, end, HS, BM, BN, BK, TMA, EVEN, PRECISION)
    if KIND == "":
        zt = zs
    return cut(zs, PARTS), cut(zt, PARTS)


@triton.jit
def logits(zs, zt, bias_s, bias_t, valid, inv, at, end, CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr):
    """Scaled logits of both models; columns `at` from `end` on are MASKED."""
    zs = scaled(zs, bias_s, valid, inv, at, at < end, CAP_S)
    if KIND == "":
        zt = zs
    else:
        zt = scaled(zt, bias_t, valid, inv, at, at < end, CAP_T, SCALE_T)
    return zs, zt


@triton.jit
def held(target, rows, live, start, end):
    """The targets' columns [R] counted from `start`, -1 for one that does not lie before `end`."""
    at = tl.load(target + rows, mask=live, other=IGNORED) - start
    return tl.where((at >= 0) & (at < end), at, -1).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "V", "start", "share", "step"])
def fused_sums(
    xs, ws, xt, wt, target, bias_s, bias_t, valid, inverse, parts, tokens, V, HS, HT, start, share, step,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """`algebra.partial` of `share` columns a program, into parts [PARTIALS, splits, T]. Grid: (cdiv(T, BM), splits), rows of blocks fastest:
    programs that run together read the same slice of the weights."""
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    live = rows < tokens
    inv = row_values(inverse, rows, live)
    if target is not None:
        wanted = held(target, rows, live, start, V)
    max_s = tl.full([BM], MASKED, tl.float32)
    max_t = tl.full([BM], MASKED, tl.float32)
    sum_s = tl.zeros([BM], tl.float32)
    sum_t = tl.zeros([BM], tl.float32)
    dot_s = tl.zeros([BM], tl.float32)
    dot_t = tl.zeros([BM], tl.float32)
    cross = tl.zeros([BM], tl.float32)
    pick_s = tl.zeros([BM], tl.float32)
    pick_t = tl.zeros([BM], tl.float32)
    owned = tl.zeros([BM], tl.float32)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, V)
    for column in tl.range(first, end, BN, num_stages=1):
        raw_s, raw_t = products(xs, ws, xt, wt, row, column, end, tokens, HS, HT, KIND, BM, BN, BK, TMA, EVEN, PRECISION, PARTS)
        for i in tl.static_range(PARTS):
            at = column + i * (BN // PARTS) + tl.arange(0, BN // PARTS)
            zs, zt = logits(raw_s[i], raw_t[i], bias_s, bias_t, valid, inv, at, end, CAP_S, CAP_T, SCALE_T, KIND)
            if target is not None:
                hit = (at[None, :] == wanted[:, None]) & (at < end)[None, :]
                pick_s += tl.sum(tl.where(hit, zs, 0.0), 1)
                if KIND != "":
                    pick_t += tl.sum(tl.where(hit, zt, 0.0), 1)
            max_s, sum_s, dot_s, max_t, sum_t, dot_t, cross = absorb_both(zs, zt, max_s, sum_s, dot_s, max_t, sum_t, dot_t, cross, KIND)
        if target is not None:
            owned += tl.where((wanted >= column) & (wanted < tl.minimum(column + BN, end)), 1.0, 0.0)
    part = parts + tl.program_id(1).to(tl.int64) * tokens
    store_sums(part, rows, live, step, max_s, sum_s, dot_s, pick_s, max_t, sum_t, dot_t, pick_t, cross, owned)


@triton.jit(do_not_specialize=["tokens", "V", "share", "step", "step_look"])
def fused_look(
    xs, ws, xt, wt, bias_s, bias_t, valid, inverse, stats, look, tokens, V, HS, HT, share, step, step_look,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """`algebra.second_look` of `share` columns a program, into look [2, splits, T]. Grid: as `fused_sums`."""
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    live = rows < tokens
    inv = row_values(inverse, rows, live)
    shift_s = tl.load(stats + SHIFT_S * step + rows, mask=live, other=0.0)
    log_s = tl.load(stats + LOG_S * step + rows, mask=live, other=0.0)
    shift_t = tl.load(stats + SHIFT_T * step + rows, mask=live, other=0.0)
    log_t = tl.load(stats + LOG_T * step + rows, mask=live, other=0.0)
    value = tl.zeros([BM], tl.float32)
    slope = tl.zeros([BM], tl.float32)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, V)
    for column in tl.range(first, end, BN, num_stages=1):
        raw_s, raw_t = products(xs, ws, xt, wt, row, column, end, tokens, HS, HT, KIND, BM, BN, BK, TMA, EVEN, PRECISION, PARTS)
        for i in tl.static_range(PARTS):
            at = column + i * (BN // PARTS) + tl.arange(0, BN // PARTS)
            zs, zt = logits(raw_s[i], raw_t[i], bias_s, bias_t, valid, inv, at, end, CAP_S, CAP_T, SCALE_T, KIND)
            v, s = mixture_value(zs - shift_s[:, None] - log_s[:, None], zt - shift_t[:, None] - log_t[:, None], KIND, A, B)
            value += v
            slope += s
    part = look + tl.program_id(1).to(tl.int64) * tokens + rows
    tl.store(part, value, mask=live)
    tl.store(part + step_look, slope, mask=live)


@triton.jit(do_not_specialize=["tokens", "row0", "n", "column0", "end", "start", "step", "step_up"])
def fused_gradient(
    xs, ws, xt, wt, dz, target, bias_s, bias_t, valid, inverse, temperature, stats, upstream, tokens, row0, n, column0, end, HS, HT, start,
    stride_dz, step, step_up,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr = 1,
):  # fmt: skip
    """`algebra.logit_gradient` of tokens row0 to row0 + n and columns column0 to end, into dz [n, w]. Grid: (cdiv(n, BM), cdiv(w, BN))."""
    row = row0 + tl.program_id(0) * BM
    column = column0 + tl.program_id(1) * BN
    rows = row + tl.arange(0, BM)
    live = rows < row0 + n
    inv = row_values(inverse, rows, live)
    own, other, constant, onehot, shift_s, shift_t, log_ratio, dead = factors(stats, upstream, target, inv, rows, live, step, step_up, KIND)
    raw_s, raw_t = products(xs, ws, xt, wt, row, column, end, tokens, HS, HT, KIND, BM, BN, BK, TMA, EVEN, PRECISION, PARTS)
    if target is not None:
        wanted = held(target, rows, live, start, end)
    temp = row_values(temperature, rows, live)
    dz += (rows - row0).to(tl.int64) * stride_dz
    for i in tl.static_range(PARTS):
        within = tl.program_id(1) * BN + i * (BN // PARTS) + tl.arange(0, BN // PARTS)
        at = column0 + within
        zs, zt = logits(raw_s[i], raw_t[i], bias_s, bias_t, valid, inv, at, end, CAP_S, CAP_T, SCALE_T, KIND)
        hit = at[None, :] < 0
        if target is not None:
            hit = at[None, :] == wanted[:, None]
        g = logit_gradient(zs, zt, hit, temp, own, other, constant, onehot, shift_s, shift_t, log_ratio, dead, CAP_S, KIND, A, B)
        tl.store(dz[:, None] + within[None, :], g.to(dz.dtype.element_ty), mask=live[:, None] & (within < stride_dz)[None, :])
