"""Readers of the packages' recordings and transcripts, one per package; all give paths and texts."""

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from download import find_unpacked
from rcc import read_rcc

from pam_espnet.data.audio import read_audio, resample
from pam_espnet.data.signals import SAMPLE_RATE
from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path

AUDIO_SUFFIXES = (".wav", ".ogg", ".opus", ".mp3", ".gsm", ".g722")
# prompts that are no speech: tones, silence, and monkeys
NOT_SPEECH = re.compile(r"(^|/)silence/|(^|/)(beep|beeperr|(a|de)scending-2tone|tt-monkeys|confbridge-(join|leave))\.")


@dataclass(frozen=True)
class Clip:
    """A recording of one sentence: ``name`` is unique in its package, ``text`` as the package writes it."""

    source: str
    name: str
    path: Path
    text: str


def read_16k(path: Path) -> np.ndarray:
    """A recording at 16 kHz without its mean: (N,) float32."""
    if path.suffix == ".gsm":  # has no header, so its format is stated
        wave, rate = soundfile.read(path, dtype="float32", format="RAW", subtype="GSM610", samplerate=8000, channels=1)
    else:
        wave, rate = read_audio(path)
    wave = resample(wave, rate, SAMPLE_RATE)
    return wave - wave.mean() if len(wave) else wave


def only(folder: Path, pattern: str) -> Path:
    """The one path that matches ``pattern`` below ``folder``."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        hint = "delete the folder and run local/download.py again"
        raise DataError(folder, f"expected one {pattern}, found {len(found)}", hint=hint)
    return found[0]


# ---- sentences with English transcripts -----------------------------------------------------------------------------


def asterisk_english(downloads: Path) -> list[Clip]:
    """English telephone prompts (core sounds): clips with a transcript; bracketed entries (tones) are left out."""
    listing = only(find_unpacked(downloads, "asterisk-core-sounds-en"), "usr/share/doc/*/core-sounds-en.txt.gz")
    sounds = only(find_unpacked(downloads, "asterisk-core-sounds-en-g722"), "usr/share/asterisk/sounds/en*")
    clips = []
    with gzip.open(listing, "rt", encoding="utf-8-sig") as lines:
        for line in lines:
            match = re.fullmatch(r"([\w/-]+):\s*(.*\S)\s*", line)
            if line.startswith(";") or match is None or match[2][0] in "[(<":
                continue
            path = sounds / f"{match[1]}.g722"
            if path.is_file():  # a few prompts of the list were never recorded
                clips.append(Clip("asterisk-en", match[1].replace("/", "_"), path, match[2]))
    return clips


def tuxpaint_english(downloads: Path) -> list[Clip]:
    """Volunteers reading English captions of pictures: ``NAME_desc.ogg``, first line of ``NAME.txt``."""
    stamps = find_unpacked(downloads, "tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    clips = []
    for path in tuxpaint_clips(stamps, "en"):
        caption = path.with_name(re.sub(r"_desc$", "", path.stem) + ".txt")
        text = caption.read_text(encoding="utf-8").split("\n")[0].strip() if caption.is_file() else ""
        if text:
            name = "_".join(path.relative_to(stamps).with_suffix("").parts).removesuffix("_desc")
            clips.append(Clip("tuxpaint-en", name, path, text))
    return clips


def librivox(downloads: Path) -> list[Clip]:
    """Five sentences of a LibriVox reading; the transcription file has lines ``<s> words </s> (name)``."""
    folder = find_unpacked(downloads, "pocketsphinx-testdata") / "usr/share/pocketsphinx/test/data/librivox"
    clips = []
    for line in (folder / "transcription").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"<s> (.+) </s> \((\S+)\)", line.strip()):
            clips.append(Clip("librivox", match[2].rsplit("-", 1)[-1], folder / f"{match[2]}.wav", match[1]))
    return clips


# ---- voices ---------------------------------------------------------------------------------------------------------


def tuxpaint_clips(stamps: Path, language: str) -> list[Path]:
    """Spoken captions in one language: ``*_desc_<language>.ogg``, English without a suffix."""
    suffix = "" if language == "en" else f"_{language}"
    return sorted(path for kind in ("ogg", "wav") for path in stamps.rglob(f"*_desc{suffix}.{kind}"))


def voice_clips(downloads: Path, voice: str) -> list[Path]:
    """All recordings of a voice of voices.yaml (``<package>/<language>``), sorted.

    Raises:
        DataError: the package is not there or has none.
    """
    package, _, language = voice.partition("/")
    if package == "tuxpaint":
        folder = find_unpacked(downloads, "tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
        paths = tuxpaint_clips(folder, language)
    else:
        name, inner = {
            "asterisk": (f"asterisk-core-sounds-{language}-g722", "usr/share/asterisk/sounds"),
            "prompt": (f"asterisk-prompt-{language}", "usr/share/asterisk/sounds"),
            "klettres": ("klettres-data", f"usr/share/klettres/{language}"),
            "ktuberling": ("ktuberling-data", f"usr/share/ktuberling/sounds/{language}"),
        }.get(package, ("", ""))
        if not name:
            raise DataError("local/voices.yaml", f"voice {voice!r}: unknown package {package!r}")
        folder = find_unpacked(downloads, name) / inner
        # links (other names of the same recordings) are not followed
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix in AUDIO_SUFFIXES and not path.is_symlink()]
        paths = [path for path in paths if not NOT_SPEECH.search(path.relative_to(folder).as_posix())]
    if not paths:
        raise DataError(folder, f"no recordings of voice {voice}", hint="delete the folder, run stage 1 again")
    return paths


# ---- named sounds ---------------------------------------------------------------------------------------------------


def sound_path(downloads: Path, sound: str) -> Path:
    """The file of a recording of sounds.yaml (``<package>/<path>``); see ``extract_gcompris`` for those of gcompris.

    Raises:
        DataError: there is no such file.
    """
    package, _, inner = sound.partition("/")
    if package == "scratch":
        path = find_unpacked(downloads, "scratch") / "usr/share/scratch/Media/Sounds" / inner
    elif package == "tuxpaint":
        path = find_unpacked(downloads, "tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps" / inner
    else:
        path = downloads / "unpacked" / "gcompris-sounds" / inner
    if not path.is_file():
        raise DataError(path, f"no such recording ({sound} of local/sounds.yaml)", hint="run local/data.sh again")
    return path


def extract_gcompris(downloads: Path, sounds: list[str]) -> None:
    """Write the recordings ``gcompris/<resource>/<file>`` out of their .rcc files, those that are not there yet."""
    target = downloads / "unpacked" / "gcompris-sounds"
    missing = [sound.split("/")[1:] for sound in sounds if sound.startswith("gcompris/")]
    missing = [parts for parts in missing if not target.joinpath(*parts).is_file()]
    for resource in sorted({parts[0] for parts in missing}):
        rcc = find_unpacked(downloads, "gcompris-qt-data") / f"usr/share/gcompris-qt/rcc/{resource}.rcc"
        wanted = {parts[1] for parts in missing if parts[0] == resource}
        for name, content in read_rcc(rcc, tuple(f"/{file}" for file in sorted(wanted))):
            with atomic_path(target / resource / name.rsplit("/", 1)[-1]) as tmp:
                tmp.write_bytes(content)
