"""Answers to every prompt about test recordings, and their table in a README."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from pam_espnet.bin.pam_answers import main
from pam_espnet.bin.pam_inference import answer
from pam_espnet.data.tasks import TASKS
from pam_espnet.errors import DataError
from pam_espnet.fileio import read_json, write_text
from pam_espnet.package import load
from pam_espnet.score.evidence_tables import readme_tables


def test_answers_in_a_readme(exp: Path, wave: np.ndarray, tmp_path: Path) -> None:
    data = tmp_path / "test_count"
    data.mkdir()
    soundfile.write(tmp_path / "a.flac", wave, 16000)
    prompt = TASKS["count"].default_prompt
    tables = {"wav.scp": tmp_path / "a.flac", "text": 1, "prompt": prompt, "utt2task": "count", "utt2spk": "a"}
    for name, value in tables.items():
        write_text(data / name, f"a {value}\n")
    options = ["--model", str(exp), "--tasks", "count", "caption", "--out", str(tmp_path / "ANSWERS.json")]
    assert main([*options, "--utterances", f"{data}/a"]) == 0
    (row,) = read_json(tmp_path / "ANSWERS.json")["rows"]
    model = load(exp)
    alone = {
        TASKS[task].default_prompt: answer(model, str(tmp_path / "a.flac"), TASKS[task].default_prompt, task, 30)[
            "answer"
        ]
        for task in ("count", "caption")
    }
    assert row == {"recording": "test_count/a", "right": {"prompt": prompt, "answer": "1"}, "answers": alone}
    write_text(tmp_path / "README.md", "<!-- table: ANSWERS.json -->\n<!-- end -->\n")
    table = readme_tables(tmp_path / "README.md")
    assert f"| {prompt} | {TASKS['caption'].default_prompt} |" in table
    assert f"| `test_count/a` | {alone[prompt]}<br>*right: 1* | {alone[TASKS['caption'].default_prompt]} |" in table
    with pytest.raises(DataError, match="has no utterance 'b'"):
        main([*options, "--utterances", f"{data}/b"])
