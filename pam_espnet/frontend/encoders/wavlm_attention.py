"""WavLM's self-attention (Chen et al. 2022) through torch's fused attention, its gated position bias as the mask.

transformers computes it step by step and repeats the position bias for every utterance. Here one tensor for all
utterances and blocks is kept, and each block makes its mask of it in one operation.

Dimension letters: B utterances, T frames, A heads, E width of a head, D = A * E.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

_ALIGNED = 16  # elements: the fused kernels on CUDA copy masks whose rows begin elsewhere


class FusedWavLMAttention(WavLMAttention):
    """The same weights and results as WavLMAttention's, without attention weights and dropout: for frozen models."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """Attention of ``hidden_states`` (B,T,D).

        Args:
            attention_mask: (B,T), 1 or True where a frame may be attended to; None: everywhere.
            position_bias: what the first block returned; the first one, which makes it, gets None.

        Returns:
            (B,T,D), no attention weights, and the position bias (A,T,T), its rows extended to whole ``_ALIGNED``.
        """
        size = hidden_states.shape[1]
        if position_bias is None:
            position_bias = self._all_distances(size)
        heads = hidden_states.unflatten(2, (self.num_heads, -1))  # (B,T,A,E)
        # transformers adds up four outputs for each of two gates: the same as one output of the summed weights.
        gates = self.gru_rel_pos_linear
        halves = linear(heads, gates.weight.unflatten(0, (2, 4)).sum(1), gates.bias.unflatten(0, (2, 4)).sum(1))
        first, second = halves.transpose(1, 2).sigmoid().split(1, dim=-1)  # (B,A,T,1) each
        gate = first * (second * self.gru_rel_pos_const - 1.0) + 2.0
        allowed = position_bias.new_zeros(())
        if attention_mask is not None:
            lowest = torch.finfo(position_bias.dtype).min
            outside = nn.functional.pad(attention_mask == 0, (0, position_bias.shape[2] - size), value=True)
            allowed = torch.zeros_like(outside, dtype=position_bias.dtype).masked_fill(outside, lowest)[:, None, None]
        mask = torch.addcmul(allowed, gate, position_bias)[..., :size]
        query, key, value = (
            one(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None, position_bias

    def _all_distances(self, size: int) -> Tensor:
        """The bias (A,T,T') of each pair of frames: one look-up for each distance, not for each pair."""
        wide = -(-size // _ALIGNED) * _ALIGNED
        distances = torch.arange(1 - size, wide, device=self.rel_attn_embed.weight.device)
        by_distance = self.rel_attn_embed(self._relative_positions_bucket(distances)).T.contiguous()
        return by_distance.unfold(1, wide, 1).flip(1)  # row t begins at distance -t


def fuse_attention(model: nn.Module) -> None:
    """Let the attention of every block of a WavLM ``model`` be computed so; its weights and their names stay."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.__class__ = FusedWavLMAttention
