"""Captioning: real named sounds alone, one after another, and at the same time; captions by templates.

The sounds and their split are listed in sounds.yaml: recordings of dev and test are not those of training, their
classes are. A training clip has one caption of random wording; a dev or test clip has five, the first of which is its
``text``.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from recordings import read_16k, sound_path

from pam_espnet.config import load_yaml
from pam_espnet.data.rendering import SPLITS, Job, Utterance, seeded
from pam_espnet.data.signals import SAMPLE_RATE, change_speed, coloured_noise, fade, set_level, speech_only

SCENES = ("alone", "sequence", "overlap")
SCENE_SHARES = (0.4, 0.3, 0.3)
CLIP_SECONDS = (5.0, 10.0)
EVENT_SECONDS = (1.2, 4.0)  # a shorter recording is repeated, a longer one cut
SPEEDS = (0.94, 1.06)  # training only
LEVEL = (-26.0, -20.0)  # dB RMS of an event
FLOOR = (-65.0, -55.0)  # dB RMS of the background noise

# {a}, {b}: the first phrase of a sound, {A}, {B}: the second one
TEMPLATES = {
    "alone": ("{a}", "{A}", "the sound of {a}", "{a} can be heard", "a recording of {a}"),
    "sequence": (
        "{a} followed by {b}",
        "first {a} and then {b}",
        "{a} and after that {b}",
        "{A} followed by {B}",
        "{a} before {b}",
    ),
    "overlap": (
        "{a} and {b} at the same time",
        "{a} together with {b}",
        "{b} and {a} at the same time",
        "{A} together with {B}",
        "{a} mixed with {b}",
    ),
}

Spec = tuple[int, str, str, str, list[str]]


def read_sounds(table: Path) -> dict[str, dict[str, list[str]]]:
    """sounds.yaml: {class: {phrases, train, dev, test}}."""
    return load_yaml(table)


def all_recordings(sounds: dict[str, dict[str, list[str]]]) -> list[str]:
    """Every recording that is listed in any class and split."""
    return [sound for entry in sounds.values() for split in SPLITS for sound in entry.get(split, [])]


def captions(scene: str, phrases: list[list[str]]) -> list[str]:
    """The five captions of a scene; ``phrases`` holds two wordings for each of its one or two sounds."""
    names = {"a": phrases[0][0], "A": phrases[0][1], "b": phrases[-1][0], "B": phrases[-1][1]}
    return [template.format(**names) for template in TEMPLATES[scene]]


def plan(downloads: Path, folder: Path, options: dict[str, Any], seed: int, tables: Path) -> list[Job]:
    """What to make: for each clip its scene and its sounds, every class of the split equally often (as first sound)."""
    sounds = read_sounds(tables / "sounds.yaml")
    jobs = []
    for split in SPLITS:
        classes = sorted(name for name, entry in sounds.items() if entry.get(split))
        order: list[str] = []
        shuffler = seeded(seed, f"caption-{split}")
        for index in range(options[split]):
            key = f"caption-{split}-{index:05d}"
            rng = seeded(seed, key)
            order = order or shuffler.permutation(classes).tolist()
            first = order.pop()
            scene = str(rng.choice(SCENES, p=SCENE_SHARES))
            names = [first]
            if scene != "alone":
                names.append(str(rng.choice([name for name in classes if name != first])))
            chosen = [sounds[name][split][rng.integers(len(sounds[name][split]))] for name in names]
            wordings = captions(scene, [sounds[name]["phrases"] for name in names])
            text = wordings[rng.integers(len(wordings))] if split == "train" else wordings[0]
            references = () if split == "train" else tuple(wordings)
            paths = [str(sound_path(downloads, sound)) for sound in chosen]
            audio = folder / split / f"{key}.flac"
            spec: Spec = (seed, key, split, scene, paths)
            jobs.append(Job(Utterance(key, split, text, key, str(audio), references), spec))
    return jobs


@lru_cache(maxsize=256)
def _sound(path: str) -> np.ndarray:
    return speech_only(read_16k(Path(path)), below_peak=45.0)


def event(rng: np.random.Generator, path: str, split: str) -> np.ndarray:
    """One sound of 1.2 to 4 s: a short recording is repeated with pauses, a long one cut at a random offset; (N,)."""
    wave = _sound(path)
    if split == "train":
        wave = change_speed(wave, rng.uniform(*SPEEDS))
    shortest, longest = (round(seconds * SAMPLE_RATE) for seconds in EVENT_SECONDS)
    if len(wave) > longest:
        start = int(rng.integers(0, len(wave) - longest + 1))
        wave = wave[start : start + longest]
    wave = fade(wave)
    parts = [wave]
    while sum(map(len, parts)) < shortest:
        parts += [np.zeros(round(rng.uniform(0.1, 0.4) * SAMPLE_RATE), np.float32), wave]
    return set_level(np.concatenate(parts), rng.uniform(*LEVEL))


def render(spec: Spec) -> np.ndarray:
    """The audio of one clip, 5 to 10 s: (N,) float32."""
    seed, key, split, scene, paths = spec
    rng = seeded(seed, f"{key} audio")
    events = [event(rng, path, split) for path in paths]
    starts = [0]
    if scene == "sequence":
        starts.append(len(events[0]) + round(rng.uniform(0.2, 0.8) * SAMPLE_RATE))
    elif scene == "overlap":
        # at least half of the shorter sound overlaps with the other one
        shorter = min(map(len, events))
        starts.append(int(rng.integers(0, len(events[0]) - shorter // 2)))
    length = max(start + len(wave) for start, wave in zip(starts, events, strict=True))
    samples = max(length, round(CLIP_SECONDS[0] * SAMPLE_RATE))
    samples = min(samples + round(rng.uniform(0.0, 1.0) * SAMPLE_RATE), round(CLIP_SECONDS[1] * SAMPLE_RATE))
    offset = int(rng.integers(0, samples - length + 1))
    clip = coloured_noise(rng, samples) * 10 ** (rng.uniform(*FLOOR) / 20)
    for start, wave in zip(starts, events, strict=True):
        clip[offset + start : offset + start + len(wave)] += wave
    peak = np.abs(clip).max()
    return (clip * min(1.0, 0.97 / peak)).astype(np.float32)
