"""Command lines: devices by name, checked before anything is loaded; errors and interrupts as exit status."""

import argparse
import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from pam_espnet import cli
from pam_espnet.cli import add_compute_options, chosen_device, code_commit, compute_device, run_main
from pam_espnet.errors import ConfigError


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "meta", "", "cpu:0:1", "cuda:-1"])
def test_names_that_are_no_device_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name}: no such device; cpu, cuda, cuda:N or auto"):
        chosen_device(name)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"--device {name}: there is no GPU here"):
            chosen_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("cuda:1") == "cuda:1" and chosen_device("cuda") == "cuda"
    with pytest.raises(ConfigError, match="--device cuda:2: the last GPU here is cuda:1"):
        chosen_device("cuda:2")


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert chosen_device("auto") == device


def test_compute_options() -> None:
    parser = argparse.ArgumentParser()
    add_compute_options(parser, dtypes=("float32", "bfloat16"))
    args = parser.parse_args([])
    assert (args.device, args.dtype, args.threads) == ("auto", None, 0)
    threads = torch.get_num_threads()
    assert compute_device(parser.parse_args(["--device", "cpu"])) == "cpu" and torch.get_num_threads() == threads
    with pytest.raises(ConfigError, match="--threads: -1; must be a whole number, at least 0"):
        compute_device(parser.parse_args(["--threads", "-1"]))
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "int8"])


def test_user_errors_have_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        raise error

    assert run_main(lambda _: fail(ConfigError("x: is wrong\n  -> correct it"))) == 1
    assert capsys.readouterr().err == "error: x: is wrong\n  -> correct it\n"
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        assert run_main(lambda _, code=code: fail(OSError(code, os.strerror(code), "exp/mine"))) == 1
        assert capsys.readouterr().err.startswith(f"error: exp/mine: {os.strerror(code)}\n  -> free disk space")
    assert run_main(lambda _: fail(OSError(errno.ENOSPC, "No space left on device"))) == 1
    capsys.readouterr()
    assert run_main(lambda _: int(Path("x" * 300).exists())) == 1
    assert capsys.readouterr().err.endswith("xxx: File name too long\n  -> give a shorter name\n")
    with pytest.raises(FileNotFoundError):
        run_main(lambda _: fail(FileNotFoundError(errno.ENOENT, "a bug")))
    with pytest.raises(FileNotFoundError):
        run_main(lambda _: fail(FileNotFoundError(errno.ENOENT, "a bug", "./other")), ["--exp", "exp", "."])
    for argument in ("missing/a.json", "missing", "a=missing/a.json", "--data=missing"):
        capsys.readouterr()
        assert run_main(lambda _: fail(FileNotFoundError(2, os.strerror(2), "missing/a.json")), [argument]) == 1
        assert capsys.readouterr().err.startswith("error: missing/a.json: No such file or directory\n  -> correct")
    assert run_main(lambda _: fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_main(lambda _: fail(ZeroDivisionError()))


def test_tables_that_commands_write_do_not_make_the_code_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAM_COMMIT", raising=False)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "pam_espnet" / "cli.py"))
    assert code_commit() is None  # no checkout
    for name in ("pam_espnet/cli.py", "egs/EVIDENCE.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    commit = code_commit()
    assert commit is not None and len(commit) == 12
    (tmp_path / "egs/EVIDENCE.md").write_text("2")
    (tmp_path / "new.py").write_text("")  # nothing runs it yet
    assert code_commit() == commit
    (tmp_path / "pam_espnet/cli.py").write_text("2")
    assert code_commit() == f"{commit}-dirty"
