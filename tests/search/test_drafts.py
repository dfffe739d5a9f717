"""Drafts change how often the LLM is run, and nothing else: against the beam search with one hypothesis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_search import LENGTHS, make_prefix, search
from torch import Tensor

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.llama import Block
from pam_espnet.errors import ConfigError
from pam_espnet.llm.llm import LLM
from pam_espnet.search.constraints import AnswerSet, Constraint, NoRepeatNgram
from pam_espnet.search.drafts import DraftCount, DraftOptions, WholeAnswer, draft_search
from pam_espnet.search.hypothesis import BeamOptions, Hypothesis

ROWS = list(range(len(LENGTHS)))
Edits = list[tuple[int, str, int]]  # index, what is done there, a token


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen2 static"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
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
    llm = LLM(lm.float().eval(), AutoTokenizer.from_pretrained(tiny_llm_dir)).eval()
    return make_engine(llm, graphs="on" if "static" in request.param else "off")


@pytest.fixture(scope="module")
def prefix() -> Tensor:
    return make_prefix()


def drafted(
    engine: Engine,
    prefix: Tensor,
    rows: list[int],
    options: BeamOptions,
    drafts: Sequence[WholeAnswer | None],
    **more: Any,
) -> tuple[list[list[Hypothesis]], list[DraftCount]]:
    """``reference_search.search`` with drafts: what lies behind an utterance's own length is poisoned."""
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    batch = prefix[rows, : int(lengths.max())].clone()
    for b, length in enumerate(lengths.tolist()):
        batch[b, length:] = 1e4
    return draft_search(engine, batch, lengths, options, drafts, more.pop("most", 64), **more)


def whole(drafts: Sequence[Sequence[int]]) -> list[WholeAnswer | None]:
    return [WholeAnswer(draft) for draft in drafts]


def same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert [(one.tokens, one.ended, one.depths) for one in ours] == [
            (one.tokens, one.ended, one.depths) for one in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def edited(answer: list[int], edits: Edits) -> list[int]:
    """A draft with errors: substituted, inserted, deleted tokens, its end cut off, or nothing left."""
    draft = list(answer)
    for index, what, token in edits:
        at = index % (len(draft) + 1)
        if what == "cut":
            del draft[at:]
        elif what == "insert":
            draft.insert(at, token)
        elif at < len(draft):
            draft[at : at + 1] = [token] if what == "substitute" else []
    return draft


def greedy_ends(engine: Engine, prefix: Tensor, **more: Any) -> tuple[int, ...]:
    """End tokens that the random LLM predicts early, late and never: taken from where its answers lead without one."""
    free = BeamOptions(beam_size=1, max_new_tokens=12, eos_ids=(), **more)
    answers = [one.tokens for (one,) in search(engine, prefix, ROWS, free)]
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
)
def test_any_draft_gives_the_answer_of_greedy_search(
    engine: Engine,
    prefix: Tensor,
    utterances: list[tuple[int, Edits, int]],
    temperature: float,
    least: int,
    most: int,
    constrained: bool,
) -> None:
    """Right, wrong, empty and too long drafts; every utterance its own, in batches of any composition."""
    options = BeamOptions(
        beam_size=1, max_new_tokens=14, min_new_tokens=least, temperature=temperature, length_penalty=0.7,
        eos_ids=greedy_ends(engine, prefix),
    )  # fmt: skip
    rows = [row for row, _, _ in utterances]
    caps = [cap for _, _, cap in utterances]

    def constraints() -> list[Constraint]:
        some = range(1, len(rows), 2)
        return [NoRepeatNgram(2, some), NoRepeatNgram(1)] if constrained else []

    ours, theirs = constraints(), constraints()
    expected = search(engine, prefix, rows, options, max_new_tokens=caps, constraints=theirs)
    drafts = [edited(one.tokens, edits) for (one,), (_, edits, _) in zip(expected, utterances, strict=True)]
    found, counts = drafted(
        engine, prefix, rows, options, whole(drafts), most=most, max_new_tokens=caps, constraints=ours,
    )  # fmt: skip
    same(found, expected)
    assert [one.fired for one in ours] == [one.fired for one in theirs]
    for count, (one,) in zip(counts, found, strict=True):
        assert 0 <= count.accepted <= count.proposed and count.accepted + count.passes == len(one.tokens)


def test_forward_passes(engine: Engine, prefix: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right draft is read with the prefix and costs no step; one wrong token costs one."""
    row = 3
    options = BeamOptions(beam_size=1, max_new_tokens=12, eos_ids=greedy_ends(engine, prefix))
    (expected,) = search(engine, prefix, [row], options)
    tokens, size = expected[0].tokens, LENGTHS[row]
    wrong = [*tokens[:3], (tokens[3] + 1) % 256, *tokens[4:]]
    engine = make_engine(engine.llm, graphs="off")  # on fixed buffers every pass has as many rows
    seen: list[int] = []  # positions of each pass
    project = Block.project

    def count(block: Block, x: Tensor, rotary: Any) -> Any:
        if block.index == 0:
            seen.append(len(x))
        return project(block, x, rotary)

    monkeypatch.setattr(Block, "project", count)
    read = len(tokens) - 1  # the last token, at an end or the cap, is never read
    expectations = {
        tuple(tokens): [size + read],
        tuple(wrong): [size + read, 1 + read - 4],
        (): [size] + [1] * read,
    }
    for draft, passes in expectations.items():
        seen.clear()
        found, counts = drafted(engine, prefix, [row], options, whole([draft]))
        same(found, [expected])
        assert seen == passes
        assert counts[0].passes == len(seen)


def test_finished_utterances_are_dropped(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=1, max_new_tokens=9, eos_ids=())
    expected = search(engine, prefix, ROWS, options)
    drafts = [one.tokens if row % 2 else [] for row, (one,) in enumerate(expected)]
    active: list[int] = []  # after each pass
    found, counts = drafted(
        engine, prefix, ROWS, options, whole(drafts),
        on_partial=lambda partials: active.append(sum(not one.done for one in partials)),
    )  # fmt: skip
    same(found, expected)
    assert active == [3] * 8 + [0]
    assert [count.passes for count in counts] == [9, 1] * 3
    assert [count.accepted for count in counts] == [0, 8] * 3


def test_utterances_without_a_draft(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=1, max_new_tokens=30, eos_ids=greedy_ends(engine, prefix))
    expected = search(engine, prefix, ROWS, options)
    found, counts = drafted(engine, prefix, ROWS, options, [None, WholeAnswer([1, 2, 3])] * 3)
    same(found, expected)
    assert counts[0].proposed == 0 and counts[0].passes == len(expected[0][0].tokens)


def test_answer_sets(engine: Engine, prefix: Tensor) -> None:
    options = BeamOptions(beam_size=1, max_new_tokens=6)
    answers = [[9, 8, 7], [9, 8, 6], [5]]

    def only() -> list[Constraint]:
        return [AnswerSet(answers, engine.eos_ids)]

    expected = search(engine, prefix, ROWS, options, constraints=only())
    drafts = [answers[row % 3] for row in ROWS]
    found, _ = drafted(engine, prefix, ROWS, options, whole(drafts), constraints=only())
    same(found, expected)
    assert all(one.answer in answers for (one,) in found)


def test_task_vocabulary(engine: Engine, prefix: Tensor) -> None:
    narrow = make_engine(engine.llm, range(20, 90))
    options = BeamOptions(beam_size=1, max_new_tokens=10)
    expected = search(narrow, prefix, ROWS, options)
    ids = [narrow.token_ids(one.answer) for (one,) in expected]
    assert all(20 <= token < 90 for answer in ids for token in answer)
    drafts = [narrow.indices(answer) for answer in ids]
    found, counts = drafted(narrow, prefix, ROWS, options, whole(drafts))
    same(found, expected)
    assert [count.passes for count in counts] == [1] * len(ROWS)


def test_empty_batch(engine: Engine) -> None:
    empty = torch.zeros(0, 3, 32), torch.zeros(0, dtype=torch.long)
    assert draft_search(engine, *empty, BeamOptions(beam_size=1), [], 8) == ([], [])


def test_what_cannot_be(engine: Engine, prefix: Tensor, tiny_llm_dir: Path) -> None:
    with pytest.raises(ConfigError, match="beam_size"):
        drafted(engine, prefix, [0], BeamOptions(beam_size=2), [None])
    slow = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=False)
    with pytest.raises(ConfigError, match="fused_decoding"):
        drafted(make_engine(slow), prefix, [0], BeamOptions(beam_size=1), [None])
    for wrong, message in (({"kind": "exit"}, "kind"), ({"most": 0}, "most"), ({"most": 2.5}, "most")):
        with pytest.raises(ConfigError, match=message):
            DraftOptions(**wrong)


DRAFT = "the cat sat on the mat"


def propose(answer: str, draft: str = DRAFT, most: int = 64) -> str:
    words = sorted({*answer.split(), *draft.split()})
    draft_ids, answer_ids = ([words.index(word) for word in text.split()] for text in (draft, answer))
    return " ".join(words[one] for one in WholeAnswer(draft_ids).propose(answer_ids, most))


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("", DRAFT),
        ("the", "cat sat on the mat"),
        ("a", "cat sat on the mat"),  # substitution
        ("the dog", "sat on the mat"),
        ("the fat dog", "on the mat"),  # two substitutions, as long as nothing contradicts
        ("the fat cat", "sat on the mat"),  # insertion
        ("oh the", "cat sat on the mat"),
        ("cat", "sat on the mat"),  # deletion
        ("the sat", "on the mat"),
        ("the cat sat the", "mat"),
        ("a fat cat sat down on", "the mat"),  # all of them
        ("the cat sat on the mat", ""),
        ("the cat sat on the mat again", ""),
        ("one two three four five six seven", ""),
    ],
)
def test_drafts_are_aligned_with_the_answer(answer: str, rest: str) -> None:
    assert propose(answer) == rest


def test_a_growing_answer_gives_what_a_new_one_does() -> None:
    growing, answer = WholeAnswer([1, 2, 3, 4, 5, 6]), []
    for token in (1, 9, 3, 3, 5):
        answer.append(token)
        assert list(growing.propose(answer, 9)) == list(WholeAnswer([1, 2, 3, 4, 5, 6]).propose(answer, 9))
    assert propose("the", most=2) == "cat sat"
    assert propose("the", draft="") == ""
