"""Whole files or none, and one process at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import time
from pathlib import Path

import pytest

from pam_espnet.errors import DataError
from pam_espnet.fileio import atomic_path, exclusive, read_json, sha256_file, write_json, write_text


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


def test_json_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": 1, "a": "ä"})
    assert read_json(path) == {"b": 1, "a": "ä"} and "ä" in path.read_text(encoding="utf-8")
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def hold(path: str, seconds: float, started: multiprocessing.synchronize.Event) -> None:
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
