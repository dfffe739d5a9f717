"""Audio in archives: the samples of the files, for every program that reads them; kills, changes and damage."""

import os
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import soundfile
from make_data import RATE, add_segments, make_data, noise

import pam_espnet.data.format as format_module
from pam_espnet.bin.pam_format import main
from pam_espnet.data.audio import read_audio
from pam_espnet.data.audio_ark import locate, read_record
from pam_espnet.data.datadir import validate
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.tables import read_table
from pam_espnet.errors import DataError

SMALL = 0.016  # MB: two of the utterances of ``make_data`` in an archive


def archives(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.ark"))}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """``tmp_path``/packed: four utterances in two archives."""
    format_data_dir(make_data(tmp_path / "data"), tmp_path / "packed", archive_mb=SMALL)
    return tmp_path / "packed"


def test_archives_hold_the_files_bit_for_bit(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format_data_dir(tmp_path / "data", tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    command = ["--data", "data", "--out", "two", "--jobs", "2", "--archive_mb", str(SMALL)]
    assert main(command) == 0
    assert archives(Path("two")) == archives(packed) and list(archives(packed)) == ["audio.1.ark", "audio.2.ark"]
    files, wav = validate("files").wav, validate("two").wav
    assert [value.rpartition(":")[0] for value in wav.values()] == ["two/audio.1.ark"] * 2 + ["two/audio.2.ark"] * 2
    assert not (packed / "audio").exists() and not list(packed.glob(".*.ark"))
    for name in ("passport.json", "utt2num_samples", "text"):
        assert (packed / name).read_bytes() == Path("files", name).read_bytes()
    other = kaldiio.load_scp("two/wav.scp")
    for utt, value in wav.items():
        assert read_record(value, utt) == Path(files[utt]).read_bytes()
        wave, rate = read_audio(value)
        assert rate == RATE and wave.dtype == np.float32
        np.testing.assert_array_equal(wave, read_audio(files[utt])[0])
        np.testing.assert_array_equal(wave, soundfile.read(files[utt], dtype="float32")[0])
        assert other[utt][0] == RATE
        np.testing.assert_array_equal(other[utt][1].astype(np.float32), wave)
    piece, _ = read_audio(wav["utt3"], start=0.1, end=0.2)
    np.testing.assert_array_equal(piece, read_audio(files["utt3"])[0][1600:3200])


def test_archives_are_sources_too_with_segments(tmp_path: Path, packed: Path) -> None:
    """Of this project, and those with WAV files that Kaldi writes."""
    waves = {utt: read_audio(value)[0] for utt, value in read_table(packed / "wav.scp").items()}
    with open(tmp_path / "kaldi.ark", "wb") as file, open(tmp_path / "kaldi.scp", "w") as scp:
        kaldiio.save_ark(file, {utt: (RATE, np.int16(wave * 32768)) for utt, wave in waves.items()}, scp=scp)
    for table in (packed / "wav.scp", tmp_path / "kaldi.scp"):
        (tmp_path / "data/wav.scp").write_text(table.read_text())
        (tmp_path / "data/segments").unlink(missing_ok=True)
        add_segments(tmp_path / "data")
        validate(tmp_path / "data")
        format_data_dir(tmp_path / "data", tmp_path / "again")
        for utt, wave in waves.items():
            np.testing.assert_array_equal(read_audio(tmp_path / "again/audio" / f"{utt}.flac")[0], wave[800:4000])


def test_a_killed_run_ends_with_the_same_archives(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, done, original = tmp_path / "dump", [], format_module.format_one

    def killed(job: format_module.Job) -> dict:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.utt)
        return original(job)

    monkeypatch.setattr(format_module, "format_one", killed)
    with pytest.raises(KeyboardInterrupt):
        format_data_dir(tmp_path / "data", target, archive_mb=SMALL)
    assert list(archives(target)) == ["audio.1.ark"] and not (target / "wav.scp").exists()
    (target / ".audio.2.tmp-1.ark").write_bytes(b"half an archive")  # what kill -9 leaves
    monkeypatch.setattr(format_module, "format_one", lambda job: done.append(job.utt) or original(job))
    format_data_dir(tmp_path / "data", target, archive_mb=SMALL)
    assert done == ["utt1", "utt2", "utt3", "utt3", "utt4"]  # what was in no whole archive is done again
    assert archives(target) == archives(packed)
    assert (target / "passport.json").read_bytes() == (packed / "passport.json").read_bytes()
    assert not list(target.glob(".audio.*"))


def test_only_what_changed_is_packed_again(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, original, old = [], format_module.format_one, archives(packed)
    monkeypatch.setattr(format_module, "format_one", lambda job: done.append(job.utt) or original(job))
    source = tmp_path / "data"
    soundfile.write(source / "wav/utt2.wav", noise(0.4, seed=9), RATE)
    soundfile.write(source / "wav/utt1.wav", np.zeros(RATE), RATE)
    format_data_dir(source, packed, archive_mb=SMALL)
    wav = validate(packed).wav
    assert done == ["utt1", "utt2"] and "utt1" not in wav and len(read_audio(wav["utt2"])[0]) == 6400
    assert wav["utt2"].startswith(f"{packed}/audio.3.ark:")
    assert list(archives(packed)) == ["audio.2.ark", "audio.3.ark"]  # nothing is left in the first
    assert archives(packed)["audio.2.ark"] == old["audio.2.ark"]
    done.clear()
    (packed / "audio.2.ark").unlink()  # as the error about a damaged one says
    format_data_dir(source, packed, archive_mb=SMALL)
    assert done == ["utt3", "utt4"] and len(validate(packed).wav) == 3
    done.clear()
    format_data_dir(source, packed)
    assert done == ["utt2", "utt3", "utt4"] and not archives(packed)
    assert validate(packed).wav["utt2"] == f"{packed}/audio/utt2.flac"
    format_data_dir(source, packed, archive_mb=SMALL)
    assert not list((packed / "audio").iterdir()) and len(validate(packed).wav) == 3
    done.clear()
    format_data_dir(source, packed, archive_mb=SMALL)
    assert done == []


def test_damage_is_named_with_file_and_line(tmp_path: Path, packed: Path) -> None:
    scp, wav = packed / "wav.scp", read_table(packed / "wav.scp")
    archive, offset = locate(wav["utt4"])
    assert offset is not None
    os.truncate(archive, os.path.getsize(archive) - 1)
    with pytest.raises(DataError, match=rf"{scp}:4: 'utt4': {wav['utt4']}: the archive was cut(.|\n)*run stage 2"):
        validate(packed)
    with pytest.raises(DataError, match=rf"{wav['utt4']}: the archive was cut: it has \d+ bytes(.|\n)*run stage 2"):
        read_audio(wav["utt4"])
    read_audio(wav["utt3"])
    for wrong in (f"{archive}:{offset - 1}", f"{archive}:{offset + 10**9}"):
        scp.write_text("".join(f"{utt} {value}\n" for utt, value in {**wav, "utt4": wrong}.items()))
        with pytest.raises(DataError, match=rf"{scp}:4: 'utt4': {wrong}: the archive was cut"):
            validate(packed)
    with pytest.raises(DataError, match="the audio there is not that of 'utt2'"):
        read_audio(wav["utt1"], key="utt2")
    with pytest.raises(DataError, match="no such audio file"):
        read_audio(f"{packed}/audio.9.ark:5")
    content = bytearray(Path(locate(wav["utt1"])[0]).read_bytes())
    content[4000:4100] = bytes(100)
    Path(locate(wav["utt1"])[0]).write_bytes(content)
    with pytest.raises(DataError, match=rf"{wav['utt1']}: cannot be read"):
        read_audio(wav["utt1"])


@pytest.mark.parametrize("head", [b"", b"utt", b"utt AUDI", b"utt AUDIO", b"utt AUDIO\x02\x10", b"utt RIFF\xff\xff"])
def test_an_archive_that_ends_within_a_head(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "cut.ark").write_bytes(head)
    with pytest.raises(DataError, match="the archive was cut"):
        read_record(f"{tmp_path}/cut.ark:4")


def test_values_that_name_archives() -> None:
    assert locate("a b/wav.ark:17") == ("a b/wav.ark", 17)
    for value in ("a.flac", "a.ark", "a:17", "cat a.ark:17 |", ".ark:17", "a.ark:x"):
        assert locate(value) == (value, None)
