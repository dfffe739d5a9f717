"""utils/slurm.py keeps run.py's contract over sbatch: its programs replaced, and a real cluster of two nodes.

The real one, of the tests marked services, needs slurmctld and slurmd on PATH or in $PAM_SLURM_ROOT
(see tests/kit/real_slurm.py).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from libri_corpora import copy_recipe, make_librispeech, run, small
from real_slurm import NoSlurm, real_slurm
from services import unavailable

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "egs/TEMPLATE/pam1/slurm.conf"


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """The environment of commands for which fake_slurm.py is Slurm."""
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests/kit/fake_slurm.py", tmp_path / "bin" / name)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "state").mkdir()
    (tmp_path / "work").mkdir()
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path / "state")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that reach a real Slurm."""
    try:
        with real_slurm(tmp_path_factory.mktemp("slurm"), nodes=2) as environment:
            yield environment
    except NoSlurm as reason:
        unavailable("slurm", str(reason))


def command(*words: str, config: Path = CONFIG) -> list[str]:
    return [sys.executable, str(ROOT / "utils/slurm.py"), "--config", str(config), "--lag", "1", *words]


def slurm(cwd: Path, env: dict[str, str], *words: str, config: Path = CONFIG) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    return subprocess.run(
        command(*words, config=config),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def calls(env: dict[str, str]) -> list[str]:
    """The command lines with which sbatch was called."""
    return (Path(env["FAKE_SLURM"]) / "calls").read_text().splitlines()


def check_array(cwd: Path, env: dict[str, str]) -> None:
    """Runs 2 to 4, one at once, of which 3 fails; there are stale logs of other results."""
    for number in (2, 3, 4):
        (cwd / f"logs/{number}").mkdir(parents=True)
        (cwd / f"logs/{number}/x.{number}.log").write_text("# Ended (code 0) at some time, elapsed time 1 seconds\n")
    script = "mkdir busy && sleep 0.2 && rmdir busy && echo \"part JOB:\" '$(date)' && [ JOB != 3 ]"
    done = slurm(cwd, env, "--max-jobs-run", "1", "JOB=2:4", "logs/JOB/x.JOB.log", "sh", "-c", script)
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert "logs/3/x.3.log (status 1)" in done.stderr and "1 of 3 runs failed" in done.stderr
    assert "part 3:" in done.stderr and "part 2:" not in done.stderr
    lines = (cwd / "logs/4/x.4.log").read_text().splitlines()
    assert lines[0].startswith("# sh -c ") and lines[-1].startswith("# Ended (code 0)")
    assert lines[3] == "part 4: $(date)"
    assert not list(cwd.rglob("*.slurm"))


def check_cancel(cwd: Path, env: dict[str, str]) -> None:
    script = f"sleep 100 & echo $! >{cwd}/child.JOB; wait"
    words = command("--max-jobs-run", "1", "JOB=1:2", "c.JOB.log", "sh", "-c", script)
    with subprocess.Popen(words, cwd=cwd, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True) as runner:
        deadline = time.monotonic() + 20
        while not (cwd / "child.1").exists() or not (cwd / "child.1").read_text().strip():
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.1)
        runner.send_signal(signal.SIGTERM)
        output = runner.communicate(timeout=30)[1]
    assert runner.returncode == 128 + signal.SIGTERM
    assert "cancelling job" in output
    stat = Path(f"/proc/{(cwd / 'child.1').read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert "# Ended (killed with run.py)" in (cwd / "c.1.log").read_text()
    assert not (cwd / "child.2").exists()


def test_array_of_jobs(tmp_path: Path, fake: dict[str, str]) -> None:
    folder = tmp_path / "work" / "bob's own folder"
    folder.mkdir()
    check_array(folder, fake)
    (call,) = calls(fake)
    assert "--array=2-4%1" in call and "--output=logs/%a/x.%a.log.slurm" in call and "--job-name=x " in f"{call} "
    assert "--nodes=1 --ntasks=1" in call and "gres" not in call


def test_options_become_flags_of_sbatch(tmp_path: Path, fake: dict[str, str]) -> None:
    options = ["--gpu", "2", "--mem", "1.5G", "--num_threads", "3", "--time", "1:00:00", "--partition=long"]
    env = {**fake, "CUDA_VISIBLE_DEVICES": "4,6"}
    echo = ["sh", "-c", "echo $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES", "--config", "its own"]
    done = slurm(tmp_path / "work", env, *options, "x.log", *echo)
    assert done.returncode == 0, done.stderr
    flags = "--gres=gpu:2 --mem=1536M --cpus-per-task=3 --partition=long --time=1:00:00"
    assert flags in calls(fake)[0] and "--array" not in calls(fake)[0]
    assert "3 4,6\n" in (tmp_path / "work/x.log").read_text()


def test_several_nodes(tmp_path: Path, fake: dict[str, str]) -> None:
    """One task on each; what Slurm shows a node of its GPUs stays as it is."""
    work, env = tmp_path / "work", {**fake, "CUDA_VISIBLE_DEVICES": "4,6"}
    echo = ["sh", "-c", "echo $SLURM_NODEID of $SLURM_STEP_NODELIST, $CUDA_VISIBLE_DEVICES"]
    assert slurm(work, env, "--num-nodes", "2", "--gpu", "2", "x.log", *echo).returncode == 0
    assert "--gres=gpu:2 --nodes=2 --ntasks=2 --ntasks-per-node=1" in calls(fake)[0]
    lines = (work / "x.log").read_text().splitlines()
    assert sorted(lines[3:5]) == [f"{node} of 127.0.0.[1-2], 4,6" for node in (0, 1)]
    failing = ["sh", "-c", "[ $SLURM_NODEID = 1 ] && exit 3; sleep 100"]
    done = slurm(work, env, "--num-nodes", "2", "--gpu", "0", "x.log", *failing)
    assert done.returncode == 1 and "x.log (status" in done.stderr
    config = work / "slurm.conf"
    config.write_text("option gpu=* --gpus=$0\n")
    refused = slurm(work, fake, "--num-nodes", "2", "x.log", "true", config=config)
    assert refused.returncode == 1 and "no line about num_nodes" in refused.stderr


def test_a_recipes_own_configuration(tmp_path: Path, fake: dict[str, str]) -> None:
    config = tmp_path / "slurm.conf"
    config.write_text(
        "command sbatch --account='my lab'  # who pays\n\n"
        "option gpu=0 -p cpu\noption gpu=* -p gpu --gpus=$0\ndefault gpu=0\noption qos=* --qos $0\n"
    )
    assert slurm(tmp_path / "work", fake, "x.log", "true", config=config).returncode == 0
    env = {**fake, "CUDA_VISIBLE_DEVICES": "0"}
    assert slurm(tmp_path / "work", env, "--gpu", "1", "--qos", "fast", "x.log", "true", config=config).returncode == 0
    first, second = calls(fake)
    assert first.startswith("--account=my lab -p cpu --parsable")
    assert second.startswith("--account=my lab -p gpu --gpus=1 --qos fast --parsable")
    refused = slurm(tmp_path / "work", fake, "--mem", "4G", "x.log", "true", config=config)
    assert refused.returncode == 1 and "no line about mem" in refused.stderr and len(calls(fake)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("option gpu\n", "slurm.conf:1: cannot read 'option gpu'"),
        ("\ncommand 'sbatch\n", "slurm.conf:2: No closing quotation"),
        ("default time=1\n", "default time=... without a line option time"),
        ("option gpu=1 --gpus=1\n", "no line about gpu=2"),
    ],
)
def test_mistakes_in_a_configuration(tmp_path: Path, fake: dict[str, str], text: str, message: str) -> None:
    config = tmp_path / "slurm.conf"
    config.write_text(text)
    done = slurm(tmp_path / "work", fake, "--gpu", "2", "x.log", "true", config=config)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.log"], "give a log file and a command"),
        (["JOB=1:2", "x.log", "true"], "must contain JOB"),
        (["--queue", "q", "x.log", "true"], "--queue"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, fake: dict[str, str], words: list[str], message: str) -> None:
    done = slurm(tmp_path / "work", fake, *words)
    assert done.returncode == 2 and message in done.stderr
    assert not list((tmp_path / "work").iterdir()) and not list((tmp_path / "state").iterdir())


def test_what_sbatch_refuses_is_shown(tmp_path: Path, fake: dict[str, str]) -> None:
    done = slurm(tmp_path / "work", fake, "--partition", "none", "x.log", "true")
    assert done.returncode == 1
    assert "invalid partition specified: none" in done.stderr and "--partition=none" in done.stderr


def test_no_slurm_on_this_machine(tmp_path: Path) -> None:
    done = slurm(tmp_path, {"PATH": "/nowhere"}, "x.log", "true")
    assert done.returncode == 1 and "sbatch: not found on PATH" in done.stderr and "--cmd local" in done.stderr


def test_a_run_that_is_lost(tmp_path: Path, fake: dict[str, str]) -> None:
    """Its log has no end: Slurm's own words are shown, and it counts as failed."""
    script = "[ JOB = 1 ] || { echo out of memory >&2; kill -9 $PPID; sleep 5; }"
    done = slurm(tmp_path / "work", fake, "JOB=1:2", "x.JOB.log", "sh", "-c", script)
    assert done.returncode == 1
    assert "x.2.log (status lost)" in done.stderr and "x.1.log" not in done.stderr
    assert "----- x.2.log.slurm" in done.stderr


def test_a_queue_that_does_not_answer_for_a_while(tmp_path: Path, fake: dict[str, str]) -> None:
    (tmp_path / "state/squeue_fails").write_text("2")
    assert slurm(tmp_path / "work", fake, "x.log", "sh", "-c", "sleep 0.1").returncode == 0
    assert (tmp_path / "state/squeue_fails").read_text() == "0"


def test_a_signal_cancels_the_jobs(tmp_path: Path, fake: dict[str, str]) -> None:
    check_cancel(tmp_path / "work", fake)


def test_a_signal_during_sbatch_cancels_the_job(tmp_path: Path, fake: dict[str, str]) -> None:
    (tmp_path / "state/slow").touch()
    environment = {**os.environ, **fake}
    with subprocess.Popen(command("x.log", "sleep", "100"), cwd=tmp_path / "work", env=environment) as runner:
        deadline = time.monotonic() + 20
        while not (tmp_path / "state/calls").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(timeout=30) == 128 + signal.SIGTERM
    assert (tmp_path / "state/100.cancel").exists() and not (tmp_path / "state/100_NA").exists()


def test_help_needs_no_configuration(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "utils/slurm.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "option gpu=*" in done.stdout and "--max-jobs-run" in done.stdout


def test_recipes_switch_to_it(tmp_path: Path) -> None:
    recipe = copy_recipe(tmp_path / "tree", "librispeech")
    words = ["--dry_run", "true", "--stage", "3", "--stop_stage", "4", "--ngpu", "2", "--use_cache", "true"]
    done = run(recipe, *words, "--cmd", "slurm")
    assert done.returncode == 0, done.stderr
    beside = f"utils/slurm.py --config {tmp_path}/tree/egs/TEMPLATE/pam1/slurm.conf"
    assert f"{beside} --gpu 1 --max-jobs-run" in done.stdout  # decoding
    assert f"{beside} --gpu 2 exp/pam_clean100/log/cache.log" in done.stdout
    assert f"{beside} --gpu 2 exp/pam_clean100/log/warm_start.log" in done.stdout
    assert f"{beside} --gpu 2 exp/pam_clean100/log/train.log" in done.stdout
    several = run(recipe, *words, "--cmd", "slurm", "--num_nodes", "3").stdout
    for log in ("cache", "warm_start", "train"):
        assert f"{beside} --gpu 2 --num-nodes 3 exp/pam_clean100/log/{log}.log" in several
    assert several.count("--ngpu 2 --num_nodes 3") == 3 and "--ngpu 6 --fetch" in several
    local = run(recipe, *words, "--num_nodes", "3")
    assert local.returncode == 1 and "--num_nodes 3: this machine is one node" in local.stderr
    (recipe / "conf/slurm.conf").write_text(CONFIG.read_text())
    assert "utils/slurm.py --config conf/slurm.conf --gpu 1" in run(recipe, *words, PAM_CMD="slurm").stdout
    assert "utils/run.py --gpu 1 --max-jobs-run" in run(recipe, *words).stdout
    other = run(recipe, *words, "--cmd", "sge")
    assert other.returncode == 1 and "--cmd must be local or slurm" in other.stderr
    if shutil.which("sbatch") is None:
        none = run(recipe, "--stage", "3", "--cmd", "slurm")
        assert none.returncode == 1 and "sbatch not found on PATH" in none.stderr


@pytest.mark.services
def test_real_array_of_jobs(tmp_path: Path, cluster: dict[str, str]) -> None:
    check_array(tmp_path, cluster)


@pytest.mark.services
def test_real_cancel(tmp_path: Path, cluster: dict[str, str]) -> None:
    check_cancel(tmp_path, cluster)


@pytest.mark.services
def test_real_gpus(tmp_path: Path, cluster: dict[str, str]) -> None:
    """Slurm gives a job separate GPUs (here two devices that are none), whatever the submitting shell sees."""
    env = {**cluster, "CUDA_VISIBLE_DEVICES": "7"}
    echo = ["sh", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"']
    for gpus, seen in (("0", "[]"), ("1", "[0]"), ("2", "[0,1]")):
        done = slurm(tmp_path, env, "--gpu", gpus, "x.log", *echo)
        assert done.returncode == 0, done.stderr
        assert seen in (tmp_path / "x.log").read_text().splitlines()
    done = slurm(tmp_path, env, "--gpu", "3", "x.log", *echo)
    assert done.returncode == 1 and "sbatch refused the job" in done.stderr


@pytest.mark.services
def test_real_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    """A task on each, with GPUs of its own; one that fails ends the other."""
    echo = ["sh", "-c", 'echo "$SLURM_NODEID of $SLURM_STEP_NODELIST [$CUDA_VISIBLE_DEVICES]"']
    for gpus, seen in (("0", ""), ("2", "0,1")):
        done = slurm(tmp_path, cluster, "--num-nodes", "2", "--gpu", gpus, "x.log", *echo)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "x.log").read_text().splitlines()
        assert {f"{node} of 127.0.0.[1-2] [{seen}]" for node in (0, 1)} <= set(lines)
    failing = ["sh", "-c", "[ $SLURM_NODEID = 1 ] && exit 3; sleep 100"]
    done = slurm(tmp_path, cluster, "--num-nodes", "2", "x.log", *failing)
    assert done.returncode == 1 and "x.log (status" in done.stderr


@pytest.mark.services
def test_stages_3_and_4_as_real_jobs(
    tmp_path: Path, cluster: dict[str, str], mini_models: Path, tiny_llm_dir: Path
) -> None:
    subsets = {"train-clean-5": 3, "dev-clean-2": 1, "test-clean": 2, "test-other": 1}
    corpus = make_librispeech(tmp_path, subsets, utterances=2)
    recipe = copy_recipe(tmp_path / "tree", "librispeech")
    options = [*small(recipe, mini_models, tiny_llm_dir), "--librispeech", str(corpus), "--use_cache", "true"]
    options += ["--cmd", "slurm", "--test_sets", "test_clean", "--stop_stage", "4", "--num_nodes", "2"]
    options += ["--train_nj", "1"]
    done = run(recipe, *options, "--decode_nj", "2", **cluster)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for log, jobs in (("log/cache", 1), ("log/warm_start", 1), ("log/train", 1), ("decode_beam/log/decode", 2)):
        assert f"({jobs} runs): exp/small/{log}" in done.stderr
    assert len((recipe / "exp/small/decode_beam/test_clean/text").read_text().splitlines()) == 4
    assert "Estimate from the configuration" in done.stdout and "whisper" in done.stdout
    for log in ("warm_start", "train"):
        assert "on each of 2 processes" in (recipe / f"exp/small/log/{log}.log").read_text()
    assert "2 processes: " in (recipe / "exp/small/log/warm_start.log").read_text()
