"""The frame of the GPU benchmark: what fails or is late is recorded, the rest goes on; ratios and tables."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu_rows import Rows, read_tests


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows]:
    before = signal.getsignal(signal.SIGALRM)
    yield Rows(tmp_path / "out/gpu.json", 60.0, "", {"card": "none"})
    signal.signal(signal.SIGALRM, before)


def search(rows: Rows, way: str, step: float, batch: int = 8) -> Any:
    return rows.add("search", way=way, batch=batch, prefix=100, beam=4, ms_step=step, ms_all=10 * step)


def test_sections_that_fail_or_take_too_long_are_recorded(rows: Rows) -> None:
    rows.section("broken", 1, 9, lambda: 1 / 0)
    began = time.monotonic()
    rows.section("slow", 1, 1, lambda: time.sleep(30))
    assert time.monotonic() - began < 10
    rows.section("long", 100, 200, lambda: search(rows, "never", 1.0))
    rows.section("good", 1, 9, lambda: search(rows, "graphs", 2.0))
    record = json.loads(rows.output.read_text())
    assert [one["section"] for one in record["errors"]] == ["broken", "slow"]
    assert "ZeroDivisionError" in record["errors"][0]["error"] and "took too long" in record["errors"][1]["error"]
    assert [one.partition(":")[0] for one in record["left_out"]] == ["long"]
    assert [row["way"] for row in record["rows"]] == ["graphs"]


def test_ratios_are_to_generate_on_the_same_prefixes(rows: Rows) -> None:
    ours = search(rows, "graphs", 2.0)
    search(rows, "graphs", 3.0, batch=1)
    search(rows, "generate", 5.0)
    assert (ours["x_generate_step"], ours["x_generate_all"]) == (2.5, 2.5)
    table = rows.output.with_suffix(".md").read_text()
    assert "card: none" in table and "| graphs | 8 | 100 | 4 | 2 | 20 | 2.5 | 2.5 |" in table
    assert "| graphs | 1 | 100 | 4 | 3 | 30 |  |  |" in table


def test_results_of_the_tests_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "tests.jsonl"
    assert read_tests(file) == {} == read_tests(None)
    outcomes = ["passed", "failed", "passed", "skipped"]
    file.write_text("".join(json.dumps({"test": f"t{n}", "outcome": one}) + "\n" for n, one in enumerate(outcomes)))
    found = read_tests(file)
    assert found["tests"] == "2 passed, 1 failed, 1 skipped (t1)" and len(found["test_results"]) == 4
