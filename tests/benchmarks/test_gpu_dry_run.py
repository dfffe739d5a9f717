"""What a person with a GPU runs works, as far as a CPU can tell: every test passes, every section has its rows."""

import json
import os
import subprocess
from pathlib import Path

import pytest


def dry_run(repo_root: Path, output: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = ["tests/gpu/run.sh", "--tiny", "--output", str(output), *args]
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done


@pytest.mark.services
def test_tests_and_benchmark_run(repo_root: Path, tmp_path: Path) -> None:
    """With tiny models; no number is asserted."""
    dry_run(repo_root, tmp_path / "out")
    record = json.loads((tmp_path / "out/gpu.json").read_text())
    assert record["errors"] == [] and record["left_out"] == []
    assert {test["outcome"] for test in record["test_results"]} == {"passed", "skipped"}
    tables = {row["what"] for row in record["rows"]}
    assert tables >= {"search", "invariance", "prefix", "peak memory", "options", "early exit", "recordings"}
    ways = {row["way"] for row in record["rows"] if row["what"] == "search"}
    assert ways >= {"graphs", "graphs, any products", "eager", "generate", "generate, static"}
    assert "dry run" in record["card"] and "**search**" in (tmp_path / "out/gpu.md").read_text()


@pytest.mark.slow
def test_benchmark_of_training_runs(repo_root: Path, tmp_path: Path) -> None:
    """Every way of a step, what its parts take, and the same loss whatever the way."""
    dry_run(repo_root, tmp_path / "out", "--training")
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert record["errors"] == [] and record["left_out"] == [] and "dry run" in record["card"]
    tables = {what: [row for row in record["rows"] if row["what"] == what] for what in ("step", "parts, ms")}
    ways = [row["way"] for row in tables["step"]]
    assert ways == [row["way"] for row in tables["parts, ms"]] and len(ways) == 9
    assert ways[:2] == ["now", "as in version 0.2"]
    first, *others = (row["loss"] for row in tables["step"])
    assert others == pytest.approx([first] * len(others), abs=1e-3)
    assert all(row["over_version_0_2"] > 0 and row["audio_s_per_s"] > 0 for row in tables["step"])
    for row in tables["parts, ms"]:
        parts = {name: ms for name, ms in row.items() if name not in ("what", "way", "at_s", "whole")}
        assert sum(parts.values()) == pytest.approx(row["whole"]) and min(parts.values()) > 0
    assert "**parts, ms**" in (tmp_path / "out/training.md").read_text()


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
