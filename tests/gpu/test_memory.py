"""Memory of the GPU: returned when it is asked for, not growing with batches; what to set where there is too little."""

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_llm import random_llm, random_prefix

from pam_espnet.decode.batches import in_batches
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.engine.engine import Engine, make_engine
from pam_espnet.errors import PamError
from pam_espnet.search.beam import beam_search
from pam_espnet.search.hypothesis import BeamOptions

MIB = 1 << 20
# utterances, longest prefix, tokens: buckets that are used in turns
BATCHES = [(1, 30, 6), (8, 60, 12), (3, 190, 20), (16, 100, 6), (8, 60, 12)]


@pytest.fixture(scope="module")
def engine(device: str, half: torch.dtype) -> Engine:
    return make_engine(random_llm("small-qwen2" if device == "cuda" else "tiny-qwen2", device, half), graphs="on")


def decode(engine: Engine, batch: int, longest: int, tokens: int) -> None:
    prefix, lengths = random_prefix(engine.llm, [max(1, longest - b) for b in range(batch)])
    options = BeamOptions(beam_size=4, nbest=4, max_new_tokens=tokens, min_new_tokens=tokens)
    assert len(beam_search(engine, prefix, lengths, options)) == batch


def allocated() -> int:
    """Bytes; 0 without a GPU, where these tests show that nothing breaks."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def test_released_memory_is_free(engine: Engine, record_property: Callable[[str, object], None]) -> None:
    """Also what graphs hold, which ``memory_allocated`` alone may not show; the engine works on afterwards."""
    decode(engine, *BATCHES[0])  # what libraries keep for good
    engine.release()
    before = allocated()
    reserved = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    for batch in BATCHES[:3]:
        decode(engine, *batch)
    held = allocated() - before
    engine.release()
    record_property("mib_held", round(held / MIB, 1))
    record_property("mib_left_after_release", round((allocated() - before) / MIB, 2))
    assert allocated() - before <= MIB
    if torch.cuda.is_available():
        assert held > 0
        assert torch.cuda.memory_reserved() - reserved <= 64 * MIB
    decode(engine, *BATCHES[0])


def test_twenty_batches_do_not_grow(engine: Engine, record_property: Callable[[str, object], None]) -> None:
    """Shapes that come again find what was made for them, and nothing of an utterance stays."""
    engine.release()
    after: list[int] = []
    for at in range(20):
        decode(engine, *BATCHES[at % len(BATCHES)])
        after.append(allocated())
    record_property("mib_after_each_batch", [round(one / MIB, 1) for one in after])
    assert max(after[5:]) <= max(after[:5]) + MIB
    assert after[-1] <= after[9] + MIB


def test_too_little_memory_names_what_to_set(engine: Engine) -> None:
    """A batch that somebody chose is an error that names the option; ``auto`` goes on with smaller ones."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: a limit on its memory")
    speech: Any = SimpleNamespace(release=lambda: (engine.release(), True)[1], options=AnswerOptions())
    prefix, lengths = random_prefix(engine.llm, [1000] * 96)
    options = BeamOptions(beam_size=4, max_new_tokens=12, min_new_tokens=12)

    def work(rows: list[int]) -> int:
        return len(beam_search(engine, prefix[rows], lengths[rows], options))

    engine.release()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((allocated() + 400 * MIB) / whole)
    try:
        with pytest.raises(PamError, match=r"--batch_size.*memory is too small for 96 utterances"):
            list(in_batches(speech, [range(96)], work, None))
        sizes: list[list[int]] = []
        done = in_batches(speech, [range(96)], work, lambda batches: sizes.append([len(batch) for batch in batches]))
        assert sum(count for _, count in done) == 96 and max(sizes[-1]) < 96
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.release()
