"""Triton's kernels against their twins in torch, in Triton's interpreter.

Run by ``test_kernels.py`` in a process of its own, with TRITON_INTERPRET=1. In float32 only: the interpreter's bfloat16
is wrong without a word.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pam_espnet.engine import kernels, products
from pam_espnet.engine.kernels import SPLIT, Kernels, Parts
from pam_espnet.engine.ops import Ops
from pam_espnet.engine.packed import Plain

OURS, THEIRS = Kernels(), Ops()
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def layer_of(outputs: int, inputs: int, bias: bool) -> Plain:
    return Plain(torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) if bias else None)


def total(sums: Parts) -> Tensor:
    found = sums.values.sum(0)
    return found if sums.bias is None else found + sums.bias


SHAPES = [(70, 130, True), (64, 64, False), (5, 37, True), (130, 600, False)]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "bias"), SHAPES)
def test_products(outputs: int, inputs: int, bias: bool, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(outputs, inputs, bias)
    for rows in (4, 17, 130):
        x = torch.randn(rows, inputs)
        expected = THEIRS.product(x, layer, many)
        assert close(total(Kernels(batch_invariant=False).product(x, layer, many)), expected)
        assert close(total(OURS.product(x, layer, many)), expected)
        if many:
            monkeypatch.setattr(kernels, "cublas_holds", lambda *_: False)
            assert close(total(OURS.product(x, layer, many)), expected)
            monkeypatch.undo()


def test_cublas_is_tried_once_per_shape_and_refused_where_rows_depend_on_their_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tried.append(len(x))
        return x @ weight.t() + torch.arange(len(x))[:, None] * 1e-3

    steady, moved = layer_of(6, 20, False).weight, layer_of(7, 20, False).weight
    assert products.cublas_holds(steady, None)
    monkeypatch.setattr(products, "product_of_prefixes", product)
    assert products.cublas_holds(steady, None) and not tried
    assert not products.cublas_holds(moved, None) and not products.cublas_holds(moved, None)
    assert tried == [1024, 1024, 1024]


@pytest.mark.parametrize("bias", [True, False])
def test_logits(bias: bool) -> None:
    layer = layer_of(150, 520, bias)
    x = torch.randn(5, 520)
    for one in (OURS, Kernels(batch_invariant=False)):
        assert close(one.logits(x, layer), THEIRS.logits(x, layer))


def test_sums_in_parts() -> None:
    layer = layer_of(40, 2100, True)
    assert len(OURS.product(torch.randn(3, 2100), layer, False).values) == 8
    x = torch.randn(3, 2100)
    assert close(total(OURS.product(x, layer, False)), THEIRS.product(x, layer, False))


def test_keys_and_values_alone_are_summed_as_with_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where early exit has skipped a block alone, and where neighbours were still in it."""
    monkeypatch.setattr(products, "PROGRAMS", 4)  # as if the weights were large: fewer outputs, more parts
    whole = layer_of(256, 1024, True)
    assert whole.bias is not None
    part, x = Plain(whole.weight[192:], whole.bias[192:]), torch.randn(3, 1024)
    expected, alone, alike = (
        OURS.product(x, layer, False, like) for layer, like in ((whole, None), (part, None), (part, whole))
    )
    assert torch.equal(alike.values, expected.values[..., 192:]) and len(alone.values) > len(alike.values)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [64, 100])
def test_add_norm(width: int, bias: bool) -> None:
    weight = torch.randn(width)
    values, shift = torch.randn(3, 5, width), torch.randn(width) if bias else None
    for sums in (None, Parts(values, shift, torch.float32), Parts(values[:1], None, torch.float32)):
        ours = torch.randn(5, width)
        theirs = ours.clone()
        found = OURS.add_norm(ours, sums, weight, EPS)
        assert close(found, THEIRS.add_norm(theirs, None if sums is None else total(sums), weight, EPS))
        assert close(ours, theirs)


@pytest.mark.parametrize("width", [48, 1500])
def test_gate(width: int) -> None:
    for sums in (
        Parts(torch.randn(2, 3, 2 * width), torch.randn(2 * width), torch.float32),
        Parts(torch.randn(1, 3, 2 * width), None, torch.float32),
    ):
        assert close(OURS.gate(sums), THEIRS.gate(total(sums)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(4, 4, 16), (4, 2, 80), (8, 1, 24)])
def test_turn_write(heads: int, kv_heads: int, head: int, norms: bool, bias: bool) -> None:
    rows, width = 6, (heads + 2 * kv_heads) * head
    q_norm, k_norm = (torch.randn(head), torch.randn(head)) if norms else (None, None)
    shape = SimpleNamespace(heads=heads, kv_heads=kv_heads, head=head, eps=EPS)
    block = SimpleNamespace(q_norm=q_norm, k_norm=k_norm, shape=shape)
    sums = Parts(torch.randn(2, rows, width), torch.randn(width) if bias else None, torch.float32)
    angles = torch.rand(50, head // 2)
    where = (torch.randint(0, 50, (rows,)), torch.arange(3).repeat_interleave(2), torch.randperm(20)[:rows])
    ours = torch.randn(2, 3, kv_heads, 20, head)
    theirs = ours.clone()
    tables = angles.cos(), angles.sin(), *where
    found = OURS.turn_write(sums, block, *tables, *ours)
    expected = THEIRS.turn_write(total(sums), block, *tables, *theirs)  # type: ignore[arg-type]
    assert close(found, expected) and close(ours, theirs)
    # of keys and values alone, as where early exit has skipped a block
    kept = Parts(
        sums.values[..., heads * head :].contiguous(),
        None if sums.bias is None else sums.bias[heads * head :].contiguous(),
        torch.float32,
    )
    again = torch.zeros_like(ours)
    assert OURS.turn_write(kept, block, *tables, *again).shape == (rows, 0, head)
    assert close(again[:, where[1], :, where[2]], ours[:, where[1], :, where[2]])


def memory_of(count: int, size: int, kv_heads: int, head: int, prefix: int, steps: int) -> tuple[Tensor, ...]:
    """Keys and values (2,B,J,C,E), visible (B,K,C), lengths (B,); what no row may see is no number."""
    slots = prefix + steps * size
    lengths = torch.randint(1, prefix + 1, (count,))
    at = torch.arange(slots)
    memory = torch.randn(2, count, kv_heads, slots, head)
    visible = torch.rand(count, size, slots) < 0.5
    visible &= (at < lengths[:, None, None]) | (at >= prefix)
    visible |= at == lengths[:, None, None] - 1
    visible[0, 0] = at == prefix + 1  # sees one slot
    for part in memory:
        part.transpose(1, 2)[(at >= lengths[:, None]) & (at < prefix)] = torch.nan
    return memory, visible.to(torch.uint8), lengths


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(2, 2, 16), (4, 2, 24), (8, 1, 80)])
def test_attention(heads: int, kv_heads: int, head: int, size: int) -> None:
    memory, visible, lengths = memory_of(2, size, kv_heads, head, SPLIT, 6)
    used = torch.tensor([SPLIT + 5 * size])
    visible[:, :, used:] = 0
    if size > 1:
        visible[1, 1] = 0  # a row that sees nothing
    clean = memory.nan_to_num(0.0)
    memory[:, :, :, used:] = torch.nan
    query = torch.randn(2 * size, heads, head)
    found = OURS.attend(query, *memory, visible, lengths, SPLIT, used, 0.3)
    assert close(found, THEIRS.attend(query, *clean, visible, lengths, SPLIT, used, 0.3))


def test_attention_does_not_depend_on_neighbours_or_on_the_prefix_they_need() -> None:
    size, prefix = 4, 3 * SPLIT
    memory, visible, lengths = memory_of(3, size, 1, 16, prefix, 12)
    lengths[1] = SPLIT - 3
    visible[1, :, SPLIT - 3 : prefix] = 0
    used = torch.tensor([prefix + 40])
    query = torch.randn(3 * size, 4, 16)
    together = OURS.attend(query, *memory, visible, lengths, prefix, used, 0.3)
    kept = torch.cat([torch.arange(SPLIT), torch.arange(prefix, prefix + 48)])
    alone = OURS.attend(
        query[size : 2 * size], *memory[:, 1:2, :, kept].contiguous(), visible[1:2, :, kept].contiguous(),
        lengths[1:2], SPLIT, used - prefix + SPLIT, 0.3,
    )  # fmt: skip
    assert torch.equal(together[size : 2 * size], alone)


@pytest.mark.parametrize("head", [16, 20])
def test_prefixes_are_attended_as_the_twin_does(head: int) -> None:
    query, memory = torch.randn(2, 7, 4, head), torch.randn(2, 2, 2, 7, head)
    assert close(OURS.attend_prefix(query, *memory, 0.3), THEIRS.attend_prefix(query, *memory, 0.3))


@pytest.mark.parametrize("width", [30, 20000])
def test_logsumexp(width: int) -> None:
    logits, temperature = 30 * torch.randn(3, width), torch.tensor([0.7])
    logits[1, : width // 2] = -torch.inf
    logits[2] = -torch.inf
    found = OURS.logsumexp(logits, temperature)
    assert close(found, THEIRS.logsumexp(logits, temperature)) and found[2] == -torch.inf


@pytest.mark.parametrize("rows", [3, 16])
def test_a_row_does_not_depend_on_the_others(rows: int) -> None:
    """To the last bit; how a GPU multiplies cannot be seen here, but that the order of every sum stays can."""
    layer, wide = layer_of(70, 600, True), layer_of(140, 600, True)
    x = torch.randn(16, 600)
    weight = torch.randn(70)

    def run(x: Tensor) -> list[Tensor]:
        sums, both = OURS.product(x, layer, False), OURS.product(x, wide, False)
        start = x[:, :70].clone()
        logits = OURS.logits(x, wide)
        normed = OURS.add_norm(start, sums, weight, EPS)
        return [normed, start, OURS.gate(both), logits, OURS.logsumexp(logits, torch.tensor([0.9]))]

    others = torch.cat([x[:2], torch.randn(rows - 2, 600)])
    for alone, beside, among in zip(run(x[:1]), run(others), run(x), strict=True):
        assert torch.equal(alone[0], beside[0]) and torch.equal(alone[0], among[0])
