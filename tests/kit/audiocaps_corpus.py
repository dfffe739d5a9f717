"""A synthetic AudioCaps: the official columns and file names, tones and noise for clips."""

import csv
from pathlib import Path

import numpy as np
import soundfile

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
# train: one caption to a clip; val, test: five. One id begins with a dash, as some do.
VIDEOS = {
    "train": ["-aaaaaaaa_1", "aaaaaaaaaa2", "aaaaaaaaaa3", "aaaaaaaaaa4", "aaaaaaaaaa5"],
    "val": ["bbbbbbbbbb1", "bbbbbbbbbb2"],
    "test": ["cccccccccc1", "cccccccccc2", "cccccccccc3", "cccccccccc4"],
}
WORDS = ("a dog barks", "a dog is barking", "barking of a dog", "dogs, barking loudly", "some animal barks")


def rows_of(split: str, first_id: int) -> list[tuple[str, str, str, str]]:
    """CSV rows; the captions of a clip do not stand one after the other in the official files, nor here."""
    captions = WORDS[:1] if split == "train" else WORDS
    pairs = [(video, text) for text in captions for video in VIDEOS[split]]
    starts = {video: 10 * index for index, video in enumerate(VIDEOS[split])}
    return [(str(first_id + n), video, str(starts[video]), text) for n, (video, text) in enumerate(pairs)]


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_release(folder: Path) -> Path:
    for number, split in enumerate(VIDEOS):
        write_csv(folder / f"{split}.csv", rows_of(split, 1000 * (number + 1)))
    return folder


def wave(seed: int, seconds: float = 1.5, rate: int = 32000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tone = 0.2 * np.sin(np.arange(round(seconds * rate)) * 0.02 * (seed + 1))
    return (tone + 0.05 * rng.standard_normal(len(tone))).astype(np.float32)


def write_clip(path: Path, seed: int, seconds: float = 1.5) -> None:
    """Any of the formats: through libsndfile, or ffmpeg where it knows no such file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".wav", ".flac", ".mp3", ".ogg"):
        soundfile.write(path, wave(seed, seconds), 32000)
        return
    import av

    codec, rate = {".m4a": ("aac", 32000), ".webm": ("libopus", 48000)}[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        samples = (wave(seed, seconds, rate) * 32767).astype(np.int16)
        size = stream.codec_context.frame_size or 960
        for start in range(0, len(samples), size):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + size], format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def write_audio(folder: Path) -> Path:
    """Every name and format there is; ``aaaaaaaaaa5`` and ``cccccccccc4`` are missing."""
    names = [
        "-aaaaaaaa_1.wav", "sub/folder/Yaaaaaaaaaa2.flac", "aaaaaaaaaa3_20.mp3", "1003.m4a",
        "bbbbbbbbbb1.webm", "Ybbbbbbbbbb2_10.wav",
        "cccccccccc1.wav", "3001.flac", "cccccccccc3.WAV",
    ]  # fmt: skip
    for seed, name in enumerate(names):
        path = folder / name
        write_clip(path.with_suffix(path.suffix.lower()), seed)
        if path.suffix == ".WAV":
            path.with_suffix(".wav").rename(path)
    (folder / "notes.txt").write_text("not audio")
    return folder
