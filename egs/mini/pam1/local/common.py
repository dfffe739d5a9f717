"""What the three tasks share: utterances, seeds, signal operations, and rendering many clips to FLAC files.

Every clip has its own random generator, seeded by its key, so a clip does not depend on the others, on the number of
processes, or on where a killed run stopped. Shape letter: N samples.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from recordings import SAMPLE_RATE

from pam_espnet.data.audio import RESAMPLER, resample, to_pcm16
from pam_espnet.fileio import atomic_path, read_json, write_json

SPLITS = ("train", "dev", "test")
FRAME = SAMPLE_RATE // 50  # samples of a 20 ms frame


@dataclass(frozen=True)
class Utterance:
    """One utterance of the corpus; ``references`` (several right answers) may be empty. ``seconds``: 0 = not known."""

    key: str
    split: str
    text: str
    speaker: str
    audio: str
    references: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """An utterance and what its task's ``render`` needs to make its audio."""

    utterance: Utterance
    spec: Any


def seeded(seed: int, key: str) -> np.random.Generator:
    """The random generator that belongs to ``key``."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big"))


# ---- signals --------------------------------------------------------------------------------------------------------


def frame_levels(wave: np.ndarray) -> np.ndarray:
    """Level of each 20 ms frame in dB relative to full scale; ``wave`` (N,)."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    return 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)


def speech_only(wave: np.ndarray, below_peak: float = 35.0) -> np.ndarray:
    """``wave`` (N,) without its pauses: frames ``below_peak`` dB quieter than the loudest one, save 0.1 s margins."""
    levels = frame_levels(wave)
    if not len(levels):
        return wave[:0]
    active = levels > levels.max() - below_peak
    keep = np.convolve(active, np.ones(11))[5 : 5 + len(active)] > 0.5  # and 5 frames on each side
    return wave[: len(keep) * FRAME][np.repeat(keep, FRAME)]


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """``wave`` (N,) played ``factor`` times as fast: tempo and pitch change together."""
    return resample(wave, round(SAMPLE_RATE * factor), SAMPLE_RATE)


def set_level(wave: np.ndarray, level: float, peak: float = 0.97) -> np.ndarray:
    """``wave`` (N,) scaled to ``level`` dB RMS re full scale, or less where its peak would pass ``peak``."""
    rms = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    highest = float(np.abs(wave).max(initial=0.0))
    if rms == 0.0:
        return wave
    return (wave * min(10 ** (level / 20) / rms, peak / highest)).astype(np.float32)


def fade(wave: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    """``wave`` (N,) with linear fades at both ends, so that a cut does not click."""
    size = min(round(seconds * SAMPLE_RATE), len(wave) // 2)
    ramp = np.linspace(0.0, 1.0, size, endpoint=False, dtype=np.float32)
    return np.concatenate([wave[:size] * ramp, wave[size : len(wave) - size], wave[len(wave) - size :] * ramp[::-1]])


def coloured_noise(rng: np.random.Generator, samples: int, slope: float = 1.0) -> np.ndarray:
    """Noise (N,) whose power falls as 1 / f**slope above 50 Hz (1 is pink), RMS 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(frequencies, 50.0) ** (-slope / 2)
    spectrum[0] = 0.0
    noise = np.fft.irfft(spectrum, samples)
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


# ---- rendering ------------------------------------------------------------------------------------------------------


def fingerprint(options: Any, seed: int, files: Sequence[Path]) -> str:
    """A digest of everything that decides a task's audio: options, seed, programs, tables, resampler."""
    digest = hashlib.sha256(f"{options} {seed} {RESAMPLER}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(arguments: tuple[Callable[[Any], np.ndarray], Job]) -> Utterance:
    """Make one clip unless its file is there; return the utterance with its duration."""
    render, job = arguments
    path = Path(job.utterance.audio)
    if path.exists():  # files are renamed into place, so one that exists is whole
        seconds = soundfile.info(path).duration
    else:
        samples, _ = to_pcm16(render(job.spec))
        seconds = len(samples) / SAMPLE_RATE
        with atomic_path(path) as tmp:
            soundfile.write(tmp, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return Utterance(**{**asdict(job.utterance), "seconds": seconds})


def build_task(
    task: str,
    folder: Path,
    key: str,
    plan: Callable[[], list[Job]],
    render: Callable[[Any], np.ndarray],
    jobs: int,
) -> list[Utterance]:
    """All utterances of one task; their audio is made where it is missing.

    Args:
        task: name for the progress bar.
        folder: the task's audio folder; emptied when what is in it was made with another ``key``.
        key: see ``fingerprint``.
        plan: lists what is to be made; called only when something is missing.
        render: makes the audio (N,) float32 at 16 kHz of one job's spec; a module-level function.
        jobs: number of processes.
    """
    from tqdm import tqdm

    started, manifest = folder / "started.json", folder / "utterances.json"
    if folder.exists() and (not started.exists() or read_json(started) != key):
        print(f"{task}: options or programs have changed; making {folder} anew", flush=True)
        shutil.rmtree(folder)
    if manifest.exists():
        done = [Utterance(**{**entry, "references": tuple(entry["references"])}) for entry in read_json(manifest)]
        if all(Path(utterance.audio).exists() for utterance in done):
            print(f"{task}: {len(done)} utterances are there already", flush=True)
            return done
    write_json(started, key)
    todo = [(render, job) for job in plan()]
    # spawn: a forked child of a process with threads can hang
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        made = list(tqdm(pool.imap(_write, todo, chunksize=8), total=len(todo), desc=task, unit="clip"))
    write_json(manifest, [asdict(utterance) for utterance in made])
    return made
