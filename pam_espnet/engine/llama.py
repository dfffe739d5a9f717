"""The engine for Llama-type LLMs: fused blocks, a tree of hypotheses, early exit.

Decoding multiplies the same weights many times with few rows, where the overhead of small operations counts: LoRA is
merged, seven projections become four products per block, with weights packed for them (``engine.packed``).

B utterances, P prefix positions, R rows (hypotheses), N rows still in the blocks, T positions of all prefixes, W tokens
that can be predicted, D width, A attention heads, J key/value heads, E size of a head, F feed-forward width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.engine import Engine
from pam_espnet.engine.exits import ExitOptions, ExitPolicy
from pam_espnet.engine.packed import BlockedTable, Linear, pack
from pam_espnet.engine.tree import RESERVE, Tree
from pam_espnet.errors import PamError
from pam_espnet.llm.llm import LLM
from pam_espnet.llm.lora import merged_weight
from pam_espnet.transfer import upload

Rotary = tuple[Tensor, Tensor]  # cosines and sines (N,1,E) of rows' positions


@dataclass(frozen=True)
class Shape:
    """What all blocks of an LLM have in common."""

    heads: int  # A
    kv_heads: int  # J
    head: int  # E
    eps: float  # of the norms


class Block:
    """One transformer block: RMS norm, attention with rotary positions, RMS norm, gated feed-forward network.

    Args:
        layer: transformers' block, with or without LoRA from peft; not changed, and not followed when it changes.
        index: from 0.
        shape: of the LLM.
        int8: round the weights of the products, after LoRA is merged; norms and activations stay floats.
    """

    def __init__(self, layer: Any, index: int, shape: Shape, int8: bool) -> None:
        attention, network = layer.self_attn, layer.mlp
        self.index, self.shape = index, shape
        self.norm: Tensor = layer.input_layernorm.weight.detach()
        self.qkv = pack(*_stack(attention.q_proj, attention.k_proj, attention.v_proj), int8)  # D -> (A + 2J) * E
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # None where the family has none
        self.q_norm, self.k_norm = (None if norm is None else norm.weight.detach() for norm in norms)
        self.out = pack(*_stack(attention.o_proj), int8)  # A * E -> D
        self.mid_norm: Tensor = layer.post_attention_layernorm.weight.detach()
        self.gate_up = pack(*_stack(network.gate_proj, network.up_proj), int8)  # D -> 2F
        self.down = pack(*_stack(network.down_proj), int8)  # F -> D
        self.kv: Linear | None = None  # D -> 2J * E, the keys' and values' part of qkv, for early exit

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (N,D) -> queries (N,A,E), keys (N,J,E), values (N,J,E)."""
        shape = self.shape
        heads = self.qkv(_norm(x, self.norm, shape.eps)).unflatten(-1, (-1, shape.head))
        turning, value = heads.split([shape.heads + shape.kv_heads, shape.kv_heads], dim=1)
        if self.q_norm is not None:
            query, key = turning.split([shape.heads, shape.kv_heads], dim=1)
            turning = torch.cat([_norm(query, self.q_norm, shape.eps), _norm(key, self.k_norm, shape.eps)], dim=1)
        query, key = _turn(turning, rotary).split([shape.heads, shape.kv_heads], dim=1)
        return query, key, value

    def skip(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rows (N,D) that exited before this block -> the keys and values (N,J,E) that it makes of them."""
        assert self.kv is not None
        key, value = self.kv(_norm(x, self.norm, self.shape.eps)).unflatten(-1, (-1, self.shape.head)).chunk(2, dim=1)
        return _turn(key if self.k_norm is None else _norm(key, self.k_norm, self.shape.eps), rotary), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """After attention: the block's input (N,D) and the heads' results (N,A*E) -> its output (N,D)."""
        x = x + self.out(attended)
        gate, up = self.gate_up(_norm(x, self.mid_norm, self.shape.eps)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LlamaEngine(Engine):
    """See ``Engine``."""

    can_verify = True
    can_exit = True

    def __init__(self, llm: LLM, vocabulary: Collection[int] | None, int8: bool) -> None:
        super().__init__(llm, vocabulary)
        config, transformer = llm.lm.config, llm.transformer
        attention = transformer.layers[0].self_attn
        self.shape = Shape(
            config.num_attention_heads, config.num_key_value_heads, attention.head_dim, config.rms_norm_eps
        )
        self.scale: float = attention.scaling
        self.precision = "int8" if int8 else self.precision
        self._int8 = int8
        self._rotary_embedding = transformer.rotary_emb
        self._final_norm: Tensor = transformer.norm.weight.detach()
        self.blocks = [Block(layer, index, self.shape, int8) for index, layer in enumerate(transformer.layers)]
        layer = llm.lm.get_output_embeddings()
        weight, bias = _stack(layer)
        if self.ids is not None:
            weight, bias = weight[self.ids], None if bias is None else bias[self.ids]
        tied = layer.weight is llm.lm.get_input_embeddings().weight
        self.output = pack(weight, bias, int8, table=tied and self.ids is None)  # D -> W
        self.exits: ExitPolicy | None = None

    def with_exits(self, options: ExitOptions) -> LlamaEngine:
        """See ``Engine``."""
        engine = copy.copy(self)
        if options.mode == "never":
            engine.exits = None
            return engine
        for block, layer in zip(self.blocks, self.llm.transformer.layers, strict=True):
            if block.kv is None:
                if self.llm.freed:
                    raise PamError("early exit: the LLM's weights were freed without it; load the experiment again")
                block.kv = pack(*_stack(layer.self_attn.k_proj, layer.self_attn.v_proj), self._int8)
        engine.exits = ExitPolicy.of(options, self.llm, engine.norm, engine.logits)
        return engine

    @torch.no_grad()
    def prefill(
        self, prefix: Tensor, lengths: Tensor, drafts: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, Tree]:
        """See ``Engine``; padding is neither computed nor stored."""
        sizes = lengths.tolist()  # the only thing that the host waits for
        parts = [row[:size] for row, size in zip(prefix, sizes, strict=True)]
        drafted = [0] * len(sizes) if drafts is None else list(map(len, drafts))
        if drafts is not None:
            (tokens,) = upload(prefix.device, [token for draft in drafts for token in draft])
            read = self.embed(tokens).to(prefix).split(drafted)
            parts = [part for both in zip(parts, read, strict=True) for part in both]
            sizes = [size + new for size, new in zip(sizes, drafted, strict=True)]
        x = torch.cat(parts).to(self.llm.dtype)  # (T,D)
        count, most, first = len(sizes), max(sizes), np.cumsum(sizes) - sizes
        behind = np.arange(len(x)) - np.repeat(first, sizes)  # (T,) positions
        predicting = [  # R utterances with the lengths behind which they predict
            (b, size - new) for b, size in enumerate(sizes) for new in range(drafted[b], -1, -1)
        ]
        wanted = [first[b] + length - 1 for b, length in predicting]  # (R,)
        owner, positions, last = upload(x.device, np.repeat(np.arange(count), sizes), behind, wanted)
        cells = owner * most + positions  # (T,) in the grid (B,P)
        rotary = self._rotary(positions)
        all_keys, all_values = [], []
        for block in self.blocks:
            query, key, value = block.project(x, rotary)  # (T,A,E), (T,J,E), (T,J,E)
            keys, values = (x.new_zeros(count, self.shape.kv_heads, most + RESERVE, self.shape.head) for _ in range(2))
            keys[owner, :, positions] = key
            values[owner, :, positions] = value
            queries = query.new_zeros(count * most, *query.shape[1:])
            queries[cells] = query
            queries = queries.unflatten(0, (count, most))
            attended = _causal(queries, keys[:, :, :most], values[:, :, :most], self.scale).flatten(0, 1)
            if block is self.blocks[-1]:  # only these positions predict
                x, cells = x[last], cells[last]
            x = block.finish(x, attended[cells])
            all_keys.append(keys)
            all_values.append(values)
        groups = self.shape.heads // self.shape.kv_heads
        owners, ends = zip(*predicting, strict=True)
        return self.logits(self.norm(x)), Tree(all_keys, all_values, most, ends, owners, groups, self.scale)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Tree, chained: Sequence[int] | None = None) -> Tensor:
        """See ``Engine``. Utterances may exit before the last block, each decided by the row of its best hypothesis.

        ``chained`` (R,), for drafts: how many of the rows directly before it each row follows; no exits then.
        """
        x = self.embed(tokens)  # (R,D), later (N,D)
        front = state.append(chained)
        rotary = self._rotary(front.positions)
        rows, left = front.rows, []  # those still in the blocks; rows that exited with the states that predict
        exits = self.exits if chained is None else None
        if exits is not None:
            exits.begin(len(state.keys[0]), x.device)
        for block in self.blocks:
            query, key, value = block.project(x, rotary)  # (N,A,E), (N,J,E), (N,J,E)
            state.write(block.index, front.utterance, front.slots, key, value)
            x = block.finish(x, state.attend(block.index, front, query))
            depth = block.index + 1
            if exits is None or depth not in exits.layers:
                continue
            decided = exits.decide(depth, front.utterance[front.best], x[front.best]).tolist()  # the host waits
            if not any(decided):
                continue
            exiting = np.repeat(decided, front.sizes)  # (N,)
            out, on = upload(x.device, np.flatnonzero(exiting), np.flatnonzero(~exiting))
            left.append((rows[exiting], exits.mapped(depth, x[out])))
            for row in rows[exiting]:
                state.depths[row] = depth
            where, turned = (front.utterance[out], front.slots[out]), (rotary[0][out], rotary[1][out])
            for skipped in self.blocks[depth:]:  # later steps attend to these blocks, too
                state.write(skipped.index, *where, *skipped.skip(x[out], turned))
            x, rows, rotary = x[on], rows[~exiting], (rotary[0][on], rotary[1][on])
            if not len(rows):
                break
            front = state.front(rows)
        if left:
            left.append((rows, x))
            (order,) = upload(x.device, np.argsort(np.concatenate([one for one, _ in left])))
            x = torch.cat([states for _, states in left])[order]
        return self.logits(self.norm(x))

    def verify(self, tokens: Tensor, lengths: Sequence[int], state: Tree) -> Tensor:
        """See ``Engine``."""
        state.select([row for row, length in enumerate(lengths) for _ in range(length)])
        return self.step(tokens, state, chained=[before for length in lengths for before in range(length)])

    def embed(self, tokens: Tensor) -> Tensor:
        """Vocabulary indices (...) -> embeddings (...,D)."""
        return self.llm.embed(tokens if self.ids is None else self.ids[tokens])

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows (R,D) after the final norm -> float32 logits (R,W)."""
        return self.output(hidden).float()

    def norm(self, x: Tensor) -> Tensor:
        """The final norm of rows (R,D)."""
        return _norm(x, self._final_norm, self.shape.eps)

    def take_over(self) -> None:
        """See ``Engine``."""
        self.llm.free(self.output.rows if isinstance(self.output, BlockedTable) else None)

    def _rotary(self, positions: Tensor) -> Rotary:
        """Of positions (N,); the first half of the sines is negated, see ``_turn``."""
        like = torch.empty(0, dtype=self.llm.dtype, device=positions.device)
        cos, sin = self._rotary_embedding(like, positions[None])
        half = self.shape.head // 2
        return cos[0, :, None], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm of rows (...,D)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _turn(heads: Tensor, rotary: Rotary) -> Tensor:
    # The halves are exchanged; one of them changes sign, too, which the sines have done already.
    cos, sin = rotary
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of queries (B,P,A,E) over (B,J,P,E) -> (B,P,A*E); padding comes later, so no query sees it."""
    kv_heads = keys.shape[1]
    query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*J,G,P,E)
    keys, values = (
        memory.reshape(-1, 1, *memory.shape[2:]).expand(-1, query.shape[1], -1, -1) for memory in (keys, values)
    )
    found = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    return found.unflatten(0, (-1, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2)


def _stack(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Weights of linear layers with the same input, LoRA merged, one below the other; and their biases."""
    weights, biases = [], []
    for layer in layers:
        weights.append(merged_weight(layer))
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if base.bias is not None:
            biases.append(base.bias.detach())
    if len(layers) == 1:  # not copied where LoRA has nothing to add
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None
