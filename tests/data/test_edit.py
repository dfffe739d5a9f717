"""Repairing, combining and choosing, as functions and as the command lines of utils/."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from make_data import add_segments, make_data

from pam_espnet.cli import run_main
from pam_espnet.data.datadir import DataDir, validate
from pam_espnet.data.edit import choose, combine, fix, save_dir
from pam_espnet.data.format import format_data_dir
from pam_espnet.data.leakage import voices_of
from pam_espnet.data.passport import Passport
from pam_espnet.data.tables import read_table
from pam_espnet.errors import DataError

TABLES = ("wav.scp", "text", "prompt", "utt2task", "utt2spk")


def tool(repo_root: Path, name: str, *args: object) -> int:
    """Run utils/<name>.py in this process; its exit status."""
    main = runpy.run_path(str(repo_root / "utils" / f"{name}.py"))["main"]
    return run_main(main, [str(arg) for arg in args])


def test_fix_repairs_and_reports(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_data(tmp_path / "data", utterances=9)
    lines = (root / "text").read_bytes().splitlines(keepends=True)
    lines[1] = b"utt2\n"
    lines[2] = b"utt3 caf\xe9\n"
    (root / "text").write_bytes(b"".join(reversed(lines)) + b"utt1 0\n\n")
    (root / "prompt").write_text((root / "prompt").read_text().replace("utt4 What is it?\n", ""))
    (root / "utt2task").write_text((root / "utt2task").read_text().replace("utt5 asr", "utt5 sing"))
    (root / "wav" / "utt6.wav").unlink()
    (root / "references").write_text('utt7 [broken\nutt8 ["fine"]\nutt99 ["gone"]\n')
    (root / "utt2spk").unlink()
    before = {name: (root / name).read_bytes() for name in (*TABLES, "references") if (root / name).exists()}
    assert tool(repo_root, "fix_data_dir", root) == 0
    data = validate(root)
    assert data.utterances == ["utt1", "utt7", "utt8", "utt9"]
    assert data.references == {"utt8": ["fine"]}
    assert data.utt2spk["utt1"] == "utt1"
    printed = capsys.readouterr().out
    for line in (
        "wrote utt2spk: one speaker for each utterance",
        "sorted text",
        "repaired text:8: key 'utt2' has no value",
        "repaired text:7: not UTF-8",
        "repaired text:10: duplicate key 'utt1'",
        "repaired text:11: empty line",
        "dropped utt2: not in text",
        "dropped utt4: not in prompt",
        "dropped utt5: unknown task 'sing'",
        "dropped utt6: no such audio file",
        "dropped the references of utt7: not JSON",
        "dropped the references of utt99: not in text",
    ):
        assert line in printed
    backup = root / ".backup-1"
    assert str(backup) in printed
    assert {name: (backup / name).read_bytes() for name in before} == before
    assert "dropped utt4" in (backup / "report.txt").read_text()
    assert fix(root) == ([], None)
    assert not (root / ".backup-2").exists()


def test_fix_fills_in_a_plain_kaldi_directory(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    (root / "utt2task").unlink()
    (root / "prompt").unlink()
    with pytest.raises(DataError, match="prompt: no such file"):
        fix(root)
    fix(root, task="caption")
    data = validate(root)
    assert data.per_task() == {"caption": 4}
    assert set(data.prompt.values()) == {"Describe the sounds."}


def test_fix_with_segments(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    add_segments(root)
    segments = (root / "segments").read_text()
    segments = segments.replace("rec-utt1 0.05 0.25", "rec-utt1 0.25 0.05").replace("rec-utt2", "rec-utt9")
    (root / "segments").write_text(segments)
    report, _ = fix(root)
    assert [line.split(":")[0] for line in report] == [
        "dropped utt1",
        "dropped utt2",
        "dropped recording rec-utt1",
        "dropped recording rec-utt2",
    ]
    assert validate(root).utterances == ["utt3", "utt4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text", "utt1 a\nutt1 b\n", "text:2: .*another value(.|\n)*decide which line"),
        ("text", "utt1 a\rutt2 b\r", "text:1: has carriage returns within the line(.|\n)*tr"),
        ("wav.scp", "".join(f"utt{n} {'x' * 300}\n" for n in range(1, 5)), "wav.scp:1: 'utt1': no such audio file"),
        ("wav.scp", None, "wav.scp: no such file"),
        ("text", None, "text: no such file"),
        ("text", "other 1\n", "text:1: 'other': not in prompt"),
    ],
)
def test_fix_leaves_to_people_what_only_they_can_decide(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    root = make_data(tmp_path / "data")
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    with pytest.raises(DataError, match=message):
        fix(root)
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == before


def test_the_parts_combined_are_the_whole(tmp_path: Path, repo_root: Path) -> None:
    root = make_data(tmp_path / "data")
    data = DataDir.load(root)
    for name, keys in (("b", data.utterances[2:]), ("a", data.utterances[:2])):
        save_dir(data.subset(keys), tmp_path / name)
    assert tool(repo_root, "combine_data_dir", tmp_path / "union", tmp_path / "b", tmp_path / "a") == 0
    for name in TABLES:
        assert (tmp_path / "union" / name).read_bytes() == (root / name).read_bytes()


def test_combine_refuses(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    one, two = make_data(tmp_path / "one"), make_data(tmp_path / "two")
    assert tool(repo_root, "combine_data_dir", tmp_path / "union", one, two) == 1
    printed = capsys.readouterr().err
    assert "'utt1'" in printed and str(one) in printed and str(two) in printed
    other = make_data(tmp_path / "other", prefix="b")
    with pytest.raises(DataError, match="both a source and the target"):
        combine([DataDir.load(one), DataDir.load(other)], one)
    add_segments(other)
    with pytest.raises(DataError, match="format both first"):
        combine([DataDir.load(one), DataDir.load(other)], tmp_path / "union")
    third = make_data(tmp_path / "third", prefix="c")
    add_segments(third)
    for name in ("wav.scp", "segments"):
        (third / name).write_text((third / name).read_text().replace("rec-c1", "rec-b1"))
    with pytest.raises(DataError, match="recording 'rec-b1' is"):
        combine([DataDir.load(other), DataDir.load(third)], tmp_path / "union")
    assert not (tmp_path / "union").exists()


def test_combine_corpora(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    """Voices of mixtures and missing clips stay known; on request nobody may be a speaker in two directories."""
    one, two = make_data(tmp_path / "one", prefix="a"), make_data(tmp_path / "two", prefix="b")
    (one / "mix_speakers").write_text("a1 61 62\na2\n")
    (two / "mix_sources").write_text("b1 63-1-0001\n")
    (two / "missing").write_text("b9 missing: gone\n")
    assert tool(repo_root, "combine_data_dir", tmp_path / "union", one, two) == 0
    assert voices_of(tmp_path / "union")["a1"] == {"speaker0", "61", "62"}
    assert voices_of(tmp_path / "union")["b1"] == {"speaker0", "63"}
    assert read_table(tmp_path / "union/missing") == {"b9": "missing: gone"}
    capsys.readouterr()
    assert tool(repo_root, "combine_data_dir", "--distinct_speakers", tmp_path / "strict", one, two) == 1
    printed = capsys.readouterr().err
    assert f"speaker 'speaker0' is in {one} and in {two}" in printed and "other names in utt2spk" in printed
    assert not (tmp_path / "strict").exists()

    third = make_data(tmp_path / "third", prefix="c")  # has none of these tables: the target's old ones go
    combine([DataDir.load(third)], tmp_path / "union")
    assert not any((tmp_path / "union" / name).exists() for name in ("mix_speakers", "mix_sources", "missing"))


def test_choose(tmp_path: Path) -> None:
    data = DataDir.load(make_data(tmp_path / "data", utterances=8))
    assert choose(data, first=3).utterances == ["utt1", "utt2", "utt3"]
    assert choose(data, task="count", first=2).utterances == ["utt2", "utt4"]
    assert choose(data, utterances=["utt5", "utt2"]).utterances == ["utt2", "utt5"]
    drawn = choose(data, sample=4, seed=1).utterances
    assert len(drawn) == 4 and drawn == choose(data, sample=4, seed=1).utterances
    assert any(choose(data, sample=4, seed=seed).utterances != drawn for seed in range(5))
    for options in ({"first": 9}, {"task": "asr", "sample": 5}, {"task": "caption", "first": 1}, {"first": 0}):
        with pytest.raises(DataError, match="to choose from"):
            choose(data, **options)


def test_subset_tool(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_data(tmp_path / "data")
    (tmp_path / "list").write_text("\ufeff# a comment\r\nutt4 anything\r\nutt2\r\n")
    assert tool(repo_root, "subset_data_dir", root, tmp_path / "part", "--utts", tmp_path / "list") == 0
    assert validate(tmp_path / "part").utterances == ["utt2", "utt4"]
    assert tool(repo_root, "subset_data_dir", root, root, "--first", 1) == 1
    assert "both source and target" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool(repo_root, "subset_data_dir", root, tmp_path / "part")


def test_formatted_directories_keep_their_passport(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    format_data_dir(make_data(tmp_path / "data"), raw)
    save_dir(choose(DataDir.load(raw), task="asr"), tmp_path / "asr")
    save_dir(choose(DataDir.load(raw), task="count"), tmp_path / "count")
    assert Passport.load(tmp_path / "asr").tasks == {"asr": 2}
    assert list(read_table(tmp_path / "asr" / "utt2num_samples")) == ["utt1", "utt3"]
    combine([DataDir.load(tmp_path / name) for name in ("asr", "count")], tmp_path / "union")
    assert Passport.load(tmp_path / "union") == Passport.load(raw)
    assert read_table(tmp_path / "union" / "utt2num_samples") == read_table(raw / "utt2num_samples")
    # a directory without a passport written over one that has it
    save_dir(DataDir.load(tmp_path / "data"), tmp_path / "union")
    assert not (tmp_path / "union" / "passport.json").exists()
    (raw / "audio" / "utt1.flac").unlink()
    fix(raw)
    assert list(Passport.load(raw).utterances) == list(read_table(raw / "utt2num_samples")) == ["utt2", "utt3", "utt4"]


def test_combine_refuses_different_sample_rates(tmp_path: Path) -> None:
    for name, rate in (("a", 16000), ("b", 8000)):
        format_data_dir(make_data(tmp_path / name, prefix=name), tmp_path / "raw" / name, sample_rate=rate)
    with pytest.raises(DataError, match="sample rates differ: 16000 and 8000"):
        combine([DataDir.load(tmp_path / "raw" / name) for name in "ab"], tmp_path / "union")


def test_validate_tool(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_data(tmp_path / "data")
    assert tool(repo_root, "validate_data_dir", root) == 0
    assert "4 utterances (asr 2, count 2)" in capsys.readouterr().out
    (root / "wav" / "utt2.wav").unlink()
    assert tool(repo_root, "validate_data_dir", root) == 1
    assert f"error: {root}/wav.scp:2: 'utt2': no such audio file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["validate", "fix", "combine", "subset"])
def test_tools_start_without_heavy_imports(repo_root: Path, name: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['tool', '--help']\n"
        f"try: runpy.run_path({str(repo_root / 'utils' / f'{name}_data_dir.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'torch', 'soundfile'} & set(sys.modules), 'heavy'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert "usage:" in result.stdout
