"""Importing with the real libraries: parquet that ``datasets`` and pyarrow wrote, cuts that lhotse wrote."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from dataset_hub import COMMIT, DatasetHub
from hub_server import running
from make_data import RATE, noise
from services import unavailable

from pam_espnet.cli import run_main
from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import DataDir, Segment
from pam_espnet.data.exchange.hub_datasets import STATE_EVERY, open_dataset
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.pcm import encode_audio, to_pcm16
from pam_espnet.fileio import read_json

pytestmark = pytest.mark.services
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True, scope="module")
def _libraries() -> None:
    try:
        import datasets  # noqa: F401
        import lhotse  # noqa: F401
    except ImportError as error:
        unavailable("datasets", f"{error}: tools/setup.sh --extras import")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(*args: object) -> int:
    main = runpy.run_path(str(ROOT / "utils/import_data.py"))["main"]
    return run_main(main, [str(arg) for arg in args])


def flac(seed: int, seconds: float = 0.3) -> bytes:
    return encode_audio(to_pcm16(noise(seconds, seed=seed))[0], RATE, "flac")


def rows_of(count: int, seconds: float = 0.3) -> dict[str, list[Any]]:
    return {
        "audio": [{"bytes": flac(n, seconds), "path": f"clip{n}.flac"} for n in range(count)],
        "sentence": [f"text {n}" for n in range(count)],
        "voices": [n % 2 for n in range(count)],
    }


def make_dataset(count: int, seconds: float = 0.3) -> Any:
    import datasets

    kinds = {
        "audio": datasets.Audio(sampling_rate=RATE),
        "sentence": datasets.Value("string"),
        "voices": datasets.ClassLabel(names=["one", "two"]),
    }
    # cast afterwards: making it of this kind at once would ask for torchcodec
    return datasets.Dataset.from_dict(rows_of(count, seconds)).cast(datasets.Features(kinds))


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parquet", "folder", "disk", "pyarrow", "column of bytes"])
def test_local_files(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    source, rows = tmp_path / "a.parquet", rows_of(4)
    if how == "parquet":
        make_dataset(4).to_parquet(str(source))
    elif how == "folder":
        source = tmp_path / "folder"
        for part in range(2):
            name = source / f"data/train-0000{part}-of-00002.parquet"
            name.parent.mkdir(parents=True, exist_ok=True)
            make_dataset(4).select(range(2 * part, 2 * part + 2)).to_parquet(str(name))
    elif how == "disk":
        source = tmp_path / "disk"
        make_dataset(4).save_to_disk(str(source))
    else:
        if how == "column of bytes":
            rows["audio"] = [value["bytes"] for value in rows["audio"]]
        pyarrow.parquet.write_table(pyarrow.table(rows), source)
    assert run(source, tmp_path / "out", "--task", "asr") == 0
    data = DataDir.load(tmp_path / "out")
    keys = [f"row_{n}" for n in range(1, 5)] if how == "column of bytes" else [f"clip{n}" for n in range(4)]
    assert data.utterances == keys and list(data.text.values()) == [f"text {n}" for n in range(4)]
    archive = (tmp_path / "out/audio.1.ark").read_bytes()
    assert all(flac(n) in archive for n in range(4))  # as they are
    assert len(format_data_dir(tmp_path / "out", tmp_path / "raw").utterances) == 4
    assert "4 utterances" in capsys.readouterr().out


def test_labels_become_words_and_columns_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(3).to_parquet(str(tmp_path / "a.parquet"))
    options = ["--task", "count", "--columns", "text=voices", "speaker=sentence"]
    assert run(tmp_path / "a.parquet", tmp_path / "out", *options) == 0
    data = DataDir.load(tmp_path / "out")
    assert list(data.text.values()) == ["one", "two", "one"] and data.utt2spk["clip1"] == "text_1"
    assert run(tmp_path / "a.parquet", tmp_path / "more", "--task", "asr", "--columns", "text=words") == 1
    assert "no column words for text; its columns are audio, sentence, voices" in capsys.readouterr().err


def test_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    parts = datasets.DatasetDict({"train": make_dataset(3), "test": make_dataset(2)})
    parts.save_to_disk(str(tmp_path / "disk"))
    assert run(tmp_path / "disk", tmp_path / "out", "--task", "asr") == 1
    assert "has several splits; there are train, test\n  -> name one: --split NAME" in capsys.readouterr().err
    assert run(tmp_path / "disk", tmp_path / "out", "--task", "asr", "--split", "dev") == 1
    assert "has no split 'dev'; there are train, test" in capsys.readouterr().err
    assert run(tmp_path / "disk", tmp_path / "out", "--task", "asr", "--split", "test") == 0
    assert len(DataDir.load(tmp_path / "out")) == 2


def test_conversations_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    turns = [[{"role": "user", "content": "<audio>Q"}, {"role": "assistant", "content": f"{n}"}] for n in range(2)]
    audios = [[{"bytes": flac(n), "path": None}] for n in range(2)]
    table = pyarrow.table({"messages": turns, "audios": audios, "task": ["asr", "count"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out") == 0
    data = DataDir.load(tmp_path / "out")
    assert (
        data.text == {"row_1": "0", "row_2": "1"} and data.utt2task["row_2"] == "count" and data.prompt["row_1"] == "Q"
    )


def test_a_row_without_audio_and_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = rows_of(5)
    rows["audio"][1] = None
    rows["audio"][2] = {"bytes": None, "path": "elsewhere.flac"}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "out", "--task", "asr") == 0
    assert (tmp_path / "out/left_out.txt").read_text() == (
        f"row 2: missing: the row has no audio\nrow 3: missing: no file {tmp_path / 'elsewhere.flac'}\n"
    )
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    assert run(tmp_path / "b.parquet", tmp_path / "more", "--task", "asr") == 1
    assert "b.parquet: cannot be opened: " in capsys.readouterr().err


def test_reading_goes_on_behind_any_row(tmp_path: Path) -> None:
    for part in range(3):
        path = tmp_path / f"folder/train-0000{part}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        piece = make_dataset(90, 0.01).select(range(30 * part, 30 * part + 30))
        piece.to_parquet(str(path), batch_size=7)
    whole = [row.values["sentence"] for row in open_dataset(str(tmp_path / "folder")).read(None, 0)]
    assert whole == [f"text {n}" for n in range(90)]
    state = {row.where: row.state for row in open_dataset(str(tmp_path / "folder")).read(None, 0)}[f"row {STATE_EVERY}"]
    state = json.loads(json.dumps(state))
    for skip in (0, 3, 11):
        rest = list(open_dataset(str(tmp_path / "folder")).read(state, skip))
        assert [row.values["sentence"] for row in rest] == whole[STATE_EVERY + skip :]
        assert rest[0].where == f"row {STATE_EVERY + skip + 1}"


def test_a_killed_import_of_parquet_ends_in_the_same_files(tmp_path: Path) -> None:
    make_dataset(250, 1.0).to_parquet(str(tmp_path / "a.parquet"), batch_size=20)
    options = ["--task", "asr", "--archive_mb", "1"]
    assert run(tmp_path / "a.parquet", tmp_path / "whole", *options) == 0
    (tmp_path / "sitecustomize.py").write_text(
        "import pam_espnet.data.exchange.convert as c, time\n"
        "old = c.Converter.convert\n"
        "c.Converter.convert = lambda self, row: (time.sleep(0.01), old(self, row))[1]\n"
    )
    command = [sys.executable, ROOT / "utils/import_data.py", tmp_path / "a.parquet", tmp_path / "killed", *options]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed/audio.3.ark").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert '"state"' in (tmp_path / "killed/.import.jsonl").read_text()
    assert run(tmp_path / "a.parquet", tmp_path / "killed", *options) == 0
    one, two = DataDir.load(tmp_path / "whole"), DataDir.load(tmp_path / "killed")
    assert one.text == two.text and len(one) == 250
    for utt in one.utterances[::7]:
        assert np.array_equal(read_audio(one.wav[utt], key=utt)[0], read_audio(two.wav[utt], key=utt)[0])


MEMORY = """
import pathlib, re, runpy, sys
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
import pyarrow
print(pyarrow.default_memory_pool().max_memory() // 2**20)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_audio(tmp_path: Path) -> None:
    """The peak with 320 MB of audio, in row groups of 2.4 MB, is that with 80 MB; pyarrow holds a few row groups."""
    peaks = {}
    for count in (100, 400):
        rng = np.random.default_rng(0)
        import pyarrow
        import pyarrow.parquet

        audio = [{"bytes": rng.bytes(800_000), "path": f"{n}.flac"} for n in range(count)]
        table = pyarrow.table({"audio": audio, "text": ["a"] * count})
        pyarrow.parquet.write_table(table, tmp_path / f"{count}.parquet", row_group_size=3)
        del audio, table
        words = [str(ROOT / "utils/import_data.py"), str(tmp_path / f"{count}.parquet"), str(tmp_path / f"{count}")]
        command = [sys.executable, "-c", MEMORY, *words, "--task", "asr", "--archive_mb", "50"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        held, peaks[count] = map(int, done.stdout.splitlines()[-2:])
        assert held < 16, (count, held)
        assert len(DataDir.load(tmp_path / f"{count}")) == count
    assert peaks[400] < peaks[100] + 30, peaks


# ---- lhotse ---------------------------------------------------------------------------------------------------------


def test_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment

    mono, stereo = tmp_path / "mono.wav", tmp_path / "stereo.wav"
    soundfile.write(mono, noise(2.0, seed=1), RATE, subtype="PCM_16")
    sides = np.stack([noise(1.0, seed=2), noise(1.0, seed=3)], axis=1)
    soundfile.write(stereo, sides, RATE, subtype="PCM_16")
    one, two = Recording.from_file(mono, recording_id="one"), Recording.from_file(stereo, recording_id="two")

    def cut(
        name: str, start: float, duration: float, *texts: str | None, recording: Any = one, channel: int = 0
    ) -> Any:
        length = duration / len(texts) if texts else 0
        spoken = [
            SupervisionSegment(f"{name}-{n}", recording.id, n * length, length, channel, text=text, speaker=f"s{n}")
            for n, text in enumerate(texts)
        ]
        return MonoCut(name, start, duration, channel, spoken, recording=recording)

    piped = Recording("piped", [AudioSource("command", [0], f"touch {tmp_path / 'ran'}; cat {mono}")], RATE, 32000, 2.0)
    silent = cut("silent", 0, 1.0)
    tagged = cut("tagged", 0, 2.0, "whole")
    tagged.custom, tagged.supervisions[0].custom = {"prompt": "What?"}, {"task": "caption"}
    cuts = [
        tagged,
        cut("piece", 0.5, 1.0, "piece"),
        cut("several", 0, 2.0, "first", "second"),
        cut("side", 0, 1.0, "right", recording=two, channel=1),
        cut("mixed", 0, 1.0, "mixed").mix(cut("noise", 1.0, 1.0), snr=10),
        cut("fast", 0, 2.0, "fast").perturb_speed(2.0),
        cut("piped", 0, 2.0, "piped", recording=piped),
        cut("wordless", 0, 2.0, None),
        silent,
    ]
    manifest = tmp_path / "cuts.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(manifest)
    assert run(manifest, tmp_path / "out", "--task", "asr") == 0
    data = DataDir.load(tmp_path / "out")
    texts = {"tagged-0": "whole", "piece-0": "piece", "several-0": "first", "several-1": "second", "side-0": "right"}
    # the key of a perturbed supervision is lhotse's
    [fast] = [utt for utt, text in data.text.items() if text == "fast"]
    assert data.text == {**texts, "mixed-0": "mixed", fast: "fast"}
    assert data.prompt["tagged-0"] == "What?" and data.utt2task["tagged-0"] == "caption"
    assert data.utt2spk["several-1"] == "s1" and data.segments is not None
    assert data.source("piece-0") == (str(mono), 0.5, 1.5) and data.source("several-1") == (str(mono), 1.0, 2.0)
    assert data.segments["tagged-0"] == Segment(data.segments["piece-0"].recording, 0.0, 2.0)
    right, _ = read_audio(data.source("side-0")[0])
    assert np.array_equal(right, soundfile.read(stereo, dtype="float32")[0][:, 1])
    assert len(read_audio(data.source(fast)[0])[0]) == RATE
    assert not (tmp_path / "ran").exists()
    left_out = (tmp_path / "out/left_out.txt").read_text()
    assert "cut piped: its recording is of type command, which is not run or fetched" in left_out
    assert "line 8: no text" in left_out and "cut silent: no supervision, so no text" in left_out
    assert len(format_data_dir(tmp_path / "out", tmp_path / "raw").utterances) == 7


# ---- the hub --------------------------------------------------------------------------------------------------------

CLIENT = """
import datasets, runpy, sys
datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RETRY_INTERVAL = 1, 0
from pam_espnet.cli import run_main
sys.exit(run_main(runpy.run_path(sys.argv[1])["main"], sys.argv[2:]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[DatasetHub]:
    """Three files of 60 rows each in the split train, and three rows in test."""
    folder = tmp_path / "repo/data"
    folder.mkdir(parents=True)
    for part in range(3):
        piece = make_dataset(180, 1.0).select(range(60 * part, 60 * part + 60))
        piece.to_parquet(str(folder / f"train-0000{part}-of-00003.parquet"), batch_size=20)
    make_dataset(3).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    with running(DatasetHub(tmp_path / "repo")) as server:
        yield server


def from_hub(hub: DatasetHub, folder: Path, *options: str, name: str = "me/mine", token: str = "") -> Any:
    """The program with the real clients, which read their settings when they are imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"HF_TOKEN": token} if token else {})
    words = [str(ROOT / "utils/import_data.py"), name, str(folder / "out"), "--task", "asr", "--archive_mb", "1"]
    command = [sys.executable, "-c", CLIENT, *words, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_a_dataset_of_the_hub_goes_on_after_a_broken_connection(tmp_path: Path, hub: DatasetHub) -> None:
    hub.token = "hf_secret"
    sizes = [path.stat().st_size for path in sorted((tmp_path / "repo/data").glob("train-*"))]
    hub.breaks = [sizes[0] + sizes[1] + 600_000, *[0] * 99]
    done = from_hub(hub, tmp_path, "--split", "train", token="hf_secret")
    assert done.returncode == 1 and "me/mine: cannot be read any further: " in done.stderr, done.stderr
    assert "-> run the same command again: it continues where it stopped" in done.stderr
    before = len((tmp_path / "out/.import.jsonl").read_text().splitlines())
    assert before == 120
    hub.breaks, hub.requests = [], []
    done = from_hub(hub, tmp_path, "--split", "train", token="hf_secret")
    assert done.returncode == 0, done.stderr
    data = DataDir.load(tmp_path / "out")
    assert data.text == {f"clip{n}": f"text {n}" for n in range(180)}
    # only the footer of the first file was read again
    ranges = [line.split("bytes=")[1] for line in hub.requests if "GET" in line and "train-00000" in line]
    assert ranges and not any(line.startswith(("0-", "4-")) for line in ranges), hub.requests
    assert read_json(tmp_path / "out/import.json")["stamp"]["commit"] == COMMIT
    assert np.array_equal(read_audio(data.wav["clip179"])[0], to_pcm16(noise(1.0, seed=179))[0] / np.float32(32768))


def test_an_audio_folder_of_the_hub(tmp_path: Path) -> None:
    """Files beside a table are read as they are."""
    folder = tmp_path / "repo/data"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.flac").write_bytes(flac(number))
    (folder / "metadata.csv").write_text("file_name,sentence\n" + "".join(f"{n}.flac,text {n}\n" for n in range(3)))
    with running(DatasetHub(tmp_path / "repo")) as server:
        done = from_hub(server, tmp_path)
    assert done.returncode == 0, done.stderr
    data = DataDir.load(tmp_path / "out")
    assert data.text == {f"{number}": f"text {number}" for number in range(3)}
    assert all(flac(number) in (tmp_path / "out/audio.1.ark").read_bytes() for number in range(3))


def test_what_the_hub_refuses(tmp_path: Path, hub: DatasetHub) -> None:
    for options, message in (
        ({"name": "me/typo"}, "me/typo: cannot be opened: "),
        ({"revision": "v9"}, "me/mine: cannot be opened: "),
        ({"split": "dev"}, "me/mine: has no split 'dev'; there are train, test"),
        ({"token": "hf_wrong"}, "me/mine: cannot be opened: "),
    ):
        hub.token = "hf_right" if "token" in options else None
        name, token = options.pop("name", "me/mine"), options.pop("token", "")
        words = [word for option, value in options.items() for word in (f"--{option}", value)]
        done = from_hub(hub, tmp_path, *words, name=name, token=token)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    hub.shutdown()
    hub.server_close()
    done = from_hub(hub, tmp_path)
    assert done.returncode == 1 and "me/mine: cannot be opened: " in done.stderr, done.stderr
