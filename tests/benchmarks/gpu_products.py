"""Products of a step one by one: cuBLAS against the tiles of ``engine.products``, weights read from memory every time.

R rows.
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from benchmarks.gpu_rows import Rows
from benchmarks.gpu_searches import Searches
from torch.nn import functional as F

ROWS = (4, 32, 64, 128)
ROUNDS = 7
WIDTHS, PARTS, STAGES = (64, 128), (1, 2, 4, 8), (3, 5)  # each of them is a kernel to compile, once per number of rows


def measure(searches: Searches, rows: Rows, speed: float) -> None:
    """A row for each matrix and number of rows: microseconds, and the best tiles that were tried."""
    if not searches.gpu:
        rows.add("product", note="needs a GPU")
        return
    from pam_espnet.engine import products

    engine = searches.engine("graphs")
    block = engine.blocks[0]
    matrices = {name: getattr(block, name) for name in ("gate_up", "down", "qkv", "out")} | {"output": engine.output}
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")  # larger than the L2 cache
    later = []
    for count, (name, layer) in itertools.product(ROWS, matrices.items()):
        weight = layer.weight
        x = torch.randn(count, weight.shape[1], device="cuda", dtype=weight.dtype)
        own = products.choose_tiles(count, *weight.shape, weight.itemsize, products.shared_memory(weight.device))
        found: dict[str, Any] = {
            "at_bandwidth": 1e6 * weight.nbytes / speed,
            "cublas": micro(lambda x=x, weight=weight: F.linear(x, weight), flush),
            "own": micro(lambda x=x, weight=weight: products.multiply(x, weight, False, False), flush),
            "own_tiles": "x".join(map(str, own)),
        }
        row = rows.add("product, us", matrix=name, rows=count, **found)
        if name != "output" and count in (4, 128):
            later.append((row, own, x, weight))
    logits = torch.randn(128, engine.output.weight.shape[0], device="cuda")
    heat = torch.ones(1, device="cuda")
    rows.add(
        "choice, us", rows=128, logsumexp=micro(lambda: engine.ops.logsumexp(logits, heat), flush),
        logits_topk=micro(lambda: logits.topk(8), flush),
    )  # fmt: skip
    for row, own, x, weight in later:
        row |= best_of(products, own, x, weight, flush)
        print(f"{row['matrix']}, {row['rows']} rows: {row['best']} us with {row['best_tiles']}", flush=True)
        rows.save()


def best_of(products: Any, own: Any, x: torch.Tensor, weight: torch.Tensor, flush: torch.Tensor) -> dict[str, Any]:
    """The fastest tiles of a few; those that do not fit on the card are passed over."""
    best, failed = (float("inf"), ""), 0
    for width, parts, stages in itertools.product(WIDTHS, PARTS, STAGES):
        tiles = own._replace(width=width, parts=parts, stages=stages)
        with mock.patch.object(products, "choose_tiles", return_value=tiles):
            try:
                took = micro(lambda: products.multiply(x, weight, False, False), flush, 3)
            except Exception:  # of Triton, whose errors have no common class: too much shared memory
                failed += 1
                continue
        best = min(best, (took, "x".join(map(str, tiles))))
    return {"best": best[0], "best_tiles": best[1], "tiles_that_failed": failed}


def micro(run: Callable[[], Any], flush: torch.Tensor, rounds: int = ROUNDS) -> float:
    """Median microseconds on the device, with an empty cache."""
    run()
    found = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(1000 * begin.elapsed_time(end))
    return round(statistics.median(found), 1)
