"""Which hypotheses continue, decided on the LLM's device: what ``search.beam`` does on the host, on fixed buffers.

The choice depends on nothing that the host knows: which utterances are done only says when to stop. So the host may
read what was chosen while the next step is run. Sums are float64 and sorting is stable, as in Python.

B utterances, K hypotheses of each, R = B * K rows, V vocabulary, C candidates of each utterance, S steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.engine.ops import Ops
from pam_espnet.engine.static_memory import Memory
from pam_espnet.search.constraints import Rule, forbidden, rule_table
from pam_espnet.search.ctc import CTCState, CTCTable, follow, joint, start, with_ends
from pam_espnet.search.hypothesis import IMPOSSIBLE, BeamOptions

CHUNKS = 128  # of a large vocabulary, each with its own best
FIELDS = 3  # of a candidate's record: the bits of its log-probability, its token, its parent


class Board:
    """The search's own buffers beside a ``Memory``.

    Args:
        memory: whose rows are searched.
        ops: of the engine.
        eos_ids: vocabulary indices of the end tokens.
        candidates: C.
        vocabulary: V.
        constrained: whether there will be rules.
        ctc: buffers of a table, where CTC takes part.

    Attributes:
        record: (S+1,B,C,FIELDS) int32, the candidates of the prefix's end and of every step, best first.
        best: (S+1,B,K) int32, each row's most likely token before any rule, where there are rules.
        depths: (S+1,B) int32, the block that each utterance's candidates came from.
    """

    def __init__(
        self,
        memory: Memory,
        ops: Ops,
        eos_ids: Sequence[int],
        candidates: int,
        vocabulary: int,
        constrained: bool,
        ctc: CTCTable | None,
    ) -> None:
        shape, device = memory.shape, memory.device
        self.memory, self.ops, self.candidates = memory, ops, candidates
        self.ends = torch.tensor(list(eos_ids), device=device)
        count, size, steps = shape.utterances, shape.rows, shape.steps
        self.time = torch.zeros(1, dtype=torch.long, device=device)  # tokens of the hypotheses so far
        self.scores = torch.zeros(count, size, dtype=torch.float64, device=device)
        self.minimum = torch.zeros(1, dtype=torch.long, device=device)
        self.temperature = torch.ones(1, device=device)
        self.record = torch.zeros(steps + 1, count, candidates, FIELDS, dtype=torch.int32, device=device)
        self.best = torch.zeros(steps + 1, count, size if constrained else 0, dtype=torch.int32, device=device)
        self.depths = torch.zeros(steps + 1, count, dtype=torch.int32, device=device)
        mask = torch.zeros(count * size, vocabulary, dtype=torch.bool, device=device) if constrained else None
        self.forbidden = mask  # (R,V)
        self.ctc, self.detected = ctc, None if ctc is None else _every_row(start(ctc), memory.utterance)

    def begin(self, options: BeamOptions) -> None:
        """Before the prefix is run."""
        self.time.zero_()
        self.scores.zero_()
        self.minimum.fill_(options.min_new_tokens)
        self.temperature.fill_(options.temperature)
        self.memory.finished.zero_()
        if self.ctc is not None and self.detected is not None:
            _keep(self.detected, _every_row(start(self.ctc), self.memory.utterance))

    def rule(self, rules: Sequence[Rule | None]) -> None:
        """What may follow each of the R rows."""
        assert self.forbidden is not None
        table = rule_table(rules).to(self.forbidden.device, non_blocking=True)
        self.forbidden.copy_(forbidden(table, self.forbidden.shape[1]))

    def first(self, logits: Tensor) -> None:
        """Choose from the prefix's logits (B,V)."""
        self._choose(logits, 1)

    def following(self, logits: Tensor) -> None:
        """Choose from a step's logits (R,V)."""
        if self.ctc is not None and self.detected is not None:
            memory = self.memory
            parents = memory.parents.flatten() + memory.utterance * memory.shape.rows
            _keep(self.detected, follow(self.ctc, self.detected, parents, memory.tokens.flatten()))
        self._choose(logits, self.memory.shape.rows)

    def _choose(self, logits: Tensor, rows: int) -> None:
        """Record the candidates of each utterance from logits (B*rows,V); the best that do not end are read next."""
        memory, count, size = self.memory, self.memory.shape.utterances, self.memory.shape.rows
        values, tokens = self._continuations(logits, rows)  # (B*rows,C')
        if (missing := self.candidates - rows * values.shape[1]) > 0:  # a small vocabulary
            values, tokens = F.pad(values, (0, missing), value=-torch.inf), F.pad(tokens, (0, missing))
        sums = (self.scores[:, :rows, None] + values.view(count, rows, -1).double()).flatten(1)  # (B,rows*C')
        if self.ctc is not None:  # what it makes of rows without a hypothesis may be no number
            sums = sums.masked_fill(
                (self.scores[:, :rows] == -torch.inf).repeat_interleave(values.shape[1], 1), -torch.inf
            )
        # Of equal ones the lower row and the better rank come first.
        sums, order = sums.sort(dim=1, descending=True, stable=True)
        sums, order = sums[:, : self.candidates], order[:, : self.candidates]
        value, token = (found.view(count, -1).gather(1, order) for found in (values, tokens))
        parent = order // values.shape[1]
        record = torch.stack([value.view(torch.int32), token.int(), parent.int()], dim=-1)
        self.record.index_copy_(0, self.time, record[None])
        self.depths.index_copy_(0, self.time, memory.depths.int()[None])
        ends = sums <= IMPOSSIBLE
        if len(self.ends):
            ends = ends | (token[:, :, None] == self.ends).any(dim=2)
        chosen = ends.to(torch.uint8).sort(dim=1, stable=True).indices[:, :size]  # (B,K)
        memory.parents.copy_(parent.gather(1, chosen))
        memory.tokens.copy_(token.gather(1, chosen))
        self.scores.copy_(sums.gather(1, chosen).masked_fill(ends.gather(1, chosen), -torch.inf))
        self.time.add_(1)

    def _continuations(self, logits: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The best log-probabilities and tokens (B*rows,C') of each row."""
        total = self.ops.logsumexp(logits, self.temperature)
        if self.forbidden is not None:
            best = logits.argmax(dim=1).view(-1, rows)
            row = torch.zeros_like(self.best[0])
            row[:, :rows] = best
            self.best.index_copy_(0, self.time, row[None])
        logits = logits / self.temperature
        if len(self.ends):
            kept = logits.index_select(1, self.ends)
            logits.index_copy_(1, self.ends, kept.masked_fill(self.time < self.minimum, -torch.inf))
        if self.forbidden is not None:
            mask = self.forbidden.unflatten(0, (-1, self.memory.shape.rows))[:, :rows]
            logits.masked_fill_(mask.flatten(0, 1), -torch.inf)
        reach = self.candidates if self.ctc is None else max(self.candidates, self.ctc.candidates)
        values, tokens = top(logits, min(reach, logits.shape[1]))
        if self.ctc is None or self.detected is None:
            return values - total, tokens
        values, tokens = with_ends(values, tokens, logits, self.ends)
        size = self.memory.shape.rows
        own = CTCState(*(part.unflatten(0, (-1, size))[:, :rows].flatten(0, 1) for part in self.detected))
        return joint(self.ctc, own, tokens, values - total).float(), tokens


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row (R,V), best first: of chunks, then of what these have found."""
    rows, width = logits.shape
    if width < CHUNKS**2 or width % CHUNKS or width // CHUNKS < count:
        return logits.topk(count, dim=1)
    values, tokens = logits.view(rows, CHUNKS, -1).topk(count, dim=2)
    tokens = tokens + torch.arange(CHUNKS, device=logits.device)[:, None] * (width // CHUNKS)
    values, chosen = values.flatten(1).topk(count, dim=1)
    return values, tokens.flatten(1).gather(1, chosen)


def _every_row(state: CTCState, utterance: Tensor) -> CTCState:
    """The state of one hypothesis per utterance, for all rows; a copy."""
    return CTCState(*(part[utterance] for part in state))


def _keep(buffers: CTCState, state: CTCState) -> None:
    for buffer, part in zip(buffers, state, strict=True):
        buffer.copy_(part)
