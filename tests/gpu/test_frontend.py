"""The frontend on a GPU: an utterance's embeddings among neighbours, with the networks of the recipes' encoders."""

from __future__ import annotations

import pytest
import torch
from random_encoders import KINDS, SMALL, random_frontend
from torch import Tensor

from pam_espnet.frontend.frontend import PaMFrontend

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


def test_neighbours_do_not_matter(batch: Batch, record_property: pytest.RecordProperty) -> None:
    """Up to the rounding of float32: kernels of convolutions and products are chosen by the size of the batch."""
    worst, identical = drift(batch)
    record_property("largest_difference_over_spread", worst)
    record_property("identical", identical)
    assert worst < 2e-2 and (worst < 1e-3 or batch.device == "cuda")
