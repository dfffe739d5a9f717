"""Greedy search that is told what to expect: drafts are verified many tokens at a time, the answer stays the same.

A *drafter* guesses the tokens that follow. The LLM reads all of them in one pass, which costs little more than reading
one as long as its weights, not its arithmetic, take the time; what it would have said itself is kept up to the first
place where the draft is wrong, and there the LLM's own token stands. So every pass yields at least one token, and the
answer is that of greedy search (blockwise decoding: Stern et al., NeurIPS 2018; speculative decoding: Leviathan et al.,
ICML 2023). The first draft is read together with the prefix, so that an answer that was foreseen costs no step at all.
Products of one row and of several are rounded differently: in float32 that changes no token but one in a tie; in half
precision near ties are common and an answer may turn out another one, no worse and no better.

Only greedy search: one draft is one path, while the running hypotheses of a beam are K different ones of the same
length, so that from the first token on K - 1 of them at least are not on the path, and every step still needs its pass.

It knows tensors and a decoder; it knows no audio, no text and no files.

B utterances, P prefix positions, D width, V vocabulary, R rows that go on, N rows of a pass: for each utterance its
last token (in the first pass the prefix's last position), then its draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pam_espnet.errors import ConfigError
from pam_espnet.search.beam import State
from pam_espnet.search.constraints import Constraint
from pam_espnet.search.hypothesis import Candidate, Hypothesis, Partial, UtteranceBeam, new_beams
from pam_espnet.search.options import BeamOptions


class Drafter(Protocol):
    """Guesses what follows; ``search.drafters`` has some."""

    @property
    def name(self) -> str:
        """In reports."""

    def propose(self, utterance: int, answer: Sequence[int], most: int) -> Sequence[int]:
        """At most ``most`` tokens to follow ``answer``, which grows from call to call; none where it has no idea."""


class DraftingDecoder(Protocol):
    """What the search needs of a decoder; ``decoder.view.DecoderView`` is one."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    def prefill_drafts(
        self, prefix: Tensor, lengths: Tensor, drafts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, State]:
        """Prefixes (B,P,D), right-padded, (B,), each with its draft -> logits (N,V) behind the prefix and behind every
        token of the draft, state of N rows."""

    def chain(self, tokens: Tensor, lengths: Tensor, state: Any) -> Tensor:
        """Append ``lengths`` (R,) tokens to each row of ``state``, (N,) one after the other -> logits (N,V) behind
        each, which is a row of its own now."""


@dataclass
class DraftCount:
    """What drafts were worth to one utterance.

    Attributes:
        drafter: who made them.
        proposed: tokens drafted and read by the LLM.
        accepted: those of them that the LLM would have said itself.
        passes: of the LLM, the prefix's included; greedy search needs one per token.
    """

    drafter: str
    proposed: int = 0
    accepted: int = 0
    passes: int = 0


@torch.no_grad()
def draft_search(
    decoder: DraftingDecoder,
    prefix: Tensor,
    prefix_lengths: Tensor,
    options: BeamOptions,
    drafters: Sequence[Drafter],
    most: int,
    max_new_tokens: Tensor | Sequence[int] | None = None,
    on_partial: Callable[[list[Partial]], None] | None = None,
    constraints: Sequence[Constraint] = (),
    with_prefix: bool = True,
) -> tuple[list[list[Hypothesis]], list[DraftCount]]:
    """What ``search.beam.beam_search`` finds with ``beam_size`` 1, in fewer passes.

    Args:
        decoder: that verifies drafts.
        prefix, prefix_lengths, max_new_tokens, on_partial, constraints: as in ``beam_search``; a step is a pass.
        options: of the search.
        drafters: one per utterance.
        most: tokens per draft.
        with_prefix: the first draft is read together with the prefix; False: in a pass of its own, after it.

    Returns:
        for each utterance its one hypothesis (none where constraints leave no answer), and what the drafts were worth.

    Raises:
        ConfigError: another beam size.
    """
    if options.beam_size != 1:
        raise ConfigError(f"draft: greedy search only; set beam_size to 1, not {options.beam_size}")
    eos_ids = options.eos_ids if options.eos_ids is not None else decoder.eos_ids
    beams = new_beams(options, eos_ids, len(prefix_lengths), max_new_tokens)
    counts = [DraftCount(drafter.name) for drafter in drafters]
    active = list(beams)

    def drafted() -> list[list[int]]:
        return [_draft(drafters[beam.place], beam, most) for beam in active]

    if active:
        drafts = drafted() if with_prefix else [[] for _ in active]
        logits, state = decoder.prefill_drafts(prefix, prefix_lengths, drafts)
    while active:
        reader = _Reader(logits, state, options, eos_ids, constraints)
        rows: list[int] = []  # behind which each utterance goes on
        first_row = 0
        for beam, draft in zip(active, drafts, strict=True):
            right = 0
            while reader.advance(beam, first_row + right) and right < len(draft):
                if beam.running[0].tokens[-1] != draft[right]:
                    break
                right += 1
            if not beam.done:
                rows.append(first_row + right)
            first_row += 1 + len(draft)
            counted = counts[beam.place]
            counted.proposed += len(draft)
            counted.accepted += right
            counted.passes += 1
        if on_partial is not None:
            on_partial([beam.partial() for beam in active])
        active = [beam for beam in active if not beam.done]
        if active:
            drafts = drafted()
            chains = [[beam.running[0].tokens[-1], *draft] for beam, draft in zip(active, drafts, strict=True)]
            device = logits.device
            state.select(torch.tensor(rows, device=device))
            tokens = torch.tensor([token for chain in chains for token in chain], device=device)
            logits = decoder.chain(tokens, torch.tensor([len(chain) for chain in chains], device=device), state)
    return [beam.nbest() for beam in beams], counts


def _draft(drafter: Drafter, beam: UtteranceBeam, most: int) -> list[int]:
    """What may follow, as far as it is of use: an end token and the token at the cap need not be read."""
    room = min(most, beam.max_new_tokens - beam.length - 1)
    draft = list(drafter.propose(beam.place, beam.running[0].tokens, room))[:room] if room > 0 else []
    end = next((at for at, token in enumerate(draft) if token in beam.eos_ids), len(draft))
    return draft[:end]


class _Reader:
    """Greedy choices from the logits (N,V) of one pass, row by row: a constraint looks at the tokens before."""

    def __init__(
        self,
        logits: Tensor,
        state: Any,
        options: BeamOptions,
        eos_ids: Sequence[int],
        constraints: Sequence[Constraint],
    ) -> None:
        self.options, self.eos_ids, self.constraints = options, eos_ids, constraints
        self.depths: Sequence[int] = state.depths.tolist() if hasattr(state, "depths") else [0] * len(logits)
        self.log_probs = torch.log_softmax(logits.float() / options.temperature, dim=-1)
        # As many as the beam search asks for, so that of equal ones, which half precision has, the same one is taken.
        self.wanted = min(max(2, 1 + len(eos_ids)), logits.size(1))
        values, tokens = self.log_probs.topk(self.wanted, dim=-1)
        self.values, self.tokens = values[:, 0].tolist(), tokens[:, 0].tolist()  # of all rows at once

    def advance(self, beam: UtteranceBeam, row: int) -> bool:
        """Continue a hypothesis by what ``row`` says; whether it goes on from there."""
        value, token = self.values[row], self.tokens[row]
        early = beam.length < self.options.min_new_tokens
        if early or self.constraints:
            own = self.log_probs[row : row + 1]
            if early:
                own[:, list(self.eos_ids)] = -torch.inf
            for constraint in self.constraints:
                constraint.apply(own, [token], [beam.place], [beam.running[0].tokens])
            values, tokens = own[0].topk(self.wanted)
            value, token = float(values[0]), int(tokens[0])
        beam.advance([Candidate(beam.running[0].score + value, 0, token, value, self.depths[row])])
        return not beam.done
