"""Waiting recordings, decoded together on one thread.

What waits when the thread is free becomes the next batch: nobody is kept waiting for company. An answer does not depend
on its batch, so it does not depend on who else asks. Shape letter: N samples.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from pam_espnet.decode.answers import Answer, PartialAnswer
from pam_espnet.decode.batches import MOST_UTTERANCES, in_batches, plan_batches
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import PamError

MOST_PROMPTS = 1000  # whose vectors are kept
PACE = 0.2  # weight of the newest batch in the mean time that a recording takes


@dataclass(eq=False)
class Job:
    """A recording and what is asked about it. Cancelling ``answer`` withdraws it."""

    wave: np.ndarray  # (N,) float32 at the model's sample rate
    prompt: str
    task: str  # "": none
    show: Callable[[PartialAnswer], None] | None = None  # called on the decoding thread after every step
    answer: Future[Answer] = field(default_factory=Future)

    def settle(self, found: Answer | Exception) -> None:
        """Set the answer, or why there is none, unless it was withdrawn. An error loses its traceback, which would keep
        this job."""
        with suppress(InvalidStateError):
            if isinstance(found, Exception):
                self.answer.set_exception(found.with_traceback(None))
            else:
                self.answer.set_result(found)


class _Abandoned(Exception):
    """Nobody waits for a batch any more."""


class DecodingQueue:
    """A thread that answers jobs in the order in which they came, as many together as ``plan_batches`` allows.

    Args:
        speech: used by this thread alone from now on.
        observe: called after each batch: recordings, their seconds of audio, seconds that it took.

    Attributes:
        healthy: the last batch did not end in an error of the program or the device.
        pace: seconds that one recording took lately.
    """

    def __init__(self, speech: SpeechLLM, observe: Callable[[int, float, float], None]) -> None:
        self.speech, self.observe = speech, observe
        self.healthy, self.pace = True, 0.0
        self._waiting: dict[Future[Answer], Job] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._most = MOST_UTTERANCES  # of a batch; less once a GPU's memory was too small for it
        self._thread = threading.Thread(target=self._run, name="decoding")
        self._thread.start()

    def __len__(self) -> int:
        """Jobs that wait; those that are being decoded are not counted."""
        return len(self._waiting)

    def submit(self, *jobs: Job) -> None:
        """Put jobs at the end; they are cancelled where the queue is closed."""
        with self._changed:
            if not self._closed:
                self._waiting |= {job.answer: job for job in jobs}
                self._changed.notify()
        for job in jobs:
            if self._closed:
                job.answer.cancel()
            job.answer.add_done_callback(self._withdraw)

    def close(self) -> None:
        """Cancel what waits, abandon what is being decoded, and wait for the thread to end."""
        with self._changed:
            self._closed = True
            left = [*self._waiting]
            self._changed.notify()
        for answer in left:
            answer.cancel()
        self._thread.join()

    def _withdraw(self, answer: Future[Answer]) -> None:
        with self._changed:
            self._waiting.pop(answer, None)  # None: it is being decoded, or done

    def _run(self) -> None:
        if self.speech.on_gpu and torch.device(self.speech.device).index is not None:  # each thread has its own
            torch.cuda.set_device(self.speech.device)
        while self._wait():
            self._next_batch()  # its variables must not outlive it: they hold recordings

    def _wait(self) -> bool:
        """Whether there is a job; False once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return not self._closed

    def _next_batch(self) -> None:
        if not (jobs := self._take()):
            return
        began = time.perf_counter()
        self._decode(jobs)
        took = time.perf_counter() - began
        self.pace += PACE * (took / len(jobs) - self.pace)
        self.observe(len(jobs), sum(map(self._seconds, jobs)), took)
        self.speech.forget_prompts(MOST_PROMPTS)

    def _take(self) -> list[Job]:
        """The next batch; none where all that waited was withdrawn."""
        with self._changed:
            jobs = [*self._waiting.values()]
        if not jobs:
            return []
        try:
            size = plan_batches(self.speech, [job.prompt for job in jobs], [self._seconds(job) for job in jobs])[0]
        except PamError:  # a prompt that cannot be asked: alone it gets its error
            size = 1
        with self._changed:  # some may have been withdrawn
            return [job for job in jobs[: min(size, self._most)] if self._waiting.pop(job.answer, None)]

    def _decode(self, jobs: list[Job]) -> None:
        """Settle all of them."""
        while jobs:
            done = 0
            try:
                tried = in_batches(self.speech, [jobs], self._answer, self._shrink, lambda _: "recording")
                for batch, answers in tried:
                    for job, found in zip(batch, answers, strict=True):
                        job.settle(found)
                    done += len(batch)
                self.healthy = True
            except _Abandoned:
                for job in jobs[done:]:
                    job.answer.cancel()
                done = len(jobs)
            except PamError as error:  # the GPU's memory is too small for this one alone
                jobs[done].settle(error)
                done += 1
            except Exception as error:
                logging.exception("decoding failed")
                self.healthy = False
                for job in jobs[done:]:
                    job.settle(error)
                done = len(jobs)
            jobs = jobs[done:]

    def _answer(self, jobs: list[Job]) -> list[Answer | PamError]:
        def show(partials: list[PartialAnswer]) -> None:
            if self._closed or all(job.answer.cancelled() for job in jobs):
                raise _Abandoned
            for one in partials:
                if (listener := jobs[one.utterance].show) is not None:
                    listener(one)

        waves, prompts, tasks = zip(*((job.wave, job.prompt, job.task) for job in jobs), strict=True)
        try:
            return [*self.speech.answer(waves, prompts, tasks, on_partial=show)]
        except PamError as error:  # about one of them, or about all
            if len(jobs) == 1:
                return [error]
        return [one for job in jobs for one in self._answer([job])]

    def _shrink(self, batches: list[list[Job]]) -> None:
        self._most = max(map(len, batches))

    def _seconds(self, job: Job) -> float:
        return len(job.wave) / self.speech.model.frontend.sample_rate
