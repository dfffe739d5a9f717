"""Speaker count after LibriCount (Stoeter, Chakrabarty, Edler, Habets: CountNet, 2018): 0 to 4 concurrent voices.

A clip is 5 s. Each voice talks from its first to its last sample (pauses are cut out, clips of one voice joined), all
voices at equal RMS (0 dB); the answer is the number of concurrent voices. Clips without a voice are soft noise or a
soft recording of something else. In training a voice is played up to 15 % slower or faster, as further speakers.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from recordings import read_16k, sound_path, voice_clips

from pam_espnet.config import load_yaml
from pam_espnet.data.mixtures import add_voices, at_random_level, background, choose_voices, empty_clip, over_noise
from pam_espnet.data.rendering import SPLITS, Job, Utterance, seeded
from pam_espnet.data.signals import SAMPLE_RATE, change_speed, fade, set_level, speech_only

SECONDS = 5.0
MAX_VOICES = 4
MIN_CLIP = 0.2  # seconds; shorter pieces of speech are clicks
SPEEDS = (0.85, 1.15)
FLOOR_BELOW = (35.0, 50.0)  # dB from the mix down to the noise floor
# classes of sounds.yaml that are long and no voices
BACKGROUND = ("water", "rain", "harbor", "machine", "cricket", "train", "car", "motorcycle", "vacuum", "shaker")

Spec = tuple[int, str, int, str, list[tuple[list[str], str]], list[str]]


def read_voices(table: Path) -> dict[str, dict[str, str]]:
    """voices.yaml: {split: {voice: group}}."""
    return load_yaml(table)


def plan(downloads: Path, folder: Path, options: dict[str, Any], seed: int, tables: Path) -> list[Job]:
    """What to make: for each clip its number of voices (all equally often) and who they are."""
    voices = read_voices(tables / "voices.yaml")
    sounds = load_yaml(tables / "sounds.yaml")
    jobs = []
    for split in SPLITS:
        clips = {voice: [str(path) for path in voice_clips(downloads, voice)] for voice in voices[split]}
        noises = [
            str(sound_path(downloads, sound))
            for name in BACKGROUND
            if name in sounds
            for sound in sounds[name].get(split, [])
        ]
        for index in range(options[split]):
            key = f"count-{split}-{index:05d}"
            rng = seeded(seed, key)
            number = index % (MAX_VOICES + 1)
            chosen = choose_voices(rng, voices[split], number)
            spec: Spec = (seed, key, number, split, [(clips[voice], voice) for voice in chosen], noises)
            audio = folder / split / f"{key}.flac"
            jobs.append(Job(Utterance(key, split, str(number), key, str(audio)), spec))
    return jobs


@lru_cache(maxsize=1024)
def _speech(path: str) -> np.ndarray:
    return speech_only(read_16k(Path(path)))


def talk(rng: np.random.Generator, paths: list[str], samples: int, speed: float) -> np.ndarray:
    """One voice talking without a pause: clips in random order, joined, cut to ``samples`` from a random offset."""
    wanted, parts, total = samples + SAMPLE_RATE // 2, [], 0
    while total < wanted:
        before = total
        for index in rng.permutation(len(paths)):
            speech = _speech(paths[index])
            if len(speech) >= MIN_CLIP * SAMPLE_RATE:
                # each clip at the same level, as volunteers recorded some of theirs far softer
                parts.append(fade(set_level(change_speed(speech, speed), -23.0)))
                total += len(parts[-1])
            if total >= wanted:
                break
        if total == before:
            raise ValueError(f"no speech in the recordings beside {paths[0]}")
    wave = np.concatenate(parts)
    start = int(rng.integers(0, len(wave) - samples + 1))
    return fade(wave[start : start + samples])


def render(spec: Spec) -> np.ndarray:
    """The mixture of one clip: (N,) float32, N = 5 s."""
    seed, key, number, split, voices, noises = spec
    rng = seeded(seed, f"{key} audio")
    samples = round(SECONDS * SAMPLE_RATE)
    noise = background(rng, samples)
    if number == 0:
        if noises and rng.random() < 0.5:
            recording = change_speed(read_16k(Path(noises[rng.integers(len(noises))])), rng.uniform(*SPEEDS))
            noise = over_noise(recording, noise)
        return empty_clip(rng, noise)
    streams = []
    for paths, _ in voices:
        speed = rng.uniform(*SPEEDS) if split == "train" else 1.0
        streams.append(talk(rng, paths, samples, speed))
    mix = add_voices(streams)
    return at_random_level(rng, mix + noise * 10 ** (-rng.uniform(*FLOOR_BELOW) / 20))
