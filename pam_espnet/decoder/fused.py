"""A Llama-type LLM as the search runs it: LoRA merged, projections that share an input fused, one block at a time.

Training goes through transformers' own modules. Decoding multiplies the same weights many times with few rows, where
the overhead of small operations counts: three LoRA products and seven projections become four products per block.
The fused copy takes as much memory as the blocks of the LLM do; embeddings and output layer are shared with it.

It knows weights and rows; it knows no cache, no beams, no text.

R rows (positions of any utterances), D width, A attention heads, G heads per key/value head, J key/value heads,
E size of a head, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Block:
    """Weights of one transformer block; biases and norms of heads are None where the family has none."""

    norm: Tensor  # (D,)
    qkv: Tensor  # ((A + 2J) * E, D)
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (E,)
    k_norm: Tensor | None  # (E,)
    out: Tensor  # (D, A * E)
    out_bias: Tensor | None
    mid_norm: Tensor  # (D,)
    gate_up: Tensor  # (2F, D)
    gate_up_bias: Tensor | None
    down: Tensor  # (D, F)
    down_bias: Tensor | None


class FusedLlama:
    """The blocks of a Llama-type LLM.

    Args:
        lm: transformers' causal LM, with or without LoRA from peft; not changed, and not followed when it changes.
    """

    def __init__(self, lm: Any) -> None:
        transformer, config = lm.base_model, lm.config
        first = transformer.layers[0].self_attn
        self.head: int = first.head_dim  # E
        self.kv_heads: int = config.num_key_value_heads  # J
        self.groups: int = config.num_attention_heads // config.num_key_value_heads  # G
        self.scale: float = first.scaling
        self.eps: float = config.rms_norm_eps
        self.width: int = config.hidden_size  # D
        self.dtype: torch.dtype = lm.get_input_embeddings().weight.dtype
        self._rotary = transformer.rotary_emb
        self.final_norm: Tensor = transformer.norm.weight.detach()
        self.blocks = [_fuse(layer) for layer in transformer.layers]

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R,1,E) for positions (R,)."""
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        cos, sin = self._rotary(like, positions[None])
        return cos[0, :, None], sin[0, :, None]

    def project(self, index: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Block ``index``: rows (R,D) -> queries (R,A,E), keys (R,J,E), values (R,J,E)."""
        block = self.blocks[index]
        heads = F.linear(self.norm(x, block.norm), block.qkv, block.qkv_bias).unflatten(-1, (-1, self.head))
        query, key, value = heads.split([self.kv_heads * self.groups, self.kv_heads, self.kv_heads], dim=1)
        return self._turn(query, block.q_norm, rotary), self._turn(key, block.k_norm, rotary), value

    def memory(self, index: int, x: Tensor) -> Tensor:
        """Block ``index``: rows (R,D) -> what it would remember of them (R,2*J*E), keys before norm and rotation."""
        block, skip = self.blocks[index], self.kv_heads * self.groups * self.head
        bias = None if block.qkv_bias is None else block.qkv_bias[skip:]
        return F.linear(self.norm(x, block.norm), block.qkv[skip:], bias)

    def turned(self, index: int, memory: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Block ``index``: results of ``memory`` (R,2*J*E) -> the keys and values of ``project`` (R,J,E)."""
        key, value = memory.unflatten(-1, (-1, self.head)).chunk(2, dim=1)
        return self._turn(key, self.blocks[index].k_norm, rotary), value

    def _turn(self, heads: Tensor, norm: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if norm is not None:
            heads = self.norm(heads, norm)
        cos, sin = rotary
        half = self.head // 2
        return heads * cos + torch.cat([-heads[..., half:], heads[..., :half]], dim=-1) * sin

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """Block ``index`` after attention: its input (R,D) and the heads' results (R,A*E) -> its output (R,D)."""
        block = self.blocks[index]
        x = x + F.linear(attended, block.out, block.out_bias)
        gate, up = F.linear(self.norm(x, block.mid_norm), block.gate_up, block.gate_up_bias).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, block.down, block.down_bias)

    def norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """RMS norm of rows (...,D), by default the final one."""
        weight = self.final_norm if weight is None else weight
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def unit(self, x: Tensor) -> Tensor:
        """RMS norm of rows (...,D) without a weight, what the norms of all blocks have in common."""
        return F.rms_norm(x, (x.shape[-1],), None, self.eps)

    def propagation(self, index: int) -> Tensor:
        """Block ``index``: ``memory`` as a matrix (D+1,2*J*E) on the rows of ``unit``, the last row a constant."""
        block, skip = self.blocks[index], self.kv_heads * self.groups * self.head
        weight = block.qkv[skip:].T * block.norm[:, None]
        bias = weight.new_zeros(weight.shape[1]) if block.qkv_bias is None else block.qkv_bias[skip:]
        return torch.cat([weight, bias[None]])


def _fuse(layer: Any) -> Block:
    attention, network = layer.self_attn, layer.mlp
    qkv, qkv_bias = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
    out, out_bias = _stack(attention.o_proj)
    gate_up, gate_up_bias = _stack(network.gate_proj, network.up_proj)
    down, down_bias = _stack(network.down_proj)
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Block(
        norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        out=out,
        out_bias=out_bias,
        mid_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def _stack(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Weights of linear layers with the same input, LoRA merged, one below the other; and their biases."""
    weights, biases = [], []
    for layer in layers:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        weight = base.weight.detach()
        for name in getattr(layer, "active_adapters", ()):
            weight = (weight.float() + layer.get_delta_weight(name).detach().float()).to(weight.dtype)
        weights.append(weight)
        if base.bias is not None:
            biases.append(base.bias.detach())
    if len(layers) == 1:  # not copied where LoRA has nothing to add
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None
