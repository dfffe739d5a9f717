"""CTC prefix scores of many rows at once: against ESPnet's, one hypothesis and one frame after the other."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from espnet2.legacy.nets.ctc_prefix_score import CTCPrefixScore
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pam_espnet.search.ctc import BLANK, CTCOptions, CTCState, CTCTable, follow, joint, score, start, token_classes

CLASSES = 4  # a blank and three labels
LABELS, UNKNOWN, ENDS = [0, 1, 2], 3, [4, 5]  # vocabulary indices; label n has class n + 1
EVERY = [*LABELS, UNKNOWN, *ENDS]
OPTIONS = CTCOptions(weight=0.3, unknown=-2.5)
IMPOSSIBLE = -1e9

# ESPnet's arithmetic in float64; it asks for float32.
float64 = SimpleNamespace(
    full=lambda shape, value, dtype: np.full(shape, value),
    ndarray=lambda shape, dtype: np.full(shape, -1e10),
    logaddexp=np.logaddexp,
    where=np.where,
    rollaxis=np.rollaxis,
)


class OneByOne:
    """ESPnet's scores of one hypothesis.

    Args:
        log_probs: (U,C) of its utterance.
    """

    def __init__(self, log_probs: Tensor) -> None:
        self.end = log_probs.size(1)
        no_end = np.full((len(log_probs), 1), -np.inf)
        rows = np.concatenate([log_probs.double().numpy(), no_end], axis=1)
        self.espnet = CTCPrefixScore(rows, BLANK, self.end, float64)
        self.labels, self.state, self.before = [self.end], self.espnet.initial_state(), 0.0

    def scores(self) -> list[float]:
        """Of ``EVERY`` token."""
        classes = np.array([token + 1 if token in LABELS else self.end for token in EVERY])
        with np.errstate(invalid="ignore"):
            values, self.states = self.espnet(self.labels, classes, self.state)
        self.values = [value if value > IMPOSSIBLE else -np.inf for value in values.tolist()]
        found = [value - self.before if self.before > -np.inf else -np.inf for value in self.values]
        found[UNKNOWN] = OPTIONS.unknown
        return found

    def follow(self, token: int) -> None:
        """After ``scores``."""
        if token in LABELS:
            self.labels.append(token + 1)
            self.state, self.before = self.states[token], self.values[token]


def random_log_probs(seed: int, utterances: int, frames: int, scale: float, zeros: float) -> Tensor:
    """(B,U,C); a share ``zeros`` of the entries is minus infinity."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(utterances, frames, CLASSES, generator=generator)
    forbidden = torch.rand(logits.shape, generator=generator) < zeros
    forbidden[..., seed % CLASSES] = False
    return logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)


def table(log_probs: Tensor, lengths: list[int], covered: list[bool] | None = None) -> CTCTable:
    classes = token_classes({token: token + 1 for token in LABELS}, ENDS, len(EVERY))
    mask = torch.tensor([True] * len(lengths) if covered is None else covered)
    return CTCTable.of(log_probs, torch.tensor(lengths), mask, classes, OPTIONS)


def every(rows: int) -> Tensor:
    return torch.tensor([EVERY] * rows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    zeros=st.sampled_from([0.0, 0.0, 0.4]),
    data=st.data(),
)
def test_scores_are_espnets(seed: int, lengths: list[int], scale: float, zeros: float, data: Any) -> None:
    """Up to answers of more tokens than frames, which nothing but unknown tokens can continue."""
    log_probs = random_log_probs(seed, len(lengths), max(lengths) + 1, scale, zeros)
    found, truth = table(log_probs, lengths), [OneByOne(row[:n]) for row, n in zip(log_probs, lengths, strict=True)]
    rows = start(found)
    for _ in range(max(lengths) + 2):
        expected = torch.tensor([one.scores() for one in truth], dtype=torch.float64)
        torch.testing.assert_close(score(found, rows, every(len(lengths))), expected, atol=1e-6, rtol=0)
        tokens = data.draw(st.lists(st.sampled_from([*LABELS, UNKNOWN]), min_size=len(truth), max_size=len(truth)))
        rows = follow(found, rows, torch.arange(len(truth)), torch.tensor(tokens))
        for one, token in zip(truth, tokens, strict=True):
            one.follow(token)
    assert not rows.score.isnan().any() and not rows.forward.isnan().any()


def test_long_recordings_keep_their_precision() -> None:
    """Fifteen seconds, whose frames are nearly certain: probabilities far below the smallest number."""
    log_probs = random_log_probs(1, 2, 375, 12.0, 0.0)
    found, truth = table(log_probs, [375, 311]), [OneByOne(log_probs[0]), OneByOne(log_probs[1, :311])]
    rows = start(found)
    for step in range(60):
        expected = torch.tensor([one.scores() for one in truth], dtype=torch.float64)
        torch.testing.assert_close(score(found, rows, every(2)), expected, atol=1e-6, rtol=0)
        tokens = [LABELS[step % 3], LABELS[step // 2 % 3]]
        rows = follow(found, rows, torch.arange(2), torch.tensor(tokens))
        for one, token in zip(truth, tokens, strict=True):
            one.follow(token)
    assert rows.score[0] < -40 and rows.score.isfinite().all()


def walk(found: CTCTable, utterance: int, tokens: list[list[int]]) -> tuple[CTCState, Tensor]:
    """Hypotheses of one utterance, each continued from the first by ``tokens[step][row]``, and scores of ``EVERY``."""
    rows, parents = start(found), torch.full((len(tokens[0]),), utterance)
    for step in tokens:
        rows = follow(found, rows, parents, torch.tensor(step))
        parents = torch.arange(len(step))
    return rows, score(found, rows, every(len(parents)))


def test_batch_does_not_change_scores() -> None:
    lengths, tokens = [7, 40, 23], [[0, 1, 2, 0], [0, 3, 2, 1], [1, 1, 2, 0]]
    log_probs = random_log_probs(5, 3, 64, 3.0, 0.0)
    together = table(log_probs, lengths)
    for b, length in enumerate(lengths):
        rows, scores = walk(together, b, tokens)
        alone, own = walk(table(log_probs[b : b + 1, :length], [length]), 0, tokens)
        torch.testing.assert_close(scores, own, rtol=1e-13, atol=0)
        torch.testing.assert_close(rows.score, alone.score, rtol=1e-13, atol=0)
        for row in range(4):
            _, single = walk(together, b, [step[row : row + 1] for step in tokens])
            torch.testing.assert_close(scores[row : row + 1], single, rtol=1e-13, atol=0)


def test_follow_picks_parents() -> None:
    found = table(random_log_probs(6, 2, 8, 2.0, 0.0), [8, 6])
    rows = follow(found, start(found), torch.tensor([1, 0, 1]), torch.tensor([0, 2, UNKNOWN]))
    assert rows.utterance.tolist() == [1, 0, 1] and rows.last.tolist() == [1, 3, BLANK]
    scores = score(found, rows, every(3))
    again = score(found, follow(found, rows, torch.tensor([2, 0]), torch.tensor([UNKNOWN, UNKNOWN])), every(2))
    assert torch.equal(again, scores[[2, 0]])
    assert torch.equal(scores[2], score(found, start(found), every(2))[1])


def test_joint_leaves_what_it_does_not_cover() -> None:
    """One frame holds one label, so CTC forbids a second one; not where the LLM alone counts."""
    found = table(random_log_probs(7, 3, 1, 1.0, 0.0), [1, 1, 1], [True, False, True])
    rows = follow(found, start(found), torch.arange(3), torch.tensor([0, 0, 1]))
    values = torch.tensor([[-1.0, -2.0, -3.0, -torch.inf, -4.0, -5.0]] * 3)
    mixed = joint(found, rows, every(3), values)
    assert torch.equal(mixed[1], values[1].double())
    ctc = score(found, rows, every(3))
    assert (ctc[:, LABELS] == -torch.inf).all()
    for row in (0, 2):
        assert (mixed[row, [*LABELS, UNKNOWN]] == -torch.inf).all()
        torch.testing.assert_close(mixed[row, ENDS], 0.7 * values[row, ENDS].double() + 0.3 * ctc[row, ENDS])


class OnDevice(TorchDispatchMode):
    """Fails where the host reads a tensor, or where a shape depends on what is in one: no graph holds that."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        forbidden = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        has_mask = func.overloadpacket is torch.ops.aten.index and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if has_mask or (forbidden & set(func.tags) and func.overloadpacket is not torch.ops.aten.index):
            raise AssertionError(f"{func} needs the host")
        return func(*args, **(kwargs or {}))


def test_host_reads_nothing() -> None:
    found = table(random_log_probs(8, 2, 11, 1.0, 0.0), [11, 5])
    with OnDevice() as mode:
        rows = start(found)
        rows = follow(found, rows, torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long))
        values = joint(found, rows, torch.ones(6, 5, dtype=torch.long), torch.zeros(6, 5))
    assert mode.count > 50 and values.shape == (6, 5)
    for read in (lambda: values[0, 0].item(), lambda: values.nonzero(), lambda: values[values > 0]):
        with OnDevice(), pytest.raises(AssertionError, match="needs the host"):
            read()
