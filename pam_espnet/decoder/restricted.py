"""A decoder that can say some of its tokens only: the output layer is cut to their rows.

For a task whose answers use a thousand token types the output layer of a small LLM is most of a step. Probabilities
are normalised over what is left, as transformers' ``suppress_tokens`` with ``renormalize_logits`` does.

The search works in places of the list, not in token ids; ``ids`` translates back.

B utterances, R rows, W tokens that are left, D width.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.decoder.llm import LLMDecoder
from pam_espnet.decoder.stepping import DecoderState
from pam_espnet.errors import ConfigError


class RestrictedDecoder:
    """``decoder`` with the vocabulary ``ids``; steps as ``search.beam.SteppingDecoder`` asks.

    Args:
        decoder: the LLM.
        ids: token ids; the decoder's end tokens are added.

    Attributes:
        ids: (W,) sorted token ids; what the search calls token w is ``ids[w]``.
        eos_ids: places of the end tokens.

    Raises:
        ConfigError: an id outside the LLM's vocabulary.
    """

    def __init__(self, decoder: LLMDecoder, ids: Collection[int]) -> None:
        wanted = sorted({*ids, *decoder.eos_ids})
        if wanted[0] < 0 or wanted[-1] >= decoder.vocab_size:
            raise ConfigError(f"task vocabulary: ids must be 0 to {decoder.vocab_size - 1}")
        self.decoder = decoder
        self.ids = torch.tensor(wanted, device=decoder.device)
        self.eos_ids = tuple(wanted.index(end) for end in decoder.eos_ids)
        layer = decoder.lm.get_output_embeddings()
        self._weight = layer.weight.detach()[self.ids]  # (W,D)
        self._bias = None if getattr(layer, "bias", None) is None else layer.bias.detach()[self.ids]

    def places(self, tokens: Collection[int]) -> list[int]:
        """Token ids -> places.

        Raises:
            ConfigError: a token that is not in the vocabulary.
        """
        known = {token: place for place, token in enumerate(self.ids.tolist())}
        if missing := sorted(set(tokens) - set(known)):
            raise ConfigError(f"task vocabulary: the tokens {missing} are not in it")
        return [known[token] for token in tokens]

    @torch.no_grad()
    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, DecoderState]:
        """As ``LLMDecoder.prefill``, logits (B,W)."""
        hidden, state = self.decoder.prefill_hidden(prefix, lengths)
        return self.logits(hidden), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """As ``LLMDecoder.step``, places in, logits (R,W) out."""
        return self.logits(self.decoder.step_hidden(self.ids[tokens], state))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm (...,D) -> float32 logits (...,W)."""
        return F.linear(hidden, self._weight, self._bias).float()
