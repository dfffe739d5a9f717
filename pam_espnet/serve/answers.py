"""From the bytes of a request to its answers, whole or as they grow, through the queue.

A recording that is too long to be answered as a whole is cut at pauses, as ``pam_inference`` does; of its pieces only a
few wait at once, so that others get their turn and memory does not grow with the length.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from pam_espnet.data.audio import TooLong, read_upload
from pam_espnet.data.audio_stream import stated_seconds, stream_audio
from pam_espnet.data.format import Settings, as_formatted
from pam_espnet.decode.answers import PartialAnswer
from pam_espnet.decode.long_recordings import MAX_SECONDS, MIN_SECONDS, Segment, cut_blocks, formatted_piece
from pam_espnet.decode.segments import Piece
from pam_espnet.serve.queue import DecodingQueue, Job

READERS = 2  # threads that read recordings
TOGETHER = 16  # pieces of one recording that are submitted at once, while as many may wait
NAME = "file"  # of a recording in messages
PROMPT_LENGTH = 2000  # characters, the most that a stranger may ask


@dataclass
class Recording:
    """A file that a client sent."""

    content: bytes
    cut: bool | None = None  # at pauses; None: if it is too long to be answered as a whole; False: it is refused then
    seconds: float = 0.0  # of it that were read; its length when the last answer is there


class Answers:
    """Reads recordings on a few threads and asks a queue about them.

    Args:
        max_seconds: longest recording.
    """

    def __init__(self, queue: DecodingQueue, max_seconds: float) -> None:
        self.queue, self.max_seconds = queue, max_seconds
        rate = queue.speech.model.frontend.sample_rate
        self._settings = Settings(rate, "flac", min(max_seconds, MAX_SECONDS), MIN_SECONDS)
        self._readers = ThreadPoolExecutor(READERS, "reading")

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)
        self.queue.close()

    async def segments(
        self, recording: Recording, prompt: str, task: str, growing: bool = False
    ) -> AsyncIterator[str | Segment]:
        """The answers about a recording in their order; where this ends early, what waits is withdrawn.

        Args:
            task: "": none.
            growing: before a segment the pieces of its text, each once it cannot change any more. All pieces join to
                the segments' texts with spaces between them.

        Raises DataError: a recording that cannot be used; PamError: no answer.
        """
        loop = asyncio.get_running_loop()
        pieces, more, space = self._pieces(recording), True, ""
        pending: deque[Asked] = deque()
        try:
            while more or pending:
                if more and len(pending) <= TOGETHER:
                    some = await loop.run_in_executor(self._readers, _some, pieces)
                    more = len(some) == TOGETHER
                    asked = [Asked.about(piece, prompt, task, growing) for piece in some]
                    pending += asked
                    self.queue.submit(*(one.job for one in asked if one.job is not None))
                    continue
                one = pending[0]
                async for text in one.deltas():
                    yield space + text
                    space = ""
                found = await one.segment()
                space = " " if found.text else space
                pending.popleft()
                yield found
        finally:
            for one in pending:
                if one.job is not None:
                    one.job.answer.cancel()

    def _pieces(self, recording: Recording) -> Iterator[Piece]:
        """Those of a recording with the 16 bits of stage 2; (0,) where silent."""
        speech, settings = self.queue.speech, self._settings
        if not recording.cut:
            try:
                wave = as_formatted(NAME, *read_upload(recording.content, NAME, settings.max_seconds), settings)
            except TooLong:
                if recording.cut is False or self.max_seconds <= MAX_SECONDS:
                    raise
            else:
                recording.seconds = len(wave) / settings.sample_rate
                yield Piece(wave, 0.0, recording.seconds)
                return
        with tempfile.NamedTemporaryFile(prefix="pam_serve_") as file:
            file.write(recording.content)
            file.flush()
            if (stated := stated_seconds(file.name) or 0) > self.max_seconds:
                raise TooLong(NAME, stated, self.max_seconds)
            for piece in cut_blocks(speech, self._blocks(file.name, recording), None, settings.max_seconds):
                yield replace(piece, wave=formatted_piece(speech, piece, NAME))

    def _blocks(self, path: str, recording: Recording) -> Iterator[np.ndarray]:
        """Of a file with a recording, which is timed. Raises TooLong: its header said less, or nothing."""
        rate, samples = self._settings.sample_rate, 0
        for block in stream_audio(path, rate):
            samples += len(block)
            recording.seconds = samples / rate
            if round(recording.seconds, 2) > self.max_seconds:  # resampling may round up
                raise TooLong(NAME, recording.seconds, self.max_seconds)
            yield block


@dataclass
class Asked:
    """A piece that was asked about."""

    piece: Piece
    job: Job | None  # None: it is silent
    texts: asyncio.Queue[str | None]  # what cannot change any more, after each step; None: that was all

    @classmethod
    def about(cls, piece: Piece, prompt: str, task: str, growing: bool) -> Asked:
        """With a job that is not submitted yet; without ``growing`` there are no texts."""
        loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def show(partial: PartialAnswer) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, partial.settled_text)

        job = Job(piece.wave, prompt, task, show if growing else None) if len(piece.wave) else None
        if job is None or not growing:
            texts.put_nowait(None)
        else:
            job.answer.add_done_callback(lambda _: loop.call_soon_threadsafe(texts.put_nowait, None))
        return cls(piece, job, texts)

    async def deltas(self) -> AsyncIterator[str]:
        """Text that was added, until the answer is whole."""
        sent = ""
        while (text := await self.texts.get()) is not None:
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text

    async def segment(self) -> Segment:
        """The answer, when it is there. Raises PamError: there is none."""
        if self.job is None:
            return Segment(self.piece.start, self.piece.end, "", None)
        try:
            answer = await asyncio.wrap_future(self.job.answer)
        finally:
            self.job = None  # else an error, its frames, this, the job and the error would be a cycle
        return Segment(self.piece.start, self.piece.end, answer.texts[0], answer)


def _some(pieces: Iterator[Piece]) -> list[Piece]:
    return list(islice(pieces, TOGETHER))
