"""Seeds and fusions one after another: order, what is skipped, what is gathered. Nothing is trained."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from libri_corpora import copy_recipe

from pam_espnet.data.prompts import read_prompts
from pam_espnet.data.tasks import TASKS

MINI = Path(__file__).resolve().parents[2] / "egs/mini/pam1"
# Take the places of run.sh, which a status can be given to, and of Python, which writes what a gathered run leaves.
RUN = """#!/usr/bin/env bash
printf '%s ' "$@" >>calls.txt; echo >>calls.txt; echo "on its way" >&2
case "$*" in *"${FAIL:-nothing}"*) exit "${STATUS:-1}" ;; esac
"""
PYTHON = """#!/usr/bin/env bash
echo "$*" >>python.txt
while [ $# -gt 0 ]; do
    case "$1" in --exp) exp=$2 ;; --settings) settings=$2 ;; esac
    shift
done
exp=${exp/_seed/_}  # as the real command names its file
[ -z "${exp}" ] || printf '{\\n "settings": "%s",\\n}\\n' "${settings}" >"evidence/${exp#exp/}.json"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    copy = copy_recipe(tmp_path, "mini")
    for name, script in (("run.sh", RUN), ("python", PYTHON)):
        (copy / name).write_text(script)
        (copy / name).chmod(0o755)
    (copy / "evidence").mkdir(exist_ok=True)
    for file in (copy / "evidence").glob("*"):
        file.unlink()
    return copy


def call(recipe: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "PAM_NO_SETUP": "1", "PAM_PYTHON": str(recipe / "python"), **env}
    command = ["./run_evidence.sh", *args]
    return subprocess.run(command, cwd=recipe, env=own, capture_output=True, text=True, check=False)


def calls(recipe: Path) -> list[list[str]]:
    return [line.split() for line in (recipe / "calls.txt").read_text().splitlines()]


def test_seeds_in_turn_and_what_is_done_is_skipped(recipe: Path) -> None:
    rows = ["--fusions", "pam single:yamnet", "--variants", "one:a.b=1 c=2; two:d=[3,4]", "--wordings", "true"]
    done = call(recipe, "--seeds", "1 2", "--set", "x=5", *rows)
    assert done.returncode == 0 and "=== 8 of 8: two, seed 2, 0 min so far" in done.stdout, done.stderr
    assert "on its way" in done.stderr
    tags = [words[words.index("--tag") + 1] for words in calls(recipe)]
    assert tags == [f"{name}_quick_seed{seed}" for seed in (1, 2) for name in ("pam", "single_yamnet", "one", "two")]
    pam, yamnet, one = (" ".join(words) for words in calls(recipe)[:3])
    assert "--fusion pam --tag pam_quick_seed1 --audio_off true --set seed=1 x=5 --all_prompts true" in pam
    assert "--prompts conf/unseen_wordings" in pam
    assert "--fusion single:yamnet" in yamnet and "--audio_off false" in yamnet and "all_prompts" not in yamnet
    assert "--fusion pam" in one and "--set seed=1 x=5 a.b=1 c=2 " in one
    wall, *cpu = (recipe / "exp/pam_quick_seed1/log/attempts.txt").read_text().splitlines()[-1].split()
    assert float(wall) >= 0 and len(cpu) == 2
    asked = (recipe / "python.txt").read_text()
    assert "--table quick" in asked and "--readme README.md EXPERTS.md EARLY_EXIT.md ../../../README.md" in asked
    assert call(recipe, "--seeds", "1 2 3", "--set", "x=5", *rows).returncode == 0
    assert len(calls(recipe)) == 8 + 4
    other = call(recipe, "--fusions", "pam")
    assert other.returncode == 1
    assert "evidence/pam_quick_1.json has other settings than ''\n  -> give the row another name" in other.stderr


def test_a_failed_run_does_not_stop_the_others_and_an_interrupted_one_does(recipe: Path) -> None:
    rows = ["--seeds", "1", "--fusions", "pam average static"]
    done = call(recipe, *rows, FAIL="average_quick")
    assert done.returncode == 1 and "failed: average_quick_seed1\n  -> the same command tries them again" in done.stderr
    assert sorted(path.name for path in recipe.glob("evidence/*")) == ["pam_quick_1.json", "static_quick_1.json"]
    assert call(recipe, *rows).returncode == 0 and len(calls(recipe)) == 4
    assert (recipe / "exp/average_quick_seed1/log/attempts.txt").read_text().count("begin") == 2
    done = call(recipe, "--seeds", "2", "--fusions", "pam static", FAIL="pam_quick", STATUS="130")
    assert done.returncode == 130 and len(calls(recipe)) == 5


def test_a_dry_run_prints_every_training_and_writes_nothing() -> None:
    before = sorted(MINI.iterdir())
    # seeds that no committed evidence has
    command = ["./run_evidence.sh", "--dry_run", "true", "--seeds", "91 92", "--wordings", "true"]
    done = subprocess.run(command, cwd=MINI, capture_output=True, text=True, check=True)
    assert done.stdout.count("pam_espnet.bin.pam_train ") == done.stdout.count("=== ") == 2 * 7
    assert "dump/quick/unseen_wordings/SET/NUMBER" in done.stdout and "pam_evidence --table quick" in done.stdout
    assert sorted(MINI.iterdir()) == before


@pytest.mark.parametrize("task", ["asr", "count", "caption"])
def test_unseen_wordings_are_not_those_of_training(task: str) -> None:
    first, *unseen = read_prompts(MINI / f"conf/unseen_wordings/{task}.txt")
    trained = yaml.safe_load((MINI / "conf/train.yaml").read_text()).get("prompt_files", {}).get(task)
    seen = [TASKS[task].default_prompt] if trained is None else read_prompts(MINI / trained)
    assert first == seen[0] and len(unseen) == 4 and not {one.lower() for one in unseen} & {one.lower() for one in seen}
