"""Greedy search with drafts, verified many tokens at a time; the answer stays the same.

A draft guesses the tokens that follow. The LLM reads all of them in one pass, which costs little more than reading one
as long as its weights, not its arithmetic, take the time; its own tokens are kept up to the first where the draft is
wrong, and there the LLM's stands. So every pass yields at least one token, and the answer is that of greedy search
(blockwise decoding: Stern et al., NeurIPS 2018; speculative decoding: Leviathan et al., ICML 2023). The first draft is
read together with the prefix, so that an answer that was foreseen costs no step at all. Products of one row and of
several are rounded differently: in float32 that changes no token but one in a tie; in half precision near ties are
common and an answer may turn out another one, no worse and no better.

Only greedy search: a draft is one path, while the running hypotheses of a beam are K different ones of the same length,
so that from the first token on at least K - 1 of them are not on the path, and every step still needs its pass.

B utterances, P prefix positions, D width, V vocabulary, R active utterances, N rows of a pass: for each utterance its
last token (in the first pass the prefix's last position), then its draft.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pam_espnet.config import LAST_COMMIT, check_number
from pam_espnet.engine.engine import Engine
from pam_espnet.errors import ConfigError
from pam_espnet.search.constraints import Constraint, combine, count_fired, find_rules, forbidden, rule_table
from pam_espnet.search.hypothesis import BeamOptions, Candidate, Hypothesis, Partial, UtteranceBeam, new_beams
from pam_espnet.transfer import download, send, upload

KINDS = ("none", "ctc")


@dataclass(frozen=True)
class DraftOptions:
    """Where drafts come from."""

    kind: str = "none"  # or ctc, the warm start's head; tasks that it was not fitted to with CTC get no drafts
    most: int = 8  # tokens per draft

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        if self.kind == "ngram":
            raise ConfigError(f"draft.kind: ngram is no longer supported; the last commit that had it is {LAST_COMMIT}")
        if self.kind not in KINDS:
            raise ConfigError(f"draft.kind: {self.kind!r}; choose one of {', '.join(KINDS)}")
        check_number(self.most, "draft.most", at_least=1, whole=True)


class WholeAnswer:
    """A draft of an utterance's whole answer.

    Where the LLM predicts something else, the draft continues behind its beginning that is the fewest edits
    (substitutions, insertions, deletions; Levenshtein) away from the answer so far. Among several of the same distance
    one that ends in the answer's last token is preferred, then the longest, which takes an odd token for a substitute
    of the drafted one rather than for an addition to it.

    Args:
        draft: vocabulary indices, without an end token.
    """

    def __init__(self, draft: Sequence[int]) -> None:
        self.draft = draft
        # Last row of the table of edit distances, from the answer's first ``_read`` tokens to each beginning of it.
        self._read = 0
        self._distance = list(range(len(draft) + 1))

    def propose(self, answer: Sequence[int], most: int) -> Sequence[int]:
        """At most ``most`` tokens to follow ``answer``, which grows from call to call; none where it has no idea."""
        draft, distance = self.draft, self._distance
        for token in answer[self._read :]:
            row = [distance[0] + 1]
            for at, drafted in enumerate(draft):
                row.append(min(distance[at] + (token != drafted), distance[at + 1] + 1, row[at] + 1))
            distance = row
        self._read, self._distance = len(answer), distance
        last = answer[-1] if answer else None

        def fit(length: int) -> tuple[int, bool, int]:
            return distance[length], not (length and draft[length - 1] == last), -length

        best = min(range(len(draft) + 1), key=fit) if answer else 0
        return draft[best : best + most]


@dataclass
class DraftCount:
    """What drafts were worth to one utterance."""

    proposed: int = 0  # tokens drafted and read by the LLM
    accepted: int = 0  # those of them that the LLM predicted, too
    passes: int = 0  # of the LLM, the prefix's included; greedy search needs one per token


@torch.no_grad()
def draft_search(
    engine: Engine,
    prefix: Tensor,
    prefix_lengths: Tensor,
    options: BeamOptions,
    drafts: Sequence[WholeAnswer | None],
    most: int,
    max_new_tokens: Tensor | Sequence[int] | None = None,
    on_partial: Callable[[list[Partial]], None] | None = None,
    constraints: Sequence[Constraint] = (),
) -> tuple[list[list[Hypothesis]], list[DraftCount]]:
    """What ``search.beam.beam_search`` finds with ``beam_size`` 1, in fewer passes.

    Args:
        engine: the LLM; it must be able to verify.
        prefix, prefix_lengths, max_new_tokens, on_partial, constraints: as in ``beam_search``; a step is a pass.
        drafts: one per utterance, or None.
        most: tokens per draft.

    Returns:
        for each utterance its one hypothesis (none where constraints leave no answer), and what the drafts were worth.

    Raises ConfigError: another beam size.
    """
    if options.beam_size != 1:
        raise ConfigError(f"draft: greedy search only; set beam_size to 1, not {options.beam_size}")
    eos_ids = options.eos_ids if options.eos_ids is not None else engine.eos_ids
    beams = new_beams(options, eos_ids, len(prefix_lengths), max_new_tokens)
    counts = [DraftCount() for _ in beams]
    active = list(beams)
    if active:
        proposed = [_propose(drafts[beam.utterance], beam, most) for beam in active]
        logits, state = engine.prefill(prefix, prefix_lengths, proposed)
    while active:
        reader = _Reader(engine.log_probs(logits, options.temperature), state.depths, options, eos_ids, constraints)
        rows: list[int] = []  # behind which each utterance continues
        first_row = 0
        for beam, draft in zip(active, proposed, strict=True):
            right = 0
            while reader.advance(beam, first_row + right) and right < len(draft):
                if beam.running[0].tokens[-1] != draft[right]:
                    break
                right += 1
            if not beam.done:
                rows.append(first_row + right)
            first_row += 1 + len(draft)
            count = counts[beam.utterance]
            count.proposed += len(draft)
            count.accepted += right
            count.passes += 1
        if on_partial is not None:
            on_partial([beam.partial() for beam in active])
        active = [beam for beam in active if not beam.done]
        if active:
            proposed = [_propose(drafts[beam.utterance], beam, most) for beam in active]
            chains = [[beam.running[0].tokens[-1], *draft] for beam, draft in zip(active, proposed, strict=True)]
            state.select(rows)
            (tokens,) = upload(logits.device, [token for chain in chains for token in chain])
            logits = engine.verify(tokens, [len(chain) for chain in chains], state)
    return [beam.nbest() for beam in beams], counts


def _propose(draft: WholeAnswer | None, beam: UtteranceBeam, most: int) -> list[int]:
    """What may follow, as far as it is of use: an end token and the token at the cap need not be read."""
    allowed = min(most, beam.max_new_tokens - beam.length - 1)
    proposed = [] if draft is None or allowed < 1 else list(draft.propose(beam.running[0].tokens, allowed))
    return proposed[: next((at for at, token in enumerate(proposed) if token in beam.eos_ids), len(proposed))]


class _Reader:
    """Greedy choices from the log-probabilities (N,V) of one pass, row by row: rules depend on the tokens before."""

    def __init__(
        self,
        log_probs: Tensor,
        depths: Sequence[int],
        options: BeamOptions,
        eos_ids: Sequence[int],
        constraints: Sequence[Constraint],
    ) -> None:
        self.depths, self.options, self.eos_ids, self.constraints = depths, options, eos_ids, constraints
        self.log_probs = log_probs
        # As many as the beam search takes, so that of equal ones, which half precision has, the same one is taken.
        self.wanted = min(max(2, 1 + len(eos_ids)), log_probs.size(1))
        values, tokens = self.log_probs.topk(self.wanted, dim=-1)
        self.values, self.tokens = download(values[:, 0], tokens[:, 0])  # of all rows at once

    def advance(self, beam: UtteranceBeam, row: int) -> bool:
        """Continue a hypothesis by the best token of ``row``; whether it continues from there."""
        value, token = self.values[row], self.tokens[row]
        early = beam.length < self.options.min_new_tokens
        if early or self.constraints:
            own = self.log_probs[row : row + 1]
            if early:
                for end in self.eos_ids:
                    own[:, end] = -torch.inf
            rules = find_rules(self.constraints, beam.utterance, beam.running[0].tokens)
            if rules:
                count_fired(rules, beam.utterance, token)
                table = send(rule_table([combine(rules.values())]), own.device)
                own.masked_fill_(forbidden(table, own.size(1)), -torch.inf)
            values, tokens = own[0].topk(self.wanted)
            value, token = download(values[0], tokens[0])
        beam.advance([Candidate(beam.running[0].score + value, 0, token, value, self.depths[row])])
        return not beam.done
