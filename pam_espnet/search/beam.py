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
from pam_espnet.search.hypothesis import Candidate, Hypothesis, Partial, UtteranceBeam, new_beams
from pam_espnet.search.joint import JointScorer
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
    joint: JointScorer | None = None,
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
        joint: a second model whose scores are added to the LLM's.

    Returns:
        for each utterance its n-best hypotheses, best first.
    """
    eos_ids = options.eos_ids if options.eos_ids is not None else decoder.eos_ids
    beams = new_beams(options, eos_ids, len(prefix_lengths), max_new_tokens)
    active = list(beams)
    if active:
        logits, state = decoder.prefill(prefix, prefix_lengths)
    while active:
        depths = state.depths.tolist() if hasattr(state, "depths") else [0] * len(logits)
        candidates = _candidates(logits, depths, active, options, eos_ids, constraints, joint)
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
    joint: JointScorer | None = None,
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
    reach = wanted if joint is None else max(wanted, joint.options.candidates)
    values, tokens = log_probs.topk(min(reach, log_probs.size(1)), dim=-1)  # (R,C)
    if joint is not None:  # it may leave nothing but an end: what the LLM likes less must be there, too
        ends = torch.tensor(list(eos_ids), device=tokens.device)
        there = (tokens[:, :, None] == ends).any(dim=1)  # (R, number of end tokens)
        values = torch.cat([values, log_probs[:, ends].masked_fill(there, -torch.inf)], dim=1)
        tokens = torch.cat([tokens, ends.expand(len(tokens), -1)], dim=1)
    rows = list(zip(values.tolist(), tokens.tolist(), depths, strict=True))
    result = []
    for beam in active:
        own, rows = rows[: len(beam.running)], rows[len(beam.running) :]
        if joint is not None and joint.covers(beam.place):
            own = [
                (_joined(joint, beam.place, hypothesis.tokens, row_values, row_tokens), row_tokens, depth)
                for hypothesis, (row_values, row_tokens, depth) in zip(beam.running, own, strict=True)
            ]
        found = [
            Candidate(beam.running[parent].score + value, parent, token, value, depth)
            for parent, (row_values, row_tokens, depth) in enumerate(own)
            for value, token in zip(row_values, row_tokens, strict=True)
        ]
        found.sort(key=lambda candidate: -candidate.total)
        result.append(found[:wanted])
    return result


def _joined(
    joint: JointScorer, utterance: int, past: Sequence[int], values: Sequence[float], tokens: Sequence[int]
) -> list[float]:
    """Weighted sums of the LLM's log-probabilities of ``tokens`` and the second model's; what is forbidden stays so."""
    weight = joint.options.weight
    possible = [token for token, value in zip(tokens, values, strict=True) if value > -torch.inf]
    second = dict(zip(possible, joint.score(utterance, past, possible), strict=True))
    return [
        (1 - weight) * value + weight * second[token] if value > -torch.inf else value
        for token, value in zip(tokens, values, strict=True)
    ]
