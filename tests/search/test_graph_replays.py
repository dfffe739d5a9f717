"""Searches whose passes are recorded once and replayed without Python, as CUDA graphs are, against the eager way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraphs

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.static import StaticEngine
from pam_espnet.llm.llm import LLM
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import NoRepeatNgram
from pam_espnet.search.ctc import CTCOptions, CTCTable, token_classes
from pam_espnet.search.drafts import WholeAnswer, draft_search
from pam_espnet.search.hypothesis import BeamOptions

ENDS = (7, 74)


@pytest.fixture(scope="module")
def engines(tiny_llm_dir: Path) -> tuple[Engine, StaticEngine]:
    """The tiny LLM with four blocks, eager, and with recorded passes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_llm_dir, num_hidden_layers=4, initializer_range=0.3)
    torch.manual_seed(4)
    lm = AutoModelForCausalLM.from_config(config).float().eval()
    llm = LLM(lm, AutoTokenizer.from_pretrained(tiny_llm_dir)).eval()
    static = make_engine(llm, graphs="on")
    assert isinstance(static, StaticEngine)
    static.release()
    static._graphs = RecordedGraphs()
    return make_engine(llm, graphs="off"), static


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 30, (3,), generator=generator)
    return torch.randn(3, int(lengths.max()), 32, generator=generator), lengths


@pytest.mark.parametrize("kind", ["plain", "ngram", "ctc"])
@pytest.mark.parametrize(
    "exits",
    [
        None,
        ExitOptions("fixed", (2,)),
        ExitOptions("confidence", (1, 2), threshold=0.1),
        ExitOptions("patience", (1, 2)),
    ],
    ids=["never", "fixed", "confidence", "patience"],
)
def test_replays_find_what_the_eager_way_finds(
    engines: tuple[Engine, StaticEngine], exits: ExitOptions | None, kind: str
) -> None:
    eager, static = engines if exits is None else (one.with_exits(exits) for one in engines)
    before = engines[1]._graphs.replays  # type: ignore[attr-defined]
    for seed in range(3):  # the same buffers with other utterances and options
        prefix, lengths = batch(seed)
        options = BeamOptions(
            beam_size=3, nbest=3, max_new_tokens=5 + seed, eos_ids=ENDS, temperature=1 + seed / 3, min_new_tokens=seed
        )
        ctc = None
        if kind == "ctc":
            log_probs = torch.randn(3, 9 + seed, 50, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
            classes = token_classes({token + 20: token for token in range(1, 50)}, ENDS, eager.llm.vocab_size)
            covered = torch.tensor([True, False, True])
            ctc = CTCTable.of(log_probs, torch.tensor([9, 4, 6]), covered, classes, CTCOptions(weight=0.4))
        found: list[Any] = []
        for engine in (eager, static):
            constraints = [NoRepeatNgram(1)] if kind == "ngram" else []
            nbest = beam_search(engine, prefix, lengths, options, [3, 9, 5], None, constraints, ctc)
            hypotheses = [[(one.tokens, one.ended, one.depths) for one in own] for own in nbest]
            found.append((hypotheses, [one.fired for one in constraints], [one.score for own in nbest for one in own]))
        assert found[0][:2] == found[1][:2] and found[1][2] == pytest.approx(found[0][2], abs=1e-4)
    assert engines[1]._graphs.replays > before  # type: ignore[attr-defined]


def test_drafts_and_answer_scores_are_replayed(engines: tuple[Engine, StaticEngine]) -> None:
    answers = [[5], [6, 17, 18], [9, 1]]
    for seed in range(2):
        prefix, lengths = batch(seed)
        expected, found = (answer_log_probs(engine, prefix, lengths, answers) for engine in engines)
        assert torch.allclose(found, expected, atol=1e-4)
        options = BeamOptions(beam_size=1, max_new_tokens=9, eos_ids=ENDS)
        right = [own[0].tokens for own in beam_search(engines[0], prefix, lengths, options)]
        wrong = [*right[1][:2], 3, *right[1][3:]]
        searches = [
            draft_search(engine, prefix, lengths, options, [WholeAnswer(right[0]), WholeAnswer(wrong), None], 4)
            for engine in engines
        ]
        assert [[own[0].tokens for own in nbest] for nbest, _ in searches] == [right, right]
        assert searches[0][1] == searches[1][1]


def test_recordings_show_what_a_capture_cannot_do() -> None:
    graphs, x, bias = RecordedGraphs(), torch.zeros(3), [1.0]
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(lambda: x.add_(float(x.sum())))
    with pytest.raises(RuntimeError, match="bool index"):
        graphs.capture(lambda: x[x > 0])
    add = graphs.capture(lambda: x + bias[0])
    kept = add()
    assert torch.equal(kept, torch.ones(3))
    bias[0] = 5.0  # Python is not run again
    x.fill_(1)
    assert add() is kept and torch.equal(kept, torch.full((3,), 2.0))
