"""The benchmark of long recordings: errors belong to the right sentences, and it writes what it measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from benchmarks import long_recordings
from synthetic_voice import RATE, hiss, voice
from tiny_model import tiny_config

from pam_espnet.config import write_config
from pam_espnet.data.datadir import DataDir
from pam_espnet.fileio import save_trained
from pam_espnet.model import build_model


def test_errors_belong_to_sentences_however_it_is_cut() -> None:
    texts = ["one two three", "four five", "six"]
    assert long_recordings.errors(texts, texts).tolist() == [[0, 0, 0, 3], [0, 0, 0, 2], [0, 0, 0, 1]]
    found = ["one too", "three five five", "", "six and"]
    assert long_recordings.errors(texts, found).tolist() == [[1, 0, 0, 3], [1, 0, 0, 2], [0, 0, 1, 1]]
    assert long_recordings.errors(texts, []).tolist() == [[0, 3, 0, 3], [0, 2, 0, 2], [0, 1, 0, 1]]


def test_it_measures_and_writes(tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, exp, keys = tiny_config(tiny_llm_dir), tmp_path / "exp", [f"u{number}" for number in range(3)]
    exp.mkdir()
    torch.manual_seed(0)
    save_trained(build_model(config).state_dict(), exp / "model.safetensors")
    write_config(config, exp / "config.yaml")
    wav = {key: str(tmp_path / f"{key}.wav") for key in keys}
    for number, path in enumerate(wav.values()):
        soundfile.write(path, np.concatenate([hiss(0.2), voice(1.5 + number / 4), hiss(0.2)]), RATE)
    write_config({"beam_size": 1, "max_new_tokens": 2}, exp / "decode.yaml")
    text = dict(zip(keys, ("you", "you have", "have"), strict=True))
    task, other = dict.fromkeys(keys, "asr"), dict.fromkeys(keys, "?")
    DataDir(path=tmp_path / "data", wav=wav, text=text, prompt=other, utt2task=task, utt2spk=other).save()
    common = ["--data", str(tmp_path / "data"), "--sounds", str(tmp_path / "data"), "--music", wav["u0"]]
    model = ["--exp", str(exp), "--config", str(exp / "decode.yaml")]
    options = ["--seconds", "12", "--piece_seconds", "4", "--output", str(tmp_path / "long.json")]
    monkeypatch.setattr(sys, "argv", ["long_recordings.py", *model, *common, *options])
    long_recordings.main()
    record = json.loads((tmp_path / "long.json").read_text())
    assert [row["way"] for row in record["joined"]] == ["alone", *long_recordings.WAYS] * 2
    assert record["joined"][1]["pieces"] == 3 and record["joined"][0]["difference"][0] == 0.0
    assert record["joined"][1]["kept"] > 90 and record["joined"][1]["split"] == 0
    assert all(row["words"] == 4 for row in record["joined"])
    silence = [row for row in record["without speech"] if row["recording"] == "silence"]
    assert silence[0] == {"recording": "silence", "way": "pauses", "pieces": 0, "seconds": 0, "words": 0}
    assert [len(row["found"]) <= 1 for row in record["one word"]] == [True] * 3
    assert [row["seconds"] for row in record["memory"]] == [12, 72]
