"""The static engine against the eager one, in float32: the same n-best with every option of the search."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from random_llm import random_llm, random_prefix
from same_nbest import check_same

from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, Constraint, NoRepeatNgram
from pam_espnet.search.ctc import CTCOptions, CTCTable, token_classes
from pam_espnet.search.drafts import WholeAnswer, draft_search
from pam_espnet.search.hypothesis import BeamOptions, Hypothesis, Partial

LENGTHS = [33, 20, 64, 7, 41, 1, 90, 25]
NO_ENDS = BeamOptions(beam_size=4, nbest=4, max_new_tokens=12, eos_ids=())
RULES: list[dict[str, Any]] = [
    {"max_new_tokens": 14},
    {"max_new_tokens": 12, "early_stopping": True, "length_penalty": 0.5, "temperature": 1.7},
    {"max_new_tokens": 9, "early_stopping": "never", "min_new_tokens": 3},
    {"max_new_tokens": 12, "length_penalty": -0.5},
]


class Pair:
    """The eager and the static engine of one LLM, and tokens that it likes, so that hypotheses end."""

    def __init__(self, family: str, device: str, **options: Any) -> None:
        name = f"{'tiny' if device == 'cpu' else 'small'}-{family}"
        self.llm = random_llm(name, device, torch.float32)
        self.eager = make_engine(self.llm, graphs="off", **options)
        self.static = make_engine(self.llm, graphs="on", **options)
        assert self.static.graphs and not self.eager.graphs
        self.prefix, self.lengths = random_prefix(self.llm, LENGTHS)
        found = beam_search(self.eager, self.prefix, self.lengths, NO_ENDS)
        counted = Counter(token for nbest in found for one in nbest for token in one.tokens[1:])
        often = [token for token, _ in counted.most_common(14)]
        self.frequent = tuple(dict.fromkeys([*(nbest[0].tokens[5 + b] for b, nbest in enumerate(found[:3])), *often]))

    def inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prefix[:batch, : max(LENGTHS[:batch])], self.lengths[:batch]

    def check(self, batch: int, options: BeamOptions, engines: Any = None, **more: Any) -> list[list[Hypothesis]]:
        """Both searches; ``more`` values that are functions are called once for each of the two."""
        eager, static = engines or (self.eager, self.static)
        expected, found = (
            beam_search(one, *self.inputs(batch), options, **{k: v() if callable(v) else v for k, v in more.items()})
            for one in (eager, static)
        )
        check_same(found, expected)
        return found


@pytest.fixture(scope="module")
def qwen(device: str) -> Pair:
    return Pair("qwen2", device)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def other(request: pytest.FixtureRequest, device: str) -> Pair:
    return Pair(request.param, device)


@pytest.mark.parametrize(("beam", "batch"), [(4, 8), (1, 8), (4, 1), (4, 3), (1, 1), (1, 3)])
def test_stopping_rules_ends_and_caps(qwen: Pair, beam: int, batch: int) -> None:
    check_rules(qwen, beam, batch)


@pytest.mark.parametrize(("beam", "batch"), [(4, 8), (1, 3)])
def test_other_families(other: Pair, beam: int, batch: int) -> None:
    check_rules(other, beam, batch)


def check_rules(pair: Pair, beam: int, batch: int) -> None:
    """All stopping rules, with and without length caps."""
    ended = 0
    for rule, caps in itertools.product(RULES, (None, [4 + 3 * (b % 5) for b in range(batch)])):
        options = BeamOptions(beam_size=beam, nbest=beam, eos_ids=pair.frequent[:2], **rule)
        found = pair.check(batch, options, max_new_tokens=caps)
        ended += sum(one.ended for nbest in found for one in nbest)
    assert ended > 0 or batch < 8


def test_number_of_end_tokens(qwen: Pair) -> None:
    for ends in ((), qwen.frequent[:1], qwen.frequent[:5]):
        options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=10, eos_ids=ends)
        assert any(one.ended for nbest in qwen.check(3, options) for one in nbest) == bool(ends)


@pytest.mark.parametrize("beam", [4, 1])
def test_constraints(qwen: Pair, beam: int) -> None:
    """An n-gram guard on some utterances, an answer set on others; they fire equally often."""
    ends = qwen.frequent[:2]
    answers = [qwen.frequent[2:4], qwen.frequent[2:3], qwen.frequent[5:9], [9, 11]]
    made: list[list[Constraint]] = []

    def constraints() -> list[Constraint]:
        made.append([NoRepeatNgram(1, {0, 2, 5}), AnswerSet(answers, ends, {1, 3, 4})])
        return made[-1]

    options = BeamOptions(beam_size=beam, nbest=beam, max_new_tokens=11, eos_ids=ends)
    found = qwen.check(8, options, constraints=constraints)
    assert [one.fired for one in made[0]] == [one.fired for one in made[1]] and all(one.fired for one in made[0])
    assert all(len(set(one.tokens)) == len(one.tokens) for one in found[0])
    assert all(tuple(one.answer) in set(map(tuple, answers)) for one in found[1])


def test_task_vocabulary(device: str) -> None:
    pair = Pair("qwen2", device, vocabulary=range(0, 400, 3))
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=10, eos_ids=pair.frequent[:2])
    pair.check(8, options)
    assert pair.static.ids is not None and len(pair.static.ids) < 140


@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_ctc_in_the_beam(qwen: Pair, weight: float) -> None:
    generator = torch.Generator().manual_seed(4)
    known, ends = qwen.frequent[3:12], qwen.frequent[:2]
    scores = torch.randn(8, 18, 1 + len(known), generator=generator).log_softmax(-1).to(qwen.prefix.device)
    frames = torch.arange(4, 20, 2)
    covered = torch.tensor([True, True, False, True, False, True, False, True])
    classes = token_classes({token: n for n, token in enumerate(known, 1)}, ends, qwen.llm.vocab_size)
    table = CTCTable.of(scores, frames, covered, classes, CTCOptions(weight, 20))
    for beam in (4, 1):
        options = BeamOptions(beam_size=beam, nbest=beam, max_new_tokens=10, eos_ids=ends)
        qwen.check(8, options, ctc=table, constraints=lambda: [NoRepeatNgram(2)])


@pytest.mark.parametrize("kind", ["right", "wrong", "half"])
def test_drafts(qwen: Pair, kind: str) -> None:
    options = BeamOptions(beam_size=1, max_new_tokens=14, eos_ids=qwen.frequent[:2])
    expected = beam_search(qwen.eager, *qwen.inputs(8), options)
    drafts: list[WholeAnswer | None] = []
    for b, (best,) in enumerate(expected):
        right, wrong = best.answer, [5, 6, 7, 8]
        draft = {"right": right, "wrong": wrong, "half": [*right[: len(right) // 2], *wrong]}[kind]
        drafts.append(None if b == 2 else WholeAnswer(draft))
    found, counts = draft_search(qwen.static, *qwen.inputs(8), options, drafts, 6)
    check_same(found, expected)
    passes = sum(count.passes for count in counts)
    assert (passes < sum(len(one.tokens) for (one,) in expected)) == (kind != "wrong")


def exits(device: str, engine: Engine, folder: Path) -> list[ExitOptions]:
    """Every mode; thresholds between what this LLM's surest and least sure tokens reach."""
    blocks, width = engine.llm.num_layers, engine.llm.width
    layers = tuple(range(1, blocks))
    generator = torch.Generator().manual_seed(7)
    maps = torch.eye(width + 1, width) + 0.02 * torch.randn(len(layers), width + 1, width, generator=generator)
    gates = 3 * width**-0.5 * torch.randn(len(layers), width + 1, generator=generator)
    file = folder / "exit.safetensors"
    Calibration(layers, maps, gates, 0.8).save(file, {})
    return [
        ExitOptions("fixed", (blocks - 1,)),
        ExitOptions("fixed", (1,)),
        ExitOptions("confidence", layers, threshold=0.35),
        ExitOptions("entropy", layers, threshold=0.5),
        ExitOptions("patience", layers, patience=2),
        ExitOptions("gate", calibration=str(file)),
        ExitOptions("confidence", layers, threshold=0.35, calibration=str(file)),
    ]


@pytest.mark.parametrize("kind", range(7))
def test_early_exit(qwen: Pair, device: str, tmp_path: Path, kind: int) -> None:
    chosen = exits(device, qwen.eager, tmp_path)[kind]
    engines = qwen.eager.with_exits(chosen), qwen.static.with_exits(chosen)
    assert engines[1].graphs
    depths: Counter[int] = Counter()
    for beam, batch in ((4, 8), (1, 3)):
        options = BeamOptions(beam_size=beam, nbest=beam, max_new_tokens=10, eos_ids=qwen.frequent[:2])
        found = qwen.check(batch, options, engines)
        depths.update(depth for nbest in found for one in nbest for depth in one.depths[1:])
    assert len(depths) > 1 or chosen.mode == "fixed", depths
    assert min(depths) < qwen.eager.llm.num_layers


def test_answer_probabilities(qwen: Pair) -> None:
    answers = [qwen.frequent[2:4], qwen.frequent[2:3], [9, 11, 30, 4, 5]]
    expected, found = (answer_log_probs(engine, *qwen.inputs(8), answers, 1.3) for engine in (qwen.eager, qwen.static))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_partial_results(qwen: Pair) -> None:
    """The same number of steps, and at each the same best hypothesis."""
    shown: list[list[list[Partial]]] = [[], []]
    options = BeamOptions(beam_size=4, max_new_tokens=9, eos_ids=qwen.frequent[:2])
    for engine, steps in zip((qwen.eager, qwen.static), shown, strict=True):
        beam_search(engine, *qwen.inputs(3), options, [9, 2, 7], on_partial=steps.append)
    assert [[(one.utterance, one.done) for one in step] for step in shown[0]] == [
        [(one.utterance, one.done) for one in step] for step in shown[1]
    ]
    best = [[[one.hypothesis] for step in steps for one in step] for steps in shown]
    check_same(best[1], best[0])


def test_buffers_are_used_again(qwen: Pair) -> None:
    """Other utterances in the same buffers, longer and shorter than those before them."""
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=12, eos_ids=qwen.frequent[:2])
    for seed, lengths in enumerate(([60, 3, 5], [2, 61, 9], [12, 1, 1], [64, 64, 64])):
        inputs = random_prefix(qwen.llm, lengths, seed=10 + seed)
        check_same(beam_search(qwen.static, *inputs, options), beam_search(qwen.eager, *inputs, options))


def test_a_beam_as_wide_as_the_vocabulary_allows(device: str) -> None:
    """Fewer tokens than candidates: what cannot run in fixed buffers must still be right."""
    pair = Pair("llama", device, vocabulary=[3, 5, 8, 13])
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=5, eos_ids=(0,))
    pair.check(3, options)
