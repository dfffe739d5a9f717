"""Long recordings: sentences joined to ten minutes against the same sentences one by one, and what holds no speech.

Sentences of a data directory are joined with pauses (0.5 to 2 s) and without any, over quiet noise, and transcribed
from the file. Ways to cut it, for each of which it is also shown how much of the sentences is in the pieces ("kept")
and how many of them lie in several ("split"):

    alone      no recording at all: each sentence by itself
    pauses     what the program does: between pauses that the voice activity model finds
    energy     the same between frames that are 35 dB quieter than the loudest one
    windows    every --piece_seconds, wherever that is

The words of all pieces are aligned with those of all sentences, and each error belongs to a sentence, so that intervals
and paired differences to "alone" are over sentences; words lost or doubled at a seam are deletions and insertions. Then
ten minutes of silence, of noise, of music (--music) and of sounds (--sounds), in which every word is wrong, and of one
word in noise. Last the memory that cutting takes, for one and for six times the length.

    python tests/benchmarks/long_recordings.py --exp exp/pam_quick --data dump/quick/raw/test_voices \
        --sounds dump/quick/raw/test_caption --output long.json

``--whisper DIR`` in place of ``--exp``: the pieces through Whisper's own decoder, a recogniser that makes few errors of
its own. With neither, the recordings are only cut, which takes a minute.
"""

import argparse
import json
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

RATE = 16000
NOISE = -70.0  # dB re full scale, under everything
GAPS = {"with pauses": (0.5, 2.0), "without pauses": (0.0, 0.0)}  # seconds
WORDS = 5  # recordings of one word
KINDS = ("substitutions", "deletions", "insertions")


def main() -> None:
    """Print tables and, with --output, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--exp", help="package or experiment directory")
    model.add_argument("--whisper", help="folder of a Whisper of Hugging Face format")
    parser.add_argument("--config", help="YAML with options of decoding (default: as it was decoded)")
    parser.add_argument("--data", required=True, help="data directory with recognition utterances")
    parser.add_argument("--sounds", help="data directory of sounds without speech")
    parser.add_argument("--music", nargs="*", default=[], help="audio files without speech")
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the recordings (600)")
    parser.add_argument("--piece_seconds", type=float, default=30.0, help="longest piece (30)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the pauses (0)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    import torch

    from pam_espnet.data.datadir import DataDir
    from pam_espnet.decode.segments import Piece
    from pam_espnet.decode.shards import read_wave
    from pam_espnet.package import load as load_package

    torch.set_num_threads(1)
    speech: Any = None
    if args.whisper or args.exp:
        speech = Whisper(args.whisper) if args.whisper else load_package(args.exp, options=args.config)
    rng = random.Random(args.seed)
    data = DataDir.load(args.data)
    keys = [key for key in data.utterances if data.utt2task[key] == "asr"]
    rng.shuffle(keys)
    waves: dict[str, np.ndarray] = {}
    for key in keys:
        if sum(len(wave) / RATE + 1.25 for wave in waves.values()) >= args.seconds:
            break
        waves[key] = read_wave(data, key, RATE)
    texts = {key: data.text[key] for key in waves}
    began = time.monotonic()
    pieces = [Piece(wave, 0.0, len(wave) / RATE) for wave in waves.values()]
    alone = dict(zip(waves, answers(speech, pieces), strict=True)) if speech else dict.fromkeys(waves, "")
    seconds = sum(map(len, waves.values())) / RATE
    print(f"{len(waves)} sentences, {seconds:.0f} s; alone in {time.monotonic() - began:.0f} s", flush=True)
    record: dict[str, Any] = {
        "options": {key: str(value) for key, value in vars(args).items() if key not in ("output", "music")},
        "sentences": len(waves),
        "joined": [],
        "without speech": [],
    }
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "recording.flac"
        for name, (low, high) in GAPS.items():
            parts = [part for wave in waves.values() for part in (gap(rng.uniform(low, high)), wave)]
            write(path, [*parts, gap(low)], None)
            found = {"alone": Transcript(list(alone.values()), [(0.0, 0.0)] * len(alone))} if speech else {}
            found |= {way: transcribed(speech, path, way, args.piece_seconds) for way in args.ways}
            rows = compared(texts, found) if speech else [{"way": way} for way in found]
            for row in rows:
                row |= kept(parts, found[row["way"]].times) if row["way"] != "alone" else {}
            record["joined"] += [{"recording": name, **row} for row in rows]
            print(f"\n{name}:", *map(describe, rows), sep="\n  ", flush=True)
            save(record, args.output)
        print("\none word:", flush=True)
        record["one word"] = one_word(speech, path, waves, texts, alone, args, rng)
        record["memory"] = memory(path, list(waves.values()), args)
        save(record, args.output)
        print("\nwithout speech: pieces, their seconds, words")
        sounds = DataDir.load(args.sounds) if args.sounds else None
        for name, parts in {
            "silence": [np.zeros(RATE)],
            "noise": [coloured(-45.0, 60.0)],
            "music": [whole(file) for file in args.music],
            "sounds": [read_wave(sounds, key, RATE) for key in sounds.utterances] if sounds else [],
        }.items():
            if parts:
                write(path, parts, args.seconds, over=name != "silence")
                for way in args.ways:
                    found_here = transcribed(speech, path, way, args.piece_seconds)
                    row = {"recording": name, "way": way, "pieces": len(found_here.times)}
                    row["seconds"] = round(sum(end - start for start, end in found_here.times), 1)
                    row["words"] = len(" ".join(found_here.texts).split()) if speech else None
                    record["without speech"].append(row)
                    print(f"  {name:10s} {way:10s} {row['pieces']:4d} {row['seconds']:6.1f} {row['words']}", flush=True)
                save(record, args.output)


def save(record: dict[str, Any], output: Path | None) -> None:
    """Write what there is so far."""
    if output:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# ---- models ---------------------------------------------------------------------------------------------------------


class Whisper:
    """Whisper's own decoder with what ``answer_pieces`` uses of a ``SpeechLLM``."""

    on_gpu = False

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration, logging

        logging.set_verbosity_error()  # two lengths are given, it says for each piece
        self.whisper = WhisperForConditionalGeneration.from_pretrained(path).eval()
        self.extract = WhisperFeatureExtractor.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = SimpleNamespace(frontend=SimpleNamespace(sample_rate=RATE))

    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str], tasks: Sequence[str] | None) -> list[Any]:
        """The words in each wave, in a window of 30 s, as Whisper was trained."""
        import torch

        found = []
        for wave in waves:
            features = self.extract(wave, sampling_rate=RATE, return_tensors="pt").input_features
            with torch.inference_mode():
                tokens = self.whisper.generate(features, max_new_tokens=220)
            found.append(SimpleNamespace(texts=[self.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()]))
        return found


# ---- recordings -----------------------------------------------------------------------------------------------------


def gap(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def coloured(level: float, seconds: float) -> np.ndarray:
    """Pink noise (N,) at ``level`` dB."""
    from pam_espnet.data.signals import coloured_noise

    noise: np.ndarray = 10 ** (level / 20) * coloured_noise(np.random.default_rng(0), round(seconds * RATE))
    return noise


def whole(path: str) -> np.ndarray:
    from pam_espnet.data.audio_stream import stream_audio

    return np.concatenate(list(stream_audio(path, RATE)))


def write(path: Path, parts: Sequence[np.ndarray], seconds: float | None, over: bool = True) -> None:
    """Write ``parts`` one after the other, again and again until there are ``seconds``, over quiet noise."""
    import soundfile

    noise, left = coloured(NOISE, 60.0), None if seconds is None else round(seconds * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for part in parts if left is None else cycle(parts):
            wave = part[:left]
            file.write(wave + over * np.resize(noise, len(wave)))
            left = None if left is None else left - len(wave)
            if left == 0:
                break


# ---- ways to cut ----------------------------------------------------------------------------------------------------


def by_pauses(path: Path, seconds: float) -> Iterator[Any]:
    from pam_espnet.decode.long_recordings import cut_recording

    model: Any = SimpleNamespace(model=SimpleNamespace(frontend=SimpleNamespace(sample_rate=RATE)))
    return cut_recording(model, path, None, seconds)


def by_energy(path: Path, seconds: float) -> Iterator[Any]:
    from pam_espnet.data.audio_stream import stream_audio
    from pam_espnet.decode.segments import cut_at_pauses

    def levels(frames: np.ndarray) -> np.ndarray:
        return 10 * np.log10(np.square(frames, dtype=np.float64).mean(axis=1) + 1e-10)

    loudest = max(levels(block[: len(block) // 512 * 512].reshape(-1, 512)).max() for block in stream_audio(path, RATE))
    return cut_at_pauses(stream_audio(path, RATE), RATE, lambda frames: levels(frames) > loudest - 35, seconds)


def by_windows(path: Path, seconds: float) -> Iterator[Any]:
    from pam_espnet.data.audio_stream import stream_audio
    from pam_espnet.decode.segments import cut_into_windows

    return cut_into_windows(stream_audio(path, RATE), RATE, seconds)


type Cut = Callable[[Path, float], Iterator[Any]]
WAYS: dict[str, Cut] = {"pauses": by_pauses, "energy": by_energy, "windows": by_windows}


class Transcript(NamedTuple):
    """The words of each piece, and start and end in seconds."""

    texts: list[str]
    times: list[tuple[float, float]]


def answers(speech: Any, pieces: Iterable[Any]) -> list[str]:
    """The words of each piece."""
    from pam_espnet.data.tasks import task_spec
    from pam_espnet.decode.long_recordings import answer_pieces

    return [one.text for one in answer_pieces(speech, pieces, task_spec("asr").default_prompt, "asr")]


def transcribed(speech: Any, path: Path, way: str, seconds: float) -> Transcript:
    """A recording cut in one of the ways; without a model no words."""
    times = []

    def noted() -> Iterator[Any]:
        for piece in WAYS[way](path, seconds):
            times.append((piece.start, piece.end))
            yield piece

    texts = answers(speech, noted()) if speech else ["" for _ in noted()]
    return Transcript(texts, times)


# ---- measures -------------------------------------------------------------------------------------------------------


def errors(texts: Sequence[str], found: Sequence[str]) -> np.ndarray:
    """Substitutions, deletions, insertions and words (N,4) of each of N sentences; ``found``: words of all of them, cut
    anyhow."""
    import jiwer

    words = [len(text.split()) for text in texts]
    owner = np.repeat(np.arange(len(texts)), words)
    table = np.zeros((len(texts), 4), dtype=np.int64)
    table[:, 3] = words
    column = {"substitute": 0, "delete": 1, "insert": 2}
    for chunk in jiwer.process_words(" ".join(texts), " ".join(" ".join(found).split())).alignments[0]:
        if chunk.type == "insert":
            at = min(chunk.ref_start_idx, len(owner) - 1)
            table[owner[at], 2] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            np.add.at(table[:, column[chunk.type]], owner[chunk.ref_start_idx : chunk.ref_end_idx], 1)
    return table


def compared(texts: dict[str, str], found: dict[str, Transcript]) -> list[dict[str, Any]]:
    """A row of each way: its word error rate, and the paired difference to "alone"."""
    from whisper_normalizer.english import EnglishTextNormalizer

    from pam_espnet.score.intervals import Ratio, bootstrap, bootstrap_difference

    normalise = EnglishTextNormalizer()
    references = [normalise(text) for text in texts.values()]
    tables = {way: errors(references, [normalise(one) for one in ours.texts]) for way, ours in found.items()}
    rates = {way: Ratio(table[:, :3].sum(1), table[:, 3], 100.0) for way, table in tables.items()}
    return [
        {
            "way": way,
            "wer": bootstrap(rates[way]),
            "difference": bootstrap_difference(rates["alone"], rates[way]),
            **dict(zip((*KINDS, "words"), table.sum(0).tolist(), strict=True)),
        }
        for way, table in tables.items()
    ]


def kept(parts: Sequence[np.ndarray], times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The percentage of the sentences' seconds that is in pieces, from the first to the last frame of each that is at
    most 35 dB quieter than its loudest one; sentences in several pieces; the pieces.

    Args:
        parts: of the recording: gap, sentence, gap, sentence, ...
        times: of the pieces.
    """
    from pam_espnet.data.signals import FRAME, frame_levels

    starts = np.array([start for start, _ in times])
    ends = np.array([end for _, end in times])
    at, total, inside, split = 0, 0.0, 0.0, 0
    for number, part in enumerate(parts):
        if number % 2:
            levels = frame_levels(part)
            active = np.flatnonzero(levels > levels.max() - 35)
            first, last = ((at + frame * FRAME) / RATE for frame in (active[0], active[-1] + 1))
            overlap = np.clip(np.minimum(ends, last) - np.maximum(starts, first), 0, None)
            total, inside, split = total + last - first, inside + overlap.sum(), split + int((overlap > 0.05).sum() > 1)
        at += len(part)
    longest = round(float((ends - starts).max(initial=0.0)), 2)
    return {"pieces": len(times), "longest": longest, "kept": round(100 * inside / total, 2), "split": split}


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    from pam_espnet.score.result import METRICS

    show, line = METRICS["wer"].show, f"{row['way']:10s}"
    if "pieces" in row:
        line += f" {row['pieces']:4d} pieces, at most {row['longest']:5.2f} s"
        line += f"  kept {row['kept']:6.2f} %  split {row['split']:2d}"
    if "wer" in row:
        kinds = "  ".join(f"{row[kind]} {kind[:3]}" for kind in KINDS)
        line += f"  WER {show(row['wer'])} %  to alone {show(row['difference'], sign=True)}  {kinds}"
    return line


def one_word(
    speech: Any, path: Path, waves: dict[str, np.ndarray], texts: dict[str, str], alone: dict[str, str],
    args: argparse.Namespace, rng: random.Random,
) -> list[dict[str, Any]]:  # fmt: skip
    """Short sentences, each at a random time of a recording of noise."""
    rows = []
    for key in sorted(waves, key=lambda key: (len(texts[key].split()), key))[:WORDS]:
        before = rng.uniform(1.0, args.seconds - 10)
        write(path, [gap(before), waves[key], gap(args.seconds - before - len(waves[key]) / RATE)], None)
        found = transcribed(speech, path, "pauses", args.piece_seconds)
        row = {"said": texts[key], "alone": alone[key], "found": found.texts, "pieces": len(found.times)}
        row |= kept([gap(before), waves[key]], found.times)
        rows.append(row)
        print(f"  {row['said']!r}: alone {row['alone']!r}, in noise {row['found']}, kept {row['kept']} %", flush=True)
    return rows


def memory(path: Path, waves: Sequence[np.ndarray], args: argparse.Namespace) -> list[dict[str, float]]:
    """The most that arrays took while a recording was cut, and the seconds of CPU."""
    rows = []
    for times in (1, 6):
        write(path, [part for wave in waves for part in (gap(1.0), wave)], times * args.seconds)
        began = time.process_time()
        tracemalloc.start()
        pieces = sum(1 for _ in by_pauses(path, args.piece_seconds))
        row = {"seconds": times * args.seconds, "pieces": pieces, "cpu": time.process_time() - began}
        row["peak_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        rows.append(row)
        print(f"  cutting {row['seconds']:.0f} s: {row['cpu']:.1f} s of CPU, {row['peak_mb']:.1f} MB", flush=True)
    return rows


if __name__ == "__main__":
    main()
