"""Whole files or none, and one process at a time."""

import hashlib
import multiprocessing
import pickle
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from pam_espnet.errors import DataError
from pam_espnet.fileio import (
    atomic_path,
    check_key,
    exclusive,
    read_json,
    sha256_file,
    whole_folder,
    write_json,
    write_text,
)


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    write_text(path, "old\n")

    def break_off() -> None:
        with atomic_path(path) as tmp:
            assert tmp.suffix == ".txt"
            tmp.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with whole_folder(folder) as tmp:
        (tmp / "a").write_text("1")
        assert not folder.exists()

    def break_off() -> None:
        with whole_folder(folder) as tmp:
            (tmp / "b").write_text("2")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert [path.name for path in folder.iterdir()] == ["a"]
    folder.with_name(".folder.tmp-1-new").mkdir()  # of a killed process
    with whole_folder(folder) as tmp:
        (tmp / "c").write_text("3")
    assert [path.name for path in folder.iterdir()] == ["c"] and list(folder.parent.iterdir()) == [folder]


def test_keys_name_the_entries_that_differ(tmp_path: Path) -> None:
    key = {"lr": 0.1, "conf": {"a": 1, "b": [1, 2]}}
    check_key(tmp_path / "key.json", key, "remove it")
    check_key(tmp_path / "key.json", key, "remove it")
    with pytest.raises(DataError, match=r"changed: conf\.b, new\)\n  -> remove it"):
        check_key(tmp_path / "key.json", {"lr": 0.1, "conf": {"a": 1, "b": [1]}, "new": 0}, "remove it")


def test_json_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": 1, "a": "ä"})
    assert read_json(path) == {"b": 1, "a": "ä"} and "ä" in path.read_text(encoding="utf-8")
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def hold(path: str, seconds: float, started: Event) -> None:
    with exclusive(path):
        started.set()
        time.sleep(seconds)
        Path(path).with_name("first").touch()


def test_the_second_waits_for_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / ".lock"), 0.5, started))
    process.start()
    assert started.wait(10)
    with exclusive(tmp_path / ".lock"):
        assert (tmp_path / "first").exists()
    process.join()
    assert "waiting" in caplog.text


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / ".lock"), 60.0, started))
    process.start()
    assert started.wait(10)
    process.kill()
    process.join()
    with exclusive(tmp_path / ".lock"):
        assert not (tmp_path / "first").exists()


def test_data_errors_come_out_of_worker_processes_whole() -> None:
    error = DataError("a/b", "is wrong", line=3, hint="correct it")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(copy) == str(error) == "a/b:3: is wrong\n  -> correct it"
    assert (copy.path, copy.line, copy.hint) == (error.path, 3, "correct it")
