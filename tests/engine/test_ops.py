"""The operations on fixed buffers against the blocks and the tree of the eager engine."""

import pytest
import torch
import transformers
from torch import Tensor

from pam_espnet.engine.llama import Block, Shape, _causal
from pam_espnet.engine.ops import Ops
from pam_espnet.engine.tree import Tree

LENGTHS = torch.tensor([5, 9, 2])
OPS = Ops()


def make_block(
    family: str, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32
) -> tuple[Block, Tensor, Tensor]:
    """A random block whose norms and biases are not ones and zeros; cosines and sines (64,E/2)."""
    torch.manual_seed(0)
    more = {"head_dim": 24} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=60, hidden_size=32 if heads == 4 else 64, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype)
    layer = model.layers[0]
    shape = Shape(heads, kv_heads, layer.self_attn.head_dim, config.rms_norm_eps)
    cos, sin = model.rotary_emb(torch.empty(0), torch.arange(64)[None])
    half = shape.head // 2
    return Block(layer, 0, shape, int8=False), cos[0, :, :half], sin[0, :, :half]


def rotary(cos: Tensor, sin: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``LlamaEngine`` gives them to a block."""
    cos, sin = cos[positions, None].to(dtype), sin[positions, None].to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "heads", "kv_heads"), [("Llama", 4, 4), ("Qwen2", 4, 2), ("Qwen3", 8, 1)])
def test_a_step_is_that_of_the_tree(family: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    block, cos, sin = make_block(family, heads, kv_heads, dtype)
    generator = torch.Generator().manual_seed(1)
    memory = [torch.randn(3, kv_heads, 64, block.shape.head, generator=generator).to(dtype) for _ in range(2)]
    keys, values = (part.clone() for part in memory)
    owner = torch.arange(3).repeat_interleave(2)
    scale = block.shape.head**-0.5
    tree = Tree([memory[0]], [memory[1]], 9, LENGTHS[owner], owner, heads // kv_heads, scale)
    visible = torch.zeros(3, 2, 64, dtype=torch.uint8)
    visible[:] = torch.arange(64) < LENGTHS[:, None, None]
    x = torch.randn(6, block.norm.shape[0], generator=generator).to(dtype)
    for step in range(2):
        before, residual = x, x.clone()
        front = tree.append()
        query, key, value = block.project(x, rotary(cos, sin, front.positions, dtype))
        tree.write(0, front.utterance, front.slots, key, value)
        expected = block.finish(x, tree.attend(0, front, query))

        sums = OPS.product(OPS.add_norm(residual, None, block.norm, block.shape.eps), block.qkv, many=False)
        slots = 9 + 2 * step + torch.arange(2).repeat(3)
        visible.view(6, 64)[torch.arange(6), slots] = 1
        turned = OPS.turn_write(sums, block, cos, sin, LENGTHS[owner] + step, owner, slots, keys, values)
        used = torch.tensor([9 + 2 * (step + 1)])
        attended = OPS.attend(turned, keys, values, visible, LENGTHS, 9, used, scale)
        normed = OPS.add_norm(residual, OPS.product(attended, block.out, False), block.mid_norm, block.shape.eps)
        gated = OPS.gate(OPS.product(normed, block.gate_up, False))
        OPS.add_norm(residual, OPS.product(gated, block.down, False), block.norm, block.shape.eps)

        assert torch.equal(slots, front.slots) and not torch.equal(residual, before)
        for ours, theirs in ((turned, query), (keys, tree.keys[0]), (values, tree.values[0])):
            assert torch.equal(ours, theirs)
        tolerance = 1e-6 if dtype == torch.float32 else 0.02
        assert torch.allclose(residual, expected, rtol=tolerance, atol=tolerance)
        x = residual.clone()


def test_a_row_that_sees_nothing_is_zero() -> None:
    visible = torch.zeros(1, 2, 8, dtype=torch.uint8)
    visible[0, 0, 3] = 1
    keys, values = torch.randn(2, 1, 2, 8, 4)
    query = torch.randn(2, 4, 4)
    found = OPS.attend(query, keys, values, visible, torch.tensor([4]), 6, torch.tensor([8]), 1.0)
    assert torch.allclose(found[0], values[0, :, 3].repeat_interleave(2, dim=0).flatten(), atol=1e-6)
    assert not found[1].any()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_prefixes_are_attended_causally(kv_heads: int) -> None:
    query, memory = torch.randn(2, 7, 4, 8), torch.randn(2, 2, kv_heads, 20, 8)
    keys, values = memory[:, :, :, :7]
    found = OPS.attend_prefix(query, keys, values, 0.3)
    assert torch.allclose(found, _causal(query, keys, values, 0.3), atol=1e-6)
    shorter = OPS.attend_prefix(query[:, :5], keys[:, :, :5], values[:, :, :5], 0.3)
    assert torch.allclose(found[:, :5], shorter, atol=1e-6)


def test_logits_and_their_logsumexp_are_float32() -> None:
    block, _, _ = make_block("Llama", 4, 2, torch.bfloat16)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits = OPS.logits(x, block.gate_up)
    assert logits.dtype == torch.float32 and torch.equal(logits, block.gate_up(x).float())
    found = OPS.logsumexp(logits, torch.tensor([0.7]))
    assert found.shape == (3, 1) and torch.allclose(found[:, 0], (logits / 0.7).logsumexp(1))
