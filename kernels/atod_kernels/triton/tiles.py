"""The algebra of `algebra.py` as Triton kernels over tiles of logits in memory. What has a name there has it here.

Logits are fp32 [n, w] as the matrix product left them; bias, softcap, temperature and excluded columns are applied on the way in, so
that no pass over memory is spent on them. One program takes one row: the sums of a row stay in registers, the loads are 128 bits wide:
they are masked by the row's stride, a multiple of 16, and read into the padding; what counts is decided by the width w.
Numbers and per-row pointers that change no load are not specialised on: a ragged last chunk compiles nothing anew.
`columns` [N] are the columns of a block within the tile, `rows` [R] its rows; vectors over rows are broadcast as [:, None].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import algebra

MASKED = tl.constexpr(algebra.MASKED)
LOG2E = tl.constexpr(1.4426950408889634)
IGNORED = tl.constexpr(-100)

DIVERGENCE, ENTROPY, LOGP, TEACHER_LOGP, TEACHER_ENTROPY = (tl.constexpr(i) for i in range(5))
SHIFT_S, LOG_S, SHIFT_T, LOG_T, MEAN_SLOPE = (tl.constexpr(i) for i in range(5, 10))


@triton.jit
def exp(x):
    """exp by exp2, the instruction the hardware has; tl.exp adds a scaling for denormal results, which are worth 0 here."""
    return tl.exp2(x * LOG2E)


@triton.jit
def scaled(z, bias, valid, inverse, columns, inside, CAP: tl.constexpr, SCALE: tl.constexpr = 1.0):
    """Scaled logits [R, N] of raw products z; inverse [R] = 1/temperature or None; a column not `inside` is MASKED."""
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP > 0:
        z = CAP * (1 - 2 / (exp(2 / CAP * z) + 1))  # CAP tanh(z / CAP)
    if SCALE != 1.0:
        z *= SCALE
    if inverse is not None:
        z *= inverse[:, None]
    if bias is not None:
        z = tl.where(z < MASKED, MASKED, z)  # a bias of -inf is probability 0; NaN stays
    if valid is not None:
        inside &= tl.load(valid + columns, mask=inside, other=0) != 0
    return tl.where(inside[None, :], z, MASKED)


@triton.jit
def tile_logits(
    zs, zt, bias_s, bias_t, valid, inverse, columns, w, stride, CAP_S: tl.constexpr, CAP_T: tl.constexpr, SCALE_T: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Scaled logits [1, N] of both models from one row in memory; the student's twice where there is no teacher."""
    inside = columns < w
    held = (columns < stride)[None, :]
    a = scaled(tl.load(zs + columns[None, :], mask=held, other=0.0), bias_s, valid, inverse, columns, inside, CAP_S)
    b = a
    if KIND != "":
        b = scaled(tl.load(zt + columns[None, :], mask=held, other=0.0), bias_t, valid, inverse, columns, inside, CAP_T, SCALE_T)
    return a, b


@triton.jit
def row_values(pointer, rows, live):
    """Per-row values [R], None for none."""
    values = None
    if pointer is not None:
        values = tl.load(pointer + rows, mask=live, other=1.0).to(tl.float32)
    return values


@triton.jit
def absorb(z, maximum, total, dot):
    """One model's running maximum m, S = sum e and R = sum e u, u = z - m, over one more block; also u, e and what old sums were scaled by."""
    new = tl.maximum(maximum, tl.max(z, 1))
    shift = maximum - new
    scale = exp(shift)
    u = z - new[:, None]
    e = exp(u)
    dot = scale * (dot + shift * total) + tl.sum(e * u, 1)
    total = scale * total + tl.sum(e, 1)
    return new, total, dot, u, e, shift, scale


@triton.jit
def absorb_both(zs, zt, max_s, sum_s, dot_s, max_t, sum_t, dot_t, cross, KIND: tl.constexpr):
    """The sums of `algebra.partial` over one more block of both models; zt is unused where KIND is ''."""
    old_s, old_t = sum_s, sum_t
    max_s, sum_s, dot_s, us, es, shift_s, scale_s = absorb(zs, max_s, sum_s, dot_s)
    if KIND != "":
        max_t, sum_t, dot_t, ut, et, shift_t, scale_t = absorb(zt, max_t, sum_t, dot_t)
        if KIND == "reverse_kl":
            cross = scale_s * (cross + (shift_s - shift_t) * old_s) + tl.sum(es * (us - ut), 1)
        elif KIND == "forward_kl":
            cross = scale_t * (cross + (shift_t - shift_s) * old_t) + tl.sum(et * (ut - us), 1)
    return max_s, sum_s, dot_s, max_t, sum_t, dot_t, cross


@triton.jit
def store_sums(parts, rows, live, step, max_s, sum_s, dot_s, pick_s, max_t, sum_t, dot_t, pick_t, cross, owned):
    """Rows of a partial result, in the order of `algebra`; `step` is the distance between two of them."""
    parts += rows
    tl.store(parts, max_s, mask=live)
    tl.store(parts + step, sum_s, mask=live)
    tl.store(parts + 2 * step, dot_s, mask=live)
    tl.store(parts + 3 * step, pick_s, mask=live)
    tl.store(parts + 4 * step, max_t, mask=live)
    tl.store(parts + 5 * step, sum_t, mask=live)
    tl.store(parts + 6 * step, dot_t, mask=live)
    tl.store(parts + 7 * step, pick_t, mask=live)
    tl.store(parts + 8 * step, cross, mask=live)
    tl.store(parts + 9 * step, owned, mask=live)


@triton.jit
def mixture_parts(log_p, log_q, A: tl.constexpr, B: tl.constexpr):
    """log q - log p within +-80, q/p and D = m/p; `algebra.Mixture.ratio`."""
    difference = tl.minimum(tl.maximum(log_q - log_p, -80.0), 80.0)
    ratio = exp(difference)
    return difference, ratio, A + B * ratio


@triton.jit
def mixture_value(log_p, log_q, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """[R] each: the block's part of the divergence and of sum p f'; `algebra.Mixture.value`."""
    difference, _, mean = mixture_parts(log_p, log_q, A, B)
    p = exp(log_p)
    q = exp(log_q)
    log_mean = tl.log(mean)
    if KIND == "skew_reverse_kl":
        value = -tl.sum(p * log_mean, 1)
        slope = -tl.sum(p * (log_mean + A / mean), 1)
    elif KIND == "skew_forward_kl":
        value = tl.sum(q * (difference - log_mean), 1)
        slope = -A * tl.sum(q * (1 / mean), 1)
    else:
        slope = -A * tl.sum(p * log_mean, 1)
        value = slope + B * tl.sum(q * (difference - log_mean), 1)
    return value, slope


@triton.jit
def mixture_slope(log_p, log_q, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """f' [R, N]; `algebra.Mixture.slope`."""
    _, ratio, mean = mixture_parts(log_p, log_q, A, B)
    if KIND == "jsd":
        slope = -A * tl.log(mean)
    elif KIND == "skew_forward_kl":
        slope = -A * ratio / mean
    else:
        slope = -tl.log(mean) - A / mean
    return slope


@triton.jit
def factors(stats, upstream, target, inverse, rows, live, step, step_up, KIND: tl.constexpr):
    """`algebra.factors` and the normalisers, [R] each; `dead` rows (ignored, or out of range: NaN) get no gradient."""
    stats += rows
    upstream += rows
    divergence = tl.load(stats + DIVERGENCE * step, mask=live, other=0.0)
    entropy = tl.load(stats + ENTROPY * step, mask=live, other=0.0)
    logp = tl.load(stats + LOGP * step, mask=live, other=0.0)
    shift_s = tl.load(stats + SHIFT_S * step, mask=live, other=0.0)
    log_s = tl.load(stats + LOG_S * step, mask=live, other=0.0)
    shift_t = tl.load(stats + SHIFT_T * step, mask=live, other=0.0)
    log_t = tl.load(stats + LOG_T * step, mask=live, other=0.0)
    g = tl.load(upstream, mask=live, other=0.0)
    h = tl.load(upstream + step_up, mask=live, other=0.0)
    lp = tl.load(upstream + 2 * step_up, mask=live, other=0.0)
    dead = ~live
    if target is not None:
        dead |= (tl.load(target + rows, mask=live, other=IGNORED) == IGNORED) | (logp != logp)
    else:
        lp = tl.zeros_like(lp)
    if inverse is not None:
        g *= inverse
        h *= inverse
        lp *= inverse
    norm = exp(-log_s)
    own = -h
    other = g
    constant = h * (log_s - entropy) - lp
    if KIND == "reverse_kl":
        own += g
        other = -g
        constant -= g * (log_s - log_t + divergence)
    elif KIND == "forward_kl":
        other = -g * exp(log_s - log_t)
        constant += g
    elif KIND != "":
        constant -= g * tl.load(stats + MEAN_SLOPE * step, mask=live, other=0.0)
    return own * norm, other * norm, constant * norm, lp, shift_s, shift_t, log_s - log_t, dead


@triton.jit
def logit_gradient(
    zs,
    zt,
    hit,
    temperature,
    own,
    other,
    constant,
    onehot,
    shift_s,
    shift_t,
    log_ratio,
    dead,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """The gradient [R, N] of the raw student logits from scaled ones; `hit` [R, N] marks the targets, log_ratio [R] = log S - log Q."""
    us = zs - shift_s[:, None]
    e = exp(us)
    dz = own[:, None] * us + constant[:, None]
    if KIND == "forward_kl":
        dz = dz * e + other[:, None] * exp(zt - shift_t[:, None])
    elif KIND == "":
        dz *= e
    else:
        x = zt - shift_t[:, None]
        if KIND != "reverse_kl":
            x = mixture_slope(us, x + log_ratio[:, None], KIND, A, B)  # log S is added to both logarithms
        dz = (dz + other[:, None] * x) * e
    dz += tl.where(hit, onehot[:, None], 0.0)
    if CAP > 0:
        capped = zs / CAP
        if temperature is not None:
            capped *= temperature[:, None]
        dz *= 1 - tl.minimum(capped * capped, 1.0)
    return tl.where(dead[:, None], 0.0, dz)


@triton.jit(do_not_specialize=["start", "w", "step"], do_not_specialize_on_alignment=["target", "inverse", "parts"])
def tile_sums(
    zs,
    zt,
    target,
    bias_s,
    bias_t,
    valid,
    inverse,
    parts,
    start,
    w,
    stride,
    step,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    SCALE_T: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`algebra.partial`: the sums of one tile, columns start to start + w of the vocabulary, into parts [PARTIALS, n]. Grid: (n,).

    `bias_s`, `bias_t` and `valid` begin at the tile's first column, in all kernels of tiles.
    """
    rows = tl.program_id(0) + tl.arange(0, 1)
    live = rows >= 0
    inv = row_values(inverse, rows, live)
    row = tl.program_id(0).to(tl.int64) * stride
    zs += row
    if KIND != "":
        zt += row
    max_s = tl.full([1], MASKED, tl.float32)
    max_t = tl.full([1], MASKED, tl.float32)
    sum_s = tl.zeros([1], tl.float32)
    sum_t = tl.zeros([1], tl.float32)
    dot_s = tl.zeros([1], tl.float32)
    dot_t = tl.zeros([1], tl.float32)
    cross = tl.zeros([1], tl.float32)
    for i in tl.range(0, w, BLOCK):
        at = i + tl.arange(0, BLOCK)
        a, b = tile_logits(zs, zt, bias_s, bias_t, valid, inv, at, w, stride, CAP_S, CAP_T, SCALE_T, KIND)
        max_s, sum_s, dot_s, max_t, sum_t, dot_t, cross = absorb_both(a, b, max_s, sum_s, dot_s, max_t, sum_t, dot_t, cross, KIND)
    pick_s = tl.zeros([1], tl.float32)
    pick_t = tl.zeros([1], tl.float32)
    owned = tl.zeros([1], tl.float32)
    if target is not None:
        at = tl.load(target + rows) - start
        held = (at >= 0) & (at < w)
        at = tl.where(held, at, 0).to(tl.int32)
        owned = held.to(tl.float32)
        z = scaled(tl.load(zs + at[None, :], mask=held[None, :], other=0.0), bias_s, valid, inv, at, held, CAP_S)
        pick_s = tl.where(held, tl.sum(z, 1), 0.0)
        if KIND != "":
            z = scaled(tl.load(zt + at[None, :], mask=held[None, :], other=0.0), bias_t, valid, inv, at, held, CAP_T, SCALE_T)
            pick_t = tl.where(held, tl.sum(z, 1), 0.0)
    store_sums(parts, rows, live, step, max_s, sum_s, dot_s, pick_s, max_t, sum_t, dot_t, pick_t, cross, owned)


@triton.jit(do_not_specialize=["w", "step", "step_look"], do_not_specialize_on_alignment=["inverse", "stats", "look"])
def tile_look(
    zs,
    zt,
    bias_s,
    bias_t,
    valid,
    inverse,
    stats,
    look,
    w,
    stride,
    step,
    step_look,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    SCALE_T: tl.constexpr,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`algebra.second_look`: a mixture's part of one tile into look [2, n]. Grid: (n,)."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    live = rows >= 0
    inv = row_values(inverse, rows, live)
    row = tl.program_id(0).to(tl.int64) * stride
    shift_s = tl.load(stats + SHIFT_S * step + rows)
    log_s = tl.load(stats + LOG_S * step + rows)
    shift_t = tl.load(stats + SHIFT_T * step + rows)
    log_t = tl.load(stats + LOG_T * step + rows)
    value = tl.zeros([1], tl.float32)
    slope = tl.zeros([1], tl.float32)
    for i in tl.range(0, w, BLOCK):
        at = i + tl.arange(0, BLOCK)
        a, b = tile_logits(zs + row, zt + row, bias_s, bias_t, valid, inv, at, w, stride, CAP_S, CAP_T, SCALE_T, KIND)
        dv, ds = mixture_value(a - shift_s[:, None] - log_s[:, None], b - shift_t[:, None] - log_t[:, None], KIND, A, B)
        value += dv
        slope += ds
    tl.store(look + rows, value)
    tl.store(look + step_look + rows, slope)


@triton.jit(do_not_specialize=["start", "w", "step", "step_up"], do_not_specialize_on_alignment=["target", "inverse", "temperature", "stats", "upstream"])
def tile_gradient(
    zs,
    zt,
    dz,
    target,
    bias_s,
    bias_t,
    valid,
    inverse,
    temperature,
    stats,
    upstream,
    start,
    w,
    stride,
    stride_dz,
    step,
    step_up,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    SCALE_T: tl.constexpr,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`algebra.logit_gradient` of one tile into dz [n, w], which may be zs where it is fp32 too. Grid: (n, cdiv(w, BLOCK)).

    Half-width gradients need memory of their own: written over fp32 logits, one program's results would lie on another's input.
    """
    rows = tl.program_id(0) + tl.arange(0, 1)
    live = rows >= 0
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inv = row_values(inverse, rows, live)
    row = tl.program_id(0).to(tl.int64)
    zs += row * stride
    if KIND != "":
        zt += row * stride
    a, b = tile_logits(zs, zt, bias_s, bias_t, valid, inv, at, w, stride, CAP_S, CAP_T, SCALE_T, KIND)
    own, other, constant, onehot, shift_s, shift_t, log_ratio, dead = factors(stats, upstream, target, inv, rows, live, step, step_up, KIND)
    hit = at[None, :] < 0
    if target is not None:
        hit = (start + at)[None, :] == tl.load(target + rows)[:, None]
    temp = row_values(temperature, rows, live)
    g = logit_gradient(a, b, hit, temp, own, other, constant, onehot, shift_s, shift_t, log_ratio, dead, CAP_S, KIND, A, B)
    tl.store(dz + row * stride_dz + at[None, :], g.to(dz.dtype.element_ty), mask=(at < stride_dz)[None, :])


@triton.jit(do_not_specialize=["n", "k", "step", "step_row", "step_out"], do_not_specialize_on_alignment=["parts", "stats", "target"])
def combine(parts, stats, target, n, k, step, step_row, step_out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """`algebra.merge` and `algebra.statistics`: parts [PARTIALS, k, n] of k disjoint column sets into stats [STATISTICS, n]. Grid: (cdiv(n, BLOCK),).

    An ignored row's outputs are 0, those of a row whose target no column set holds, or is left out, are NaN; a mixture's own are left to the
    second look.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < n
    max_s = tl.full([BLOCK], MASKED, tl.float32)
    max_t = tl.full([BLOCK], MASKED, tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    dot_s = tl.zeros([BLOCK], tl.float32)
    dot_t = tl.zeros([BLOCK], tl.float32)
    pick_s = tl.zeros([BLOCK], tl.float32)
    pick_t = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    owned = tl.zeros([BLOCK], tl.float32)
    for i in range(k):
        p = parts + i * step_row + rows
        part_s = tl.load(p, mask=live, other=MASKED)
        part_sum_s = tl.load(p + step, mask=live, other=0.0)
        new_s = tl.maximum(max_s, part_s)
        shift_s = max_s - new_s
        by_s = part_s - new_s
        part_t = tl.load(p + 4 * step, mask=live, other=MASKED)
        part_sum_t = tl.load(p + 5 * step, mask=live, other=0.0)
        new_t = tl.maximum(max_t, part_t)
        shift_t = max_t - new_t
        by_t = part_t - new_t
        part_cross = tl.load(p + 8 * step, mask=live, other=0.0)
        if KIND == "reverse_kl":
            cross = exp(shift_s) * (cross + (shift_s - shift_t) * sum_s) + exp(by_s) * (part_cross + (by_s - by_t) * part_sum_s)
        elif KIND == "forward_kl":
            cross = exp(shift_t) * (cross + (shift_t - shift_s) * sum_t) + exp(by_t) * (part_cross + (by_t - by_s) * part_sum_t)
        dot_s = exp(shift_s) * (dot_s + shift_s * sum_s) + exp(by_s) * (tl.load(p + 2 * step, mask=live, other=0.0) + by_s * part_sum_s)
        sum_s = exp(shift_s) * sum_s + exp(by_s) * part_sum_s
        dot_t = exp(shift_t) * (dot_t + shift_t * sum_t) + exp(by_t) * (tl.load(p + 6 * step, mask=live, other=0.0) + by_t * part_sum_t)
        sum_t = exp(shift_t) * sum_t + exp(by_t) * part_sum_t
        pick_s += tl.load(p + 3 * step, mask=live, other=0.0)
        pick_t += tl.load(p + 7 * step, mask=live, other=0.0)
        owned += tl.load(p + 9 * step, mask=live, other=0.0)
        max_s = new_s
        max_t = new_t
    log_s = tl.log(sum_s)
    entropy = log_s - dot_s / sum_s
    logp = pick_s - max_s - log_s
    log_t = tl.zeros([BLOCK], tl.float32)
    teacher_entropy = tl.zeros([BLOCK], tl.float32)
    teacher_logp = tl.zeros([BLOCK], tl.float32)
    divergence = tl.zeros([BLOCK], tl.float32)
    if KIND != "":
        log_t = tl.log(sum_t)
        teacher_entropy = log_t - dot_t / sum_t
        teacher_logp = pick_t - max_t - log_t
        if KIND == "reverse_kl":
            divergence = cross / sum_s - log_s + log_t
        elif KIND == "forward_kl":
            divergence = cross / sum_t - log_t + log_s
    if target is not None:
        ignored = tl.load(target + rows, mask=live, other=IGNORED) == IGNORED
        lost = tl.where((owned == 1) & (pick_s > MASKED / 2), 0.0, float("nan"))
        divergence = tl.where(ignored, 0.0, divergence + lost)
        entropy = tl.where(ignored, 0.0, entropy + lost)
        logp = tl.where(ignored, 0.0, logp + lost)
        teacher_entropy = tl.where(ignored, 0.0, teacher_entropy + lost)
        teacher_logp = tl.where(ignored, 0.0, teacher_logp + lost)
    out = stats + rows
    tl.store(out + DIVERGENCE * step_out, divergence, mask=live)
    tl.store(out + ENTROPY * step_out, entropy, mask=live)
    tl.store(out + LOGP * step_out, logp, mask=live)
    tl.store(out + TEACHER_LOGP * step_out, teacher_logp, mask=live)
    tl.store(out + TEACHER_ENTROPY * step_out, teacher_entropy, mask=live)
    tl.store(out + SHIFT_S * step_out, max_s, mask=live)
    tl.store(out + LOG_S * step_out, log_s, mask=live)
    tl.store(out + SHIFT_T * step_out, max_t, mask=live)
    tl.store(out + LOG_T * step_out, log_t, mask=live)
    tl.store(out + MEAN_SLOPE * step_out, tl.zeros([BLOCK], tl.float32), mask=live)
