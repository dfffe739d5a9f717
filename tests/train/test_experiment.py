"""An experiment: its merged configuration, what is found before anything is computed, what it may be continued with."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_config, train_args, write_data

from pam_espnet.bin import pam_cache_features, pam_estimate, pam_train, pam_warm_start
from pam_espnet.config import load_yaml, write_config
from pam_espnet.data.tables import read_table, write_table
from pam_espnet.errors import ConfigError, DataError
from pam_espnet.train.experiment import Experiment, check_config, experiment_parser, merged_config
from pam_espnet.train.scaling import scaled


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root, "train", size=1)
    write_data(root, "dev", size=1, seed=1)
    return root


def test_the_same_again_is_fine_and_anything_else_is_named(tiny_llm_dir: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, "train", size=1)
    config = {**tiny_config(tiny_llm_dir), "optim_conf": {"lr": 0.1}, "max_epoch": 3, "resources": {"disk_gb": 1}}

    def begin(name: str, **changes: Any) -> None:
        Experiment(tmp_path / name, data, data, None, {**config, **changes}).begin()

    begin("exp")
    begin("exp", resources={"disk_gb": 9})
    with pytest.raises(DataError, match=r"optim_conf\.lr.*\n.*--tag"):
        begin("exp", optim_conf={"lr": 0.2})
    with pytest.raises(DataError, match="max_epoch"):
        begin("exp", max_epoch=4)
    wordings = tmp_path / "asr.txt"
    asked = {"prompt_files": {"asr": str(wordings)}}
    with pytest.raises(DataError, match="no such prompt file"):
        begin("asked", **asked)
    wordings.write_text("Transcribe the speech.\n")
    begin("asked", **asked)
    wordings.write_text("Write the words down.\n")
    with pytest.raises(DataError, match=r"prompt_files_sha256\.asr"):
        begin("asked", **asked)
    text = read_table(data / "text")
    write_table(data / "text", {**text, next(iter(text)): "something else"})
    with pytest.raises(DataError, match=r"data\.train\.tables"):
        begin("exp")


def test_limits_of_an_older_version_stay_global(data: Path, tiny_llm_dir: Path, tmp_path: Path) -> None:
    """Its key.json, or ESPnet's config.yaml of version 0.1, knows no limits per GPU; any number of processes do."""
    given = {**tiny_config(tiny_llm_dir), "batching_conf": {"pool": 2}}
    write_config(given, tmp_path / "given.yaml")

    def experiment(name: str, *changes: str) -> Experiment:
        words = train_args(data, tmp_path / "given.yaml", tmp_path / name)
        words = [word for word in words if word not in ("--num_workers", "0")]
        return Experiment.of(experiment_parser("").parse_args([*words, "--set", *changes]))

    new = experiment("new")
    assert new.config["batching_conf"] == {"limits": "per_gpu", "pool": 2}
    new.begin(2)
    with pytest.raises(DataError, match=r"processes.json.*\(changed: processes\)\n.*as many processes as before"):
        experiment("new").begin(4)
    with pytest.raises(DataError, match=r"batching_conf\.limits"):
        experiment("new", "batching_conf.limits=global").begin(2)

    Experiment(tmp_path / "old", data / "dump/train", data / "dump/dev", None, given).begin()
    (tmp_path / "older").mkdir()
    write_config(given, tmp_path / "older/config.yaml")
    Experiment(tmp_path / "bare", data / "dump/train", data / "dump/dev", None, tiny_config(tiny_llm_dir)).begin()
    write_config(tiny_config(tiny_llm_dir), tmp_path / "given.yaml")
    assert experiment("bare").config["batching_conf"] == {"limits": "global"}
    experiment("bare").begin(4)
    write_config(given, tmp_path / "given.yaml")
    for name in ("old", "older"):
        for processes in (1, 4):
            experiment(name).begin(processes)
            assert experiment(name).config["batching_conf"] == {"limits": "global", "pool": 2}
        with pytest.raises(DataError, match=r"batching_conf\.limits"):
            experiment(name, "batching_conf.limits=per_gpu").begin(4)
    experiment("all", "batching_conf.limits=global").begin(2)
    experiment("all", "batching_conf.limits=global").begin(3)


@pytest.mark.parametrize(
    ("optim", "rule", "rate"),
    [
        ("adamw", "auto", 0.2),
        ("sgd", "auto", 0.4),
        ("sgd", "sqrt", 0.2),
        ("adam", "linear", 0.4),
        ("adam", "none", 0.1),
    ],
)
def test_steps_and_learning_rate_follow_the_number_of_processes(optim: str, rule: str, rate: float) -> None:
    config = {
        "optim": optim, "lr_scaling": rule, "optim_conf": {"lr": 0.1, "weight_decay": 0.01}, "num_iters_per_epoch": 10,
        "scheduler_conf": {"warmup_steps": 500, "model_size": 100}, "max_epoch": 3,
    }  # fmt: skip
    assert scaled(config, 4) == {
        "num_iters_per_epoch": 3,
        "scheduler_conf": {"warmup_steps": 125, "model_size": 100},
        "optim_conf": {"lr": pytest.approx(rate), "weight_decay": 0.01},
    }
    assert scaled(config, 1) == {} and scaled({**config, "batching_conf": {"limits": "global"}}, 4) == {}


def test_an_encoder_alone_is_what_its_own_file_was(tmp_path: Path) -> None:
    """The configuration of ``single:two`` is the one that version 0.1 had in conf/fusion/single_two.yaml."""
    write_config({"frontend_conf": {"encoders": {"one": {"a": 1}, "two": {"b": 2}}}}, tmp_path / "train.yaml")
    write_config({"frontend_conf": {"fusion": "single"}}, tmp_path / "single.yaml")
    files = [tmp_path / "train.yaml", tmp_path / "single.yaml"]
    alone = merged_config(files, ["frontend_conf.fusion_conf.encoder=two"])
    assert alone == {"frontend_conf": {"encoders": {"two": {"b": 2}}, "fusion": "single"}}
    with pytest.raises(ConfigError, match=r"single:three: no such encoder; .* has one, two"):
        merged_config(files, ["frontend_conf.fusion_conf.encoder=three"])


def put(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *outer, last = key.split("/")
    for part in outer:
        config = config.setdefault(part, {})
    config[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_epochs", 3, "'max_epochs': nothing reads it; did you mean 'max_epoch'"),
        ("llm", "downloads/models/none", "stage 1"),
        ("llm_conf/lorra", {}, "lorra"),
        ("llm_conf/lora/target_modules", ["q_proj", "v_porj"], "no module 'v_porj'; its linear layers are .*v_proj"),
        ("llm_conf/lora/r", 0, "lora.r: 0"),
        ("llm_conf/lora/dropout", 1.5, "lora.dropout: 1.5"),
        ("llm_conf/lora/alpha", "32", "lora.alpha: '32'"),
        ("frontend_conf/encoders/two/path", "downloads/none/here", "no model folder downloads/none/here"),
        ("frontend_conf/encoders/two/type", "whispper", "unknown encoder 'whispper'"),
        ("frontend_conf/encoders/two/layerz", [1], "encoders.two: .*layerz"),
        ("frontend_conf/encoder_dtype", "float16", "encoder_dtype: 'float16'; choose auto"),
        ("frontend_conf/encoder_dtype", "bfloat16", "TinyEncoder computes in float32 only"),
        ("frontend_conf/fusion", "pan", "unknown 'pan'"),
        ("frontend_conf/mask_conf", {"spam": 1}, "mask_conf.*spam"),
        ("model_conf/exit_wait", 1, "exit_wait"),
        ("model_conf", 3, "'model_conf': must be a mapping"),
        ("optim", "adamww", "optim: unknown 'adamww'; one of .*, adamw,"),
        ("scheduler", "warmuplrr", "scheduler: unknown 'warmuplrr'; one of .*, warmuplr"),
        ("batching_conf/task_share", {"asrr": 0.5}, "unknown task 'asrr'"),
        ("batching_conf", {"size": 4}, "batching_conf.*size"),
        ("lr_scaling", "root", "lr_scaling: 'root'; choose auto, none, sqrt, linear"),
        ("warm_start_conf", {"steps": 0}, "warm_start_conf"),
        ("warm_start_conf/task_share", {"asrr": 2}, "unknown task 'asrr'"),
        ("warm_start_conf/task_share", {"asr": -1}, "warm_start_conf.task_share.asr"),
    ],
)
def test_what_would_end_training_later_is_found_first(tiny_llm_dir: Path, key: str, value: Any, message: str) -> None:
    config = tiny_config(tiny_llm_dir)
    check_config(config)
    put(config, key, value)
    with pytest.raises(ConfigError, match=message):
        check_config(config)


@pytest.mark.parametrize("command", [pam_estimate, pam_cache_features, pam_warm_start, pam_train])
def test_every_command_checks_before_it_computes(
    command: Any, data: Path, tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_llm_dir)
    config["llm_conf"]["lora"]["target_modules"] = ["q_proj", "v_porj"]
    write_config(config, tmp_path / "given.yaml")
    words = train_args(data, tmp_path / "given.yaml", tmp_path / "exp", tmp_path / "feats")
    words = [word for word in words if word not in ("--num_workers", "0")]
    with pytest.raises(ConfigError, match="v_porj"):
        command.main(words)
    assert not (tmp_path / "feats").exists() and not list((tmp_path / "exp").glob("[!.]*"))


def test_changes_reach_espnet_and_another_learning_rate_is_refused(
    data: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    write_config({**tiny_config(tiny_llm_dir), "optim": "sgd"}, tmp_path / "given.yaml")
    best = "best_model_criterion=[[valid,loss_answer,min]]"
    words = [*train_args(data, tmp_path / "given.yaml", tmp_path / "exp"), "--set", best, "max_epoch=1"]
    assert pam_train.main([*words, "optim_conf.lr=0.1", "--log_interval", "7"]) == 0
    config = load_yaml(tmp_path / "exp/config.yaml")
    assert (config["max_epoch"], config["log_interval"], config["optim_conf"]["lr"]) == (1, 7, 0.1)
    before = (tmp_path / "exp/train.yaml").read_bytes()
    with pytest.raises(DataError, match=r"changed: config\.optim_conf\.lr"):
        pam_train.main([*words, "optim_conf.lr=0.2"])
    assert (tmp_path / "exp/train.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["pam_train", "pam_warm_start", "pam_cache_features", "pam_estimate"])
def test_help_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import sys\nfrom pam_espnet.bin.{name} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'espnet2', 'transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--train DIR" in done.stdout and "--set" in done.stdout


@pytest.mark.parametrize(("steps", "accum", "said"), [(40, 1, False), (20, 2, False), (30, 1, True)])
def test_a_schedule_of_another_length_is_said(
    tiny_llm_dir: Path, caplog: pytest.LogCaptureFixture, steps: int, accum: int, said: bool
) -> None:
    schedule = {"scheduler": "tristagelr", "scheduler_conf": {"max_steps": steps}, "accum_grad": accum}
    check_config({**tiny_config(tiny_llm_dir), **schedule, "max_epoch": 4, "num_iters_per_epoch": 10})
    assert ("scheduler_conf.max_steps is 30, but the training has 40 steps" in caplog.text) == said
