"""Triton kernels for the operations of ``engine.ops``, on CUDA: few launches, and bfloat16 that no batch changes.

A row's result is the same, to the last bit, whatever rows run beside it and however many: no kernel mixes rows, every
sum has an order that depends on the shape of a weight alone, attention is split at fixed slots and merged in their
order. ``TRITON_INTERPRET=1``, set before Triton is imported, runs the kernels on a CPU, in float32 only.

Products read a weight matrix once for all rows of a step: one program multiplies a tile of it with a tile of rows and
one of N parts of the sum; whatever reads the sums next adds the parts.

Letters as in ``engine.ops``; N parts of a sum.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pam_espnet.engine.ops import Ops

SPLIT = 64  # slots of one split of attention, half as many in float32; prefixes are padded to a multiple
CUBLAS_ROWS = 32  # from here on cuBLAS is faster where a row's result may depend on the others
CHUNK = 8192  # columns of logits that one program reads
PROGRAMS = 256  # that a product has at least, by splitting its sums: about two per multiprocessor
MOST_PARTS = 8  # what is written in parts is read again

_HOLDS: dict[Any, bool] = {}  # by device, dtype and shape: see ``cublas_holds``


class Parts(NamedTuple):
    """What a product made.

    Attributes:
        values: (N,R,O) float32, or in the rows' dtype where N is 1 and nothing is to be added.
        bias: (O,), still to be added.
        dtype: of the rows, which the sums are rounded to.
    """

    values: Tensor
    bias: Tensor | None
    dtype: torch.dtype


class Tiles(NamedTuple):
    """How ``_product`` cuts its work."""

    width: int  # outputs of a program
    rows: int  # rows of a program
    depth: int  # inputs of one round of a program's loop
    parts: int  # N
    stages: int  # rounds in flight
    warps: int


class Kernels(Ops):
    """See ``Ops``; layers are ``engine.packed.Plain`` on one CUDA device, tensors are contiguous.

    The first call with new shapes compiles, or checks cuBLAS, which cannot be captured: run everything once before.

    Args:
        batch_invariant: False lets cuBLAS multiply where it is faster; a row's last bits then depend on its batch.
    """

    def __init__(self, batch_invariant: bool = True) -> None:
        self.batch_invariant = batch_invariant

    def add_norm(self, x: Tensor, sums: Parts | None, weight: Tensor, eps: float) -> Tensor:
        """See ``Ops``."""
        (rows, width), found = x.shape, torch.empty_like(x)
        values, bias = (None, None) if sums is None else (sums.values, sums.bias)
        _add_norm[(rows,)](
            x, found, values, bias, weight, eps, rows, width, PARTS=0 if values is None else len(values),
            BLOCK=triton.next_power_of_2(width), num_warps=8 if width >= 2048 else 4,
        )  # fmt: skip
        return found

    def product(self, x: Tensor, layer: Any, many: bool, like: Any = None) -> Parts:
        """See ``Ops``."""
        weight, bias = layer.weight, layer.bias
        if not self.batch_invariant and (many or len(x) >= CUBLAS_ROWS):
            return Parts(F.linear(x, weight, bias)[None], None, x.dtype)
        if self.batch_invariant and many and cublas_holds(weight, bias):
            return Parts(_product_of_prefixes(x, weight, bias)[None], None, x.dtype)
        alike = len((like or layer).weight)
        return Parts(multiply(x, weight, one_part=many, rounded=bias is None, alike=alike), bias, x.dtype)

    def turn_write(
        self,
        sums: Parts,
        block: Any,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        utterance: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """See ``Ops``."""
        shape, (parts, rows, width) = block.shape, sums.values.shape
        heads = width // shape.head  # queries', keys' and values'
        query = keys.new_empty(rows, heads - 2 * shape.kv_heads, shape.head)
        assert keys.stride() == values.stride() and keys.stride(3) == 1
        _turn_write[(rows, heads)](
            sums.values, sums.bias, block.q_norm, block.k_norm, cos, sin, positions, utterance, slots, query, keys,
            values, *keys.stride()[:3], shape.eps, rows, A=query.shape[1], J=shape.kv_heads, E=shape.head, PARTS=parts,
            BLOCK=triton.next_power_of_2(shape.head // 2), num_warps=1,
        )  # fmt: skip
        return query

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        lengths: Tensor,
        first: int,
        used: Tensor,
        scale: float,
    ) -> Tensor:
        """See ``Ops``."""
        (count, kv_heads, slots, head), (rows, heads, _), size = keys.shape, query.shape, visible.shape[1]
        assert keys.stride() == values.stride() and keys.stride(3) == 1 and visible.is_contiguous()
        groups = heads // kv_heads
        # At most 32 rows and heads per program: one of 64 would multiply with other instructions on a Hopper GPU.
        # Float32 is multiplied without tensor cores, from registers, which hold less.
        block, split = (16, SPLIT // 2) if query.dtype == torch.float32 else (16 if size * groups <= 16 else 32, SPLIT)
        splits = triton.cdiv(slots, split)
        shape = (count * kv_heads, splits, size * groups)
        found, tops, sums = (query.new_empty(*shape, *more, dtype=torch.float32) for more in ((head,), (), ()))
        out = query.new_empty(rows, heads * head)
        sizes = {"K": size, "G": groups, "J": kv_heads, "E": head, "BLOCK_E": max(16, triton.next_power_of_2(head))}
        _attend[(*shape[:2], triton.cdiv(shape[2], block))](
            query, keys, values, visible, found, tops, sums, lengths, first, used, scale, slots, splits,
            *keys.stride()[:3], **sizes, BLOCK_M=block, SPLIT=split, num_warps=4, num_stages=1,
        )  # fmt: skip
        _merge[(shape[0], shape[2])](
            found, tops, sums, out, splits, **sizes, BLOCK_S=triton.next_power_of_2(splits), UNROLL=8, num_warps=1
        )
        return out

    def attend_prefix(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """See ``Ops``. This kernel of torch never splits keys, so a query's result depends on the keys before it alone;
        its other kernels choose by the size of the batch."""
        if query.device.type == "cpu":  # interpreted
            return super().attend_prefix(query, keys, values, scale)
        head = query.shape[-1]
        missing = -head % 8  # it wants whole vectors; zeros change nothing
        if missing:
            query, keys, values = (F.pad(part, (0, missing)) for part in (query, keys, values))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            found = super().attend_prefix(query, keys, values, scale)
        return found.unflatten(-1, (-1, head + missing))[..., :head].flatten(2) if missing else found

    def gate(self, sums: Parts) -> Tensor:
        """See ``Ops``."""
        parts, rows, width = sums.values.shape
        found = sums.values.new_empty(rows, width // 2, dtype=sums.dtype)
        _gate[(rows, triton.cdiv(width // 2, 1024))](
            sums.values, sums.bias, found, rows, width // 2, PARTS=parts, BLOCK=1024, num_warps=4
        )
        return found

    def logits(self, x: Tensor, layer: Any) -> Tensor:
        """See ``Ops``; not rounded to the rows' dtype in between, but where cuBLAS does it."""
        weight, bias = layer.weight, layer.bias
        if not self.batch_invariant:
            return F.linear(x, weight, bias).float()
        found = multiply(x, weight, one_part=True, rounded=False)[0]
        return found if bias is None else found.add_(bias)

    def logsumexp(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """See ``Ops``: of chunks first, then of what they gave."""
        (rows, width), chunks = logits.shape, triton.cdiv(logits.shape[1], CHUNK)
        found, total = logits.new_empty(rows, chunks), logits.new_empty(rows, 1)
        _logsumexp[(rows, chunks)](logits, temperature, found, width, BLOCK=CHUNK, num_warps=8)
        _logsumexp[(rows, 1)](found, None, total, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1)
        return total


# ---- products -------------------------------------------------------------------------------------------------------


def choose_tiles(rows: int, outputs: int, inputs: int, itemsize: int, shared: int, one_part: bool = False) -> Tiles:
    """Tiles for rows (R,I) of ``itemsize`` bytes a number and a weight (O,I), on a card with ``shared`` bytes of shared
    memory per block.

    What the order of a sum depends on, depth and parts, is chosen by the weight alone. Width is a multiple of 64 and
    warps of 4, so that a Hopper GPU multiplies all tiles with the same instructions.
    """
    depth = 128 // itemsize  # a line of the cache
    parts = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(PROGRAMS, triton.cdiv(outputs, 64))), inputs // 256)
    block = min(128, max(16, triton.next_power_of_2(rows)))
    width = 64 if block <= 32 or itemsize > 2 else 128  # with many rows reading them again counts, with few the balance
    stage = (width + block) * depth * itemsize
    # Three small programs share a multiprocessor, or two large ones: while one ends, the others read.
    buffers = min(6, max(3, shared // (3 if block <= 32 else 2) // stage), max(1, shared // stage))
    early = shared < 200 * 1024  # before Hopper one round more is in flight, in registers
    warps = 8 if width * block >= 8192 else 4
    return Tiles(width, block, depth, 1 if one_part else max(1, parts), buffers + early, warps)


def multiply(x: Tensor, weight: Tensor, one_part: bool, rounded: bool, alike: int | None = None) -> Tensor:
    """x (R,I) times weight (O,I), the sum over I in parts -> (N,R,O) float32; ``rounded``: as x where N is 1;
    ``alike``: outputs of the weight whose order of sums is to be followed, where it is another one."""
    x, (rows, inputs), outputs = x.contiguous(), x.shape, len(weight)
    assert weight.is_contiguous()
    tiles = choose_tiles(rows, alike or outputs, inputs, x.element_size(), _shared_memory(x.device), one_part)
    found = x.new_empty(tiles.parts, rows, outputs, dtype=x.dtype if rounded and tiles.parts == 1 else torch.float32)
    grid = (triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.width), tiles.parts)
    _product[grid](
        x, weight, found, rows, outputs, inputs, WIDTH=tiles.width, ROWS=tiles.rows, DEPTH=tiles.depth,
        PARTS=tiles.parts, EVEN=inputs % tiles.depth == 0, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return found


def cublas_holds(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether cuBLAS gives a row the same result anywhere in a tile and beside any others; tried once per shape."""
    key = (weight.device, weight.dtype, tuple(weight.shape), bias is None)
    if key not in _HOLDS:
        generator = torch.Generator(weight.device).manual_seed(0)
        size = _tile_rows(weight)
        x = torch.randn(size, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
        order = torch.randperm(size, generator=generator, device=weight.device)
        found, moved, equal = (
            _product_of_prefixes(rows, weight, bias) for rows in (x, x[order], x[:1].repeat(size, 1))
        )
        _HOLDS[key] = torch.equal(moved, found[order]) and torch.equal(equal, found[:1].expand_as(found))
    return _HOLDS[key]


def _product_of_prefixes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R,I) times weight (O,I) -> (R,O) by cuBLAS, in tiles of a fixed number of rows: it chooses by that number."""
    rows, size = len(x), _tile_rows(weight)
    found = x.new_empty(triton.cdiv(rows, size) * size, len(weight))
    for start in range(0, rows, size):
        tile, out = x[start : start + size], found[start : start + size]
        if len(tile) < size:
            tile = F.pad(tile, (0, 0, 0, size - len(tile)))
        if bias is None:
            torch.mm(tile, weight.t(), out=out)
        else:
            torch.addmm(bias, tile, weight.t(), out=out)
    return found[:rows]


def _tile_rows(weight: Tensor) -> int:
    """Enough for all of a large GPU: narrow weights need more rows."""
    return 512 if len(weight) >= 8192 else 1024


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one block may have."""
    if device.type == "cpu":  # interpreted
        return 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@triton.jit(do_not_specialize=["rows"])
def _product(
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
def _rounded(values, bias, row, rows, width, at, inside, kind: tl.constexpr, PARTS: tl.constexpr):
    """The columns ``at`` of the sums (N,R,width) of a row: parts added in their order, then the bias."""
    found = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        found += tl.load(values + (part * rows + row) * width + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        found += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    return found.to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x, found, values, bias, weight, eps, rows, width, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    kind: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if values is not None:
        value += _rounded(values, bias, row, rows, width, at, inside, kind, PARTS)
        tl.store(x + row * width + at, value.to(kind), mask=inside)
        value = value.to(kind).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(found + row * width + at, (value * scale * factor).to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gate(values, bias, found, rows, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    kind: tl.constexpr = found.dtype.element_ty
    gate = _rounded(values, bias, row, rows, 2 * width, at, inside, kind, PARTS)
    up = _rounded(values, bias, row, rows, 2 * width, width + at, inside, kind, PARTS)
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(found + row * width + at, (gate * up).to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _turn_write(
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
    low = _rounded(sums, bias, row, rows, WIDTH, head * E + at, inside, kind, PARTS)
    high = _rounded(sums, bias, row, rows, WIDTH, head * E + HALF + at, inside, kind, PARTS)
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
def _attend(
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
def _merge(
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
def _logsumexp(values, divisor, found, width, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + row * width + at, mask=at < width, other=float("-inf"))
    if divisor is not None:
        value /= tl.load(divisor)
    top = tl.max(value, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = shift + tl.log(tl.sum(tl.exp(value - shift), axis=0))
    tl.store(found + row * tl.num_programs(1) + chunk, total)
