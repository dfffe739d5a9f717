"""Speech recognition: English telephone prompts with their transcripts, split by text, and acted lines of a game.

Test is prompts of the one studio voice, and ``test_voices`` lines of voices that are in no other set. Dev is prompts
and lines; training has the other prompts and lines, the English picture captions, the LibriVox sentences and, where the
size says so, synthetic speech. No normalised text is in two sets, nor a text of three or more words inside a text of
another set.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import game
import numpy as np
import synthetic
from recordings import Clip, asterisk_english, librivox, read_16k, tuxpaint_english
from text import normalise

from pam_espnet.data.rendering import SPLITS, Job, Utterance, seeded
from pam_espnet.data.signals import SAMPLE_RATE, change_speed, set_level

MAX_SECONDS = 20.0  # of a prompt; longer ones (menus read aloud) are left out
MAX_SPLICE_SECONDS = 15.0
MAX_GROUP = 6  # a larger family of texts goes to training whole
LEVEL = -23.0  # dB RMS
SYNTHETIC_SPEEDS = (0.85, 1.15)  # as count's pseudo-speakers: pitch and formants move with it

Piece = Path | synthetic.Spoken  # a recording, or what is to be synthesised


def group_texts(texts: list[str]) -> dict[str, str]:
    """Map each distinct text to its group's name: texts that contain one another (three or more words) share one."""
    distinct = sorted(set(texts))
    parent = {text: text for text in distinct}

    def root(text: str) -> str:
        while parent[text] != text:
            text = parent[text]
        return text

    for inner in distinct:
        if len(inner.split()) < game.MIN_SHARED_WORDS:
            continue
        for outer in distinct:
            if inner != outer and f" {inner} " in f" {outer} ":
                first, second = sorted((root(inner), root(outer)))
                parent[second] = first
    return {text: root(text) for text in distinct}


def split_texts(candidates: list[str], train_only: list[str], test: int, dev: int) -> dict[str, str]:
    """Map each distinct text to train, dev or test.

    Groups are taken in the order of their SHA-256 until ``test``, then ``dev`` clips are reached. Training keeps large
    groups, single letters, and every group with a text of ``train_only``.

    Args:
        candidates: texts of the clips that may be held out, one per clip.
        train_only: texts of the other clips.
    """
    groups = group_texts(candidates + train_only)
    sizes = Counter(groups[text] for text in candidates)
    barred = {groups[text] for text in train_only} | {groups[text] for text in candidates if len(text) == 1}
    split: dict[str, str] = {}
    counts = {"test": 0, "dev": 0}
    for group in sorted(set(groups.values()), key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        wanted = "test" if counts["test"] < test else "dev" if counts["dev"] < dev else "train"
        if group in barred or sizes[group] > MAX_GROUP or wanted == "train":
            split[group] = "train"
        else:
            split[group] = wanted
            counts[wanted] += sizes[group]
    return {text: split[group] for text, group in groups.items()}


def read_clips(downloads: Path, limit: int | None = None) -> list[tuple[Clip, str]]:
    """All clips with their normalised text; ``limit`` keeps the first of each package (tests of the machinery)."""
    sources = (asterisk_english(downloads), tuxpaint_english(downloads), librivox(downloads))
    return [(clip, normalise(clip.text)) for clips in sources for clip in clips[:limit]]


def clip_seconds(path: Path) -> float:
    """Duration; G.722 is 64 kbit/s without a header, so its size tells."""
    import soundfile

    return path.stat().st_size / 8000 if path.suffix == ".g722" else soundfile.info(path).duration


def plan(downloads: Path, folder: Path, options: dict[str, Any], seed: int, tables: Path) -> list[Job]:
    """What to make: every clip once, then copies at other speeds and splices for training, then lines of the game, then
    synthetic speech."""
    clips = [(clip, text) for clip, text in read_clips(downloads, options.get("limit")) if text]
    clips = [(clip, text) for clip, text in clips if clip_seconds(clip.path) <= MAX_SECONDS]
    held = [text for clip, text in clips if clip.source == "asterisk-en"]
    other = [text for clip, text in clips if clip.source != "asterisk-en"]
    split = split_texts(held, other, options["test"], options["dev"])

    def job(key: str, split_name: str, text: str, speaker: str, pieces: list[Piece], speed: float, gap: float) -> Job:
        audio = folder / split_name / f"{key}.flac"
        return Job(Utterance(key, split_name, text, speaker, str(audio)), (pieces, speed, gap))

    jobs, train = [], []
    for clip, text in clips:
        speaker = f"asr-{clip.source}"
        key = f"{speaker}-{re.sub(r'[^A-Za-z0-9_-]', '_', clip.name)}"
        jobs.append(job(key, split[text], text, speaker, [clip.path], 1.0, 0.0))
        if split[text] == "train":
            train.append((clip, text))
            for speed in options["speeds"]:
                name = f"{speaker}-sp{speed}"
                jobs.append(job(name + key.removeprefix(speaker), "train", text, name, [clip.path], speed, 0.0))
    # splices: of the voice that has long stretches of like-sounding prompts
    voice = [(clip, text) for clip, text in train if clip.source == "asterisk-en"]
    for index in range(options["splices"]):
        key = f"asr-splice-{index:05d}"
        rng = seeded(seed, key)
        while True:
            chosen = [voice[number] for number in rng.choice(len(voice), size=rng.integers(2, 4), replace=False)]
            speed = float(rng.choice([1.0, *options["speeds"]]))
            gap = float(rng.uniform(0.2, 0.5))
            seconds = sum(clip_seconds(clip.path) / speed + gap for clip, _ in chosen)
            if seconds <= MAX_SPLICE_SECONDS:
                break
        text = " ".join(text for _, text in chosen)
        jobs.append(job(key, "train", text, "asr-splice", [clip.path for clip, _ in chosen], speed, gap))
    prompts = {side: [text for _, text in clips if split[text] == side] for side in SPLITS}
    held = game.Side()
    for side, lines in game.plan(downloads, folder, prompts, options["game"], tables).items():
        if side != "train":
            held.add([*prompts[side], *(text for _, text, _ in lines)])
        for line, text, path in lines:
            speaker = f"asr-game-{line.voice}"
            set_name = "test_voices" if side == "test" else side
            jobs.append(job(f"{speaker}-{line.name}", set_name, text, speaker, [path], 1.0, 0.0))
    for index, (text, spoken) in enumerate(synthetic.plan(downloads, options["synthetic"], held.touches)):
        key, speaker = f"asr-synthetic-{index:05d}", f"asr-flite-{spoken.voice}"
        speed = float(seeded(seed, key).uniform(*SYNTHETIC_SPEEDS))
        jobs.append(job(key, "train", text, speaker, [spoken], speed, 0.0))
    return jobs


def render(spec: tuple[list[Piece], float, float]) -> np.ndarray:
    """The pieces one after another, ``gap`` seconds apart, each at the same level; (N,) float32."""
    pieces, speed, gap = spec
    spoken = [read_16k(piece) if isinstance(piece, Path) else synthetic.synthesise(piece) for piece in pieces]
    waves = [set_level(change_speed(wave, speed), LEVEL) for wave in spoken]
    silence = np.zeros(round(gap * SAMPLE_RATE), np.float32)
    parts = [part for wave in waves for part in (wave, silence)]
    return np.concatenate(parts[:-1])
