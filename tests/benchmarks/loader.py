"""Loading of batches for training: from FLAC files and from archives of them, start of workers and rate of each.

    python tests/benchmarks/loader.py [--clips 600] [--workers 1 2] [--epochs 3]

Clips of 8 to 16 s of noise that FLAC halves, batches of at most 320 s, through the classes of training, with this
repository's small test tokenizer; files are in the machine's memory. *start*: from the plan of an epoch to its first
batch; *after*: the same in later epochs with workers that were kept, *anew* with others; *rate*: of the batches behind
the first one.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kit")]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per way and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=600, help="utterances (600)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (1 2)")
    parser.add_argument("--epochs", type=int, default=3, help="of each way (3)")
    parser.add_argument("--archive_mb", type=float, default=100, help="size of an archive (100)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        sets = write(Path(folder), args.clips, args.archive_mb)
        for workers in args.workers:
            for name, path in sets.items():
                print(f"{name}, {workers} workers: {measured(path, workers, args.epochs)}", flush=True)


def write(root: Path, clips: int, archive_mb: float) -> dict[str, Path]:
    """The formatted data directories, once as files and once as archives."""
    import numpy as np
    import soundfile

    from pam_espnet.data.datadir import DataDir
    from pam_espnet.data.format import format_data_dir

    rng = np.random.default_rng(0)
    (root / "wav").mkdir()
    wav = {}
    for number in range(clips):
        samples = (500 * rng.standard_normal(16000 * (8 + number % 9))).astype(np.int16)  # 10 bits of 16
        wav[f"utt{number:05d}"] = str(root / f"wav/{number}.wav")
        soundfile.write(root / f"wav/{number}.wav", samples, 16000)
    tables = {name: dict.fromkeys(wav, value) for name, value in (
        ("text", "the number you have dialed is not in service"), ("prompt", "Transcribe the speech."),
        ("utt2task", "asr"),
    )}  # fmt: skip
    DataDir(path=root / "data", wav=wav, **tables, utt2spk={key: key for key in wav}).save()
    sets = {"FLAC files": 0.0, "archives": archive_mb}
    for name, size in sets.items():
        format_data_dir(root / "data", root / name, archive_mb=size)
    return {name: root / name for name in sets}


def measured(path: Path, workers: int, epochs: int) -> str:
    """Seconds to the first batch, and batches per second and worker."""
    from espnet2.train.dataset import ESPnetDataset
    from tiny_tokenizer import tiny_tokenizer

    from pam_espnet.data.audio_ark import ARCHIVED_SOUND, locate
    from pam_espnet.data.batching import BatchingOptions
    from pam_espnet.data.tables import read_table
    from pam_espnet.data.tasks import TASKS
    from pam_espnet.train.collate import PaMCollate
    from pam_espnet.train.iterator import PaMIterFactory, PaMPreprocessor

    archived = any(locate(value)[1] is not None for value in read_table(path / "wav.scp").values())
    tokenizer, sound = tiny_tokenizer(), ARCHIVED_SOUND if archived else "sound"
    streams = [("text", "text", "text"), ("prompt", "prompt", "text"), ("utt2task", "task", "text"),
               ("utt2num_samples", "num_samples", "text_int"), ("wav.scp", "speech", sound)]  # fmt: skip
    dataset = ESPnetDataset(
        [(str(path / file), name, kind) for file, name, kind in streams],
        preprocess=PaMPreprocessor(tokenizer, tuple(TASKS), train=True),
    )
    seconds = {key: int(n) / 16000 for key, n in read_table(path / "utt2num_samples").items()}
    options: dict[str, Any] = {
        "dataset": dataset, "seconds": seconds, "tasks": dict.fromkeys(seconds, "asr"), "train": True, "seed": 1,
        "options": BatchingOptions(max_utterances=32, max_seconds=320), "batches_per_epoch": None,
        "collate_fn": PaMCollate(tokenizer, "", 12.5, 16000), "num_workers": workers,
    }  # fmt: skip
    kept, starts, rates = PaMIterFactory(**options), dict[str, list[float]](after=[], anew=[]), []
    for epoch in range(1, epochs + 1):
        for way, factory in (("after", kept), ("anew", PaMIterFactory(**options))):
            begun = time.perf_counter()
            batches = iter(factory.build_iter(epoch))
            next(batches)
            first = time.perf_counter()
            starts["anew" if epoch == 1 else way].append(first - begun)
            count = sum(1 for _ in batches)
            rates.append(count / (time.perf_counter() - first) / workers)
    after, anew = (statistics.median(starts[way] or [0.0]) for way in ("after", "anew"))
    rate = statistics.median(rates)
    return f"start anew {anew:.2f} s, after {after:.2f} s; {rate:.2f} batches per second and worker"


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
