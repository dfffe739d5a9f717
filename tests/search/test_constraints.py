"""Constraints and task vocabularies against transformers' logits processors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_search import EOS, LENGTHS, generate, make_prefix, search
from torch import Tensor

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.constraints import (
    AnswerSet,
    NoRepeatNgram,
    Rule,
    combine,
    count_fired,
    find_rules,
    forbidden,
    rule_table,
)
from pam_espnet.search.hypothesis import BeamOptions

ROWS = list(range(len(LENGTHS)))


@pytest.fixture(scope="module", params=["off", "on"], ids=["eager", "static"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
    return make_engine(LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval(), graphs=request.param)


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
    first, second = AnswerSet([[1]], [2], utterances=[4]), NoRepeatNgram(1)
    found = [find_rules([first, second], *row) for row in ((4, []), (5, [2]))]
    for rules, utterance, best in zip(found, (4, 5), (0, 2), strict=True):
        count_fired(rules, utterance, best)
    assert (first.fired[4], second.fired[4], second.fired[5], first.fired[5]) == (1, 0, 1, 0)
    mask = forbidden(rule_table([combine(rules.values()) for rules in found]), 3)
    assert mask.tolist() == [[True, False, True], [False, False, True]]


TOKENS = st.frozensets(st.integers(0, 20))
RULES = st.lists(st.builds(Rule, TOKENS, st.booleans()), max_size=4)


@given(st.lists(RULES, max_size=5), st.integers(1, 5))
def test_a_combined_rule_forbids_what_any_of_them_forbids(rows: list[list[Rule]], width: int) -> None:
    table = rule_table([combine(rules) for rules in rows], width)
    mask = forbidden(table, 21)
    assert mask.shape == (len(rows), 21)
    for rules, row in zip(rows, mask.tolist(), strict=True):
        assert row == [any(rule.forbids(token) for rule in rules) for token in range(21)]


def test_the_width_of_a_table_doubles() -> None:
    rules = [Rule(frozenset(range(9))), None, Rule(frozenset({3}), only=True)]
    assert rule_table(rules, 2).shape == (3, 1 + 16) and rule_table(rules, 12).shape == (3, 1 + 12)
    assert combine([]) is None and combine([Rule(frozenset())]) is None
