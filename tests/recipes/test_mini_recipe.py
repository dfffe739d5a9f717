"""A copy of the mini recipe at its smallest size, through all stages, with the real models and real recordings.

The trained model is worth nothing at this size: what is tested is that the stages fit together, that a second run does
nothing, and that a killed run ends in the same files.
"""

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
from libri_corpora import copy_recipe
from marked_processes import MARK, kill_all, running
from packed_answers import check_archive

SETS = ("test_asr", "test_voices", "test_count", "test_caption")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]


def mark_of(recipe: Path, tag: str) -> str:
    return f"{recipe}:{tag}"


def start(recipe: Path, tag: str, *args: str) -> subprocess.Popen[str]:
    # The environment that runs the tests is the one to use; set-up has its own test.
    own = {"PAM_NO_SETUP": "1", "PAM_PYTHON": sys.executable, "TQDM_MININTERVAL": "60", MARK: mark_of(recipe, tag)}
    return subprocess.Popen(
        ["./run.sh", "--size", "tiny", "--nj", "2", "--tag", tag, *args],
        cwd=recipe,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(recipe: Path, tag: str, *args: str) -> str:
    process = start(recipe, tag, *args)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-5000:]
    return output


def results(exp: Path) -> dict[str, str]:
    """The contents of the result files that must not depend on how often a run was interrupted."""
    files = {}
    for decode in ("decode_beam", "decode_beam_audio_off"):
        names = SETS if decode == "decode_beam" else [name for name in SETS if name != "test_voices"]
        for name in names:
            for table in ("text", "score"):
                files[f"{decode}/{name}/{table}"] = (exp / decode / name / table).read_text()
            scores = json.loads((exp / decode / name / "scores.json").read_text())
            files[f"{decode}/{name}/scores"] = json.dumps(scores["tasks"], sort_keys=True)
    return files


@pytest.fixture(scope="module")
def recipe(mini_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that has what the checkout's recipe has downloaded."""
    copy = copy_recipe(tmp_path_factory.mktemp("mini"), "mini")
    (copy / "downloads").symlink_to(mini_models.parent)
    return copy


@pytest.fixture(scope="module")
def unbroken(recipe: Path) -> Path:
    """The experiment of a run that nothing interrupted."""
    run(recipe, "test_unbroken")
    return recipe / "exp/test_unbroken"


@pytest.fixture
def tag(recipe: Path) -> Iterator[str]:
    """An experiment of the test's own, no process of which stays."""
    yield "test_stopped"
    kill_all(mark_of(recipe, "test_stopped"))
    shutil.rmtree(recipe / "exp/test_stopped", ignore_errors=True)


def test_all_stages_write_their_results(recipe: Path, unbroken: Path) -> None:
    report = (unbroken / "RESULTS.md").read_text()
    for word in ("WER", "accuracy", "CIDEr-D", "audio off"):
        assert word.lower() in report.lower(), word
    record = json.loads((unbroken / "results.json").read_text())
    assert record
    for picture in ("learning_curve.png", "routing.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    lines = (unbroken / "decode_beam/test_asr/nbest.jsonl").read_text().splitlines()
    routing = json.loads(lines[0])["routing"]
    assert set(routing["encoders"]) == {"whisper", "yamnet", "pyannote"} and len(routing["expert_probs"]) == 3
    passport = json.loads((recipe / "dump/tiny/raw/train/passport.json").read_text())
    assert passport["sample_rate"] == 16000 and passport["utterances"]


def test_second_run_does_nothing_again(recipe: Path, unbroken: Path) -> None:
    """Stage 6, which the first did not have, packs; asked for again, it makes the same file."""
    model, archive = unbroken / "model.safetensors", unbroken / f"{unbroken.name}.zip"
    before, time_before = results(unbroken), model.stat().st_mtime_ns
    output = run(recipe, unbroken.name, "--stop_stage", "6")
    assert "already trained" in output and output.count("already decoded") == 7  # four sets, three controls
    assert results(unbroken) == before and model.stat().st_mtime_ns == time_before
    packed = archive.read_bytes()
    run(recipe, unbroken.name, "--stage", "6", "--stop_stage", "6")
    assert archive.read_bytes() == packed


def test_archive_answers_alike(recipe: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = unbroken / f"{unbroken.name}.zip"
    if not archive.exists():  # this test was asked for alone
        run(recipe, unbroken.name, "--stage", "6", "--stop_stage", "6")
    monkeypatch.chdir(recipe)  # models are found where the recipe has them
    check_archive(archive, unbroken / "decode_beam/test_asr", recipe / "dump/tiny/raw/test_asr", {})


@pytest.mark.services  # minutes
def test_run_killed_in_every_stage_ends_in_the_same_files(recipe: Path, unbroken: Path, tag: str) -> None:
    """kill -9 of the whole run as soon as a stage has written its first traces; then once more to the end."""
    exp, data, dump = recipe / "exp" / tag, recipe / "data/tiny", recipe / "dump/tiny"
    for made in (data, dump):
        shutil.rmtree(made)
    traces = [  # the stage to begin with, which is the one that was killed before, and what to wait for
        (1, data / "audio"),
        (1, dump / "raw/dev"),
        (2, dump / "feats/whisper/train/cache.json"),
        (3, exp / "checkpoint.pth"),
        (3, exp / "decode_beam/test_count/key.json"),
    ]
    for stage, trace in traces:
        process = start(recipe, tag, "--stage", str(stage))
        deadline = time.monotonic() + 600
        while not trace.exists():
            assert process.poll() is None and time.monotonic() < deadline, f"{trace} never came"
            time.sleep(0.02)
        kill_all(mark_of(recipe, tag))
        process.communicate()
        assert process.returncode == -signal.SIGKILL, trace
    run(recipe, tag, "--stage", "4")
    assert results(exp) == results(unbroken)


def test_terminated_run_ends_all_its_processes(recipe: Path, unbroken: Path, tag: str) -> None:
    process = start(recipe, tag, "--stage", "3")
    deadline = time.monotonic() + 300
    while not list((recipe / "exp" / tag / "log").glob("cache.*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    time.sleep(1)
    assert not running(mark_of(recipe, tag))
