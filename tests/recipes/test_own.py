"""The recipe for one's own data: import and split through run.sh; with the real models, all stages at size tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from libri_corpora import copy_recipe
from make_data import RATE, noise
from recipe_modules import local_modules

from pam_espnet.data.datadir import DataDir
from pam_espnet.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(ROOT / "egs/own/pam1/local", ("split",)) as modules:
        yield modules


def make(tasks: dict[str, str], speakers: dict[str, str], wav: dict[str, str] | None = None) -> DataDir:
    keys = sorted(tasks)
    wav = wav or {key: f"{key}.wav" for key in keys}
    return DataDir(Path("data"), wav, dict.fromkeys(keys, "a"), dict.fromkeys(keys, "b"), tasks, speakers)


def test_no_recording_and_no_speaker_is_in_two_sets(local: SimpleNamespace) -> None:
    keys = [f"u{n:03}" for n in range(400)]
    tasks = {key: "asr" if n < 200 else "count" for n, key in enumerate(keys)}
    speakers = {key: f"s{n % 40}" if n < 200 else "one" for n, key in enumerate(keys)}
    wav = {key: f"{n // 2}.wav" for n, key in enumerate(keys)}  # two questions about each recording
    data = make(tasks, speakers, wav)
    sets = local.split.split(data, ["dev", "test"], 10)
    assert sorted(key for part in sets.values() for key in part) == keys
    for column, of in ((wav, keys), (speakers, keys[:200])):
        seen = [{column[key] for key in part if key in of} for part in sets.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))
    for name in ("dev", "test"):
        for task in ("asr", "count"):
            assert 20 <= sum(tasks[key] == task for key in sets[name]) <= 40, (name, task)
    assert sets == local.split.split(data, ["dev", "test"], 10)
    assert list(local.split.split(data, ["test"], 10)) == ["test", "train"]


def test_what_is_too_little_is_refused(local: SimpleNamespace) -> None:
    tasks = dict.fromkeys(["a", "b", "c", "d"], "asr")
    sets = local.split.split(make(tasks, dict(tasks)), ["dev", "test"], 10)
    assert [len(part) for part in sets.values()] == [1, 1, 2]
    with pytest.raises(DataError, match=r"4 utterances in 1 groups: nothing is left for dev, test(.|\n)*--dev, --test"):
        local.split.split(make(tasks, dict(tasks), dict.fromkeys(tasks, "x.wav")), ["dev", "test"], 10)


# ---- through run.sh -------------------------------------------------------------------------------------------------


def write_jsonl(folder: Path, count: int = 12) -> Path:
    """Recordings and a jsonl beside them, with each task and a row that is no use."""
    rows = []
    for number in range(count):
        task, answer = (("asr", f"words {number}"), ("count", f"{number % 3}"), ("caption", "a dog barks"))[number % 3]
        (folder / "wav").mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"wav/{number}.wav", noise(1.0, seed=number), RATE, subtype="PCM_16")
        turns = [{"role": "user", "content": f"<audio>{task}?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "audios": [f"wav/{number}.wav"], "task": task})
    rows.append({"messages": [], "audios": ["wav/0.wav"]})
    path = folder / "my data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(recipe: Path, *args: str, called_from: Path | None = None) -> subprocess.CompletedProcess[str]:
    own = {"PAM_NO_SETUP": "1", "PAM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TQDM_MININTERVAL": "60"}
    command, cwd = [str(recipe / "run.sh"), "--nj", "1", "--size", "tiny", *args], called_from or recipe
    return subprocess.run(command, cwd=cwd, env={**os.environ, **own}, capture_output=True, text=True, check=False)


def test_from_a_jsonl_to_formatted_sets(tmp_path: Path) -> None:
    recipe = copy_recipe(tmp_path / "copy", "own", "mini")
    source = str(write_jsonl(tmp_path / "mine"))
    stages = ("--models", "false", "--stop_stage", "2")
    done = run(recipe, "--source", source, *stages)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (
        "12 utterances; 1 rows left out" in done.stdout
        and "line 13: " in (recipe / "data/tiny/imported/left_out.txt").read_text()
    )
    sets = {name: DataDir.load(recipe / "dump/tiny/raw" / name) for name in ("train", "dev", "test")}
    assert {name: data.per_task() for name, data in sets.items()} == {
        "train": {"asr": 2, "count": 2, "caption": 2},
        "dev": {"asr": 1, "count": 1, "caption": 1},
        "test": {"asr": 1, "count": 1, "caption": 1},
    }
    assert set(sets["train"].prompt.values()) == {"asr?", "count?", "caption?"}
    # the same, named as it is seen from another folder
    options = ("--source", "my data.jsonl", "--models", "false", "--stop_stage", "1")
    done = run(recipe, *options, called_from=tmp_path / "mine")
    assert done.returncode == 0 and "12 utterances; 1 rows left out" in done.stdout, done.stderr
    # sets of one's own, and a table with other names of columns
    table = tmp_path / "mine/table.csv"
    table.write_text("the sound,words\n" + "".join(f"wav/{n}.wav,w {n}\n" for n in range(4)), encoding="utf-8")
    command = ["local/data.sh", "--models", "false", "--data_dir", "other", "--task", "asr", "--prompt", "What?"]
    command += ["--columns", "audio=the\\ sound text=words", "--source", table, "--dev", table, "--test", table]
    own = {"python": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=recipe, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("train", "dev", "test"):
        data = DataDir.load(recipe / "other" / name)
        assert len(data) == 4 and set(data.prompt.values()) == {"What?"} and data.text["wav-3"] == "w 3"
    for args, expected in (
        (stages, "no data was named"),
        (("--source", "gone.jsonl", *stages), "gone.jsonl: no such file or folder"),
        (("--source", source, "--task", "sing", *stages), "--task sing: no such task"),
    ):
        done = run(recipe, *args)
        assert done.returncode != 0 and expected in done.stderr, (args, done.stderr)


@pytest.mark.services
def test_from_a_jsonl_to_a_scored_model(tmp_path: Path, mini_models: Path) -> None:
    """All stages with the real small models; at this size nothing is learnt."""
    recipe = copy_recipe(tmp_path / "copy", "own", "mini")
    (recipe / "downloads").mkdir()
    (recipe / "downloads/models").symlink_to(mini_models)
    source = str(write_jsonl(tmp_path / "mine"))
    done = run(recipe, "--source", source, "--models", "false", "--audio_off", "false", "--decode_nj", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((recipe / "exp/pam_tiny/results.json").read_text())
    [decoding] = results["decodings"]
    assert decoding["set"] == "test" and set(decoding["tasks"]) == {"asr", "count", "caption"}
    assert (recipe / "exp/pam_tiny/RESULTS.md").is_file()
    lines = (recipe / "exp/pam_tiny/decode_beam/test/text").read_text().splitlines()
    assert [line.split()[0] for line in lines] == DataDir.load(recipe / "dump/tiny/raw/test").utterances
