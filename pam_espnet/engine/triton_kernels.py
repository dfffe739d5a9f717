"""What ``engine.kernels`` runs on the device, in Triton; letters as there. No kernel mixes rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product(
    x, weight, found, rows, outputs, inputs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Tiles of rows are the fastest index: those that need the same weights run at the same time.
    r_at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.program_id(2)
    rounds = tl.cdiv(inputs, DEPTH)
    r_ok, o_ok = r_at < rows, o_at < outputs
    x_rows = x + r_at.to(tl.int64)[None, :] * inputs
    weights = weight + o_at.to(tl.int64)[:, None] * inputs
    sums = tl.zeros((WIDTH, ROWS), tl.float32)
    for index in range(part * rounds // PARTS, (part + 1) * rounds // PARTS):
        at = index * DEPTH + tl.arange(0, DEPTH)
        if EVEN:
            w = tl.load(weights + at[None, :], mask=o_ok[:, None], other=0.0)
            r = tl.load(x_rows + at[:, None], mask=r_ok[None, :], other=0.0)
        else:
            ok = at < inputs
            w = tl.load(weights + at[None, :], mask=o_ok[:, None] & ok[None, :], other=0.0)
            r = tl.load(x_rows + at[:, None], mask=r_ok[None, :] & ok[:, None], other=0.0)
        sums = tl.dot(w, r, sums, input_precision="ieee")
    target = found + (part * rows + r_at).to(tl.int64)[None, :] * outputs + o_at[:, None]
    tl.store(target, sums.to(found.dtype.element_ty), mask=o_ok[:, None] & r_ok[None, :])


# ---- what reads sums ------------------------------------------------------------------------------------------------


@triton.jit
def rounded(values, bias, row, rows, width, at, inside, kind: tl.constexpr, PARTS: tl.constexpr):
    """The columns ``at`` of the sums (N,R,width) of a row: parts added in their order, then the bias."""
    found = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        found += tl.load(values + (part * rows + row) * width + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        found += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return found.to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def add_norm(
    x, found, values, bias, weight, eps, rows, width, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    kind: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if values is not None:
        value += rounded(values, bias, row, rows, width, at, inside, kind, PARTS)
        tl.store(x + row * width + at, value.to(kind), mask=inside)
        value = value.to(kind).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(found + row * width + at, (value * scale * factor).to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gate(values, bias, found, rows, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    kind: tl.constexpr = found.dtype.element_ty
    gate = rounded(values, bias, row, rows, 2 * width, at, inside, kind, PARTS)
    up = rounded(values, bias, row, rows, 2 * width, width + at, inside, kind, PARTS)
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(found + row * width + at, (gate * up).to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def turn_write(
    sums, bias, q_norm, k_norm, cos, sin, positions, utterance, slots, query, keys, values,
    of_utterance, of_head, of_slot, eps, rows,
    A: tl.constexpr, J: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per row and head: queries first, then keys, then values.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = E // 2
    WIDTH: tl.constexpr = (A + 2 * J) * E
    kind: tl.constexpr = query.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    low = rounded(sums, bias, row, rows, WIDTH, head * E + at, inside, kind, PARTS)
    high = rounded(sums, bias, row, rows, WIDTH, head * E + HALF + at, inside, kind, PARTS)
    if head < A + J:
        if q_norm is not None:
            scale = tl.rsqrt((tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / E + eps)
            factor = q_norm
            if head >= A:
                factor = k_norm
            low *= scale * tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
            high *= scale * tl.load(factor + HALF + at, mask=inside, other=0.0).to(tl.float32)
            low, high = low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)
        place = tl.load(positions + row) * HALF + at
        c = tl.load(cos + place, mask=inside, other=0.0).to(kind).to(tl.float32)
        s = tl.load(sin + place, mask=inside, other=0.0).to(kind).to(tl.float32)
        turned = (low * c).to(kind).to(tl.float32) - high * s
        high = (high * c).to(kind).to(tl.float32) + low * s
        low = turned
    where = tl.load(utterance + row) * of_utterance + tl.load(slots + row) * of_slot
    target = query + (row * A + head) * E
    if head >= A + J:
        target = values + where + (head - A - J) * of_head
    elif head >= A:
        target = keys + where + (head - A) * of_head
    tl.store(target + at, low.to(kind), mask=inside)
    tl.store(target + HALF + at, high.to(kind), mask=inside)


# ---- attention ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "splits"])
def attend(
    query, keys, values, visible, found, tops, sums, lengths, first, used, scale, slots, splits,
    of_utterance, of_head, of_slot,
    K: tl.constexpr, G: tl.constexpr, J: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    # One program per key/value head of an utterance, split of slots, and block of the rows and heads that share them.
    pair, split = tl.program_id(0), tl.program_id(1)
    utterance, kv_head = pair // J, pair % J
    index = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = index < K * G
    target = (pair.to(tl.int64) * splits + split) * (K * G) + index
    length, end, start = tl.load(lengths + utterance), tl.load(used), split * SPLIT
    if (start < length) | ((start < end) & (start + SPLIT > first)):
        e = tl.arange(0, BLOCK_E)
        at = start + tl.arange(0, SPLIT)
        there = ((at < length) | ((at >= first) & (at < end))) & (at < slots)
        row, head = utterance * K + index // G, kv_head * G + index % G
        q_at = (row * (J * G) + head)[:, None] * E + e[None, :]
        q = tl.load(query + q_at, mask=real[:, None] & (e < E)[None, :], other=0.0)
        memory = utterance.to(tl.int64) * of_utterance + kv_head * of_head + at[:, None] * of_slot + e[None, :]
        ok = there[:, None] & (e < E)[None, :]
        k = tl.load(keys + memory, mask=ok, other=0.0)
        v = tl.load(values + memory, mask=ok, other=0.0)
        sees = tl.load(
            visible + row.to(tl.int64)[:, None] * slots + at[None, :], mask=real[:, None] & there[None, :], other=0
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(sees != 0, scores, float("-inf"))
        top = tl.max(scores, axis=1)
        shift = tl.where(top == float("-inf"), 0.0, top)  # a row that sees nothing here
        weights = tl.exp(scores - shift[:, None])
        result = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        tl.store(tops + target, top, mask=real)
        tl.store(sums + target, tl.sum(weights, axis=1), mask=real)
        tl.store(found + target[:, None] * E + e[None, :], result, mask=real[:, None] & (e < E)[None, :])
    else:
        tl.store(tops + target, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=real)


@triton.jit(do_not_specialize=["splits"])
def merge(
    found, tops, sums, out, splits,
    K: tl.constexpr, G: tl.constexpr, J: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    # Splits are added in their order: empty ones, of which a longer memory has more, change nothing.
    pair, index = tl.program_id(0), tl.program_id(1)
    e, s = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
    base = pair.to(tl.int64) * splits * (K * G) + index
    best = tl.max(tl.load(tops + base + s * (K * G), mask=s < splits, other=float("-inf")), axis=0)
    total = 0.0
    result = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, splits, UNROLL):
        for offset in tl.static_range(UNROLL):  # their reads overlap
            split = start + offset
            source = base + split * (K * G)
            top = tl.load(tops + source, mask=split < splits, other=float("-inf"))
            more = tl.load(sums + source, mask=split < splits, other=0.0)
            part = tl.load(found + source * E + e, mask=(split < splits) & (e < E), other=0.0)
            some = top > float("-inf")  # else nothing was written
            weight = tl.where(some, tl.exp(top - best), 0.0)
            total += weight * tl.where(some, more, 0.0)
            result += weight * tl.where(some, part, 0.0)
    result = tl.where(total > 0, result / total, 0.0)
    row, head = (pair // J) * K + index // G, (pair % J) * G + index % G
    tl.store(out + (row * (J * G) + head) * E + e, result.to(out.dtype.element_ty), mask=e < E)


# ---- the vocabulary -------------------------------------------------------------------------------------------------


@triton.jit
def logsumexp(values, divisor, found, width, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + row * width + at, mask=at < width, other=float("-inf"))
    if divisor is not None:
        value /= tl.load(divisor)
    top = tl.max(value, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = shift + tl.log(tl.sum(tl.exp(value - shift), axis=0))
    tl.store(found + row * tl.num_programs(1) + chunk, total)
