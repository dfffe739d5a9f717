"""Formatting: what is written, what is skipped and why, and resuming after a kill."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
from make_data import RATE, add_segments, make_data, noise

import pam_espnet.data.format as format_module
from pam_espnet.bin.pam_format import main
from pam_espnet.cli import run_main
from pam_espnet.data.audio import read_audio
from pam_espnet.data.datadir import validate
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.passport import Passport
from pam_espnet.data.pcm import pcm16_sha256
from pam_espnet.data.tables import read_table
from pam_espnet.errors import ConfigError, DataError


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a formatted directory but the journal, whose order tells the history."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_formatted_directory(tmp_path: Path, audio_format: str) -> None:
    source = make_data(tmp_path / "data")
    (source / "references").write_text('utt2 ["a", "b"]\n')
    target = tmp_path / "dump"
    passport = format_data_dir(source, target, audio_format=audio_format)
    data = validate(target)
    assert data.wav["utt1"] == str(target / "audio" / f"utt1.{audio_format}")
    assert data.references == {"utt2": ["a", "b"]}
    info = soundfile.info(data.wav["utt1"])
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (RATE, 1, "PCM_16", 4800)
    # 16-bit audio passes through unchanged
    np.testing.assert_array_equal(read_audio(data.wav["utt1"])[0], read_audio(source / "wav" / "utt1.wav")[0])
    assert read_table(target / "utt2num_samples") == dict.fromkeys(data.text, "4800")
    assert passport == Passport.load(target)
    entry = passport.utterances["utt1"]
    samples = soundfile.read(data.wav["utt1"], dtype="int16")[0]
    assert entry["sha256"] == pcm16_sha256(samples) and entry["seconds"] == 0.3
    assert entry["source"] == str(source / "wav" / "utt1.wav") and entry["source_rate"] == RATE
    assert passport.tasks == {"asr": 2, "count": 2}
    assert "4 utterances" in passport.summary() and "asr 2, count 2" in passport.summary()


def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(Path("data"), utterances=2)
    format_data_dir("data", "dump/raw/set")
    assert validate("dump/raw/set").wav["utt1"] == "dump/raw/set/audio/utt1.flac"


def test_other_rates_and_channels(tmp_path: Path) -> None:
    source = make_data(tmp_path / "data", utterances=2)
    soundfile.write(source / "wav" / "utt1.wav", np.stack([noise(0.5, 44100)] * 2, axis=1), 44100)
    passport = format_data_dir(source, tmp_path / "dump")
    assert passport.utterances["utt1"]["source_rate"] == 44100
    assert passport.utterances["utt1"]["num_samples"] == RATE // 2
    assert "1 resampled with soxr" in passport.summary()


def test_segments_become_files(tmp_path: Path) -> None:
    source = make_data(tmp_path / "data", utterances=2)
    whole = read_audio(source / "wav" / "utt1.wav")[0]
    add_segments(source)
    passport = format_data_dir(source, tmp_path / "dump")
    data = validate(tmp_path / "dump")
    assert data.segments is None
    np.testing.assert_array_equal(read_audio(data.wav["utt1"])[0], whole[800:4000])
    assert passport.utterances["utt1"]["segment"] == [0.05, 0.25]


def test_skips_are_listed_with_the_reason(tmp_path: Path) -> None:
    source = make_data(tmp_path / "data", utterances=24, prefix="u")
    waves = {
        "u1": noise(1.1),
        "u2": noise(0.05),
        "u3": np.zeros(4800),
        "u4": np.full(4800, 5e-5),
        "u5": np.where(np.arange(4800) == 7, np.nan, noise(0.3)),
        "u6": np.where(np.arange(4800) == 7, np.inf, noise(0.3)),
        "u7": np.zeros(0),
        "u10": 3 * noise(0.3),
        "u11": np.stack([noise(0.3), -noise(0.3)], axis=1),
        "u12": 32768 * noise(0.3),
    }
    for utt, wave in waves.items():
        soundfile.write(source / "wav" / f"{utt}.wav", wave, RATE, subtype="FLOAT")
    (source / "wav" / "u8.wav").write_bytes(b"not audio")
    (source / "wav" / "u9.wav").unlink()
    # unsorted on purpose by make_data (u10 after u9): sort as a user would
    for name in ("wav.scp", "text", "prompt", "utt2task", "utt2spk"):
        lines = sorted((source / name).read_text().splitlines())
        (source / name).write_text("\n".join(lines) + "\n")
    passport = format_data_dir(source, tmp_path / "dump", max_seconds=1.0)
    reasons = {utt: reason.split(":")[0] for utt, reason in passport.skipped.items()}
    assert reasons == {
        "u1": "too long",
        "u2": "too short",
        "u3": "digital silence",
        "u4": "silent",
        "u5": "not finite",
        "u6": "not finite",
        "u7": "empty",
        "u8": "unreadable",
        "u9": "unreadable",
        "u11": "unreadable",
        "u12": "beyond full scale",
    }
    assert "Format not recognised" in passport.skipped["u8"] and "no such audio file" in passport.skipped["u9"]
    assert "the channels cancel each other" in passport.skipped["u11"] and "int16 scale" in passport.skipped["u12"]
    assert passport.utterances["u10"]["clipped"] > 0
    assert "1 have clipped samples" in passport.summary() and "3 unreadable" in passport.summary()
    assert set(validate(tmp_path / "dump").text) == set(passport.utterances)


def test_too_many_skips_is_an_error(tmp_path: Path) -> None:
    source = make_data(tmp_path / "data")
    with pytest.raises(DataError, match=r"4 of 4 utterances cannot be used(.|\n)*too long(.|\n)*--max_seconds"):
        format_data_dir(source, tmp_path / "dump", max_seconds=0.2)
    assert not (tmp_path / "dump" / "passport.json").exists()


def test_killed_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_data(tmp_path / "data")
    format_data_dir(source, tmp_path / "unbroken")
    target, done = tmp_path / "dump", []
    original = format_module.format_one

    def counted(job: format_module.Job) -> dict:
        done.append(job.utt)
        return original(job)

    def killed(job: format_module.Job) -> dict:
        if len(done) == 2:
            raise KeyboardInterrupt
        return counted(job)

    monkeypatch.setattr(format_module, "format_one", killed)
    with pytest.raises(KeyboardInterrupt):
        format_data_dir(source, target)
    assert not (target / "passport.json").exists()
    # kill -9 can also cut the journal's last line short and leave a temporary file
    with (target / ".passport.jsonl").open("a") as journal:
        journal.write('{"utt": "utt3", "stam')
    (target / "audio" / ".utt3.tmp-1.flac").write_bytes(b"half a file")
    monkeypatch.setattr(format_module, "format_one", counted)
    format_data_dir(source, target)
    assert done == ["utt1", "utt2", "utt3", "utt4"]
    assert sorted(path.name for path in (target / "audio").iterdir()) == [f"utt{i}.flac" for i in (1, 2, 3, 4)]
    assert (target / "passport.json").read_bytes() == (tmp_path / "unbroken" / "passport.json").read_bytes()
    before = snapshot(target)
    format_data_dir(source, target)
    assert len(done) == 4 and snapshot(target) == before


def test_only_what_changed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, done = make_data(tmp_path / "data"), tmp_path / "dump", []
    original = format_module.format_one
    monkeypatch.setattr(format_module, "format_one", lambda job: done.append(job.utt) or original(job))
    old = format_data_dir(source, target)
    done.clear()
    soundfile.write(source / "wav" / "utt2.wav", noise(0.4, seed=9), RATE)  # the source changed
    (target / "audio" / "utt3.flac").unlink()  # the result is gone
    for name in ("wav.scp", "text", "prompt", "utt2task", "utt2spk"):  # an utterance left
        (source / name).write_text("".join((source / name).read_text().splitlines(keepends=True)[:3]))
    new = format_data_dir(source, target)
    assert done == ["utt2", "utt3"]
    assert new.utterances["utt1"] == old.utterances["utt1"]
    assert new.utterances["utt2"]["sha256"] != old.utterances["utt2"]["sha256"]
    assert not (target / "audio" / "utt4.flac").exists()
    done.clear()
    size = (source / "wav" / "utt1.wav").stat().st_size
    (source / "wav" / "utt1.wav").write_bytes(bytes(size))
    soundfile.write(source / "wav" / "utt2.wav", np.zeros(RATE), RATE)
    (source / "wav" / "utt3.wav").touch()
    for changed in (["utt1", "utt2", "utt3"], ["utt1"]):  # what was unreadable is tried again, what was silent is not
        with pytest.raises(DataError, match="2 of 3 utterances cannot be used"):
            format_data_dir(source, target)
        assert done == changed
        done.clear()
    make_data(tmp_path / "again", utterances=3)
    source = tmp_path / "again"
    format_data_dir(source, target, sample_rate=8000)
    assert done == ["utt1", "utt2", "utt3"]
    settings = json.loads((target / ".passport.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["sample_rate"] == 8000


def test_processes_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_data(tmp_path / "data")
    for name, jobs in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        format_data_dir(source, "dump", jobs=jobs)
    assert snapshot(tmp_path / "one" / "dump") == snapshot(tmp_path / "two" / "dump")


@pytest.mark.parametrize("audio_format", ["flac", "wav"])
def test_a_full_disk_is_named(tmp_path: Path, audio_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_data(tmp_path / "data")
    command = ["--data", str(source), "--out", str(tmp_path / "dump"), "--jobs", "1", "--audio_format", audio_format]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))  # bytes of a file: EFBIG in place of ENOSPC
    try:
        assert run_main(main, command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/dump" in said and "-> free disk space" in said
    assert main(command) == 0 and len(Passport.load(tmp_path / "dump").utterances) == 4


def test_refusals(tmp_path: Path) -> None:
    source = make_data(tmp_path / "data", utterances=1)
    for options in ({"audio_format": "ogg"}, {"jobs": 0}, {"min_seconds": 40.0}):
        with pytest.raises(ConfigError):
            format_data_dir(source, tmp_path / "dump", **options)
    with pytest.raises(ConfigError, match="is the source"):
        format_data_dir(source, source)
    wav = source / "wav" / "utt1.wav"
    (source / "wav.scp").write_text(f"utt1 cat {wav} |\n")
    with pytest.raises(DataError, match="--allow-pipes"):
        format_data_dir(source, tmp_path / "dump")
    assert format_data_dir(source, tmp_path / "dump", allow_pipes=True).utterances["utt1"]["num_samples"] == 4800


def test_damaged_passport(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not formatted"):
        Passport.load(tmp_path)
    for content in ("{", '{"other": 1}', "[]"):
        (tmp_path / "passport.json").write_text(content)
        with pytest.raises(DataError, match="is not a passport"):
            Passport.load(tmp_path)


def test_all_directories_are_checked_before_the_first_is_formatted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [str(make_data(tmp_path / "data" / name)) for name in ("train", "dev")]
    targets = [str(tmp_path / "raw" / name) for name in ("train", "dev")]
    command = ["--data", *sources, "--out", *targets, "--jobs", "1", "--max-seconds", "5"]
    recording = Path(sources[1], "wav", "utt2.wav")
    content = recording.read_bytes()
    recording.unlink()
    with pytest.raises(DataError, match="no such audio file"):
        main(command)
    assert not Path(targets[0]).exists()
    recording.write_bytes(content)
    assert main(command) == 0
    assert [len(Passport.load(target).utterances) for target in targets] == [4, 4]
    assert capsys.readouterr().out.count("4 utterances") == 2
    with pytest.raises(SystemExit):
        main(["--data", *sources, "--out", targets[0]])
    assert "name one for each" in capsys.readouterr().err
