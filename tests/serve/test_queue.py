"""Jobs that wait are answered together, each as it is alone; what fails or is withdrawn costs no other its answer."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import numpy as np
import pytest
import torch
from served import until

from pam_espnet.decode.answers import PartialAnswer
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError, PamError
from pam_espnet.serve import queue as module
from pam_espnet.serve.queue import DecodingQueue, Job

PROMPTS = ("Describe the sounds.", "Transcribe the speech.", "How many people are speaking?")


class Watched:
    """A queue, whose thread waits before a batch while ``go`` is cleared; ``sizes`` of its batches."""

    def __init__(self, speech: SpeechLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.go, self.begun = threading.Event(), threading.Event()
        answer = speech.answer
        self.fail: Callable[[list[np.ndarray]], None] = lambda waves: None

        def held(waves: Any, *args: Any, **more: Any) -> Any:
            self.begun.set()
            assert self.go.wait(30)
            self.fail(waves)
            return answer(waves, *args, **more)

        monkeypatch.setattr(speech, "answer", held)
        self.queue = DecodingQueue(speech, lambda size, audio, took: self.sizes.append(size))

    def submit(self, *jobs: Job) -> None:
        for job in jobs:
            self.queue.submit(job)

    def hold_one(self, job: Job) -> None:
        """The thread is busy with ``job``, so that what comes now waits."""
        self.submit(job)
        assert self.begun.wait(30)


@pytest.fixture
def watched(speech: SpeechLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    found = Watched(speech, monkeypatch)
    yield found
    found.go.set()
    found.queue.close()
    assert "decoding" not in [thread.name for thread in threading.enumerate()]


def jobs(tone: Callable[..., np.ndarray], count: int) -> list[Job]:
    return [Job(tone(0.5 + 0.1 * i, 200 + 90 * i), PROMPTS[i % 3], ("", "asr", "count")[i % 3]) for i in range(count)]


def test_what_waits_is_answered_together_as_it_is_alone(
    watched: Watched, speech: SpeechLLM, tone: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = jobs(tone, 11)
    watched.hold_one(asked[0])
    watched.submit(*asked[1:])
    assert len(watched.queue) == 10
    watched.go.set()
    found = [job.answer.result(30) for job in asked]
    monkeypatch.undo()
    alone = [speech.answer([job.wave], [job.prompt], [job.task])[0] for job in asked]
    assert [one.texts for one in found] == [one.texts for one in alone]
    watched.queue.close()
    assert watched.sizes == [1, 8, 2] and len(watched.queue) == 0 and watched.queue.pace > 0


def test_text_that_is_shown_never_changes(watched: Watched, tone: Callable[..., np.ndarray]) -> None:
    shown: list[list[PartialAnswer]] = [[], []]
    asked = jobs(tone, 3)
    asked[1].show, asked[2].show = shown[0].append, shown[1].append
    watched.hold_one(asked[0])
    watched.submit(*asked[1:])
    watched.go.set()
    for job, partials in zip(asked[1:], shown, strict=True):
        tokens = job.answer.result(30).tokens[0]
        assert partials[-1].done and partials[-1].settled_text == job.answer.result().texts[0]
        for one in partials:
            assert one.tokens[: one.settled] == tokens[: one.settled]


def test_a_withdrawn_job_frees_its_place_at_once(watched: Watched, tone: Callable[..., np.ndarray]) -> None:
    asked = jobs(tone, 4)
    watched.hold_one(asked[0])
    watched.submit(*asked[1:])
    asked[2].answer.cancel()
    assert len(watched.queue) == 2
    watched.go.set()
    assert all(asked[i].answer.result(30).texts for i in (0, 1, 3))
    watched.queue.close()
    assert watched.sizes == [1, 2]


def test_a_batch_that_nobody_waits_for_ends_at_its_next_step(
    watched: Watched, speech: SpeechLLM, tone: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    monkeypatch.setattr(speech, "_show", lambda on_partial, found: steps.append(len(found)) or on_partial([]))
    first, second = jobs(tone, 2)
    watched.hold_one(first)
    first.answer.cancel()
    watched.go.set()
    watched.submit(second)
    assert second.answer.result(30).texts
    taken = len(second.answer.result().tokens[0])
    assert len(steps) <= 1 + taken + 1  # of the first: one
    assert watched.queue.healthy


def test_an_error_about_one_costs_no_other_its_answer(watched: Watched, tone: Callable[..., np.ndarray]) -> None:
    asked = jobs(tone, 4)
    watched.fail = lambda waves: _raise(ConfigError("not this")) if len(asked[2].wave) in map(len, waves) else None
    watched.hold_one(asked[0])
    watched.submit(*asked[1:])
    watched.go.set()
    with pytest.raises(ConfigError, match="not this"):
        asked[2].answer.result(30)
    assert all(asked[i].answer.result(30).texts for i in (0, 1, 3)) and watched.queue.healthy


def test_after_a_failure_the_thread_goes_on(watched: Watched, tone: Callable[..., np.ndarray]) -> None:
    bad, good = jobs(tone, 2)
    watched.go.set()
    watched.fail = lambda waves: _raise(RuntimeError("a bug"))
    watched.submit(bad)
    with pytest.raises(RuntimeError, match="a bug"):
        bad.answer.result(30)
    assert not watched.queue.healthy
    watched.fail = lambda waves: None
    watched.submit(good)
    assert good.answer.result(30).texts
    watched.queue.close()
    assert watched.queue.healthy


def test_batches_shrink_where_a_gpu_has_too_little_memory(
    watched: Watched, speech: SpeechLLM, tone: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, tried = jobs(tone, 9), []

    def limited(waves: list[np.ndarray]) -> None:
        tried.append(len(waves))
        if len(waves) > 2 or len(asked[8].wave) in map(len, waves):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(speech, "on_gpu", True)
    monkeypatch.setitem(speech.__dict__, "free_memory", 1 << 40)
    watched.fail = limited
    watched.hold_one(asked[0])
    watched.submit(*asked[1:])
    watched.go.set()
    assert all(job.answer.result(30).texts for job in asked[:8])
    with pytest.raises(PamError, match="too small for this utterance alone"):
        asked[8].answer.result(30)
    assert tried[:4] == [1, 8, 4, 2] and watched.queue.healthy
    late = jobs(tone, 6)
    before = len(tried)
    watched.submit(*late)
    assert all(job.answer.result(30).texts for job in late)
    assert max(tried[before:]) <= 2  # it has learnt


def test_what_is_settled_is_freed_at_once(
    watched: Watched, tone: Callable[..., np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    """Without the garbage collector: answered, refused, failed, withdrawn before it was decoded and meanwhile."""

    def refuse(waves: list[np.ndarray]) -> None:
        raise ConfigError("not this")

    def break_down(waves: list[np.ndarray]) -> None:
        raise RuntimeError("a bug")

    def known(asked: list[Job]) -> list[weakref.ref[Job]]:
        return [weakref.ref(job) for job in asked]

    def freed(found: list[weakref.ref[Job]]) -> bool:
        return all(one() is None for one in found)

    caplog.set_level(logging.CRITICAL)  # pytest would keep what is logged, and so its frames
    gc.disable()
    try:
        watched.go.set()
        for fail in (lambda waves: None, refuse, break_down):
            watched.fail = fail
            asked = jobs(tone, 3)
            before = known(asked)
            watched.submit(*asked)
            assert not wait([job.answer for job in asked], 30).not_done
            del asked
            until(lambda before=before: freed(before))
        watched.fail = lambda waves: None
        watched.go.clear()
        watched.begun.clear()
        asked = jobs(tone, 3)
        before = known(asked)
        watched.hold_one(asked[0])
        watched.submit(*asked[1:])
        while asked:
            asked.pop().answer.cancel()
        assert freed(before[1:]) and not freed(before[:1])
        watched.go.set()
        until(lambda: freed(before))
    finally:
        gc.enable()


def test_closing_cancels_what_waits_and_what_is_decoded(watched: Watched, tone: Callable[..., np.ndarray]) -> None:
    asked = jobs(tone, 3)
    watched.hold_one(asked[0])
    watched.submit(*asked[1:])
    closing = threading.Thread(target=watched.queue.close)
    closing.start()
    with pytest.raises(CancelledError):
        asked[2].answer.result(30)
    watched.go.set()
    closing.join(30)
    assert not closing.is_alive() and len(watched.queue) == 0
    late = jobs(tone, 1)[0]
    watched.submit(late)
    for job in (asked[0], late):
        with pytest.raises(CancelledError):
            job.answer.result(30)


def test_prompts_without_end_are_forgotten(
    watched: Watched, speech: SpeechLLM, tone: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PROMPTS", 3)
    watched.go.set()
    for number in range(9):
        job = Job(tone(0.5, 300), f"What is number {number}?", "")
        watched.submit(job)
        job.answer.result(30)
    watched.queue.close()
    assert len(speech.model.decoder._prompt_vectors) <= 3


def _raise(error: Exception) -> None:
    raise error
