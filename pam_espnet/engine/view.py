"""An LLM as one search sees it: which of its tokens it can say, and when it may leave before its last block.

For a task whose answers use a thousand token types the output layer of a small LLM is most of a step. Cut to the rows
of those types, its probabilities are normalised over what is left, as transformers' ``suppress_tokens`` with
``renormalize_logits`` does. The search then works in places of the list, not in token ids; ``ids`` translates back.

Several views may look at one decoder; none of them changes it.

B utterances, P prefix positions, R rows, N rows that verify drafts, W tokens that can be said, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pam_espnet.engine.blocks import FusedLlama
from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.exits import ExitOptions, ExitPolicy
from pam_espnet.engine.packed import pack
from pam_espnet.engine.stepping import RESERVE, DecoderState
from pam_espnet.engine.tree import TreeState, tree_prefill
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLMDecoder


class DecoderView:
    """``decoder`` with a vocabulary and exits; steps as ``search.beam.SteppingDecoder`` asks.

    Args:
        decoder: the LLM.
        vocabulary: token ids that can be said, the decoder's end tokens apart, which always can; None for all.
        exits: when to leave before the last block.

    Attributes:
        ids: (W,) sorted token ids, what the search calls token w is ``ids[w]``; None where all can be said.
        eos_ids: places of the end tokens.

    Raises:
        ConfigError: an id outside the LLM's vocabulary; a block that the LLM does not have; exits from an LLM that
            only transformers can run.
        CheckpointError: a calibration that cannot be read or belongs to another LLM.
    """

    def __init__(
        self,
        decoder: LLMDecoder,
        vocabulary: Collection[int] | None = None,
        exits: ExitOptions | None = None,
    ) -> None:
        self.decoder = decoder
        self.ids: Tensor | None = None
        self.eos_ids: tuple[int, ...] = decoder.eos_ids
        if vocabulary is not None:
            wanted = sorted({*vocabulary, *decoder.eos_ids})
            if wanted[0] < 0 or wanted[-1] >= decoder.vocab_size:
                raise ConfigError(f"task vocabulary: ids must be 0 to {decoder.vocab_size - 1}")
            self.ids = torch.tensor(wanted, device=decoder.device)
            self._place = {token: place for place, token in enumerate(wanted)}
            self.eos_ids = tuple(self._place[end] for end in decoder.eos_ids)
            layer = decoder.lm.get_output_embeddings()
            bias = None if getattr(layer, "bias", None) is None else layer.bias.detach()[self.ids]
            self._output = pack(layer.weight.detach()[self.ids], bias, decoder.int8_decoding)  # D -> W
        self._policy: ExitPolicy | None = None
        if exits is not None and exits.mode != "never":
            if decoder.fused_blocks() is None:
                raise ConfigError("exit: only Llama-type LLMs with fused_decoding can leave before the last block")
            calibration = None
            if exits.calibration:
                calibration = Calibration.load(exits.calibration, decoder.width).to(decoder.device, decoder.dtype)
            self._policy = ExitPolicy(exits, decoder.num_layers, decoder.final_norm, self.logits, calibration)

    def places(self, tokens: Sequence[int], strict: bool = True) -> list[int]:
        """Token ids -> what the search calls them.

        Raises:
            ConfigError: a token that cannot be said; where not ``strict``, it gets a negative number of its own.
        """
        if self.ids is None:
            return list(tokens)
        if strict and (missing := sorted(set(tokens) - set(self._place))):
            raise ConfigError(f"task vocabulary: the tokens {missing} are not in it")
        return [self._place.get(token, -1 - token) for token in tokens]

    def tokens(self, places: Sequence[int]) -> list[int]:
        """What the search calls tokens -> token ids."""
        return list(places) if self.ids is None else self.ids[list(places)].tolist()

    @torch.no_grad()
    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, DecoderState]:
        """As ``LLMDecoder.prefill``, logits (B,W); the prefix runs at full depth."""
        hidden, state = self.decoder.prefill_hidden(prefix, lengths, self._policy)
        return self.logits(hidden), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """As ``LLMDecoder.step``, places (R,) in, logits (R,W) out."""
        return self.logits(state.step(self._embed(tokens)))

    def verifier(self) -> FusedLlama:
        """The blocks that verify drafts.

        Raises:
            ConfigError: an LLM that only transformers can run.
        """
        blocks = self.decoder.fused_blocks()
        if blocks is None:
            raise ConfigError("draft: only Llama-type LLMs with fused_decoding can verify drafts; use draft.kind: none")
        return blocks

    @torch.no_grad()
    def prefill_drafts(
        self, prefix: Tensor, lengths: Tensor, drafts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, TreeState]:
        """``search.drafting.DraftingDecoder.prefill_drafts``: one causal sequence per utterance, at full depth."""
        device, count = prefix.device, len(lengths)
        drafted = torch.tensor([len(draft) for draft in drafts], device=device)
        places = torch.tensor([place for draft in drafts for place in draft], dtype=torch.long, device=device)
        at = torch.arange(int((lengths + drafted).max()), device=device)
        most = min(prefix.shape[1], len(at))
        whole = torch.zeros(count, len(at), prefix.shape[2], dtype=self.decoder.dtype, device=device)
        whole[:, :most] = prefix[:, :most].to(self.decoder.dtype)
        behind = (at >= lengths[:, None]) & (at < (lengths + drafted)[:, None])  # (B,P) the drafts, right behind
        whole[behind] = self._embed(places)
        hidden, state = tree_prefill(self.verifier(), whole, lengths + drafted, RESERVE, drafted + 1)
        return self.logits(hidden), state

    @torch.no_grad()
    def chain(self, tokens: Tensor, lengths: Tensor, state: TreeState) -> Tensor:
        """``search.drafting.DraftingDecoder.chain``: places (N,) in, logits (N,W) out."""
        return self.logits(state.chain(self._embed(tokens), lengths))

    def _embed(self, places: Tensor) -> Tensor:
        return self.decoder.embed(places if self.ids is None else self.ids[places])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm (R,D) -> float32 logits (R,W)."""
        return self.decoder.search_logits(hidden) if self.ids is None else self._output(hidden).float()
