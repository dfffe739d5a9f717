"""What a person with a GPU runs works, as far as a CPU can tell: every test passes, every section has its rows."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.services
def test_tests_and_benchmark_run(repo_root: Path, tmp_path: Path) -> None:
    """With tiny models; no number is asserted."""
    command = ["tests/gpu/run.sh", "--tiny", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    record = json.loads((tmp_path / "out/gpu.json").read_text())
    assert record["errors"] == [] and record["left_out"] == []
    assert {test["outcome"] for test in record["test_results"]} == {"passed", "skipped"}
    tables = {row["what"] for row in record["rows"]}
    assert tables >= {"search", "invariance", "prefix", "peak memory", "options", "early exit", "recordings"}
    ways = {row["way"] for row in record["rows"] if row["what"] == "search"}
    assert ways >= {"graphs", "graphs, any products", "eager", "generate", "generate, static"}
    assert "dry run" in record["card"] and "**search**" in (tmp_path / "out/gpu.md").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sekunden", "5"], "unknown option '--sekunden'"),
        (["--seconds", "soon"], "whole seconds, not 'soon'"),
        (["--site", "absent.tar.gz"], "tools/pack_gpu_site.py"),
        (["--output"], "needs a value"),
        ([], "no CUDA GPU"),
    ],
)
def test_what_is_wrong_is_named(repo_root: Path, tmp_path: Path, args: list[str], message: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = ["tests/gpu/run.sh", *args]
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr, done.stderr
