"""Beam search against transformers' ``generate``, and the promise that neighbours do not matter."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_search import EOS, LENGTHS, generate, make_prefix, search
from torch import Tensor

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.llama import LlamaEngine
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions, Hypothesis, Partial


@pytest.fixture(scope="module", params=["fused", "static", "transformers"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
    fused, graphs = request.param != "transformers", "on" if request.param == "static" else "off"
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=fused).eval()
    return make_engine(llm, graphs=graphs)


@pytest.fixture(scope="module")
def prefix() -> Tensor:
    return make_prefix()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("beam_size", [1, 2, 4, 8])
def test_equals_generate(engine: Engine, prefix: Tensor, beam_size: int, early_stopping: bool | str) -> None:
    ended = 0
    for length_penalty, eos, least in ((1.0, EOS, 0), (0.0, EOS[:1], 0), (2.0, EOS[1:2], 3), (-0.5, EOS[:2], 2)):
        options = BeamOptions(
            beam_size=beam_size,
            nbest=beam_size,
            max_new_tokens=11,
            min_new_tokens=least,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_ids=eos,
        )
        found = search(engine, prefix, list(range(len(LENGTHS))), options)
        for row, nbest in enumerate(found):
            expected = generate(engine.llm, prefix[row, : LENGTHS[row]], options)
            assert [one.tokens for one in nbest] == [tokens for tokens, _ in expected]
            assert [one.score for one in nbest] == pytest.approx([score for _, score in expected], abs=1e-4)
            ended += sum(one.ended for one in nbest)
    assert ended > 0


def test_hypotheses_explain_their_scores(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=9, length_penalty=0.6, eos_ids=EOS)
    for row, nbest in enumerate(search(engine, prefix, [0, 1, 2], options)):
        assert [one.score for one in nbest] == sorted((one.score for one in nbest), reverse=True)
        for one in nbest:
            assert one.ended == (one.tokens[-1] in EOS)
            assert one.answer == (one.tokens[:-1] if one.ended else one.tokens)
            embeds = torch.cat([prefix[row, : LENGTHS[row]], engine.llm.embed(torch.tensor(one.tokens))])[None]
            with torch.no_grad():
                log_probs = engine.llm.lm(inputs_embeds=embeds).logits[0, LENGTHS[row] - 1 : -1].log_softmax(-1)
            own = log_probs.gather(1, torch.tensor(one.tokens)[:, None])[:, 0].tolist()
            assert one.log_probs == pytest.approx(own, abs=1e-4)
            assert one.score == pytest.approx(sum(own) / len(own) ** 0.6, abs=1e-4)


@pytest.mark.parametrize("size", [1, 8, 32])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([1, 4]))
def test_batch_does_not_change_nbest(
    engine: Engine, prefix: Tensor, size: int, data: st.DataObject, beam_size: int
) -> None:
    """Any utterances, any number of them, in any order, repeated too: the same n-best as alone."""
    rows = data.draw(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=size, max_size=size))
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=8, eos_ids=EOS)
    alone = {row: search(engine, prefix, [row], options)[0] for row in set(rows)}
    for row, nbest in zip(rows, search(engine, prefix, rows, options), strict=True):
        assert [one.tokens for one in nbest] == [one.tokens for one in alone[row]]
        assert [one.score for one in nbest] == pytest.approx([one.score for one in alone[row]], abs=1e-5)


def test_the_prefix_is_run_once_and_finished_utterances_are_dropped(
    engine: Engine, prefix: Tensor, rows_run: list[list[int]]
) -> None:
    engine = make_engine(engine.llm, graphs="off")  # fixed buffers keep finished utterances
    seen: list[int] = []  # positions of each forward pass of transformers
    rows_run.clear()
    hook = engine.llm.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    active: list[int] = []  # after each step
    try:
        options = BeamOptions(beam_size=4, max_new_tokens=10, eos_ids=EOS)
        search(
            engine, prefix, list(range(6)), options, max_new_tokens=[1, 2, 10, 3, 10, 99],
            on_partial=lambda partials: active.append(sum(not one.done for one in partials)),
        )  # fmt: skip
    finally:
        hook.remove()
    assert active == sorted(active, reverse=True) and active[0] == 5 and active[-1] == 0 and len(active) <= 10
    new = [4 * count for count in active if count]  # one position per hypothesis and step
    if isinstance(engine, LlamaEngine):  # and of a prefix nothing but its last position through the last block
        assert not seen and rows_run == [[sum(LENGTHS), *new], [len(LENGTHS), *new]]
    else:  # transformers computes padding too
        assert not rows_run and seen == [len(LENGTHS) * max(LENGTHS), *new]


def test_cost_grows_linearly_with_utterances(tiny_llm_dir: Path, prefix: Tensor, rows_run: list[list[int]]) -> None:
    engine = make_engine(LLM.from_pretrained(str(tiny_llm_dir), dtype="float32").eval())
    options = BeamOptions(beam_size=4, max_new_tokens=10, eos_ids=())
    totals = []
    for utterances in (1, 3, 12):
        rows_run.clear()
        search(engine, prefix, [1] * utterances, options)
        totals.append([sum(counts) for counts in rows_run])
    assert totals == [[times * (LENGTHS[1] + 9 * 4), times * (1 + 9 * 4)] for times in (1, 3, 12)]


def test_partial_results_grow_to_the_answer(engine: Engine, prefix: Tensor) -> None:
    steps: list[list[Partial]] = []
    options = BeamOptions(beam_size=3, max_new_tokens=9, eos_ids=EOS)
    rows = [3, 0, 5]
    found = search(engine, prefix, rows, options, max_new_tokens=[9, 2, 9], on_partial=steps.append)
    assert found == search(engine, prefix, rows, options, max_new_tokens=[9, 2, 9])
    assert [one.utterance for one in steps[0]] == [0, 1, 2]
    for utterance, (best,) in enumerate(found):
        own = [one for partials in steps for one in partials if one.utterance == utterance]
        assert [one.done for one in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].hypothesis == best
        for length, one in enumerate(own[:-1], 1):
            assert len(one.hypothesis.tokens) == length and not one.hypothesis.ended
            assert one.hypothesis.score == pytest.approx(sum(one.hypothesis.log_probs))


def test_length_caps_are_per_utterance(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=2, nbest=2, max_new_tokens=6, eos_ids=())
    found = search(engine, prefix, [0, 1, 2], options, max_new_tokens=torch.tensor([1, 4, 9]))
    assert [[len(one.tokens) for one in nbest] for nbest in found] == [[1, 1], [4, 4], [6, 6]]
    assert not any(one.ended for nbest in found for one in nbest)
    for row, cap in ((0, 1), (1, 4)):
        own = BeamOptions(beam_size=2, nbest=2, max_new_tokens=cap, eos_ids=())
        (alone,) = search(engine, prefix, [row], own)
        assert [one.tokens for one in alone] == [one.tokens for one in found[row]]


def test_temperature_flattens(engine: Engine, prefix: Tensor) -> None:
    scores = [
        search(engine, prefix, [1], BeamOptions(beam_size=2, max_new_tokens=4, temperature=temperature))[0][0].score
        for temperature in (0.5, 1.0, 4.0)
    ]
    assert scores == sorted(scores, reverse=True)


class TableEngine:
    """Next-token probabilities from a table of the last token; the prefix's first value is the first "last token"."""

    eos_ids = (0,)

    def __init__(self, table: list[list[float]]) -> None:
        self.logits = torch.tensor(table).clamp_min(1e-30).log()

    class State:
        def __init__(self, rows: int) -> None:
            self.depths = [1] * rows

        def select(self, rows: Sequence[int]) -> None:
            self.depths = [1] * len(rows)

    def prefill(self, prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        return self.logits[prefix[:, 0, 0].long()], self.State(len(prefix))

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        return self.logits[tokens]


def test_finds_the_best_of_all_sequences() -> None:
    """With a beam as wide as the space, the search is exhaustive."""
    table = [[1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.4, 0.3], [0.3, 0.5, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]]
    options = BeamOptions(beam_size=64, nbest=10, max_new_tokens=3, length_penalty=0.0, early_stopping="never")
    (nbest,) = beam_search(cast(Any, TableEngine(table)), torch.full((1, 1, 1), 3.0), torch.tensor([1]), options)
    expected: list[tuple[float, list[int]]] = []
    for tokens in itertools.chain(*(itertools.product(range(4), repeat=n) for n in (1, 2, 3))):
        if 0 in tokens[:-1] or (len(tokens) < 3 and tokens[-1] != 0):
            continue
        probability, last = 1.0, 3
        for token in tokens:
            probability, last = probability * table[last][token], token
        expected.append((probability, list(tokens)))
    expected.sort(key=lambda pair: -pair[0])
    assert sorted(one.tokens for one in nbest) == sorted(tokens for _, tokens in expected[:10])
    assert [one.score for one in nbest] == pytest.approx([torch.tensor(p).log().item() for p, _ in expected[:10]])


def test_impossible_tokens_never_appear() -> None:
    """A vocabulary smaller than the beam: fewer hypotheses, none of probability zero twice."""
    engine = TableEngine([[1.0, 0.0], [0.5, 0.5]])
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=2, min_new_tokens=1)
    (nbest,) = beam_search(cast(Any, engine), torch.ones(1, 1, 1), torch.tensor([1]), options)
    assert sorted(one.tokens for one in nbest) == [[1, 0], [1, 1]]


def test_empty_batch(engine: Engine) -> None:
    assert beam_search(engine, torch.zeros(0, 3, 32), torch.zeros(0, dtype=torch.long), BeamOptions()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size"),
        ({"nbest": 5}, "nbest"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 200}, "min_new_tokens"),
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"beam_size": True}, "beam_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"length_penalty": None}, "length_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeamOptions(**options)


def test_hypothesis_defaults() -> None:
    assert Hypothesis().tokens == [] and Hypothesis([5, 2], ended=True).answer == [5]
