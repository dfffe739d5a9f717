"""Data directories: loading, saving, subsets, and every way a directory can be wrong."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from make_data import add_segments, make_data

from pam_espnet.data.datadir import DataDir, Segment, validate
from pam_espnet.data.tasks import TASKS, task_spec
from pam_espnet.errors import ConfigError, DataError


def replace_line(name: str, line: int, new: str) -> Callable[[Path], None]:
    """A change that puts ``new`` (nothing: no line) instead of line ``line`` of a table."""

    def change(root: Path) -> None:
        lines = (root / name).read_text().splitlines(keepends=True)
        lines[line - 1] = new + "\n" if new else ""
        (root / name).write_text("".join(lines))

    return change


def segments_then(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """``change`` on a directory with segments."""

    def both(root: Path) -> None:
        add_segments(root)
        change(root)

    return both


def write(name: str, content: str) -> Callable[[Path], None]:
    """A change that writes a whole file."""
    return lambda root: (root / name).write_text(content) and None


@pytest.mark.parametrize(
    ("change", "where", "message", "remedy"),
    [
        (lambda root: (root / "prompt").unlink(), "prompt: ", "no such file", "write it"),
        (lambda root: (root / "wav.scp").unlink(), "wav.scp: ", "no such file", "write it"),
        (write("text", ""), "text: ", "the file is empty", "write it again"),
        (replace_line("text", 2, "utt2"), "text:2: ", "has no value", "write the value"),
        (replace_line("text", 2, "utt1 x"), "text:2: ", "another value than on line 1", "decide which line"),
        (replace_line("utt2spk", 1, "utt4 x"), "utt2spk:2: ", "not sorted", "fix_data_dir.py"),
        (replace_line("prompt", 3, ""), "text:3: ", "'utt3': not in prompt", "fix_data_dir.py"),
        (replace_line("text", 3, ""), "prompt:3: ", "'utt3': not in text", "fix_data_dir.py"),
        (replace_line("wav.scp", 4, ""), "text:4: ", "'utt4': not in wav.scp", "fix_data_dir.py"),
        (replace_line("utt2task", 4, "utt5 asr"), "utt2task:4: ", "'utt5': not in text", "add 'utt5' to text"),
        (replace_line("utt2task", 1, "utt1 translate"), "utt2task:1: ", "unknown task", "asr, count, caption"),
        (replace_line("wav.scp", 2, "utt2 nowhere.wav"), "wav.scp:2: ", "no such audio file", "current directory"),
        (replace_line("wav.scp", 2, "utt2 " + "x" * 5000), "wav.scp:2: ", "no such audio file", "has to end in '|'"),
        (replace_line("wav.scp", 2, "utt2 ."), "wav.scp:2: ", "is not a file", "one audio file"),
        (replace_line("wav.scp", 2, "utt2 sox a.wav -t wav - |"), "wav.scp:2: ", "is a command", "--allow-pipes"),
        (write("references", "utt1 a dog\n"), "references:1: ", "not JSON", '["a dog barks"'),
        (write("references", 'utt1 "a dog"\n'), "references:1: ", "not a list", '["a dog barks"'),
        (write("references", "utt1 []\n"), "references:1: ", "not a list", '["a dog barks"'),
        (write("references", 'utt1 ["a", 3]\n'), "references:1: ", "non-empty strings", '["a dog barks"'),
        (write("references", 'utt9 ["a"]\n'), "references:1: ", "'utt9': not in text", "drop it"),
        (segments_then(replace_line("segments", 1, "utt1 rec-utt1 0.1")), "segments:1: ", "found 2 fields", "seconds"),
        (segments_then(replace_line("segments", 1, "utt1 rec-utt1 a b")), "segments:1: ", "not a number", "seconds"),
        (segments_then(replace_line("segments", 1, "utt1 rec-utt1 0 nan")), "segments:1: ", "start < end", "seconds"),
        (segments_then(replace_line("segments", 1, "utt1 rec-utt1 0.2 0.2")), "segments:1: ", "start < end", "seconds"),
        (segments_then(replace_line("segments", 1, "utt1 rec-utt1 -1 2")), "segments:1: ", "0 <= start", "seconds"),
        (segments_then(replace_line("segments", 1, "utt1 rec9 0 1")), "segments:1: ", "'rec9' is not in", "add it"),
        (segments_then(replace_line("segments", 2, "utt2 rec-utt1 0 1")), "wav.scp:2: ", "no segment uses", "remove"),
        (segments_then(replace_line("segments", 2, "")), "text:2: ", "'utt2': not in segments", "fix_data_dir.py"),
    ],
)
def test_bad_directory(tmp_path: Path, change: Callable[[Path], None], where: str, message: str, remedy: str) -> None:
    root = make_data(tmp_path / "data")
    change(root)
    with pytest.raises(DataError) as caught:
        validate(root)
    # the line that names the file and line, then the remedy below it
    pattern = re.escape(f"{root}/{where}") + ".*" + re.escape(message) + r".*\n  -> .*" + re.escape(remedy)
    assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("key", ["../utt1", ".utt1", "-utt1", "a\\b", "u" * 201])
def test_keys_that_cannot_be_file_names(tmp_path: Path, key: str) -> None:
    root = make_data(tmp_path / "data", utterances=1)
    for name in ("wav.scp", "text", "prompt", "utt2task", "utt2spk"):
        (root / name).write_text((root / name).read_text().replace("utt1", key, 1))
    with pytest.raises(DataError, match="rename the utterance in every table"):
        DataDir.load(root)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data directory"):
        validate(tmp_path / "nowhere")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    replace_line("text", 1, "utt1")(root)
    replace_line("utt2task", 2, "utt2 sing")(root)
    replace_line("wav.scp", 3, "utt3 nowhere.wav")(root)
    with pytest.raises(DataError) as caught:
        validate(root)
    assert all(f"{root}/{where}" in str(caught.value) for where in ("text:1:", "utt2task:2:", "wav.scp:3:"))


def test_load_does_not_look_for_audio_but_validate_does(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    (root / "wav" / "utt1.wav").unlink()
    assert len(DataDir.load(root)) == 4
    with pytest.raises(DataError, match="no such audio file"):
        validate(root)


def test_pipes_are_accepted_when_asked_for(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    replace_line("wav.scp", 2, "utt2 cat a.wav |")(root)
    assert validate(root, allow_pipes=True).wav["utt2"] == "cat a.wav |"


def test_save_and_load_again(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    add_segments(root)
    (root / "references").write_text('utt2 ["ein Hund", "un chien \\u00e9"]\n')
    data = validate(root)
    assert data.segments is not None and data.segments["utt1"] == Segment("rec-utt1", 0.05, 0.25)
    assert data.source("utt1") == (str(root / "wav" / "utt1.wav"), 0.05, 0.25)
    data.save(tmp_path / "copy")
    copy = validate(tmp_path / "copy")
    copy.path = data.path
    assert copy == data


def test_save_removes_optional_tables_that_are_gone(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    (root / "references").write_text('utt2 ["a"]\n')
    data = DataDir.load(root)
    data.references = None
    data.save()
    assert not (root / "references").exists()


def test_subset_keeps_only_what_it_needs(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    add_segments(root)
    part = DataDir.load(root).subset(["utt3", "utt1"])
    assert part.utterances == ["utt1", "utt3"]
    assert list(part.wav) == ["rec-utt1", "rec-utt3"]
    assert part.per_task() == {"asr": 2}
    with pytest.raises(DataError, match="no utterance 'utt9'"):
        part.subset(["utt9"])
    with pytest.raises(DataError, match="no utterance is left"):
        part.subset([])


def test_tasks() -> None:
    metrics = {"asr": "wer", "count": "count", "caption": "caption", "verify": "choice"}
    assert {name: task_spec(name).metric for name in TASKS} == metrics
    with pytest.raises(ConfigError, match="known tasks: asr, count, caption, verify"):
        task_spec("sing")
