"""Training clips by LibriCount's construction, from readers of LibriSpeech's training (and dev) sets.

A clip lasts 5 s and has 0 to 10 voices, all different, all at the same power (0 dB). Each voice lasts from the first
sample (what comes before is cut away) to the last one with the pauses it has, and is joined from several utterances
where one is too short. The label is the largest number of voices that are active at once; a mixture in which
that is less than the number of its voices is drawn again. Shape letter: N samples.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from libricount import MOST

from pam_espnet.data.audio import read_audio, resample
from pam_espnet.data.librispeech import Spoken
from pam_espnet.data.mixtures import (
    add_voices,
    at_random_level,
    background,
    choose_voices,
    empty_clip,
    most_at_once,
    over_noise,
)
from pam_espnet.data.rendering import Job, Utterance, seeded
from pam_espnet.data.signals import SAMPLE_RATE, fade, trim_start
from pam_espnet.errors import DataError

SECONDS = 5.0
SHORTEST = 0.5  # seconds of an utterance behind its first word; a shorter one is left out
PER_VOICE = 4  # utterances to choose from for each voice of a clip
DRAWS = 20  # mixtures tried until all voices are active at once
LEVEL = (-33.0, -17.0)  # dB RMS of a clip; LibriCount's own levels are not documented

Spec = tuple[int, str, list[list[str]], list[str]]


def plan(
    utterances: dict[str, list[Spoken]], clips: dict[str, int], noises: list[str], folder: Path, seed: int
) -> tuple[list[Job], dict[str, list[str]], dict[str, list[str]]]:
    """What to make.

    Args:
        utterances: {split: utterances of LibriSpeech}.
        clips: {split: clips for each number of voices}.
        noises: recordings for clips without voices; none: made noise.
        folder: for the audio.
        seed: of everything random.

    Returns:
        (jobs, {clip: its speakers}, {clip: utterances that it may have been cut from}).

    Raises:
        DataError: a split has fewer than ten readers.
    """
    jobs: list[Job] = []
    speakers: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}
    for split, number in clips.items():
        spoken: dict[str, list[Spoken]] = {}
        for utterance in utterances[split]:
            spoken.setdefault(utterance.speaker, []).append(utterance)
        if len(spoken) < MOST:
            hint = "choose a larger --size"
            raise DataError(f"{split} set", f"has {len(spoken)} readers, and {MOST} are mixed in a clip", hint=hint)
        voices = {speaker: speaker for speaker in spoken}
        for index in range(number * (MOST + 1)):
            key, count = f"mix-{split}-{index:06d}", index % (MOST + 1)
            rng = seeded(seed, key)
            speakers[key] = choose_voices(rng, voices, count)
            drawn = [_draw(rng, spoken[speaker]) for speaker in speakers[key]]
            sources[key] = [utterance.key for own in drawn for utterance in own]
            spec: Spec = (seed, key, [[utterance.path for utterance in own] for own in drawn], noises)
            audio = folder / split / f"{key}.flac"
            jobs.append(Job(Utterance(key, split, str(count), key, str(audio)), spec))
    return jobs, speakers, sources


def _draw(rng: np.random.Generator, utterances: list[Spoken]) -> list[Spoken]:
    number = min(PER_VOICE, len(utterances))
    return [utterances[row] for row in rng.choice(len(utterances), size=number, replace=False)]


@lru_cache(maxsize=64)
def _speech(path: str) -> np.ndarray:
    wave, rate = read_audio(path)
    return trim_start(resample(wave, rate, SAMPLE_RATE))


def voice(rng: np.random.Generator, paths: list[str], samples: int) -> np.ndarray:
    """One reader from the first word on: (N,), N = ``samples``; the utterances in random order, again where needed.

    Raises:
        DataError: there is no speech in any of them.
    """
    order = [_speech(paths[row]) for row in rng.permutation(len(paths))]
    order = [wave for wave in order if len(wave) >= SHORTEST * SAMPLE_RATE]
    if not order:
        raise DataError(paths[0], "has no speech, nor have others of this reader", hint="unpack LibriSpeech again")
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < samples:
        parts.append(fade(order[len(parts) % len(order)]))
    return fade(np.concatenate(parts)[:samples])


def render(spec: Spec) -> np.ndarray:
    """The mixture of one clip: (N,) float32, N = 5 s.

    Raises:
        DataError: in no mixture drawn are all voices active at once.
    """
    seed, key, voices, noises = spec
    rng = seeded(seed, f"{key} audio")
    samples = round(SECONDS * SAMPLE_RATE)
    if not voices:
        noise = background(rng, samples)
        if noises:
            wave, rate = read_audio(noises[rng.integers(len(noises))])
            noise = over_noise(resample(wave, rate, SAMPLE_RATE), noise)
        return empty_clip(rng, noise)
    for _ in range(DRAWS):
        streams = [voice(rng, paths, samples) for paths in voices]
        if most_at_once(streams) == len(voices):
            return at_random_level(rng, add_voices(streams), LEVEL)
    raise DataError(voices[0][0], f"{key}: its {len(voices)} voices are never active at once", hint="change --seed")
