"""CTC beside the LLM in the search: both score every continuation, the weighted sum counts.

Joint decoding of CTC and attention (Hori, Watanabe and Hershey, ACL 2017), with an LLM for the attention decoder. An
LLM that was fine-tuned on few transcripts continues as its training text does; CTC gives no probability to words that
the audio does not contain. A token without a CTC class is passed over: its score is an option, and what follows is
scored as if it were not there.

The prefix scores are those of Watanabe et al., "Hybrid CTC/attention architecture for end-to-end speech recognition"
(IEEE JSTSP 2017, algorithm 2), for all rows and candidates at once. Tensors of fixed shapes that the host never reads:
the functions can be captured in a CUDA graph. Float64, and nothing but elementwise operations, maxima and sums in a
fixed order: a row's scores depend neither on other rows nor on how far frames are padded.

B utterances, R rows (hypotheses), N candidates of each, U adapter frames, C classes (token types + 1 blank, class 0),
W vocabulary indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.config import check_number

BLANK = 0
NO_CLASS, END = -1, -2  # of tokens that are not among the classes
ZERO = -1e6  # replaces minus infinity in a frame, so that sums over frames stay numbers
LOWEST = torch.finfo(torch.float64).min  # replaces it where it would be taken from itself


@dataclass(frozen=True)
class CTCOptions:
    """How much CTC counts."""

    weight: float = 0.0  # of its log-probabilities, the LLM's have the rest; 0 turns it off
    candidates: int = 40  # of each running hypothesis, the LLM's most likely continuations that it scores
    unknown: float = -5.0  # log-probability of tokens without a class

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option."""
        check_number(self.weight, "ctc.weight", at_least=0, below=1)
        check_number(self.candidates, "ctc.candidates", at_least=1, whole=True)
        check_number(self.unknown, "ctc.unknown", at_least=-100, at_most=0)


def token_classes(class_of: Mapping[int, int], eos_ids: Sequence[int], width: int) -> Tensor:
    """(W,) class of each of ``width`` vocabulary indices, ``END`` or ``NO_CLASS``."""
    classes = torch.full((width,), NO_CLASS)
    classes[list(class_of)] = torch.tensor(list(class_of.values()))
    classes[list(eos_ids)] = END
    return classes


@dataclass(frozen=True)
class CTCTable:
    """What CTC detected in the utterances of a batch; tensors of one device."""

    log_probs: Tensor  # (B,C,U) float32
    blanks: Tensor  # (B,U) float64, log-probability of nothing but blanks up to a frame
    padding: Tensor  # (B,U) bool, frames behind an utterance's end
    last: Tensor  # (B,1) index of the last frame
    weights: Tensor  # (B,) float64, 0 where the LLM alone counts
    unknown: Tensor  # (1,) float64, log-probability of tokens without a class
    classes: Tensor  # (W,) see ``token_classes``
    candidates: int  # of each hypothesis, to be scored

    @classmethod
    def of(cls, log_probs: Tensor, lengths: Tensor, covered: Tensor, classes: Tensor, options: CTCOptions) -> CTCTable:
        """The table of a batch.

        Args:
            log_probs: (B,U,C) of each frame.
            lengths: (B,) valid frames, at least 1.
            covered: (B,) bool, utterances whose answers CTC scores.
            classes: (W,) of the vocabulary.
        """
        device = log_probs.device
        last = lengths.to(device)[:, None] - 1
        padding = torch.arange(log_probs.size(1), device=device) > last
        # Frames are innermost: a candidate's are one piece of memory.
        columns = log_probs.detach().float().transpose(1, 2).clamp_min(ZERO).masked_fill(padding[:, None], ZERO)
        blanks = _scan(torch.add, columns[:, BLANK].double(), 0.0)
        weights = covered.to(device).double() * options.weight
        unknown = torch.full((1,), options.unknown, dtype=torch.float64, device=device)
        return cls(
            columns.contiguous(), blanks, padding, last, weights, unknown, classes.to(device), options.candidates
        )

    @classmethod
    def empty(cls, like: CTCTable, utterances: int, frames: int) -> CTCTable:
        """Buffers for tables like one, of at most ``utterances`` and ``frames``."""
        device, classes = like.log_probs.device, like.log_probs.shape[1]
        doubles: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(utterances, classes, frames, device=device),
            torch.zeros(utterances, frames, **doubles),
            torch.ones(utterances, frames, dtype=torch.bool, device=device),
            torch.zeros(utterances, 1, dtype=torch.long, device=device),
            torch.zeros(utterances, **doubles),
            torch.zeros(1, **doubles),
            torch.zeros_like(like.classes),
            like.candidates,
        )

    def load(self, table: CTCTable) -> None:
        """Make buffers a table; what it lacks is padding."""
        self.padding.fill_(True)
        self.weights.zero_()
        self.last.zero_()
        for name in ("log_probs", "blanks", "padding", "last", "weights", "unknown", "classes"):
            source = getattr(table, name)
            getattr(self, name)[tuple(slice(size) for size in source.shape)].copy_(source)


class CTCState(NamedTuple):
    """Of R hypotheses."""

    utterance: Tensor  # (R,)
    forward: Tensor  # (R,2,U) float64, log-probabilities of all paths to a frame, by what it holds: a label, a blank
    score: Tensor  # (R,) float64, log-probability of all answers that begin with the hypothesis
    last: Tensor  # (R,) class of its last label, BLANK if there is none


def start(table: CTCTable) -> CTCState:
    """An empty hypothesis of each utterance: B rows."""
    forward = _possible(torch.stack([torch.full_like(table.blanks, -torch.inf), table.blanks], dim=1))
    zeros = torch.zeros_like(table.weights)
    utterance = torch.arange(len(zeros), device=zeros.device)
    return CTCState(utterance, forward, zeros, torch.full_like(utterance, BLANK))


def score(table: CTCTable, state: CTCState, tokens: Tensor) -> Tensor:
    """Log-probabilities (R,N) float64 of the vocabulary indices ``tokens`` (R,N), given each row's hypothesis."""
    classes = table.classes[tokens]
    either, repeated = _before(table, state)
    # A label that equals the last one is a new one only behind a blank.
    is_repeated = (classes == state.last[:, None])[:, :, None]
    before = torch.where(is_repeated, repeated[:, None], either[:, None])  # (R,N,U)
    begun = _log_total(before + table.log_probs[state.utterance[:, None], classes.clamp_min(BLANK)])
    whole = torch.logaddexp(state.forward[:, 0], state.forward[:, 1]).gather(1, table.last[state.utterance])  # (R,1)
    found = _possible(torch.where(classes == END, whole, begun)) - state.score.clamp_min(LOWEST)[:, None]
    return torch.where(classes == NO_CLASS, table.unknown, found)


def joint(table: CTCTable, state: CTCState, tokens: Tensor, values: Tensor) -> Tensor:
    """Weighted sums (R,N) float64 of the LLM's log-probabilities ``values`` of ``tokens`` (R,N) and CTC's.

    Where CTC does not cover an utterance, the LLM's alone; what is forbidden (minus infinity) stays so.
    """
    values = values.double()
    weights = table.weights[state.utterance][:, None]
    mixed = (1 - weights) * values + weights * score(table, state, tokens)
    return torch.where(weights > 0, mixed, values)  # zero times minus infinity is no number


def follow(table: CTCTable, state: CTCState, parents: Tensor, tokens: Tensor) -> CTCState:
    """The hypotheses ``parents`` (R',), each continued by one of ``tokens`` (R',); ends and unknown tokens change none.

    With r[t] the paths to frame t that end in the new label or in a blank behind it, and X[t] the sum of log-
    probabilities x of that class up to t, ``r[t] = x[t] + logaddexp(r[t-1], from[t-1])`` is a cumulative sum of
    probabilities: ``r[t] - X[t] = logaddexp(r[t-1] - X[t-1], from[t-1] - X[t-1])``.
    """
    old = CTCState(*(part[parents] for part in state))
    classes = table.classes[tokens]
    either, repeated = _before(table, old)
    before = torch.where((classes == old.last)[:, None], repeated, either)  # (R',U)
    own = table.log_probs[old.utterance, classes.clamp_min(BLANK)].double()
    sums = _scan(torch.add, own, 0.0)
    begun = before + own  # the first frame of the new label
    label, scores = _scan(torch.logaddexp, torch.stack([begun - sums, begun], dim=1), -torch.inf).unbind(1)
    label = label + sums
    blanks = table.blanks[old.utterance]
    blank = blanks + _scan(torch.logaddexp, F.pad(label - blanks, (1, -1), value=-torch.inf), -torch.inf)
    has_class = classes > BLANK
    return CTCState(
        old.utterance,
        torch.where(has_class[:, None, None], _possible(torch.stack([label, blank], dim=1)), old.forward),
        torch.where(has_class, _possible(scores.gather(1, table.last[old.utterance])[:, 0]), old.score),
        torch.where(has_class, classes, old.last),
    )


def with_ends(values: Tensor, tokens: Tensor, every: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates' ``values`` and ``tokens`` (R,N), and the end tokens that are not among them: CTC may allow nothing
    else, even where the LLM ranks them low. ``every`` (R,W) has the values of all tokens."""
    there = (tokens[:, :, None] == ends).any(dim=1)  # (R, number of end tokens)
    more = every.index_select(1, ends).masked_fill(there, -torch.inf)
    return torch.cat([values, more], dim=1), torch.cat([tokens, ends.expand(len(tokens), -1)], dim=1)


def _before(table: CTCTable, state: CTCState) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R,U) of the paths up to the frame before each: all of them, and those that end in a blank."""
    label, blank = state.forward.unbind(1)
    paths = torch.stack([torch.logaddexp(label, blank), blank], dim=1)[:, :, :-1]
    # Before the first frame there is one path, which holds nothing.
    first = torch.zeros_like(state.score).masked_fill(state.last != BLANK, -torch.inf)
    paths = torch.cat([first[:, None, None].expand(-1, 2, 1), paths], dim=2)
    either, repeated = paths.masked_fill(table.padding[state.utterance][:, None], -torch.inf).unbind(1)
    return either, repeated


def _possible(values: Tensor) -> Tensor:
    """Minus infinity for what needs a label in a frame that cannot hold it."""
    return values.masked_fill(values < ZERO / 2, -torch.inf)


def _scan(combine: Callable[..., Tensor], values: Tensor, neutral: float) -> Tensor:
    """Cumulative ``combine`` over the last dimension, by doubling: what comes behind a frame does not change it."""
    size = values.size(-1)
    now = F.pad(values, (size, 0), value=neutral)
    following, reach = now.clone(), 1
    while reach < size:
        combine(now[..., size:], now[..., size - reach : -reach], out=following[..., size:])
        now, following, reach = following, now, 2 * reach
    return now[..., size:]


def _log_total(values: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension; neighbours are added first: minus infinity behind them changes nothing."""
    highest = values.amax(dim=-1, keepdim=True).clamp_min(LOWEST)
    total = (values - highest).exp_()
    while total.size(-1) > 1:
        pairs = total.size(-1) // 2
        odd, total = total[..., 1::2], total[..., ::2]
        total[..., :pairs] += odd
    return total[..., 0].log() + highest[..., 0]
