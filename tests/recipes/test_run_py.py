"""utils/run.py keeps Kaldi's job-runner contract."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def run(repo_root: Path, cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "utils/run.py"), *words]
    environment = {"PATH": "/usr/bin:/bin", **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60, check=False)


def test_job_number_in_log_and_arguments(repo_root: Path, tmp_path: Path) -> None:
    done = run(repo_root, tmp_path, "JOB=2:4", "logs/JOB/x.JOB.log", "echo", "part JOB of", "splitJOB")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    logs = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.log"))
    assert logs == ["logs/2/x.2.log", "logs/3/x.3.log", "logs/4/x.4.log"]
    lines = (tmp_path / logs[1]).read_text().splitlines()
    assert lines[0] == "# echo 'part 3 of' split3"
    assert lines[1].startswith("# Started at ") and lines[2] == "#"
    assert lines[3] == "part 3 of split3"
    assert lines[4].startswith("# Ended (code 0) at ") and lines[4].endswith(" seconds")


def test_arguments_reach_the_command_as_they_are(repo_root: Path, tmp_path: Path) -> None:
    words = ["a  b", "$(touch pwned)", ";", "--gpu", "*", "", "JOB"]
    done = run(repo_root, tmp_path, "x.log", sys.executable, "-c", "import sys; print(sys.argv[1:])", *words)
    assert done.returncode == 0
    assert repr(words) in (tmp_path / "x.log").read_text()
    assert not (tmp_path / "pwned").exists()


def test_blanks_and_apostrophes_in_paths(repo_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bob's own folder"
    folder.mkdir()
    program = folder / "a program.py"
    program.write_text("#!/usr/bin/env python3\nimport sys; print(sys.argv[1:])")
    program.chmod(0o755)
    log = folder / "the logs/x JOB.log"
    assert run(repo_root, folder, "JOB=1:2", str(log), str(program), str(folder)).returncode == 0
    assert repr([str(folder)]) in (folder / "the logs/x 2.log").read_text()


def test_a_failed_run_shows_its_log_and_the_others_end(repo_root: Path, tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i + 1)); done; [ NUM != 2 ] || exit 7"
    done = run(repo_root, tmp_path, "--max-jobs-run", "1", "NUM=1:3", "x.NUM.log", "sh", "-c", script)
    assert done.returncode == 1
    assert "x.2.log (status 7)" in done.stderr and "1 of 3 runs failed" in done.stderr
    assert "line 29" in done.stderr and "line 9\n" not in done.stderr
    assert "x.1.log" not in done.stderr
    assert "# Ended (code 0)" in (tmp_path / "x.3.log").read_text()


def test_a_command_that_is_not_there(repo_root: Path, tmp_path: Path) -> None:
    done = run(repo_root, tmp_path, "x.log", "no-such-command")
    assert done.returncode == 1
    assert "no-such-command: No such file" in done.stderr and "(code 127)" in done.stderr


def test_no_more_at_once_than_given(repo_root: Path, tmp_path: Path) -> None:
    script = "mkdir busy && sleep 0.05 && rmdir busy"  # mkdir fails if another one is busy
    assert run(repo_root, tmp_path, "--max_jobs_run", "1", "J=1:4", "J.log", "sh", "-c", script).returncode == 0


@pytest.mark.parametrize(
    ("options", "visible", "expected"),
    [
        (["--gpu", "0"], "0,1", "[]"),
        ([], "0,1", "[0,1]"),
        (["--gpu", "2"], "4,5,6", "[4,5]"),
    ],
)
def test_gpus(repo_root: Path, tmp_path: Path, options: list[str], visible: str, expected: str) -> None:
    command = [*options, "x.log", "sh", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"']
    assert run(repo_root, tmp_path, *command, CUDA_VISIBLE_DEVICES=visible).returncode == 0
    assert expected in (tmp_path / "x.log").read_text().splitlines()


def test_runs_at_once_have_different_gpus(repo_root: Path, tmp_path: Path) -> None:
    gpu = '"busy$CUDA_VISIBLE_DEVICES"'  # mkdir fails if another run has the same one
    script = f'echo "[$CUDA_VISIBLE_DEVICES]"; mkdir {gpu} && sleep 0.1 && rmdir {gpu}'
    options = ["--gpu", "1", "--max-jobs-run", "8"]
    done = run(repo_root, tmp_path, *options, "J=1:4", "J.log", "sh", "-c", script, CUDA_VISIBLE_DEVICES="3,7")
    assert done.returncode == 0, done.stderr
    text = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "[3]" in text and "[7]" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a log file and a command"),
        (["x.log"], "give a log file and a command"),
        (["JOB=1:2", "x.log", "true"], "must contain JOB"),
        (["JOB=3:2", "x.JOB.log", "true"], "the range is empty"),
        (["--gpu", "1", "x.log", "true"], "0 GPUs are visible"),
        (["--gpu", "-1", "x.log", "true"], "--gpu"),
        (["--mem", "much", "x.log", "true"], "not a size"),
        (["--queue", "x.log", "true"], "--queue"),
    ],
)
def test_mistakes(repo_root: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = run(repo_root, tmp_path, *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_help(repo_root: Path, tmp_path: Path) -> None:
    done = run(repo_root, tmp_path, "--help")
    assert done.returncode == 0 and "JOB=1:n" in done.stdout


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_command_survives_the_runner(repo_root: Path, tmp_path: Path, number: signal.Signals) -> None:
    script = "sleep 300 & echo $! >child; echo $$ >parent; wait"
    command = [sys.executable, str(repo_root / "utils/run.py"), "x.log", "sh", "-c", script]
    runner = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent = child = 0
    try:
        assert wait_until(lambda: (tmp_path / "parent").exists() and (tmp_path / "parent").read_text().strip())
        parent, child = int((tmp_path / "parent").read_text()), int((tmp_path / "child").read_text())
        runner.send_signal(number)
        status = runner.wait(timeout=30)
        assert wait_until(lambda: not alive(parent))
        if number == signal.SIGKILL:
            return  # nobody is left to end what the command itself started
        assert status == 128 + number
        assert wait_until(lambda: not alive(child))
        assert "# Ended (killed with run.py)" in (tmp_path / "x.log").read_text()
    finally:
        runner.kill()
        for pid in (parent, child):
            if pid and alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_espnet_launcher_takes_it(repo_root: Path, tmp_path: Path) -> None:
    """``espnet2.bin.launch`` calls ``cmd --gpu n LOG command ...`` with any program that keeps the contract."""
    (tmp_path / "job.py").write_text("import os, sys; print(sys.argv[1:], repr(os.environ['CUDA_VISIBLE_DEVICES']))")
    command = [sys.executable, "-m", "espnet2.bin.launch", "--cmd", str(repo_root / "utils/run.py"), "--ngpu", "0"]
    command += ["--log", "logs/train.log", "--", sys.executable, "job.py", "--a", "b c"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    text = (tmp_path / "logs/train.log").read_text()
    assert "['--a', 'b c', '--ngpu', '0', '--multiprocessing_distributed', 'True'] ''" in text
