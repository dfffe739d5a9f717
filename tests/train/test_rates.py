"""The line of rates: its numbers by hand, over one process and over two, with and without a known card."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from pam_espnet.train import rates as module
from pam_espnet.train.iterator import _Loader
from pam_espnet.train.rates import PEAK, Rates


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def fake_model(device: str = "cpu") -> Any:
    """A block of 1000 parameters and an output layer of 20 x 10; an encoder of 500 at 50 frames per second."""
    table = nn.Embedding(20, 10)
    lm = SimpleNamespace(
        config=SimpleNamespace(hidden_size=10, vocab_size=20),
        parameters=lambda: [table.weight, torch.empty(1000)],
        get_input_embeddings=lambda: table,
        get_output_embeddings=lambda: table,
    )
    frontend = SimpleNamespace(
        sample_rate=16000,
        fusion=SimpleNamespace(used=["one"]),
        specs={"one": SimpleNamespace(frame_rate=50.0)},
        encoder=lambda name: SimpleNamespace(parameters=lambda: [torch.empty(500)]),
    )
    decoder = SimpleNamespace(lm=lm, device=torch.device(device))
    return SimpleNamespace(frontend=frontend, decoder=decoder, step_size=(0, 0, 0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def two_steps(rates: Rates, clock: Clock, waved: bool = True) -> None:
    """Four seconds: 1 + 3 s of audio, then 4 s; 60 of 80 and 40 of 40 positions; half a second of waiting."""
    batch = {"num_samples": [16000, 48000], **({"speech": torch.zeros(2, 1)} if waved else {})}
    for size, step in (((60, 80, 8), batch), ((40, 40, 2), {**batch, "num_samples": [64000]})):
        rates.model.step_size = size
        rates.loader.waited += 0.25
        rates.add(step)
    clock.now += 4


@pytest.mark.parametrize("waved", [True, False])
def test_numbers_of_one_process(clock: Clock, waved: bool) -> None:
    rates = Rates(fake_model(), SimpleNamespace(waited=7.0))
    for _ in range(2):  # what was counted once is not counted again
        two_steps(rates, clock, waved)
        rate, line = rates.since_last()
        assert rate == "2.0 s of audio/s" and line.startswith("2.0 s of audio/s, 25 tokens/s, ")
        assert "padding 20.0% of audio and 16.7% of tokens, waiting for data 12.5%, " in line
        operations = 4 * 1000 * 100 + 4 * 10 * 20 * 10 + waved * 2 * 500 * 50 * 8  # cached features: no encoder runs
        assert f"{operations / 4 / 1e12:.3g} TFLOP/s" in line and "GPU" not in line and " x " not in line


def test_processes_are_summed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one took a second more and has half the audio and more memory."""

    def gathered(row: tuple[float, ...]) -> list[tuple[float, ...]]:
        audio, padded, *counts, spent, waited, memory = row
        return [row, (audio / 2, padded, *counts, spent + 1, waited, memory + 1000)]

    monkeypatch.setattr(module, "gathered", gathered)
    rates = Rates(fake_model(), SimpleNamespace(waited=0.0))
    two_steps(rates, clock)
    line = rates.since_last()[1]
    assert line.startswith("2.4 s of audio/s, 40 tokens/s, padding 40.0% of audio and 16.7% of tokens")
    assert "waiting for data 10.0%" in line and float(line.split("at most ")[1].split()[0]) > 1000


@pytest.mark.parametrize(
    ("card", "share"), [("NVIDIA H200", " (25.0% of 1 x 989)"), ("NVIDIA H200 MIG 1g.18gb", ""), ("other", "")]
)
def test_share_of_a_card_that_is_known(clock: Clock, monkeypatch: pytest.MonkeyPatch, card: str, share: str) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    rates = Rates(fake_model("cuda"), SimpleNamespace(waited=0.0))
    two_steps(rates, clock)
    rates.operations = PEAK["NVIDIA H200"]  # in four seconds
    assert rates.since_last()[1].endswith(f"at most 3.00 GiB of GPU memory, 247 TFLOP/s{share}")


def test_the_loader_knows_how_long_it_was_waited_for() -> None:
    class Slow(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> int:
            time.sleep(0.05)
            return index

    loader = _Loader(Slow(), batch_sampler=[[1, 2], [3]], collate_fn=default_collate)
    assert [batch.tolist() for batch in loader] == [[1, 2], [3]]
    assert loader.waited >= 0.15
    state = torch.get_rng_state()
    iter(loader)  # draws the workers' seed at once: a resumed run puts the random state back after it
    assert not torch.equal(torch.get_rng_state(), state)
