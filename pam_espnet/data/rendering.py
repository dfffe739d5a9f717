"""Clips of a corpus that is rendered: one random generator per clip, several processes, nothing made twice.

A clip is seeded by its key, so it does not depend on the others, on the number of processes, or on where a killed run
stopped. Shape letter: N samples.
"""

import hashlib
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from pam_espnet.data.audio import RESAMPLER
from pam_espnet.data.pcm import to_pcm16, write_audio
from pam_espnet.data.signals import SAMPLE_RATE
from pam_espnet.fileio import read_json, write_json

SPLITS = ("train", "dev", "test")


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


def fingerprint(options: Any, seed: int, files: Sequence[Path]) -> str:
    """A digest of everything that decides a task's audio: options, seed, programs, tables, resampler."""
    digest = hashlib.sha256(f"{options} {seed} {RESAMPLER}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(render: Callable[[Any], np.ndarray], job: Job) -> Utterance:
    """Make one clip unless its file is there; return the utterance with its duration."""
    path = Path(job.utterance.audio)
    if path.exists():  # files are renamed to their names, so one that exists is whole
        return replace(job.utterance, seconds=soundfile.info(path).duration)
    samples, _ = to_pcm16(render(job.spec))
    write_audio(path, samples, SAMPLE_RATE, "flac")
    return replace(job.utterance, seconds=len(samples) / SAMPLE_RATE)


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
        plan: lists what is to be made; called only when something is missing.
        render: makes the audio (N,) float32 at 16 kHz of one job's spec; a module-level function.
    """
    from tqdm import tqdm

    started, manifest = folder / "started.json", folder / "utterances.json"
    if folder.exists() and (not started.exists() or read_json(started) != key):
        print(f"{task}: options or programs have changed; making {folder} again", flush=True)
        shutil.rmtree(folder)
    if manifest.exists():
        done = [Utterance(**{**entry, "references": tuple(entry["references"])}) for entry in read_json(manifest)]
        if all(Path(utterance.audio).exists() for utterance in done):
            print(f"{task}: {len(done)} utterances are there already", flush=True)
            return done
    write_json(started, key)
    todo = plan()
    # spawn: a forked child of a process with threads can hang
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        clips = pool.imap(partial(_write, render), todo, chunksize=8)
        made = list(tqdm(clips, total=len(todo), desc=task, unit="clip"))
    write_json(manifest, [asdict(utterance) for utterance in made])
    return made
