"""Synthetic speech, for training alone: example sentences of WordNet, read by two voices of Flite.

The recordings of speech hold few words: one in ten of ``dev`` is in no training text of ``quick``, and a word that was
never heard is not recognised. WordNet's examples are short sentences of everyday words; CORPUS.md has how well Whisper
understands Flite's statistical voices "awb" (Scottish) and "rms" (US).
Flite's library is called from the unpacked package: the one thing of all packages that is run and not only read.
Shape letter: N samples at 16 kHz.
"""

import ctypes
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from download import find_unpacked
from recordings import only
from text import normalise

from pam_espnet.data.signals import SAMPLE_RATE
from pam_espnet.errors import DataError

VOICES = ("awb", "rms")
WORDS = range(2, 13)  # of a sentence
# Flite reads numbers and abbreviations its own way; a sentence without them has one reading.
PLAIN = re.compile(r"[A-Za-z' ,;!?-]+[.!?]?")


@dataclass(frozen=True)
class Spoken:
    """A sentence, who reads it, and the folder of the shared libraries."""

    text: str
    voice: str
    libraries: str


class Wave(ctypes.Structure):
    """``cst_wave`` of flite/cst_wave.h."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


def examples(downloads: Path) -> dict[str, str]:
    """WordNet's example sentences (in quotes behind the definition) as they are written, by their normalised texts.

    The order is that of the SHA-256 of these texts.
    """
    folder = find_unpacked(downloads, "wordnet-base") / "usr/share/wordnet"
    found: dict[str, str] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            for quoted in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                if PLAIN.fullmatch(quoted) and len((text := normalise(quoted)).split()) in WORDS:
                    found.setdefault(text, quoted)
    return dict(sorted(found.items(), key=lambda entry: hashlib.sha256(entry[0].encode()).hexdigest()))


def plan(downloads: Path, limit: int, held_out: Callable[[str], bool]) -> list[tuple[str, Spoken]]:
    """At most ``limit`` normalised texts, none of which ``held_out`` is true of, each with who reads it."""
    if limit == 0:
        return []
    library = only(find_unpacked(downloads, "libflite1"), "usr/lib/*/libflite.so.1")
    used = (entry for entry in examples(downloads).items() if not held_out(entry[0]))
    return [
        (text, Spoken(sentence, VOICES[number % len(VOICES)], str(library.parent)))
        for number, (text, sentence) in enumerate(islice(used, limit))
    ]


@cache
def _load(libraries: str, name: str) -> ctypes.CDLL:
    path = Path(libraries) / f"{name}.so.1"
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # so that those loaded later find it by its name
    except OSError as error:
        hint = "apt-get install libasound2 (Flite is linked to it), or --size quick, which has no synthetic speech"
        raise DataError(path, f"cannot be loaded: {error}", hint=hint) from error


@cache
def _voice(libraries: str, name: str) -> ctypes.c_void_p:
    """Flite's handle of a voice."""
    for library in ("libflite", "libflite_usenglish", "libflite_cmulex"):
        _load(libraries, library)
    flite = _load(libraries, "libflite")
    flite.flite_init()
    flite.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    flite.flite_text_to_wave.restype = ctypes.POINTER(Wave)
    flite.delete_wave.argtypes = [ctypes.POINTER(Wave)]
    register = getattr(_load(libraries, f"libflite_cmu_us_{name}"), f"register_cmu_us_{name}")
    register.argtypes, register.restype = [ctypes.c_char_p], ctypes.c_void_p
    voice = register(None)
    if not voice:
        raise DataError(libraries, f"Flite cannot make its voice {name!r}", hint="delete the folder, run stage 1 again")
    return ctypes.c_void_p(voice)


def synthesise(spoken: Spoken) -> np.ndarray:
    """The sentence as ``spoken.voice`` reads it: (N,) float32.

    Raises:
        DataError: Flite's library cannot be loaded, or its speech has another sample rate.
    """
    voice = _voice(spoken.libraries, spoken.voice)
    flite = _load(spoken.libraries, "libflite")
    wave = flite.flite_text_to_wave(spoken.text.encode("ascii"), voice)
    if not wave or wave.contents.sample_rate != SAMPLE_RATE or wave.contents.num_channels != 1:
        raise DataError(spoken.libraries, f"Flite gave no speech at {SAMPLE_RATE} Hz for {spoken.text!r}")
    try:
        samples = np.ctypeslib.as_array(wave.contents.samples, shape=(wave.contents.num_samples,))
        return samples.astype(np.float32) / 32768
    finally:
        flite.delete_wave(wave)
