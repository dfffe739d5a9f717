"""The kernels against the same operations in torch, one by one, in the shapes of real LLMs.

Without a GPU the torch operations are compared with themselves: a dry run of the tests.

R rows, D width, A heads, J key/value heads, E size of a head, B utterances, P prefix positions, C slots.
"""

import math
from typing import Any

import pytest
import torch
from random_llm import SHAPES, random_lm
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.llama import LlamaEngine
from pam_espnet.engine.ops import Ops
from pam_espnet.llm.llm import LLM

SHAPE_NAMES = ("Qwen2.5-3B", "Llama-3.2-1B", "SmolLM2-135M", "Llama-3.1-8B", "Qwen3-1.7B")
CASES = [(name, dtype) for dtype in ("bfloat16", "float32") for name in SHAPE_NAMES]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1.5e-2}  # length of the difference over the length


class Bench:
    """One block of an LLM, both ways to compute it, and random inputs."""

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        shape = "tiny-" + SHAPES[name][0].lower() if device == "cpu" else name
        self.engine = LlamaEngine(LLM(random_lm(shape, device, dtype, 2), tiny_tokenizer()).eval(), None, False)
        self.engine.with_exits(ExitOptions("fixed", (1,)))  # packs the keys' and values' part of each block
        self.block, self.shape, self.width = self.engine.blocks[0], self.engine.shape, self.engine.llm.width
        self.device, self.dtype = device, dtype
        self.torch: Any = Ops()
        self.own: Any = Ops()
        if device == "cuda":
            from pam_espnet.engine.kernels import Kernels

            self.own = Kernels(True)
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.device, self.dtype)

    def check(self, found: Tensor, expected: Tensor) -> None:
        assert found.shape == expected.shape and bool(found.isfinite().all())
        difference = (found.float() - expected.float()).norm() / expected.float().norm()
        assert float(difference) < TOLERANCE[self.dtype], float(difference)


@pytest.fixture(scope="module", params=CASES if torch.cuda.is_available() else CASES[::5], ids="-".join)
def bench(request: pytest.FixtureRequest, device: str) -> Bench:
    name, dtype = request.param
    return Bench(name, device, getattr(torch, dtype))


def product(bench: Bench, ops: Any, x: Tensor, layer: Any, many: bool) -> Tensor:
    """(R,O) of a product whose sums are an operation's own affair: added to zeros."""
    size = layer.weight.shape[0]
    total = torch.zeros(len(x), size, dtype=bench.dtype, device=bench.device)
    ops.add_norm(total, ops.product(x, layer, many), bench.random(size), 1e-6)
    return total


@pytest.mark.parametrize("name", ["out", "down"])
def test_products(bench: Bench, name: str) -> None:
    """With few rows and with many; a row's result is the same, to the last bit, among any others."""
    layer = getattr(bench.block, name)
    if not hasattr(layer, "weight") or not isinstance(layer.weight, Tensor) or layer.weight.dim() != 2:
        pytest.skip("packed weights: a CPU's")
    for many, sizes in ((False, (1, 4, 32, 64, 128)), (True, (100, 1600))):
        x = bench.random(sizes[-1], layer.weight.shape[1])
        whole = product(bench, bench.own, x, layer, many)
        bench.check(whole, product(bench, bench.torch, x, layer, many))
        if bench.device == "cuda" and bench.dtype == torch.bfloat16:
            for size in sizes:
                assert torch.equal(product(bench, bench.own, x[:size].clone(), layer, many), whole[:size]), (many, size)


def test_norm_with_and_without_sums(bench: Bench) -> None:
    weight = bench.random(bench.width)
    for rows in (1, 5, 128):
        x, inner = bench.random(rows, bench.width), bench.random(rows, bench.engine.shape.heads * bench.shape.head)
        for with_sums in (False, True):
            copies = [x.clone(), x.clone()]
            found = [
                ops.add_norm(copy, ops.product(inner, bench.block.out, False) if with_sums else None, weight, 1e-6)
                for ops, copy in zip((bench.own, bench.torch), copies, strict=True)
            ]
            bench.check(*found)
            bench.check(*copies)


def tables(bench: Bench, longest: int) -> tuple[Tensor, Tensor]:
    half = bench.shape.head // 2
    angles = torch.arange(longest)[:, None] * 10000.0 ** -(torch.arange(half) / half)
    return angles.cos().to(bench.device), angles.sin().to(bench.device)


@pytest.mark.parametrize(("part", "many"), [("qkv", False), ("qkv", True), ("kv", False)])
def test_rotation_and_cache(bench: Bench, part: str, many: bool) -> None:
    """Queries (none of rows that exited), and keys and values in their slots; nothing else of the cache changes."""
    b, k, slots = 3, 4, 128
    rows = b * (64 if many else k)
    x = bench.random(rows, bench.width)
    cos, sin = tables(bench, 512)
    own = torch.arange(rows, device=bench.device)
    utterance, positions = own // (rows // b), (own * 7) % 500
    at = own % (rows // b) + (0 if many else 70)
    found = []
    for ops in (bench.own, bench.torch):
        keys, values = (
            torch.full((b, bench.shape.kv_heads, slots, bench.shape.head), 3.0, dtype=bench.dtype, device=bench.device)
            for _ in range(2)
        )
        sums = ops.product(x, getattr(bench.block, part), many)
        query = ops.turn_write(sums, bench.block, cos, sin, positions, utterance, at, keys, values)
        assert bool((keys[:, :, int(at.max()) + 1 :] == 3.0).all())
        found.append((query, keys, values))
    for one, other in zip(*found, strict=True):
        if one.numel() or other.numel():
            bench.check(one, other)


@pytest.mark.parametrize(("b", "k", "lengths", "steps"), [(1, 4, [100], 5), (8, 4, [3, 64, 65, 128, 1, 9, 77, 100], 30),
                                                          (32, 1, [40] * 32, 1), (3, 5, [64, 127, 2], 12)])  # fmt: skip
def test_attention_of_a_step(bench: Bench, b: int, k: int, lengths: list[int], steps: int) -> None:
    """Over prefixes of unequal length and a tree; a row's result does not depend on other utterances."""
    shape, first = bench.shape, 64 * math.ceil(max(lengths) / 64)
    slots = 64 * math.ceil((first + k * 32) / 64)
    keys, values = (bench.random(b, shape.kv_heads, slots, shape.head) for _ in range(2))
    query = bench.random(b * k, shape.heads, shape.head)
    sizes = torch.tensor(lengths, device=bench.device)
    used = torch.tensor([first + steps * k], device=bench.device)
    at = torch.arange(slots, device=bench.device)
    visible = (at < sizes[:, None])[:, None].expand(-1, k, -1).clone()
    tree = (torch.rand(b, k, slots, generator=bench.generator) < 0.5).to(bench.device)
    visible |= tree & (at >= first) & (at < used)
    visible = visible.to(torch.uint8)
    found, expected = (
        ops.attend(query, keys, values, visible, sizes, first, used, shape.head**-0.5)
        for ops in (bench.own, bench.torch)
    )
    bench.check(found, expected)
    if bench.device == "cuda" and b > 1:
        alone = bench.own.attend(
            query[:k].clone(), keys[:1].clone(), values[:1].clone(), visible[:1].clone(), sizes[:1].clone(), first,
            used, shape.head**-0.5,
        )  # fmt: skip
        assert torch.equal(alone, found[:k])


@pytest.mark.parametrize(("b", "p"), [(1, 64), (4, 128), (3, 448)])
def test_attention_of_prefixes(bench: Bench, b: int, p: int) -> None:
    """Also: more padding behind an utterance changes no bit before it."""
    shape = bench.shape
    query = bench.random(b, p, shape.heads, shape.head)
    keys, values = (bench.random(b, shape.kv_heads, p, shape.head) for _ in range(2))
    found, expected = (ops.attend_prefix(query, keys, values, shape.head**-0.5) for ops in (bench.own, bench.torch))
    bench.check(found, expected)
    if bench.device == "cuda" and p > 64:
        cut = query[:1, :64].clone(), keys[:1, :, :64].clone(), values[:1, :, :64].clone()
        alone = bench.own.attend_prefix(*cut, shape.head**-0.5)
        assert torch.equal(alone, found[:1, :64])


def test_gate(bench: Bench) -> None:
    for rows in (1, 17, 128):
        x = bench.random(rows, bench.width)
        bench.check(*(ops.gate(ops.product(x, bench.block.gate_up, False)) for ops in (bench.own, bench.torch)))


def test_output_layer(bench: Bench) -> None:
    """Logits and their normaliser; bit for bit the same for 4 rows as among 128."""
    x = bench.random(128, bench.width)
    found, expected = (ops.logits(x, bench.engine.output) for ops in (bench.own, bench.torch))
    assert found.dtype == torch.float32
    bench.check(found, expected)
    heat = torch.tensor([1.7], device=bench.device)
    sums, wanted = (ops.logsumexp(expected, heat) for ops in (bench.own, bench.torch))
    torch.testing.assert_close(sums, wanted, atol=1e-3, rtol=0)
    if bench.device == "cuda" and bench.dtype == torch.bfloat16:
        for rows in (1, 4, 32, 64):
            assert torch.equal(bench.own.logits(x[:rows].clone(), bench.engine.output), found[:rows]), rows
            assert torch.equal(bench.own.logsumexp(expected[:rows].clone(), heat), sums[:rows]), rows
