"""Drafts change how often the LLM is run, and nothing else: against the beam search with one hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_search import LENGTHS, make_prefix, search
from torch import Tensor

from pam_espnet.engine.blocks import FusedLlama
from pam_espnet.engine.view import DecoderView
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLMDecoder
from pam_espnet.search.constraints import AnswerSet, Constraint, NoRepeatNgram
from pam_espnet.search.drafters import DraftOptions, NoDraft, WholeAnswer
from pam_espnet.search.drafting import DraftCount, Drafter, draft_search
from pam_espnet.search.hypothesis import Hypothesis
from pam_espnet.search.options import BeamOptions

ROWS = list(range(len(LENGTHS)))
Edits = list[tuple[int, str, int]]  # place, what is done there, a token


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def decoder(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> LLMDecoder:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    known = AutoConfig.from_pretrained(tiny_llm_dir)
    torch.manual_seed(5)
    if request.param == "llama":
        lm: Any = LlamaForCausalLM(known)
    else:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        lm = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(known, name) for name in names}, num_hidden_layers=3))
    for parameter in lm.parameters():
        parameter.data = parameter.data + 0.15 * torch.randn_like(parameter)
    return LLMDecoder(lm.float().eval(), AutoTokenizer.from_pretrained(tiny_llm_dir)).eval()


@pytest.fixture(scope="module")
def prefix() -> Tensor:
    return make_prefix()


def drafted(
    view: DecoderView, prefix: Tensor, rows: list[int], options: BeamOptions, drafters: Sequence[Drafter], **more: Any
) -> tuple[list[list[Hypothesis]], list[DraftCount]]:
    """``reference_search.search`` with drafts: what lies behind an utterance's own length is poisoned."""
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    batch = prefix[rows, : int(lengths.max())].clone()
    for b, length in enumerate(lengths.tolist()):
        batch[b, length:] = 1e4
    return draft_search(view, batch, lengths, options, drafters, more.pop("most", 64), **more)


def same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [(one.tokens, one.ended, one.depths) for one in ours] == [
            (one.tokens, one.ended, one.depths) for one in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def edited(answer: list[int], edits: Edits) -> list[int]:
    """A draft that is wrong in places: substituted, inserted, deleted tokens, its end cut off, or nothing left."""
    draft = list(answer)
    for place, what, token in edits:
        at = place % (len(draft) + 1)
        if what == "cut":
            del draft[at:]
        elif what == "insert":
            draft.insert(at, token)
        elif at < len(draft):
            draft[at : at + 1] = [token] if what == "substitute" else []
    return draft


def greedy_ends(decoder: LLMDecoder, prefix: Tensor, **more: Any) -> tuple[int, ...]:
    """End tokens that the random LLM says early, late and never: taken from where its answers lead without one."""
    free = BeamOptions(beam_size=1, max_new_tokens=12, eos_ids=(), **more)
    answers = [one.tokens for (one,) in search(DecoderView(decoder), prefix, ROWS, free)]
    return answers[1][7], answers[4][4]


EDITS = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["substitute", "insert", "delete", "cut"]), st.integers(0, 255)),
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    utterances=st.lists(st.tuples(st.integers(0, len(LENGTHS) - 1), EDITS, st.integers(1, 16)), min_size=1, max_size=8),
    temperature=st.sampled_from([1.0, 0.5]),
    least=st.sampled_from([0, 3, 9]),
    most=st.sampled_from([1, 3, 64]),
    constrained=st.booleans(),
    with_prefix=st.booleans(),
)
def test_any_draft_gives_the_answer_of_greedy_search(
    decoder: LLMDecoder,
    prefix: Tensor,
    utterances: list[tuple[int, Edits, int]],
    temperature: float,
    least: int,
    most: int,
    constrained: bool,
    with_prefix: bool,
) -> None:
    """Right, wrong, empty and too long drafts; every utterance its own, in batches of any composition."""
    view = DecoderView(decoder)
    options = BeamOptions(
        beam_size=1, max_new_tokens=14, min_new_tokens=least, temperature=temperature, length_penalty=0.7,
        eos_ids=greedy_ends(decoder, prefix),
    )  # fmt: skip
    rows = [row for row, _, _ in utterances]
    caps = [cap for _, _, cap in utterances]

    def constraints() -> list[Constraint]:
        some = [place for place in range(len(rows)) if place % 2]
        return [NoRepeatNgram(2, some), NoRepeatNgram(1)] if constrained else []

    ours, theirs = constraints(), constraints()
    expected = search(view, prefix, rows, options, max_new_tokens=caps, constraints=theirs)
    drafts = [edited(one.tokens, edits) for (one,), (_, edits, _) in zip(expected, utterances, strict=True)]
    whole = WholeAnswer(drafts, "whole")
    found, counts = drafted(
        view, prefix, rows, options, [whole] * len(rows), most=most, max_new_tokens=caps, constraints=ours,
        with_prefix=with_prefix,
    )  # fmt: skip
    same(found, expected)
    assert [one.fired for one in ours] == [one.fired for one in theirs]
    for count, (one,) in zip(counts, found, strict=True):
        assert 0 <= count.accepted <= count.proposed and count.accepted + count.passes == len(one.tokens)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_forward_passes(
    decoder: LLMDecoder, prefix: Tensor, monkeypatch: pytest.MonkeyPatch, with_prefix: bool
) -> None:
    """A right draft is read with the prefix and costs no step; one wrong token costs one."""
    view, row = DecoderView(decoder), 3
    options = BeamOptions(beam_size=1, max_new_tokens=12, eos_ids=greedy_ends(decoder, prefix))
    (expected,) = search(view, prefix, [row], options)
    tokens, size = expected[0].tokens, LENGTHS[row]
    wrong = [*tokens[:3], (tokens[3] + 1) % 256, *tokens[4:]]
    seen: list[int] = []  # positions of each pass
    project = FusedLlama.project

    def count(model: FusedLlama, index: int, x: Tensor, rotary: Any) -> Any:
        if index == 0:
            seen.append(len(x))
        return project(model, index, x, rotary)

    monkeypatch.setattr(FusedLlama, "project", count)
    read = len(tokens) - 1  # the last token, at an end or the cap, is never read
    expectations = {
        tuple(tokens): ([size + read], [size, read]),
        tuple(wrong): ([size + read, 1 + read - 4], [size, read, 1 + read - 4]),
        (): ([size] + [1] * read, [size] + [1] * read),
    }
    for draft, (together, apart) in expectations.items():
        seen.clear()
        found, counts = drafted(
            view, prefix, [row], options, [WholeAnswer([draft], "whole")], with_prefix=with_prefix
        )
        same(found, [expected])
        assert seen == (together if with_prefix else apart)
        assert counts[0].passes == len(seen)


def test_finished_utterances_leave(decoder: LLMDecoder, prefix: Tensor) -> None:
    view = DecoderView(decoder)
    options = BeamOptions(beam_size=1, max_new_tokens=9, eos_ids=())
    expected = search(view, prefix, ROWS, options)
    drafts = [one.tokens if row % 2 else [] for row, (one,) in enumerate(expected)]
    active: list[int] = []  # after each pass
    found, counts = drafted(
        view, prefix, ROWS, options, [WholeAnswer(drafts, "whole")] * len(ROWS),
        on_partial=lambda partials: active.append(sum(not one.done for one in partials)),
    )  # fmt: skip
    same(found, expected)
    assert active == [3] * 8 + [0]
    assert [count.passes for count in counts] == [9, 1] * 3
    assert [count.accepted for count in counts] == [0, 8] * 3


def test_drafters_of_a_batch_differ(decoder: LLMDecoder, prefix: Tensor) -> None:
    view = DecoderView(decoder)
    options = BeamOptions(beam_size=1, max_new_tokens=30, eos_ids=greedy_ends(decoder, prefix))
    expected = search(view, prefix, ROWS, options)
    drafters = [NoDraft(), WholeAnswer([[1, 2, 3]] * len(ROWS), "odd")] * 3
    found, counts = drafted(view, prefix, ROWS, options, drafters)
    same(found, expected)
    assert [count.drafter for count in counts] == ["none", "odd"] * 3
    assert counts[0].proposed == 0 and counts[0].passes == len(expected[0][0].tokens)


def test_answer_sets(decoder: LLMDecoder, prefix: Tensor) -> None:
    view = DecoderView(decoder)
    options = BeamOptions(beam_size=1, max_new_tokens=6)
    answers = [[9, 8, 7], [9, 8, 6], [5]]

    def only() -> list[Constraint]:
        return [AnswerSet(answers, view.eos_ids)]

    expected = search(view, prefix, ROWS, options, constraints=only())
    drafts = [answers[row % 3] for row in ROWS]
    found, _ = drafted(view, prefix, ROWS, options, [WholeAnswer(drafts, "set")] * len(ROWS), constraints=only())
    same(found, expected)
    assert all(one.answer in answers for (one,) in found)


def test_task_vocabulary(decoder: LLMDecoder, prefix: Tensor) -> None:
    view = DecoderView(decoder, range(20, 90))
    options = BeamOptions(beam_size=1, max_new_tokens=10)
    expected = search(view, prefix, ROWS, options)
    ids = [view.tokens(one.answer) for (one,) in expected]
    assert all(20 <= token < 90 for answer in ids for token in answer)
    drafts = [view.places(answer) for answer in ids]
    found, counts = drafted(view, prefix, ROWS, options, [WholeAnswer(drafts, "whole")] * len(ROWS))
    same(found, expected)
    assert [count.passes for count in counts] == [1] * len(ROWS)
    assert view.places([5, 25], strict=False) == [-6, view.places([25])[0]]


def test_empty_batch(decoder: LLMDecoder) -> None:
    empty = torch.zeros(0, 3, 32), torch.zeros(0, dtype=torch.long)
    assert draft_search(DecoderView(decoder), *empty, BeamOptions(beam_size=1), [], 8) == ([], [])


def test_what_cannot_be(decoder: LLMDecoder, prefix: Tensor, tiny_llm_dir: Path) -> None:
    with pytest.raises(ConfigError, match="beam_size"):
        drafted(DecoderView(decoder), prefix, [0], BeamOptions(beam_size=2), [NoDraft()])
    slow = LLMDecoder.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=False)
    with pytest.raises(ConfigError, match="fused_decoding"):
        drafted(DecoderView(slow), prefix, [0], BeamOptions(beam_size=1), [NoDraft()])
    for wrong, message in (({"kind": "exit"}, "kind"), ({"most": 0}, "most"), ({"most": 2.5}, "most")):
        with pytest.raises(ConfigError, match=message):
            DraftOptions(**wrong)
