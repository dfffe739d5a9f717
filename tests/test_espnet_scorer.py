"""The LLM as a scorer of ESPnet's beam search, against this project's search and against sums made by hand."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.beam_search import BeamSearch
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from tiny_model import tiny_config, write_data
from torch import Tensor
from torch.nn import functional as F

from pam_espnet import espnet_scorer
from pam_espnet.config import write_config
from pam_espnet.data.datadir import DataDir
from pam_espnet.engine.blocks import FusedLlama
from pam_espnet.engine.exits import ExitOptions
from pam_espnet.engine.view import DecoderView
from pam_espnet.errors import ConfigError
from pam_espnet.espnet_scorer import LOG_ZERO, LLMScorer, SharedCTC
from pam_espnet.fileio import save_trained
from pam_espnet.frontend.ctc_head import EmbeddingCTC
from pam_espnet.llm.llm import LLMDecoder
from pam_espnet.llm.prompt_layout import layout, place
from pam_espnet.model import build_model
from pam_espnet.search.beam import beam_search
from pam_espnet.search.options import BeamOptions

PROMPT = "Transcribe the speech."
FRAMES = [7, 3, 5]


@pytest.fixture(scope="module", params=["fused", "transformers"])
def decoder(request: pytest.FixtureRequest, tiny_llm_dir: Path) -> LLMDecoder:
    fused = request.param == "fused"
    return LLMDecoder.from_pretrained(str(tiny_llm_dir), dtype="float32", fused_decoding=fused).eval()


@pytest.fixture(scope="module")
def audio() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [0.5 * torch.randn(frames, 32, generator=generator) for frames in FRAMES]


def view_of(decoder: LLMDecoder, size: int | None = None) -> DecoderView:
    """Of ``size`` tokens and the end tokens."""
    return DecoderView(decoder, None if size is None else range(40, 40 + size))


def prefix(decoder: LLMDecoder, audio: Tensor) -> Tensor:
    """(1,P,D)"""
    parts = layout(decoder.tokenizer, PROMPT, decoder.system)
    head, tail = torch.tensor(parts.head_ids), torch.tensor(parts.tail_ids)
    with torch.no_grad():
        return place([head], audio[None], torch.tensor([len(audio)]), [tail], None, decoder.embed).embeds


def espnet(scorer: LLMScorer, beam_size: int, **more: Any) -> BatchBeamSearch:
    scorers, weights = more.pop("scorers", {}), more.pop("weights", {})
    return BatchBeamSearch(
        {"llm": scorer, **scorers}, {"llm": 1.0, **weights}, beam_size=beam_size, vocab_size=scorer.vocab_size,
        sos=scorer.eos, eos=scorer.eos, **more,
    )  # fmt: skip


def own(view: DecoderView, audio: Tensor, options: BeamOptions) -> list[tuple[list[int], float]]:
    embeds = prefix(view.decoder, audio)
    (nbest,) = beam_search(view, embeds, torch.tensor([embeds.shape[1]]), options)
    return [(view.tokens(one.answer), one.score) for one in nbest]


def theirs(scorer: LLMScorer, hypotheses: list[Any]) -> list[tuple[list[int], float]]:
    return [(scorer.tokens(one.yseq), float(one.score)) for one in hypotheses]


def same(found: list[tuple[list[int], float]], expected: list[tuple[list[int], float]]) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)


class Endless(DecoderView):
    """Never ends by itself."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        logits[..., list(self.eos_ids)] = -1e9
        return logits


@pytest.mark.parametrize("beam_size", [1, 2, 4, 8])
def test_the_same_nbest_where_nothing_ends_early(decoder: LLMDecoder, audio: list[Tensor], beam_size: int) -> None:
    view = Endless(decoder, range(40, 90))
    options = BeamOptions(beam_size=beam_size, nbest=beam_size, max_new_tokens=6, length_penalty=0.0)
    scorer = LLMScorer(view, PROMPT)
    for frames in audio:
        same(theirs(scorer, espnet(scorer, beam_size)(frames, maxlenratio=-6)), own(view, frames, options))


def test_the_same_greedy_answer(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    """With one hypothesis both searches stop at the first end."""
    view = view_of(decoder, 2)
    options = BeamOptions(beam_size=1, max_new_tokens=12, length_penalty=0.0)
    lengths = set()
    for frames in audio:
        scorer = LLMScorer(view, PROMPT)
        found = theirs(scorer, espnet(scorer, 1)(frames, maxlenratio=-12))
        same(found, own(view, frames, options))
        lengths.add(len(found[0][0]))
    assert min(lengths) < 11  # some end by themselves


def test_the_same_nbest_with_ends(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    """All first tokens survive and the second is the last: an end takes no other hypothesis' place."""
    view = view_of(decoder, 6)
    options = BeamOptions(beam_size=7, nbest=7, max_new_tokens=2, length_penalty=0.0)
    scorer = LLMScorer(view, PROMPT)
    ended = 0
    for frames in audio:
        found = theirs(scorer, espnet(scorer, 7)(frames, maxlenratio=-2))[:7]
        same(found, own(view, frames, options))
        ended += sum(len(tokens) < 2 for tokens, _ in found)
    assert ended > 3


def test_the_same_best_answer_with_ends(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    """In general an end costs ESPnet's beam a place; the best answer is the same here nevertheless."""
    view = view_of(decoder, 4)
    options = BeamOptions(beam_size=4, max_new_tokens=20, length_penalty=0.0, early_stopping="never")
    scorer = LLMScorer(view, PROMPT)
    for frames in audio:
        found = theirs(scorer, espnet(scorer, 4)(frames, maxlenratio=-20))
        same(found[:1], own(view, frames, options))
        assert len(found[0][0]) < 19


def test_ends_are_one_end(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    view = view_of(decoder, 20)
    view.eos_ids = (view.eos_ids[0], 3, 5)  # an LLM with three end tokens
    scorer = LLMScorer(view, PROMPT)
    scores, _ = scorer.batch_score(torch.tensor([[scorer.eos]]), [scorer.batch_init_state(audio[0])], audio[0][None])
    assert scores.shape == (1, scorer.vocab_size) == (1, 21 - 3 + 2)
    assert scores[0, 0] == LOG_ZERO
    assert float(scores.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    logits, _ = view.prefill(embeds := prefix(decoder, audio[0]), torch.tensor([embeds.shape[1]]))
    expected = logits[0].softmax(-1)
    assert float(scores[0, -1].exp()) == pytest.approx(float(expected[list(view.eos_ids)].sum()), abs=1e-5)
    assert scorer.token_ids == [token for token in range(40, 60) if token not in view.tokens(view.eos_ids)]


def test_a_batch_of_utterances_gives_what_each_gives_alone(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    scorer = LLMScorer(view_of(decoder, 4), PROMPT)
    padded = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True, padding_value=1e4)
    together = espnet(scorer, 3)(padded, maxlenratio=-8, x_lengths=torch.tensor(FRAMES))
    for frames, found in zip(audio, together, strict=True):
        same(theirs(scorer, found), theirs(scorer, espnet(scorer, 3)(frames, maxlenratio=-8)))


def test_the_prefix_is_run_once_and_nothing_is_copied(
    tiny_llm_dir: Path, audio: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = LLMDecoder.from_pretrained(str(tiny_llm_dir), dtype="float32").eval()
    decoder.fused_blocks()
    seen: list[int] = []  # positions that each forward pass computes
    places = set()
    finish = FusedLlama.finish
    scorer = LLMScorer(Endless(decoder, range(40, 90)), PROMPT)

    def count(model: FusedLlama, index: int, x: Tensor, attended: Tensor) -> Tensor:
        if index == 0:
            seen.append(len(x))
            if len(seen) > 1:
                places.add(scorer._memory.keys[0].data_ptr())
        return finish(model, index, x, attended)

    monkeypatch.setattr(FusedLlama, "finish", count)
    espnet(scorer, 4)(audio[0], maxlenratio=-7)
    assert seen == [prefix(decoder, audio[0]).shape[1]] + [4] * 6
    assert len(places) == 1


def test_ctc_beside_the_llm(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    """Every score is the weighted sum of the LLM's and CTC's, each computed anew; the weight of CTC re-ranks."""
    known = [*range(42, 56), 70]  # 42 to 45 are shared
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        head = EmbeddingCTC(known, decoder.embed(torch.tensor(known)), temperature=0.2)
    frames = audio[0]
    view = view_of(decoder, 6)
    best = {}
    for weight in (0.0, 0.3, 1.0):
        scorer = LLMScorer(view, PROMPT)
        ctc = CTCPrefixScorer(SharedCTC(head, scorer), scorer.eos)
        search = espnet(scorer, 6, scorers={"ctc": ctc}, weights={"llm": 0.5, "ctc": weight})
        ended = [one for one in search(frames, maxlenratio=-8) if len(one.yseq) < 10][:4]  # the cap appends an end
        assert len(ended) > 1
        best[weight] = scorer.tokens(ended[0].yseq)
        for one in ended if weight else []:
            tokens = scorer.tokens(one.yseq)
            assert set(tokens) <= set(range(42, 46))
            inputs = torch.cat([prefix(decoder, frames)[0], decoder.embed(torch.tensor(tokens, dtype=torch.long))])
            with torch.no_grad():
                hidden = decoder(inputs[None], torch.ones(1, len(inputs), dtype=torch.bool))
                log_probs = view.logits(hidden[0, -len(tokens) - 1 :]).log_softmax(-1)
                heard = head.log_probs(frames[None])[0]
            llm = sum(float(log_probs[i, p]) for i, p in enumerate(view.places(tokens)))
            llm += float(log_probs[-1, list(view.eos_ids)].logsumexp(0))
            classes = torch.tensor(head.classes(tokens), dtype=torch.long)
            lengths = torch.tensor([len(frames)]), torch.tensor([len(tokens)])
            heard_score = -float(F.ctc_loss(heard[:, None], classes[None], *lengths, reduction="sum"))
            assert float(one.scores["llm"]) == pytest.approx(llm, abs=1e-4)
            assert float(one.scores["ctc"]) == pytest.approx(heard_score, abs=1e-3)
            assert float(one.score) == pytest.approx(0.5 * llm + weight * heard_score, abs=1e-3)
    assert best[0.0] != best[1.0]


def test_what_it_cannot_do_is_said(decoder: LLMDecoder, audio: list[Tensor]) -> None:
    scorer = LLMScorer(view_of(decoder, 9), PROMPT)
    begin, x = torch.tensor([[scorer.eos]]), audio[0][None]
    with pytest.raises(ConfigError, match="BatchBeamSearch"):
        BeamSearch(
            {"llm": scorer}, {"llm": 1.0}, 2, vocab_size=scorer.vocab_size, sos=scorer.eos, eos=scorer.eos
        )(audio[0])  # fmt: skip
    root = scorer.batch_init_state(audio[0])
    with pytest.raises(ConfigError, match="hyp_primer"):
        scorer.batch_score(torch.tensor([[scorer.eos, 3]]), [root], x)
    _, (node,) = scorer.batch_score(begin, [root], x)
    ys = torch.tensor([[scorer.eos, 3]])
    scorer.batch_score(ys, [node], x)
    for old in (root, node):
        with pytest.raises(ConfigError, match="not of the last step"):
            scorer.batch_score(ys, [old], x)
    scorer.batch_init_state(audio[1])
    with pytest.raises(ConfigError, match="one breadth-first search"):
        scorer.batch_score(ys, [node + 1], x)
    if decoder.fused_decoding:
        with pytest.raises(ConfigError, match="deferred"):
            LLMScorer(DecoderView(decoder, exits=ExitOptions("fixed", (1,), fill="deferred")), PROMPT)


def test_the_example_of_the_module_runs(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = tmp_path / "exp" / "mine"
    exp.mkdir(parents=True)
    tokens = exp / "ctc_tokens.txt"
    tokens.write_text("".join(f"{token}\n" for token in range(3, 250)))
    config = tiny_config(tiny_llm_dir, ctc_tokens=str(tokens), ctc_weight=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_trained(build_model(config).state_dict(), exp / "model.safetensors")
    write_config(config, exp / "config.yaml")
    data = DataDir.load(write_data(tmp_path, "test", size=1))
    (tmp_path / "speech.flac").write_bytes(Path(data.source(data.utterances[0])[0]).read_bytes())
    monkeypatch.chdir(tmp_path)
    lines = (espnet_scorer.__doc__ or "").splitlines()
    code = [line for line in lines[lines.index("    import torch") :] if line.startswith("    ") or not line]
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(code)), namespace)
    assert capsys.readouterr().out.strip()
    assert len(namespace["best"].yseq) > 1 and set(namespace["best"].scores) == {"llm", "ctc"}
