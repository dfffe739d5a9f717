"""Synthetic LibriSpeech and LibriCount in their own folders and file formats, with tones and noise for voices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = "max_epoch=1 num_iters_per_epoch=2 num_workers=0"
RATE = 16000
WORDS = ("THE", "OLD", "MAN'S", "HOUSE", "STOOD", "BY", "A", "GREEN", "RIVER", "AND", "NOBODY", "KNEW", "IT")
HEAD = """; Some pipe(|) separated metadata about all LibriVox readers, whose work was used
; in the corpus.
;
;ID  |SEX| SUBSET           |MINUTES| NAME
"""


def voice(rng: np.random.Generator, seconds: float, pitch: float) -> np.ndarray:
    """A short pause, then a hum with harmonics and a little noise: (N,) float32."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in range(1, 6)) * (1 + 0.4 * np.sin(2 * np.pi * 4 * time))
    wave = 0.1 * np.asarray(wave) + 0.01 * rng.standard_normal(len(time))
    pause = 0.0005 * rng.standard_normal(round(0.15 * RATE))
    return np.concatenate([pause, wave, pause]).astype(np.float32)


def make_librispeech(root: Path, readers: dict[str, int], utterances: int = 3, named: tuple[str, ...] = ()) -> Path:
    """``root/LibriSpeech`` with subsets of ``readers[subset]`` readers, each with one chapter of ``utterances``.

    ``named``: subsets that SPEAKERS.TXT lists besides, without audio.
    """
    folder = root / "LibriSpeech"
    folder.mkdir(parents=True)
    lines = []
    number = 60
    for subset in (*readers, *named):
        for reader in range(readers.get(subset, 2)):
            number += 1
            sex = "MF"[number % 2]
            # one name has the bar that separates the columns, as in the real file
            name = "|CBW|Simon" if number == 62 else "A Reader"
            lines.append(f"{number:<4} | {sex} | {subset:<16} | {8.08:>5} | {name}")
            if subset in readers:
                _make_chapter(folder / subset, number, 70000 + reader, utterances)
    (folder / "SPEAKERS.TXT").write_text(HEAD + "\n".join(lines) + "\n")
    (folder / "README.TXT").write_text("A stand-in.\n")
    return root


def _make_chapter(subset: Path, reader: int, chapter: int, utterances: int) -> None:
    rng = np.random.default_rng(reader)
    folder = subset / str(reader) / str(chapter)
    folder.mkdir(parents=True)
    lines = []
    for index in range(utterances):
        key = f"{reader}-{chapter}-{index:04d}"
        wave = voice(rng, rng.uniform(0.8, 2.0), 90 + 7 * (reader % 30))
        soundfile.write(folder / f"{key}.flac", wave, RATE, subtype="PCM_16")
        lines.append(f"{key} {' '.join(rng.choice(WORDS, size=rng.integers(3, 8)))}\n")
    (folder / f"{reader}-{chapter}.trans.txt").write_text("".join(lines))


def make_libricount(root: Path, each: int = 2, readers: tuple[int, ...] = tuple(range(61, 73))) -> Path:
    """``root/test`` with ``each`` clips of every number of voices from 0 to 10."""
    folder = root / "test"
    folder.mkdir(parents=True)
    for count in range(11):
        for index in range(each):
            rng = np.random.default_rng(100 * count + index)
            waves = [voice(rng, 4.7, 90 + 11 * speaker) for speaker in range(count)]
            clip = np.sum(waves, axis=0) / max(count, 1) if waves else 0.001 * rng.standard_normal(5 * RATE)
            stem = f"{count}_{rng.integers(16**12):012x}"
            soundfile.write(folder / f"{stem}.wav", clip.astype(np.float32), RATE, subtype="PCM_16")
            speakers = [{"sex": "F", "activity": [[0, 80000]], "speaker_id": reader} for reader in readers[:count]]
            (folder / f"{stem}.json").write_text(json.dumps(speakers))
    return root


def copy_recipe(root: Path, name: str, *others: str) -> Path:
    """A copy of the recipe ``name`` (and of ``others``), in a tree whose other parts are links to this checkout."""
    (root / "egs").mkdir(parents=True)
    for part in ("tools", "utils", "pam_espnet", "egs/TEMPLATE"):
        (root / part).symlink_to(ROOT / part)
    for recipe in (name, *others):
        ignore = shutil.ignore_patterns("data", "dump", "exp", "downloads", "__pycache__")
        shutil.copytree(ROOT / "egs" / recipe / "pam1", root / "egs" / recipe / "pam1", ignore=ignore)
    for size in (root / "egs" / name / "pam1" / "conf" / "size").glob("*.yaml"):  # the synthetic corpora are small
        size.write_text(size.read_text().split("resources:")[0] + "resources: {disk_gb: 1, memory_gb: 1}\n")
    return root / "egs" / name / "pam1"


def small(recipe: Path, models: Path, llm: Path) -> list[str]:
    """Write what puts the mini recipe's encoders, ``llm`` and two steps into ``recipe``; the options that use it."""
    conf = {
        "llm": str(llm),
        "llm_conf": {"gradient_checkpointing": False, "lora": {"r": 4}},
        "frontend_conf": {
            "encoders": {
                "whisper": {"path": str(models / "whisper-tiny.en"), "layers": [2, 4]},
                "wavlm": {"type": "pyannote", "path": str(models / "pyannote-segmentation"), "layers": [2, 4]},
                "wav2vec2": {"type": "yamnet", "path": str(models / "yamnet"), "layers": [11, 13]},
            }
        },
        "warm_start_conf": {"steps": 4, "single_steps": 2, "max_utterances": 4},
        "batching_conf": {"max_utterances": 4},
    }
    (recipe / "conf/small.yaml").write_text(yaml.safe_dump(conf))
    decode = yaml.safe_load((recipe / "conf/decode.yaml").read_text()) | {"beam_size": 2, "max_new_tokens": 6}
    (recipe / "conf/decode_small.yaml").write_text(yaml.safe_dump(decode))
    options = ["--size", "mini", "--tag", "small", "--nj", "1", "--check_counts", "false", "--set", STEPS]
    options += ["--train_nj", "2"]
    return [*options, "--train_config", "conf/train.yaml conf/small.yaml", "--decode_config", "conf/decode_small.yaml"]


def run(recipe: Path, *args: str, program: str = "./run.sh", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe with the environment that runs the tests."""
    own = {"PAM_NO_SETUP": "1", "PAM_PYTHON": sys.executable, "python": sys.executable, "TQDM_MININTERVAL": "60"}
    env = {**os.environ, **own, **environment}
    return subprocess.run([program, *args], cwd=recipe, env=env, capture_output=True, text=True, check=False)
