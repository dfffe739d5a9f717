"""Beam search over an engine: the prefix is run once per utterance, then beams grow.

An utterance's hypotheses do not depend on its neighbours: each one has its own ``UtteranceBeam`` and is dropped from
the batch when that is done.

B utterances, R rows (running hypotheses of all utterances, one after the other), P prefix positions, D width,
V vocabulary, C candidates per row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pam_espnet.engine.engine import Engine
from pam_espnet.engine.static import StaticEngine
from pam_espnet.search.constraints import Constraint, combine, count_fired, find_rules, forbidden, rule_table
from pam_espnet.search.ctc import CTCState, CTCTable, follow, joint, start, with_ends
from pam_espnet.search.hypothesis import BeamOptions, Candidate, Hypothesis, Partial, UtteranceBeam, new_beams
from pam_espnet.search.static_beam import static_beam_search
from pam_espnet.transfer import download, send, upload


@torch.no_grad()
def beam_search(
    engine: Engine,
    prefix: Tensor,
    prefix_lengths: Tensor,
    options: BeamOptions,
    max_new_tokens: Tensor | Sequence[int] | None = None,
    on_partial: Callable[[list[Partial]], None] | None = None,
    constraints: Sequence[Constraint] = (),
    ctc: CTCTable | None = None,
) -> list[list[Hypothesis]]:
    """Search the best answers of a batch.

    Results equal transformers' ``generate(num_beams=K, num_return_sequences=n)``.

    Args:
        prefix: (B,P,D) embeddings, right-padded.
        prefix_lengths: (B,) valid positions.
        max_new_tokens: (B,) a length cap per utterance, e.g. from the audio's duration; ``options.max_new_tokens``
            stays the upper bound.
        on_partial: called after every step with how far the utterances are that took it.
        constraints: on the answers; they count per utterance where they fired.
        ctc: of the batch; its scores are added to the LLM's.

    Returns:
        for each utterance its n-best hypotheses, best first.
    """
    eos_ids = options.eos_ids if options.eos_ids is not None else engine.eos_ids
    beams = new_beams(options, eos_ids, len(prefix_lengths), max_new_tokens)
    active = list(beams)
    if isinstance(engine, StaticEngine) and active:
        static_beam_search(engine, prefix, prefix_lengths, options, eos_ids, beams, on_partial, constraints, ctc)
        return [beam.nbest() for beam in beams]
    if active:
        logits, state = engine.prefill(prefix, prefix_lengths)
        scored = None if ctc is None else (ctc, start(ctc))
    while active:
        candidates = _candidates(logits, state.depths, active, options, eos_ids, constraints, scored)
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
            state.select(rows)
            last, kept = upload(logits.device, tokens, rows)
            logits = engine.step(last, state)
            if scored is not None:
                scored = scored[0], follow(*scored, kept, last)
    return [beam.nbest() for beam in beams]


def _candidates(
    logits: Tensor,
    depths: Sequence[int],
    active: Sequence[UtteranceBeam],
    options: BeamOptions,
    eos_ids: Sequence[int],
    constraints: Sequence[Constraint],
    ctc: tuple[CTCTable, CTCState] | None,
) -> list[list[Candidate]]:
    """The best continuations (logits (R,V) from blocks ``depths``) of each active utterance, best first.

    (1 + number of end tokens) * beam_size of them: even if every end token is among the best of every hypothesis,
    beam_size others can continue.
    """
    # Enough of each row, since all of an utterance's best may continue the same hypothesis. Ties: lower row first.
    wanted = max(2, 1 + len(eos_ids)) * options.beam_size
    log_probs = torch.log_softmax(logits.float() / options.temperature, dim=-1)
    best = log_probs.argmax(dim=-1) if constraints else log_probs.new_zeros(0)  # before any constraint
    if active[0].length < options.min_new_tokens:  # all active utterances have taken the same number of steps
        for end in eos_ids:
            log_probs[:, end] = -torch.inf
    rules = [
        find_rules(constraints, beam.utterance, hypothesis.tokens) for beam in active for hypothesis in beam.running
    ]
    if any(rules):
        table = send(rule_table([combine(own.values()) for own in rules]), log_probs.device)
        log_probs.masked_fill_(forbidden(table, log_probs.size(1)), -torch.inf)
    reach = wanted if ctc is None else max(wanted, ctc[0].candidates)
    values, tokens = log_probs.topk(min(reach, log_probs.size(1)), dim=-1)  # (R,C)
    if ctc is not None:
        values, tokens = with_ends(values, tokens, log_probs, *upload(tokens.device, eos_ids))
        values = joint(*ctc, tokens, values).float()
    all_values, all_tokens, likeliest = download(values, tokens, best)  # the one time that a step waits for the device
    owners = [beam.utterance for beam in active for _ in beam.running]
    for own, utterance, token in zip(rules, owners, likeliest, strict=bool(constraints)):
        count_fired(own, utterance, token)
    rows = iter(zip(all_values, all_tokens, depths, strict=True))
    result = []
    for beam in active:
        found = []
        for parent, hypothesis in enumerate(beam.running):
            row_values, row_tokens, depth = next(rows)
            found += [
                Candidate(hypothesis.score + value, parent, token, value, depth)
                for value, token in zip(row_values, row_tokens, strict=True)
            ]
        found.sort(key=lambda candidate: -candidate.total)
        result.append(found[:wanted])
    return result
