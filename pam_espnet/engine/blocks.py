"""A Llama-type LLM as the search runs it: LoRA merged, projections that share an input fused, one block at a time.

Training goes through transformers' own modules. Decoding multiplies the same weights many times with few rows, where
the overhead of small operations counts: three LoRA products and seven projections become four products per block,
with weights packed for them (``engine.packed``). This copy of the blocks and of the output layer comes on top of the
LLM. In int8 it takes a quarter of their float32 memory.

It knows weights and rows; it knows no cache, no beams, no text.

R rows (positions of any utterances), D width, A attention heads, G heads per key/value head, J key/value heads,
E size of a head, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.packed import Linear, pack


@dataclass(frozen=True)
class Block:
    """Weights of one transformer block; norms of heads are None where the family has none."""

    norm: Tensor  # (D,)
    qkv: Linear  # D -> (A + 2J) * E
    q_norm: Tensor | None  # (E,)
    k_norm: Tensor | None  # (E,)
    out: Linear  # A * E -> D
    mid_norm: Tensor  # (D,)
    gate_up: Linear  # D -> 2F
    down: Linear  # F -> D


class FusedLlama:
    """The blocks of a Llama-type LLM.

    Args:
        lm: transformers' causal LM, with or without LoRA from peft; not changed, and not followed when it changes.
        int8: round the weights of all products, after LoRA is merged; norms and activations stay floats.

    Raises:
        ConfigError: int8 on a machine that cannot do it.
    """

    def __init__(self, lm: Any, int8: bool = False) -> None:
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
        self.int8 = int8
        self.blocks = [_fuse(layer, int8) for layer in transformer.layers]
        self._output_layer = lm.get_output_embeddings()
        self._layers = transformer.layers
        self._memories: dict[int, Linear] = {}  # of early exit: the keys' and values' part of qkv, packed when needed

    @cached_property
    def output(self) -> Linear:
        """D -> V; a search with a vocabulary of its own (``decoder.view``) never asks for it."""
        return pack(*_stack(self._output_layer), self.int8)

    def pack_output(self) -> None:
        """Pack the output layer now; otherwise the first that asks for logits waits for it."""
        self.output  # noqa: B018

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (R,1,E) for positions (R,); the first half of the sines is negated, see ``_turn``."""
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        cos, sin = self._rotary(like, positions[None])
        sin = torch.cat([-sin[..., : self.head // 2], sin[..., self.head // 2 :]], dim=-1)
        return cos[0, :, None], sin[0, :, None]

    def project(self, index: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Block ``index``: rows (R,D) -> queries (R,A,E), keys (R,J,E), values (R,J,E)."""
        block, (cos, sin) = self.blocks[index], rotary
        queries = self.kv_heads * self.groups
        heads = block.qkv(self.norm(x, block.norm)).unflatten(-1, (-1, self.head))
        turning, value = heads.split([queries + self.kv_heads, self.kv_heads], dim=1)
        if block.q_norm is not None:
            query, key = turning.split([queries, self.kv_heads], dim=1)
            turning = torch.cat([self.norm(query, block.q_norm), self.norm(key, block.k_norm)], dim=1)
        query, key = self._turn(turning, cos, sin).split([queries, self.kv_heads], dim=1)
        return query, key, value

    def memory(self, index: int, x: Tensor) -> Tensor:
        """Block ``index``: rows (R,D) -> what it would remember of them (R,2*J*E), keys before norm and rotation."""
        if index not in self._memories:
            attention = self._layers[index].self_attn
            self._memories[index] = pack(*_stack(attention.k_proj, attention.v_proj), self.int8)
        return self._memories[index](self.norm(x, self.blocks[index].norm))

    def turned(self, index: int, memory: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Block ``index``: results of ``memory`` (R,2*J*E) -> the keys and values of ``project`` (R,J,E)."""
        key, value = memory.unflatten(-1, (-1, self.head)).chunk(2, dim=1)
        norm = self.blocks[index].k_norm
        return self._turn(key if norm is None else self.norm(key, norm), *rotary), value

    def _turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The halves change places; one of them changes sign, too, which the sines have done already.
        return torch.addcmul(heads * cos, heads.roll(self.head // 2, -1), sin)

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """Block ``index`` after attention: its input (R,D) and the heads' results (R,A*E) -> its output (R,D)."""
        block = self.blocks[index]
        x = x + block.out(attended)
        gate, up = block.gate_up(self.norm(x, block.mid_norm)).chunk(2, dim=-1)
        return x + block.down(F.silu(gate) * up)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows (R,D) after the final norm -> float32 logits (R,V)."""
        return self.output(hidden).float()

    def norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """RMS norm of rows (...,D), by default the final one."""
        weight = self.final_norm if weight is None else weight
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def _fuse(layer: Any, int8: bool) -> Block:
    attention, network = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Block(
        norm=layer.input_layernorm.weight.detach(),
        qkv=pack(*_stack(attention.q_proj, attention.k_proj, attention.v_proj), int8),
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        out=pack(*_stack(attention.o_proj), int8),
        mid_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=pack(*_stack(network.gate_proj, network.up_proj), int8),
        down=pack(*_stack(network.down_proj), int8),
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
