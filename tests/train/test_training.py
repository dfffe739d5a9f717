"""Training through ESPnet's real trainer, on tiny models: data in, model.safetensors out, killed and resumed."""

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from read_only_disk import read_only
from tiny_model import tiny_config, train_args

from pam_espnet.config import load_yaml, write_config
from pam_espnet.data.audio_ark import locate
from pam_espnet.data.format import format_data_dir
from pam_espnet.errors import CheckpointError, ConfigError, DataError
from pam_espnet.fileio import read_trained

TRAINING = {
    "optim": "adamw",
    "optim_conf": {"lr": 0.01},
    "lr_scale_conf": {"decoder": 0.5},
    "max_epoch": 3,
    "num_iters_per_epoch": 4,
    "batching_conf": {"max_utterances": 4, "pool": 2},
    "best_model_criterion": [["valid", "loss_answer", "min"]],
    "keep_nbest_models": 2,
    "log_interval": 2,
    "seed": 5,
}


def run(root: Path, llm: Path, output: Path, features: Path | None = None, **changes: Any) -> Path:
    from pam_espnet.bin.pam_train import main

    config = {**tiny_config(llm), **TRAINING, **changes}
    output.mkdir(parents=True, exist_ok=True)
    write_config(config, output / "given.yaml")
    (output / "key.json").unlink(missing_ok=True)  # it would refuse the changes with which tests stop a run
    assert main(train_args(root, output / "given.yaml", output, features)) == 0
    return output


@pytest.fixture(scope="module")
def unbroken(data: Path, tiny_llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(data, tiny_llm_dir, tmp_path_factory.mktemp("exp") / "unbroken")


def curve(exp: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (exp / "curve.jsonl").read_text().splitlines()]


def test_training_writes_the_model_and_its_curve(unbroken: Path) -> None:
    state = read_trained(unbroken / "model.safetensors")
    assert any(name.startswith("decoder.") and "lora" in name for name in state)
    assert any(name.startswith("frontend.") for name in state)
    assert not any("embed_tokens" in name or "base_layer" in name for name in state)
    lines = curve(unbroken)
    assert [entry["step"] for entry in lines if entry["split"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in lines if entry["split"] == "valid"] == [4, 8, 12]
    assert all("loss_asr" in entry for entry in lines if entry["split"] == "valid")
    train = [entry["loss"] for entry in lines if entry["split"] == "train"]
    assert train[-1] < train[0]
    progress = (unbroken / "progress.txt").read_text()
    assert "12/12" in progress and " s of audio/s]" in progress


def same_model(one: Path, other: Path) -> bool:
    first, second = read_trained(one / "model.safetensors"), read_trained(other / "model.safetensors")
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("damage", ["none", "checkpoint", "epoch_file"])
def test_a_run_stopped_after_two_epochs_resumes_to_the_same_model(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, damage: str
) -> None:
    """Whole, with a half-written checkpoint (epoch 2 is repeated), or with a half-written epoch file."""
    exp = run(data, tiny_llm_dir, tmp_path / "exp", max_epoch=2)
    (exp / "model.safetensors").unlink()
    if damage != "none":
        path = exp / {"checkpoint": "checkpoint.pth", "epoch_file": "2epoch.pth"}[damage]
        path.write_bytes(path.read_bytes()[:1000])
    run(data, tiny_llm_dir, exp)
    assert same_model(exp, unbroken)
    assert curve(exp) == curve(unbroken)


def test_killed_while_the_first_checkpoint_was_written(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    exp = tmp_path / "exp"
    exp.mkdir()
    (exp / "checkpoint.pth").write_bytes((unbroken / "checkpoint.pth").read_bytes()[:1000])
    run(data, tiny_llm_dir, exp)
    assert same_model(exp, unbroken)


def test_init_trained_takes_a_whole_model_and_refuses_another(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    model = str(unbroken / "model.safetensors")
    exp = run(data, tiny_llm_dir, tmp_path / "exp", init_trained=model, max_epoch=1)
    assert curve(exp)[0]["loss"] < curve(unbroken)[0]["loss"]
    frontend = {**tiny_config(tiny_llm_dir)["frontend_conf"], "fusion": "concat"}
    with pytest.raises(CheckpointError, match="does not fit"):
        run(data, tiny_llm_dir, tmp_path / "other", init_trained=model, frontend_conf=frontend)


def test_damaged_beyond_repair_names_what_to_remove(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    exp = tmp_path / "exp"
    shutil.copytree(unbroken, exp, symlinks=True)
    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        (exp / name).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="remove"):
        run(data, tiny_llm_dir, exp, max_epoch=4)


def test_another_model_does_not_resume(unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    shutil.copytree(unbroken, exp, symlinks=True)
    frontend = {**tiny_config(tiny_llm_dir)["frontend_conf"], "fusion": "concat"}
    with pytest.raises(CheckpointError, match="does not fit"):
        run(data, tiny_llm_dir, exp, frontend_conf=frontend, max_epoch=4)


def test_cached_features_give_the_loss_of_waveforms(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    from pam_espnet.bin.pam_cache_features import main as cache_features

    exp = tmp_path / "exp"
    exp.mkdir()
    write_config({**tiny_config(tiny_llm_dir), **TRAINING}, exp / "given.yaml")
    features = train_args(data, exp / "given.yaml", exp, tmp_path / "feats")
    features = [word for word in features if word not in ("--num_workers", "0")]
    with pytest.raises(ConfigError, match="make it with pam_cache_features"):
        run(data, tiny_llm_dir, exp, tmp_path / "feats")
    assert cache_features(features) == 0
    run(data, tiny_llm_dir, exp, tmp_path / "feats")
    assert set(load_yaml(exp / "config.yaml")["frontend_conf"]["specs"]) == {"one", "two"}
    for live, cached in zip(curve(unbroken), curve(exp), strict=True):
        assert cached["loss"] == pytest.approx(live["loss"], abs=2e-4)


@pytest.mark.parametrize("fusion", ["single", "average", "concat", "static"])
def test_every_fusion_trains(data: Path, tiny_llm_dir: Path, tmp_path: Path, fusion: str) -> None:
    frontend = tiny_config(tiny_llm_dir, fusion=fusion)["frontend_conf"]
    exp = run(data, tiny_llm_dir, tmp_path / fusion, frontend_conf=frontend, max_epoch=1)
    assert (exp / "model.safetensors").exists()


def test_learning_rate_scales_must_match_something(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_part"):
        run(data, tiny_llm_dir, tmp_path / "exp", lr_scale_conf={"no_such_part": 2.0})


def test_warm_start_then_training(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    from pam_espnet.bin.pam_warm_start import main as warm_start

    exp = tmp_path / "exp"
    exp.mkdir()
    config = {
        **tiny_config(tiny_llm_dir, ctc_tokens=str(exp / "ctc_tokens.txt"), ctc_weight=0.1),
        **TRAINING,
        "max_epoch": 1,
        "warm_start_conf": {"steps": 12, "save_every": 3, "report_every": 4},
    }
    config["llm_conf"]["shard"] = "node"  # one process: blocks are streamed here, whole in training
    write_config(config, exp / "given.yaml")
    args = train_args(data, exp / "given.yaml", exp)
    assert warm_start(args) == 0
    lines = [json.loads(line) for line in (exp / "warm_start.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 12] and lines[2]["loss"] < lines[0]["loss"]
    assert lines[3]["valid_token_error_rate_asr"] >= 0
    warm = read_trained(exp / "warm_start.safetensors")
    assert {name.split(".")[0] for name in warm} == {"frontend", "ctc"}
    # Its losses do not depend on the length of the embeddings; a gradient that is rounding alone must not set it.
    assert float(warm["frontend.gain"]) == pytest.approx(0.1)
    assert warm_start(args) == 0  # already there

    from pam_espnet.bin.pam_train import main as train

    assert train([*args, "--init_trained", str(exp / "warm_start.safetensors")]) == 0
    trained = read_trained(exp / "model.safetensors")
    assert trained["ctc.blank"].shape == warm["ctc.blank"].shape
    assert all("loss_ctc" in entry for entry in curve(exp))


def test_a_supervised_router_stays_as_it_was_fitted(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pam_espnet.bin.pam_warm_start import main as warm_start
    from pam_espnet.train import warm_fit as module

    fit_router, fitted = module.fit_router, {}

    def noted(model: Any, *more: Any) -> float:
        loss = fit_router(model, *more)
        fitted.update({name: value.clone() for name, value in model.frontend.fusion.router.state_dict().items()})
        return loss

    monkeypatch.setattr(module, "fit_router", noted)
    config = {
        **tiny_config(tiny_llm_dir, ctc_tokens=str(tmp_path / "ctc_tokens.txt"), ctc_weight=0.1),
        **TRAINING,
        "warm_start_conf": {"steps": 6, "lr": 0.1},
    }
    config["frontend_conf"]["fusion_conf"]["gradient"] = "straight_through"
    config["model_conf"]["router_loss_weight"] = 0.1
    write_config(config, tmp_path / "given.yaml")
    assert warm_start(train_args(data, tmp_path / "given.yaml", tmp_path)) == 0
    warm = read_trained(tmp_path / "warm_start.safetensors")
    assert fitted and all(torch.equal(warm[f"frontend.fusion.router.{name}"], fitted[name]) for name in fitted)


def test_the_warm_start_has_shares_of_its_own(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pam_espnet.bin.pam_warm_start import main as warm_start
    from pam_espnet.train import warm_fit as module

    seen: Counter[str] = Counter()
    step = module._step

    def counted(model: Any, batch: Any, *more: Any) -> Any:
        seen.update(model.tasks[task] for task in batch["task"])
        return step(model, batch, *more)

    monkeypatch.setattr(module, "_step", counted)
    config = {
        **tiny_config(tiny_llm_dir, ctc_tokens=str(tmp_path / "ctc_tokens.txt"), ctc_weight=0.1),
        **TRAINING,
        "warm_start_conf": {
            "steps": 24, "losses": {"asr": "ctc", "count": "bag", "caption": "bag"}, "max_utterances": 4,
            "task_share": {"count": 0, "caption": 3},
        },
    }  # fmt: skip
    write_config(config, tmp_path / "given.yaml")
    assert warm_start(train_args(data, tmp_path / "given.yaml", tmp_path)) == 0
    assert seen["count"] == 0 and seen["caption"] > 2 * seen["asr"] > 0


def test_held_out_mixture_gets_no_training_gradients(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """One step on the training set moves everything but the mixture, one on the validation set the mixture alone."""
    from pam_espnet.model import build_model
    from pam_espnet.train import warm_fit

    tokens = tmp_path / "ctc_tokens.txt"
    tokens.write_text("".join(f"{token}\n" for token in range(3, 60)))
    torch.manual_seed(0)
    model = build_model(tiny_config(tiny_llm_dir, ctc_tokens=str(tokens), ctc_weight=0.1)).train()
    model.decoder.requires_grad_(False)
    mixture = model.frontend.fusion.mixture_parameters()
    assert [tuple(parameter.shape) for parameter in mixture] == [tuple(model.frontend.fusion.layer_logits.shape)]
    rest = [p for p in model.parameters() if p.requires_grad and p is not mixture[0]]
    optimizer = torch.optim.AdamW([*rest, *mixture], lr=0.01, weight_decay=0.1)
    batch = {
        "prompt": ["Hi", "Ho"],
        "num_samples": [16000, 12000],
        "speech": torch.randn(2, 16000),
        "text": [[5, 7, 2], [9, 2]],
        "task": [0, 1],
    }
    for moving, still in ((rest, mixture), (mixture, rest)):
        before = [p.detach().clone() for p in still], [p.detach().clone() for p in moving]
        loss_of = partial(warm_fit.warm_loss, losses={"asr": "ctc", "count": "bag"})
        _, count, skipped = warm_fit._step(model, batch, loss_of, None, optimizer, moving)
        assert (count, skipped) == (3, 0)
        assert all(torch.equal(p, old) for p, old in zip(still, before[0], strict=True))
        assert any(not torch.equal(p, old) for p, old in zip(moving, before[1], strict=True))


def test_warm_start_with_held_out_mixture_resumes_to_the_same_weights(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pam_espnet.bin.pam_warm_start import main as warm_start
    from pam_espnet.train import warm_fit as module

    def start(name: str) -> Path:
        exp = tmp_path / name
        exp.mkdir(exist_ok=True)
        config = {
            **tiny_config(tiny_llm_dir, ctc_tokens=str(tmp_path / "ctc_tokens.txt"), ctc_weight=0.1),
            **TRAINING,
            "warm_start_conf": {
                "steps": 16, "single_steps": 6, "save_every": 2, "held_out_every": 2,
                "losses": {"asr": "ctc", "count": "bag", "caption": "bag"}, "max_utterances": 4,
            },
        }  # fmt: skip
        write_config(config, exp / "given.yaml")
        assert warm_start(train_args(data, exp / "given.yaml", exp)) == 0
        return exp / "warm_start.safetensors"

    whole = read_trained(start("whole"))
    step, calls = module._step, 0

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(module, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        start("broken")
    assert (tmp_path / "broken" / "warm_start.pth").exists()
    monkeypatch.setattr(module, "_step", step)
    begun = torch.load(tmp_path / "broken" / "warm_start.pth", weights_only=True)
    (tmp_path / "older").mkdir()
    one_temperature, more = copy.deepcopy(begun), copy.deepcopy(begun)
    one_temperature["model"]["ctc.log_temperature"] = torch.tensor(-3.0)
    for moments in one_temperature["optimizer"]["state"].values():
        if moments["exp_avg"].shape == begun["model"]["ctc.log_temperature"].shape:
            moments["exp_avg"] = moments["exp_avg_sq"] = torch.tensor(0.1)
    more["optimizer"]["param_groups"][0]["params"].append(10**6)  # as by a version that trained more
    for older in (one_temperature, more):
        torch.save(older, tmp_path / "older" / "warm_start.pth")
        with pytest.raises(CheckpointError, match=r"older.warm_start.pth: fits other parameters"):
            start("older")
    resumed = read_trained(start("broken"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- what a machine or an option does to it --------------------------------------------------------------------------


def test_diverged_training_ends_with_an_error_and_no_model(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    message = r"diverged in epoch 2 of 3: no finite gradient since step 1 of 4; loss .*, learning rate 1e\+08\n.*lower"
    with pytest.raises(ConfigError, match=message):
        run(data, tiny_llm_dir, exp, optim_conf={"lr": 1e8}, lr_scale_conf={})
    assert not (exp / "model.safetensors").exists() and not (exp / "2epoch.pth").exists()


def test_a_long_epoch_ends_as_soon_as_training_has_diverged(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pam_espnet.train import trainer

    monkeypatch.setattr(trainer, "_PATIENCE", 3)
    with pytest.raises(ConfigError, match=r"epoch 1 of 3: no finite gradient since step 2 of 40"):
        run(data, tiny_llm_dir, tmp_path / "exp", optim_conf={"lr": 1e8}, lr_scale_conf={}, num_iters_per_epoch=40)
    assert "4/120" in (tmp_path / "exp/progress.txt").read_text()


def test_more_accumulated_batches_than_an_epoch_has(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accum_grad: 5, but an epoch has 4 batches"):
        run(data, tiny_llm_dir, tmp_path / "exp", accum_grad=5)


def test_a_criterion_that_is_no_figure(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation has no 'loss_anser'; it has .*loss_answer"):
        run(data, tiny_llm_dir, tmp_path / "exp", best_model_criterion=[["valid", "loss_anser", "min"]])
    assert not (tmp_path / "exp/2epoch.pth").exists()


def test_tensors_that_are_not_finite_are_no_model(unbroken: Path, tmp_path: Path) -> None:
    from pam_espnet.train.export import export_state

    state = torch.load(unbroken / "3epoch.pth", weights_only=True)
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "1epoch.pth")
    with pytest.raises(CheckpointError, match="1 tensors are not finite"):
        export_state(tmp_path / "1epoch.pth", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_diverged_warm_start_is_none(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    from pam_espnet.bin.pam_warm_start import main as warm_start

    exp = tmp_path / "exp"
    exp.mkdir()
    config = {
        **tiny_config(tiny_llm_dir, ctc_tokens=str(exp / "ctc_tokens.txt"), ctc_weight=0.1),
        **TRAINING,
        "warm_start_conf": {"steps": 12, "save_every": 3, "lr": 1e30},
    }
    write_config(config, exp / "given.yaml")
    with pytest.raises(ConfigError, match=r"diverged at step \d+ of 12: loss (nan|inf).*\n.*lower warm_start_conf.lr"):
        warm_start(train_args(data, exp / "given.yaml", exp))
    assert not (exp / "warm_start.safetensors").exists()


def test_a_warm_start_that_learned_nothing_says_so(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CTC's answer is nothing but blanks, as after a jump that left all losses finite."""
    from pam_espnet.bin.pam_warm_start import main as warm_start
    from pam_espnet.train import warm_fit as module

    monkeypatch.setattr(module, "token_errors", lambda *_: {"asr": (5, 5)})
    config = {
        **tiny_config(tiny_llm_dir, ctc_tokens=str(tmp_path / "ctc_tokens.txt"), ctc_weight=0.1),
        **TRAINING,
        "warm_start_conf": {"steps": 1},
    }
    write_config(config, tmp_path / "given.yaml")
    assert warm_start(train_args(data, tmp_path / "given.yaml", tmp_path)) == 0
    assert "learned nothing of asr: every token on the validation set is wrong\n  -> are 1 steps enough" in caplog.text


def test_a_warm_start_that_diverges_in_its_last_step_is_none(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later loss shows it."""
    from pam_espnet.bin.pam_warm_start import main as warm_start

    def infinite(parameters: Any, norm: float) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(float("inf"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", infinite)
    config = {
        **tiny_config(tiny_llm_dir, ctc_tokens=str(tmp_path / "ctc_tokens.txt"), ctc_weight=0.1),
        **TRAINING,
        "warm_start_conf": {"steps": 1},
    }
    write_config(config, tmp_path / "given.yaml")
    with pytest.raises(ConfigError, match=r"diverged at step 1 of 1: loss .*\n.*a lower warm_start_conf.lr than 0.002"):
        warm_start(train_args(data, tmp_path / "given.yaml", tmp_path))
    assert not (tmp_path / "warm_start.safetensors").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_archives_train_what_files_train(
    unbroken: Path, data: Path, tiny_llm_dir: Path, tmp_path: Path, workers: int
) -> None:
    from pam_espnet.bin.pam_train import main

    for name in ("train", "dev"):
        format_data_dir(data / "data" / name, tmp_path / "dump" / name, archive_mb=0.1)
    assert len(list((tmp_path / "dump/train").glob("*.ark"))) > 1
    write_config({**tiny_config(tiny_llm_dir), **TRAINING}, tmp_path / "given.yaml")
    words = [*train_args(tmp_path, tmp_path / "given.yaml", tmp_path / "exp"), "--num_workers", str(workers)]
    assert main(words) == 0
    assert same_model(unbroken, tmp_path / "exp")
    losses = [[(e["split"], e["step"], e["loss"]) for e in curve(exp)] for exp in (unbroken, tmp_path / "exp")]
    assert losses[0] == losses[1]
    # either goes on with the other
    assert (tmp_path / "exp/key.json").read_text() == (unbroken / "key.json").read_text()

    scp = tmp_path / "dump/train/wav.scp"
    value = scp.read_text().splitlines()[0].split()[1]
    archive, offset = locate(value)
    content = bytearray(Path(archive).read_bytes())
    content[offset : offset + 5] = b"WRONG"
    Path(archive).write_bytes(content)
    shutil.rmtree(tmp_path / "exp")
    with pytest.raises(DataError, match=f"^{scp}:1: {value}: the archive was cut or the offset(.|\n)*run stage 2"):
        main(words)
    Path(archive).write_bytes(content[:-1])
    shutil.rmtree(tmp_path / "exp")
    with pytest.raises(DataError, match=rf"^{scp}:\d+: {archive}:\d+: the archive was cut: it has"):
        main([*words, "--max_epoch", "0"])  # before the first step


@pytest.mark.slow  # another process imports ESPnet
@pytest.mark.parametrize("workers", [2, 0])
def test_little_shared_memory(data: Path, tiny_llm_dir: Path, tmp_path: Path, workers: int) -> None:
    """64 kB of it: workers end training with words, and without workers it needs none."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    write_config({**tiny_config(tiny_llm_dir), **TRAINING, "max_epoch": 1}, tmp_path / "given.yaml")
    words = [*train_args(data, tmp_path / "given.yaml", tmp_path / "exp"), "--num_workers", str(workers)]
    command = shlex.join([sys.executable, "-m", "pam_espnet.bin.pam_train", *words])
    script = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {command}"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests/kit'}"}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == (1 if workers else 0), done.stderr[-3000:]
    assert ("--shm-size 8g), or train without workers: --set num_workers=0" in done.stderr) is bool(workers)
    assert (tmp_path / "exp/model.safetensors").exists() is not bool(workers)


def test_a_read_only_disk_is_named(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pam_espnet.bin.pam_train import main
    from pam_espnet.cli import run_main

    write_config({**tiny_config(tiny_llm_dir), **TRAINING}, tmp_path / "given.yaml")
    with read_only(tmp_path / "disk") as disk:
        assert run_main(main, train_args(data, tmp_path / "given.yaml", disk / "exp")) == 1
    message = capsys.readouterr().err
    assert f"error: {disk}/exp" in message and "choose a folder that can be written" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(("every", "advice"), [(0, "=2,"), (7, "=3,"), (2, "=true,"), (1, "max_seconds")])
def test_a_step_that_does_not_fit_says_what_to_set(
    data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, advice: str
) -> None:
    from pam_espnet.bin.pam_train import main
    from pam_espnet.llm.llm import LLM

    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LLM, "token_losses", too_much)
    config = {**tiny_config(tiny_llm_dir), **TRAINING}
    config["llm_conf"]["gradient_checkpointing"] = every
    write_config(config, tmp_path / "given.yaml")
    with pytest.raises(ConfigError, match=f"too small for a step: CUDA out of memory.\n.*{advice}"):
        main(train_args(data, tmp_path / "given.yaml", tmp_path / "exp"))
