"""Training that is killed, cut short by a full disk, or finds damaged step checkpoints ends as if nothing had been."""

import logging
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_config, train_args
from warm import warm_processes

from pam_espnet.config import write_config
from pam_espnet.errors import CheckpointError, ConfigError
from pam_espnet.fileio import read_trained

LORA = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}  # draws random numbers in every step
TRAINING: dict[str, Any] = {
    "optim": "adamw",
    "optim_conf": {"lr": 0.01},
    "scheduler": "warmuplr",
    "scheduler_conf": {"warmup_steps": 20},
    "max_epoch": 2,
    "num_iters_per_epoch": 9,
    "checkpoint_steps": 2,
    "batching_conf": {"max_utterances": 4, "pool": 2},
    "best_model_criterion": [["valid", "loss_answer", "min"]],
    "keep_nbest_models": 1,
    "log_interval": 3,
    "seed": 5,
}


class Stopped(BaseException):
    """Raised in the middle of a run, past every handler."""


def train(root: Path, llm: Path, output: Path, *options: str, stop_after: int | None = None, **changes: Any) -> Path:
    """Train into ``output``, which may hold a part of the run; stop after so many steps of this process."""
    from espnet2.train.reporter import SubReporter

    from pam_espnet.bin.pam_train import main

    config = {**tiny_config(llm), **TRAINING, **changes}
    config["llm_conf"] = {**config["llm_conf"], "lora": LORA}
    output.mkdir(parents=True, exist_ok=True)
    write_config(config, root / "train.yaml")
    (output / "key.json").unlink(missing_ok=True)  # it would refuse what the checkpoint is to refuse here
    steps, go_on = 0, SubReporter.next

    def counted(reporter: SubReporter) -> None:
        nonlocal steps
        go_on(reporter)
        steps += 1
        if steps == stop_after:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubReporter, "next", counted)
        arguments = [*train_args(root, root / "train.yaml", output), *options]
        if stop_after is None:
            assert main(arguments) == 0
        else:
            with pytest.raises(Stopped):
                main(arguments)
    return output


@pytest.fixture(scope="module")
def unbroken(data: Path, tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data, tiny_llm_dir, tmp_path_factory.mktemp("exp") / "unbroken", checkpoint_steps=0)


def assert_same(one: Path, other: Path) -> None:
    """The curve, the model, and what ESPnet would continue from: means of the epochs, unrounded, and optimizers."""
    assert (one / "curve.jsonl").read_bytes() == (other / "curve.jsonl").read_bytes()
    models = [read_trained(exp / "model.safetensors") for exp in (one, other)]
    assert set(models[0]) == set(models[1])
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    first, second = (torch.load(exp / "checkpoint.pth", weights_only=True) for exp in (one, other))
    for key in ("optimizers", "schedulers"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    means = [
        {
            (epoch, split, key): value
            for epoch, splits in states["reporter"]["stats"].items()
            for split, stats in splits.items()
            for key, value in stats.items()
            if not key.endswith("time") and not math.isnan(value)
        }
        for states in (first, second)
    ]
    assert means[0] == means[1] and len(means[0]) > 10
    assert not (one / "step_checkpoint").exists() and not (other / "step_checkpoint").exists()


def checkpoints(exp: Path) -> list[str]:
    return sorted(path.name for path in (exp / "step_checkpoint").iterdir())


# -- killed ----------------------------------------------------------------------------------------------------------


def killable(steps: Any, log: Path, arguments: tuple[Any, ...], changes: dict[str, Any]) -> None:
    """A training process that reports each step; what it prints goes to ``log``."""
    from espnet2.train.reporter import SubReporter

    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    go_on = SubReporter.next

    def reported(reporter: SubReporter) -> None:
        go_on(reporter)
        steps.send(reporter.key)

    SubReporter.next = reported  # type: ignore[method-assign]
    train(*arguments, **changes)


@pytest.fixture(scope="module")
def warm() -> Any:
    """Starts processes that have imported ESPnet."""
    return warm_processes()


def start(warm: Any, log: Path, *arguments: Any, **changes: Any) -> tuple[Any, Any]:
    """A training process and the connection on which it reports its steps."""
    receiver, sender = warm.Pipe(duplex=False)
    process = warm.Process(target=killable, args=(sender, log, arguments, changes))
    process.start()
    sender.close()
    return process, receiver


def follow(connection: Any, steps: int | None) -> int:
    """Wait for so many steps, or for the end; how many there were."""
    for step in range(sys.maxsize if steps is None else steps):
        try:
            connection.recv()
        except EOFError:
            return step
    assert steps is not None
    return steps


def finish(process: Any, connection: Any, log: Path) -> None:
    follow(connection, None)
    process.join(120)
    assert process.exitcode == 0, log.read_text()[-3000:]


@pytest.mark.slow  # another process imports ESPnet
def test_killed_at_random_moments(data: Path, tiny_llm_dir: Path, tmp_path: Path, warm: Any) -> None:
    """A moment: some steps after the process began to train, and some time more; in a step, in a checkpoint, in
    validation or between epochs."""
    changes = {"max_epoch": 3, "num_iters_per_epoch": 45, "checkpoint_steps": 3, "log_interval": 5}
    log = tmp_path / "log.txt"
    finish(*start(warm, log, data, tiny_llm_dir, tmp_path / "unbroken", **changes), log)
    draw = random.Random(0)
    exp = tmp_path / "killed"
    positions = set()
    for _ in range(8):
        process, connection = start(warm, log, data, tiny_llm_dir, exp, **changes)
        steps = draw.randrange(1, 9)
        assert follow(connection, steps) == steps, log.read_text()[-3000:]
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.join(60)
        assert process.exitcode == -9, log.read_text()[-3000:]
        positions.add(max((path.name for path in (exp / "step_checkpoint").glob("epoch*")), default=""))
    assert len(positions) > 4  # it got on between the kills
    finish(*start(warm, log, data, tiny_llm_dir, exp, **changes), log)
    assert_same(exp, tmp_path / "unbroken")


def ranks(warm: Any, log: Path, output: Path, *arguments: Any, **changes: Any) -> list[tuple[Any, Any]]:
    """Two training processes that share every batch (gloo)."""
    output.mkdir(exist_ok=True)
    (output / "init").unlink(missing_ok=True)
    shared = [
        "--dist_backend", "gloo", "--dist_init_method", f"file://{output}/init", "--dist_world_size", "2",
        "--multiprocessing_distributed", "false", "--dist_rank",
    ]  # fmt: skip
    return [start(warm, log, *arguments, output, *shared, str(rank), **changes) for rank in range(2)]


@pytest.mark.slow  # another process imports ESPnet
def test_two_processes_continue_in_the_middle_of_an_epoch(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, warm: Any
) -> None:
    log = tmp_path / "log.txt"
    shared = {"batching_conf": {"max_utterances": 2, "pool": 2}, "num_iters_per_epoch": 18}  # nine of two processes
    for process, connection in ranks(warm, log, tmp_path / "unbroken", data, tiny_llm_dir, **shared):
        finish(process, connection, log)
    exp = tmp_path / "killed"
    running = ranks(warm, log, exp, data, tiny_llm_dir, **shared)
    assert follow(running[0][1], 5) == 5
    for process, _ in running:
        process.kill()
        process.join(60)
    assert checkpoints(exp)[-1] == "epoch1_step4"
    for process, connection in ranks(warm, log, exp, data, tiny_llm_dir, **shared):
        finish(process, connection, log)
    assert "resumed epoch 1 at step" in log.read_text()
    assert_same(exp, tmp_path / "unbroken")


# -- resumed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_after", "options"),
    # Within an epoch, at its end, after a validation; with a process that loads ahead.
    [(5, ()), (9, ()), (9 + 2 + 7, ()), (5, ("--num_workers", "1"))],
)
def test_stopped_runs_end_alike(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, options: tuple[str, ...], stop_after: int
) -> None:
    exp = train(data, tiny_llm_dir, tmp_path / "exp", *options, stop_after=stop_after)
    epoch = 1 if stop_after <= 9 else 2
    kept = {5: ["step2", "step4"], 9: ["step6", "step8"]}.get(stop_after, ["step4", "step6"])
    assert checkpoints(exp) == [f"epoch{epoch}_{step}" for step in kept]
    assert_same(train(data, tiny_llm_dir, exp, *options), unbroken)


def test_the_curve_of_what_is_saved_is_on_disk(data: Path, tiny_llm_dir: Path, tmp_path: Path, unbroken: Path) -> None:
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=7, checkpoint_steps=3)
    whole = (unbroken / "curve.jsonl").read_text().splitlines()
    assert (exp / "curve.jsonl").read_text().splitlines() == whole[:2]


def test_skipped_batches_are_not_loaded(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pam_espnet.train.iterator import PaMPreprocessor

    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=7, max_epoch=1)
    loaded, load = 0, PaMPreprocessor.__call__

    def counted(self: PaMPreprocessor, uid: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
        nonlocal loaded
        loaded += "-train-" in uid
        return load(self, uid, values)

    monkeypatch.setattr(PaMPreprocessor, "__call__", counted)
    train(data, tiny_llm_dir, exp, max_epoch=1)
    assert 0 < loaded <= 3 * 4  # of nine batches, six were done


def test_checkpoints_are_made_after_whole_groups_of_batches(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """Gradients are not saved; nine batches in pairs leave one over at the end of each epoch."""
    conf = {"accum_grad": 2, "checkpoint_steps": 3}
    whole = train(data, tiny_llm_dir, tmp_path / "whole", **conf)
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=7, **conf)
    assert checkpoints(exp) == ["epoch1_step4"]
    train(data, tiny_llm_dir, exp, stop_after=2 + 3 + 2 + 5, **conf)  # two steps, ..., five of the second epoch
    assert checkpoints(exp) == ["epoch2_step4"]
    assert_same(train(data, tiny_llm_dir, exp, **conf), whole)


def test_a_run_that_stopped_in_validation_does_not_count_as_one_without_a_step(
    data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    """No batch is left in the epoch; ESPnet ends a training whose epoch had no valid step."""
    whole = train(data, tiny_llm_dir, tmp_path / "whole", checkpoint_steps=9)
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=10, checkpoint_steps=9)
    assert checkpoints(exp) == ["epoch1_step9"]
    assert_same(train(data, tiny_llm_dir, exp, checkpoint_steps=9), whole)


# -- damaged, stale, of something else -------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "training.pth", "position.json"])
@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, file: str, both: bool, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=5)
    for name in ["epoch1_step4", "epoch1_step2"][: 1 + both]:
        path = exp / "step_checkpoint" / name / file
        path.write_bytes(path.read_bytes()[:-20])
    train(data, tiny_llm_dir, exp)
    assert "epoch1_step4 is damaged" in caplog.text
    assert ("resumed epoch 1 at step 2 of 9" in caplog.text) is not both
    assert ("beginning the epoch again" in caplog.text) is both
    assert_same(exp, unbroken)


def test_half_made_files_of_killed_processes_are_removed(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=5)
    for name in (".epoch1_step6.tmp", ".epoch1_step2.removed"):
        shutil.copytree(exp / "step_checkpoint" / "epoch1_step4", exp / "step_checkpoint" / name)
    train(data, tiny_llm_dir, exp, stop_after=1)
    assert checkpoints(exp) == ["epoch1_step2", "epoch1_step4"]


@pytest.mark.parametrize("resume", ["true", "false"])
def test_checkpoints_of_another_epoch_or_run_are_not_used(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, resume: str, caplog: Any
) -> None:
    """Older than ESPnet's checkpoint of the epoch; or of a run that is begun again."""
    caplog.set_level(logging.INFO)
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=5)
    if resume == "true":
        stale = tmp_path / "stale"
        shutil.copytree(exp / "step_checkpoint", stale)
        train(data, tiny_llm_dir, exp, stop_after=5 + 2 + 2)  # the second epoch has no checkpoint yet
        shutil.copytree(stale, exp / "step_checkpoint", dirs_exist_ok=True)
        caplog.clear()
    train(data, tiny_llm_dir, exp, "--resume", resume)
    assert "resumed epoch" not in caplog.text
    assert_same(exp, unbroken)


def test_other_batches_are_an_error(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=5)
    with pytest.raises(CheckpointError, match=r"epoch1_step4: was made with other batches(.|\n)*remove .*step_check"):
        train(data, tiny_llm_dir, exp, batching_conf={"max_utterances": 3, "pool": 2})


@pytest.mark.parametrize("change", ["frontend", "optimizer"])
def test_another_configuration_is_an_error(data: Path, tiny_llm_dir: Path, tmp_path: Path, change: str) -> None:
    exp = train(data, tiny_llm_dir, tmp_path / "exp", stop_after=5)
    frontend = {**tiny_config(tiny_llm_dir)["frontend_conf"], "fusion": "concat"}
    changes = {"frontend": {"frontend_conf": frontend}, "optimizer": {"lr_scale_conf": {"decoder": 0.5}}}[change]
    with pytest.raises(CheckpointError, match="does not fit"):
        train(data, tiny_llm_dir, exp, **changes)


def test_a_negative_interval_is_an_error(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint_steps: -1"):
        train(data, tiny_llm_dir, tmp_path / "exp", checkpoint_steps=-1)


# -- the disk is full ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("only root may mount a file system")
    yield path
    subprocess.run(["umount", path], check=True)


def fill(disk: Path, spare: int) -> Path:
    """Leave ``spare`` bytes of a file system; the file that takes the others."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - spare))
    return filler


@pytest.mark.parametrize("spare", [0, 1 << 15, 1 << 17])  # nothing, or a part of a checkpoint
def test_full_disk_is_an_error_and_the_checkpoint_before_is_used(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, small_disk: Path, spare: int
) -> None:
    exp = train(data, tiny_llm_dir, small_disk / "exp", stop_after=5)
    filler = fill(small_disk, spare)
    with pytest.raises(CheckpointError, match=r"cannot be written(.|\n)*-> free disk space"):
        train(data, tiny_llm_dir, exp)
    assert checkpoints(exp) == ["epoch1_step2", "epoch1_step4"]
    filler.unlink()
    assert_same(train(data, tiny_llm_dir, exp), unbroken)


def limited(errors: Any, kilobytes: int, arguments: tuple[Any, ...], changes: dict[str, Any]) -> None:
    """A training process none of whose files may become larger; sends the error it ends with."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, 1024 * kilobytes))
    try:
        train(*arguments, **changes)
    except CheckpointError as error:
        errors.send(str(error))


@pytest.mark.slow  # another process imports ESPnet
@pytest.mark.parametrize("interval", [2, 0])  # a step checkpoint fails first, or ESPnet's file of the epoch
def test_files_that_may_not_grow(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, warm: Any, interval: int
) -> None:
    receiver, sender = warm.Pipe(duplex=False)
    exp = tmp_path / "exp"
    arguments = (data, tiny_llm_dir, exp)
    process = warm.Process(target=limited, args=(sender, 24, arguments, {"checkpoint_steps": interval}))
    process.start()
    sender.close()
    message = receiver.recv()
    process.join(60)
    where = exp / "step_checkpoint" / "epoch1_step2" if interval else exp
    assert message.startswith(f"{where}: cannot be written (")
    assert message.splitlines()[1].startswith("  -> free disk space")
    assert interval == 0 or checkpoints(exp) == []
    assert_same(train(*arguments), unbroken)
