"""The mini corpus: readers, splits and rendering, on small files of the packages' formats.

One test uses the real packages; it is skipped where they were not downloaded.
"""

import argparse
import gzip
import hashlib
import shutil
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from queen_archive import RATE as GAME_RATE
from queen_archive import descriptions, dialogue, mp3, write_archive
from recipe_modules import in_this_process, local_modules

from pam_espnet.data import rendering
from pam_espnet.data.mixtures import EMPTY_LEVEL, MIX_LEVEL
from pam_espnet.data.rendering import seeded
from pam_espnet.data.signals import frame_levels
from pam_espnet.errors import ConfigError, DataError

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "mini" / "pam1"
LOCAL = RECIPE / "local"
MODULES = ("asr", "caption", "count", "download", "game", "models", "prepare", "queen", "rcc", "recordings")
MODULES += ("synthetic", "text")
RATE = 16000
GAME = "flight-of-the-amazon-queen"
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def local() -> Iterator[SimpleNamespace]:
    with local_modules(LOCAL, MODULES) as modules:
        yield modules


# ---- replacements --------------------------------------------------------------------------------------------------


def voiced(seconds: float, pitch: float, rate: int = RATE) -> np.ndarray:
    """A hum with pauses before and after it, in place of a spoken clip."""
    time = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * pitch * time) * (1 + 0.3 * np.sin(2 * np.pi * 4 * time)) * 0.3
    pause = np.zeros(round(0.2 * rate))
    return np.concatenate([pause, tone, pause]).astype(np.float32)


def write_g722(path: Path, wave: np.ndarray) -> None:
    """Encode (N,) at 16 kHz as raw G.722."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def write_audio(path: Path, wave: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)


WORDNET = """  1 This software and database is being provided to you
00001 00 v 01 greet 0 000 | say hello; "She greeted the Crew warmly"; "press 1 to greet"
00002 00 v 01 let 0 000 | permit; "Please, let me in now"; "she greeted the crew, warmly!"; "No"; "they sold the boat"
"""


def fake_packages(downloads: Path, voices: dict[str, dict[str, str]], sounds: dict[str, dict[str, list[str]]]) -> None:
    """Folders as download.py makes them, with hums for voices and sounds."""
    root = downloads / "unpacked"
    listing = root / "asterisk-core-sounds-en/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    listing.parent.mkdir(parents=True)
    texts = ("Hello.", "[a tone]", "Press 2 for more.", "Bye!", "Thank you.", "Please wait.", "Goodbye.")
    prompts = {"digits/1": "one", **{f"vm-{number}": text for number, text in enumerate(texts)}}
    with gzip.open(listing, "wt", encoding="utf-8") as file:
        file.write("; a comment\n\n" + "".join(f"{name}: {text}\n" for name, text in prompts.items()))
    for number, name in enumerate(prompts):
        folder = root / "asterisk-core-sounds-en-g722/usr/share/asterisk/sounds/en_US_f_Allison"
        write_g722(folder / f"{name}.g722", voiced(0.4 + 0.1 * number, 150))
    stamps = root / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    write_audio(stamps / "animals/cow_desc.ogg", voiced(0.5, 200, 44100), 44100)
    (stamps / "animals/cow.txt").write_text("A cow (brown).\nfr.utf8=Une vache.\n", encoding="utf-8")
    book = root / "pocketsphinx-testdata/usr/share/pocketsphinx/test/data/librivox"
    write_audio(book / "book-0870.wav", voiced(0.6, 120))
    (book / "transcription").write_text("<s> it was late </s> (book-0870)\n", encoding="utf-8")
    files = {"QUEEN2.JAS": descriptions(["Look at the old door.", "Open it.", "Hmmm..."], [])}
    files["IAN.DOG"] = dialogue(1, {0: "Hi."}, {0: "0", 6: "Where is he?"}, ("0", "Hello."))
    files["BOB.DOG"] = dialogue(2, {0: "Hi."}, {0: "0", 6: "Let me in now!"}, ("0", "Hello."))
    for name in ("JOE00411", "JOE00421", "JOE00431", "010006P1", "020006P1", "01SSSSJ1"):
        files[f"{name}.SB"] = mp3(voiced(0.6, 180, GAME_RATE))
    write_archive(root / GAME / "usr/share/scummvm" / GAME / "queen.1c", files)
    for number, voice in enumerate(name for split in voices.values() for name in split):
        language = voice.split("/")[1]
        for clip in range(2):
            path = stamps / f"animals/thing{clip}_desc{'' if language == 'en' else '_' + language}.ogg"
            write_audio(path, voiced(0.6, 100 + 40 * number, 44100), 44100)
    listed = [sound for entry in sounds.values() for split in SPLITS for sound in entry[split]]
    for number, sound in enumerate(listed):
        path = root / "scratch/usr/share/scratch/Media/Sounds" / sound.removeprefix("scratch/")
        write_audio(path, voiced(0.5, 300 + 50 * number))
    words = root / "wordnet-base/usr/share/wordnet"
    words.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        (words / f"data.{part}").write_text(WORDNET if part == "verb" else "", encoding="latin-1")
    libraries = root / "libflite1/usr/lib/machine"
    libraries.mkdir(parents=True)
    (libraries / "libflite.so.1").write_text("no library", encoding="utf-8")
    for package in [path for path in root.iterdir() if path.is_dir()]:
        (package / ".completed").write_text("x\n", encoding="utf-8")


def read_by_machine(spoken: Any) -> np.ndarray:
    """In place of Flite's voices."""
    return voiced(0.1 * len(spoken.text), {"awb": 120, "rms": 90}[spoken.voice])


@pytest.fixture
def small(tmp_path: Path, local: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A recipe folder with synthetic packages and small tables, as the current directory."""
    languages = iter(["en", "fr", "ru", "be", "bg", "ca", "da", "el", "es", "lt", "nl", "ro", "ml", "pt"])
    voices = {split: {f"tuxpaint/{next(languages)}": f"{split}{n}" for n in range(4)} for split in SPLITS}
    sounds = {
        name: {"phrases": [f"a {name}", f"the {name}"], **{split: [f"scratch/{name}/{split}.wav"] for split in SPLITS}}
        for name in ("dog", "bell", "rain")
    }
    sizes = {"mini": {"asr": {"speeds": [0.9], "splices": 2, "synthetic": 2, "test": 1, "dev": 1}}}
    sizes["mini"]["asr"]["game"] = {"train": 1, "min_words": 2, "dev": 2, "test": 1}
    persons = {"train": {"joe": "A"}, "dev": {"ian": "B"}, "test": {"bob": "C"}, "left_out": {}}
    sizes["mini"] |= {task: {"train": 6, "dev": 5, "test": 5} for task in ("count", "caption")}
    tables = tmp_path / "local"
    tables.mkdir()
    for path in LOCAL.glob("*.py"):
        shutil.copy(path, tables)
    written = {"voices": voices, "sounds": sounds, "sizes": sizes, "packages": [], "game_voices": persons}
    for name, table in written.items():
        (tables / f"{name}.yaml").write_text(yaml.safe_dump(table), encoding="utf-8")
    fake_packages(tmp_path / "downloads", voices, sounds)
    monkeypatch.setattr(local.prepare, "LOCAL", tables)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rendering, "multiprocessing", in_this_process())
    monkeypatch.setattr(local.synthetic, "synthesise", read_by_machine)
    return SimpleNamespace(root=tmp_path, voices=voices, sounds=sounds, local=local)


def prepare(local: SimpleNamespace, **changes: object) -> None:
    defaults = {"size": "mini", "downloads": Path("downloads"), "data_dir": Path("data/mini"), "jobs": 1, "seed": 1}
    local.prepare.prepare(argparse.Namespace(**{**defaults, **changes}))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- the whole corpus -----------------------------------------------------------------------------------------------


def test_corpus_is_whole_disjoint_and_the_same_twice(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from pam_espnet.data.datadir import validate

    prepare(small.local)
    data = Path("data/mini")
    names = ("train", "dev", "test_asr", "test_voices", "test_count", "test_caption")
    sets = {name: validate(data / name) for name in names}
    assert sets["train"].per_task()["count"] == 6 and sets["dev"].per_task()["caption"] == 5
    assert sorted(sets["test_count"].text.values()) == ["0", "1", "2", "3", "4"]
    references = sets["test_caption"].references
    assert references is not None
    for key, text in sets["test_caption"].text.items():
        assert len(set(references[key])) == 5 and references[key][0] == text
    assert not set(sets["test_asr"].text.values()) & set(sets["train"].text.values())
    assert list(sets["test_voices"].text.items()) == [("asr-game-bob-020006P1", "let me in now")]
    assert set(sets["dev"].utt2spk.values()) > {"asr-game-ian", "asr-game-joe"}
    synthetic = {text for key, text in sets["train"].text.items() if key.startswith("asr-synthetic-")}
    assert synthetic == {"she greeted the crew warmly", "they sold the boat"}  # a text of test_voices is in the other
    left_out = (data / "audio/asr/left_out.tsv").read_text(encoding="utf-8")
    assert left_out == "JOE00431\tjoe\ta cry or laughter\tHmmm...\n"
    for name, directory in sets.items():
        for audio in directory.wav.values():
            info = soundfile.info(audio)
            assert (info.samplerate, info.channels, info.format) == (RATE, 1, "FLAC"), name
    first = hashes(data)

    # a second run keeps everything; one that was killed makes what is missing; from nothing the same bytes come out
    stamp = (data / "audio/count/test/count-test-00001.flac").stat().st_mtime_ns
    prepare(small.local)
    assert (data / "audio/count/test/count-test-00001.flac").stat().st_mtime_ns == stamp
    (data / "audio/count/test/count-test-00001.flac").unlink()
    (data / "audio/caption/utterances.json").unlink()
    prepare(small.local)
    assert hashes(data) == first
    shutil.rmtree(data)
    prepare(small.local)
    assert hashes(data) == first
    # another seed is another corpus, made anew in the same folder
    prepare(small.local, seed=2)
    assert hashes(data)["audio/count/test/count-test-00001.flac"] != first["audio/count/test/count-test-00001.flac"]


def test_flite_that_cannot_be_loaded_is_named(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ((_, spoken),) = small.local.synthetic.plan(small.root / "downloads", 1, lambda text: False)
    with pytest.raises(DataError, match=r"libflite\.so\.1.*\n.*libasound2"):
        small.local.synthetic.synthesise(spoken)


def test_unknown_size_lists_the_known(small: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="mini"):
        prepare(small.local, size="huge")


# ---- speech recognition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Please press 1 to mute.", "please press one to mute"),
        ("press * to toggle pause, press # to enter", "press star to toggle pause press pound to enter"),
        ("A.M.", "a m"),
        ("at [@]", "at"),
        ('IAX (note: does not say "2")', "iax"),
        ("Waldo's premier provider", "waldo's premier provider"),
        ("...to leave the conference.", "to leave the conference"),
        ("3D audio disabled", "three d audio disabled"),
        ("H.323", "h three two three"),
        ('a polite "don\'t call" menu', "a polite don't call menu"),
        ("o'clock", "o'clock"),
        ("extension 1234", "extension one two three four"),
        ("dial 500 or 42", "dial five hundred or forty two"),
        ("You’re a “friend”", "you're a friend"),
        ("[ascending tones]", ""),
    ],
)
def test_normalise(local: SimpleNamespace, written: str, spoken: str) -> None:
    assert local.text.normalise(written) == spoken
    assert local.text.normalise(spoken) == spoken


def test_normalise_names_unknown_characters(local: SimpleNamespace) -> None:
    with pytest.raises(DataError, match="é"):
        local.text.normalise("café")


def test_texts_that_contain_each_other_stay_together(local: SimpleNamespace) -> None:
    texts = ["please try again", "that is wrong please try again", "please try", "please try against all odds"]
    groups = local.asr.group_texts(texts)
    assert groups[texts[0]] == groups[texts[1]]
    assert len({groups[texts[1]], groups[texts[2]], groups[texts[3]]}) == 3


def test_split_holds_texts_out_whole(local: SimpleNamespace) -> None:
    held = [f"say word{n} now" for n in range(60)] + ["say word1 now", "a", "b", "the cow says say word2 now"]
    split = local.asr.split_texts(held, ["say word3 now"], test=10, dev=5)
    assert split == local.asr.split_texts(held, ["say word3 now"], test=10, dev=5)
    assert split["a"] == split["b"] == split["say word3 now"] == "train"
    assert split["say word2 now"] == split["the cow says say word2 now"]
    counts = {name: sum(split[text] == name for text in held) for name in ("test", "dev")}
    assert 10 <= counts["test"] <= 11 and 5 <= counts["dev"] <= 6


# ---- speaker count --------------------------------------------------------------------------------------------------


def test_voices_all_talk_all_the_time_at_equal_level(local: SimpleNamespace, tmp_path: Path) -> None:
    paths = []
    for number, level in enumerate((1.0, 0.05)):
        path = tmp_path / f"{number}.wav"
        write_audio(path, level * voiced(0.8, 200 + 300 * number))
        paths.append(str(path))
    samples = 3 * RATE
    stream = local.count.talk(seeded(0, "x"), paths, samples, 1.1)
    assert stream.shape == (samples,)
    # no pause longer than the joints, though each clip has 0.4 s of silence
    assert np.median(frame_levels(stream)) == pytest.approx(-23, abs=3)
    quiet = frame_levels(stream) < -45
    assert max(len(run) for run in "".join("x" if q else " " for q in quiet).split(" ")) <= 12


def test_mixture_has_the_given_level_and_no_silence(local: SimpleNamespace, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", voiced(1.0, 200))
    for number in range(3):
        voices = [([str(tmp_path / "a.wav")], f"v{n}") for n in range(number)]
        wave = local.count.render((5, f"key{number}", number, "train", voices, []))
        assert wave.shape == (5 * RATE,) and wave.dtype == np.float32 and np.abs(wave).max() < 1
        low, high = MIX_LEVEL if number else EMPTY_LEVEL
        level = 10 * np.log10(np.mean(wave.astype(np.float64) ** 2))
        assert low - 0.5 <= level <= high + 0.5
        assert np.count_nonzero(wave) > 0.99 * len(wave)


def test_tables_keep_splits_apart(local: SimpleNamespace) -> None:
    voices = local.count.read_voices(LOCAL / "voices.yaml")
    languages = {split: {voice.split("/")[1][:2] for voice in names} for split, names in voices.items()}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not languages[one] & languages[other]
        assert not set(voices[one].values()) & set(voices[other].values())
        assert all(len(set(voices[name].values())) >= local.count.MAX_VOICES for name in (one, other))
    sounds = local.caption.read_sounds(LOCAL / "sounds.yaml")
    listed = local.caption.all_recordings(sounds)
    assert len(listed) == len(set(listed))
    for name, entry in sounds.items():
        assert entry["train"] and len(set(entry["phrases"])) == 2, name
        assert set(entry) <= {"phrases", "train", "dev", "test"}, name
        assert all(phrase == phrase.lower() and not phrase.endswith(".") for phrase in entry["phrases"]), name


# ---- captions -------------------------------------------------------------------------------------------------------


def test_five_different_captions_of_every_scene(local: SimpleNamespace) -> None:
    for scene in local.caption.SCENES:
        phrases = [["a dog barking", "a barking dog"], ["rain falling", "falling rain"]][: 1 if scene == "alone" else 2]
        wordings = local.caption.captions(scene, phrases)
        assert len(set(wordings)) == 5
        assert all("{" not in text and "dog" in text and ("rain" in text) == (scene != "alone") for text in wordings)


@pytest.mark.parametrize("scene", ["alone", "sequence", "overlap"])
def test_scene_is_five_to_ten_seconds_and_not_clipped(local: SimpleNamespace, tmp_path: Path, scene: str) -> None:
    write_audio(tmp_path / "short.wav", voiced(0.1, 500))
    write_audio(tmp_path / "long.wav", voiced(9.0, 900))
    paths = [str(tmp_path / "short.wav"), str(tmp_path / "long.wav")][: 1 if scene == "alone" else 2]
    for seed in range(10):
        wave = local.caption.render((seed, "key", "train", scene, paths))
        assert 5 * RATE <= len(wave) <= 10 * RATE and np.abs(wave).max() <= 0.971
        assert np.count_nonzero(wave) > 0.99 * len(wave)


# ---- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_packages(
    local: SimpleNamespace, mini_models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every recording the tables name is there; English prompts and lines normalise and split as in the README."""
    downloads = mini_models.parent
    for voice in [name for names in local.count.read_voices(LOCAL / "voices.yaml").values() for name in names]:
        assert len(local.recordings.voice_clips(downloads, voice)) >= 6, voice
    sounds = local.caption.all_recordings(local.caption.read_sounds(LOCAL / "sounds.yaml"))
    local.recordings.extract_gcompris(downloads, sounds)
    for sound in sounds:
        local.recordings.sound_path(downloads, sound)
    monkeypatch.chdir(RECIPE)
    options = yaml.safe_load((LOCAL / "sizes.yaml").read_text(encoding="utf-8"))["quick"]["asr"]
    options["synthetic"] = 200
    jobs = local.asr.plan(downloads, tmp_path, options, 0, LOCAL)
    texts: dict[str, list[str]] = {}
    for job in jobs:
        texts.setdefault(job.utterance.split, []).append(job.utterance.text)
    sizes = {split: len(found) for split, found in texts.items()}
    assert sizes == {"train": 2804, "dev": 160, "test": 70, "test_voices": 240}
    for one, other in permutations(texts, 2):
        assert not set(texts[one]) & set(texts[other])
        long = [text for text in texts[one] if len(text.split()) >= local.game.MIN_SHARED_WORDS]
        whole = "|".join(f" {text} " for text in texts[other])
        assert not [text for text in long if f" {text} " in whole]
    assert len((tmp_path / "left_out.tsv").read_text(encoding="utf-8").splitlines()) == 235
    first = {}
    for job in jobs:
        piece = job.spec[0][0]
        first.setdefault(getattr(piece, "suffix", getattr(piece, "voice", "")), job)
    assert first.keys() >= {".g722", ".mp3", "awb", "rms"}
    for job in first.values():
        wave = local.asr.render(job.spec)
        assert np.abs(wave).max() > 0.01 and 0.03 < len(wave) / RATE / len(job.utterance.text) < 0.6
