"""The mini recipe at its smallest size, through all stages, with the real models and real recordings.

Downloads the packages into the recipe's folder on first use. The trained model is worth nothing at this size: what is
tested is that the stages fit together, that a second run does nothing, and that a killed run ends in the same files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packed_answers import check_archive

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "mini" / "pam1"
SETS = ("test_asr", "test_count", "test_caption")

pytestmark = pytest.mark.slow


def start(*args: str) -> subprocess.Popen[str]:
    # The environment that runs the tests is the one to use; set-up has its own test.
    environment = {**os.environ, "PAM_NO_SETUP": "1", "PAM_PYTHON": sys.executable, "TQDM_MININTERVAL": "60"}
    return subprocess.Popen(
        ["./run.sh", "--size", "tiny", "--nj", "2", *args],
        cwd=RECIPE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*args: str) -> str:
    process = start(*args)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-5000:]
    return output


def results(tag: str) -> dict[str, str]:
    """The contents of the result files that must not depend on how often a run was interrupted."""
    exp = RECIPE / "exp" / tag
    files = {}
    for decode in ("decode_beam", "decode_beam_audio_off"):
        for name in SETS:
            for table in ("text", "score"):
                files[f"{decode}/{name}/{table}"] = (exp / decode / name / table).read_text()
            scores = json.loads((exp / decode / name / "scores.json").read_text())
            files[f"{decode}/{name}/scores"] = json.dumps(scores["tasks"], sort_keys=True)
    return files


@pytest.fixture(scope="module")
def unbroken() -> Iterator[str]:
    tag = "test_unbroken"
    shutil.rmtree(RECIPE / "exp" / tag, ignore_errors=True)
    run("--tag", tag)
    yield tag
    shutil.rmtree(RECIPE / "exp" / tag)


def test_all_stages_leave_their_results(unbroken: str) -> None:
    exp = RECIPE / "exp" / unbroken
    report = (exp / "RESULTS.md").read_text()
    for said in ("WER", "accuracy", "CIDEr-D", "audio off"):
        assert said.lower() in report.lower(), said
    record = json.loads((exp / "results.json").read_text())
    assert record
    for picture in ("learning_curve.png", "routing.png"):
        assert (exp / picture).read_bytes().startswith(b"\x89PNG")
    lines = (exp / "decode_beam" / "test_asr" / "nbest.jsonl").read_text().splitlines()
    routing = json.loads(lines[0])["routing"]
    assert set(routing["encoders"]) == {"whisper", "yamnet", "pyannote"} and len(routing["expert_probs"]) == 3
    passport = json.loads((RECIPE / "dump" / "tiny" / "raw" / "train" / "passport.json").read_text())
    assert passport["sample_rate"] == 16000 and passport["utterances"]


def test_a_second_run_does_nothing_again(unbroken: str) -> None:
    model = RECIPE / "exp" / unbroken / "model.safetensors"
    before, time_before = results(unbroken), model.stat().st_mtime_ns
    output = run("--tag", unbroken)
    assert "already trained" in output and output.count("already decoded") == 6
    assert results(unbroken) == before and model.stat().st_mtime_ns == time_before


def test_packed_it_answers_alike(unbroken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--tag", unbroken, "--stage", "6", "--stop_stage", "6")
    exp = RECIPE / "exp" / unbroken
    archive = exp / f"{unbroken}.zip"
    before = archive.read_bytes()
    run("--tag", unbroken, "--stage", "6", "--stop_stage", "6")
    assert archive.read_bytes() == before
    monkeypatch.chdir(RECIPE)  # models are found where the recipe has them
    data = RECIPE / "dump" / "tiny" / "raw" / "test_asr"
    check_archive(archive, exp / "decode_beam" / "test_asr", data, {})


def test_killed_in_every_stage_it_ends_in_the_same_files(unbroken: str) -> None:
    """kill -9 of the whole run as soon as a stage has left its first traces; then once more to the end."""
    tag = "test_killed"
    exp, data, dump = RECIPE / "exp" / tag, RECIPE / "data" / "tiny", RECIPE / "dump" / "tiny"
    for made in (exp, data, dump):
        shutil.rmtree(made, ignore_errors=True)
    traces = {
        "stage 1": data / "audio",
        "stage 2": dump / "raw" / "dev",
        "stage 3, feature cache": dump / "feats" / "whisper" / "train" / "cache.json",
        "stage 3, training": exp / "checkpoint.pth",
        "stage 4": exp / "decode_beam" / "test_count" / "key.json",
    }
    for stage, trace in traces.items():
        process = start("--tag", tag)
        deadline = time.monotonic() + 600
        while not trace.exists():
            assert process.poll() is None and time.monotonic() < deadline, f"{stage}: {trace} never came"
            time.sleep(0.02)
        # What run.sh started lives in process groups of its own; the tag or the folder is on every command line.
        os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-f", f"exp/{tag}[ /]|data/tiny|dump/tiny"], check=False)
        process.communicate()
    run("--tag", tag)
    assert results(tag) == results(unbroken)
    shutil.rmtree(exp)


def test_ctrl_c_leaves_nothing_running(unbroken: str) -> None:
    tag = "test_interrupted"
    shutil.rmtree(RECIPE / "exp" / tag, ignore_errors=True)
    process = start("--tag", tag, "--stage", "3")
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", f"exp/{tag}"], capture_output=True, text=True, check=False).stdout.split()
    assert not left, left
    shutil.rmtree(RECIPE / "exp" / tag, ignore_errors=True)
