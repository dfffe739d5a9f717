"""Linear layers as decoding multiplies them: the same weights many times with few rows, so they are packed once.

The time of such a product is the time it takes to read the weights. Kernels, by precision of the weights:

float32, bfloat16  on an x86 CPU oneDNN's, which want the weights in their own layout; elsewhere torch's own product.
                   A row's result is the same, to the last bit, however many rows run with it (torch's own float32
                   product on a CPU is not: it changes kernels with the number of rows).
int8               symmetric, one scale per output channel, activations in float32: FBGEMM's product of two 8-bit
                   matrices. Every activation row is rounded to steps of its largest value / 8001 and given as two rows
                   of 7 bits, so that on CPUs without VNNI, where pairs of products are added in 16 bits, no pair
                   exceeds 32,767. Integers are summed exactly, so a row's result does not depend on its neighbours.

R rows, I input and O output features.
"""

import warnings
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.errors import ConfigError

WEIGHT_STEPS = 127  # of a weight on either side of zero
STEPS = 63  # of an activation row's 7-bit value on either side of zero
OFFSET = 64  # of FBGEMM's unsigned activations, which are then at most 127
BASE = 2 * STEPS + 1  # one row counts in these, the other has the remainder
PIECE = 2048  # rows of the output layer that are packed together where it is the embedding matrix, too
CACHED = 2048  # of its rows


class Linear(Protocol):
    """A weight matrix with its bias."""

    nbytes: int  # bytes that it holds beside the LLM's own weights

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (R,I) -> (R,O), in the dtype of the rows."""


class Plain:
    """As torch stores and multiplies it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return F.linear(x, self.weight, self.bias)


class Blocked:
    """Floats in oneDNN's blocks; a copy of the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        rows = 4  # a hint: the layout serves any number
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias = bias
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class BlockedTable:
    """``Blocked`` in pieces, whose rows can be read: one copy is the output layer and the embedding matrix."""

    def __init__(self, weight: Tensor) -> None:
        self.piece, self.width, self.dtype = PIECE, weight.shape[1], weight.dtype
        self.pieces = [Blocked(piece, None) for piece in weight.split(self.piece)]
        self.nbytes = weight.nbytes
        self._row = lru_cache(CACHED)(self._read)  # tokens return, and a piece must be unpacked for one row

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        return torch.cat([piece(x) for piece in self.pieces], dim=1)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows (...,I) of the matrix by index (...)."""
        if not ids.numel():
            return torch.empty(*ids.shape, self.width, dtype=self.dtype)
        return torch.stack([self._row(index) for index in ids.flatten().tolist()]).view(*ids.shape, self.width)

    def _read(self, index: int) -> Tensor:
        return self.pieces[index // self.piece].weight.to_dense()[index % self.piece].clone()


class Int8:
    """Whole numbers from -127 to 127 and a scale per output channel."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.float()
        scales = (weight.abs().amax(dim=1) / WEIGHT_STEPS).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (weight / scales[:, None]).round().to(torch.int8)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
        try:
            with warnings.catch_warnings():  # quantised tensors are to go some day, but FBGEMM takes no other weights
                warnings.filterwarnings("ignore", ".*deprecated", UserWarning)
                channels = torch._make_per_channel_quantized_tensor(whole, scales.double(), zeros, 0)
            self.packed: Any = torch.ops.quantized.linear_prepack(channels, None)
        finally:
            torch.backends.quantized.engine = engine
        self.bias = None if bias is None else bias.float()
        self.nbytes = whole.nbytes + scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See ``Linear``."""
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_min_(1e-30)  # (R,1)
        step = largest.mul_(1 / (STEPS * BASE))
        found = self.product((x / step).round_()).mul_(step)
        return found if self.bias is None else found.add_(self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Whole numbers (R,I) from -8001 to 8001 times the whole weights, (R,O); exact up to float32's last bit."""
        high = (x / BASE).round_()
        rows = torch.cat([high, x - BASE * high])  # (2R,I), each from -63 to 63
        found = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, OFFSET, self.packed)
        return found[len(x) :].add_(found[: len(x)], alpha=BASE)


def pack(weight: Tensor, bias: Tensor | None = None, int8: bool = False, table: bool = False) -> Linear:
    """A linear layer for decoding.

    Args:
        weight: (O,I) floats.
        bias: (O,).
        int8: round the weights.
        table: the weights are an embedding matrix, too, whose rows will be read; no bias then.

    Raises ConfigError: int8 where FBGEMM is not: on a GPU or on a CPU that is not x86.
    """
    if int8:
        if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
            raise ConfigError("dtype int8: only on x86 CPUs; use float32, or bfloat16 on a GPU")
        return Int8(weight, bias)
    if not _blocks_help(weight):
        return Plain(weight, bias)
    return BlockedTable(weight) if table and bias is None else Blocked(weight, bias)


def _blocks_help(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for these floats on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native)
