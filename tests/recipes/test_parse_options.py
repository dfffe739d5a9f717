"""utils/parse_options.sh: options become variables, values are never executed, mistakes are named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = """
set -euo pipefail
help_message="Usage: me [--stage 1]"
stage=1
stop_stage=5
dry_run=false
skip=true
train_args=
Upper=1
. "$PARSER"
printf '%s\\n' "stage=${stage}" "stop_stage=${stop_stage}" "dry_run=${dry_run}" "skip=${skip}" \
    "train_args=${train_args}" "Upper=${Upper}" "rest=$*"
"""
DEFAULTS = {
    "stage": "1", "stop_stage": "5", "dry_run": "false", "skip": "true", "train_args": "", "Upper": "1", "rest": "",
}  # fmt: skip


def parse(repo_root: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", SCRIPT, "me.sh", *words]
    env = {"PARSER": str(repo_root / "utils/parse_options.sh"), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=30, check=False)


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["--stage", "3"], {"stage": "3"}),
        (["--stage=3", "--stop-stage", "4"], {"stage": "3", "stop_stage": "4"}),
        (["--dry_run", "true", "--skip=false"], {"dry_run": "true", "skip": "false"}),
        (["--stage", "2", "--stage", "3"], {"stage": "3"}),
        (["--train_args", "--max_epoch 3"], {"train_args": "--max_epoch 3"}),
        (["--train_args=a=b=c"], {"train_args": "a=b=c"}),
        (["--train_args="], {"train_args": ""}),
        (["--train_args", ""], {"train_args": ""}),
        (["--train_args", "two  words"], {"train_args": "two  words"}),
        (["--train_args", "it's \"quoted\""], {"train_args": "it's \"quoted\""}),
        (["--train_args", "$(touch pwned)"], {"train_args": "$(touch pwned)"}),
        (["--train_args", "`touch pwned`"], {"train_args": "`touch pwned`"}),
        (["--train_args", "x; touch pwned"], {"train_args": "x; touch pwned"}),
        (["--train_args", "a\\nb %s ${HOME} *"], {"train_args": "a\\nb %s ${HOME} *"}),
        (["--stage", "a[$(touch pwned)]"], {"stage": "a[$(touch pwned)]"}),
        (["--stage", "2", "file", "--stage", "3"], {"stage": "2", "rest": "file --stage 3"}),
        (["--", "--stage", "3"], {"rest": "--stage 3"}),
    ],
)
def test_values(repo_root: Path, tmp_path: Path, words: list[str], changed: dict[str, str]) -> None:
    done = parse(repo_root, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == DEFAULTS | changed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stag", "3"], "did you mean --stage ?"),
        (["--stopstage", "3"], "did you mean --stop_stage ?"),
        (["--run", "true"], "did you mean --dry_run ?"),
        (["--nonsense", "3"], "unknown option --nonsense\n  -> --help"),
        (["--stage"], "--stage needs a value"),
        (["--dry_run", "yes"], "--dry_run takes true or false, not 'yes'"),
        (["--dry_run", "--stage", "3"], "--dry_run takes true or false, not '--stage'"),
        (["--Upper", "2"], "not the name of an option"),
        (["--PATH", "/"], "not the name of an option"),
        (["--stage[$(touch pwned)]", "3"], "not the name of an option"),
        (["--=3"], "not the name of an option"),
        (["-s", "3"], "unknown option -s"),
    ],
)
def test_mistakes(repo_root: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = parse(repo_root, tmp_path, *words)
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.startswith("me.sh: error: ")
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(repo_root: Path, tmp_path: Path, word: str) -> None:
    done = parse(repo_root, tmp_path, "--stage", "3", word)
    assert (done.returncode, done.stdout) == (0, "Usage: me [--stage 1]\n")
