"""Products of a step's rows with a weight matrix on CUDA, a row's result the same whatever rows run beside it.

Letters as in ``engine.kernels``.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine import triton_kernels

PROGRAMS = 256  # that a product has at least, by splitting its sums: about two per multiprocessor
MOST_PARTS = 8  # what is written in parts is read again

_HOLDS: dict[Any, bool] = {}  # by device, dtype and shape: see ``cublas_holds``


class Tiles(NamedTuple):
    """How ``triton_kernels.product`` cuts its work."""

    width: int  # outputs of a program
    rows: int  # rows of a program
    depth: int  # inputs of one round of a program's loop
    parts: int  # N
    stages: int  # rounds in flight
    warps: int


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
    tiles = choose_tiles(rows, alike or outputs, inputs, x.element_size(), shared_memory(x.device), one_part)
    found = x.new_empty(tiles.parts, rows, outputs, dtype=x.dtype if rounded and tiles.parts == 1 else torch.float32)
    grid = (triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.width), tiles.parts)
    triton_kernels.product[grid](
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
        found, moved, equal = (product_of_prefixes(rows, weight, bias) for rows in (x, x[order], x[:1].repeat(size, 1)))
        _HOLDS[key] = torch.equal(moved, found[order]) and torch.equal(equal, found[:1].expand_as(found))
    return _HOLDS[key]


def product_of_prefixes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
def shared_memory(device: torch.device) -> int:
    """Bytes that one block may have."""
    if device.type == "cpu":  # interpreted
        return 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
