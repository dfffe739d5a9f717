"""The LibriSpeech recipe on a synthetic corpus in its own layout: stages 1 and 2, and what goes wrong before them."""

import hashlib
import json
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import yaml
from libri_corpora import copy_recipe, make_librispeech, run
from recipe_modules import local_modules

from pam_espnet.data import librispeech
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.prompts import read_prompts
from pam_espnet.data.tables import read_table
from pam_espnet.errors import ConfigError, DataError, PamError

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "librispeech" / "pam1"
READERS = {"train-clean-5": 3, "dev-clean-2": 2, "test-clean": 2, "test-other": 2}
SETS = ("train", "dev", "test_clean", "test_other")


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(RECIPE / "local", ("download", "prepare")) as modules:
        yield modules


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_librispeech(tmp_path / "corpora", READERS)


def prepare(local: SimpleNamespace, corpus: Path, data: Path, *args: str) -> None:
    prompts = ["--prompts", str(RECIPE / "conf/prompts/asr.txt")]
    rest = ["--size", "mini", "--check_counts", "false", *prompts, *args]
    local.prepare.main(["--librispeech", str(corpus), "--data_dir", str(data), *rest])


# ---- stages 1 and 2 -------------------------------------------------------------------------------------------------


def test_first_two_stages(corpus: Path, tmp_path: Path) -> None:
    recipe = copy_recipe(tmp_path / "tree", "librispeech")
    options = ["--size", "mini", "--librispeech", str(corpus), "--nj", "1"]
    refused = run(recipe, *options, program="local/data.sh")
    assert refused.returncode == 1
    assert "test-clean has 6 utterances, published are 2620" in refused.stderr
    assert "--check_counts false" in refused.stderr
    options += ["--check_counts", "false"]
    done = run(recipe, *options, "--stop_stage", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: test-other has 6 utterances, published are 2939" in done.stdout
    for name, number in zip(SETS, (9, 6, 6, 6), strict=True):
        passport = json.loads((recipe / "dump/mini/raw" / name / "passport.json").read_text())
        assert len(passport["utterances"]) == number and passport["tasks"] == {"asr": number}
        assert not passport["skipped"]
    again = run(recipe, *options, program="local/data.sh")
    assert again.returncode == 0 and "data/mini is there already" in again.stdout


def test_what_is_in_the_data_directories(local: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    prepare(local, corpus, tmp_path / "data")
    wordings = read_prompts(RECIPE / "conf/prompts/asr.txt")
    for name in SETS:
        data = DataDir.load(tmp_path / "data" / name)
        for key in data.utterances:
            assert data.utt2spk[key] == key.split("-")[0] and data.wav[key].endswith(f"{key}.flac")
            assert data.text[key] == data.text[key].lower()
        asked = set(data.prompt.values())
        assert asked <= set(wordings) if name == "train" else asked == {wordings[0]}
        assert set(read_table(tmp_path / "data" / name / "spk2gender").values()) <= {"m", "f"}
    train = DataDir.load(tmp_path / "data/train")
    assert len(set(train.prompt.values())) > 1
    prepare(local, corpus / "LibriSpeech", tmp_path / "other", "--transcripts", "upper", "--dev_utterances", "4")
    other = DataDir.load(tmp_path / "other/train")
    assert other.prompt == train.prompt  # the same seed
    assert other.text == {key: text.upper() for key, text in train.text.items()}
    assert len(DataDir.load(tmp_path / "other/dev")) == 4
    prepare(local, corpus, tmp_path / "seed", "--seed", "7")
    assert DataDir.load(tmp_path / "seed/train").prompt != train.prompt


def test_a_kill_between_two_settings_is_not_taken_for_finished(
    local: SimpleNamespace, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(local, corpus, tmp_path / "data")
    expected = {name: (tmp_path / "data" / name / "text").read_text() for name in SETS}
    write_set, written = local.prepare.write_set, []

    def killed(target: Path, *args: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(target)
        write_set(target, *args)

    monkeypatch.setattr(local.prepare, "write_set", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(local, corpus, tmp_path / "data", "--transcripts", "upper")
    monkeypatch.undo()
    assert (tmp_path / "data/train/text").read_text() != expected["train"]
    prepare(local, corpus, tmp_path / "data")
    assert {name: (tmp_path / "data" / name / "text").read_text() for name in SETS} == expected
    (tmp_path / "data/test_clean/text").unlink()
    prepare(local, corpus, tmp_path / "data")
    assert (tmp_path / "data/test_clean/text").read_text() == expected["test_clean"]


# ---- what can be wrong with a corpus --------------------------------------------------------------------------------


def test_wrong_folders(local: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        prepare(local, tmp_path / "nowhere", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"of LibriSpeech it has no subset(.|\n)*unpack test-clean\.tar\.gz"):
        prepare(local, tmp_path / "empty", tmp_path / "data")
    shutil.rmtree(corpus / "LibriSpeech/dev-clean-2")
    with pytest.raises(DataError, match="has no dev-clean-2; of LibriSpeech it has test-clean, test-other"):
        prepare(local, corpus, tmp_path / "data")
    with pytest.raises(ConfigError, match=r"local/sizes\.yaml has mini, clean100, clean460, full960"):
        prepare(local, corpus, tmp_path / "data", "--size", "huge")
    assert not (tmp_path / "data").exists()


def test_transcripts_that_do_not_fit(local: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    chapters = sorted((corpus / "LibriSpeech/train-clean-5").glob("*/*"))
    lines = (first := next(chapters[0].glob("*.txt"))).read_text().splitlines(keepends=True)
    first.write_text("".join(lines[1:]))  # a recording without its line
    next(chapters[1].glob("*0001.flac")).unlink()  # a line without its recording
    second = next(chapters[1].glob("*.txt"))
    second.write_text(second.read_text().replace("0002 ", "0002\t"))
    next(chapters[2].glob("*.txt")).unlink()
    with pytest.raises(DataError) as caught:
        prepare(local, corpus, tmp_path / "data")
    message = str(caught.value)
    key = lines[0].split()[0]
    assert f"{first}: has no line for {key}.flac" in message and "unpack the subset's archive again" in message
    assert f"{second}:2: there is no" in message and f"{second}:3: not " in message
    assert "no such file" in message and not (tmp_path / "data/train").exists()


def test_speakers(local: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    path = corpus / "LibriSpeech/SPEAKERS.TXT"
    content = path.read_text()
    assert librispeech.read_speakers(path.parent)["62"] == librispeech.Speaker("62", "M", "train-clean-5")
    path.write_text(content.replace("61   | F", "61   | X"))
    with pytest.raises(DataError, match=r"SPEAKERS\.TXT:5: not a line of the form"):
        prepare(local, corpus, tmp_path / "data")
    path.write_text("".join(line for line in content.splitlines(keepends=True) if not line.startswith("61 ")))
    with pytest.raises(DataError, match="does not list speaker 61 of train-clean-5"):
        prepare(local, corpus, tmp_path / "data")
    path.write_text(content.replace("61   | F | train-clean-5   ", "61   | F | test-clean      "))
    with pytest.raises(DataError, match="speaker 61 of test-clean"):
        prepare(local, corpus, tmp_path / "data")
    path.unlink()
    with pytest.raises(DataError, match="every archive of LibriSpeech has it"):
        prepare(local, corpus, tmp_path / "data")


def test_durations_from_headers(corpus: Path, tmp_path: Path) -> None:
    for path in sorted(corpus.rglob("*.flac"))[:5]:
        assert librispeech.flac_seconds(path) == pytest.approx(soundfile.info(path).duration, abs=1e-9)
    (tmp_path / "x.flac").write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"x\.flac: is not a FLAC file"):
        librispeech.flac_seconds(tmp_path / "x.flac")


def test_counts() -> None:
    right = {name: (utterances or 1, hours or 0.0) for name, (utterances, hours) in librispeech.PUBLISHED.items()}
    assert librispeech.check_counts("", right, strict=True) == []
    found = right | {"dev-other": (2864, 4.9), "test-clean": (2619, 5.4)}
    assert librispeech.check_counts("", found, strict=False) == [
        "dev-other has 4.90 hours, published are 5.3",
        "test-clean has 2619 utterances, published are 2620",
    ]


# ---- archives -------------------------------------------------------------------------------------------------------


def test_the_table_of_archives_is_whole(local: SimpleNamespace) -> None:
    table = yaml.safe_load((RECIPE / "local/archives.yaml").read_text())
    assert set(table["archives"]) == set(librispeech.PUBLISHED)
    for subset, entry in table["archives"].items():
        remote = local.download.remote_file(subset, table, "http://near/resources/")
        assert remote.urls[0] == f"http://near/resources/{entry['resource']}/{subset}.tar.gz"
        assert len(remote.urls) == 1 + len(table["mirrors"]) and remote.size == entry["size"] > 1e8
        assert entry["sha256"] is None or len(entry["sha256"]) == 64
    for size in local.download.read_sizes():
        assert set(local.download.subsets_of(size)) <= set(table["archives"])
        assert (RECIPE / "conf/size" / f"{size}.yaml").is_file()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An address, and the folder behind it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    folder = tmp_path / "mirror"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


def test_download_unpacks_marks_and_keeps(corpus: Path, mirror: tuple[str, Path], tmp_path: Path) -> None:
    """Stage 1 from archives on this machine; then a cut one, and a folder that is somebody's own."""
    recipe = copy_recipe(tmp_path / "tree", "librispeech")
    address, folder = mirror
    table = yaml.safe_load((recipe / "local/archives.yaml").read_text())
    for subset in READERS:
        archive = folder / str(table["archives"][subset]["resource"]) / f"{subset}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(corpus / "LibriSpeech" / subset, f"LibriSpeech/{subset}")
            tar.add(corpus / "LibriSpeech/SPEAKERS.TXT", "LibriSpeech/SPEAKERS.TXT")
        content = archive.read_bytes()
        table["archives"][subset] |= {"md5": hashlib.md5(content).hexdigest(), "size": len(content)}
    (recipe / "local/archives.yaml").write_text(yaml.safe_dump(table))
    options = ["--size", "mini", "--mirror", address, "--check_counts", "false", "--nj", "1"]
    make = partial(run, program="local/data.sh")
    done = make(recipe, *options, "--remove_archives", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    unpacked = recipe / "downloads/LibriSpeech"
    assert all((unpacked / subset / ".completed").is_file() for subset in READERS)
    assert not list((recipe / "downloads").glob("*.tar.gz")) and (recipe / "data/mini/test_other/text").is_file()
    again = make(recipe, *options)
    assert again.returncode == 0 and again.stdout.count("is there already") == len(READERS) + 1

    (unpacked / "test-clean/.completed").unlink()
    refused = make(recipe, *options)
    assert refused.returncode == 1 and "was not unpacked by this program" in refused.stderr
    shutil.rmtree(unpacked / "test-clean")
    cut = folder / "12/test-clean.tar.gz"
    cut.write_bytes(cut.read_bytes()[:3000])
    entry = table["archives"]["test-clean"] | {"md5": hashlib.md5(cut.read_bytes()).hexdigest(), "size": 3000}
    (recipe / "local/archives.yaml").write_text(
        yaml.safe_dump(table | {"archives": table["archives"] | {"test-clean": entry}})
    )
    damaged = make(recipe, *options)
    assert damaged.returncode == 1 and "test-clean.tar.gz: cannot be unpacked" in damaged.stderr
    assert "delete the file and run this again" in damaged.stderr


def test_an_archive_that_differs_is_refused(
    local: SimpleNamespace, mirror: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = mirror
    (folder / "file").write_bytes(b"another")
    from pam_espnet.data.download import RemoteFile

    remote = RemoteFile("dev-clean.tar.gz", [f"{address}/file"], "md5:" + "0" * 32)
    with pytest.raises(DataError, match="expected MD5 0000"):
        local.download.get_subset("dev-clean", tmp_path, remote, False)
    with pytest.raises(PamError, match="404"):
        local.download.get_subset(
            "dev-clean", tmp_path, RemoteFile("dev-clean.tar.gz", [f"{address}/none"], "md5:" + "0" * 32), False
        )
    with pytest.raises(ConfigError, match="no such subset"):
        local.download.main(["--downloads", str(tmp_path), "--subsets", "dev-cleam"])


@pytest.mark.parametrize("script", ["download.py", "prepare.py"])
def test_help(script: str) -> None:
    done = run(RECIPE, str(RECIPE / "local" / script), "--help", program=sys.executable)
    assert done.returncode == 0 and "usage" in done.stdout


def test_help_of_the_shell_scripts() -> None:
    for program in ("./run.sh", "local/data.sh"):
        done = run(RECIPE, "--help", program=program)
        words = " ".join(done.stdout.split())
        assert done.returncode == 0 and "--librispeech DIR" in words and "--transcripts" in words
    assert "did you mean --librispeech" in run(RECIPE, "--libri", "x").stderr
