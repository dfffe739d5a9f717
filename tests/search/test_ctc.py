"""CTC beside the LLM in the search: against sums over all paths, and against sums made by hand."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_config
from torch import Tensor
from torch.nn import functional as F

from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.errors import ConfigError
from pam_espnet.frontend.ctc_head import EmbeddingCTC
from pam_espnet.llm.llm import LLM
from pam_espnet.model import build_model
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import NoRepeatNgram
from pam_espnet.search.ctc import CTCOptions, CTCTable, follow, score, start, token_classes
from pam_espnet.search.hypothesis import BeamOptions, Hypothesis

KNOWN = [40, 41, 42]
FRAMES, LENGTHS = 5, [5, 3, 4]
OPTIONS = CTCOptions(weight=0.8, candidates=1000, unknown=-2.5)


@pytest.fixture(scope="module", params=["off", "on"], ids=["eager", "static"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
    return make_engine(LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval(), graphs=request.param)


@pytest.fixture(scope="module")
def ctc() -> EmbeddingCTC:
    torch.manual_seed(3)
    return EmbeddingCTC(KNOWN, torch.randn(3, 32), temperature=0.4).eval()


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return torch.randn(3, FRAMES, 32, generator=torch.Generator().manual_seed(4))


def table(
    ctc: EmbeddingCTC,
    engine: Engine,
    frames: Tensor,
    covered: list[bool],
    options: CTCOptions = OPTIONS,
    lengths: list[int] = LENGTHS,
) -> CTCTable:
    """Of as many utterances as ``covered`` has; ``frames`` and ``lengths`` are of those that it covers."""
    whole, own = torch.zeros(len(covered), frames.size(1), 32), torch.ones(len(covered), dtype=torch.long)
    whole[torch.tensor(covered)], own[torch.tensor(covered)] = frames, torch.tensor(lengths)
    class_of = {engine.indices([token])[0]: n for n, token in enumerate(KNOWN, 1)}
    width = engine.llm.vocab_size if engine.ids is None else len(engine.ids)
    classes = token_classes(class_of, engine.eos_ids, width)
    with torch.no_grad():
        log_probs = ctc.log_probs(whole)
    return CTCTable.of(log_probs, own, torch.tensor(covered), classes, options)


def begins(ctc: EmbeddingCTC, frames: Tensor, prefix: tuple[int, ...], whole: bool) -> float:
    """Probability that the tokens in the audio begin with ``prefix`` (is it, if ``whole``), summed over all paths."""
    with torch.no_grad():
        probs = ctc.log_probs(frames[None])[0].exp()
    total = 0.0
    for path in itertools.product(range(4), repeat=len(frames)):
        path_tokens = tuple(KNOWN[one - 1] for one, _ in itertools.groupby(path) if one)
        if path_tokens == prefix or (not whole and path_tokens[: len(prefix)] == prefix):
            total += math.prod(float(probs[at, one]) for at, one in enumerate(path))
    return total


def test_scores_are_those_of_all_paths(engine: Engine, ctc: EmbeddingCTC, frames: Tensor) -> None:
    found = table(ctc, engine, frames, [True] * 3)
    own, end = frames[1, : LENGTHS[1]], engine.eos_ids[0]
    candidates = [*KNOWN, end]
    rows, prefix = start(found), ()
    for token in (41, 41, 40):  # a repeat needs a blank between, so three frames hold no more than the first two
        scores = score(found, rows, torch.tensor([candidates] * 3))[1]
        before = begins(ctc, own, prefix, whole=False)
        for one, value in zip(candidates, scores.tolist(), strict=True):
            tokens = prefix if one == end else (*prefix, one)
            expected = begins(ctc, own, tokens, whole=one == end) / before
            assert math.exp(value) == pytest.approx(expected, rel=1e-4, abs=1e-9), (prefix, one)
        rows = follow(found, rows, torch.arange(3), torch.tensor([token] * 3))
        prefix = (*prefix, token)
        if begins(ctc, own, prefix, whole=False) == 0:
            break
    assert len(prefix) == 3


def search(engine: Engine, joint: CTCTable | None, rows: list[int], beam_size: int = 3) -> list[list[Hypothesis]]:
    prefix = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(9))[rows]
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=6, length_penalty=0.0)
    constraints = [NoRepeatNgram(3)]
    return beam_search(engine, prefix, torch.tensor([6, 4, 5, 6])[rows], options, constraints=constraints, ctc=joint)


@pytest.mark.parametrize(("vocabulary", "unknown"), [(None, -2.5), (range(30, 60), -1.2)])
def test_the_search_adds_both_up(
    engine: Engine, ctc: EmbeddingCTC, frames: Tensor, vocabulary: range | None, unknown: float
) -> None:
    narrow, covered = make_engine(engine.llm, vocabulary), [0, 1, 3]  # utterance 2 is of another task
    options = replace(OPTIONS, unknown=unknown)
    found = search(narrow, table(ctc, narrow, frames, [True, True, False, True], options), [0, 1, 2, 3])
    alone = search(narrow, None, [0, 1, 2, 3])
    assert [one.tokens for one in found[2]] == [one.tokens for one in alone[2]]
    prefix = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        log_probs = ctc.log_probs(frames)
    ended = skipped = 0
    for row, b in enumerate(covered):
        for one in found[b]:
            tokens = narrow.token_ids(one.tokens)
            logits, state = engine.prefill(prefix[b : b + 1], torch.tensor([[6, 4, 5, 6][b]]))
            llm = 0.0
            for token in tokens:
                scores = logits[0] if vocabulary is None else logits[0, narrow.ids]
                at = token if vocabulary is None else narrow.ids.tolist().index(token)
                llm += float(scores.log_softmax(-1)[at])
                logits = engine.step(torch.tensor([token]), state)
            if not one.ended:
                continue
            ended += 1
            known = [KNOWN.index(token) + 1 for token in tokens[:-1] if token in KNOWN]
            skipped += len(tokens) - 1 - len(known)
            targets, length = torch.tensor([known]), torch.tensor([len(known)])
            columns = log_probs[row : row + 1, : LENGTHS[row]].transpose(0, 1)
            second = -float(F.ctc_loss(columns, targets, torch.tensor([LENGTHS[row]]), length, reduction="sum"))
            second += unknown * (len(tokens) - 1 - len(known))
            assert one.score == pytest.approx(0.2 * llm + 0.8 * second, abs=1e-3)
    assert ended >= 3 and skipped > 0


def test_batch_does_not_change_nbest(engine: Engine, ctc: EmbeddingCTC, frames: Tensor) -> None:
    together = search(engine, table(ctc, engine, frames, [True] * 3), [0, 1, 2])
    for row in range(3):
        own = table(ctc, engine, frames[row : row + 1], [True], lengths=LENGTHS[row : row + 1])
        (alone,) = search(engine, own, [row])
        assert [one.tokens for one in alone] == [one.tokens for one in together[row]]
        assert [one.score for one in alone] == pytest.approx([one.score for one in together[row]], abs=1e-5)


def test_an_answer_may_end_where_the_llm_would_not(engine: Engine, ctc: EmbeddingCTC, frames: Tensor) -> None:
    """One frame holds one token: then CTC allows nothing but the end, which may be none of the LLM's best tokens."""
    few = replace(OPTIONS, candidates=2, unknown=-100.0)
    short = table(ctc, engine, frames[:, :1], [True] * 3, few, [1, 1, 1])
    prefix = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(9))
    logits, _ = engine.prefill(prefix, torch.tensor([6, 4, 5]))
    ranks = (logits[:, list(engine.eos_ids)].amax(1, keepdim=True) < logits).sum(1)
    assert (ranks > 6).any()  # an end token that neither beam nor candidates reach
    for beam_size in (1, 2):
        for found in search(engine, short, [0, 1, 2], beam_size):
            assert found and found[0].ended and found[0].score > -torch.inf


def test_what_does_not_go_together_is_refused(tiny_llm_dir: Path) -> None:
    for options, message in (
        ({"ctc": {"weight": 1.0}}, "below 1"),
        ({"ctc": {"weight": 0.3, "candidates": 0}}, "at least 1"),
        ({"ctc": {"weight": 0.3}, "beam_size": 1, "draft": {"kind": "ctc"}}, "verifies drafts"),
        ({"ctc": {"height": 0.3}}, "height"),
    ):
        with pytest.raises(ConfigError, match=message):
            AnswerOptions.from_dict(options)
    with pytest.raises(ConfigError, match=r"ctc\.weight"):
        SpeechLLM(build_model(tiny_config(tiny_llm_dir)), AnswerOptions(ctc=CTCOptions(0.3)))
