"""Exporting: what others read, and that importing it again gives the same tables."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from make_data import add_segments, make_data

from pam_espnet.cli import run_main
from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.format import format_data_dir

ROOT = Path(__file__).resolve().parents[3]
TABLES = ("text", "prompt", "utt2task", "utt2spk", "references")


def run(tool: str, *args: object) -> int:
    main = runpy.run_path(str(ROOT / f"utils/{tool}_data.py"))["main"]
    return run_main(main, [str(arg) for arg in args])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = make_data(tmp_path / "data")
    (root / "references").write_text('utt2 ["1", "ön e"]\n', encoding="utf-8")
    return root


def test_conversations_come_back_as_they_were(tmp_path: Path, data: Path) -> None:
    assert run("export", data, tmp_path / "a.jsonl") == 0
    first, second, *_ = rows_of(tmp_path / "a.jsonl")
    assert first["messages"] == [
        {"role": "user", "content": "<audio>What is it?"},
        {"role": "assistant", "content": "0"},
    ]
    assert first["audios"] == [str(data / "wav/utt1.wav")] and first["id"] == "utt1" and first["task"] == "asr"
    assert second["references"] == ["1", "ön e"] and first["references"] == []
    assert run("import", tmp_path / "a.jsonl", tmp_path / "again") == 0
    for name in (*TABLES, "wav.scp"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes(), name


@pytest.mark.parametrize("archives", [False, True])
@pytest.mark.parametrize("kind", ["messages", "nemo"])
def test_pieces_and_archives_become_files(tmp_path: Path, data: Path, kind: str, archives: bool) -> None:
    add_segments(data)
    if archives:
        format_data_dir(data, tmp_path / "raw", archive_mb=1)
    source = tmp_path / "raw" if archives else data
    arguments = ["export", source, tmp_path / "a.jsonl", "--kind", kind]
    if archives or kind == "messages":
        assert run(*arguments) == 1 and not (tmp_path / "a.jsonl").exists()
    assert run(*arguments, "--audio", tmp_path / "files") == 0
    whole, piece = DataDir.load(source), DataDir.load(data)
    for row in rows_of(tmp_path / "a.jsonl"):
        expected, _ = read_audio(*piece.source(row["id"])[:1], start=0.05, end=0.25)
        if kind == "messages":
            wave, rate = read_audio(row["audios"][0])
            assert rate == 16000 and np.array_equal(wave, expected)
        else:
            start = row.get("offset")
            assert (start is None) == archives and row["duration"] == pytest.approx(0.2)
            wave, _ = read_audio(row["audio_filepath"], start=start, end=None if start is None else start + 0.2)
            assert np.array_equal(wave, expected)
    assert run("import", tmp_path / "a.jsonl", tmp_path / "again") == 0
    again = DataDir.load(tmp_path / "again")
    assert [getattr(again, name) for name in TABLES] == [getattr(whole, name) for name in TABLES]
    if kind == "nemo" and not archives:
        assert [again.source(utt) for utt in again.utterances] == [
            (value, start, pytest.approx(end)) for value, start, end in map(whole.source, whole.utterances)
        ]


def test_what_cannot_be_exported_is_listed(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "wav/utt3.wav").unlink()
    assert run("export", data, tmp_path / "a.jsonl", "--kind", "nemo") == 0
    assert [row["id"] for row in rows_of(tmp_path / "a.jsonl")] == ["utt1", "utt2", "utt4"]
    printed = capsys.readouterr().out
    assert "3 of 4 utterances" in printed and "left out utt3: " in printed and "no such audio file" in printed
    for path in (data / "wav").iterdir():
        path.unlink()
    assert run("export", data, tmp_path / "b.jsonl") == 1 and not (tmp_path / "b.jsonl").exists()
    assert "no utterance could be exported" in capsys.readouterr().err
