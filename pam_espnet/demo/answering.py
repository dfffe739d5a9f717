"""A model behind the page: answers as they grow, and what is shown beside them.

Shape letter: N samples.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pam_espnet.data.audio import read_upload
from pam_espnet.data.format import Settings, as_formatted
from pam_espnet.data.tasks import TASKS
from pam_espnet.decode.answers import Answer
from pam_espnet.decode.long_recordings import MIN_SECONDS
from pam_espnet.decode.segments import Piece
from pam_espnet.decode.speech_llm import SpeechLLM
from pam_espnet.errors import ConfigError
from pam_espnet.serve.answers import PROMPT_LENGTH, Asked
from pam_espnet.serve.queue import DecodingQueue

PROMPTS = {spec.default_prompt: name for name, spec in TASKS.items()}  # prompt -> its task
NAME = "recording"  # in messages
NOTHING = "(nothing)"  # an empty answer among its alternatives


@dataclass(frozen=True)
class View:
    """What is shown of an answer; while it grows, its text alone."""

    text: str
    encoders: Mapping[str, float] = field(default_factory=dict)  # weight of each; all add up to 1
    layers: Mapping[str, float] = field(default_factory=dict)  # the same, divided among their layers
    alternatives: Mapping[str, float] = field(default_factory=dict)  # answer -> probability among those listed
    depths: list[tuple[str, str]] = field(
        default_factory=list
    )  # each token, and the number of the block that predicted it


class Answering:
    """A model that answers on a thread of its own, questions that come together in one batch.

    Args:
        speech: used by nothing else from now on; its n-best becomes as long as its beam.
        max_seconds: longest recording.

    Attributes:
        exits: early exit is on.
    """

    def __init__(self, speech: SpeechLLM, max_seconds: float) -> None:
        beam = speech.options.beam
        speech.options = replace(speech.options, beam=replace(beam, nbest=beam.beam_size))
        self.speech, self.exits = speech, speech.options.exit.mode != "never"
        self.settings = Settings(speech.model.frontend.sample_rate, "flac", max_seconds, MIN_SECONDS)
        self.queue = DecodingQueue(speech, lambda *_: None)

    def read(self, path: str | None) -> np.ndarray:
        """A recording (N,) as stage 2 would format it.
        Raises ConfigError: there is none; DataError: one that cannot be used."""
        if not path:
            raise ConfigError("record or upload something first")
        found = read_upload(Path(path).read_bytes(), NAME, self.settings.max_seconds)
        return as_formatted(NAME, *found, self.settings)

    async def views(self, path: str | None, prompt: str | None) -> AsyncIterator[View]:
        """The answer as it grows, then whole with all that is shown beside it. A task's default prompt is asked as
        that task, with its answer set. Raises PamError: there is none, see ``read``,
        ``checked``."""
        prompt, text = checked(prompt), ""
        wave = await asyncio.to_thread(self.read, path)
        piece = Piece(wave, 0.0, len(wave) / self.settings.sample_rate)
        asked = Asked.about(piece, prompt, PROMPTS.get(prompt, ""), growing=True)
        assert asked.job is not None, "silent recordings were refused"
        self.queue.submit(asked.job)
        waiting = asked.job.answer
        try:
            async for more in asked.deltas():
                yield View(text := text + more)
            found = (await asked.segment()).answer
        finally:
            waiting.cancel()
        assert found is not None
        yield self.view(found)

    def view(self, answer: Answer) -> View:
        """All that is shown of an answer."""
        specs = self.speech.model.frontend.specs
        layers = {
            f"{name}, layer {layer}": weight
            for name, weights in answer.routing["layers"].items()
            for layer, weight in zip(specs[name].layers, weights, strict=True)
        }
        decode = self.speech.model.decoder.tokenizer.decode
        tokens = zip(answer.tokens[0], answer.depths[0], strict=True)
        depths = [(decode([token]), str(depth)) for token, depth in tokens] if self.exits else []
        return View(answer.texts[0], answer.routing["encoders"], layers, self._alternatives(answer), depths)

    def close(self) -> None:
        """End the thread."""
        self.queue.close()

    def _alternatives(self, answer: Answer) -> dict[str, float]:
        """Answer -> probability among those of its set, or of the n-best (by CTC and LLM, where both count)."""
        if answer.answer_log_probs is not None:
            return shares(answer.answer_log_probs.items())
        penalty = self.speech.options.beam.length_penalty
        nbest = zip(answer.texts, answer.scores, answer.tokens, strict=True)
        return shares((text, score * len(tokens) ** penalty) for text, score, tokens in nbest)


def checked(prompt: str | None) -> str:
    """A prompt without white space around it. Raises ConfigError: there is none, or a long one."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise ConfigError("ask something first")
    if len(prompt) > PROMPT_LENGTH:
        raise ConfigError(f"the prompt has {len(prompt)} characters; at most {PROMPT_LENGTH} are answered")
    return prompt


def shares(log_probs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Text -> its part of the probability of all; a text may come several times, made of other tokens."""
    pairs = [*log_probs]
    most = max(value for _, value in pairs)
    found: dict[str, float] = {}
    for text, value in pairs:
        found[text or NOTHING] = found.get(text or NOTHING, 0.0) + math.exp(value - most)
    return {text: value / sum(found.values()) for text, value in found.items()}
