"""What the host waits for: in a plain step of the static engine one event, in a training step what is known."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collated import collated
from random_llm import random_llm, random_prefix
from tiny_model import tiny_config

from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions


def waits(run: Callable[[], Any]) -> int:
    """Operations of ``run()`` that made the host wait for the device, events apart."""
    if not torch.cuda.is_available():
        run()
        return 0
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(one.message) for one in caught)


def searched(engine: Engine, steps: int, batch: int) -> int:
    """What a search of ``steps`` steps waits for."""
    prefix, lengths = random_prefix(engine.llm, [20 + b for b in range(batch)])
    options = BeamOptions(beam_size=4, max_new_tokens=steps, min_new_tokens=steps)
    beam_search(engine, prefix, lengths, options)  # buffers and graphs
    return waits(lambda: beam_search(engine, prefix, lengths, options))


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_waits_for_one_event(
    device: str,
    half: torch.dtype,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """No operation of a step synchronises: as many do in a search of 4 tokens as in one of 14."""
    engine = make_engine(random_llm("small-qwen2" if device == "cuda" else "tiny-qwen2", device, half), graphs="on")
    few = searched(engine, 4, batch)
    events: list[int] = []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (events.append(1), wait(event)))
    many = searched(engine, 14, batch)
    record_property("synchronisations_of_a_search", many)
    record_property("event_waits_of_two_searches_of_14_tokens", len(events))
    assert many <= few
    assert len(events) <= 2 * (14 + 1)


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


def test_a_training_step_waits_for_the_router_and_transformers(
    device: str, tiny_llm_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    """tests/train/test_waits.py says what these two are; the backward pass waits for nothing."""
    from espnet2.torch_utils.device_funcs import to_device

    from pam_espnet.model import build_model

    model = build_model(tiny_config(tiny_llm_dir, router_loss_weight=0.1)).to(device).train()
    batch = to_device(collated(model, [16000, 12000, 9000]), device)
    model(**batch)[0].backward()  # prompt vectors, and what libraries set up
    losses: list[torch.Tensor] = []
    forward = waits(lambda: losses.append(model(**batch)[0]))
    record_property("synchronisations_of_a_forward_pass", forward)
    assert forward <= 2
    assert waits(losses[0].backward) == 0
