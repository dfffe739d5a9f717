"""Operations of a transformer block on fixed buffers, in torch: the meaning of what ``engine.kernels`` does on CUDA.

Nothing here depends on a value in a tensor, so every operation can be captured in a CUDA graph. Sums and products are
rounded where transformers rounds them.

B utterances, K rows each, R rows (row r belongs to utterance r // K), P prefix positions, C slots of keys and values,
D width, A attention heads, J key/value heads, G = A / J, E size of a head, F feed-forward width, V vocabulary, I inputs
and O outputs of a product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from pam_espnet.engine.llama import Block
    from pam_espnet.engine.packed import Linear

Sums = Any  # what ``product`` made, for the operation that follows: here (R,O), bias included


class Ops:
    """The operations; ``engine.kernels.Kernels`` has the same ones."""

    def add_norm(self, x: Tensor, sums: Sums | None, weight: Tensor, eps: float) -> Tensor:
        """``sums`` are added to x (R,D) in place -> the RMS norm (R,D) of x."""
        if sums is not None:
            x += sums
        return F.rms_norm(x, weight.shape, weight, eps)

    def product(self, x: Tensor, layer: Linear, many: bool, like: Linear | None = None) -> Sums:
        """x (R,I) times the weights of ``layer`` -> sums of (R,O); ``many``: rows of prefixes, else those of a step;
        ``like``: a layer that has these outputs among others, whose order of sums is to be followed."""
        return layer(x)

    def turn_write(
        self,
        sums: Sums,
        block: Block,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        utterance: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Queries (R,A,E), normed and turned; keys, likewise, and values are written.

        Args:
            sums: of (R,(A+2J)*E), from the block's ``qkv``; or of (R,2J*E), from its ``kv``, without queries.
            block: its norms of queries and keys are used, where it has them.
            cos, sin: (longest,E/2) float32, of every position.
            positions, utterance, slots: (R,) long, where the rows are, and where they are written.
            keys, values: (B,J,C,E) of this block.
        """
        heads, shape = sums.unflatten(-1, (-1, block.shape.head)), block.shape
        query, key, value = heads.split([heads.shape[1] - 2 * shape.kv_heads, shape.kv_heads, shape.kv_heads], dim=1)
        if block.q_norm is not None and block.k_norm is not None:
            query = F.rms_norm(query, block.q_norm.shape, block.q_norm, shape.eps)
            key = F.rms_norm(key, block.k_norm.shape, block.k_norm, shape.eps)
        cos, sin = (table[positions, None].to(query.dtype) for table in (cos, sin))  # (R,1,E/2)
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        query, key = (torch.addcmul(part * cos, part.roll(shape.head // 2, -1), sin) for part in (query, key))
        keys[utterance, :, slots] = key
        values[utterance, :, slots] = value
        return query

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        lengths: Tensor,
        first: int,
        used: Tensor,
        scale: float,
    ) -> Tensor:
        """Queries (R,A,E) over the slots that each row may see -> (R,A*E), zero for a row that sees none.

        Args:
            keys, values: (B,J,C,E).
            visible: (B,K,C) uint8, 0 where a row may not look; also 0 behind ``used`` and in the prefix's padding.
            lengths: (B,) of the prefixes. Slots from there to ``first`` are not read by the kernels,
            first: and neither are those
            used: (1,) long, from here on.
            scale: of the products of queries and keys.
        """
        rows, kv_heads = visible.shape[1], keys.shape[1]
        query = query.unflatten(0, (-1, rows)).unflatten(2, (kv_heads, -1))  # (B,K,J,G,E)
        groups = query.shape[3]
        query = query.transpose(1, 2).flatten(2, 3)  # (B,J,K*G,E): rows and heads that share a key are one product
        sees = (visible != 0)[:, None, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3)  # (B,1,K*G,C)
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=sees, scale=scale)
        found = found.masked_fill(~sees.any(-1, keepdim=True), 0)
        return found.unflatten(2, (rows, groups)).transpose(1, 2).flatten(0, 1).flatten(1)

    def attend_prefix(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Causal attention of (B,P,A,E) over (B,J,P,E) -> (B,P,A*E); padding comes later, so no query sees it."""
        kv_heads = keys.shape[1]
        query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*J,G,P,E)
        keys, values = (
            memory.flatten(0, 1)[:, None].expand(-1, query.shape[1], -1, -1) for memory in (keys, values)
        )  # not repeated in memory
        found = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
        return found.unflatten(0, (-1, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2)

    def gate(self, sums: Sums) -> Tensor:
        """Sums of (R,2F) -> SiLU of the first half times the second (R,F)."""
        gate, up = sums.chunk(2, dim=-1)
        return F.silu(gate) * up

    def logits(self, x: Tensor, layer: Linear) -> Tensor:
        """x (R,D), after the final norm, times the output layer -> float32 (R,V)."""
        return layer(x).float()

    def logsumexp(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Of float32 logits (R,V) / temperature (1,) -> (R,1)."""
        return (logits / temperature).logsumexp(dim=1, keepdim=True)


def operations(device: torch.device, batch_invariant: bool) -> Ops:
    """Those for a device; ``batch_invariant`` as in ``StaticEngine``."""
    if device.type != "cuda":
        return Ops()
    from pam_espnet.engine.kernels import Kernels

    return Kernels(batch_invariant)
