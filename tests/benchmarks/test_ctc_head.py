"""The CTC head's error rate is that of its best paths, beside that of a decoding."""

import sys
from itertools import groupby
from pathlib import Path

import jiwer
import pytest
from benchmarks import ctc_head
from tiny_model import write_data, write_exp

from pam_espnet.data.datadir import validate
from pam_espnet.decode.options import AnswerOptions
from pam_espnet.decode.shards import read_wave
from pam_espnet.decode.speech_llm import SpeechLLM


def test_rates_beside_a_decoding(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = validate(write_data(tmp_path, "test", size=3))
    losses = {"asr": "ctc", "caption": "bag", "count": "bag"}
    write_exp(tmp_path, tiny_llm_dir, ctc=True, warm_start_conf={"losses": losses})
    keys = [key for key in data.utterances if data.utt2task[key] == "asr"]
    decoded = tmp_path / "decode_beam" / data.path.name / "text"
    decoded.parent.mkdir(parents=True)
    decoded.write_text("".join(f"{key} {data.text[key]}\n" for key in keys))

    speech = SpeechLLM.load(tmp_path, AnswerOptions())
    audio = speech.encode([read_wave(data, key, 16000) for key in keys], [data.prompt[key] for key in keys])
    head = speech.model.ctc
    assert head is not None
    paths = head.log_probs(audio.embeddings, audio.routing.expert).argmax(-1)
    texts = []
    for row, length in zip(paths.tolist(), audio.lengths.tolist(), strict=True):
        texts.append(speech.text([2 + one for one, _ in groupby(row[:length]) if one != 0]))
    expected = 100 * jiwer.wer([data.text[key] for key in keys], texts)
    assert expected > 0

    monkeypatch.setattr(sys, "argv", ["ctc_head.py", "--exp", str(tmp_path), "--data", str(data.path)])
    ctc_head.main()
    line = capsys.readouterr().out
    assert line.startswith(f"{data.path.name}: CTC head {expected:.1f} [") and "decoding 0.0 [0.0, 0.0]" in line
