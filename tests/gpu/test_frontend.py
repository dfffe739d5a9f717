"""From recordings: embeddings and answers of an utterance among neighbours, with networks of the recipes' encoders."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from random_encoders import KINDS, SMALL, random_frontend
from random_llm import random_llm
from torch import Tensor

from pam_espnet.decode.answers import Answer
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.frontend.frontend import PaMFrontend
from pam_espnet.model import ESPnetPaMModel

SAMPLES = [16000, 24000, 9000, 31999, 16001, 8000, 12345, 28000] * 4


class Batch:
    """Thirty-two recordings for a frontend."""

    def __init__(self, kinds: tuple[str, ...], device: str) -> None:
        self.device = device
        self.frontend: PaMFrontend = random_frontend(64, device, SMALL, kinds, "pam" if len(kinds) > 1 else "single")
        generator = torch.Generator().manual_seed(2)
        self.waves = [0.1 * torch.randn(size, generator=generator) for size in SAMPLES]
        self.prompt = torch.randn(64, generator=generator)

    @torch.no_grad()
    def embed(self, rows: list[int]) -> list[Tensor]:
        """(U,D) of each of some recordings, together in a batch."""
        lengths = torch.tensor([SAMPLES[row] for row in rows], device=self.device)
        wave = torch.nn.utils.rnn.pad_sequence([self.waves[row] for row in rows], batch_first=True).to(self.device)
        found = self.frontend(lengths, self.prompt.expand(len(rows), -1).to(self.device), wave=wave)
        return [one[:length] for one, length in zip(found.embeddings, found.lengths.tolist(), strict=True)]


@pytest.fixture(scope="module", params=[(kind,) for kind in KINDS] + [KINDS], ids="-".join)
def batch(request: pytest.FixtureRequest, device: str) -> Batch:
    return Batch(request.param, device)


def drift(batch: Batch) -> tuple[float, bool]:
    """The largest difference over the spread of the embeddings, and whether there is none, in any company."""
    worst, identical = 0.0, True
    for row in (0, 3):
        (alone,) = batch.embed([row])
        for rows in (list(range(row, row + 8)), list(range(32)), list(range(31, -1, -1)), [row] * 3):
            among = batch.embed(rows)[rows.index(row)]
            identical &= torch.equal(among, alone)
            worst = max(worst, float((among - alone).abs().max() / alone.std()))
    return worst, identical


def test_embeddings_of_a_batch_are_close(batch: Batch, record_property: Callable[[str, object], None]) -> None:
    """Up to rounding, bfloat16's on a GPU: kernels of convolutions and products are chosen by the size of the batch."""
    worst, identical = drift(batch)
    record_property("largest_difference_over_spread", worst)
    record_property("identical", identical)
    assert worst < (0.15 if batch.device == "cuda" else 1e-3)


@pytest.fixture(scope="module")
def answerer(device: str, half: torch.dtype) -> SpeechLLM:
    """All encoders and an LLM, as decoding uses them by default."""
    llm = random_llm("small-qwen2" if device == "cuda" else "tiny-qwen2", device, half)
    model = ESPnetPaMModel(random_frontend(llm.width, device, SMALL), llm, ("asr",))
    options = {"beam_size": 4, "nbest": 4, "max_new_tokens": 10, "graphs": "on"}
    return SpeechLLM(model, AnswerOptions.from_dict(options), device)


def recordings(rows: list[int]) -> tuple[list[np.ndarray], list[str]]:
    made = [np.random.default_rng(row).standard_normal(SAMPLES[row]).astype(np.float32) * 0.1 for row in rows]
    return made, ["What is said?" if row % 2 else "Describe the sounds." for row in rows]


def test_decoding_encodes_every_recording_alike(answerer: SpeechLLM, device: str) -> None:
    """On a GPU to the last bit, in any company."""
    alone = answerer.encode(*recordings([3]))
    for rows in (list(range(8)), list(range(31, -1, -1))):
        among, at = answerer.encode(*recordings(rows)), rows.index(3)
        size = int(alone.lengths[0])
        tolerance = 0.0 if device == "cuda" else 1e-4
        torch.testing.assert_close(among.embeddings[at, :size], alone.embeddings[0], atol=tolerance, rtol=0)


def test_company_does_not_change_answers(answerer: SpeechLLM, device: str) -> None:
    """From the waveform to the score: alone, among 8, among 32 in another order."""

    def check(found: Answer, expected: Answer) -> None:
        assert (found.texts, found.tokens, found.depths) == (expected.texts, expected.tokens, expected.depths)
        assert found.scores == (expected.scores if device == "cuda" else pytest.approx(expected.scores, abs=1e-3))

    (alone,) = answerer.answer(*recordings([3]))
    for rows in (list(range(8)), list(range(31, -1, -1))):
        check(answerer.answer(*recordings(rows))[rows.index(3)], alone)
