"""Importing manifests and tables that need no further library: as functions and as utils/import_data.py."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from make_data import RATE, noise

from pam_espnet.cli import run_main
from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import DataDir, Segment
from pam_espnet.data.exchange.convert import make_key
from pam_espnet.data.exchange.json_files import open_json, read_json_rows
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.pcm import encode_audio, to_pcm16
from pam_espnet.data.tables import read_table

ROOT = Path(__file__).resolve().parents[3]


def run(*args: object) -> int:
    main = runpy.run_path(str(ROOT / "utils/import_data.py"))["main"]
    return run_main(main, [str(arg) for arg in args])


def flac(seed: int, seconds: float = 0.3) -> bytes:
    return encode_audio(to_pcm16(noise(seconds, seed=seed))[0], RATE, "flac")


@pytest.fixture
def wavs(tmp_path: Path) -> Path:
    """Four recordings: wav/<speaker>/<n>.wav."""
    folder = tmp_path / "wav"
    for number in range(4):
        path = folder / f"s{number // 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(0.3, seed=number), RATE, subtype="PCM_16")
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversation(question: str, answer: str, audio: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<audio>{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "audios": [audio]}


# ---- conversations --------------------------------------------------------------------------------------------------


def test_conversations_become_utterances(
    tmp_path: Path, wavs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [{"type": "audio", "audio": "wav/s1/2.wav"}, {"type": "text", "text": "How many?"}]
    spoken = {"type": "input_audio", "input_audio": {"data": base64.b64encode(flac(9)).decode(), "format": "flac"}}
    rows = [
        conversation("What is  said?", "héllo\nworld", "wav/s0/0.wav"),
        {**conversation("", "two", "wav/s0/0.wav"), "task": "count"},  # the same recording, the task's question
        {
            "conversations": [
                {"from": "system", "value": "You are kind."},
                {"from": "human", "value": "<audio>\nDescribe it."},
                {"from": "gpt", "value": "a dog barks"},
            ],
            "audios": [str(wavs / "s0/1.wav")],
            "task": "caption",
            "references": ["a dog barks", "barking", ""],
            "speaker": "some body",
        },
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": 3}], "task": "count"},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "3"}], "task": "count"},
        {"query": "<audio>Say it", "response": "yes", "audios": "wav/s1/3.wav ", "id": "mine/1", "references": [""]},
        {"messages": [{"role": "user", "content": [spoken]}, {"role": "assistant", "content": "bytes"}]},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    assert run("a.jsonl", "out", "--task", "asr") == 0
    data = DataDir.load("out")
    assert data.text == {
        "wav-s0-0": "héllo world",
        "wav-s0-0-2": "two",
        "wav-s0-1": "a dog barks",
        "wav-s1-2": "3",
        "mine-1": "yes",
        "line_7": "bytes",
    }
    assert data.prompt["wav-s0-0"] == "What is said?" and data.prompt["mine-1"] == "Say it"
    assert data.prompt["wav-s0-0-2"] == "How many people are speaking?"
    assert data.prompt["line_7"] == "Transcribe the speech."
    assert data.utt2task["wav-s0-1"] == "caption" and data.utt2task["mine-1"] == "asr"
    assert data.references == {"wav-s0-1": ["a dog barks", "barking"], "mine-1": ["yes"]}
    assert data.utt2spk["wav-s0-1"] == "some_body" and data.utt2spk["mine-1"] == "mine-1"
    assert data.wav["wav-s0-0"] == data.wav["wav-s0-0-2"] == str(wavs / "s0/0.wav")
    archive = tmp_path / "out/audio.1.ark"
    assert data.wav["line_7"].startswith(f"{archive}:") and archive.read_bytes().count(flac(9)) == 1
    printed = capsys.readouterr().out
    assert "6 utterances; 1 rows left out" in printed and "1 rows: a system message is not kept" in printed
    assert (tmp_path / "out/left_out.txt").read_text() == (
        "line 4: the content of a message is neither text nor a list of parts\n"
    )
    passport = format_data_dir("out", "raw")  # everything can be read
    assert len(passport.utterances) == 6 and not passport.skipped


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**conversation("a", "b", "x.wav"), "audios": ["x.wav", "y.wav"]}, "has 2 recordings"),
        (
            {"messages": conversation("a", "b", "")["messages"] * 2, "audios": ["x.wav"]},
            "has 2 questions and 2 answers",
        ),
        ({"messages": [{"role": "tool", "content": "1"}], "audios": ["x.wav"]}, "a message of 'tool'"),
        ({"messages": "hello", "audios": ["x.wav"]}, "not a list of objects"),
        (conversation("a", "", "wav/s0/0.wav"), "no text"),
        ({**conversation("a", "b", "wav/s0/0.wav"), "task": "sing"}, "task 'sing' is none of asr, count"),
        (conversation("a", "b", "gone.wav"), "missing: no file"),
        (conversation("a", "b", "sph2pipe x.sph |"), "is a command, which is not run"),
        (conversation("a", "b", "https://example.org/x.wav"), "is an address, which is not fetched"),
        (conversation("a", "b", {"path": None, "array": [0.0]}), "an array of samples"),
        (conversation("a", "b", "data:audio/wav;base64,???"), "not base64"),
        ({**conversation("a", "b", "wav/s0/1.wav"), "id": "0"}, "the id '0' is that of line 1"),
        (["no", "object"], "not a JSON object"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_the_reason(
    tmp_path: Path, wavs: Path, row: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{**conversation("q", "a", f"wav/s0/{number}.wav"), "id": str(number)} for number in (0, 1)]
    write_rows(tmp_path / "a.jsonl", [good[0], row, good[1]])
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "--task", "asr") == 0
    assert DataDir.load(tmp_path / "out").utterances == ["0", "1"]
    [line] = (tmp_path / "out/left_out.txt").read_text().splitlines()
    assert line.startswith("line 2: ") and reason in line
    assert "1 rows left out" in capsys.readouterr().out


def test_missing_recordings_reach_the_passport(tmp_path: Path, wavs: Path) -> None:
    rows = [{**conversation("q", "a", f"wav/s0/{number}.wav"), "id": f"u{number}"} for number in (0, 1, 7)]
    write_rows(tmp_path / "a.jsonl", [*rows, {**conversation("q", "a", None), "id": "u8"}])
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "--task", "asr") == 0
    missing = read_table(tmp_path / "out/missing")
    assert missing == {"u7": f"missing: no file {wavs / 's0/7.wav'}", "u8": "missing: the row has no audio"}
    assert format_data_dir(tmp_path / "out", tmp_path / "raw").skipped == missing


# ---- JSON files -----------------------------------------------------------------------------------------------------


def test_arrays_lines_and_gzip_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"audio": f"{n}.wav", "text": "ü" * n * 9000} for n in range(12)]  # longer than a block
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    (tmp_path / "c.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with gzip.open(tmp_path / "d.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz"):
        assert [dict(row.values) for row in read_json_rows(tmp_path / name)] == rows, name
    assert [row.where for row in open_json(tmp_path / "b.json").read(None, 10)] == ["element 11", "element 12"]
    (tmp_path / "e.json").write_text("[]")
    assert list(read_json_rows(tmp_path / "e.json")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"audios": []}\n', "no manifest of a known kind: the keys of its first row are audios"),
        ("a.jsonl", b"{broken\n", "it has no row that can be read"),
        ("a.json", b'[{"audio": "x", "text": "y"}, {"audio": }]', "element 2 of the array is not JSON"),
        ("a.jsonl", b'{"audio": "x", "text": "caf\xe9"}\n', "is not UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8bno", "cannot be unpacked"),
        ("a.csv", b"file_name\nx.wav\n", "a.csv:1: its first line names no two columns"),
        ("a.csv", b"audio,text,text\n", "its first line names no two columns, or one twice"),
        ("a.csv", b'audio,text\nx.wav,"a\n', "is not CSV: unexpected end"),
        ("a.csv", b"sound,words\nx.wav,a\n", "line 2 has no column audio/.* for audio; its columns are sound, words"),
        ("a.txt", b"x", "is of no known kind(.|\n)*a .jsonl"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "out", "--task", "asr") == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_broken_line_costs_itself_alone(tmp_path: Path, wavs: Path) -> None:
    lines = [json.dumps({"audio_filepath": f"wav/s0/{n}.wav", "text": "a"}) for n in (0, 1)]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], lines[1][:-5], "", lines[1]]))
    assert run(tmp_path / "a.jsonl", tmp_path / "out", "--task", "asr") == 0
    assert DataDir.load(tmp_path / "out").utterances == ["wav-s0-0", "wav-s0-1"]
    assert (tmp_path / "out/left_out.txt").read_text().startswith("line 2: not JSON: ")


# ---- NeMo -----------------------------------------------------------------------------------------------------------


def test_nemo_manifests_have_pieces(tmp_path: Path, wavs: Path) -> None:
    rows = [
        {"audio_filepath": "wav/s0/0.wav", "offset": 0.05, "duration": 0.1, "text": "one"},
        {"audio_filepath": "wav/s0/0.wav", "offset": 0.15, "duration": 0.1, "text": "two", "speaker": "a"},
        {"audio_filepath": "wav/s0/1.wav", "duration": 0.3, "text": "whole"},
        {"audio_filepath": "wav/s1/2.wav", "duration": -1, "text": "no duration"},
        {"audio_filepath": "wav/s1/3.wav", "offset": "x", "duration": 0.1, "text": "bad"},
        {"audio_filepath": "wav/s1/3.wav", "offset": 0.1, "duration": 0, "text": "bad"},
    ]
    write_rows(tmp_path / "train_manifest.json", rows)
    assert run(tmp_path / "train_manifest.json", tmp_path / "out", "--task", "asr") == 0
    data = DataDir.load(tmp_path / "out")
    first = "rec-wav-s0-0-0000050-0000150"
    assert data.segments == {
        "wav-s0-0-0000050-0000150": Segment(first, 0.05, pytest.approx(0.15)),
        "wav-s0-0-0000150-0000250": Segment(first, 0.15, 0.25),
        "wav-s0-1": Segment("rec-wav-s0-1", 0, 0.3),
        "wav-s1-2": Segment("rec-wav-s1-2", 0, 0.3),
    }
    assert len(data.wav) == 3 and data.utt2spk["wav-s0-0-0000150-0000250"] == "a"
    reasons = (tmp_path / "out/left_out.txt").read_text()
    assert "line 5: offset 'x' is not" not in reasons and "line 5: start 'x' is not a number of seconds" in reasons
    assert "line 6: needs 0 <= start < end" in reasons
    passport = format_data_dir(tmp_path / "out", tmp_path / "raw")
    assert passport.utterances["wav-s0-0-0000150-0000250"]["num_samples"] == 1600


# ---- CSV ------------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_csv(tmp_path: Path, wavs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["file_name,answer a,answer b,who", *(f's{n // 2}/{n}.wav,"a, {n}",b {n},s{n // 2}' for n in range(4))]
    (wavs / "metadata.csv").write_text("\ufeff" + "\r\n".join([*lines, "s0/0.wav,too few"]), encoding="utf-8")
    (wavs / "other.csv").write_text("x,y\n")
    options = ["--task", "caption", "--columns", "text=answer a", "references=answer a,answer b", "speaker=who"]
    assert run(wavs, tmp_path / "out", *options) == 0
    data = DataDir.load(tmp_path / "out")
    assert data.utterances == ["s0-0", "s0-1", "s1-2", "s1-3"] and data.text["s0-1"] == "a, 1"
    assert data.references is not None and data.references["s1-3"] == ["a, 3", "b 3"]
    assert data.utt2spk["s1-3"] == "s1"
    assert "line 6: 2 fields, and the first line names 4" in (tmp_path / "out/left_out.txt").read_text()
    (wavs / "metadata.jsonl").write_text('{"file_name": "s0/1.wav", "text": "of the jsonl"}\n')
    assert run(wavs, tmp_path / "lines", "--task", "asr") == 0
    assert DataDir.load(tmp_path / "lines").text == {"s0-1": "of the jsonl"}
    (wavs / "metadata.jsonl").unlink()
    (wavs / "metadata.csv").rename(wavs / "another.csv")
    assert run(wavs, tmp_path / "more", *options) == 1
    assert "holds another.csv, other.csv: which rows" in capsys.readouterr().err


def test_tables_with_tabs_keep_quotes_and_audio_has_a_root(tmp_path: Path, wavs: Path) -> None:
    """As Common Voice has them."""
    (tmp_path / "validated.tsv").write_text('client_id\tpath\tsentence\nme\t0.wav\t"Quoted, he said\nme\t1.wav\tno\n')
    assert run(tmp_path / "validated.tsv", tmp_path / "out", "--task", "asr", "--audio_root", wavs / "s0") == 0
    data = DataDir.load(tmp_path / "out")
    assert data.text == {"0": '"Quoted, he said', "1": "no"} and set(data.utt2spk.values()) == {"me"}


# ---- options, resuming, archives ------------------------------------------------------------------------------------


def test_options_are_checked(tmp_path: Path, wavs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_rows(tmp_path / "a.jsonl", [{"audio": "wav/s0/0.wav", "text": "a"}])
    for options, message in (
        (["--task", "sing"], "--task sing: no such task; there are asr"),
        (["--columns", "text"], "--columns takes FIELD=COLUMN"),
        (["--columns", "words=text"], "--columns words=...: no such field"),
        (["--columns", "text=words"], "line 1 has no column words for text; its columns are audio, text"),
        (["--split", "train"], "--split: "),
        (["--prompt", "a", "--prompts", "b"], "one of the two"),
        ([], "1 of 1 rows cannot be used(.|\n)*no task: see --task"),
    ):
        assert run(manifest, tmp_path / "out", *options) == 1  # what failed at once does not bind the next one
        assert re.search(message, capsys.readouterr().err), message
    assert run(tmp_path / "gone.jsonl", tmp_path / "out") == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_wordings_are_drawn_by_key(tmp_path: Path, wavs: Path) -> None:
    (tmp_path / "prompts.txt").write_text("What is said?\nTranscribe.\n")
    rows = [{"audio": "wav/s0/0.wav", "text": "a", "id": str(n)} for n in range(40)]
    manifest = write_rows(tmp_path / "a.jsonl", [*rows, {**rows[0], "id": "own", "prompt": "My own?"}])
    assert run(manifest, tmp_path / "out", "--task", "asr", "--prompts", tmp_path / "prompts.txt") == 0
    prompts = DataDir.load(tmp_path / "out").prompt
    assert set(prompts.values()) == {"What is said?", "Transcribe.", "My own?"} and prompts["own"] == "My own?"


def test_copied_recordings_need_their_files_no_more(tmp_path: Path, wavs: Path) -> None:
    rows = [{"audio_filepath": f"wav/s0/{n % 2}.wav", "offset": 0.1, "duration": 0.1, "text": str(n)} for n in range(4)]
    manifest = write_rows(tmp_path / "a.jsonl", rows)
    assert run(manifest, tmp_path / "out", "--task", "asr", "--copy") == 0
    wave, rate = read_audio(wavs / "s0/1.wav")
    for path in wavs.rglob("*.wav"):
        path.unlink()
    data = DataDir.load(tmp_path / "out")
    assert len(data.wav) == 2 and len(data) == 4  # a recording is copied once, however many pieces it has
    source, start, end = data.source("wav-s0-1-0000100-0000200")
    piece, _ = read_audio(source, start=start, end=end)
    assert rate == RATE and np.array_equal(piece, wave[1600:3200])


def test_an_import_is_not_mixed_with_another(tmp_path: Path, wavs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"audio": f"wav/s0/{n}.wav", "text": "a"} for n in range(2)]
    manifest = write_rows(tmp_path / "a.jsonl", rows)
    assert run(manifest, tmp_path / "out", "--task", "asr", "--first", 1) == 0
    assert DataDir.load(tmp_path / "out").utterances == ["wav-s0-0"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run(manifest, tmp_path / "out", "--task", "asr", "--first", 1) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run(manifest, tmp_path / "out", "--task", "asr") == 1
    assert "changed: options.first" in capsys.readouterr().err
    write_rows(manifest, rows[:1])
    assert run(manifest, tmp_path / "out", "--task", "asr", "--first", 1) == 1
    assert f"to import it again delete {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_killed_import_goes_on_and_ends_in_the_same_files(tmp_path: Path) -> None:
    rows = [
        {"audio": {"bytes": None}, "text": "gone", "id": f"gone{n}"} if n % 10 == 9 else
        {"audio": f"data:audio/flac;base64,{base64.b64encode(flac(n, 1.0)).decode()}", "text": f"{n}", "id": f"u{n}"}
        for n in range(200)
    ]  # fmt: skip
    manifest = write_rows(tmp_path / "a.jsonl", rows)
    options = ["--task", "asr", "--archive_mb", "1"]
    assert run(manifest, tmp_path / "whole", *options) == 0
    command = [sys.executable, ROOT / "utils/import_data.py", manifest, tmp_path / "killed", *options]
    slow = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (tmp_path / "sitecustomize.py").write_text(
        "import pam_espnet.data.exchange.convert as c, time\n"
        "old = c.Converter.convert\n"
        "c.Converter.convert = lambda self, row: (time.sleep(0.01), old(self, row))[1]\n"
    )
    archive = tmp_path / "killed/audio.2.ark"
    process = subprocess.Popen(command, env=slow, stderr=subprocess.DEVNULL)
    while not archive.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = (tmp_path / "killed/.import.jsonl").read_text().count("\n")
    assert 0 < done < 200 and not (tmp_path / "killed/wav.scp").exists()
    finished = archive.stat().st_mtime_ns
    assert run(manifest, tmp_path / "killed", *options) == 0
    assert archive.stat().st_mtime_ns == finished  # not written again
    one, two = DataDir.load(tmp_path / "whole"), DataDir.load(tmp_path / "killed")
    for name in ("text", "prompt", "utt2task", "utt2spk", "missing", "left_out.txt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    for utt in one.utterances:
        assert np.array_equal(read_audio(one.wav[utt], key=utt)[0], read_audio(two.wav[utt], key=utt)[0])
    assert not list((tmp_path / "killed").glob(".audio.*"))


def test_keys() -> None:
    assert make_key(" a b/c\\d ") == "a_b-c-d" and make_key("../x") == "x" and make_key("-a") == "a"
    assert len(make_key("ü" * 300).encode()) <= 200
