"""tools/setup.sh and its interpreter finder, with replacements of the interpreters and of uv; nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = '#!/bin/sh\necho "$0"\n'  # a Python that fits prints its path
OLD = "#!/bin/sh\nexit 1\n"  # any other one fails on the assertion

# Notes what it was asked for; `uv venv ... DIR` makes something that looks like an environment.
UV = """#!/bin/bash
echo "$*" >>"$UV_LOG"
for last; do :; done
if [ "$1" = venv ]; then
    rm -rf "$last"; mkdir -p "$last/bin"; touch "$last/pyvenv.cfg"; cp "$FAKE_PYTHON" "$last/bin/python"
fi
if [ "$1 $2" = "pip install" ]; then sleep "${UV_SLEEP:-0}"; exit "${UV_STATUS:-0}"; fi
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A PATH directory with the ordinary tools and no Python."""
    folder = tmp_path / "system"
    folder.mkdir()
    names = "bash sh cat cp dirname env flock head ls mkdir mv rm sha256sum sleep sort touch"
    for name in names.split():
        (folder / name).symlink_to(str(shutil.which(name, path="/usr/bin:/bin")))
    return folder


def find(repo_root: Path, tmp_path: Path, path: list[Path], **env: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": ":".join(map(str, path)), "HOME": str(tmp_path / "home"), **env}
    command = ["bash", str(repo_root / "tools/find_python.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_path_before_pyenv_before_conda(repo_root: Path, tmp_path: Path, system: Path) -> None:
    home = tmp_path / "home"
    conda = program(home / "miniconda3/envs/speech/bin/python", GOOD)
    assert find(repo_root, tmp_path, [system]).stdout == f"{conda}\n"
    pyenv = program(home / ".pyenv/versions/3.13.0/bin/python", GOOD)
    assert find(repo_root, tmp_path, [system]).stdout == f"{pyenv}\n"
    pyenv = program(home / ".pyenv/versions/3.12.9/bin/python", GOOD)
    assert find(repo_root, tmp_path, [system]).stdout == f"{pyenv}\n"
    pyenv = program(home / ".pyenv/versions/3.12.10/bin/python", GOOD)
    assert find(repo_root, tmp_path, [system]).stdout == f"{pyenv}\n"
    on_path = program(tmp_path / "bin/python3.13", GOOD)
    assert find(repo_root, tmp_path, [system, tmp_path / "bin"]).stdout == f"{on_path}\n"


def test_a_shim_that_answers_for_no_version_is_passed_over(repo_root: Path, tmp_path: Path, system: Path) -> None:
    for name in ("python3", "python3.12", "python3.13"):
        program(tmp_path / "shims" / name, OLD)
    later = program(tmp_path / "bin/python3.12", GOOD)
    assert find(repo_root, tmp_path, [tmp_path / "shims", system, tmp_path / "bin"]).stdout == f"{later}\n"


def test_pam_python_is_the_only_candidate_when_set(repo_root: Path, tmp_path: Path, system: Path) -> None:
    program(tmp_path / "bin/python3.12", GOOD)
    mine, old = program(tmp_path / "mine/python", GOOD), program(tmp_path / "old/python", OLD)
    assert find(repo_root, tmp_path, [system, tmp_path / "bin"], PAM_PYTHON=str(mine)).stdout == f"{mine}\n"
    refused = find(repo_root, tmp_path, [system, tmp_path / "bin"], PAM_PYTHON=str(old))
    assert refused.returncode == 1 and "PAM_PYTHON" in refused.stderr


def test_pyenv_root_and_a_path_with_spaces(repo_root: Path, tmp_path: Path, system: Path) -> None:
    python = program(tmp_path / "my envs/versions/3.12.1/bin/python", GOOD)
    assert find(repo_root, tmp_path, [system], PYENV_ROOT=str(tmp_path / "my envs")).stdout == f"{python}\n"


def test_nothing_fits(repo_root: Path, tmp_path: Path, system: Path) -> None:
    program(tmp_path / "home/.pyenv/versions/3.11.7/bin/python", GOOD)
    done = find(repo_root, tmp_path, [system])
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(("version", "fits"), [((3, 11), False), ((3, 12), True), ((3, 13), True), ((3, 14), False)])
def test_versions(repo_root: Path, version: tuple[int, int], fits: bool) -> None:
    """The expression handed to a candidate, evaluated by this interpreter with another version number."""
    text = (repo_root / "tools/find_python.sh").read_text()
    code = text.partition("-c '")[2].partition("'")[0].replace("sys.version_info", repr((*version, 1)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is fits


class Checkout:
    """A directory with set-up's files, in which ``uv`` is a replacement that records its calls."""

    def __init__(self, repo_root: Path, tmp_path: Path, system: Path) -> None:
        self.root = tmp_path / "a checkout"
        (self.root / "tools").mkdir(parents=True)
        for name in ("setup.sh", "find_python.sh"):
            shutil.copy(repo_root / "tools" / name, self.root / "tools" / name)
        for name in ("setup.cfg", "pyproject.toml", "tools/requirements.lock", "tools/check_install.py"):
            (self.root / name).write_text("")
        python = program(tmp_path / "bin/python3.12", GOOD)
        program(tmp_path / "bin/uv", UV)
        self.log = tmp_path / "uv.log"
        self.env = {"PATH": f"{tmp_path / 'bin'}:{system}", "HOME": str(tmp_path), "UV_LOG": str(self.log)}
        self.env["FAKE_PYTHON"] = str(python)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = ["bash", str(self.root / "tools/setup.sh"), *words]
        pipe, merged = subprocess.PIPE, subprocess.STDOUT
        return subprocess.Popen(command, env=self.env | env, cwd=self.root, text=True, stdout=pipe, stderr=merged)

    def __call__(self, *words: str, **env: str) -> tuple[int, str, list[str]]:
        """Run set-up; return its status, what it printed, and the first words of each call of uv."""
        self.log.write_text("")
        process = self.start(*words, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output, self.calls()

    def calls(self) -> list[str]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return ["venv" if words[0] == "venv" else " ".join(words[:2]) for words in lines]


@pytest.fixture
def checkout(repo_root: Path, tmp_path: Path, system: Path) -> Checkout:
    return Checkout(repo_root, tmp_path, system)


FULL = ["venv", "pip install", "pip install"]  # the lock file, then the package itself


def test_once_and_not_again(checkout: Checkout) -> None:
    status, output, calls = checkout()
    assert (status, calls) == (0, FULL), output
    assert "is ready" in output
    assert checkout() == (0, "", [])
    (checkout.root / "tools/requirements.lock").write_text("changed")
    assert checkout()[2] == FULL[1:]
    assert checkout("--extras", "demo")[2] == [*FULL[1:], "pip install"]
    assert checkout()[2] == []
    assert checkout("--force")[2] == FULL


def test_an_interrupted_install_is_made_anew(checkout: Checkout) -> None:
    status, _, calls = checkout(UV_STATUS="3")
    assert (status, calls) == (3, FULL[:2])
    assert checkout()[2] == FULL
    assert checkout()[2] == []


def test_an_environment_made_by_hand_is_completed(checkout: Checkout) -> None:
    program(checkout.root / ".venv/bin/python", GOOD)
    (checkout.root / ".venv/pyvenv.cfg").touch()
    assert checkout()[2] == FULL[1:]


def test_a_broken_interpreter_means_a_new_environment(checkout: Checkout) -> None:
    checkout()
    (checkout.root / ".venv/bin/python").unlink()
    assert checkout()[2] == FULL


def test_a_directory_that_is_no_environment_is_left_alone(checkout: Checkout) -> None:
    (checkout.root / "mine").mkdir()
    (checkout.root / "mine/thesis.tex").touch()
    status, output, calls = checkout("--venv", "mine")
    assert status == 1 and calls == [] and "is not a virtual environment" in output
    assert (checkout.root / "mine/thesis.tex").exists()


def test_a_failed_check_is_a_failed_set_up(checkout: Checkout) -> None:
    checkout.env["FAKE_PYTHON"] = str(
        program(checkout.root / "python", '#!/bin/sh\n[ "$1" = -c ] || exit 1\necho "$0"\n')
    )
    assert checkout()[0] == 1
    assert not (checkout.root / ".venv/.pam-installed").exists()


def test_two_at_once_install_once(checkout: Checkout) -> None:
    checkout.log.write_text("")
    both = [checkout.start(UV_SLEEP="0.5") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert checkout.calls() == FULL
    assert sum("waiting" in output for output in outputs) == 1


def test_no_interpreter_anywhere(checkout: Checkout) -> None:
    os.unlink(Path(checkout.env["FAKE_PYTHON"]))
    # The replacement "fetches" nothing, and finds nothing.
    program(checkout.log.parent / "bin/uv", "#!/bin/sh\nexit 2\n")
    status, output, _ = checkout()
    assert status == 1
    assert "pyenv install 3.12" in output and "PAM_PYTHON=" in output


@pytest.mark.parametrize("words", [["--nonsense"], ["--venv"], ["--extras", "a b"]])
def test_mistakes(checkout: Checkout, words: list[str]) -> None:
    status, output, calls = checkout(*words)
    assert status == 1 and output.startswith("error: ") and calls == []


def test_help(checkout: Checkout) -> None:
    status, output, calls = checkout("--help")
    assert status == 0 and output.startswith("Usage: tools/setup.sh") and calls == []
