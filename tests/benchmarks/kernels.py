"""Which of torch's own matrix products is fastest with few rows: the measurement behind ``decoder.packed``.

One pass over the weights of a whole LLM (30 blocks and an output layer in SmolLM2-135M's shapes), so that they come
from memory and not from a cache, as in a step. Printed per number of rows: CPU milliseconds, and how much faster than
F.linear in float32; and per kernel: the relative error of the product, and the largest difference between rows of a
batch of 32 and the same rows in batches of 1, 3 and 8.

    python tests/benchmarks/kernels.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.packed import STEPS, Blocked, Int8

Product = Callable[[Tensor], Tensor]
SHAPES = {"qkv": (960, 576), "out": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "output": (49152, 576)}


def whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and their scales, per output channel."""
    scales = weight.abs().amax(1) / STEPS
    return (weight / scales[:, None]).round().to(torch.int8), scales


def one_step(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 127ths of their largest value, and what one of those is."""
    step = x.abs().amax(1, keepdim=True) / STEPS
    return x / step, step


def two_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``one_step``, what is left of the rows below them in steps 254 times finer."""
    steps, step = one_step(x)
    coarse = steps.round()
    return torch.cat([coarse, (steps - coarse) * (2 * STEPS)]), step


def join(both: Tensor, step: Tensor) -> Tensor:
    """The results of ``two_steps``."""
    coarse, fine = both.chunk(2)
    return coarse.add(fine, alpha=1 / (2 * STEPS)).mul_(step)


def plain(dtype: torch.dtype) -> Callable[[Tensor], Product]:
    """F.linear."""

    def make(weight: Tensor) -> Product:
        weight = weight.to(dtype)
        return lambda x: F.linear(x.to(dtype), weight)

    return make


def blocked(dtype: torch.dtype) -> Callable[[Tensor], Product]:
    """oneDNN, weights in its own blocks: mkldnn::_linear_pointwise."""

    def make(weight: Tensor) -> Product:
        layer = Blocked(weight.to(dtype), None)
        return lambda x: layer(x.to(dtype))

    return make


def fp16_weights(weight: Tensor) -> Product:
    """FBGEMM, float16 weights and float32 activations: quantized::linear_dynamic_fp16."""
    torch.backends.quantized.engine = "fbgemm"
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def int8pack(dtype: torch.dtype) -> Callable[[Tensor], Product]:
    """aten::_weight_int8pack_mm."""

    def make(weight: Tensor) -> Product:
        values, scales = whole(weight)
        scales = scales.to(dtype)
        return lambda x: torch.ops.aten._weight_int8pack_mm(x.to(dtype), values, scales)

    return make


def dynamic(weight: Tensor) -> Product:
    """FBGEMM, one scale for all activations: quantized::linear_dynamic. Lossy, and rows depend on their neighbours."""
    layer = Int8(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, layer.packed, False)


def rows_8bit(weight: Tensor) -> Product:
    """FBGEMM, activations in 8 bits with a scale per row. Lossy."""
    layer = Int8(weight, None)

    def run(x: Tensor) -> Tensor:
        steps, step = one_step(x)
        return layer.product(steps).mul_(step)

    return run


def int8_fbgemm(weight: Tensor) -> Product:
    """``decoder.packed.Int8``."""
    return Int8(weight, None)


def int8_onednn(weight: Tensor) -> Product:
    """The same through onednn::qlinear_pointwise."""
    values, scales = whole(weight)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    packed = torch.ops.onednn.qlinear_prepack(values, None)

    def run(x: Tensor) -> Tensor:
        both, step = two_steps(x)
        both = both.add_(128).round_().to(torch.uint8)
        found = torch.ops.onednn.qlinear_pointwise(
            both, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return join(found, step)

    return run


def int8_int_mm(weight: Tensor) -> Product:
    """The same through aten::_int_mm."""
    values, scales = whole(weight)
    values = values.T

    def run(x: Tensor) -> Tensor:
        both, step = two_steps(x)
        return join(torch._int_mm(both.round_().to(torch.int8), values).float().mul_(scales), step)

    return run


KERNELS: dict[str, Callable[[Tensor], Product]] = {
    "float32 F.linear": plain(torch.float32),
    "float32 oneDNN blocks": blocked(torch.float32),
    "bfloat16 F.linear": plain(torch.bfloat16),
    "bfloat16 oneDNN blocks": blocked(torch.bfloat16),
    "float16 weights FBGEMM": fp16_weights,
    "int8 weights int8pack float32": int8pack(torch.float32),
    "int8 weights int8pack bfloat16": int8pack(torch.bfloat16),
    "int8 x 2 FBGEMM": int8_fbgemm,
    "int8 x 2 oneDNN": int8_onednn,
    "int8 x 2 int_mm": int8_int_mm,
    "8-bit rows FBGEMM": rows_8bit,
    "8-bit dynamic FBGEMM": dynamic,
}


def main() -> None:
    """Print a table and, with --output, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32], help="rows of activations (1 4 8 32)")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--blocks", type=int, default=30, help="of the LLM (30)")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each kernel (7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", ".*deprecated")
    weights = {
        name: [0.04 * torch.randn(shape) for _ in range(1 if name == "output" else args.blocks)]
        for name, shape in SHAPES.items()
    }
    rows = torch.randn(32, 576)
    expected = F.linear(rows.double(), weights["qkv"][0].double())
    models, results = {}, {}
    with torch.no_grad():
        for name in args.kernels:
            models[name] = {part: [KERNELS[name](one) for one in matrices] for part, matrices in weights.items()}
            first = models[name]["qkv"][0]
            together = first(rows)
            alone = max(float((first(rows[:count]) - together[:count]).abs().max()) for count in (1, 3, 8))
            error = float((together - expected).norm() / expected.norm())
            results[name] = {"error": error, "neighbours": alone}
        for count in args.rows:
            times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in SHAPES} for name in models}
            for _ in range(args.rounds + 1):
                for name, model in models.items():
                    for part, products in model.items():
                        x = torch.randn(count, SHAPES[part][1])
                        began = time.process_time()
                        for product in products:
                            product(x)
                        times[name][part].append(1000 * (time.process_time() - began))
            for name, found in times.items():  # the first round warms up
                results[name][f"ms_{count}"] = sum(statistics.median(values[1:]) for values in found.values())
    base = results[args.kernels[0]]
    for name, found in results.items():
        speeds = "  ".join(
            f"{count:3d} rows {found[f'ms_{count}']:7.1f} ms {base[f'ms_{count}'] / found[f'ms_{count}']:5.2f}x"
            for count in args.rows
        )
        print(f"{name:31s} {speeds}  error {found['error']:.1e}  neighbours {found['neighbours']:.1e}")
    if args.output:
        record = {"options": {key: str(value) for key, value in vars(args).items()}, "torch": torch.__version__}
        args.output.write_text(json.dumps({**record, "kernels": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
