"""Triton kernels for the operations of ``engine.ops``, on CUDA: few launches, and bfloat16 that no batch changes.

A row's result is the same, to the last bit, whatever rows run beside it and however many: no kernel mixes rows, every
sum has an order that depends on the shape of a weight alone, attention is split at fixed slots and merged in their
order. ``TRITON_INTERPRET=1``, set before Triton is imported, runs the kernels on a CPU, in float32 only.

Products read a weight matrix once for all rows of a step: one program multiplies a tile of it with a tile of rows and
one of N parts of the sum; whatever reads the sums next adds the parts.

Letters as in ``engine.ops``; N parts of a sum.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pam_espnet.engine import triton_kernels
from pam_espnet.engine.ops import Ops
from pam_espnet.engine.products import cublas_holds, multiply, product_of_prefixes

SPLIT = 64  # slots of one split of attention, half as many in float32; prefixes are padded to a multiple
CUBLAS_ROWS = 32  # from here on cuBLAS is faster where a row's result may depend on the others
CHUNK = 8192  # columns of logits that one program reads


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
        triton_kernels.add_norm[(rows,)](
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
            return Parts(product_of_prefixes(x, weight, bias)[None], None, x.dtype)
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
        triton_kernels.turn_write[(rows, heads)](
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
        triton_kernels.attend[(*shape[:2], triton.cdiv(shape[2], block))](
            query, keys, values, visible, found, tops, sums, lengths, first, used, scale, slots, splits,
            *keys.stride()[:3], **sizes, BLOCK_M=block, SPLIT=split, num_warps=4, num_stages=1,
        )  # fmt: skip
        triton_kernels.merge[(shape[0], shape[2])](
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
        triton_kernels.gate[(rows, triton.cdiv(width // 2, 1024))](
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
        triton_kernels.logsumexp[(rows, chunks)](logits, temperature, found, width, BLOCK=CHUNK, num_warps=8)
        block = triton.next_power_of_2(chunks)
        triton_kernels.logsumexp[(rows, 1)](found, None, total, chunks, BLOCK=block, num_warps=1)
        return total
