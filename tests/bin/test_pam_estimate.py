"""The estimate's command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from tiny_model import tiny_config, write_data


def call(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pam_espnet.bin.pam_estimate", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_it_reads_a_configuration_and_data_and_waits_for_no_hub(
    repo_root: Path, tiny_llm_dir: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_llm_dir)
    config["frontend_conf"]["encoders"] = {"far": {"type": "whisper", "path": "nobody/never-fetched"}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**config, "max_epoch": 1}))
    data = write_data(tmp_path, "train")
    done = call(repo_root, "--config", str(tmp_path / "model.yaml"), "--set", "max_epoch=2", "--data", str(data))
    assert done.returncode == 0, done.stderr
    assert "unknown: encoder far: nobody/never-fetched" in done.stdout
    assert "LoRA" in done.stdout and "assumed 0.05 TFLOP/s" in done.stdout
    assert "Retrying" not in done.stderr


def test_mistakes(repo_root: Path, tmp_path: Path) -> None:
    done = call(repo_root, "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 1 and "none.yaml: no such configuration file" in done.stderr
