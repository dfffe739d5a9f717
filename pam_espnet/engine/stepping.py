"""How the search runs an LLM: the prefix once, then token by token, with one of two memories.

Llama-type LLMs go through fused blocks and a tree of hypotheses (``tree_cache``); any other causal LLM through
transformers and its cache, whose rows are copied when beams fork. Both give the same logits up to rounding.

B utterances, R rows (hypotheses), P positions, D width.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.blocks import FusedLlama
from pam_espnet.engine.exits import ExitPolicy
from pam_espnet.engine.tree import tree_prefill
from pam_espnet.errors import ConfigError
from pam_espnet.llm.lora import lora_precision

# Same block: RMS norm, attention with rotary positions, RMS norm, gated feed-forward network.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = {torch.float32: 1e-3}  # of the self-check: length of the difference over the length of the state
COARSE_TOLERANCE = 0.05  # in half precision
INT8_TOLERANCE = 0.2  # of rounded weights; the blocks that they were rounded from have been held to the above
RESERVE = 64  # slots for steps, allocated with the prefix


class DecoderState(Protocol):
    """What an LLM remembers of R rows."""

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (R',), repeats and drops allowed: re-orders beams, forks a prefix, drops what is finished."""

    def step(self, embeds: Tensor) -> Tensor:
        """Append one position to every row, embeddings (R,D) -> last hidden states after the final norm (R,D)."""


class CachedState:
    """Keys and values of all positions so far, one row per hypothesis, in transformers' cache."""

    def __init__(self, lm: Any, cache: Any, mask: Tensor, positions: Tensor) -> None:
        self.lm = lm
        self.cache = cache  # transformers.DynamicCache
        self.mask = mask  # (R,P) bool: which cached slots a row may attend to
        self.positions = positions  # (R,) position of the next token

    def select(self, rows: Tensor) -> None:
        """See ``DecoderState``."""
        count = self.mask.size(0)
        if len(rows) == count and torch.equal(rows, torch.arange(count, device=rows.device)):
            return
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def step(self, embeds: Tensor) -> Tensor:
        """See ``DecoderState``."""
        # A row's new slot may lie behind padding of its prefix: the mask hides those slots, the position skips them.
        self.mask = F.pad(self.mask, (0, 1), value=True)
        hidden = self.run(embeds[:, None], self.positions[:, None])
        self.positions = self.positions + 1
        return hidden[:, 0]

    def run(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Positions (R,P) of embeddings (R,P,D) on top of the cache -> last hidden states (R,P,D)."""
        with lora_precision(self.lm):
            return self.lm.base_model(
                inputs_embeds=embeds,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state


@torch.no_grad()
def prefill(
    lm: Any, fused: FusedLlama | None, prefix: Tensor, lengths: Tensor, policy: ExitPolicy | None = None
) -> tuple[Tensor, DecoderState]:
    """Run the prefix of every utterance once.

    Args:
        lm: the LLM.
        fused: its fused form, or None to go through transformers.
        prefix: (B,P,D) embeddings in the LLM's dtype, right-padded.
        lengths: (B,) valid positions, at least 1.
        policy: may let steps leave before the last block; needs ``fused``.

    Returns:
        the last position's hidden state after the final norm (B,D), and the state for steps.
    """
    if fused is not None:
        hidden, tree = tree_prefill(fused, prefix, lengths, RESERVE)
        tree.policy = policy
        return hidden, tree
    if policy is not None:
        raise ValueError("transformers runs all blocks; an exit policy needs fused ones")
    from transformers import DynamicCache

    positions = torch.arange(prefix.size(1), device=prefix.device)
    mask = positions < lengths[:, None]
    state = CachedState(lm, DynamicCache(), mask, lengths.clone())
    hidden = state.run(prefix, positions.expand(mask.shape))
    return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1], state


def fuse(lm: Any, int8: bool = False) -> FusedLlama | None:
    """The fused form of ``lm``, or None for an LLM that is not of this kind.

    A self-check compares one forward pass with transformers' own, so that a family member with a twist that is not
    known here is left to transformers instead of being decoded wrongly. With ``int8`` the blocks are checked as floats
    first, then rounded, and checked again for what rounding must not exceed.

    Raises:
        ConfigError: int8 for an LLM that rounding breaks, or on a machine that cannot do it.
    """
    config = lm.config
    ropes = f"{getattr(config, 'rope_scaling', None)} {getattr(config, 'rope_parameters', None)}"
    plain = (
        config.model_type in FAMILIES
        and getattr(config, "hidden_act", None) == "silu"
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        and not any(kind in ropes for kind in ("dynamic", "longrope"))  # cosines depend on the sequence's length
    )
    if not plain or not all(_is_plain(module) for module in lm.base_model.layers.modules()):
        return None
    fused = FusedLlama(lm)
    difference = self_check(fused, lm)
    if not difference <= TOLERANCE.get(fused.dtype, COARSE_TOLERANCE):
        logging.warning(
            f"{type(lm).__name__}: the fused blocks differ from transformers' by {difference:.2g}; decoding goes "
            "through transformers, which is slower"
        )
        return None
    if int8:
        fused = FusedLlama(lm, int8=True)
        if not (difference := self_check(fused, lm)) <= INT8_TOLERANCE:
            raise ConfigError(f"dtype int8: rounded weights change this LLM's states by {difference:.2g}; use float32")
    return fused


def _is_plain(module: torch.nn.Module) -> bool:
    """False for a quantised linear layer, whose weight is no matrix of floats; other modules do not matter here."""
    base: Any = module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
    weight = getattr(base, "weight", None)
    linear = isinstance(base, torch.nn.Linear) or "linear" in type(base).__name__.lower()
    return not linear or (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2)


@torch.no_grad()
def self_check(fused: FusedLlama, lm: Any) -> float:
    """How far eight positions and a step behind them are from transformers', relative to the states' lengths."""
    table = lm.get_input_embeddings().weight.detach()
    embeds = table[torch.arange(9, device=table.device) * (len(table) // 9)][None]
    lengths = torch.tensor([8], device=table.device)
    training = [module for module in lm.modules() if module.training]
    lm.eval()  # LoRA's dropout would make a difference of its own
    try:
        states = [prefill(lm, blocks, embeds[:, :8], lengths) for blocks in (None, fused)]
        (expected, more_expected), (found, more_found) = ((hidden, one.step(embeds[:, 8])) for hidden, one in states)
    finally:
        for module in training:
            module.training = True
    expected, found = torch.cat([expected, more_expected]).float(), torch.cat([found, more_found]).float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
