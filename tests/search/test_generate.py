"""The n-best of hundreds of prefixes of unequal length, token for token that of transformers' ``generate``.

Two searches that round differently may part where two candidates are all but tied. So each utterance's closest decision
is measured, and those closer than ``MARGIN`` are set aside: they must be few, and all others must be equal.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from reference_search import generate_batch
from torch import Tensor

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.llm.llm import LLM
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import IMPOSSIBLE, BeamOptions, Candidate, Hypothesis, UtteranceBeam

MARGIN = 2e-5  # log-probability; float32 sums of a dozen tokens differ by less
COUNT, WANTED = 212, 200  # prefixes, and how many must be decided by more than the margin


def build(family: str, folder: Path) -> LLM:
    """A random LLM whose next token depends on what came before."""
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    lm = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    return LLM(lm, transformers.AutoTokenizer.from_pretrained(folder)).eval()


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "Qwen2 static"])
def engine(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> Engine:
    family, _, static = request.param.partition(" ")
    return make_engine(build(family, tiny_llm_dir), graphs="on" if static else "off")


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Utterance -> how far the last candidate that was taken has been from the first that was not, at the closest."""
    found: dict[int, float] = {}
    advance = UtteranceBeam.advance

    def watched(beam: UtteranceBeam, candidates: list[Candidate]) -> list[int]:
        size = beam.options.beam_size
        going = [one for one in candidates if one.token not in beam.eos_ids]
        for ranked in (candidates, going):
            if len(ranked) > size and ranked[size].total > IMPOSSIBLE:
                gap = ranked[size - 1].total - ranked[size].total
                found[beam.utterance] = min(gap, found.get(beam.utterance, math.inf))
        return advance(beam, candidates)

    monkeypatch.setattr(UtteranceBeam, "advance", watched)
    return found


def search(engine: Engine, prefixes: list[Tensor], options: BeamOptions) -> list[list[Hypothesis]]:
    lengths = torch.tensor([len(one) for one in prefixes])
    padded = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_value=1e4)
    return beam_search(engine, padded, lengths, options)


def compare(engine: Engine, prefixes: list[Tensor], options: BeamOptions, margins: dict[int, float]) -> tuple[int, int]:
    """How many utterances were decided clearly, all of them equal; and how many hypotheses ended by themselves."""
    found = search(engine, prefixes, options)
    decided = ended = 0
    wanted = generate_batch(engine.llm, prefixes, options)
    for utterance, (nbest, expected) in enumerate(zip(found, wanted, strict=True)):
        scores = [one.score for one in nbest]
        closest = min([margins[utterance], *(abs(a - b) for a, b in itertools.pairwise(scores))])
        if closest < MARGIN:
            continue
        decided += 1
        ended += sum(one.ended for one in nbest)
        assert [one.tokens for one in nbest] == [tokens for tokens, _ in expected], (utterance, closest)
        assert scores == pytest.approx([score for _, score in expected], abs=1e-4)
    return decided, ended


@pytest.mark.parametrize("beam_size", [1, 2, 4, 8])
def test_two_hundred_prefixes(engine: Engine, margins: dict[int, float], beam_size: int) -> None:
    generator = torch.Generator().manual_seed(beam_size)
    lengths = torch.randint(1, 30, (COUNT,), generator=generator).tolist()
    prefixes = [torch.randn(length, engine.llm.width, generator=generator) for length in lengths]
    endless = search(engine, prefixes, BeamOptions(beam_size=beam_size, max_new_tokens=6, eos_ids=()))
    later = torch.tensor([nbest[0].tokens[2:] for nbest in endless])
    frequent = later.flatten().bincount().topk(3).indices.tolist()  # so that answers end early, late and never
    margins.clear()
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=12, eos_ids=tuple(frequent))
    decided, ended = compare(engine, prefixes, options, margins)
    assert decided >= WANTED
    assert 0 < ended < decided * beam_size


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_real_llm(margins: dict[int, float], beam_size: int, mini_models: Path) -> None:
    folder = mini_models / "smollm2-135m-instruct"
    llm = LLM.from_pretrained(str(folder), dtype="float32").eval()
    engine = make_engine(llm)
    text = Path(__file__).read_text(encoding="utf-8") + (folder / "LICENSE").read_text(encoding="utf-8")
    ids = torch.tensor(llm.tokenizer(text)["input_ids"])
    prefixes = [llm.embed(ids[start : start + 5 + 3 * k]) for k, start in enumerate(range(0, 640, 40))]
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=10)
    decided, _ = compare(engine, prefixes, options, margins)
    assert decided >= 12
