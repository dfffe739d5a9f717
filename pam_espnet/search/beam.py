"""Beam search over a decoder that steps with a cache: the prefix is run once per utterance, then beams grow.

It knows tensors and a decoder; it knows no audio, no text and no files. An utterance's hypotheses do not depend on
its neighbours: each one has its own ``UtteranceBeam`` and leaves the batch when that is done.

B utterances, R rows (running hypotheses of all utterances, one after the other), P prefix positions, D width,
V vocabulary, C candidates per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pam_espnet.search.constraints import Constraint
from pam_espnet.search.hypothesis import Candidate, Hypothesis, Partial, UtteranceBeam
from pam_espnet.search.options import BeamOptions


class State(Protocol):
    """What a decoder remembers of every row.

    One that can exit early also has ``depths`` (R,): the block from which each row's last logits came.
    """

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` (R',) in this order; repeats and drops allowed."""


class SteppingDecoder(Protocol):
    """What the search needs of a decoder; ``decoder.llm.LLMDecoder`` is one, so is a mock of ten lines."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """Prefixes (B,P,D), right-padded, (B,) -> logits (B,V) of the first token, state of B rows."""

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Append tokens (R,) to the R rows of ``state`` -> logits (R,V) of the next token."""


@torch.no_grad()
def beam_search(
    decoder: SteppingDecoder,
    prefix: Tensor,
    prefix_lengths: Tensor,
    options: BeamOptions,
    max_new_tokens: Tensor | Sequence[int] | None = None,
    on_partial: Callable[[list[Partial]], None] | None = None,
    constraints: Sequence[Constraint] = (),
) -> list[list[Hypothesis]]:
    """Search the best answers of a batch.

    Results equal transformers' ``generate(num_beams=K, num_return_sequences=n)``.

    Args:
        decoder: steps with a cache.
        prefix: (B,P,D) embeddings, right-padded.
        prefix_lengths: (B,) valid positions.
        options: of the search.
        max_new_tokens: (B,) a length cap per utterance, e.g. from the audio's duration; ``options.max_new_tokens``
            stays the upper bound.
        on_partial: called after every step with how far the utterances are that took it.
        constraints: on the answers; they count per utterance where they fired.

    Returns:
        for each utterance its n-best hypotheses, best first.
    """
    eos_ids = options.eos_ids if options.eos_ids is not None else decoder.eos_ids
    count = len(prefix_lengths)
    caps = [options.max_new_tokens] * count if max_new_tokens is None else [int(cap) for cap in max_new_tokens]
    beams = [
        UtteranceBeam(options, eos_ids, max(1, min(cap, options.max_new_tokens)), place)
        for place, cap in enumerate(caps)
    ]
    active = list(beams)
    if active:
        logits, state = decoder.prefill(prefix, prefix_lengths)
    while active:
        depths = state.depths.tolist() if hasattr(state, "depths") else [0] * len(logits)
        candidates = _candidates(logits, depths, active, options, eos_ids, constraints)
        rows: list[int] = []
        first_row = 0
        for beam, choices in zip(active, candidates, strict=True):
            before = len(beam.running)
            parents = beam.advance(choices)
            if not beam.done:
                rows += [first_row + parent for parent in parents]
            first_row += before
        if on_partial is not None:
            on_partial([beam.partial() for beam in active])
        active = [beam for beam in active if not beam.done]
        if active:
            tokens = [hypothesis.tokens[-1] for beam in active for hypothesis in beam.running]
            state.select(torch.tensor(rows, device=logits.device))
            logits = decoder.step(torch.tensor(tokens, device=logits.device), state)
    return [beam.nbest() for beam in beams]


def _candidates(
    logits: Tensor,
    depths: Sequence[int],
    active: Sequence[UtteranceBeam],
    options: BeamOptions,
    eos_ids: Sequence[int],
    constraints: Sequence[Constraint],
) -> list[list[Candidate]]:
    """The best continuations (logits (R,V) from blocks ``depths``) of each active utterance, best first.

    (1 + number of end tokens) * beam_size of them: even if every end token is among the best of every hypothesis,
    beam_size others can go on.
    """
    # Enough of each row, since all of an utterance's best may continue the same hypothesis. Ties: lower row first.
    wanted = max(2, 1 + len(eos_ids)) * options.beam_size
    log_probs = torch.log_softmax(logits.float() / options.temperature, dim=-1)
    best = log_probs.argmax(dim=-1).tolist() if constraints else []
    if active[0].length < options.min_new_tokens:  # all active utterances have taken the same number of steps
        log_probs[:, list(eos_ids)] = -torch.inf
    if constraints:
        utterances = [beam.place for beam in active for _ in beam.running]
        past = [hypothesis.tokens for beam in active for hypothesis in beam.running]
        for constraint in constraints:
            constraint.apply(log_probs, best, utterances, past)
    values, tokens = log_probs.topk(min(wanted, log_probs.size(1)), dim=-1)  # (R,C)
    rows = list(zip(values.tolist(), tokens.tolist(), depths, strict=True))
    result = []
    for beam in active:
        own, rows = rows[: len(beam.running)], rows[len(beam.running) :]
        found = [
            Candidate(beam.running[parent].score + value, parent, token, value, depth)
            for parent, (row_values, row_tokens, depth) in enumerate(own)
            for value, token in zip(row_values, row_tokens, strict=True)
        ]
        found.sort(key=lambda candidate: -candidate.total)
        result.append(found[:wanted])
    return result
