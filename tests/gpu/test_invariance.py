"""Batch invariance, on a GPU in bfloat16 to the last bit: an n-best alone, among 8, among 32, in another order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_llm import random_llm, random_prefix
from same_nbest import check_identical

from pam_espnet.engine.calibration import Calibration
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.beam import beam_search
from pam_espnet.search.constraints import AnswerSet, NoRepeatNgram
from pam_espnet.search.ctc import CTCOptions, CTCTable, token_classes
from pam_espnet.search.drafts import WholeAnswer, draft_search
from pam_espnet.search.hypothesis import BeamOptions, Hypothesis

# Of 32 utterances: the first fits a bucket of 64 positions, alone and with some others; together they need 256.
LENGTHS = [50, 64, 20, 33, 47, 60, 12, 59, 100, 65, 128, 129, 31, 192, 193, 7, *range(40, 200, 10)]
ENDS = (4, 9)
# Real shapes, with fewer blocks: what could differ is in each of them.
BLOCKS = {"Qwen2.5-3B": 8, "Llama-3.2-1B": 6, "SmolLM2-135M": 12, "Qwen3-1.7B": 6}
Search = Callable[[list[int]], list[list[Hypothesis]]]  # utterances -> n-best of each


class Batch:
    """Thirty-two utterances for an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prefix, self.lengths = random_prefix(engine.llm, LENGTHS)

    def inputs(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prefix[rows, : max(LENGTHS[row] for row in rows)], self.lengths[rows]

    def check(self, search: Search, exactly: bool, thoroughly: bool = False) -> None:
        """The first utterance, alone and in company; ``thoroughly``: another one and other companies, too."""
        whole = list(range(len(LENGTHS)))
        for row in (0, 10) if thoroughly else (0,):
            alone = search([row])
            check_identical(search([row]), alone, exactly)  # repeatable at all
            companies = [whole[row : row + 8], whole[::-1]]
            if thoroughly:
                companies += [whole[row : row + 3], whole, [row] * 5]
            for rows in companies:
                found = [one for one, own in zip(search(rows), rows, strict=True) if own == row]
                check_identical(found, alone * len(found), exactly)


def make(name: str, device: str, half: torch.dtype, **options: Any) -> Batch:
    shape, blocks = ("tiny-qwen2", 0) if device == "cpu" else (name, BLOCKS[name])
    return Batch(make_engine(random_llm(shape, device, half, blocks), graphs="on", **options))


@pytest.fixture(scope="module", params=BLOCKS)
def batch(request: pytest.FixtureRequest, device: str, half: torch.dtype) -> Batch:
    return make(request.param, device, half)


@pytest.fixture(scope="module")
def qwen(device: str, half: torch.dtype) -> Batch:
    return make("Qwen2.5-3B", device, half)


@pytest.fixture(scope="module")
def exiting(device: str, half: torch.dtype) -> Batch:
    """Keys and values alone would be summed in other parts than with queries, were it not seen to."""
    return make("Qwen3-1.7B", device, half)


def plain(batch: Batch, engine: Engine | None = None, beam: int = 4, **options: Any) -> Search:
    wanted = BeamOptions(beam_size=beam, nbest=beam, max_new_tokens=16, eos_ids=ENDS, **options)
    return lambda rows: beam_search(engine or batch.engine, *batch.inputs(rows), wanted)


@pytest.mark.parametrize("beam", [4, 1])
def test_company_does_not_change_nbest(batch: Batch, device: str, beam: int) -> None:
    batch.check(plain(batch, beam=beam), device == "cuda", thoroughly=beam == 4)


def test_nor_with_every_rule_of_the_search(qwen: Batch, device: str) -> None:
    rules = plain(qwen, length_penalty=0.6, early_stopping="never", min_new_tokens=2, temperature=1.3)
    qwen.check(rules, device == "cuda")


def test_nor_with_constraints_and_ctc(qwen: Batch, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(32, 12, 6, generator=generator).log_softmax(-1).to(device)
    frames = torch.tensor([4 + b % 7 for b in range(32)])
    classes = token_classes({30 + n: n for n in range(1, 6)}, ENDS, qwen.engine.llm.vocab_size)
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=12, eos_ids=ENDS)

    def search(rows: list[int]) -> list[list[Hypothesis]]:
        """Every third utterance has a set of answers, the others an n-gram guard and CTC."""
        free = [at for at, row in enumerate(rows) if row % 3 != 1]
        own, covered = frames[rows], torch.tensor([row % 3 != 1 for row in rows])
        ctc = CTCTable.of(scores[rows, : int(own.max())], own, covered, classes, CTCOptions(0.4, 20))
        closed = [at for at, row in enumerate(rows) if row % 3 == 1]
        constraints = [NoRepeatNgram(2, free), AnswerSet([(5, 6), (5, 7, 8), (11,)], ENDS, closed)]
        return beam_search(qwen.engine, *qwen.inputs(rows), options, constraints=constraints, ctc=ctc)

    qwen.check(search, device == "cuda")


@pytest.mark.parametrize("mode", ["fixed", "confidence", "entropy", "patience", "gate"])
def test_nor_with_early_exit(exiting: Batch, device: str, tmp_path: Path, mode: str) -> None:
    llm = exiting.engine.llm
    layers = tuple(range(1, llm.num_layers))
    options: dict[str, Any] = {"layers": layers}
    if mode == "gate":
        generator = torch.Generator().manual_seed(2)
        gates = 3 * llm.width**-0.5 * torch.randn(len(layers), llm.width + 1, generator=generator)
        Calibration(layers, None, gates, 0.9).save(tmp_path / "exit.safetensors", {})
        options = {"calibration": str(tmp_path / "exit.safetensors")}
    elif mode == "fixed":
        options = {"layers": (llm.num_layers // 2,)}
    elif mode in ("confidence", "entropy"):
        options["threshold"] = 0.3
    engine = exiting.engine.with_exits(ExitOptions(mode, **options))
    exiting.check(plain(exiting, engine), device == "cuda")


def test_nor_with_drafts(qwen: Batch, device: str) -> None:
    """Of a pass each row follows its own draft."""
    options = BeamOptions(beam_size=1, max_new_tokens=12, eos_ids=ENDS)
    right = {row: plain(qwen, beam=1)([row])[0][0].answer for row in (0, 10)}

    def search(rows: list[int]) -> list[list[Hypothesis]]:
        drafts = [WholeAnswer([*right[row][:5], 3, 3]) if row in right else WholeAnswer([8, 8, 8]) for row in rows]
        return draft_search(qwen.engine, *qwen.inputs(rows), options, drafts, 6)[0]

    qwen.check(search, device == "cuda")


def test_nor_answer_probabilities(qwen: Batch, device: str) -> None:
    answers = [(5, 6), (5, 7, 8), (11,)]

    def scores(rows: list[int]) -> torch.Tensor:
        return answer_log_probs(qwen.engine, *qwen.inputs(rows), answers)

    alone, whole = scores([0]), scores(list(range(32)))
    torch.testing.assert_close(whole[:1], alone, atol=0 if device == "cuda" else 1e-4, rtol=0)


def test_faster_products_are_close(qwen: Batch, device: str, half: torch.dtype) -> None:
    """``batch_invariant: false`` promises no bits: logits differ by rounding."""
    faster = make("Qwen2.5-3B", device, half, batch_invariant=False)
    expected, found = (batch.engine.prefill(*batch.inputs(list(range(8))))[0] for batch in (qwen, faster))
    assert float((found - expected).norm() / expected.norm()) < (0.05 if device == "cuda" else 1e-4)
