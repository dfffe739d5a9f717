"""utils/parse_options.sh: options become variables, values are never executed, mistakes are named."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = """
set -euo pipefail
usage="Usage: me [options]"
options="
stage       N     1      first stage
stop_stage  N     $((2 + 3))      last stage
dry_run     BOOL  false  print what would be run, and
                         stop
skip        BOOL  true   a heading follows

Of training
train_args  ARGS  ''     of training
sets        NAMES 'a b'  of data"
Upper=1
other=2
. "$PARSER"
printf '%s\\n' "stage=${stage}" "stop_stage=${stop_stage}" "dry_run=${dry_run}" "skip=${skip}" \
    "train_args=${train_args}" "sets=${sets}" "Upper=${Upper}" "rest=$*"
"""
DEFAULTS = {
    "stage": "1", "stop_stage": "5", "dry_run": "false", "skip": "true", "train_args": "", "sets": "a b", "Upper": "1",
    "rest": "",
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
        (["--train_args", 'it\'s "quoted"'], {"train_args": 'it\'s "quoted"'}),
        (["--train_args", "$(touch pwned)"], {"train_args": "$(touch pwned)"}),
        (["--train_args", "`touch pwned`"], {"train_args": "`touch pwned`"}),
        (["--train_args", "x; touch pwned"], {"train_args": "x; touch pwned"}),
        (["--train_args", "a\\nb %s ${HOME} *"], {"train_args": "a\\nb %s ${HOME} *"}),
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
        (["--stage", "two"], "--stage must be a whole number, not 'two'"),
        (["--stage", "a[$(touch pwned)]"], "--stage must be a whole number"),
        (["--Upper", "2"], "unknown option --Upper"),
        (["--other", "3"], "unknown option --other"),
        (["--PATH", "/"], "unknown option --PATH"),
        (["--stage stop_stage", "3"], "unknown option"),
        (["--stage[$(touch pwned)]", "3"], "unknown option"),
        (["--=3"], "unknown option"),
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
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "Usage: me [options]",
        "",
        "  --stage       N     1      first stage",
        "  --stop_stage  N     5      last stage",
        "  --dry_run     BOOL  false  print what would be run, and",
        "                             stop",
        "  --skip        BOOL  true   a heading follows",
        "",
        "Of training",
        "  --train_args  ARGS  ''     of training",
        "  --sets        NAMES 'a b'  of data",
    ]


def test_names_of_a_table(repo_root: Path, tmp_path: Path) -> None:
    script = """options=; . "$PARSER"
table_names "
first N 1 help
   more help

Heading
second_2 N 2 help"
"""
    env = {"PARSER": str(repo_root / "utils/parse_options.sh"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env, check=True)
    assert done.stdout.split() == ["first", "second_2"]
