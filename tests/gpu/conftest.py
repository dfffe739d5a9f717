"""Tests that need a GPU: skipped with the reason where there is none, recorded as JSON, cut off when time is up.

    PAM_GPU_TESTS_ON_CPU=1   run them on a CPU with tiny models: whether the tests themselves work
    PAM_GPU_REPORT=FILE      one line of JSON per test, written as it ends
    PAM_GPU_SECONDS=N        tests that would begin later than N seconds after the start are skipped

run.sh beside this file sets them.
"""

import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
ON_CPU = os.environ.get("PAM_GPU_TESTS_ON_CPU") == "1" and not torch.cuda.is_available()
BEGAN = time.monotonic()
# Most telling first. The kernels in the shape of one LLM come before all, in other shapes last.
NAMES = ("equality", "invariance", "syncs", "memory", "frontend", "options", "large_llms", "kernels")
FIRST = "Qwen2.5-3B-bfloat16"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of this folder in their order."""
    own = [item for item in items if HERE in item.path.parents]
    own.sort(key=lambda item: (FIRST not in item.name, NAMES.index(item.path.stem.removeprefix("test_"))))
    places = iter(own)
    items[:] = [next(places) if HERE in item.path.parents else item for item in items]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line per test: name, outcome, seconds, what it measured, why it failed or was skipped."""
    path = os.environ.get("PAM_GPU_REPORT")
    if not path or not report.nodeid.startswith("tests/gpu/") or (report.when != "call" and report.passed):
        return
    line: dict[str, Any] = {
        "test": report.nodeid.removeprefix("tests/gpu/"),
        "outcome": "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome,
        "seconds": round(report.duration, 2),
        **dict(report.user_properties),
    }
    if report.failed:
        line["why"] = str(report.longrepr)[-1500:]
    elif report.skipped:
        line["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_setup() -> None:
    """A GPU, or a dry run; time left. Before any fixture, since those of a module need a GPU, too."""
    if not torch.cuda.is_available() and not ON_CPU:
        pytest.skip("needs a CUDA GPU (PAM_GPU_TESTS_ON_CPU=1 runs the tests themselves on a CPU)")
    if time.monotonic() - BEGAN > float(os.environ.get("PAM_GPU_SECONDS", "inf")):
        pytest.skip("no time left (PAM_GPU_SECONDS)")


@pytest.fixture(autouse=True, scope="module")
def _tidy() -> Iterator[None]:
    """Afterwards memory is free that the module no longer holds."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if ON_CPU else "cuda"


@pytest.fixture(scope="session")
def half() -> torch.dtype:
    """Precision of decoding on the device: bfloat16 on a GPU; a CPU promises its invariance in float32."""
    return torch.float32 if ON_CPU else torch.bfloat16
