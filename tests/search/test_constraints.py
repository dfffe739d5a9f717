"""Constraints and task vocabularies against transformers' logits processors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference_search import EOS, LENGTHS, generate, make_prefix, search
from torch import Tensor

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.constraints import AnswerSet, NoRepeatNgram
from pam_espnet.search.hypothesis import BeamOptions

ROWS = list(range(len(LENGTHS)))


@pytest.fixture(scope="module")
def engine(tiny_llm_dir: Path) -> Engine:
    return make_engine(LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval())


@pytest.fixture(scope="module")
def prefix() -> Tensor:
    return make_prefix()


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeated_ngram_equals_generate(engine: Engine, prefix: Tensor, size: int, beam_size: int) -> None:
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=12, eos_ids=EOS[:1])
    guard = NoRepeatNgram(size)
    free = search(engine, prefix, ROWS, options)
    for row, nbest in enumerate(search(engine, prefix, ROWS, options, constraints=[guard])):
        expected = generate(engine.llm, prefix[row, : LENGTHS[row]], options, no_repeat_ngram_size=size)
        assert [one.tokens for one in nbest] == [tokens for tokens, _ in expected]
        for one in nbest:
            grams = [tuple(one.tokens[at : at + size]) for at in range(len(one.tokens) - size + 1)]
            assert len(set(grams)) == len(grams)
        if free[row][0].tokens != nbest[0].tokens:
            assert guard.fired[row] > 0
    assert guard.fired.total() > 0


@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_answer_set_gives_its_answers_with_their_probabilities(
    engine: Engine, prefix: Tensor, beam_size: int
) -> None:
    answers = [[11], [11, 12], [200, 3]]
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=6, eos_ids=EOS[:1], length_penalty=0.0)
    only_here = AnswerSet(answers, EOS[:1], utterances=[0, 2, 5])
    free = search(engine, prefix, ROWS, options)
    for row, nbest in enumerate(search(engine, prefix, ROWS, options, constraints=[only_here])):
        if row not in (0, 2, 5):
            assert [one.tokens for one in nbest] == [one.tokens for one in free[row]]
            continue
        assert only_here.fired[row] > 0
        assert nbest and all(one.ended and one.answer in answers for one in nbest)
        for one in nbest:  # the probabilities are the LLM's own
            embeds = torch.cat([prefix[row, : LENGTHS[row]], engine.llm.embed(torch.tensor(one.tokens))])[None]
            with torch.no_grad():
                log_probs = engine.llm.lm(inputs_embeds=embeds).logits[0, LENGTHS[row] - 1 : -1].log_softmax(-1)
            own = log_probs.gather(1, torch.tensor(one.tokens)[:, None]).sum().item()
            assert one.score == pytest.approx(own, abs=1e-4)
        if beam_size == 3:
            assert sorted(one.answer for one in nbest) == answers


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_task_vocabulary_equals_suppressed_tokens(engine: Engine, prefix: Tensor, beam_size: int) -> None:
    kept = sorted({*range(0, engine.llm.vocab_size, 7), *engine.llm.eos_ids})
    suppressed = sorted(set(range(engine.llm.vocab_size)) - set(kept))
    narrow = make_engine(engine.llm, kept)
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=8)
    for row, nbest in enumerate(search(narrow, prefix, ROWS, options)):
        expected = generate(
            engine.llm, prefix[row, : LENGTHS[row]], options, suppress_tokens=suppressed, renormalize_logits=True
        )
        assert [narrow.token_ids(one.tokens) for one in nbest] == [tokens for tokens, _ in expected]
        if beam_size > 1:
            assert [one.score for one in nbest] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_answers_outside_the_vocabulary_are_errors(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="not in it"):
        make_engine(engine.llm, [4, 9]).indices([4, 10])
    with pytest.raises(ConfigError, match="ids must be"):
        make_engine(engine.llm, [engine.llm.vocab_size])
    with pytest.raises(ConfigError, match="answers"):
        AnswerSet([[]], [0])
    with pytest.raises(ConfigError, match="no_repeat_ngram"):
        NoRepeatNgram(0)


def test_firing_depends_on_the_most_likely_token_before_any_constraint() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    first, second = AnswerSet([[1]], [2], utterances=[4]), NoRepeatNgram(1)
    for constraint in (first, second):
        constraint.apply(log_probs, [0, 2], [4, 5], [[], [2]])
    assert (first.fired[4], second.fired[4], second.fired[5], first.fired[5]) == (1, 0, 1, 0)
    assert torch.isinf(log_probs).tolist() == [[True, False, True], [False, False, True]]
