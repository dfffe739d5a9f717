"""The LibriCount recipe on synthetic LibriCount and LibriSpeech in their own layouts, and what is refused."""

import hashlib
import json
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import yaml
from libri_corpora import RATE, copy_recipe, make_libricount, make_librispeech, run
from recipe_modules import in_this_process, local_modules

from pam_espnet.data import leakage, rendering
from pam_espnet.data.datadir import DataDir
from pam_espnet.data.mixtures import most_at_once
from pam_espnet.data.tables import read_table
from pam_espnet.errors import ConfigError, DataError

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "libricount" / "pam1"
MODULES = ("check_leak", "download", "libricount", "mix", "prepare", "questions")
READERS = {"train-clean-5": 11, "dev-clean-2": 10}


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(RECIPE / "local", MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both corpora; their readers of test-clean are 82 and up. Tests that change them take a copy."""
    root = tmp_path_factory.mktemp("corpora")
    make_librispeech(root, READERS, named=("test-clean",))
    return make_libricount(root, readers=(82, 83) * 5)


@pytest.fixture
def here(
    local: SimpleNamespace, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[SimpleNamespace, Path]:
    """The programs with a small size, working in this process; and a copy of the corpora to damage."""
    monkeypatch.setattr(
        local.prepare,
        "size_of",
        lambda name: {"train": ["train-clean-5"], "dev": ["dev-clean-2"], "clips": {"train": 2, "dev": 1}},
    )
    monkeypatch.setattr(rendering, "multiprocessing", in_this_process())
    return local, Path(shutil.copytree(corpora, tmp_path / "corpora"))


def prepare(local: SimpleNamespace, root: Path, data: Path, *args: str) -> None:
    folders = ["--librispeech", str(root), "--libricount", str(root), "--data_dir", str(data)]
    rest = ["--check_counts", "false", "--prompts", str(RECIPE / "conf/prompts"), "--jobs", "1", *args]
    local.prepare.main([*folders, *rest])


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- stages 1 and 2 -------------------------------------------------------------------------------------------------


def test_first_two_stages(corpora: Path, tmp_path: Path) -> None:
    recipe = copy_recipe(tmp_path / "tree", "libricount")
    sizes = yaml.safe_load((recipe / "local/sizes.yaml").read_text())
    sizes["mini"]["clips"] = {"train": 2, "dev": 1}
    (recipe / "local/sizes.yaml").write_text(yaml.safe_dump(sizes))
    options = ["--size", "mini", "--nj", "2", "--librispeech", str(corpora), "--libricount", str(corpora)]
    refused = run(recipe, *options, program="local/data.sh")
    assert refused.returncode == 1 and "has 22 clips, published are 5720" in refused.stderr
    assert "--check_counts false" in refused.stderr
    done = run(recipe, *options, "--stop_stage", "2", "--check_counts", "false")
    assert done.returncode == 0, done.stdout + done.stderr
    tasks = {"train": {"count": 22, "verify": 22}, "dev": {"count": 11, "verify": 11}}
    for name, counts in {**tasks, "test_count": {"count": 22}, "test_verify": {"verify": 22}}.items():
        passport = json.loads((recipe / "dump/mini/raw" / name / "passport.json").read_text())
        assert passport["tasks"] == counts and not passport["skipped"], name


def test_what_is_made(here: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    local, root = here
    prepare(local, root, tmp_path / "data", "--folds", "true")
    train = DataDir.load(tmp_path / "data/train")
    speakers = read_table(tmp_path / "data/train/mix_speakers", allow_empty=True)
    sources = read_table(tmp_path / "data/train/mix_sources", allow_empty=True)
    listed = set((tmp_path / "data/speakers_train.txt").read_text().split())
    assert listed == {str(number) for number in range(61, 72)}
    for key in train.utterances:
        wave, rate = soundfile.read(train.wav[key])
        assert rate == RATE and len(wave) == 5 * RATE and 0 < np.abs(wave).max() < 1
        voices = speakers[key].split()
        assert len(set(voices)) == len(voices) and set(voices) <= listed
        assert {source.split("-")[0] for source in sources[key].split()} == set(voices)
        if train.utt2task[key] == "count":
            assert train.text[key] == str(len(voices))
        else:
            (asked,) = [n for n, word in enumerate(local.questions.WORDS) if f" {word}" in train.prompt[key]]
            assert train.text[key] == ("yes" if asked == len(voices) else "no")
    assert Counter(train.text[key] for key in train.utterances if key.startswith("verify")) == {"yes": 11, "no": 11}
    first = hashes(tmp_path / "data")

    # again: nothing; a lost clip comes back; from nothing the same bytes; another seed, another corpus
    one = tmp_path / "data/audio/train/mix-train-000003.flac"
    prepare(local, root, tmp_path / "data", "--folds", "true")
    one.unlink()
    (tmp_path / "data/audio/utterances.json").unlink()
    prepare(local, root, tmp_path / "data", "--folds", "true")
    assert hashes(tmp_path / "data") == first
    prepare(local, root, tmp_path / "data", "--folds", "true", "--seed", "3")
    assert hashes(tmp_path / "data")["audio/train/mix-train-000003.flac"] != first["audio/train/mix-train-000003.flac"]

    # the folds: every clip is in the test set of one, and in no other set of that one
    tests = [set(DataDir.load(tmp_path / f"data/test_fold{fold}").text) for fold in range(5)]
    assert len(set.union(*tests)) == sum(map(len, tests)) == 22
    for fold in range(5):
        parts = [set(DataDir.load(tmp_path / "data" / f"{name}_fold{fold}").text) for name in ("train", "dev", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 22 and parts[1] == tests[(fold + 1) % 5]


def test_one_framing_and_recordings_for_empty_clips(here: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    local, root = here
    (tmp_path / "noise/a").mkdir(parents=True)
    soundfile.write(tmp_path / "noise/a/rain.wav", 0.1 * np.sin(np.arange(8000) * 0.3), 8000)
    prepare(local, root, tmp_path / "data", "--framings", "count", "--noise", str(tmp_path / "noise"))
    assert not (tmp_path / "data/test_verify").exists()
    assert set(DataDir.load(tmp_path / "data/train").utt2task.values()) == {"count"}
    wave, _ = soundfile.read(tmp_path / "data/audio/train/mix-train-000000.flac")
    spectrum = np.abs(np.fft.rfft(wave))
    assert spectrum.argmax() * RATE / len(wave) == pytest.approx(8000 * 0.3 / (2 * np.pi), abs=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no recordings"):
        prepare(local, root, tmp_path / "data", "--noise", str(tmp_path / "empty"))


# ---- mixtures and questions -----------------------------------------------------------------------------------------


def test_all_voices_of_a_mixture_are_active_at_once(local: SimpleNamespace, corpora: Path) -> None:
    paths = [[str(path) for path in sorted(reader.rglob("*.flac"))] for reader in sorted(corpora.glob("*/dev*/*"))]
    for number in (1, 4, 10):
        wave = local.mix.render((1, f"k{number}", paths[:number], []))
        assert wave.shape == (5 * RATE,) and wave.dtype == np.float32
        level = 10 * np.log10(np.mean(wave.astype(np.float64) ** 2))
        assert local.mix.LEVEL[0] - 0.5 <= level <= local.mix.LEVEL[1] + 0.5
    stream = local.mix.voice(rendering.seeded(0, "x"), paths[0], 5 * RATE)
    assert most_at_once([stream]) == 1 and np.abs(stream[320:640]).max() > 0.02  # speaks from the beginning


def test_a_mixture_whose_label_would_be_wrong_is_drawn_again_and_then_refused(
    local: SimpleNamespace, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [[str(path) for path in sorted(reader.rglob("*.flac"))] for reader in sorted(corpora.glob("*/dev*/*"))]
    active = iter([1, 2])
    monkeypatch.setattr(local.mix, "most_at_once", lambda streams: next(active))
    assert local.mix.render((1, "k", paths[:2], [])).shape == (5 * RATE,)
    monkeypatch.setattr(local.mix, "most_at_once", lambda streams: 1)
    with pytest.raises(DataError, match="its 2 voices are never active at once"):
        local.mix.render((1, "k", paths[:2], []))


def test_questions_have_no_information(local: SimpleNamespace) -> None:
    """Each number is asked about equally often with either answer, so the prompt does not give the answer away."""
    counts = {f"{count}_{index}": count for count in range(11) for index in range(520)}
    asked = local.questions.asked_numbers(counts, 1)
    assert asked == local.questions.asked_numbers(dict(reversed(counts.items())), 1)
    assert asked != local.questions.asked_numbers(counts, 2)
    yes = Counter(number for clip, number in asked.items() if number == counts[clip])
    no = Counter(number for clip, number in asked.items() if number != counts[clip])
    assert set(yes.values()) == set(no.values()) == {260}
    odd = {f"{count}_{index}": count for count in range(11) for index in range(5)}
    answers = Counter(number == odd[clip] for clip, number in local.questions.asked_numbers(odd, 1).items())
    assert abs(answers[True] - answers[False]) <= 1


def test_folds_have_as_many_of_each_number(local: SimpleNamespace) -> None:
    clips = [local.libricount.Clip(f"{n}_{i}", n, "", ()) for n in range(11) for i in range(52)]
    folds = local.libricount.folds_of(clips)
    assert sorted(clip.stem for fold in folds for clip in fold) == sorted(clip.stem for clip in clips)
    for fold in folds:
        assert set(Counter(clip.count for clip in fold).values()) <= {10, 11}
    assert folds == local.libricount.folds_of(clips[::-1])


# ---- voices of test sets --------------------------------------------------------------------------------------------


def test_readers_of_test_sets_are_refused(here: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    local, root = here
    speakers = root / "LibriSpeech/SPEAKERS.TXT"
    speakers.write_text(speakers.read_text().replace("train-clean-5   ", "test-other      ", 1))
    with pytest.raises(DataError, match=r"reader 61 of .* is one of test-other"):
        prepare(local, root, tmp_path / "data")
    speakers.unlink()
    with pytest.raises(DataError, match=r"SPEAKERS\.TXT: no such file"):
        prepare(local, root, tmp_path / "data")


def test_check_of_directories(here: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    """Through each of the three tables, and for LibriCount itself: its folds must not join a LibriSpeech training."""
    local, root = here
    prepare(local, root, tmp_path / "data", "--folds", "true")
    check = ["--librispeech", str(root), "--data"]
    assert local.check_leak.main([*check, str(tmp_path / "data/train"), str(tmp_path / "data/dev")]) == 0
    for name in ("train_fold0", "test_count"):
        with pytest.raises(DataError, match=r"speaker 8[23] of test-clean(.|\n)*train-clean and train-other"):
            local.check_leak.main([*check, str(tmp_path / "data" / name)])
    for table in ("utt2spk", leakage.MIX_SPEAKERS, leakage.MIX_SOURCES):
        folder = tmp_path / table
        folder.mkdir()
        (folder / "utt2spk").write_text("u1 61\nu2 82-xYz\n")  # the second is no reader, but a clip of AudioCaps
        value = "82-1-0000" if table == leakage.MIX_SOURCES else "82"
        (folder / table).write_text(f"u1 {value}\nu2 61 63\n" if table != "utt2spk" else f"u1 {value}\nu2 82-xYz\n")
        with pytest.raises(DataError, match="there:\n  u1: speaker 82 of test-clean\n  ->"):
            leakage.refuse_barred(folder, {"82": "test-clean"})


# ---- what can be wrong with LibriCount ------------------------------------------------------------------------------


def test_wrong_folder_and_missing_clips(here: tuple[SimpleNamespace, Path], tmp_path: Path) -> None:
    local, root = here
    with pytest.raises(DataError, match="no such folder"):
        local.libricount.find_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no clips of LibriCount"):
        local.libricount.find_clips(tmp_path / "empty")
    clips = sorted((root / "test").glob("3_*.wav"))
    clips[0].unlink()
    clips[1].with_suffix(".json").write_text("{}x")
    (root / "test/11_a.wav").touch()
    (root / "test/1_b.wav").touch()
    with pytest.raises(DataError) as caught:
        prepare(local, root, tmp_path / "data")
    message = str(caught.value)
    assert f"there is no {clips[0].name} beside it" in message and "is no list of speakers" in message
    assert "11_a.wav: the name does not begin" in message and "there is no 1_b.json beside it" in message
    assert "unpack LibriCount10-0dB.zip again" in message


def test_too_few_readers_and_unknown_sizes(
    here: tuple[SimpleNamespace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, root = here
    for reader in sorted((root / "LibriSpeech/dev-clean-2").iterdir())[:3]:
        shutil.rmtree(reader)
    with pytest.raises(DataError, match="dev set: has 7 readers, and 10 are mixed"):
        prepare(local, root, tmp_path / "data")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"local/sizes\.yaml has mini, clean100, clean460"):
        prepare(local, root, tmp_path / "data", "--size", "huge")


def test_archive(local: SimpleNamespace, corpora: Path, tmp_path: Path) -> None:
    """What is put beside the downloads by hand is checked, unpacked and kept; a wrong or cut one is refused."""
    archive = tmp_path / local.download.ARCHIVE
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((corpora / "test").iterdir()):
            file.write(path, f"test/{path.name}")
    whole = archive.read_bytes()
    md5 = "md5:" + hashlib.md5(whole).hexdigest()
    with pytest.raises(DataError, match=r"is not LibriCount10-0dB\.zip\n  expected MD5 30c8f844dc59fa65d216d53d"):
        local.download.get(tmp_path, False)
    folder = local.download.get(tmp_path, True, checksum=md5)
    assert len(local.libricount.read_clips(local.libricount.find_clips(folder))) == 22 and not archive.exists()
    assert local.download.get(tmp_path, False, checksum=md5) == folder
    archive.write_bytes(whole[:5000])
    cut = "md5:" + hashlib.md5(whole[:5000]).hexdigest()
    with pytest.raises(DataError, match="cannot be unpacked, it is damaged or cut short"):
        local.download.get(tmp_path, False, checksum=cut)
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_data_sh_needs_the_subsets_of_the_size(local: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for size in yaml.safe_load((RECIPE / "local/sizes.yaml").read_text()):
        assert local.prepare.main(["--size", size, "--list_subsets", "true"]) == 0
        assert "test" not in capsys.readouterr().out and (RECIPE / "conf/size" / f"{size}.yaml").is_file()
    with pytest.raises(ConfigError, match="are needed"):
        local.prepare.main([])


@pytest.mark.parametrize("script", ["download.py", "prepare.py", "check_leak.py"])
def test_help(script: str) -> None:
    done = run(RECIPE, str(RECIPE / "local" / script), "--help", program=sys.executable)
    assert done.returncode == 0 and "usage" in done.stdout
