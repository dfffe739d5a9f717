"""A small data directory on disk."""

from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 16000
BARE_MP3 = {"id3v2_version": "0", "write_xing": "0"}  # without tags and without a count of frames


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Quiet noise (N,), float32."""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def sine(seconds: float, rate: int = RATE) -> np.ndarray:
    """300 Hz with an amplitude of 0.3 (N,), float32."""
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode(
    path: Path,
    wave: np.ndarray,
    codec: str,
    container_format: str,
    *,
    rate: int = RATE,
    bit_rate: int | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Write ``wave`` (N,) or (C, N) through ffmpeg, as the formats that libsndfile cannot write; return the bytes."""
    wave = np.ascontiguousarray(np.atleast_2d(wave), dtype=np.float32)
    layout = {1: "mono", 2: "stereo"}[len(wave)]
    with av.open(str(path), "w", format=container_format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout=layout)
        frame.sample_rate = rate
        convert = av.AudioResampler(stream.format.name, layout, rate, frame_size=stream.frame_size or None)
        for part in [*convert.resample(frame), *convert.resample(None), None]:
            container.mux(stream.encode(part))
    return path.read_bytes()


def write_lines(path: Path, table: Mapping[str, str]) -> None:
    """A table written by hand, in the order given."""
    path.write_text("".join(f"{key} {value}\n" for key, value in table.items()), encoding="utf-8")


def make_data(root: Path, utterances: int = 4, prefix: str = "utt", seconds: float = 0.3) -> Path:
    """``root`` with ``utterances`` WAV files and the five tables; tasks asr and count in turn, two speakers."""
    (root / "wav").mkdir(parents=True)
    keys = [f"{prefix}{number}" for number in range(1, utterances + 1)]
    for number, key in enumerate(keys):
        soundfile.write(root / "wav" / f"{key}.wav", noise(seconds, seed=number), RATE, subtype="PCM_16")
    write_lines(root / "wav.scp", {key: str(root / "wav" / f"{key}.wav") for key in keys})
    write_lines(root / "text", {key: f"{number}" for number, key in enumerate(keys)})
    write_lines(root / "prompt", dict.fromkeys(keys, "What is it?"))
    write_lines(root / "utt2task", {key: ("asr", "count")[number % 2] for number, key in enumerate(keys)})
    write_lines(root / "utt2spk", {key: f"speaker{number // 2 % 2}" for number, key in enumerate(keys)})
    return root


def add_segments(root: Path) -> None:
    """Re-key wav.scp by recording and give every utterance a segment of 0.05 to 0.25 s."""
    wav = dict(line.split(maxsplit=1) for line in (root / "wav.scp").read_text().splitlines())
    write_lines(root / "wav.scp", {f"rec-{key}": value for key, value in wav.items()})
    write_lines(root / "segments", {key: f"rec-{key} 0.05 0.25" for key in wav})
