"""Engines on fixed buffers against eager ones: rows fork, drop and are verified; buffers grow and are freed."""

import gc
import itertools
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pam_espnet.engine.engine import Engine, _with_graphs, make_engine, self_check
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.llama import LlamaEngine
from pam_espnet.engine.static import StaticEngine
from pam_espnet.engine.static_memory import Memory, Shape
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, NoRepeatNgram
from pam_espnet.search.hypothesis import BeamOptions

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = torch.tensor([5, 70, 2])
EXITS = [
    None,
    ExitOptions("fixed", (2,)),
    ExitOptions("confidence", (1, 2), threshold=0.1),
    ExitOptions("entropy", (1, 2), threshold=0.25),
    ExitOptions("patience", (1, 2)),
]


@pytest.fixture(scope="module")
def llm(tiny_llm_dir: Path) -> LLM:
    """Random blocks of Qwen3's kind: norms of queries and keys, larger heads than the width has."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval()
    for parameter in lm.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return LLM(lm, AutoTokenizer.from_pretrained(tiny_llm_dir)).eval()


@pytest.fixture(scope="module")
def engines(llm: LLM) -> tuple[LlamaEngine, StaticEngine]:
    eager, static = make_engine(llm, graphs="off"), make_engine(llm, graphs="on")
    assert isinstance(eager, LlamaEngine) and isinstance(static, StaticEngine)
    assert static.graphs and not eager.graphs
    return eager, static


def prefixes(lengths: Tensor, seed: int = 1) -> Tensor:
    """(B,P,D), poisoned behind each utterance's own length."""
    batch = torch.randn(len(lengths), int(lengths.max()), 32, generator=torch.Generator().manual_seed(seed))
    for b, length in enumerate(lengths.tolist()):
        batch[b, length:] = 1e4
    return batch


def test_forks_drops_and_growth_give_the_eager_logits(engines: tuple[Engine, Engine]) -> None:
    (found, static), (expected, eager) = (engine.prefill(prefixes(LENGTHS), LENGTHS) for engine in engines[::-1])
    assert torch.allclose(found, expected, atol=1e-4)
    first = static.memory
    # one row of each becomes several, more than there is room for; utterances are dropped
    steps = [[0, 0, 1, 2, 2, 2], [1, 0, 2, 2, 5, 3], [0, 0, 4, 4], [3] * 6 + [0], *[list(range(7))] * 70, [6, 0], [1]]
    for rows in steps:
        tokens = torch.arange(len(rows)) * 7 + len(rows)
        for state in (static, eager):
            state.select(rows)
        both = [engine.step(tokens, state) for engine, state in zip(engines, (eager, static), strict=True)]
        assert torch.allclose(*both, atol=1e-4)
        assert list(static.depths) == list(eager.depths)
    assert static.memory.shape.rows > first.shape.rows and static.memory.shape.slots > first.shape.slots


def test_drafts_are_verified(engines: tuple[Engine, Engine]) -> None:
    drafts = [[3, 4, 5], [], [9]]
    (found, static), (expected, eager) = (
        engine.prefill(prefixes(LENGTHS), LENGTHS, drafts) for engine in engines[::-1]
    )
    assert torch.allclose(found, expected, atol=1e-4) and len(found) == 3 + 4
    for rows, chains in (([1, 4, 6], [[7], [8, 9, 10, 11], [12, 13]]), ([0, 2, 6], [[1, 2], [3], [4, 5, 6]])):
        tokens = torch.tensor(list(itertools.chain(*chains)))
        both = []
        for engine, state in zip(engines, (eager, static), strict=True):
            state.select(rows)
            both.append(engine.verify(tokens, [len(chain) for chain in chains], state))
        assert torch.allclose(*both, atol=1e-4)
    static.select([0, 1])
    with pytest.raises(ValueError, match="one row of each"):
        engines[1].verify(torch.tensor([1, 2]), [1, 1], static)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_searches_find_what_the_eager_way_finds(engines: tuple[Engine, Engine], data: st.DataObject) -> None:
    exits = data.draw(st.sampled_from(EXITS), "exits")
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6), "lengths"))
    beam_size, most = data.draw(st.integers(1, 6), "beam_size"), data.draw(st.integers(1, 20), "max_new_tokens")
    ends = tuple(data.draw(st.sets(st.integers(0, 299), max_size=40), "ends"))
    options = BeamOptions(
        beam_size=beam_size, nbest=beam_size, max_new_tokens=most, eos_ids=ends,
        min_new_tokens=data.draw(st.integers(0, most), "min_new_tokens"),
        length_penalty=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]), "length_penalty"),
        early_stopping=data.draw(st.sampled_from([True, False, "never"]), "early_stopping"),
        temperature=data.draw(st.sampled_from([0.7, 1.0, 1.6]), "temperature"),
    )  # fmt: skip
    caps = data.draw(st.none() | st.lists(st.integers(1, 30), min_size=len(lengths), max_size=len(lengths)), "caps")
    kinds = data.draw(st.sets(st.sampled_from(["ngram", "set"])), "constraints")
    batch, found = prefixes(lengths, seed=int(lengths.sum())), []
    for engine in engines:
        constraints: list[Any] = [NoRepeatNgram(2)] if "ngram" in kinds else []
        constraints += [AnswerSet([[5], [6, 7], [6, 8, 9]], ends or [4], [0])] if "set" in kinds else []
        partials: list[Any] = []
        nbest = beam_search(
            engine if exits is None else engine.with_exits(exits), batch, lengths, options, caps,
            partials.append, constraints,
        )  # fmt: skip
        steps = [[(one.utterance, one.hypothesis.tokens, one.done) for one in step] for step in partials]
        found.append((nbest, steps, [one.fired for one in constraints]))
    (expected, *others), (nbest, *same) = found
    assert same == others
    for one, two in zip(nbest, expected, strict=True):
        for name in ("tokens", "ended", "depths"):
            assert [getattr(x, name) for x in one] == [getattr(x, name) for x in two]
        for x, y in zip(one, two, strict=True):
            assert x.log_probs == pytest.approx(y.log_probs, abs=1e-4) and x.score == pytest.approx(y.score, abs=1e-3)


def test_buffers_are_reused_bounded_and_freed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llm, graphs="on")
    assert isinstance(engine, StaticEngine)
    made: list[Shape] = []
    new = engine._new_memory
    monkeypatch.setattr(engine, "_new_memory", lambda shape: made.append(shape) or new(shape))
    options = BeamOptions(beam_size=2, max_new_tokens=5)

    def search(*lengths: int) -> None:
        beam_search(engine, prefixes(torch.tensor(lengths)), torch.tensor(lengths), options)

    search(5, 7)
    search(60, 2)  # another batch of the same shape
    assert len(made) == 1 and len(engine._memories) == 1
    monkeypatch.setattr(engine, "_most_kept", next(iter(engine._memories.values())).nbytes)
    search(5, 90)
    search(5, 150)
    search(5, 90)
    assert len(made) >= 3 and len(engine._memories) <= 2
    engine.release()
    assert not engine._memories


def test_released_buffers_are_freed_without_a_garbage_collection(llm: LLM) -> None:
    """Also where gates end steps: graphs that hold each other would keep keys and values until some later time."""
    engine = make_engine(llm, graphs="on")
    assert isinstance(engine, StaticEngine)
    engine._graphs.capture = lambda function: lambda keeps=function: keeps()  # type: ignore[method-assign]
    options = BeamOptions(beam_size=2, max_new_tokens=5)
    for exits in EXITS:
        own = engine if exits is None else engine.with_exits(exits)
        beam_search(own, prefixes(LENGTHS), LENGTHS, options)
    kept = weakref.ref(next(iter(engine._memories.values())).keys)
    gc.disable()
    try:
        engine.release()
        assert kept() is None
    finally:
        gc.enable()


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 3000), st.integers(1, 2000))
def test_shapes_hold_what_is_asked_with_little_more(utterances: int, rows: int, prefix: int, steps: int) -> None:
    shape = Shape.holding(utterances, rows, prefix, steps)
    assert shape.rows == rows and shape.prefix % 64 == shape.slots % 64 == 0
    assert utterances <= shape.utterances < max(utterances + 1, 1.25 * utterances)
    assert prefix <= shape.prefix < max(prefix + 64, 1.25 * prefix)
    assert steps <= shape.steps < max(steps + 16, 1.25 * steps)


def test_longest_prefixes_are_run_in_several_passes(engines: tuple[Engine, StaticEngine]) -> None:
    eager, static = engines
    expected, _ = eager.prefill(prefixes(LENGTHS), LENGTHS)
    for rows in (1, 256):
        static.prefix_rows = rows
        static.release()
        try:
            found, _ = static.prefill(prefixes(LENGTHS), LENGTHS)
        finally:
            static.prefix_rows = 8192
        assert torch.allclose(found, expected, atol=1e-4)


def test_what_is_captured_can_run_ahead_and_be_undone(engines: tuple[Engine, StaticEngine]) -> None:
    """A capture runs a step a few times: what it does to rows must not be seen afterwards."""
    _, static = engines
    memory: Memory = static.memory(Shape.holding(2, 2, 5, 3))
    static.load(memory, prefixes(LENGTHS[:1]), [5])
    static.run_prefix(memory, 1)
    names = ("used", "next", "visible", "parents", "tokens", "finished", "depths")
    before = [getattr(memory, name).clone() for name in names]
    with memory.kept():
        for _ in range(20):  # more than there are slots for
            static.run_rows(memory, chained=False)
    assert all(torch.equal(getattr(memory, name), kept) for name, kept in zip(names, before, strict=True))


def test_blocks_that_compute_otherwise_are_left_to_the_eager_way(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert self_check(make_engine(llm, graphs="on"), make_engine(llm, graphs="off")) < 1e-5
    eager = make_engine(llm, graphs="off")
    assert isinstance(eager, LlamaEngine)

    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel for this card")

    def wrong(self: StaticEngine, *_: Any) -> Tensor:
        return torch.zeros(1, self.vocabulary)

    for function, why in ((wrong, "logits differ by"), (broken, "RuntimeError: no kernel for this card")):
        monkeypatch.setattr(StaticEngine, "run_rows", function)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert _with_graphs(eager, wanted=False, batch_invariant=True) is eager
        assert len(caplog.records) == 1 and why in caplog.text
        with pytest.raises(ConfigError, match="graphs: on: not possible here") as refused:
            make_engine(llm, graphs="on")
        assert why in str(refused.value)

    def full(*_: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(StaticEngine, "run_rows", full)
    with pytest.raises(RuntimeError, match="out of memory"):  # no reason to be slower for good
        _with_graphs(eager, wanted=False, batch_invariant=True)


def test_graphs_are_off_on_a_cpu_and_refused_where_they_cannot_be(llm: LLM, tiny_llm_dir: Path) -> None:
    assert not make_engine(llm).graphs
    with pytest.raises(ConfigError, match="graphs: on: int8"):
        make_engine(llm, int8=True, graphs="on")
    slow = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=False)
    with pytest.raises(ConfigError, match="transformers must run LlamaForCausalLM"):
        make_engine(slow, graphs="on")
