"""What the host waits for in a plain step of the static engine: one event, and nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch
from random_llm import random_llm, random_prefix

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions


def searched(engine: Engine, steps: int, batch: int) -> int:
    """A search of ``steps`` steps; operations that made the host wait for the device, events apart."""
    prefix, lengths = random_prefix(engine.llm, [20 + b for b in range(batch)])
    options = BeamOptions(beam_size=4, max_new_tokens=steps, min_new_tokens=steps)
    beam_search(engine, prefix, lengths, options)  # buffers and graphs
    if not torch.cuda.is_available():
        return 0
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            beam_search(engine, prefix, lengths, options)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(one.message) for one in caught)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_waits_for_one_event(
    device: str, half: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch, record_property: pytest.RecordProperty
) -> None:
    """No operation of a step synchronises: as many do in a search of 4 tokens as in one of 14."""
    engine = make_engine(random_llm("small-qwen2" if device == "cuda" else "tiny-qwen2", device, half), graphs="on")
    few = searched(engine, 4, batch)
    waits: list[int] = []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(1), wait(event)))
    many = searched(engine, 14, batch)
    record_property("synchronisations_of_a_search", many)
    record_property("event_waits_of_two_searches_of_14_tokens", len(waits))
    assert many <= few
    assert len(waits) <= 2 * (14 + 1)


def test_nothing_else_may_wait(device: str, half: torch.dtype) -> None:
    """From the first step on every synchronising operation is an error."""
    engine = make_engine(random_llm("small-qwen2" if device == "cuda" else "tiny-qwen2", device, half), graphs="on")
    prefix, lengths = random_prefix(engine.llm, [20, 30, 40])
    options = BeamOptions(beam_size=4, max_new_tokens=10, min_new_tokens=10)
    beam_search(engine, prefix, lengths, options)
    steps = []

    def strict(partials: list) -> None:
        steps.append(len(partials))
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    try:
        beam_search(engine, prefix, lengths, options, on_partial=strict)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert steps == [3] * 10
