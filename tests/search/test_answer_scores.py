"""Log-probabilities of a set of answers, against one forward pass per answer."""

from pathlib import Path

import pytest
import torch
from reference_search import LENGTHS, make_prefix, search
from torch import Tensor

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.llm.llm import LLM
from pam_espnet.search.answer_scores import answer_log_probs
from pam_espnet.search.constraints import AnswerSet
from pam_espnet.search.hypothesis import BeamOptions

ANSWERS = [[11], [11, 12], [200, 3, 7]]


@pytest.fixture(scope="module", params=["fused", "static", "transformers"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
    fused, graphs = request.param != "transformers", "on" if request.param == "static" else "off"
    llm = LLM.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=fused).eval()
    return make_engine(llm, graphs=graphs)


@pytest.fixture(scope="module")
def prefix() -> Tensor:
    return make_prefix()


def test_each_answer_has_the_probability_of_a_plain_pass(engine: Engine, prefix: Tensor) -> None:
    found = answer_log_probs(engine, prefix, torch.tensor(LENGTHS), ANSWERS)
    assert found.shape == (len(LENGTHS), len(ANSWERS))
    for row, length in enumerate(LENGTHS):
        for column, answer in enumerate(ANSWERS):
            embeds = torch.cat([prefix[row, :length], engine.llm.embed(torch.tensor(answer))])[None]
            with torch.no_grad():
                log_probs = engine.llm.lm(inputs_embeds=embeds).logits[0, length - 1 :].log_softmax(-1)
            own = log_probs[:-1].gather(1, torch.tensor(answer)[:, None]).sum()
            own = own + log_probs[-1, list(engine.eos_ids)].logsumexp(0)  # any end token
            assert found[row, column].item() == pytest.approx(own.item(), abs=1e-4)


def test_temperature_and_neighbours(engine: Engine, prefix: Tensor) -> None:
    lengths = torch.tensor(LENGTHS)
    cold, warm = (answer_log_probs(engine, prefix, lengths, ANSWERS, temperature=t) for t in (1.0, 3.0))
    assert not torch.allclose(cold, warm)
    alone = answer_log_probs(engine, prefix[1:2, : LENGTHS[1]], lengths[1:2], ANSWERS)
    torch.testing.assert_close(alone[0], cold[1], atol=1e-4, rtol=1e-4)


def test_the_search_and_the_scores_name_the_same_answer(engine: Engine, prefix: Tensor) -> None:
    assert len(engine.eos_ids) == 1  # the search would score each end token by itself
    rows = list(range(len(LENGTHS)))
    options = BeamOptions(beam_size=3, max_new_tokens=6, length_penalty=0.0)
    best = search(engine, prefix, rows, options, constraints=[AnswerSet(ANSWERS, engine.eos_ids)])
    scores = answer_log_probs(engine, prefix, torch.tensor(LENGTHS), ANSWERS)
    assert [nbest[0].answer for nbest in best] == [ANSWERS[index] for index in scores.argmax(1).tolist()]
