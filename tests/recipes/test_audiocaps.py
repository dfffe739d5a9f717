"""The AudioCaps recipe on a synthetic corpus: the official columns and file names, tones and noise for clips.

Everything runs on a copy of the recipe, so that nobody's data is touched.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from audiocaps_corpus import COLUMNS, VIDEOS, WORDS, rows_of, write_audio, write_clip, write_csv, write_release
from packed_answers import check_archive
from recipe_modules import local_modules
from services import unavailable

from pam_espnet.data.datadir import DataDir
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.passport import Passport
from pam_espnet.data.prompts import read_prompts
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.fileio import read_json

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "egs" / "audiocaps" / "pam1" / "local"
MODULES = ("captions", "clips", "fetch", "hosted", "prepare")


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(LOCAL, MODULES) as modules:
        yield modules


@pytest.fixture
def corpus(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(csv=write_release(tmp_path / "csv"), audio=write_audio(tmp_path / "audio"), root=tmp_path)


def prepare(local: SimpleNamespace, corpus: SimpleNamespace, *more: str) -> Path:
    args = ["--version", "1", "--csv", str(corpus.csv), "--audio", str(corpus.audio)]
    args += ["--data_dir", str(corpus.root / "data"), "--prompts", str(LOCAL.parent / "conf/prompts/caption.txt")]
    assert local.prepare.main([*args, *more]) == 0
    return corpus.root / "data"


# ---- data directories -----------------------------------------------------------------------------------------------


def test_sets_captions_prompts_and_what_is_missing(
    local: SimpleNamespace, corpus: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepare(local, corpus)
    train, dev, test = (DataDir.load(data / name) for name in ("train", "dev", "test"))
    assert train.utterances == ["Y-aaaaaaaa_1_0", "Yaaaaaaaaaa2_10", "Yaaaaaaaaaa3_20", "Yaaaaaaaaaa4_30"]
    assert train.references is None and set(train.text.values()) == {WORDS[0]}
    assert test.references is not None and dev.references is not None
    for directory in (dev, test):
        for key, several in (directory.references or {}).items():
            assert several == list(WORDS) and directory.text[key] == WORDS[0]
    assert test.wav["Ycccccccccc2_10"].endswith("3001.flac")  # by the id of any of its captions
    prompts = read_prompts(LOCAL.parent / "conf/prompts/caption.txt")
    assert len(prompts) > 1 and set(test.prompt.values()) == set(dev.prompt.values()) == {prompts[0]}
    assert set(train.prompt.values()) <= set(prompts)
    assert (data / "test/missing").read_text() == "Ycccccccccc4_30 missing: in no folder of clips\n"
    assert not (data / "dev/missing").exists()
    out = capsys.readouterr().out
    assert "5 captions, and release 1 has 49838" in out
    assert ["test", "4", "3", "1", "15"] in [line.split() for line in out.splitlines()]

    # the clip turns up: no longer missing
    write_clip(corpus.audio / "cccccccccc4.wav", 20)
    prepare(local, corpus)
    assert not (data / "test/missing").exists() and len(DataDir.load(data / "test")) == 4


def test_a_clone_of_the_official_repository(local: SimpleNamespace, corpus: SimpleNamespace) -> None:
    clone = corpus.root / "clone"
    write_release(clone / "dataset")
    write_release(clone / "dataset2.0")
    for version, folder in ((1, "dataset"), (2, "dataset2.0")):
        assert local.captions.csv_folder(clone, version) == clone / folder
    shutil.rmtree(clone / "dataset2.0")
    with pytest.raises(DataError, match=r"dataset2\.0.*\n.*git clone"):
        local.captions.csv_folder(clone, 2)
    with pytest.raises(ConfigError, match="releases 1 and 2"):
        local.captions.csv_folder(clone, 3)


def test_the_captions_of_the_other_release_are_recognised(
    local: SimpleNamespace, corpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(local.captions.RELEASES, 2, local.captions.Release("dataset2.0", {"train": 5, "dev": 10}))
    with pytest.raises(DataError, match=r"train\.csv: has 5 captions: those of release 2, not 1\n.*--size v2"):
        local.captions.read_release(corpus.csv, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [(*COLUMNS[:3], "text"), *rows[1:]], r"test\.csv:1: has no column caption; .* found are:"),
        (lambda rows: [("id", "youtube_id", "start_time", "caption"), *rows[1:]], "no column audiocap_id"),
        (lambda rows: [*rows, ("3000", "ddddddddddd", "0", "again")], r"test\.csv:22: audiocap_id 3000 .* line 2 "),
        (lambda rows: [*rows, ("4000", "#NAME?", "0", "a dog")], r"csv:22: youtube_id '#NAME\?'.*\n.*spreadsheet"),
        (lambda rows: [*rows, ("4000", "../../../etc", "0", "a dog")], "not the id of a video"),
        (lambda rows: [*rows, ("4000", "ddddddddddd", "soon", "a dog")], "start_time 'soon'"),
        (lambda rows: [*rows, ("x", "ddddddddddd", "0", "a dog")], "audiocap_id 'x' is not a number"),
        (lambda rows: [*rows, ("4000", "ddddddddddd", "0")], "has 3 fields"),
        (lambda rows: rows[:1], "has no captions"),
        (lambda rows: [], "columns found are: none"),
    ],
)
def test_a_changed_csv_names_file_and_line(
    local: SimpleNamespace, corpus: SimpleNamespace, change: Any, message: str
) -> None:
    file = corpus.csv / "test.csv"
    rows = change([COLUMNS, *rows_of("test", 3000)])
    with open(file, "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows(rows)
    with pytest.raises(DataError, match=message):
        prepare(local, corpus)


def test_columns_in_another_order_a_byte_order_mark_and_quotes(local: SimpleNamespace, corpus: SimpleNamespace) -> None:
    rows = [tuple(reversed(row)) for row in rows_of("train", 1000)]
    write_csv(corpus.csv / "train.csv", [*rows, ("", "0", "eeeeeeeeeee", "77")], tuple(reversed(COLUMNS)))
    text = (corpus.csv / "train.csv").read_text(encoding="utf-8").replace("a dog barks", '"a dog, ""barking"""', 1)
    (corpus.csv / "train.csv").write_text("\ufeff" + text, encoding="utf-8")
    clips = local.captions.read_release(corpus.csv, 1)["train"]
    assert clips[0].captions == ('a dog, "barking"',)
    assert [clip.video for clip in clips] == VIDEOS["train"]  # the row without a caption is left out


def test_training_keeps_off_the_test_clips_and_doubles_apart(local: SimpleNamespace, corpus: SimpleNamespace) -> None:
    extra = [("500", "cccccccccc1", "0", "a leak"), ("501", "aaaaaaaaaa2", "10", "a second caption")]
    write_csv(corpus.csv / "train.csv", [*rows_of("train", 1000), *extra])
    clips = local.captions.read_release(corpus.csv, 2)["train"]
    assert "cccccccccc1" not in {clip.video for clip in clips}
    assert [clip.key for clip in clips if clip.video == "aaaaaaaaaa2"] == [
        "Yaaaaaaaaaa2_10_1001",
        "Yaaaaaaaaaa2_10_501",
    ]


def test_wrong_folders(local: SimpleNamespace, corpus: SimpleNamespace) -> None:
    right = corpus.audio
    corpus.audio = corpus.root / "absent"
    with pytest.raises(DataError, match=r"absent: no such folder\n.*--audio"):
        prepare(local, corpus)
    corpus.audio = corpus.csv
    with pytest.raises(DataError, match="holds no audio files"):
        prepare(local, corpus)
    corpus.audio = corpus.root / "other"
    write_clip(corpus.audio / "song.wav", 0)
    with pytest.raises(DataError, match=r"none of the 5 clips of .*train\.csv.*song\.wav\n.*<youtube_id>"):
        prepare(local, corpus)
    corpus.audio, corpus.csv = right, corpus.root / "other"
    with pytest.raises(DataError, match=r"does not hold train\.csv, val\.csv, test\.csv.*\n.*--csv"):
        prepare(local, corpus)


def test_names_and_preferences(local: SimpleNamespace, tmp_path: Path) -> None:
    clip = local.captions.Clip("Yx", "aaaaaaaaaa1", 30, ("7", "8"), ("a", "b"))
    for name in ("one/8.wav", "one/aaaaaaaaaa1.mp3", "one/aaaaaaaaaa1_30.wav", "two/aaaaaaaaaa1_30.flac", "one/.x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    find = local.clips.find_clip
    files = local.clips.index_audio([tmp_path / "one", tmp_path / "two"])
    assert find(clip, files) == tmp_path / "one/aaaaaaaaaa1_30.wav"  # the first folder goes first
    assert find(clip, local.clips.index_audio([tmp_path])) == tmp_path / "two/aaaaaaaaaa1_30.flac"  # not compressed
    assert find(local.captions.Clip("Yx", "aaaaaaaaaa1", 10, ("7",), ("a",)), files) == tmp_path / "one/aaaaaaaaaa1.mp3"
    assert find(local.captions.Clip("Yx", "aaaaaaaaaa9", 10, ("7", "8"), ("a",)), files) == tmp_path / "one/8.wav"
    assert find(local.captions.Clip("Yx", "aaaaaaaaaa9", 10, ("7",), ("a",)), files) is None and ".x" not in files


# ---- fetching -------------------------------------------------------------------------------------------------------

# Plays yt-dlp: what it does for a video is in plan.json, one entry per call; each call is noted.
YTDLP = """#!{python}
import fcntl, json, pathlib, shutil, sys
folder = pathlib.Path({folder!r})
arguments = sys.argv[1:]
video = arguments[-1].split("?v=")[1]
out = pathlib.Path(arguments[arguments.index("--output") + 1].replace("%(ext)s", "flac").replace("%%", "%"))
with open(folder / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    plan = json.loads((folder / "plan.json").read_text())
    steps = plan.get(video, ["ok"])
    step = steps.pop(0) if len(steps) > 1 else steps[0]
    (folder / "plan.json").write_text(json.dumps(plan))
    with open(folder / "calls.jsonl", "a") as file:
        file.write(json.dumps(arguments) + "\\n")
if step == "ok":
    shutil.copy(folder / "clip.flac", out)
elif step == "junk":
    out.write_text("not audio")
elif step == "short":
    shutil.copy(folder / "short.flac", out)
elif step != "nothing":
    sys.exit("WARNING: x\\nERROR: [youtube] " + video + ": " + step)
"""


@pytest.fixture
def ytdlp(local: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replacements of yt-dlp and ffmpeg on PATH; the folder that steers them."""
    monkeypatch.setattr(local.fetch, "PAUSE", 0.01)
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in (("yt-dlp", YTDLP.format(python=sys.executable, folder=str(folder))), ("ffmpeg", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    write_clip(folder / "clip.flac", 0)
    write_clip(folder / "short.flac", 0, seconds=0.2)
    (folder / "plan.json").write_text("{}")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def fetch(local: SimpleNamespace, corpus: SimpleNamespace, *more: str) -> Path:
    out = corpus.root / "fetched"
    args = ["--version", "1", "--csv", str(corpus.csv), "--out", str(out), "--interval", "0"]
    assert local.fetch.main([*args, "--jobs", "3", *more]) == 0
    return out


def calls(folder: Path) -> list[list[str]]:
    file = folder / "calls.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_fetching_continues_where_it_stopped(
    local: SimpleNamespace, corpus: SimpleNamespace, ytdlp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {
        "-aaaaaaaa_1": ["HTTP Error 429: Too Many Requests", "Sign in to confirm you’re not a bot.", "ok"],
        "aaaaaaaaaa2": ["Video unavailable. This video has been removed by the uploader"],
        "aaaaaaaaaa3": ["unable to download video data: timed out", "ok"],
        "aaaaaaaaaa4": ["something else", "something else", "ok"],
        "aaaaaaaaaa5": ["junk", "nothing", "ok"],
        "bbbbbbbbbb1": ["Private video. Sign in if you've been granted access to this video"],
        "bbbbbbbbbb2": ["short", "short", "ok"],
        "cccccccccc1": ["Requested format is not available"],
    }
    (ytdlp / "plan.json").write_text(json.dumps(plan))
    out = fetch(local, corpus)
    names = sorted(path.name for path in out.glob("*.flac"))
    assert names[:2] == ["-aaaaaaaa_1_0.flac", "aaaaaaaaaa3_20.flac"]
    assert names[2:] == [f"cccccccccc{number}_{10 * number - 10}.flac" for number in (2, 3, 4)]
    assert "5 fetched, 2 gone, 4 failed" in capsys.readouterr().out
    made = calls(ytdlp)
    one = next(call for call in made if call[-1].endswith("cccccccccc4"))
    assert one[-1] == "https://www.youtube.com/watch?v=cccccccccc4"
    assert one[one.index("--download-sections") + 1] == "*30-40" and "flac" in one
    reasons = local.fetch.read_outcomes(out)
    assert reasons["aaaaaaaaaa2_10"] == "Video unavailable. This video has been removed by the uploader"
    assert reasons["bbbbbbbbbb2_10"].startswith("what was fetched is 0.20 s long")
    assert reasons["aaaaaaaaaa5_40"] == "yt-dlp left no file"
    assert "-aaaaaaaa_1_0" not in reasons

    # again: what is there and what is gone is not asked for
    with open(out / "fetch.jsonl", "a") as journal:
        journal.write('{"name": "half a li')
    fetch(local, corpus)
    asked = [call[-1].split("=")[1] for call in calls(ytdlp)]
    assert sorted(set(asked)) == ["aaaaaaaaaa4", "aaaaaaaaaa5", "bbbbbbbbbb2", "cccccccccc1"]
    assert (out / "aaaaaaaaaa4_30.flac").is_file() and (out / "aaaaaaaaaa5_40.flac").is_file()
    fetch(local, corpus, "--audio", str(corpus.audio))
    # bbbbbbbbbb1 and others are in the user's folder
    assert sorted({call[-1].split("=")[1] for call in calls(ytdlp)}) == []

    # what could not be fetched is listed with its reason
    corpus.audio = out
    data = prepare(local, corpus)
    assert (data / "train/missing").read_text().startswith("Yaaaaaaaaaa2_10 missing: Video unavailable. This video")
    assert "Ybbbbbbbbbb1_0 missing: Private video." in (data / "dev/missing").read_text()


def test_fetching_stops_after_repeated_refusals(
    local: SimpleNamespace, corpus: SimpleNamespace, ytdlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.fetch, "PATIENCE", 2)
    plan = {video: ["HTTP Error 429: Too Many Requests"] for split in VIDEOS.values() for video in split}
    (ytdlp / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match=r"slow down .* times in a row\n.*same command"):
        fetch(local, corpus)
    assert len(calls(ytdlp)) <= 3 + 3 * 3  # not every clip was tried
    assert set(local.fetch.read_journal(corpus.root / "fetched")) and not list((corpus.root / "fetched").glob("*.flac"))


def test_the_pace(local: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are ``interval`` apart; the pause doubles; complaints about one moment count once."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(local.fetch, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(local.fetch, "PATIENCE", 2)
    pace = local.fetch.Pace(interval=5.0)
    waited: list[float] = []

    def sleep(seconds: float) -> bool:
        waited.append(seconds)
        clock.now += seconds
        return False

    monkeypatch.setattr(pace.given_up, "wait", sleep)
    assert pace.wait() == 100.0 and pace.wait() == 105.0 and pace.wait() == 110.0 and waited == [5.0, 5.0]
    pace.complain(started=110.0)
    pace.complain(started=105.0)  # had begun before
    assert pace.complaints == 1 and pace.wait() == 170.0
    pace.complain(started=170.0)
    assert pace.wait() == 290.0  # twice as long
    pace.praise()
    assert pace.complaints == 0
    for _ in range(3):
        clock.now += 1.0
        pace.complain(started=clock.now)
    assert pace.given_up.is_set()


def test_programs_that_are_not_there(
    local: SimpleNamespace, corpus: SimpleNamespace, ytdlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(ytdlp))
    (ytdlp / "ffmpeg").unlink()
    with pytest.raises(ConfigError, match="ffmpeg"):
        fetch(local, corpus)
    (ytdlp / "yt-dlp").unlink()
    with pytest.raises(ConfigError, match=r"yt-dlp.*\n.*pip install yt-dlp"):
        fetch(local, corpus)
    with pytest.raises(ConfigError, match="--jobs"):
        fetch(local, corpus, "--jobs", "0")


# ---- through run.sh -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipe and of what it calls, with a size that this machine can hold."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "data", "dump", "exp", "downloads")
    for name in ("egs/TEMPLATE", "egs/audiocaps", "utils"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("tools/check_install.py", "setup.cfg"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    folder = root / "egs/audiocaps/pam1"
    small = {
        "warm_start_conf": {"steps": 2, "single_steps": 1, "max_utterances": 4},
        "max_epoch": 1,
        "num_iters_per_epoch": 2,
        "batching_conf": {"max_utterances": 4},
        "num_workers": 0,
        "resources": {"disk_gb": 0.01, "memory_gb": 0.1},
    }
    (folder / "conf/size/v1.yaml").write_text(yaml.safe_dump(small))
    return folder


def run(recipe: Path, *args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PAM_NO_SETUP": "1", "PAM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **env}
    command = [str(recipe / "run.sh"), "--nj", "1", *args]
    return subprocess.run(command, cwd=cwd or recipe, env=environment, capture_output=True, text=True, check=False)


def test_stages_1_and_2_with_every_format_a_corrupt_clip_and_a_folder_with_blanks(recipe: Path, tmp_path: Path) -> None:
    write_release(tmp_path / "the csv")
    audio = write_audio(tmp_path / "my clips")
    (audio / "cccccccccc1.wav").write_bytes(b"RIFF\0\0\0\0WAVEjunk")
    write_clip(audio / "aaaaaaaaaa5.wav", 30, seconds=20)  # a whole video instead of its ten seconds
    # relative paths start at the recipe's folder, wherever it is called from
    csv, clips = (os.path.relpath(folder, recipe) for folder in (tmp_path / "the csv", audio))
    done = run(recipe, "--csv", csv, f"--audio={clips}", "--stop_stage", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passports = {name: Passport.load(recipe / "dump/v1/raw" / name) for name in ("train", "dev", "test")}
    sources = sorted(Path(e["source"]).suffix for p in passports.values() for e in p.utterances.values())
    assert sources == [".WAV", ".flac", ".flac", ".m4a", ".mp3", ".wav", ".wav", ".webm"]
    for passport in passports.values():
        for entry in passport.utterances.values():
            assert entry["seconds"] == pytest.approx(1.5, abs=0.1)
    assert passports["train"].skipped["Yaaaaaaaaaa5_40"].startswith("too long: 20.00 s")
    test = passports["test"]
    assert test.skipped["Ycccccccccc4_30"] == "missing: in no folder of clips"
    assert test.skipped["Ycccccccccc1_0"].startswith("unreadable: ")
    assert len(test.utterances) == 2 and "1 missing" in test.summary() and "1 unreadable" in test.summary()
    references = DataDir.load(recipe / "dump/v1/raw/test").references
    assert references is not None and all(several == list(WORDS) for several in references.values())
    assert "2 utterances" in done.stdout and "2 skipped" in done.stdout


def test_help_has_the_options_of_the_recipe_and_of_all_recipes(recipe: Path) -> None:
    done = run(recipe, "--help")
    assert done.returncode == 0
    for option in ("--csv DIR", "--audio DIR", "--fetch_interval S", "--stage N", "--fusion NAME"):
        assert option in " ".join(done.stdout.split())


def test_mistakes_through_run_sh(recipe: Path, tmp_path: Path) -> None:
    write_release(tmp_path)
    stage = ("--stop_stage", "1", "--csv", str(tmp_path))
    for args, expected in (
        ((*stage,), "no folder with clips was named"),
        ((*stage, "--audio", str(tmp_path / "nowhere")), "no such folder"),
        (("--size", "v3"), "conf/size/v3.yaml"),
        (("--audio",), "--audio needs a value"),
        (("--fetch", "perhaps", *stage), "true or false"),
        (("--aduio", "x"), "--aduio"),
    ):
        done = run(recipe, *args)
        assert done.returncode != 0 and expected in done.stderr, (args, done.stderr)


def test_fetching_through_run_sh(recipe: Path, tmp_path: Path, ytdlp: Path) -> None:
    write_release(tmp_path / "csv")
    plan = {"cccccccccc4": ["Video unavailable"]}
    (ytdlp / "plan.json").write_text(json.dumps(plan))
    args = ("--fetch", "true", "--fetch_interval", "0", "--stop_stage", "1", "--csv", str(tmp_path / "csv"))
    done = run(recipe, *args)
    assert done.returncode == 0, done.stderr
    assert "10 fetched, 1 gone" in done.stdout
    assert "missing: Video unavailable" in (recipe / "data/v1/test/missing").read_text()
    shutil.rmtree(recipe / "downloads")


@pytest.mark.slow
@pytest.mark.services  # minutes
def test_stages_3_to_6_with_small_models(
    recipe: Path, tmp_path: Path, mini_models: Path, tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny LLM and the mini recipe's YAMNet instead of the recipe's models, for two batches."""
    write_release(tmp_path / "csv")
    audio = write_audio(tmp_path / "audio")
    small = {
        "llm": str(tiny_llm_dir),
        "llm_conf": {"dtype": "float32", "gradient_checkpointing": False},
        "frontend_conf": {
            "frame_rate": 6.25,
            "encoders": {
                **dict.fromkeys(("whisper", "wavlm", "wav2vec2", "ast")),
                "yamnet": {"type": "yamnet", "path": str(mini_models / "yamnet"), "layers": [11, 13]},
            },
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    (tmp_path / "decode.yaml").write_text("beam_size: 2\nmax_new_tokens: 8\n")
    done = run(
        recipe, "--csv", str(tmp_path / "csv"), "--audio", str(audio), "--tag", "small",
        "--train_config", f"conf/train.yaml {tmp_path / 'small.yaml'}",
        "--decode_config", str(tmp_path / "decode.yaml"), "--stop_stage", "6", "--train_nj", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    exp = recipe / "exp/small"
    assert "scored 3 of the 4 utterances of this set (skipped: 1 missing)" in done.stdout
    assert "not computed" in done.stdout or "SPICE" in done.stdout
    scores = read_json(exp / "decode_beam/test/scores.json")
    assert scores["coverage"] == {"scored": 3, "of": 4, "skipped": {"missing": 1}}
    assert {"cider_d", "rouge_l", "bleu_4"} <= set(scores["tasks"]["caption"])
    assert scores["details"]["caption"]["references_per_utterance"] == {"5": 3}
    report = (exp / "RESULTS.md").read_text(encoding="utf-8")
    assert "- beam, test: 3 of 4 scored (1 missing)" in report and "audio off" in report
    monkeypatch.chdir(recipe)
    placed = {"llm": tiny_llm_dir, "yamnet": mini_models / "yamnet"}
    check_archive(exp / "small.zip", exp / "decode_beam/test", recipe / "dump/v1/raw/test", placed, limit=1)


# ---- a Hugging Face dataset -----------------------------------------------------------------------------------------


@pytest.mark.services
@pytest.mark.parametrize("columns", ["start_time", "audiocap_id", "path"])
def test_clips_of_a_hugging_face_dataset(
    local: SimpleNamespace, corpus: SimpleNamespace, columns: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of all captions, as those datasets have them: some clips are missing, some are of no clip."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        unavailable("datasets", f"{error}: tools/setup.sh --extras import")
    import pyarrow
    import pyarrow.parquet

    write_clip(corpus.root / "clip.flac", 3)
    sound = (corpus.root / "clip.flac").read_bytes()
    folder = corpus.root / "hosted/data"
    folder.mkdir(parents=True)
    for number, (split, name) in enumerate((("train", "train"), ("val", "validation"), ("test", "test"))):
        rows = [row for row in rows_of(split, 1000 * (number + 1)) if row[1] not in ("aaaaaaaaaa2", "cccccccccc4")]
        rows.append(("9999", "zzzzzzzzzzz", "0", "of no clip"))
        if split == "test":
            rows[0] = (*rows[0][:3], "another caption")
        audio = [
            {"bytes": b"" if row[1] == "cccccccccc3" else sound, "path": f"Y{row[1]}_{row[2]}.flac"} for row in rows
        ]
        table = {"audio": audio, "caption": [row[3] for row in rows]}
        if columns != "path":
            table |= {"audiocap_id": [int(row[0]) for row in rows]}
        if columns == "start_time":
            table |= {"youtube_id": [row[1] for row in rows], "start_time": [float(row[2]) for row in rows]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}-00000-of-00001.parquet")
    hosted = corpus.root / "out"
    args = ["--version", "1", "--csv", str(corpus.csv)]
    collect = [*args, "--hf", str(folder.parent), "--out", str(hosted)]
    for _ in range(2):  # a second run finds everything done
        assert local.hosted.main(collect) == 0
        out = capsys.readouterr().out
        assert "16 rows of clips that are there already, 8 clips, 5 rows without audio, 3 rows of no clip" in out
        assert "1 rows have a caption that release 1 does not have" in out and "licence, by its card: none" in out
    args += ["--data_dir", str(corpus.root / "data"), "--prompts", str(LOCAL.parent / "conf/prompts/caption.txt")]
    assert local.prepare.main([*args, "--hosted", str(hosted)]) == 0
    test = DataDir.load(corpus.root / "data/test")
    assert test.utterances == ["Ycccccccccc1_0", "Ycccccccccc2_10"] and test.text["Ycccccccccc1_0"] == WORDS[0]
    assert test.wav["Ycccccccccc1_0"].startswith(f"{hosted}/test/audio.1.ark:")
    missing = (corpus.root / "data/test/missing").read_text()
    assert missing == "".join(f"Ycccccccccc{n}_{10 * n - 10} missing: not in the dataset\n" for n in (3, 4))
    passport = format_data_dir(corpus.root / "data/test", corpus.root / "raw")
    assert passport.skipped["Ycccccccccc4_30"] == "missing: not in the dataset"
    # a folder's file goes before; what is in neither says so
    assert local.prepare.main([*args, "--hosted", str(hosted), "--audio", str(corpus.audio)]) == 0
    assert DataDir.load(corpus.root / "data/train").wav["Yaaaaaaaaaa2_10"].endswith("sub/folder/Yaaaaaaaaaa2.flac")
    missing = (corpus.root / "data/test/missing").read_text()
    assert missing == "Ycccccccccc4_30 missing: not in the dataset, in no folder of clips\n"


@pytest.mark.services
def test_a_dataset_without_any_clip(local: SimpleNamespace, corpus: SimpleNamespace) -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        unavailable("datasets", f"{error}: tools/setup.sh --extras import")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"audio": [{"bytes": b"x", "path": "a.wav"}], "caption": ["a"]})
    pyarrow.parquet.write_table(table, corpus.root / "a.parquet")
    args = ["--version", "1", "--csv", str(corpus.csv), "--hf", str(corpus.root / "a.parquet")]
    with pytest.raises(DataError, match=r"none of the 11 clips of the CSVs .*'rows of no clip in the CSVs': 1"):
        local.hosted.main([*args, "--out", str(corpus.root / "out")])
